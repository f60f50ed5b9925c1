"""batch_norm_act under autograd, torch.func and torch.compile, and the tensors that it saves."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from batch_norm_cases import Case, run_ours
from helpers import HOST_BACKENDS, bits, random
from torch._subclasses import FakeTensorMode
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import gradfuse

DOUBLE = torch.float64


def inputs(*shape, dtype=DOUBLE):
    """input, weight, bias, residual that require grad."""
    c = shape[1]
    tensors = [random(*s, dtype=dtype, seed=i) for i, s in enumerate((shape, (c,), (c,), shape))]
    return [t.requires_grad_() for t in tensors]


@HOST_BACKENDS
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_of_nothing(backend, activation, training):
    """torch's backward divides by the number of elements, here 0, and kills the process."""
    for shape in ((0, 3, 4, 4), (2, 3, 0)):
        x, w, b, r = inputs(*shape)
        mean, var = torch.zeros(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
        y = gradfuse.batch_norm_act(
            x, mean, var, w, b, residual=r, activation=activation, training=training
        )
        first = torch.autograd.grad(y.sum(), (x, w, b, r), create_graph=True)
        assert [t.shape for t in first] == [t.shape for t in (x, w, b, r)]
        sum(t.sum() for t in first).backward()
        assert not any(t.grad is not None and t.grad.any() for t in (x, w, b, r))


def test_only_the_gradients_that_are_needed(backend, device):
    for wanted in itertools.product((True, False), repeat=4):
        if not any(wanted):
            continue
        for training, shape in itertools.product((True, False), ((4, 3, 5), (4, 3))):
            case = Case(shape, device=device, training=training)
            expected = run_ours(case)
            x, r, w, b = case.x.clone(), case.r.clone(), case.w, case.b
            for t, need in zip((x, r, w, b), wanted, strict=True):
                t.requires_grad_(need)
            y = gradfuse.batch_norm_act(
                x, case.mean, case.var, w, b, residual=r, training=training, **case.options
            )
            y.backward(case.grad)
            for t, need, name in zip((x, r, w, b), wanted, "xrwb", strict=True):
                assert (t.grad is not None) == need
                if need:
                    assert bits(t.grad) == bits(expected[name])


def test_without_an_activation_the_residuals_gradient_is_the_outputs(backend, device):
    x, w, b, r = (t.detach().to(device).requires_grad_() for t in inputs(4, 3, 5))
    seen = []
    r2 = r * 1.0
    r2.register_hook(seen.append)
    y = gradfuse.batch_norm_act(x, None, None, w, b, residual=r2, activation=None, training=True)
    upstream = torch.ones_like(y)
    y.backward(upstream)
    assert seen[0].data_ptr() == upstream.data_ptr()


def saved_bytes(**options):
    """(dtype, number of elements) of each tensor saved for the backward, except the input."""
    kept = []

    def pack(t):
        kept.append((t.dtype, t.numel()))
        return t

    x, w, b, r = inputs(2, 3, 8, 8, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gradfuse.batch_norm_act(x, None, None, w, b, training=True, residual=r, **options)
    kept.remove((torch.float32, x.numel()))
    return kept


@HOST_BACKENDS
def test_what_is_saved(backend):
    small = [(torch.float32, 3), (torch.float32, 3), (torch.float32, 9)]
    for activation in ("relu", "relu6", "leaky_relu"):
        masked = saved_bytes(activation=activation)
        assert masked == [(torch.uint8, 2 * 3 * 8 * 8 // 8), *small]
        assert saved_bytes(activation=activation, save="output") == [(torch.float32, 384), *small]
    assert saved_bytes(activation=None) == small
    assert saved_bytes(activation="tanh") == [(torch.float32, 384), *small]
    assert saved_bytes(activation="silu") == [(torch.float32, 384), *small]  # the residual


def test_saved_statistics_belong_to_the_call(backend, device):
    """Two forwards before one backward; the running buffers may change meanwhile."""
    for training in (True, False):
        case = Case((4, 3, 5, 5), device=device, training=training, activation="silu")
        expected = run_ours(case)
        x = case.x.clone().requires_grad_()
        mean, var = case.mean.clone(), case.var.clone()
        options = {"training": training, "activation": "silu", **case.options}
        y = gradfuse.batch_norm_act(x, mean, var, case.w, case.b, residual=case.r, **options)
        gradfuse.batch_norm_act(x * 7 + 1, mean, var, case.w, case.b, **options)
        mean.add_(3.0)
        var.mul_(2.0)
        y.backward(case.grad)
        assert bits(x.grad) == bits(expected["x"])


def test_writing_to_what_was_saved_is_an_error(backend, device):
    x, w, b, r = (t.detach().to(device) for t in inputs(4, 3, 5))
    w.requires_grad_()
    y = gradfuse.batch_norm_act(x, None, None, w, b, residual=r, training=True)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_accumulate(backend, device):
    case = Case((4, 3, 5, 5), device=device)
    expected = run_ours(case)
    w = case.w.clone().requires_grad_()
    for _ in range(3):
        mean, var = case.mean.clone(), case.var.clone()
        y = gradfuse.batch_norm_act(
            case.x, mean, var, w, case.b, residual=case.r, training=True, **case.options
        )
        y.backward(case.grad)
    torch.testing.assert_close(w.grad, 3 * expected["w"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_counts_its_batch_once(backend, device, reentrant):
    case = Case((4, 3, 5, 5), device=device)
    expected = run_ours(case)
    x = case.x.clone().requires_grad_()
    mean, var = case.mean.clone(), case.var.clone()

    def call(x):
        return gradfuse.batch_norm_act(
            x, mean, var, case.w, case.b, residual=case.r, training=True, **case.options
        )

    checkpoint(call, x, use_reentrant=reentrant).backward(case.grad)
    assert bits([x.grad, mean, var]) == bits([expected["x"], expected["mean"], expected["var"]])


@HOST_BACKENDS
@pytest.mark.elsewhere
def test_torch_func(backend):
    x, w, b, r = (t.detach() for t in inputs(4, 3, 5))
    mean, var = random(3, dtype=DOUBLE), random(3, dtype=DOUBLE).abs() + 0.5

    def ours(x):
        return gradfuse.batch_norm_act(x, mean, var, w, b, residual=r)

    def stock(x):
        return F.relu(F.batch_norm(x, mean, var, w, b) + r)

    def loss(f):
        return lambda x: f(x).square().sum()

    torch.testing.assert_close(grad(loss(ours))(x), grad(loss(stock))(x))
    xs = torch.stack([x, 2 * x])
    torch.testing.assert_close(vmap(ours)(xs), torch.stack([stock(t) for t in xs]))
    for a, b_ in zip(jvp(ours, (x,), (x,)), jvp(stock, (x,), (x,)), strict=True):
        torch.testing.assert_close(a, b_)


@HOST_BACKENDS
@pytest.mark.elsewhere
def test_torch_func_when_training(backend):
    x, w, b, _ = (t.detach() for t in inputs(4, 3, 5))

    def ours(x, *stats):
        return gradfuse.batch_norm_act(x, *(stats or (None, None)), w, b, training=True)

    def stock(x, *stats):
        return F.relu(F.batch_norm(x, *(stats or (None, None)), w, b, training=True))

    xs = torch.stack([x, 2 * x + x.square()])
    torch.testing.assert_close(vmap(ours)(xs), torch.stack([stock(t) for t in xs]))
    found = [(torch.zeros(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)) for _ in range(2)]
    of_ours, of_stock = (
        grad(lambda x, f=f, s=s: f(x, *s).square().sum())(x)
        for f, s in zip((ours, stock), found, strict=True)
    )
    torch.testing.assert_close(of_ours, of_stock)
    torch.testing.assert_close(found[0], found[1])
    with pytest.raises(RuntimeError, match=r"running_var.* were not batched"):
        vmap(lambda x: ours(x, *found[0]))(xs)


@pytest.mark.parametrize("activation", ["relu", None])
def test_compiled_layouts_with_gaps(activation):
    dense = random(4, 8, 5, 6)
    last = dense.contiguous(memory_format=torch.channels_last)
    for x in (dense.transpose(2, 3), last[:, :4], last[..., ::2]):
        torch.compiler.reset()

        def call(x):
            return gradfuse.batch_norm_act(x, None, None, activation=activation, training=True)

        results = []
        for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            leaf = x.detach().requires_grad_()
            y = function(leaf)
            (g,) = torch.autograd.grad(y.square().sum(), leaf)
            results.append((y, g))
        torch.testing.assert_close(results[1], results[0])
        assert results[1][0].stride() == results[0][0].stride()


@HOST_BACKENDS
@pytest.mark.parametrize("activation", ["relu", "silu", "tanh", None])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_compiled_without_a_break(backend, channels_last, training, activation):
    torch.compiler.reset()
    case = Case((4, 3, 5, 6), channels_last, training=training, activation=activation)
    expected = run_ours(case)
    leaves = {
        name: t.clone(memory_format=torch.preserve_format).requires_grad_()
        for name, t in {"x": case.x, "r": case.r, "w": case.w, "b": case.b}.items()
    }
    mean, var = case.mean.clone(), case.var.clone()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(x, r, w, b, mean, var):
        return gradfuse.batch_norm_act(
            x, mean, var, w, b, residual=r, activation=activation, training=training, **case.options
        )

    y = call(**leaves, mean=mean, var=var)
    assert y.stride() == expected["y"].stride()
    y.backward(case.grad)
    found = {"y": y, "mean": mean, "var": var} | {name: t.grad for name, t in leaves.items()}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


@HOST_BACKENDS
@pytest.mark.elsewhere
def test_fake_and_meta_tensors(backend):
    with FakeTensorMode():
        x = torch.empty(4, 3, 5, requires_grad=True)
        y = gradfuse.batch_norm_act(x, torch.zeros(3), torch.ones(3), training=True)
        y.sum().backward()
        assert x.grad.shape == y.shape == (4, 3, 5)
    x = torch.empty(4, 3, 5, device="meta", requires_grad=True)
    gradfuse.batch_norm_act(x, None, None, training=True).sum().backward()
    assert x.grad.shape == (4, 3, 5)
