"""What layer norm and RMS norm promise beyond the registry: gradients that 16 bits do not spoil,
the whole range of a dtype, rows of every kind, torch's transforms. First the cases torch fails."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import REAL, bits, random, short, wide
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gradfuse
from gradfuse import _native

BF16 = torch.bfloat16


def relative(ours: Tensor, truth: Tensor | np.ndarray) -> float:
    truth = wide(truth) if isinstance(truth, Tensor) else truth
    return float(np.abs(wide(ours) - truth).max() / np.abs(truth).max())


def exact(x: Tensor, eps: float, centred: bool) -> np.ndarray:
    """The norm without weights, in extended precision."""
    v = x.double().numpy().astype(np.longdouble)
    with np.errstate(under="ignore"):
        v = v - v.mean(-1, keepdims=True) if centred else v
        return (v / np.sqrt((v * v).mean(-1, keepdims=True) + np.longdouble(eps))).astype(float)


@pytest.mark.backends("cpu", "reference")
def test_bias_gradients_count_every_row(backend, device):
    """In bfloat16 a sum of ones stops at 256."""
    x = random(65536, 16, dtype=BF16, device=device).requires_grad_()
    w, b = (t.to(device).requires_grad_() for t in torch.ones(2, 16, dtype=BF16).unbind())
    gradfuse.layer_norm(x, (16,), w, b).backward(torch.ones_like(x))
    assert b.grad.tolist() == [65536.0] * 16


@pytest.mark.backends("cpu", "reference")
def test_parameter_gradients_in_bfloat16(backend, device):
    x, g = (random(16384, 32, dtype=BF16, device=device, seed=s) for s in (1, 2))
    w, b = torch.ones(2, 32, dtype=BF16, device=device).unbind()
    inputs = [t.detach().requires_grad_() for t in (x, w, b)]
    gradfuse.layer_norm(inputs[0], (32,), *inputs[1:]).backward(g)
    truth = [t.detach().double().requires_grad_() for t in (x, w, b)]
    F.layer_norm(truth[0], (32,), *truth[1:]).backward(g.double())
    for ours, theirs in zip(inputs, truth, strict=True):
        assert relative(ours.grad, theirs.grad) < 0.006  # a rounding to bfloat16 is 0.004


def test_gradients_under_autocast(backend, device):
    """Linear, norm, relu, Linear: torch's own parameter gradients are half wrong."""
    torch.manual_seed(0)
    first, second = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)
    w, b = torch.ones(32, requires_grad=True), torch.zeros(32, requires_grad=True)
    x = random(2048 if backend != "ptx" else 64, 8)

    def loss(norm, dtype):
        with torch.autocast("cpu", BF16, enabled=dtype == BF16):
            y = second(F.relu(norm(first(x).to(dtype), (32,), w, b)))
        return torch.autograd.grad(y.float().sum(), (w, b))

    for ours, truth in zip(
        loss(gradfuse.layer_norm, BF16), loss(F.layer_norm, torch.float32), strict=True
    ):
        assert relative(ours, truth) < 0.02


@pytest.mark.parametrize("centred", [True, False], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize(
    ("dtype", "scale", "offset", "eps"),
    [
        (torch.float32, 1e19, 0.0, 1e-5),
        (torch.float32, 4e37, 0.0, 1e-5),
        (torch.float32, 1e-25, 0.0, 0.0),
        (torch.float32, 1e-40, 0.0, 0.0),
        (torch.float32, 1.0, 1e6, 1e-5),
        (torch.float64, 1e300, 0.0, 1e-5),
        (torch.float64, 1e-250, 0.0, 0.0),
        (BF16, 1e30, 0.0, 1e-5),
        (BF16, 1e-30, 0.0, 0.0),
    ],
)
def test_the_whole_range(centred, dtype, scale, offset, eps, backend, device):
    x = (random(3, 70, dtype=torch.float64) * scale + offset).to(dtype)
    norm = gradfuse.layer_norm if centred else gradfuse.rms_norm
    leaf = x.to(device, copy=True).requires_grad_()
    y = norm(leaf, (70,), eps=eps)
    # The reference computes the mean in float64, so an offset costs it digits in float64 alone.
    assert relative(y.detach(), exact(x, eps, centred)) < 6 * torch.finfo(dtype).eps
    # The gradient is that of x / scale, divided by scale; where float32 can hold that.
    g = random(3, 70, dtype=torch.float64, seed=3).to(dtype).to(device)
    (grad,) = torch.autograd.grad(y, leaf, g)
    unit = (x.double() / scale).requires_grad_()
    scaled = F.layer_norm if centred else F.rms_norm
    (truth,) = torch.autograd.grad(
        scaled(unit, (70,), eps=eps / scale / scale), unit, g.cpu().double()
    )
    if 1 / scale < torch.finfo(dtype).max:
        size = truth.abs().max().item()
        expected = truth / scale
        error = (grad.cpu().double() - expected).abs().max().item() * scale
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * scale
        assert (
            error < 0.02 * size + tiny
            if offset
            else error < 16 * torch.finfo(dtype).eps * size + tiny
        )


def test_gradients_beyond_the_range_of_their_sum(backend, device):
    """The gradients of a row are finite, their sum in float32 is not."""
    x = random(2, 64, device=device).requires_grad_()
    g = random(2, 64, seed=2, device=device).sign() * 1e38
    g[0] = 1e38
    gradfuse.layer_norm(x, (64,)).backward(g)
    truth = x.detach().double().requires_grad_()
    F.layer_norm(truth, (64,)).backward(g.double())
    # In the first row everything cancels.
    assert (x.grad[0].double() - truth.grad[0]).abs().max() < 1e38 * 1e-5
    assert relative(x.grad[1], truth.grad[1]) < 1e-5


def test_rows_of_equal_elements_and_of_one(backend, device):
    for offset in (0.0, 3.0, 1e6, -1e30):
        x = torch.full((2, 40), offset, device=device, requires_grad=True)
        b = random(40, device=device)
        y = gradfuse.layer_norm(x, (40,), bias=b)
        assert torch.equal(y, b.expand(2, 40))
        y.sum().backward()
        assert torch.isfinite(x.grad).all()
        assert gradfuse.layer_norm(x.detach(), (40,), eps=0.0).isnan().all()  # as torch
    for dtype in REAL:
        x = random(6, 1, dtype=dtype, device=device).requires_grad_()
        y = gradfuse.layer_norm(x, (1,), torch.full((1,), 0.3, device=device))
        y.backward(random(6, 1, dtype=dtype, device=device, seed=2))
        assert not y.any()
        assert not x.grad.any()


def test_nan_stays_in_its_row(backend, device):
    x = random(5, 33, device=device)
    x[1, 4], x[3, 0] = math.nan, math.inf
    clean = [0, 2, 4]
    leaf = x.clone().requires_grad_()
    y, s = gradfuse.add_layer_norm(leaf, torch.zeros_like(x), (33,))
    torch.autograd.backward((y, s), (torch.ones_like(y) * 0.5, torch.ones_like(s)))
    for t in (y, leaf.grad):
        assert t[[1, 3]].isnan().all()
        assert torch.isfinite(t[clean]).all()
    alone = gradfuse.layer_norm(x[clean], (33,))
    assert bits(y.detach()[clean]) == bits(alone)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)], ids=str)
def test_empty_inputs(shape, backend, device):
    x = torch.zeros(shape, device=device, requires_grad=True)
    w = torch.ones(shape[-1], device=device, requires_grad=True)
    y, s = gradfuse.add_rms_norm(x, x.detach(), shape[-1:], w, p=0.5, training=True)
    assert y.shape == s.shape == shape
    (y.sum() + s.sum()).backward()
    assert x.grad.shape == shape
    assert w.grad.tolist() == [0.0] * shape[-1]


def test_views_and_other_layouts(backend, device):
    x = random(6, 40, device=device).t()[::2]  # [20, 6] with gaps
    r = random(1, 6, device=device).expand(20, 6)
    y, s = gradfuse.add_layer_norm(x, r, 6)
    same, total = gradfuse.add_layer_norm(x.contiguous(), r.contiguous(), (6,))
    assert bits([y, s]) == bits([same, total])
    assert y.is_contiguous()


def test_dtypes_of_results(backend, device):
    half, single, double = torch.float16, torch.float32, torch.float64
    for x, r, asked, of_y, of_s in (
        (BF16, single, None, BF16, single),
        (BF16, BF16, single, BF16, single),
        (half, single, half, half, half),
        (half, BF16, None, half, single),
        (single, half, None, single, single),
        (single, double, None, double, double),
        (BF16, None, double, double, double),
    ):
        given = None if r is None else random(2, 8, dtype=r, device=device).requires_grad_()
        leaf = random(2, 8, dtype=x, device=device).requires_grad_()
        y, s = gradfuse.add_rms_norm(leaf, given, (8,), residual_dtype=asked)
        assert (y.dtype, s.dtype) == (of_y, of_s)
        torch.autograd.backward((y, s), (torch.ones_like(y), torch.ones_like(s)))
        assert leaf.grad.dtype == x
        assert given is None or given.grad.dtype == r


def test_a_first_block_returns_its_input(backend, device):
    x = random(3, 8, device=device).requires_grad_()
    y, s = gradfuse.add_layer_norm(x, None, (8,))
    assert s.data_ptr() == x.data_ptr()
    torch.autograd.backward((y, s), (torch.ones_like(y), torch.ones_like(s)))
    leaf = x.detach().requires_grad_()
    F.layer_norm(leaf, (8,)).sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad + 1)


def test_gradients_of_one_result_alone(backend, device):
    x, r = (random(3, 8, device=device, seed=s).requires_grad_() for s in (1, 2))
    g = random(3, 8, device=device, seed=3)
    _, s = gradfuse.add_layer_norm(x, r, (8,))
    s.backward(g)
    assert torch.equal(x.grad, g)
    assert torch.equal(r.grad, g)
    y, _ = gradfuse.add_layer_norm(x, r, (8,))
    got = torch.autograd.grad(y, (x, r), g)
    expected = torch.autograd.grad(F.layer_norm(x + r, (8,)), (x, r), g)
    torch.testing.assert_close(got, expected)


@pytest.mark.backends("cpu", arithmetic=False)
def test_a_million_columns(backend):
    x = random(2, 1_000_000).requires_grad_()
    w = torch.ones(1_000_000, requires_grad=True)
    y = gradfuse.layer_norm(x, (1_000_000,), w)
    y.backward(x.detach())
    truth = x.detach().double().requires_grad_()
    v = torch.ones(1_000_000, dtype=torch.float64, requires_grad=True)
    expected = F.layer_norm(truth, (1_000_000,), v)
    expected.backward(truth.detach())
    assert relative(y, expected) < 1e-6
    assert relative(w.grad, v.grad) < 1e-6


@pytest.mark.elsewhere
def test_transforms_go_through():
    x, w, b = random(4, 3, 8), random(8, seed=2), random(8, seed=3)

    def ours(x):
        return gradfuse.layer_norm(x, (8,), w, b)

    def theirs(x):
        return F.layer_norm(x, (8,), w, b)

    tangent = random(4, 3, 8, seed=4)
    for mine, stock in (
        (torch.func.jvp(ours, (x,), (tangent,)), torch.func.jvp(theirs, (x,), (tangent,))),
        (torch.func.vmap(ours)(x), torch.func.vmap(theirs)(x)),
        (torch.func.jacrev(ours)(x[0]), torch.func.jacrev(theirs)(x[0])),
        (torch.func.hessian(lambda t: ours(t).pow(3).sum())(x[0, :1]),
         torch.func.hessian(lambda t: theirs(t).pow(3).sum())(x[0, :1])),
    ):  # fmt: skip
        torch.testing.assert_close(mine, stock, rtol=1e-4, atol=1e-5)
    scale = random(4, seed=5).requires_grad_()  # has a gradient of its own
    y = gradfuse.add_layer_norm(x, None, (8,), sample_scale=scale, prenorm=False)
    y.sum().backward()
    assert scale.grad.shape == (4,)


@pytest.mark.backends("cpu", arithmetic=False)
@given(
    st.integers(1, 6), st.integers(1, 300), st.sampled_from(REAL), st.booleans(), st.booleans(),
    st.sampled_from([0.0, 0.25]), st.integers(0, 3),
)  # fmt: skip
def test_any_width_is_as_the_reference(backend, rows, width, dtype, centred, prenorm, p, start):
    """And any alignment."""

    def shifted(seed: int) -> Tensor:
        whole = random(rows * width + start, dtype=dtype, seed=seed)
        return whole[start:].view(rows, width)

    x, r, g = shifted(1), shifted(2), shifted(3)
    w = random(width, dtype=dtype, seed=4)
    op = gradfuse.add_layer_norm if centred else gradfuse.add_rms_norm

    def run() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, r, w)]
        generator = torch.Generator().manual_seed(5)
        found = op(
            *leaves[:2], (width,), leaves[2], p=p, training=True, prenorm=prenorm, eps=0.1,
            generator=generator,
        )  # fmt: skip
        results = found if prenorm else (found,)
        torch.autograd.backward(results, [g] * len(results))
        return [*(t.detach() for t in results), *(t.grad for t in leaves)]

    ours = run()
    kept, _native.backend = _native.backend, gradfuse.reference
    try:
        theirs = run()
    finally:
        _native.backend = kept
    for mine, other in zip(ours, theirs, strict=True):
        size = max(other.abs().max().item(), 1.0)
        allowed = {torch.float64: 1e-12, torch.float32: 5e-6}.get(dtype, 4 * torch.finfo(dtype).eps)
        assert (mine.double() - other.double()).abs().max().item() <= allowed * size


@pytest.mark.slow
def test_more_than_2_31_elements(native):
    n = 2**25 + 1
    x = torch.zeros(n, 64, dtype=BF16)
    x[:, 0] = 1.0
    x[-1] = 2.0
    y = gradfuse.rms_norm(x, (64,), eps=0.0)
    assert y[-1].tolist() == [1.0] * 64
    assert y[0, 0].item() == y[-2, 0].item() == 8.0


@pytest.mark.parametrize("dtype", REAL, ids=short)
def test_rms_norms_default_eps_is_torchs(dtype, backend, device):
    x = (random(3, 16, dtype=torch.float64) * 1e-4).to(dtype).to(device)
    torch.testing.assert_close(gradfuse.rms_norm(x, (16,)), F.rms_norm(x, (16,)))
