"""Tracers and dispatch modes record gradfuse's ops, or are told that they cannot."""

import pytest
import torch
from helpers import HOST_BACKENDS, random
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import gradfuse
from gradfuse.optim import SGD, AdamW

pytestmark = [
    pytest.mark.usefixtures("backend"),
    HOST_BACKENDS,
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning"),
]


def with_gradient(call):
    """A function of a gradient that clips it."""

    def run(grad):
        p = torch.zeros_like(grad)
        p.grad = grad * 1.0
        result = call(p)
        return p.grad if result is None else (p.grad, result)

    return run


def in_adaptive(p):
    p.fill_(1.0)
    gradfuse.adaptive_clip_grad_([p], 0.125)


FUNCTIONS = {
    "get_total_norm": lambda grad: gradfuse.get_total_norm([grad]),
    "clip_grad_norm_": with_gradient(lambda p: gradfuse.clip_grad_norm_([p], 0.5)),
    "clip_grads_with_norm_": with_gradient(
        lambda p: gradfuse.clip_grads_with_norm_([p], 0.5, torch.tensor(4.0))
    ),
    "clip_grad_value_": with_gradient(lambda p: gradfuse.clip_grad_value_([p], 0.5)),
    "adaptive_clip_grad_": with_gradient(in_adaptive),
    "batch_norm_act": lambda x: gradfuse.batch_norm_act(x, None, None, training=True, residual=x),
}
RECORDED_BY_JIT = {"get_total_norm", "batch_norm_act"}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


@each_function
@pytest.mark.parametrize("tracer", ["real", "fake", "symbolic"])
def test_a_traced_function_does_what_the_function_does(name, tracer):
    function, first, second = FUNCTIONS[name], random(6, 5, seed=1), random(6, 5, seed=2)
    traced = make_fx(function, tracing_mode=tracer)(first)
    torch.testing.assert_close(traced(second), function(second))


@pytest.mark.parametrize("name", sorted(RECORDED_BY_JIT))
def test_jit_trace(name):
    function, second = FUNCTIONS[name], random(6, 5, seed=2)
    traced = torch.jit.trace(function, (random(6, 5, seed=1),))
    torch.testing.assert_close(traced(second), function(second))


@pytest.mark.no_kernel
@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - RECORDED_BY_JIT))
def test_jit_trace_is_told_what_it_would_leave_out(name):
    """Calls that write a list of tensors."""
    with pytest.raises(RuntimeError, match=f"{name}: .* got torch.jit.trace"):
        torch.jit.trace(FUNCTIONS[name], (random(6, 5),))


@each_function
def test_fake_tensors(name):
    with FakeTensorMode():
        made = FUNCTIONS[name](torch.empty(6, 5))
    real = FUNCTIONS[name](random(6, 5))
    pairs = [(made, real)] if torch.is_tensor(made) else zip(made, real, strict=True)
    for fake, true in pairs:
        assert (fake.shape, fake.dtype, fake.stride()) == (true.shape, true.dtype, true.stride())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("tracer", ["jit", "export", "strict export"])
def test_traced_modules(training, tracer):
    module = gradfuse.nn.BatchNormAct2d(5, activation="silu").train(training)
    first, second = random(3, 5, 4, 4), random(3, 5, 4, 4, seed=1)
    if tracer == "jit":
        traced = torch.jit.trace(module, (first,), check_trace=False)
    else:
        traced = torch.export.export(module, (first,), strict=tracer != "export").module()
    module.reset_running_stats()
    assert torch.allclose(traced(second), module(second), atol=1e-6)


def test_a_traced_module_has_gradients():
    module = gradfuse.nn.BatchNormAct2d(5)
    x, y = (random(3, 5, 4, 4, seed=2).requires_grad_() for _ in range(2))
    traced = torch.jit.trace(module, (random(3, 5, 4, 4),))
    grads = torch.autograd.grad(traced(x).square().sum(), [x, *module.parameters()])
    expected = torch.autograd.grad(module(y).square().sum(), [y, *module.parameters()])
    for a, b in zip(grads, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def steps():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    clipper = gradfuse.GradClipper([p], gradfuse.policies.ZClip())
    return p, {
        "AdamW.step": AdamW([p], clip=1.0).step,
        "SGD.step": SGD([p]).step,
        "GradClipper.clip_": clipper.clip_,
    }


def run_with_fake_tensors(function):
    with FakeTensorMode():
        function(torch.ones(1))


TRACERS = {
    "fx": lambda function: make_fx(function)(torch.ones(1)),
    "jit": lambda function: torch.jit.trace(function, (torch.ones(1),)),
    "fake": run_with_fake_tensors,
}


@pytest.mark.parametrize("name", ["AdamW.step", "SGD.step", "GradClipper.clip_"])
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_step_is_not_traced(name, tracer):
    p, calls = steps()

    def run(x):
        calls[name]()
        return x

    with pytest.raises(RuntimeError, match=f"{name}: expected a call that is not traced"):
        TRACERS[tracer](run)
    assert torch.equal(p, torch.ones(3))


class Seen(TorchDispatchMode):
    """Records the ops that it sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@each_function
def test_a_dispatch_mode_sees_the_op(name):
    with Seen() as seen:
        FUNCTIONS[name](random(6, 5))
    assert sum(name.startswith("gradfuse.") for name in seen.names) == 1


@pytest.mark.parametrize("mode", [Seen, lambda: FlopCounterMode(display=False)], ids=["", "flops"])
def test_a_mode_that_looks_on_leaves_steps_alone(mode):
    for name in ("AdamW.step", "SGD.step", "GradClipper.clip_"):
        p, calls = steps()
        q, others = steps()
        calls[name]()
        with mode():
            others[name]()
        assert torch.equal(p, q)
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("rule", [AdamW, SGD])
def test_a_captured_step_takes_no_number(rule, monkeypatch):
    """A CUDA graph would repeat the learning rate of its capture. On a GPU: test_cuda_optim.py."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = rule([p], lr=0.5)
    optimizer.step()
    before = p.detach().clone()
    with monkeypatch.context() as patch:
        patch.setattr(type(optimizer._skips), "is_on_gpu", True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match=r"step: lr must be a Tensor on the GPU .* got 0.5"):
            optimizer.step()
    assert torch.equal(p, before)
    optimizer.step()
    assert not torch.equal(p, before)
