"""The norm of gradients that lie on several ranks: one read of the local shards, one collective.

Each rank writes the sum of what it counts into its own row of a small tensor of zeros, which one
all-reduce adds up. So every rank has all sums, and combines them in one order to the same bits.

What else a decision needs, such as the norm of each tensor, goes with the rows.

Exact sums are integers in limbs, which the all-reduce adds up itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gradfuse import _native
from gradfuse._codes import Action, NonFinite
from gradfuse._records import ClipPlan, ClipResult, TensorStats
from gradfuse.distributed.exact import (
    RankLimbs,
    limbs_of,
    refused_ranks,
    split_words,
    words_of,
)
from gradfuse.distributed.powers import norms_from, powers_of, slots_of
from gradfuse.distributed.ranks import Ranks
from gradfuse.distributed.shares import Shares
from gradfuse.distributed.sums import default_device, refused_elsewhere

__all__ = ["Merged", "Wanted", "measured_over_ranks", "plan_over_ranks"]

_FIELDS = 4  # of a row: sum, its exponent, found_inf, refused; csrc/math/clip.h has the same
_FOUND, _REFUSED = 2, 3
_WIDE = (torch.float64, torch.complex128)

T = TypeVar("T")


class Wanted(NamedTuple):
    """What a norm's collective brings beside the plan; the same on all ranks."""

    norms: bool = False  # the L2 norm of each of the caller's tensors, over all its shards
    bound: float = math.inf  # whether any element is larger


_PLAN = Wanted()  # and nothing else


class Merged(NamedTuple):
    """What came of all ranks."""

    result: ClipResult  # with the statistics of `shares.all`, of this rank
    norms: Tensor | None  # [the caller's tensors] float64, 0 where there is none
    beyond: Tensor | None  # [] bool, whether an element is beyond Wanted.bound
    found: Tensor | None = None  # [] bool, whether a loss scaler found inf, on any rank


def plan_over_ranks(
    op: str,
    shares: Shares,
    max_norm: float,
    norm_type: float,
    nonfinite: int,
    written: bool,
    exact: bool = False,
) -> ClipResult:
    """The result of measured_over_ranks alone. Collective; raises the same."""
    return measured_over_ranks(op, shares, max_norm, norm_type, nonfinite, written, exact).result


def measured_over_ranks(
    op: str,
    shares: Shares,
    max_norm: float,
    norm_type: float,
    nonfinite: int,
    written: bool,
    exact: bool = False,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    wanted: Wanted = _PLAN,
) -> Merged:
    """The plan for the norm over all ranks, the same bits on each. Collective: one all-reduce, and
    with `exact` one more for wanted.norms.

    A rank whose gradients are refused takes part all the same, so that the others do not wait.

    Args:
        written: whether the gradients will be written, and must not overlap.
        exact: whether the norm is the correctly rounded one of all elements, for norm_type 2.
        scale: the loss scale that the gradients carry, the same on all ranks, or None.
        found_inf: not 0 if a loss scaler found inf on this rank, which skips the step on all. All
            ranks have one, or none has.

    Raises:
        RuntimeError: nonfinite is ERROR and the norm is nan or inf, on all ranks; or another rank
            refused its gradients, which on CUDA leaves the gradients alone without an error.
        TypeError, RuntimeError: this rank's gradients are refused.
    """
    if exact:
        return _exact_over_ranks(op, shares, max_norm, nonfinite, written, scale, found_inf, wanted)
    ranks = shares.ranks
    results, error = _tried(shares, lambda part: _measured(part, norm_type, written))
    device = _device(shares, results)
    stats = _unscaled(results, scale, device)
    powers = [_powers(shares, stats, device)] if wanted.norms else []
    rows, *rest = _added(
        ranks,
        [
            _rows(ranks, _row(results, found_inf), device),
            *powers,
            *_counts_beyond(stats, wanted.bound, device),
        ],
    )
    refused = []
    if device.type == "cpu":
        refused = [r for r, row in enumerate(rows.tolist()) if row[_REFUSED]]
    _raise_refusals(op, error, refused, ranks)
    wide = any(t.dtype in _WIDE for t in shares.all)
    norm, plan = _native.backend.plan_of_sums(op, rows, wide, max_norm, norm_type, nonfinite, scale)
    return Merged(
        ClipResult(norm, plan, torch.cat(stats)),
        norms_from(rest[0], 2.0, slots_of(2.0, shares.wide)) if wanted.norms else None,
        rest[-1].sum() > 0.0 if wanted.bound < math.inf else None,
        None if found_inf is None else rows[:, _FOUND].any(),
    )


def _exact_over_ranks(
    op: str,
    shares: Shares,
    max_norm: float,
    nonfinite: int,
    written: bool,
    scale: Tensor | None,
    found_inf: Tensor | None,
    wanted: Wanted,
) -> Merged:
    ranks, wide = shares.ranks, shares.wide
    results, error = _tried(shares, lambda part: limbs_of(op, part, written, wide))
    device = _device(shares, results)
    stats = _unscaled(results, scale, device)
    found = [] if found_inf is None else [(found_inf != 0.0).reshape(1).to(device)]
    beyond = _counts_beyond(stats, wanted.bound, device)
    words, *rest = _added(
        ranks,
        [words_of(results, ranks, wide, device), *(t.to(torch.int64) for t in (*found, *beyond))],
    )
    powers = _added(ranks, [_powers(shares, stats, device)]) if wanted.norms else []
    limbs, refusals = split_words(words, wide)
    is_on_cpu = device.type == "cpu"
    _raise_refusals(op, error, refused_ranks(refusals) if is_on_cpu else [], ranks)
    any_wide = any(t.dtype in _WIDE for t in shares.all)
    any_found = rest[0].to(torch.float32) if found else None
    norm, plan = _native.backend.exact_plan(
        op, limbs, any_wide, max_norm, nonfinite, scale, any_found
    )
    if not is_on_cpu:
        ClipPlan.of(plan).action.masked_fill_(refusals.any(), Action.REFUSE)
    return Merged(
        ClipResult(norm, plan, torch.cat(stats)),
        norms_from(powers[0], 2.0, slots_of(2.0, wide)) if powers else None,
        rest[-1].sum() > 0 if beyond else None,
        rest[0].any() if found else None,
    )


def _tried(
    shares: Shares, measure: Callable[[list[Tensor]], T]
) -> tuple[list[T], Exception | None]:
    """What `measure` says of the gradients counted here and of the copies, or what is wrong."""
    error = shares.refusal
    try:
        if error is None:
            return [measure(part) for part in (shares.counted, shares.copies)], None
    except (RuntimeError, TypeError, ValueError) as raised:
        error = raised
    return [], error


def _raise_refusals(op: str, error: Exception | None, refused: Iterable[int], ranks: Ranks) -> None:
    """Raises this rank's error, or names the first rank that refused its gradients."""
    if error is not None:
        raise error
    for r in refused:
        raise refused_elsewhere(op, r, ranks.size)


def _measured(tensors: list[Tensor], norm_type: float, written: bool) -> ClipResult:
    """Norm, plan and statistics of a list; nothing is written."""
    if written:  # NonFinite.SKIP and inf leave everything alone
        result = _native.backend.clip_(tensors, False, math.inf, norm_type, NonFinite.SKIP)
    else:
        result = _native.backend.stats(tensors, False, norm_type, NonFinite.PROPAGATE)
    return ClipResult(*result)


def _unscaled(
    results: Sequence[ClipResult | RankLimbs], scale: Tensor | None, device: torch.device
) -> list[Tensor]:
    """The statistics of counted gradients and of copies, without the loss scale."""
    found = [result.stats.to(device) for result in results]
    if scale is not None:
        for stats in map(TensorStats.of, found):
            for column in (stats.norm, stats.largest):
                column.div_(scale.to(column))
    return found


def _row(results: list[ClipResult], found_inf: Tensor | None) -> list[Tensor]:
    """This rank's row, as 0-d float64 Tensors; that of a refusal without results."""
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    if not results:
        return [zero, zero, zero, zero + 1.0]
    counted, copies = (ClipPlan.of(result.plan) for result in results)
    # A sum of finite values is finite, so that a copy adds 0, or NaN where it is not finite.
    total = counted.sum + (copies.sum * 0.0).to(counted.sum.device)
    found = zero if found_inf is None else found_inf.reshape(()).to(torch.float64)
    return [total, counted.sum_exponent, found, zero]


def _powers(shares: Shares, stats: list[Tensor], device: torch.device) -> Tensor:
    """[the caller's tensors, slots]: the powers of the norms that this rank counts."""
    norms = torch.zeros(len(shares.ranks.counted), dtype=torch.float64, device=device)
    if stats:
        norms[shares.rows[: len(shares.counted)]] = TensorStats.of(stats[0]).norm
    return powers_of(norms, 2.0, slots_of(2.0, shares.wide))


def _counts_beyond(stats: list[Tensor], bound: float, device: torch.device) -> list[Tensor]:
    """[1], the number of shards with an element beyond the bound; nothing without a bound."""
    if bound == math.inf:
        return []
    count = torch.zeros(1, dtype=torch.float64, device=device)
    for part in stats:
        count += (TensorStats.of(part).largest > bound).sum()
    return [count]


def _device(shares: Shares, results: Sequence[ClipResult | RankLimbs]) -> torch.device:
    """Where the collective runs: with this rank's gradients, or where the group works."""
    if shares.all and results:
        return results[0 if shares.counted else 1].stats.device
    return shares.device or default_device(shares.ranks)


def _rows(ranks: Ranks, row: list[Tensor], device: torch.device) -> Tensor:
    """[ranks, fields]: this rank's row, and zeros for the others."""
    rows = torch.zeros(ranks.size, _FIELDS, dtype=torch.float64, device=device)
    rows[ranks.position] = torch.stack([value.to(device) for value in row])
    return rows


def _added(ranks: Ranks, parts: list[Tensor]) -> list[Tensor]:
    """The sums over ranks of tensors of one dtype, in one all-reduce."""
    if ranks.size == 1:
        return parts
    sums = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(sums, group=ranks.group)
    split = sums.split([part.numel() for part in parts])
    return [t.reshape(part.shape) for t, part in zip(split, parts, strict=True)]
