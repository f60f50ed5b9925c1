"""The norm of gradients that lie on several ranks: one read of the local shards, one collective.

Each rank writes the sum of what it counts into its own row of a small tensor of zeros, which one
all-reduce adds up. So every rank has all sums, and combines them in one order to the same bits.

Exact sums are integers in limbs, which the all-reduce adds up itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gradfuse import _native
from gradfuse._codes import Action, NonFinite
from gradfuse._records import ClipPlan, ClipResult
from gradfuse.distributed.exact import (
    RankLimbs,
    limbs_of,
    refused_ranks,
    split_words,
    words_of,
)
from gradfuse.distributed.locals import is_dtensor, local_of
from gradfuse.distributed.ranks import Group, Ranks, ReplicatedOver, ranks_of

__all__ = ["Shares", "plan_over_ranks", "shares_of"]

_FIELDS = 4  # of a row: sum, its exponent, found_inf, refused; csrc/math/clip.h has the same
_WIDE = (torch.float64, torch.complex128)

T = TypeVar("T")


@dataclass(frozen=True)
class Shares:
    """This rank's gradients, as the kernels take them.

    Attributes:
        ranks: who takes part.
        rows: the index of each among the caller's tensors, in the order of `all`.
        counted: those that this rank counts.
        copies: those that another rank counts.
        wide: whether any rank may have float64 gradients; the same on all of them.
        refusal: what is wrong with one of them; plan_over_ranks raises it after its collective.
    """

    ranks: Ranks
    rows: list[int]
    counted: list[Tensor]
    copies: list[Tensor]
    wide: bool
    refusal: Exception | None = None

    @property
    def all(self) -> list[Tensor]:
        return [*self.counted, *self.copies]

    def in_order(self, stats: Tensor) -> tuple[list[int], Tensor, Ranks]:
        """The rows of `stats` in the order of the caller's tensors: their indices, themselves, and
        who takes part, with `counted` of these rows alone."""
        order = sorted(range(len(self.rows)), key=self.rows.__getitem__)
        rows = [self.rows[i] for i in order]
        ranks = replace(self.ranks, counted=[self.ranks.counted[row] for row in rows])
        return rows, stats if order == list(range(len(order))) else stats[order], ranks


def shares_of(
    op: str,
    owners: Sequence[Tensor],
    of_grad: bool,
    group: Group | None = None,
    replicated_over: ReplicatedOver | None = None,
) -> Shares:
    """The shards of these tensors, or of their gradients, that this rank holds.

    Raises:
        TypeError: one is no Tensor, or a group is none.
        ValueError: as ranks_of.
    """
    for i, t in enumerate(owners):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: expected tensors, got {type(t).__name__} for tensor {i}")
    tensors = [t.grad if of_grad else t for t in owners]
    ranks = ranks_of(op, tensors, group, replicated_over, owners)
    there = [(i, local_of(t)) for i, t in enumerate(tensors) if t is not None]
    counted = [(i, t) for i, t in there if ranks.counted[i]]
    copies = [(i, t) for i, t in there if not ranks.counted[i]]
    rows = [i for i, _ in (*counted, *copies)]
    refusal = _refusal(op, tensors)
    # Ranks of a mesh have the same parameters, those of a group may have any.
    is_grouped = group is not None or replicated_over is not None
    wide = is_grouped or any(t.dtype in _WIDE for t in owners)
    return Shares(ranks, rows, [t for _, t in counted], [t for _, t in copies], wide, refusal)


def _refusal(op: str, tensors: Sequence[Tensor | None]) -> ValueError | None:
    for i, t in enumerate(tensors):
        if is_dtensor(t) and any(placement.is_partial() for placement in t.placements):
            return ValueError(
                f"{op}: expected gradients whose sum over ranks is done, got placements "
                f"{t.placements} for tensor {i}; redistribute it first"
            )
    return None


def plan_over_ranks(
    op: str,
    shares: Shares,
    max_norm: float,
    norm_type: float,
    nonfinite: int,
    written: bool,
    exact: bool = False,
) -> ClipResult:
    """The plan for the norm over all ranks, the same bits on each. Collective.

    A rank whose gradients are refused takes part all the same, so that the others do not wait.

    Args:
        written: whether the gradients will be written, and must not overlap.
        exact: whether the norm is the correctly rounded one of all elements, for norm_type 2.

    Returns:
        Norm and plan, and the statistics of `shares.all`.

    Raises:
        RuntimeError: nonfinite is ERROR and the norm is nan or inf, on all ranks; or another rank
            refused its gradients, which on CUDA leaves the gradients alone without an error.
        TypeError, RuntimeError: this rank's gradients are refused.
    """
    if exact:
        return _exact_plan_over_ranks(op, shares, max_norm, nonfinite, written)
    ranks = shares.ranks
    results, error = _tried(shares, lambda part: _measured(part, norm_type, written))
    sums = _gathered(ranks, _row(results), _device(shares, results))
    refused = []
    if sums.device.type == "cpu":
        refused = [r for r, row in enumerate(sums.tolist()) if row[3]]
    _raise_refusals(op, error, refused, ranks)
    wide = any(t.dtype in _WIDE for t in shares.all)
    norm, plan = _native.backend.plan_of_sums(op, sums, wide, max_norm, norm_type, nonfinite, None)
    return ClipResult(norm, plan, _joined(results, plan))


def _exact_plan_over_ranks(
    op: str, shares: Shares, max_norm: float, nonfinite: int, written: bool
) -> ClipResult:
    ranks, wide = shares.ranks, shares.wide
    results, error = _tried(shares, lambda part: limbs_of(op, part, written, wide))
    words = words_of(results, ranks, wide, _device(shares, results))
    if ranks.size > 1:
        dist.all_reduce(words, group=ranks.group)
    limbs, refusals = split_words(words, wide)
    is_on_cpu = words.device.type == "cpu"
    _raise_refusals(op, error, refused_ranks(refusals) if is_on_cpu else [], ranks)
    any_wide = any(t.dtype in _WIDE for t in shares.all)
    norm, plan = _native.backend.exact_plan(op, limbs, any_wide, max_norm, nonfinite, None)
    if not is_on_cpu:
        ClipPlan.of(plan).action.masked_fill_(refusals.any(), Action.REFUSE)
    return ClipResult(norm, plan, _joined(results, plan))


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
        raise RuntimeError(
            f"{op}: expected gradients that every rank takes, got ones that rank {r} of "
            f"{ranks.size} refused; nothing was written, and its own error says why"
        )


def _joined(results: Sequence[ClipResult | RankLimbs], plan: Tensor) -> Tensor:
    """The statistics of counted gradients and copies, on the plan's device."""
    return torch.cat([result.stats.to(plan.device) for result in results])


def _measured(tensors: list[Tensor], norm_type: float, written: bool) -> ClipResult:
    """Norm, plan and statistics of a list; nothing is written."""
    if written:  # NonFinite.SKIP and inf leave everything alone
        result = _native.backend.clip_(tensors, False, math.inf, norm_type, NonFinite.SKIP)
    else:
        result = _native.backend.stats(tensors, False, norm_type, NonFinite.PROPAGATE)
    return ClipResult(*result)


def _row(results: list[ClipResult]) -> list[Tensor]:
    """This rank's row, as 0-d float64 Tensors; that of a refusal without results."""
    if not results:
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        return [zero, zero, zero, zero + 1.0]
    counted, copies = (ClipPlan.of(result.plan) for result in results)
    # A sum of finite values is finite, so that a copy adds 0, or NaN where it is not finite.
    total = counted.sum + (copies.sum * 0.0).to(counted.sum.device)
    zero = torch.zeros_like(total)
    return [total, counted.sum_exponent, zero, zero]


def _device(shares: Shares, results: Sequence[ClipResult | RankLimbs]) -> torch.device:
    """Where the collective runs: with this rank's gradients, or where the group works."""
    if shares.all and results:
        return results[0 if shares.counted else 1].stats.device
    if shares.ranks.group is None:
        return torch.device("cpu")
    return dist.distributed_c10d._get_pg_default_device(shares.ranks.group)


def _gathered(ranks: Ranks, row: list[Tensor], device: torch.device) -> Tensor:
    """The rows of all ranks, [ranks, fields]."""
    sums = torch.zeros(ranks.size, _FIELDS, dtype=torch.float64, device=device)
    sums[ranks.position] = torch.stack(row).to(device)
    if ranks.size > 1:
        dist.all_reduce(sums, group=ranks.group)
    return sums
