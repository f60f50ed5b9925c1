"""Where frameworks look for a step that gradfuse.optim left out, and what else they do to steps."""

import math
import warnings

import pytest
import torch
from helpers import HOST_BACKENDS, bits, random

import gradfuse
from gradfuse.optim import SGD, AdamW

pytestmark = [pytest.mark.usefixtures("backend"), HOST_BACKENDS]

SCALERS = pytest.mark.parametrize(
    "scaler", [torch.amp.GradScaler, gradfuse.optim.GradScaler], ids=["torch", "gradfuse"]
)


def parameter(n=3):
    return torch.nn.Parameter(torch.ones(n))


def give(p, value):
    p.grad = torch.full_like(p, value)


def ready(scaler, scale=4.0):
    scaler = scaler("cpu", init_scale=scale)
    scaler.scale(torch.zeros(()))
    return scaler


@SCALERS
def test_accelerate_sees_a_skipped_step(scaler):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.optimizer import AcceleratedOptimizer

    accelerate.Accelerator(cpu=True)
    p = parameter()
    optimizer = AcceleratedOptimizer(SGD([p], lr=0.1, clip=10.0), scaler=ready(scaler))
    seen = []
    for value in (1.0, math.inf, 1.0):
        give(p, value)
        optimizer.step()
        seen.append((optimizer.step_was_skipped, optimizer.scaler.get_scale()))
    assert seen == [(False, 4.0), (True, 2.0), (False, 2.0)]
    assert torch.allclose(p, torch.full_like(p, 1.0 - 0.1 / 4.0 - 0.1 / 2.0))


@SCALERS
def test_a_replaced_step_is_not_called_where_it_would_skip(scaler):
    p = parameter()
    optimizer, calls = SGD([p], lr=0.1), []
    step = optimizer.step

    def replaced(*args, **kwargs):
        calls.append(1)
        return step(*args, **kwargs)

    optimizer.step = replaced
    scaler = ready(scaler)
    for value in (math.inf, 2.0):
        give(p, value)
        scaler.step(optimizer)
        scaler.update()
    assert calls == [1]
    assert torch.allclose(p, torch.full_like(p, 0.9))


@SCALERS
def test_a_scheduler_replaces_no_step(scaler):
    """torch's schedulers wrap step(), and the scale is handed over all the same."""
    p = parameter()
    optimizer = SGD([p], lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 10)
    assert optimizer._step_supports_amp_scaling
    give(p, 4.0)
    ready(scaler).step(optimizer)
    assert torch.equal(p.grad, torch.full_like(p, 4.0))  # not unscaled in place
    assert torch.allclose(p, torch.full_like(p, 0.9))


def test_a_hundred_skipped_steps_warn_once():
    good, bad = parameter(), parameter(5)
    optimizer = AdamW([("good", good), ("bad", bad)], clip=1.0)
    give(good, 1.0)
    give(bad, 1.0)
    bad.grad[2:4] = math.nan

    def run(steps):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(steps):
                optimizer.step()
        return [str(w.message) for w in caught]

    assert run(99) == []
    bad.grad.zero_()
    assert run(1) == []
    bad.grad[2:4] = math.nan
    assert run(99) == []
    words = "AdamW: the last 100 steps changed nothing; the gradient of bad has 2 NaN or inf of 5"
    assert run(1) == [words]
    assert run(300) == []


def test_a_policy_that_skips_a_hundred_steps():
    class Never(gradfuse.policies.Policy):
        def decide(self, norm, norms, state):
            return gradfuse.policies.Decision(torch.ones_like(norm), skip=norm > 0.0)

    p = parameter()
    optimizer = SGD([p], clip=Never())
    give(p, 1.0)
    for _ in range(99):
        optimizer.step()
    with pytest.warns(UserWarning, match="no gradient is NaN or inf, so a policy or the loss"):
        optimizer.step()


def test_a_step_within_the_backward_pass():
    """One optimizer a parameter, called by the hook: there is no global norm yet."""
    model = torch.nn.Linear(4, 3)
    other = torch.nn.Linear(4, 3)
    other.load_state_dict(model.state_dict())

    def attach(module, clip):
        optimizers = {p: SGD([p], lr=0.1, clip=clip) for p in module.parameters()}

        def step(p):
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in module.parameters():
            p.register_post_accumulate_grad_hook(step)

    attach(model, 0.5)
    x = random(2, 4)
    with pytest.warns(UserWarning, match="SGD.step: runs within a backward pass"):
        model(x).square().sum().backward()
    other(x).square().sum().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        factor = min(1.0, 0.5 / (float(q.grad.norm()) + 1e-6))
        assert torch.allclose(p, q - 0.1 * factor * q.grad, atol=1e-6)
    attach(other, None)
    other.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other(x).square().sum().backward()


@pytest.mark.parametrize("inside", ["clip", "step"])
def test_a_compiled_step(inside):
    """Forward, backward, clip and step in one function; the backward breaks the graph."""
    ours, theirs = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    expected = torch.optim.AdamW(theirs.parameters(), lr=0.1)
    if inside == "step":
        optimizer = AdamW(ours.parameters(), lr=0.1, clip=0.5)
    else:
        optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1)

    def train(x):
        ours(x).square().sum().backward()
        if inside == "clip":
            gradfuse.clip_grad_norm_(ours.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()

    torch._dynamo.reset()
    compiled = torch.compile(train, backend="aot_eager")
    for seed in range(3):
        x = random(2, 4, seed=seed)
        compiled(x)
        theirs(x).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        expected.step()
        expected.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)


def test_replicas_of_data_parallel():
    """As torch.nn.parallel.replicate makes them: plain tensors in place of parameters."""
    module = gradfuse.nn.BatchNormAct2d(3)
    replica = module._replicate_for_data_parallel()
    for name, t in [*module.named_parameters(), *module.named_buffers()]:
        setattr(replica, name, t.clone() if t.requires_grad else t)
    x = random(2, 3, 4, 4)
    y = replica(x)
    y.sum().backward()
    assert module.weight.grad is not None
    assert bits([module.running_mean]) == bits([replica.running_mean])
    module.reset_running_stats()
    assert torch.equal(module(x), y)


NAMED = {
    "get_total_norm": lambda p: gradfuse.get_total_norm([p.grad]),
    "clip_grad_norm_": lambda p: gradfuse.clip_grad_norm_([p], 1.0),
    "clip_grads_with_norm_": lambda p: gradfuse.clip_grads_with_norm_([p], 1.0, torch.ones(())),
    "clip_grad_value_": lambda p: gradfuse.clip_grad_value_([p], 1.0),
    "adaptive_clip_grad_": lambda p: gradfuse.adaptive_clip_grad_([p]),
    "GradClipper.clip_": lambda p: gradfuse.GradClipper([p], 1.0).clip_(),
    "AdamW.step": lambda p: AdamW([p], clip=1.0).step(),
    "SGD.step": lambda p: SGD([p], clip=gradfuse.policies.ZClip()).step(),
    "batch_norm_act": lambda p: gradfuse.batch_norm_act(p[None], None, None, training=True),
    "batch_norm_act_backward": lambda p: gradfuse.batch_norm_act(
        torch.ones(2, 3, requires_grad=True), None, None, training=True
    ).sum().backward(),
}  # fmt: skip


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("name", NAMED)
def test_the_profiler_shows_each_op(name, backend):
    if backend == "reference":
        pytest.skip("torch's own ops have their own events")
    p = torch.nn.Parameter(torch.ones(2, 3) if name == "batch_norm_act" else torch.ones(3))
    give(p, 1.0)
    if name == "batch_norm_act":
        p = torch.ones(1, 3, 4)[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        NAMED[name](p)
    assert [e.count for e in profile.key_averages() if e.key == f"gradfuse::{name}"] == [1]
