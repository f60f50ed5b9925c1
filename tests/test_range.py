"""Norm and clip are right over the whole finite range of every dtype, at every size."""

import math

import numpy as np
import pytest
import torch
from helpers import (
    NORM_TYPES,
    REAL,
    Norm,
    assert_norm,
    assert_values,
    bits,
    norm_rtol,
    owner,
    owners,
    random,
    short,
    true_norm,
    truly_clipped,
    wide,
)

import gradfuse

pytestmark = pytest.mark.usefixtures("backend")

# Magnitudes at which the stock norm of 1,000 such values is inf or 0, or loses its digits.
EXTREMES = [
    (torch.float16, 6e4),
    (torch.float16, 65504.0),
    (torch.float16, 6e-5),
    (torch.float16, 6e-8),
    (torch.bfloat16, 3e38),
    (torch.bfloat16, 1e20),
    (torch.bfloat16, 1e-30),
    (torch.bfloat16, 1e-39),
    (torch.float32, 1e20),
    (torch.float32, 1e25),
    (torch.float32, 3e38),
    (torch.float32, 1e-20),
    (torch.float32, 1e-23),
    (torch.float32, 1e-30),
    (torch.float32, 1e-40),
    (torch.float32, 2e-45),
    (torch.float64, 1e160),
    (torch.float64, 1e200),
    (torch.float64, 1e308),
    (torch.float64, 1e-160),
    (torch.float64, 1e-200),
    (torch.float64, 1e-310),
]
# Around the sizes of vectors, of blocks (4,096) and of chunks (32,768).
SIZES = [1, 31, 32, 33, 127, 128, 129, 4095, 4096, 4097, 32767, 32768, 32769, 100003]


def extreme(dtype, magnitude, n, device):
    """Values of both signs between a third of the magnitude and the magnitude."""
    factor = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    sign = torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0)
    return (magnitude * (1 / 3 + factor * 2 / 3) * sign).to(dtype).to(device)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize(("dtype", "magnitude"), EXTREMES, ids=short)
def test_extreme_magnitudes(dtype, magnitude, norm_type, device):
    grads = [extreme(dtype, magnitude, n, device) for n in (1003, 5, 4097)]
    norm = true_norm(grads, norm_type)
    assert_norm(gradfuse.get_total_norm(grads, norm_type), norm, [dtype])

    # Half the norm or, beyond float64, half of the largest element.
    max_norm = min(float(norm) / 2, magnitude / 2)
    truth = [truly_clipped(g, norm, max_norm) for g in grads]
    assert_norm(gradfuse.clip_grad_norm_(owners(grads), max_norm, norm_type), norm, [dtype])
    for grad, expected in zip(grads, truth, strict=True):
        assert_values(grad, expected, norm_rtol([dtype]))


@pytest.mark.parametrize(("dtype", "magnitude"), EXTREMES, ids=short)
def test_extreme_magnitudes_end_at_max_norm_one(dtype, magnitude, device):
    grads = [extreme(dtype, magnitude, n, device) for n in (1003, 5)]
    norm = true_norm(grads)
    before = bits(grads)
    gradfuse.clip_grad_norm_(owners(grads), 1.0)
    after = float(true_norm(grads))
    if float(norm) > 1.0:
        assert after == pytest.approx(1.0, rel=torch.finfo(dtype).eps)
    else:
        assert bits(grads) == before


@pytest.mark.parametrize("max_norm", [1e-3, 1e-12, 1e-20])
def test_coefficients_below_float64(max_norm, device):
    """max_norm / norm is subnormal or 0, but the clipped gradients are neither."""
    grads = [extreme(torch.float64, 1e308, 50, device), torch.ones(3, device=device)]
    norm = true_norm(grads)
    truth = [truly_clipped(g, norm, max_norm) for g in grads]
    gradfuse.clip_grad_norm_(owners(grads), max_norm)
    for grad, expected in zip(grads, truth, strict=True):
        assert_values(grad, expected, 1e-12)


def test_coefficients_below_float32(device):
    """float32 holds the clipped bfloat16 gradients, but not what they are multiplied by."""
    grad = extreme(torch.bfloat16, 3e38, 1000, device)
    norm = true_norm([grad])
    truth = truly_clipped(grad, norm, 1e-6)
    gradfuse.clip_grad_norm_(owner(grad), 1e-6)
    assert_values(grad, truth, torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("scale", [1e-320, 1e-315, 1e-308, 1e-300])
def test_norm_and_max_norm_at_the_end_of_float64(scale, device):
    """The norm is so small that only the 1e-6 counts in the coefficient's denominator."""
    grad = random(50, dtype=torch.float64, scale=scale, device=device)
    norm = true_norm([grad])
    expected = truly_clipped(grad, norm, float(norm) / 2)
    gradfuse.clip_grad_norm_(owner(grad), float(norm) / 2)
    assert_values(grad, expected, 1e-12)


@pytest.mark.parametrize("largest", [False, True], ids=["inf", "largest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
def test_measuring_alone_leaves_overflowing_norms_alone(dtype, largest, device):
    """max_norm=inf with an overflowed norm makes stock clipping write NaN everywhere."""
    grads = [torch.full((1000,), torch.finfo(dtype).max, dtype=dtype, device=device)]
    before = bits(grads)
    if largest:
        gradfuse.clip_grad_norm_(owners(grads), torch.finfo(torch.float64).max)
        assert (bits(grads) == before) == (dtype == torch.float32)
    else:
        assert gradfuse.clip_grad_norm_(owners(grads), math.inf).item() == math.inf
        assert bits(grads) == before


def test_bfloat16_ones_end_at_norm_one(device):
    """Stock clipping rounds the norm to bfloat16 and ends at 1.0052."""
    grad = torch.ones(1003, dtype=torch.bfloat16, device=device)
    norm = gradfuse.clip_grad_norm_(owner(grad), 1.0)
    assert norm.item() == pytest.approx(math.sqrt(1003), rel=1e-7)
    assert float(true_norm([grad])) == pytest.approx(1.0, rel=2**-8)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_tiny_and_huge_together(norm_type, device):
    """The largest magnitudes decide the norm, and the others must not disturb it."""
    dtypes = [torch.float64, torch.float32, torch.float64, torch.bfloat16, torch.float16]
    for scales in ((1e300, 1e-30, 1e-300, 1e30, 1.0), (1e-300, 1e-40, 1e-305, 0.0, 0.0)):
        pairs = zip(dtypes, scales, strict=True)
        grads = [random(200, dtype=d, device=device, scale=s, seed=3) for d, s in pairs]
        norm = true_norm(grads, norm_type)
        max_norm = float(norm) / 4
        truth = [truly_clipped(g, norm, max_norm) for g in grads]
        got = gradfuse.clip_grad_norm_(owners(grads), max_norm, norm_type)
        assert_norm(got, norm, dtypes)
        for grad, expected in zip(grads, truth, strict=True):
            assert_values(grad, expected, norm_rtol(dtypes))


def test_huge_and_tiny_within_one_tensor(device):
    for dtype, high, low in ((torch.float32, 1e38, 1e-38), (torch.float64, 1e308, 1e-308)):
        grad = torch.full((9000,), low, dtype=dtype, device=device)
        for where in (0, 4100, 8999):
            grad.fill_(low)[where] = high
            assert_norm(gradfuse.get_total_norm(grad), true_norm([grad]), [dtype])


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_subnormal_beside_nothing(norm_type, device):
    """The scale of a tensor of zeros is beyond float64 in units of the other tensor's scale."""
    tiny = torch.tensor([9e-310, 3e-310], dtype=torch.float64, device=device)
    zeros = torch.zeros(4, device=device)
    for grads in ([tiny, zeros], [zeros, tiny]):
        norm = true_norm(grads, norm_type)
        got = gradfuse.get_total_norm(grads, norm_type)
        assert_norm(got, norm, [torch.float64, torch.float32])
        assert got.item() > 0.0


@pytest.mark.parametrize("exponent", [-58, -57, -56, 55, 56, 57])
def test_float32_around_the_rescaling_bounds(exponent, device):
    """Beyond 2^-57 and 2^56 a block's squares are summed again in float64."""
    grad = (random(20000, device=device).clamp(-1, 1) * 2.0**exponent).contiguous()
    for norm_type in (2.0, 1.0):
        norm = true_norm([grad], norm_type)
        assert_norm(gradfuse.get_total_norm(grad, norm_type), norm, [grad.dtype])


@pytest.mark.parametrize("exponent", [-481, -480, -479, 479, 480, 481])
def test_float64_around_the_rescaling_bounds(exponent, device):
    grad = random(20000, dtype=torch.float64, device=device).clamp(-1, 1) * 2.0**exponent
    for norm_type in (2.0, 1.0):
        norm = true_norm([grad], norm_type)
        assert_norm(gradfuse.get_total_norm(grad, norm_type), norm, [grad.dtype])


@pytest.mark.parametrize("norm_type", [0.1, 30.0, 1000.0, 2000.0])
def test_orders_far_from_two(norm_type, device):
    """From p = 1024 on, even the p-th power of a mantissa leaves the range of float64."""
    for dtype in REAL:
        grad = random(50, dtype=dtype, device=device, scale=100.0).clamp(-500, 500)
        grad[7] = 511.0
        norm = true_norm([grad], norm_type)
        assert_norm(gradfuse.get_total_norm(grad, norm_type), norm, [dtype])


def test_norm_beyond_float64_through_a_small_order(device):
    """100,000 ones have a 0.01-norm of 1e500. Clipping must not turn the finite gradient to NaN."""
    grad = torch.ones(100_000, dtype=torch.float64, device=device)
    assert gradfuse.clip_grad_norm_(owner(grad), 1e300, 0.01).item() == math.inf
    assert_values(grad, np.full(100_000, 1e-200), 1e-9)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", REAL, ids=short)
def test_every_size(dtype, n, device):
    grad = random(n, dtype=dtype, device=device)
    for norm_type in (2.0, 1.0, 3.0, math.inf):
        norm = true_norm([grad], norm_type)
        assert_norm(gradfuse.get_total_norm(grad, norm_type), norm, [dtype])
    truth = truly_clipped(grad, true_norm([grad]), 0.125)
    gradfuse.clip_grad_norm_(owner(grad), 0.125)
    assert_values(grad, truth, norm_rtol([dtype]))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", REAL, ids=short)
def test_no_element_is_missed_or_read_twice(dtype, n, device):
    """The only nonzero element lies where a vector, a block or a chunk begins or ends."""
    grad = torch.zeros(n, dtype=dtype, device=device)
    clipper = gradfuse.GradClipper(owner(grad), math.inf)
    borders = {0, 1, 15, 16, 31, 32, 127, 128, 4095, 4096, 32767, 32768, 65535, 98303, 98304}
    for where in sorted(w for w in {*borders, n // 2, n - 2, n - 1} if 0 <= w < n):
        grad[where] = -3.0
        (row,) = clipper.clip_().parameters
        assert (row.norm, row.largest, row.nonfinite, row.zeros) == (3.0, 3.0, 0, n - 1)
        grad[where] = 0.0


@pytest.mark.parametrize("offset", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("dtype", REAL, ids=short)
def test_unaligned_starts(dtype, offset, device):
    """Views that begin between vectors. The elements around them do not change."""
    base = random(5000, dtype=dtype, device=device)
    before = base.clone()
    grad = base[offset:-offset]
    norm = true_norm([grad])
    truth = truly_clipped(grad, norm, 1.0)
    assert_norm(gradfuse.clip_grad_norm_(owner(grad), 1.0), norm, [dtype])
    assert_values(grad, truth, norm_rtol([dtype]))
    assert bits([base[:offset], base[-offset:]]) == bits([before[:offset], before[-offset:]])


def test_many_chunks_of_many_tensors(device):
    grads = [random(n, device=device, seed=n) for n in (300_000, 3, 70_000, 1, 131_072, 32_769)]
    norm = true_norm(grads)
    truth = [truly_clipped(g, norm, 10.0) for g in grads]
    assert_norm(gradfuse.clip_grad_norm_(owners(grads), 10.0), norm, [torch.float32])
    for grad, expected in zip(grads, truth, strict=True):
        assert_values(grad, expected, 1.2e-6)


def test_complex_parts_at_the_top_of_float32(device):
    """Each modulus is beyond float32."""
    grad = torch.full((100,), complex(3e38, -3e38), dtype=torch.complex64, device=device)
    norm = true_norm([grad])
    truth = truly_clipped(grad, norm, 1.0)
    gradfuse.clip_grad_norm_(owner(grad), 1.0)
    assert abs(wide(grad) - truth).max() <= 1e-6


@pytest.mark.no_kernel
def test_norm_helper_goes_beyond_float64():
    """The truth of this file, checked against exact integers."""
    norm = true_norm([torch.full((9,), 2.0**1023, dtype=torch.float64)])
    assert norm.value * 2 ** (norm.exponent - 1023) == 3.0
    assert float(norm) == math.inf
    assert float(Norm(0.75, 3)) == 6.0
