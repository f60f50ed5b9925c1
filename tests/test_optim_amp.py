"""gradfuse.optim under torch.amp.GradScaler: the scale is folded into the step."""

import copy
import functools
import math
import pickle

import pytest
import torch
from helpers import HOST_BACKENDS, bits
from test_optim import BOTH, EVERY, TORCHS, contents, fill, fresh, made
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gradfuse import optim
from gradfuse.optim import grad_scaler
from gradfuse.policies import Decision, Norm, Policy, Value

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


@EVERY
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
    """The scaler may divide before the step or in it. An inf skips and halves the scale."""
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


# gradfuse.optim.GradScaler, compared with torch's.

SCALERS = (optim.GradScaler, torch.amp.GradScaler)
INFS = (1, 4, 5, 9)


def pair(rule, **options):
    """Parameters, optimizer and scaler, twice: first with our scaler, then with torch's."""
    out = []
    for cls in SCALERS:
        params = fresh()
        options_of_scaler = {"init_scale": 1024.0, "growth_interval": 2}
        out.append((params, made(rule, params, **options), cls("cpu", **options_of_scaler)))
    return out


def step_both(both, step, unscale=False, inf=False):
    for params, optimizer, scaler in both:
        scaled(params, scaler, step)
        if inf:
            params[1].grad.view(-1)[-1] = math.nan if step % 2 else -math.inf
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()


def assert_same(both):
    (_, a, one), (_, b, two) = both
    assert contents(a) == contents(b)
    assert a.skipped_steps == b.skipped_steps
    assert one.state_dict() == two.state_dict()


@pytest.fixture
def torchs_checks(monkeypatch):
    """The calls of torch's check: the number of tensors in each."""
    calls = []
    check = torch._amp_foreach_non_finite_check_and_unscale_

    def counted(*arguments):
        calls.append(len(arguments[0]))
        return check(*arguments)

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", counted)
    return calls


@EVERY
@pytest.mark.parametrize("nonfinite", ["skip", "error", "propagate"])
@pytest.mark.parametrize("clip", [None, 1.0, Norm(1.0)], ids=["none", "number", "policy"])
def test_our_scaler_does_what_torchs_does(rule, nonfinite, clip, backend, torchs_checks):
    both = pair(rule, nonfinite=nonfinite, clip=clip)
    for step in range(12):
        step_both(both, step, inf=step in INFS)
        assert_same(both)
    assert both[0][1].skipped_steps == len(INFS)
    assert len(torchs_checks) == 12  # by torch's scaler alone


@EVERY
def test_our_scaler_neither_reads_nor_writes_gradients(rule, backend, monkeypatch):
    (params, optimizer, scaler), _ = pair(rule, clip=1.0)
    monkeypatch.delattr(torch, "_amp_foreach_non_finite_check_and_unscale_")
    for inf in (False, True):
        scaled(params, scaler, 0)
        if inf:
            params[0].grad[0, 0] = math.inf
        before = bits([p.grad for p in params]), [p.grad._version for p in params]
        scaler.step(optimizer)
        assert before == (bits([p.grad for p in params]), [p.grad._version for p in params])
        scaler.update()
    assert scaler.get_scale() == 512.0


@EVERY
def test_after_unscale_the_check_is_torchs(rule, backend, torchs_checks):
    both = pair(rule, clip=1.0)
    for step in range(6):
        step_both(both, step, unscale=step % 2 == 0, inf=step in INFS)
        assert_same(both)
    assert len(torchs_checks) == 6 + 3


def test_other_optimizers_and_several(backend, torchs_checks):
    """All optimizers share one scale. An inf in one of them skips only that one, and halves the
    scale."""
    outcomes = []
    for cls in SCALERS:
        scaler = cls("cpu", init_scale=1024.0, growth_interval=2)
        lists = [fresh() for _ in range(3)]
        optimizers = [
            made(optim.AdamW, lists[0], clip=1.0),
            made(optim.SGD, lists[1]),
            torch.optim.SGD(lists[2], lr=0.1),
        ]
        for step in range(8):
            for params in lists:
                scaled(params, scaler, step)
            lists[step % 3][0].grad[0, 0] = math.inf if step in INFS else 0.0
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
        outcomes.append((bits([p.detach() for ps in lists for p in ps]), scaler.state_dict()))
    assert outcomes[0] == outcomes[1]
    assert len(torchs_checks) == 8 * (1 + 3)


def test_a_policy_that_skips_found_no_inf(backend):
    class Never(Policy):
        def decide(self, norm, norms, state):
            return Decision(torch.ones_like(norm), skip=torch.ones_like(norm, dtype=torch.bool))

    both = pair(optim.AdamW, clip=Never())
    for step in range(3):
        step_both(both, step)
        assert_same(both)
    assert both[0][1].skipped_steps == 3
    assert both[0][2].get_scale() == 2048.0


class OwnStep(optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


KINDS = ["hook", "global hook", "closure", "own step", "patched", "as known", "scheduled"]


@pytest.mark.parametrize("kind", KINDS)
def test_where_a_step_may_see_other_gradients_the_check_is_torchs(kind, backend, torchs_checks):
    (params, optimizer, scaler), _ = pair(OwnStep if kind == "own step" else optim.SGD)
    handle = None
    if kind == "hook":
        handle = optimizer.register_step_pre_hook(lambda *_: None)
    elif kind == "global hook":
        handle = register_optimizer_step_pre_hook(lambda *_: None)
    elif kind == "patched":
        remove_inf_before(optimizer)
    elif kind == "scheduled":  # the scheduler wraps the step to count its calls
        torch.optim.lr_scheduler.ConstantLR(optimizer)
    scaled(params, scaler, 0)
    scaler.step(optimizer, *([lambda: None] if kind == "closure" else []))
    assert len(torchs_checks) == (kind not in ("as known", "scheduled"))
    if handle is not None:
        handle.remove()


def remove_inf_before(optimizer):
    step = optimizer.step

    @functools.wraps(step)
    def patched(*args, **kwargs):
        for p in params_of(optimizer):
            p.grad.nan_to_num_(0.0, 0.0, 0.0)
        return step(*args, **kwargs)

    optimizer.step = patched


@pytest.mark.parametrize("scheduled", [True, False])
def test_an_inf_that_a_patched_step_removes_halves_the_scale(scheduled, backend):
    both = pair(optim.SGD)
    for _, optimizer, _ in both:
        if scheduled:
            torch.optim.lr_scheduler.ConstantLR(optimizer)
        remove_inf_before(optimizer)
    step_both(both, 0)
    step_both(both, 1, inf=True)
    assert_same(both)
    assert both[0][2].get_scale() == 512.0


@pytest.mark.no_kernel
def test_no_hook_hears_how_torchs_scaler_is_tried_out(backend):
    grad_scaler._torch_is_as_known.cache_clear()
    heard = []
    handle = register_optimizer_step_pre_hook(lambda *_: heard.append(1))
    try:
        assert grad_scaler._torch_is_as_known()
    finally:
        handle.remove()
    assert not heard


def in_its_own_way(self, optimizer, *args, **kwargs):
    """A step for torch's scaler that calls no method to check the gradients."""
    found = torch.tensor(float(any(not p.grad.isfinite().all() for p in params_of(optimizer))))
    self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {found.device: found}
    optimizer.grad_scale, optimizer.found_inf = self._get_scale_async(), found
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("name", ["step", "update", "_get_scale_async", "_per_optimizer_states"])
def test_a_scaler_of_another_torch_checks_for_itself(name, backend, monkeypatch, torchs_checks):
    assert grad_scaler._torch_is_as_known()
    both = pair(optim.SGD)
    stock = torch.amp.GradScaler
    with monkeypatch.context() as patched:
        if name == "step":
            patched.setattr(stock, name, in_its_own_way)
        elif name == "update":
            patched.setattr(stock, name, lambda self: None)
        elif name == "_get_scale_async":
            patched.delattr(stock, name)
        else:
            patched.setattr(stock, "__init__", lambda self, *_, **__: None)
        grad_scaler._torch_is_as_known.cache_clear()
        known = grad_scaler._torch_is_as_known()
    assert known == (name == "step")  # this step gives the right outcome by itself
    if name == "step":
        monkeypatch.setattr(stock, name, in_its_own_way)
    for step in range(6):
        step_both(both, step, inf=step in INFS)
        assert_same(both)
    grad_scaler._torch_is_as_known.cache_clear()
    assert bool(torchs_checks) == (name != "step")


def test_a_step_that_raises_is_checked_by_torch(backend):
    both = pair(optim.SGD)
    for params, optimizer, scaler in both:
        scaled(params, scaler, 0)
        params[0].grad[0, 0] = math.inf
        params.append(torch.nn.Parameter(torch.ones(4).expand(3, 4)))
        params[-1].grad = torch.ones(3, 4)
        optimizer.add_param_group({"params": params[-1:]})
        with pytest.raises(TypeError, match="plain dense parameters"):
            scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 512.0


def test_without_gradients_nothing_was_checked(backend):
    for params, optimizer, scaler in pair(optim.SGD):
        scaler.scale(torch.zeros(()))
        for p in params:
            p.grad = None
        scaler.step(optimizer)
        with pytest.raises(AssertionError, match="No inf checks"):
            scaler.update()


@pytest.mark.parametrize("scaler_of", SCALERS, ids=["ours", "torchs"])
def test_errors_of_the_scaler(scaler_of, backend):
    params = fresh()
    optimizer = made(optim.SGD, params, nonfinite="propagate")
    scaler = scaler_of("cpu")
    with pytest.raises(AssertionError, match="_scale is None"):
        scaler.step(optimizer)
    scaled(params, scaler, 0)
    with pytest.raises(RuntimeError, match="Closure"):
        scaler.step(optimizer, closure=lambda: None)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    scaler.update()
    again = pickle.loads(pickle.dumps(copy.deepcopy(scaler)))
    assert again.state_dict() == scaler.state_dict()


@pytest.mark.parametrize("scaler_of", SCALERS, ids=["ours", "torchs"])
def test_a_disabled_scaler_is_not_there(scaler_of, backend):
    params = fresh()
    optimizer = made(optim.SGD, params, nonfinite="propagate")
    fill(params, 0)
    params[0].grad[0, 0] = math.inf
    scaler = scaler_of("cpu", enabled=False)
    scaler.step(optimizer)
    scaler.update()
    assert not params[0].detach().isfinite().all()
    assert optimizer.skipped_steps == 0
