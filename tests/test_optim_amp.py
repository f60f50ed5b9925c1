"""gradfuse.optim under torch.amp.GradScaler: the scale is folded into the step."""

import math

import pytest
import torch
from helpers import HOST_BACKENDS
from test_optim import BOTH, TORCHS, contents, fill, fresh, made

from gradfuse.policies import Norm, Value

pytestmark = HOST_BACKENDS


def scaled(params, scaler, step):
    """Gradients as the backward pass of a scaled loss leaves them."""
    scaler.scale(torch.zeros(()))
    fill(params, step, scaler.get_scale())


@BOTH
def test_step_without_unscale(rule, backend):
    ours, theirs = fresh(), fresh()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain = torch.amp.GradScaler("cpu", init_scale=1024.0)
    a, b = made(rule, ours, clip=1.0), made(TORCHS[rule], theirs)
    for step in range(3):
        scaled(ours, scaler, step)
        scaler.step(a)
        scaler.update()
        scaled(theirs, plain, step)
        plain.unscale_(b)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        plain.step(b)
        plain.update()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=2e-6, atol=1e-7)


@BOTH
def test_step_after_unscale(rule, backend):
    """Unscaled once, not twice."""
    ours, theirs = fresh(), fresh()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    a, b = made(rule, ours, clip=1.0), made(rule, theirs, clip=1.0)
    scaled(ours, scaler, 0)
    scaler.unscale_(a)
    scaler.step(a)
    fill(theirs, 0)
    b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=2e-6, atol=1e-7)


@BOTH
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_an_inf_halves_the_scale_and_skips(rule, nonfinite, backend):
    one, two = fresh(), fresh()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    a = made(rule, one, clip=1.0, nonfinite=nonfinite)
    b = made(rule, two, clip=1.0, nonfinite=nonfinite)
    scaled(one, scaler, 0)
    scaled(two, scaler, 0)
    scaler.step(a)
    scaler.step(b)
    scaler.update()
    before, other = contents(a), contents(b)
    scaled(one, scaler, 1)
    scaled(two, scaler, 1)
    one[0].grad[0, 0] = math.inf
    scaler.step(a)
    scaler.step(b)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert contents(a) == before
    assert contents(b) != other
    assert (a.skipped_steps, b.skipped_steps) == (1, 0)
    scaled(one, scaler, 2)
    scaler.step(a)
    assert contents(a) != before


POLICIES = {
    "norm": (lambda: Norm(1.0), lambda p: torch.nn.utils.clip_grad_norm_(p, 1.0)),
    "value": (lambda: Value(0.25), lambda p: torch.nn.utils.clip_grad_value_(p, 0.25)),
}


@BOTH
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("unscale", [False, True])
def test_policies_bound_unscaled_gradients(rule, policy, unscale, backend):
    """Whether the scaler divides before the step or in it; an inf skips, and halves the scale."""
    bound, torchs_clip = POLICIES[policy]
    ours, theirs = fresh(), fresh()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    a, b = made(rule, ours, clip=bound()), made(TORCHS[rule], theirs)
    for step in range(5):
        scaled(ours, scaler, step)
        if step == 2:
            ours[0].grad[0, 0] = math.inf
            before = contents(a)
        if unscale:
            scaler.unscale_(a)
        scaler.step(a)
        scaler.update()
        if step == 2:
            assert contents(a) == before
            assert a.report.skipped
            continue
        fill(theirs, step)
        torchs_clip(theirs)
        b.step()
    assert scaler.get_scale() == 2048.0  # grown by two, halved, grown by two
    assert a.skipped_steps == 1
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=2e-6, atol=1e-7)
