"""The exact norm: the correctly rounded root of the exact sum of squares, whatever the order.

The truth is a Python integer: the sum of squares in units of 2**-2300.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from helpers import COMPLEX, REAL, bits, owners, random
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gradfuse
from gradfuse import _native
from gradfuse._codes import NonFinite
from gradfuse._records import ClipPlan
from gradfuse.distributed.exact import RankLimbs, refused_ranks, split_words, words_of
from gradfuse.distributed.ranks import Ranks
from gradfuse.reference.exact import NARROW, WIDE, exact_sum

UNIT = 2300  # 2**-UNIT divides every square
WORDS = {torch.float64: torch.int64, torch.float32: torch.int32}


def sum_of_squares(tensors: Iterable[Tensor]) -> int:
    """In units of 2**-UNIT, from the ratios that Python gives of floats."""
    total = 0
    for t in tensors:
        parts = torch.view_as_real(t) if t.is_complex() else t
        for x in parts.double().flatten().tolist():
            top, bottom = x.as_integer_ratio()
            total += (top * top << UNIT) // (bottom * bottom)
    return total


def rounded_root(total: int, dtype: torch.dtype) -> Fraction:
    """By trying: the number of the type on either side of the root, the nearer one, or of two the
    even one."""
    bits, least = (53, -1074) if dtype == torch.float64 else (24, -149)
    if total == 0:
        return Fraction(0)
    exponent = (total.bit_length() + 1) // 2 - UNIT // 2 - bits
    unit = Fraction(2) ** max(exponent, least)
    square = Fraction(total, 2**UNIT) / unit**2
    below = math.isqrt(math.floor(square))
    middle = (below + Fraction(1, 2)) ** 2
    up = square > middle or (square == middle and below % 2 == 1)
    return (below + up) * unit


def as_dtype(value: Fraction, dtype: torch.dtype) -> float:
    """A representable value, or inf."""
    largest = Fraction(torch.finfo(dtype).max)
    return math.inf if value > largest else float(value)


def limbs_of(tensors: Sequence[Tensor]) -> Tensor:
    return _native.backend.exact_limbs("norm", list(tensors), False)[0]


def integer_of(words: Tensor) -> int:
    lowest = NARROW.lowest if len(words) == NARROW.words else WIDE.lowest
    return sum(w << (40 * i) for i, w in enumerate(words.tolist()[:-2])) << (UNIT + lowest)


def assert_exact(tensors: Sequence[Tensor]) -> None:
    total = sum_of_squares(tensors)
    words = limbs_of(tensors)
    assert integer_of(words) == total
    assert all(0 <= w < 2**40 for w in words.tolist()[:-2])
    norm = gradfuse.get_total_norm(tensors, exact=True)
    assert float(norm) == as_dtype(rounded_root(total, norm.dtype), norm.dtype)


def any_bits(dtype: torch.dtype, n: int, seed: int) -> Tensor:
    """Finite numbers of every exponent."""
    kind = {2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]
    words = np.random.default_rng(seed).integers(0, np.iinfo(kind).max, n, dtype=kind)
    x = torch.from_numpy(words.view(kind.__name__.replace("u", ""))).view(dtype)
    return torch.where(x.isfinite(), x, torch.zeros((), dtype=dtype))


@st.composite
def gradients(draw: Any) -> list[Tensor]:
    """A few tensors of any dtypes, of exponents that lie near or far, with trailing zeros."""
    found = []
    for _ in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from([*REAL, *COMPLEX]))
        n = draw(st.sampled_from([0, 1, 2, 3, 5, 17, 33, 64, 100, 257]))
        seed, centre, spread = draw(st.integers(0, 2**20)), draw(st.integers(-1080, 1000)), 0
        spread = draw(st.sampled_from([0, 1, 4, 20, 60, 300, 2100]))
        generator = np.random.default_rng(seed)
        size = 2 * n if dtype.is_complex else n
        x = generator.standard_normal(size)
        if draw(st.booleans()):
            x = np.round(x * 4)
        low = max(centre - spread, -1100)
        with np.errstate(over="ignore"):
            x = np.ldexp(x, generator.integers(low, min(low + spread + 1, 1020) + 1, size))
        t = torch.from_numpy(x)
        t = torch.view_as_complex(t.view(-1, 2)) if dtype.is_complex else t
        t = t.to(dtype)
        found.append(torch.where(t.isfinite(), t, torch.ones((), dtype=dtype)))
    return found


@given(gradients())
def test_sum_and_root_are_those_of_big_integers(backend, tensors):
    assert_exact(tensors)


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("n", [1, 7, 4096, 4097, 12_000])
def test_every_exponent_at_once(dtype, n, backend):
    assert_exact([any_bits(dtype, n, seed=n)])


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize(
    "which", ["smallest", "subnormals", "beside", "largest", "both ends", "zeros", "ones"]
)
def test_ends_of_the_range(dtype, which, backend):
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    values = {
        "smallest": [least] * 3,
        "subnormals": [k * least for k in (1, 3, 5, 1023, 77)],
        "beside": [min(k * least * 2.0**e, info.max) for k in (1, 77, 2**27 + 5) for e in (0, 110)],
        "largest": [info.max] * 5,
        "both ends": [info.max, least, -info.max, 1.0],
        "zeros": [0.0, -0.0],
        "ones": [1.0] * 4999,
    }[which]
    assert_exact([torch.tensor(values, dtype=torch.float64).to(dtype)])


@pytest.mark.parametrize("scale", [1.0, 2.0**-70, 2.0**50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_even_and_what_is_below_decides_the_others(scale, dtype, backend):
    """The sums are squares of a number half way between two of the result's type, or a little
    more."""
    places = 24 if dtype == torch.float32 else 53
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for odd in (2**places + 1, 2**places + 3):
        tie = [w * 2.0**-places * scale for w in squares_of(odd * odd, 2**places)]
        for more in ([], [least], [scale * 2.0**-55]):
            tensors = [torch.tensor(tie + more, dtype=dtype)]
            assert_exact(tensors)
            if dtype == torch.float32:
                assert_exact([t.double() for t in tensors])


def squares_of(n: int, most: int) -> list[int]:
    """Integers up to `most` whose squares sum to n."""
    found = []
    while n:
        found.append(min(math.isqrt(n), most))
        n -= found[-1] ** 2
    return found


def test_a_float32_norm_is_rounded_once(backend):
    """Rounded to float64 first, this would be a tie in float32, and become 1."""
    x = torch.tensor([1.0, 2.0**-12, 2.0**-12, 2.0**-24, 2.0**-60])
    assert float(gradfuse.get_total_norm([x], exact=True)) == 1.0 + 2.0**-23
    assert math.sqrt(float(x.double().square().sum())) == 1.0 + 2.0**-24


def test_norms_beyond_float64_and_of_its_subnormals(backend):
    huge = [torch.full((5,), torch.finfo(torch.float64).max, dtype=torch.float64)]
    report = gradfuse.GradClipper(owners(huge), max_norm=1.0, exact=True).clip_()
    assert math.isinf(report.total_norm)
    assert report.clipped_norm == pytest.approx(1.0, rel=1e-14)
    tiny = torch.tensor([3.0, 4.0, 1.0], dtype=torch.float64) * 2.0**-1074
    norm = gradfuse.get_total_norm([tiny], exact=True)
    assert float(norm) == 5 * 2.0**-1074  # sqrt(26)


def test_nothing_has_norm_zero(backend):
    assert float(gradfuse.get_total_norm([], exact=True)) == 0.0
    assert float(gradfuse.get_total_norm([torch.zeros(0), torch.zeros(3)], exact=True)) == 0.0


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("at", [0, 40, 5000])
def test_inf_and_nan(dtype, at, backend):
    x = random(6000, dtype=dtype)
    x[at] = -math.inf
    assert float(gradfuse.get_total_norm([x], exact=True)) == math.inf
    assert limbs_of([x])[-2:].tolist() == [1, 0]
    x[2] = math.nan
    assert math.isnan(gradfuse.get_total_norm([x], exact=True))
    assert limbs_of([x])[-2:].tolist() == [1, 1]
    assert bits(limbs_of([x])) == bits(
        exact_sum([x]).words(WIDE if x.element_size() == 8 else NARROW)
    )
    with pytest.raises(RuntimeError, match="expected a finite total norm of order 2, got nan"):
        gradfuse.clip_grad_norm_(owners([x]), 1.0, nonfinite="error", exact=True)
    gradfuse.clip_grad_norm_(owners([x]), 1.0, nonfinite="zero", exact=True)
    assert not x.any()


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=str)
def test_order_and_split_do_not_change_a_bit(dtype, backend):
    whole = random(10_000, dtype=dtype, scale=1e-3)
    expected = bits(limbs_of([whole]))
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        mixed = whole[torch.randperm(10_000, generator=generator)]
        cuts = torch.randint(0, 10_000, (4,), generator=generator).sort().values.tolist()
        parts = [mixed[a:b] for a, b in itertools.pairwise([0, *cuts, 10_000])]
        assert bits(limbs_of(parts)) == expected
    strided = torch.stack([whole, whole], 1)[:, 0]
    assert bits(limbs_of([strided])) == expected
    norms = {float(gradfuse.get_total_norm(ts, exact=True)) for ts in ([whole], parts, [strided])}
    assert len(norms) == 1


@pytest.mark.backends("cpu")
def test_threads_do_not_change_a_bit(threads, backend):
    grads = [random(n, scale=1e-3, seed=n) for n in (1_200_000, 33, 400_001, *[7] * 500)]
    found = set()
    for n in (1, 2, 3, 7):
        threads(n)
        found.add(bits(limbs_of(grads))[0])
    assert found == {bits(exact_sum(grads).words(NARROW))[0]}


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=str)
def test_plan_and_report_are_those_of_the_fast_norm_to_rounding(dtype, backend):
    grads = [random(n, dtype=dtype, seed=n) for n in (5000, 3, 0)]
    grads[1][1] = 0
    reports, clipped = [], []
    for exact in (False, True):
        mine = [g.clone() for g in grads]
        clipper = gradfuse.GradClipper(owners(mine), 0.5, exact=exact)
        reports.append(clipper.clip_())
        clipped.append(mine)
    fast, exact = (r.to_dict() for r in reports)
    rows = [r.pop("parameters") for r in (fast, exact)]
    assert fast.pop("clipped") is exact.pop("clipped") is True
    assert {k: v for k, v in exact.items() if isinstance(v, float)} == pytest.approx(
        {k: v for k, v in fast.items() if isinstance(v, float)}, rel=1e-6
    )
    for a, b in zip(*rows, strict=True):
        assert b.pop("norm") == pytest.approx(a.pop("norm"), rel=1e-6)
        assert a == b
    for a, b in zip(*clipped, strict=True):
        torch.testing.assert_close(a, b)
    plan = _native.backend.stats(grads, False, 2.0, NonFinite.PROPAGATE, True)[1]
    fields = ClipPlan.read(plan)
    assert math.sqrt(fields.sum) * 2.0**fields.sum_exponent == fields.norm


@pytest.mark.parametrize("scale", [1.0, 1024.0, 3.0])
def test_a_step_clips_by_the_exact_norm(scale, backend):
    grads = [random(n, seed=n) * scale for n in (700, 31)]
    truth = float(rounded_root(sum_of_squares(grads), torch.float64)) / scale
    out = []
    for clip in (gradfuse.policies.Norm(0.5, exact=True), 0.5):
        ps = owners([g.clone() for g in grads])
        optimizer = gradfuse.optim.SGD(ps, lr=1.0, clip=clip)
        optimizer.grad_scale = torch.tensor(scale)
        optimizer.step()
        out.append((ps, optimizer.report))
    (ours, report), (fast, other) = out
    assert report.total_norm == truth
    assert report.total_norm == pytest.approx(other.total_norm, rel=1e-6)
    assert report.policy == "Norm(max_norm=0.5, exact=True)"
    for a, b in zip(ours, fast, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0.0)


def test_a_clipper_takes_it_from_its_policy(backend):
    grads = [random(999)]
    truth = float(rounded_root(sum_of_squares(grads), torch.float64))
    policy = gradfuse.policies.Norm(1.0, exact=True)
    assert gradfuse.GradClipper(owners(grads), policy).clip_().total_norm == truth


@pytest.mark.no_kernel
def test_only_order_2_is_exact(backend):
    x = torch.ones(2)
    for call in (
        lambda: gradfuse.get_total_norm([x], 1.0, exact=True),
        lambda: gradfuse.clip_grad_norm_(owners([x]), 1.0, math.inf, exact=True),
        lambda: gradfuse.GradClipper(owners([x]), 1.0, 3.0, exact=True),
    ):
        with pytest.raises(ValueError, match="norm_type must be 2 with exact=True, got"):
            call()


@pytest.mark.parametrize("bad", [torch.zeros(17, dtype=torch.int64), torch.zeros(18)])
def test_words_of_no_form_are_refused(bad, backend):
    with pytest.raises(ValueError, match=r"norm: limbs must be int64 \[18\] or \[109\], got"):
        _native.backend.exact_plan("norm", bad, False, 1.0, NonFinite.PROPAGATE, None)


def test_traced_calls_are_exact(backend):
    x = torch.tensor([1.0, 2.0**-12, 2.0**-12, 2.0**-24, 2.0**-60])

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(t):
        return gradfuse.get_total_norm([t], exact=True)

    assert float(compiled(x)) == 1.0 + 2.0**-23


# Over ranks: sums of words, as the all-reduce makes them.


def over(parts: Sequence[Sequence[Tensor]], copies: Sequence[Tensor], wide: bool) -> Tensor:
    """The words that an all-reduce of these ranks' would give."""
    size = len(parts)
    words = []
    for rank, part in enumerate(parts):
        lists = (list(part), list(copies))
        results = [RankLimbs(*_native.backend.exact_limbs("norm", ts, False)) for ts in lists]
        ranks = Ranks(None, size, rank, [])
        words.append(words_of(results, ranks, wide, torch.device("cpu")))
    return torch.stack(words).sum(0)


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("wide", [False, True])
def test_any_number_of_ranks_gives_the_same_bits(ranks, wide, backend):
    grads = [random(1001), random(64, dtype=torch.bfloat16), random(9, dtype=torch.float16)]
    if wide:
        grads.append(random(100, dtype=torch.float64, scale=1e-200))
    whole = gradfuse.get_total_norm(grads, exact=True)
    parts = [[g[r::ranks] for g in grads] for r in range(ranks)]
    # A copy that nobody counts adds nothing.
    limbs, refusals = split_words(over(parts, [torch.ones(5)], wide), wide)
    assert refused_ranks(refusals) == []
    norm, plan = _native.backend.exact_plan("norm", limbs, wide, 1.0, NonFinite.PROPAGATE, None)
    assert bits(norm) == bits(whole)
    expected = _native.backend.stats(grads, False, 2.0, NonFinite.PROPAGATE, True)[1]
    assert ClipPlan.read(plan).norm == ClipPlan.read(expected).norm


def test_a_copy_that_is_not_finite_counts(backend):
    words = over([[torch.ones(2)]] * 2, [torch.tensor([math.nan])], False)
    norm, _ = _native.backend.exact_plan(
        "norm", split_words(words, False)[0], False, 1.0, NonFinite.PROPAGATE, None
    )
    assert math.isnan(norm)


@pytest.mark.no_kernel
def test_refusals_are_told_apart(backend):
    size = 130
    words = [
        words_of([], Ranks(None, size, rank, []), False, torch.device("cpu"))
        for rank in (0, 61, 62, 129)
    ]
    limbs, refusals = split_words(torch.stack(words).sum(0), False)
    assert not limbs.any()
    assert refused_ranks(refusals) == [0, 61, 62, 129]
