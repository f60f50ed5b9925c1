"""Adaptive clipping against the rule of Brock et al. 2021, which this file computes in float64."""

import math

import numpy as np
import pytest
import torch
from helpers import (
    COMPLEX,
    NORM_TYPES,
    REAL,
    assert_values,
    bits,
    norm_rtol,
    random,
    short,
    true_norm,
    wide,
)

import gradfuse

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = [(), (1,), (300,), (20, 33), (1, 5000), (700, 1), (16, 3, 3, 3), (4, 8, 5), (2, 40000)]


def parameter(shape, dtype=torch.float32, device="cpu", weight_scale=1.0, grad_scale=1.0):
    """A weight with a gradient, both of which the caller may replace."""
    weight = random(*shape, dtype=dtype, device=device, scale=weight_scale, seed=1)
    weight.grad = random(*shape, dtype=dtype, device=device, scale=grad_scale, seed=2)
    return weight


def units(x):
    """Rows along the first dimension; a vector or scalar is one unit."""
    return list(x) if x.ndim > 1 else [x]


def truth(weight, factor=0.01, eps=1e-3, p=2.0):
    """The expected gradient of each unit, and whether the unit is clipped."""
    expected, clipped = [], []
    for w, g in zip(units(weight), units(weight.grad), strict=True):
        limit = factor * max(float(true_norm([w], p)), eps)
        norm = true_norm([g], p)
        clipped.append(float(norm) > limit)
        small = max(norm.value, float(np.ldexp(1e-6, -norm.exponent)))
        scale = np.ldexp(np.longdouble(limit) / small, -norm.exponent) if clipped[-1] else 1.0
        expected.append((wide(g) * scale).astype(wide(g).dtype))
    return expected, clipped


def check(weight, factor=0.01, eps=1e-3, p=2.0):
    """Clips and compares each unit: clipped ones with the truth, the others bit for bit."""
    expected, clipped = truth(weight, factor, eps, p)
    before, weight_before = [bits(g) for g in units(weight.grad.clone())], bits(weight)
    assert gradfuse.adaptive_clip_grad_([weight], factor, eps, p) is None
    rtol = 2 * norm_rtol([weight.dtype, weight.grad.dtype])
    rows = zip(units(weight.grad), expected, clipped, before, strict=True)
    for got, row, was_clipped, old in rows:
        if was_clipped and got.is_complex():
            assert np.abs(wide(got) - row).max(initial=0) <= 1e-5 * np.abs(row).max(initial=0)
        elif was_clipped:
            assert_values(got, row, rtol)
        else:
            assert bits(got) == old
    assert bits(weight) == weight_before
    return clipped


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=short)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, dtype, device):
    assert any(check(parameter(shape, dtype, device)))


@pytest.mark.parametrize("p", NORM_TYPES)
@pytest.mark.parametrize("dtype", REAL, ids=short)
def test_norm_types(dtype, p, device):
    assert all(check(parameter((12, 50), dtype, device), p=p))
    assert all(check(parameter((700,), dtype, device), p=p))


@pytest.mark.parametrize("dtype", REAL, ids=short)
def test_only_rows_beyond_the_limit_change(dtype, device):
    """Every third row's gradient is large against its weights."""
    weight = parameter((31, 77), dtype, device, grad_scale=1e-3)
    weight.grad[::3] *= 100.0
    assert check(weight) == [i % 3 == 0 for i in range(31)]


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x.t(),
        lambda x: x[::2, 1:],
        lambda x: x[:, 7],
        lambda x: x.reshape(8, 5, 2, 5).permute(3, 1, 0, 2),
        lambda x: x.reshape(8, 5, 2, 5).contiguous(memory_format=torch.channels_last),
    ],
    ids=["transposed", "stepped", "column", "permuted", "channels_last"],
)
@pytest.mark.parametrize("what", ["weight", "gradient", "both"])
def test_layouts_of_weight_and_gradient_may_differ(what, arrange, device):
    base = [random(8, 50, device=device, seed=s) for s in (5, 6)]
    weight, grad = arrange(base[0]), arrange(base[1])
    if what == "weight":
        grad = grad.clone(memory_format=torch.contiguous_format)
    elif what == "gradient":
        weight = weight.clone(memory_format=torch.contiguous_format)
    strides = grad.stride()
    weight.grad = grad
    assert all(check(weight))
    assert weight.grad.stride() == strides


def test_expanded_weights_are_read(device):
    weight = random(1, 30, device=device).expand(6, 30)
    weight.grad = random(6, 30, device=device)
    assert all(check(weight))


@pytest.mark.parametrize("dtype", REAL, ids=short)
def test_zero_weights_learn_through_eps(dtype, device):
    weight = parameter((6, 40), dtype, device)
    weight[:3] = 0.0
    assert all(check(weight, factor=0.5, eps=0.01))
    norms = [float(true_norm([g])) for g in weight.grad[:3]]
    assert norms == pytest.approx([0.005] * 3, rel=0.02)


def test_eps_and_factor_of_zero(device):
    weight = parameter((6, 40), device=device)
    weight[0] = 0.0
    check(weight, eps=0.0)
    assert not weight.grad[0].any()
    check(weight, factor=0.0)
    assert not weight.grad.any()


def test_gradients_below_the_floor(device):
    """The gradient's norm is taken as at least 1e-6, as in timm's agc."""
    weight = parameter((4, 9), device=device, weight_scale=1e-9, grad_scale=1e-8)
    assert all(check(weight, eps=1e-9))


def test_a_norm_at_the_limit_is_left_alone(device):
    weight = torch.tensor([[300.0, 400.0], [300.0, 400.0]], device=device)
    weight.grad = torch.tensor([[3.0, 4.0], [3.0, 4.001]], device=device)
    before = bits(weight.grad[0])
    gradfuse.adaptive_clip_grad_(weight, 0.01)
    assert bits(weight.grad[0]) == before
    assert weight.grad[1, 1].item() < 4.001


@pytest.mark.parametrize(
    ("dtype", "weight_scale", "grad_scale"),
    [
        (torch.float16, 1e-2, 8e3),
        (torch.bfloat16, 1e20, 5e37),
        (torch.float32, 1.0, 1e37),
        (torch.float32, 1e30, 1e37),
        (torch.float32, 1e-30, 1e-20),
        (torch.float64, 1.0, 1e305),
        (torch.float64, 1e200, 1e305),
        (torch.float64, 1e-200, 1e-160),
        (torch.float64, 1e-5, 1e307),
        (torch.float64, 1e-20, 1e307),
    ],
    ids=short,
)
def test_values_whose_squares_leave_the_dtype(dtype, weight_scale, grad_scale, device):
    weight = parameter((5, 300), dtype, device, weight_scale, grad_scale)
    check(weight, eps=0.0)
    weight = parameter((5, 300), dtype, device, weight_scale, grad_scale)
    check(weight)


def test_a_weight_norm_beyond_float64(device):
    """0.01 times the norm is within float64, and limits a gradient as large as the weight."""
    weight = torch.full((2, 9), 1e308, dtype=torch.float64, device=device)
    weight.grad = torch.full((2, 9), 1e308, dtype=torch.float64, device=device)
    gradfuse.adaptive_clip_grad_(weight)
    assert_values(weight.grad, np.full((2, 9), 1e306), 1e-12)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nonfinite_rows_do_not_touch_the_others(poison, device):
    """The poisoned row is scaled by limit / norm, which is 0 or NaN, as in timm's agc."""
    weight = parameter((3, 50), device=device)
    weight.grad[1, 7] = poison
    expected, _ = truth(parameter((3, 50), device=device))
    gradfuse.adaptive_clip_grad_(weight)
    for row in (0, 2):
        assert_values(weight.grad[row], expected[row], 3e-6)
    assert weight.grad[1, 7].isnan()
    others = torch.cat([weight.grad[1, :7], weight.grad[1, 8:]])
    assert others.isnan().all() if math.isnan(poison) else not others.any()


def test_mixed_dtypes_and_many_parameters(device):
    weights = [parameter((3 + i, 5), REAL[i % 4], device) for i in range(40)]
    expected = [truth(w)[0] for w in weights]
    gradfuse.adaptive_clip_grad_(w for w in weights)
    for weight, rows in zip(weights, expected, strict=True):
        for got, row in zip(weight.grad, rows, strict=True):
            assert_values(got, row, 2 * norm_rtol([weight.dtype]))


@pytest.mark.parametrize("grad_dtype", REAL, ids=short)
@pytest.mark.parametrize("weight_dtype", REAL, ids=short)
def test_weight_and_gradient_of_different_dtypes(weight_dtype, grad_dtype, device):
    """A .grad has its parameter's dtype; the torch.library op accepts any two dtypes."""
    weight = random(9, 40, dtype=weight_dtype, device=device, seed=1)
    grad = random(9, 40, dtype=grad_dtype, device=device, seed=2)
    expected = []
    for w, g in zip(weight, grad, strict=True):
        expected.append(wide(g) * (0.01 * float(true_norm([w])) / float(true_norm([g]))))
    torch.ops.gradfuse.adaptive_clip_grads_([weight], [grad], 0.01, 1e-3, 2.0)
    for got, row in zip(grad, expected, strict=True):
        assert_values(got, row, 2 * norm_rtol([weight_dtype, grad_dtype]))


def test_parameters_without_gradient_and_empty_ones(device):
    without, empty = torch.ones(3, device=device), torch.ones(0, 4, device=device)
    empty.grad = torch.ones(0, 4, device=device)
    tail = torch.ones(4, 0, device=device)
    tail.grad = torch.ones(4, 0, device=device)
    weight = parameter((4, 4), device=device)
    expected, _ = truth(weight)
    gradfuse.adaptive_clip_grad_([without, empty, weight, tail])
    for got, row in zip(weight.grad, expected, strict=True):
        assert_values(got, row, 3e-6)
    assert without.grad is None


def test_autograd_sees_the_write(device):
    weight = parameter((4, 30), device=device)
    version = weight.grad._version
    gradfuse.adaptive_clip_grad_(weight)
    assert weight.grad._version > version
