"""The clips for any shapes, strides, dtypes, mixtures, orders and special values, against numpy in
float64. Also compares the compiled module with the reference."""

import math

import numpy as np
import pytest
import torch
from helpers import (
    COMPLEX,
    REAL,
    assert_norm,
    assert_values,
    bits,
    norm_rtol,
    owners,
    true_norm,
    truly_clipped,
    ulps_apart,
    wide,
)
from hypothesis import given
from hypothesis import strategies as st

import gradfuse
from gradfuse import reference

# Decimal exponents of the magnitudes that a dtype holds, subnormal ones included.
EXPONENTS = {
    torch.float16: (-7, 4),
    torch.bfloat16: (-39, 37),
    torch.float32: (-44, 37),
    torch.float64: (-320, 307),
    torch.complex64: (-37, 37),
    torch.complex128: (-307, 307),
}
# max_norm / norm, not near 1: there the norm's last bit decides whether a step is quiet.
ratios = st.one_of(st.floats(1e-3, 0.99), st.floats(1.01, 1.5))
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -2.5]

orders = st.one_of(
    st.sampled_from([1.0, 2.0, math.inf]), st.floats(0.25, 12.0, allow_subnormal=False)
)
placed = st.lists(st.tuples(st.integers(0, 3), st.integers(0), st.sampled_from(SPECIAL)))
shapes = st.one_of(
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
    st.tuples(st.integers(1, 9000)),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
)


def stepped(x):
    return x[tuple(slice(None, None, 2) for _ in range(x.ndim))] if x.ndim else x


def shifted(x):
    """A view whose first element is not aligned like its allocation."""
    return torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(x.shape)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


ARRANGEMENTS = [lambda x: x, lambda x: x.permute(tuple(range(x.ndim))[::-1]), stepped, shifted]
ARRANGEMENTS += [channels_last, lambda x: x[..., 0] if x.ndim and x.shape[-1] else x]


@st.composite
def gradients(draw, dtypes=(*REAL, *COMPLEX), expanded=False):
    """A list of tensors of any shapes, layouts and magnitudes, in any order."""
    grads = []
    for _ in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from(dtypes))
        shape = draw(shapes)
        low, high = EXPONENTS[dtype]
        scale = 10.0 ** draw(st.integers(low, high))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
        parts = (2,) if dtype.is_complex else ()
        x = torch.rand((*shape, *parts), generator=generator, dtype=torch.float64) * 2 - 1
        x[torch.rand(x.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0.0
        x = torch.view_as_complex(x * scale) if dtype.is_complex else x * scale
        x = draw(st.sampled_from(ARRANGEMENTS))(x.to(dtype))
        if expanded and draw(st.booleans()):
            x = x.unsqueeze(0).expand(3, *x.shape)
        grads.append(x)
    return grads


def dtypes_of(grads):
    return [g.dtype for g in grads]


def on(device, grads):
    """Copies with the same strides."""
    copies = []
    for g in grads:
        storage = torch.UntypedStorage(g.untyped_storage().nbytes(), device=device)
        storage.copy_(g.untyped_storage())
        empty = torch.empty(0, dtype=g.dtype, device=device)
        copies.append(empty.set_(storage, g.storage_offset(), g.shape, g.stride()))
    return copies


def reals(x):
    return torch.view_as_real(x) if x.is_complex() else x


def assert_within(got, expected, rtol):
    """Compares real and imaginary parts separately, because a real factor scales each."""
    if got.is_complex():
        expected = np.stack([expected.real, expected.imag], -1)
    assert_values(reals(got), expected, rtol)


@given(gradients(expanded=True), orders)
def test_norm_is_the_true_norm(backend, device, grads, p):
    grads = on(device, grads)
    assert_norm(gradfuse.get_total_norm(grads, p), true_norm(grads, p), dtypes_of(grads))


@given(gradients(), orders, ratios)
def test_clipping_gives_the_true_gradients(backend, device, grads, p, ratio):
    grads = on(device, grads)
    norm = true_norm(grads, p)
    max_norm = min(float(norm), 1e300) * ratio
    truth = [truly_clipped(g, norm, max_norm) for g in grads]
    rtol = norm_rtol(dtypes_of(grads))
    assert_norm(gradfuse.clip_grad_norm_(owners(grads), max_norm, p), norm, dtypes_of(grads))
    for got, expected in zip(grads, truth, strict=True):
        assert_within(got, expected, 2 * rtol)


@given(gradients(), orders, ratios)
def test_native_agrees_with_pure_torch(native, device, grads, p, ratio):
    ours, theirs = on(device, grads), on(device, grads)
    max_norm = min(float(true_norm(grads, p)), 1e300) * ratio
    results = (
        native.clip_(ours, False, max_norm, p, 0),
        reference.clip_(theirs, False, max_norm, p, 0),
    )
    rtol = norm_rtol(dtypes_of(grads))
    for mine, other in zip(*results, strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
    mine, other = (r[1][:3].cpu().numpy() for r in results)  # norm, coefficient, clipped norm
    np.testing.assert_allclose(mine, other, rtol=2 * rtol, atol=1e-310)
    mine, other = (r[2].cpu().numpy() for r in results)
    np.testing.assert_allclose(mine[:, 0], other[:, 0], rtol=1.2e-6)
    np.testing.assert_allclose(mine[:, 1], other[:, 1], rtol=1e-15)
    np.testing.assert_array_equal(mine[:, 2:], other[:, 2:])
    for mine, other in zip(ours, theirs, strict=True):
        assert_within(mine, wide(other), 2 * rtol)


@given(gradients(), st.floats(1e-3, 0.9))
def test_scaling_is_the_rounded_product(backend, device, grads, ratio):
    """Within one unit in the last place of coefficient * gradient, in float64."""
    grads = on(device, grads)
    before = [wide(reals(g)) for g in grads]
    max_norm = min(float(true_norm(grads)), 1e300) * ratio
    report = gradfuse.GradClipper(owners(grads), max_norm).clip_()
    for got, old in zip(grads, before, strict=True):
        rounded = torch.from_numpy(np.asarray(old * report.coefficient)).to(reals(got).dtype)
        assert ulps_apart(reals(got), rounded) <= 1


@given(gradients(), placed)
def test_report_counts_special_values(backend, device, grads, specials):
    grads = on(device, grads)
    for which, where, value in specials:
        if which < len(grads) and grads[which].numel():
            index = np.unravel_index(where % grads[which].numel(), grads[which].shape)
            grads[which][tuple(int(i) for i in index)] = value
    values = [np.abs(wide(g)) for g in grads]
    report = gradfuse.GradClipper(owners(grads), math.inf).clip_()
    for row, a in zip(report.parameters, values, strict=True):
        assert row.nonfinite == np.count_nonzero(~np.isfinite(a))
        assert row.zeros == np.count_nonzero(a == 0)
        assert row.numel == a.size
        assert row.largest == pytest.approx(a.max(initial=0.0), rel=1e-15, abs=0, nan_ok=True)
        assert math.isnan(row.norm) == np.isnan(a).any()
        if not np.isnan(a).any():
            assert math.isinf(row.norm) == np.isinf(a).any() or a.max(initial=0.0) > 1e300


@given(
    gradients(dtypes=REAL),
    placed,
    st.one_of(st.sampled_from([0.0, 0.1, 1.0, 1e4, math.inf]), st.floats(0, 6e4)),
)
def test_value_clip_equals_torch(backend, device, grads, specials, bound):
    grads = on(device, grads)
    for which, where, value in specials:
        if which < len(grads) and grads[which].numel():
            index = np.unravel_index(where % grads[which].numel(), grads[which].shape)
            grads[which][tuple(int(i) for i in index)] = value
    expected = [g.clone().clamp_(-bound, bound) for g in grads]
    gradfuse.clip_grad_value_(owners(grads), bound)
    for got, clamped in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, clamped, rtol=0, atol=0, equal_nan=True)


@given(gradients(), st.integers(-30, 4), st.floats(1e-3, 10.0), st.floats(0.0, 1.0), orders)
def test_adaptive_clip_bounds_every_unit(backend, device, grads, exponent, factor, eps, p):
    """Each unit follows the rule; a unit within its limit keeps its bits."""
    grads = on(device, grads)
    for grad in grads:
        weight = torch.rand(grad.shape, generator=torch.Generator().manual_seed(0)).to(grad.dtype)
        weight = (weight * 10.0**exponent).to(device)
        weight.grad = grad
        units = [(weight, grad)] if grad.ndim < 2 else [*zip(weight, grad, strict=True)]
        plan = [unit_plan(w, g, factor, eps, p) for w, g in units]
        before = [bits(g) for _, g in units]
        gradfuse.adaptive_clip_grad_(weight, factor, eps, p)
        for (_, g), old, (ratio, expected) in zip(units, before, plan, strict=True):
            if bits(g) == old:
                assert ratio <= 1 + 1e-5 or not np.any(wide(g))
            else:
                assert ratio >= 1 - 1e-5
                assert_within(g, expected, 4 * norm_rtol([g.dtype]))


def unit_plan(weight, grad, factor, eps, p):
    """The ratio of the gradient's norm to its limit, and the gradient scaled to the limit."""
    limit = np.longdouble(factor * max(float(true_norm([weight], p)), eps))
    norm = true_norm([grad], p)
    exact = np.ldexp(np.longdouble(norm.value), norm.exponent)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = exact / limit if exact else 0.0
    return ratio, (wide(grad) * (limit / max(exact, 1e-6))).astype(wide(grad).dtype)
