"""clip_in_step: torch's fused optimizers with the clip inside their step."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import HOST_BACKENDS, bits
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import gradfuse.optim
from gradfuse.optim import clip_in_step

pytestmark = pytest.mark.usefixtures("backend")
RULES = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
    "adamw-amsgrad": (torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True}),
    "adam": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd-momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
}
rules = pytest.mark.parametrize("rule", RULES)


def net(dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 3)).to(dtype)


def made(rule: str, params, **more) -> torch.optim.Optimizer:
    cls, options = RULES[rule]
    return cls(params, fused=True, **options, **more)


def give(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = (torch.randn(p.shape) * scale).to(p.dtype)


def tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    state = [optimizer.state.get(p, {}) for p in listed]
    return listed + [s[k] for s in state for k in sorted(s) if s[k] is not None]


def assert_close(ours, torchs) -> None:
    for a, b in zip(tensors(ours), tensors(torchs), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


@rules
def test_no_hook_hears_how_a_step_is_tried_out(rule: str, backend: str) -> None:
    model = net()
    optimizer = made(rule, model.parameters())
    heard: list[torch.optim.Optimizer] = []
    handle = register_optimizer_step_pre_hook(lambda o, *_: heard.append(o))
    try:
        clip_in_step(optimizer, 1.0)
        give(model, 0)
        optimizer.step()
    finally:
        handle.remove()
    assert heard == [optimizer]


@rules
def test_same_as_torch_clip_and_step(rule: str, backend: str) -> None:
    a, b = net(), net()
    ours, torchs = made(rule, a.parameters()), made(rule, b.parameters())
    handle = clip_in_step(ours, 1.0)
    for step in range(5 if backend == "ptx" else 50):
        scale = 10.0 ** (step % 5 - 3)  # some clip, some do not
        give(a, step, scale)
        give(b, step, scale)
        norm = nn.utils.clip_grad_norm_(b.parameters(), 1.0)
        ours.step()
        torchs.step()
        assert handle.report.total_norm == pytest.approx(float(norm), rel=1e-5)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-5, atol=1e-7)
    assert_close(ours, torchs)
    assert handle.skipped_steps == 0
    assert not hasattr(ours, "grad_scale")
    assert not hasattr(ours, "found_inf")


@HOST_BACKENDS
@rules
def test_a_quiet_step_is_torchs_bit_for_bit(rule: str) -> None:
    a, b = net(), net()
    ours, torchs = made(rule, a.parameters()), made(rule, b.parameters())
    handle = clip_in_step(ours, math.inf)
    for step in range(3):
        give(a, step)
        give(b, step)
        ours.step()
        torchs.step()
    assert bits(tensors(ours)) == bits(tensors(torchs))
    assert not handle.report.clipped


@rules
def test_gradients_of_1e20(rule: str) -> None:
    a, b = net(), net(torch.float64)
    ours, exact = made(rule, a.parameters()), made(rule, b.parameters())
    handle = clip_in_step(ours, 1.0)
    give(a, 0, 1e20)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        q.data.copy_(p.data)
        q.grad = p.grad.double()
    nn.utils.clip_grad_norm_(b.parameters(), 1.0)
    ours.step()
    exact.step()
    assert handle.report.clipped_norm == pytest.approx(1.0)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-6)


def test_a_coefficient_beyond_float32_skips() -> None:
    model = net()
    optimizer = made("sgd", model.parameters())
    handle = clip_in_step(optimizer, 1e-10)
    before = bits(tensors(optimizer))
    give(model, 0, 1e36)
    optimizer.step()
    assert handle.report.skipped
    assert handle.skipped_steps == 1
    assert bits(tensors(optimizer)) == before


@HOST_BACKENDS
@rules
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 3])
def test_nonfinite_is_skipped_and_not_counted(rule: str, bad: float, at: int) -> None:
    a, b = net(), net()
    ours, torchs = made(rule, a.parameters()), made(rule, b.parameters())
    handle = clip_in_step(ours, 1.0)
    for step in range(6):
        give(a, step)
        give(b, step)
        if step == at:
            a[0].weight.grad[1, 2] = bad
            grad = a[0].weight.grad.clone()
            ours.step()
            assert handle.report.skipped
            assert handle.report.first_nonfinite().name == "0"
            assert bits(a[0].weight.grad) == bits(grad)
            continue
        nn.utils.clip_grad_norm_(b.parameters(), 1.0)
        ours.step()
        torchs.step()
    assert handle.skipped_steps == 1
    assert_close(ours, torchs)


def test_error_and_propagate() -> None:
    model = net()
    optimizer = made("adamw", model.parameters())
    handle = clip_in_step(optimizer, 1.0, nonfinite="error")
    give(model, 0)
    model[0].bias.grad[0] = math.nan
    before = bits(tensors(optimizer))
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert bits(tensors(optimizer)) == before
    assert not hasattr(optimizer, "grad_scale")
    handle.remove()
    handle = clip_in_step(optimizer, 1.0, nonfinite="propagate")
    optimizer.step()
    assert all(bool(p.isnan().all()) for p in model.parameters())
    assert handle.skipped_steps == 0


@HOST_BACKENDS
@rules
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(rule: str, unscale: bool) -> None:
    a, b = net(), net()
    ours, torchs = made(rule, a.parameters()), made(rule, b.parameters())
    handle = clip_in_step(ours, 0.5)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2)]
    for step in range(8):
        x = torch.randn(16, 7, generator=torch.Generator().manual_seed(step))
        for model, optimizer, scaler in ((a, ours, scalers[0]), (b, torchs, scalers[1])):
            optimizer.zero_grad()
            loss = model(x).square().mean() * 3
            scaler.scale(loss * math.inf if step == 4 else loss).backward()
            if unscale or optimizer is torchs:
                scaler.unscale_(optimizer)
            if optimizer is torchs:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            assert not hasattr(optimizer, "grad_scale")
        assert handle.report.skipped == (step == 4)
    assert_close(ours, torchs)
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert handle.skipped_steps == 1


@HOST_BACKENDS
def test_add_param_group_state_dict_and_remove() -> None:
    a, b = net(), net()
    ours, torchs = made("adamw", a[0].parameters()), made("adamw", b[0].parameters())
    handle = clip_in_step(ours, 1.0)
    for step in range(9):
        if step == 3:
            ours.add_param_group({"params": list(a[2].parameters()), "lr": 0.1})
            torchs.add_param_group({"params": list(b[2].parameters()), "lr": 0.1})
        if step == 6:
            saved = copy.deepcopy(torchs.state_dict())
            assert saved.keys() == ours.state_dict().keys()
            torchs.load_state_dict(copy.deepcopy(ours.state_dict()))
            ours.load_state_dict(saved)
        for model in (a, b):
            give(model, step)
        parts = [p for g in torchs.param_groups for p in g["params"]]
        nn.utils.clip_grad_norm_(parts, 1.0)
        ours.step()
        torchs.step()
    assert len(handle.report.parameters) == 4
    assert_close(ours, torchs)
    handle.remove()
    last = handle.report
    give(a, 0)
    ours.step()
    assert handle.report is last
    clip_in_step(ours, 1.0)


def test_names_and_parameters_without_gradients() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.named_parameters(), fused=True)
    handle = clip_in_step(optimizer, 1.0)
    assert handle.report is None
    give(model, 0)
    model[0].weight.grad = None
    optimizer.step()
    assert [p.name for p in handle.report.parameters] == ["0.bias", "2.weight", "2.bias"]


def test_low_precision_and_a_schedule_from_zero() -> None:
    model = net(torch.bfloat16)
    optimizer = made("adamw", model.parameters())
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-8, 1.0)
    handle = clip_in_step(optimizer, 1.0)
    give(model, 0)
    optimizer.step()
    schedule.step()
    assert handle.report.clipped_norm == pytest.approx(1.0)


def broken(*args, **kwargs):
    raise RuntimeError("broken")


@HOST_BACKENDS
@pytest.mark.parametrize("at", ["kernel", "later hook"])
def test_a_step_that_raises_leaves_nothing_for_the_next(at: str, monkeypatch) -> None:
    a, b = net(), net()
    ours, torchs = (made("sgd-momentum", m.parameters()) for m in (a, b))
    handle = clip_in_step(ours, 1.0)
    give(a, 0)
    with monkeypatch.context() as patch:
        if at == "kernel":
            patch.setattr(torch, "_fused_sgd_", broken)
        else:
            hook = ours.register_step_pre_hook(broken)
        with pytest.raises(RuntimeError, match="broken"):
            ours.step()
    assert not hasattr(ours, "grad_scale")
    assert not hasattr(ours, "found_inf")
    if at == "later hook":
        hook.remove()
    for step, scale in enumerate((10.0, 0.01)):
        give(a, step, scale)
        give(b, step, scale)
        norm = nn.utils.clip_grad_norm_(b.parameters(), 1.0)
        ours.step()
        torchs.step()
        assert handle.report.total_norm == pytest.approx(float(norm), rel=1e-5)
    assert_close(ours, torchs)


@HOST_BACKENDS
@pytest.mark.parametrize("then", ["step", "remove", "load"])
def test_a_skipped_step_that_raises(then: str) -> None:
    """The momentum that torch allocated and left uninitialised is removed. Momentum that was loaded
    since then stays."""
    a, b = net(), net()
    ours, torchs = (made("sgd-momentum", m.parameters()) for m in (a, b))
    hook = ours.register_step_post_hook(broken)  # runs before ours, so ours is not called
    handle = clip_in_step(ours, 1.0)
    give(a, 0)
    a[0].weight.grad[1, 2] = math.nan
    with pytest.raises(RuntimeError, match="broken"):
        ours.step()
    hook.remove()
    if then == "remove":
        handle.remove()
    elif then == "load":
        give(b, 5)
        nn.utils.clip_grad_norm_(b.parameters(), 1.0)
        torchs.step()
        a.load_state_dict(b.state_dict())
        ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    give(a, 1, 1e-3)
    give(b, 1, 1e-3)
    ours.step()
    torchs.step()
    assert_close(ours, torchs)
    assert not hasattr(ours, "grad_scale")
    assert not hasattr(ours, "found_inf")


@HOST_BACKENDS
def test_a_step_that_raises_under_a_grad_scaler(monkeypatch) -> None:
    """The scaler's attributes stay, as after torch's own step. Ours do not."""
    model = net()
    optimizer = made("adam", model.parameters())
    clip_in_step(optimizer, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    give(model, 0, 1024.0)
    monkeypatch.setattr(torch, "_fused_adam_", broken)
    with pytest.raises(RuntimeError, match="broken"):
        scaler.step(optimizer)
    assert float(optimizer.grad_scale) == 1024.0
    assert float(optimizer.found_inf) == 0.0


class Own(torch.optim.SGD):
    """A subclass whose step keeps state and calls its base's step."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


@HOST_BACKENDS
def test_the_step_of_a_subclass() -> None:
    a, b = net(), net()
    torch.optim.SGD(a.parameters())  # torch then wraps the base's step for hooks too
    ours = Own(a.parameters(), 0.1, momentum=0.9, fused=True)
    torchs = torch.optim.SGD(b.parameters(), 0.1, momentum=0.9, fused=True)
    handle = clip_in_step(ours, 1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(ours, 1.0)
    for step in range(4):
        give(a, step)
        give(b, step)
        if step == 2:
            a[0].weight.grad[1, 2] = math.nan
            ours.step()
            continue
        nn.utils.clip_grad_norm_(b.parameters(), 1.0)
        ours.step()
        torchs.step()
        schedule.step()
    assert ours.steps == 4
    assert handle.skipped_steps == 1
    assert_close(ours, torchs)


class Forgetful(torch.optim.AdamW):
    """Ignores grad_scale and found_inf, like a fused optimizer of a torch without them."""

    def step(self, closure=None):
        kept = {k: self.__dict__.pop(k) for k in ("grad_scale", "found_inf") if k in self.__dict__}
        super().step(closure)
        self.__dict__.update(kept)


class Stubborn(torch.optim.SGD):
    """Divides by grad_scale but does not skip for found_inf."""

    def step(self, closure=None):
        if getattr(self, "found_inf", None) is not None:
            self.found_inf = torch.zeros(())
        super().step(closure)


class Late(torch.optim.SGD):
    """Divides by grad_scale only until there is momentum."""

    def step(self, closure=None):
        if any("momentum_buffer" in s for s in self.state.values()):
            self.grad_scale = None
        super().step(closure)


class LateStubborn(torch.optim.SGD):
    """Skips for found_inf only until there is momentum."""

    def step(self, closure=None):
        if any("momentum_buffer" in s for s in self.state.values()):
            self.found_inf = None
        super().step(closure)


class Partial(torch.optim.AdamW):
    """Divides by grad_scale, but not with amsgrad."""

    def step(self, closure=None):
        if any(group["amsgrad"] for group in self.param_groups):
            self.grad_scale = None
        super().step(closure)


class Demanding(torch.optim.SGD):
    def __init__(self, params, lr, needed, **more) -> None:
        super().__init__(params, lr, **more)


@HOST_BACKENDS
def test_refusals() -> None:
    params = list(net().parameters())
    adamw = torch.optim.AdamW(params, fused=True)
    cases = [
        (torch.optim.AdamW(params), RuntimeError, "fused=True.*got fused=None"),
        (torch.optim.SGD(params, foreach=True), RuntimeError, "fused=True"),
        (torch.optim.Adagrad(params, fused=True), TypeError, "got Adagrad"),
        (torch.optim.RMSprop(params), TypeError, "got RMSprop"),
        (gradfuse.optim.AdamW(params), TypeError, "clips by itself"),
        (Forgetful(params, fused=True), RuntimeError, "does not divide by grad_scale"),
        (Stubborn(params, fused=True), RuntimeError, "does not skip for found_inf"),
        (Late(params, fused=True, momentum=0.9), RuntimeError, "does not divide by grad_scale"),
        (LateStubborn(params, fused=True, momentum=0.9), RuntimeError, "does not skip"),
        (Demanding(params, 0.1, 1, fused=True), RuntimeError, "could not be tried out"),
        (params, TypeError, "got list"),
    ]
    for optimizer, error, message in cases:
        with pytest.raises(error, match=message):
            clip_in_step(optimizer, 1.0)
    with pytest.raises(ValueError, match="max_norm"):
        clip_in_step(adamw, -1.0)
    with pytest.raises(ValueError, match="nonfinite"):
        clip_in_step(adamw, 1.0, nonfinite="zero")
    handle = clip_in_step(adamw, 1.0)
    with pytest.raises(RuntimeError, match="already"):
        clip_in_step(adamw, 1.0)
    with pytest.raises(ValueError, match="max_norm"):
        handle.max_norm = math.nan
    with pytest.raises(RuntimeError, match="closure"):
        adamw.step(lambda: 1.0)
    adamw.add_param_group({"params": [torch.zeros(2)], "fused": False})
    with pytest.raises(RuntimeError, match="fused=True"):
        adamw.step()


@HOST_BACKENDS
def test_options_are_tried_out_one_by_one() -> None:
    """The options of each group are tried out, and again when they change."""
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "amsgrad": True}]
    with pytest.raises(RuntimeError, match="does not divide by grad_scale"):
        clip_in_step(Partial(groups, fused=True), 1.0)
    optimizer = Partial(params, fused=True)
    clip_in_step(optimizer, 1.0)
    for p in params:
        p.grad = torch.ones(2)
    before = bits(params)
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(RuntimeError, match="does not divide by grad_scale"):
        optimizer.step()
    assert bits(params) == before


@HOST_BACKENDS
@pytest.mark.parametrize("decay", [0.5, 1.0])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_a_decay_that_cancels_a_gradient_is_not_taken_for_a_skip(cls, decay: float) -> None:
    clip_in_step(cls(net().parameters(), weight_decay=decay, maximize=True, fused=True), 1.0)
