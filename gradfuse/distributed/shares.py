"""A rank's part of the gradients of a call: what it counts, and what it has copies of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradfuse._records import TensorStats
from gradfuse.distributed.locals import is_dtensor, local_of
from gradfuse.distributed.ranks import Group, Ranks, ReplicatedOver, ranks_of

__all__ = ["Shares", "shares_of"]

_WIDE = (torch.float64, torch.complex128)


@dataclass(frozen=True)
class Shares:
    """This rank's gradients, as the kernels take them.

    Attributes:
        ranks: who takes part.
        rows: the index of each among the caller's tensors, in the order of `all`.
        counted: those that this rank counts.
        copies: those that another rank counts.
        wide: whether any rank may have float64 gradients; the same on all of them.
        device: of this rank's tensors, whether or not they have gradients; None without any.
        refusal: what is wrong with one of them; plan_over_ranks raises it after its collective.
    """

    ranks: Ranks
    rows: list[int]
    counted: list[Tensor]
    copies: list[Tensor]
    wide: bool
    device: torch.device | None
    refusal: Exception | None = None

    @property
    def all(self) -> list[Tensor]:
        return [*self.counted, *self.copies]

    def tabled(self, stats: Tensor) -> Tensor:
        """The rows of `stats`, a TensorStats each of `all`, with one for each of the caller's
        tensors in their order."""
        table = stats.new_tensor(TensorStats.absent()).repeat(len(self.ranks.counted), 1)
        table[self.rows] = stats
        return table

    def reporting(self) -> Ranks:
        """Who takes part, with `counted` of the tensors that are there alone, as reports list
        them."""
        return replace(self.ranks, counted=[self.ranks.counted[row] for row in sorted(self.rows)])


def shares_of(
    op: str,
    owners: Sequence[Tensor],
    of_grad: bool,
    group: Group | None = None,
    replicated_over: ReplicatedOver | None = None,
    beside: Sequence[Tensor] = (),
    refusal: Exception | None = None,
) -> Shares:
    """The shards of these tensors, or of their gradients, that this rank holds.

    Args:
        beside: more tensors whose meshes tell who takes part.
        refusal: why this rank refuses its gradients; none of them is then looked at.

    Raises:
        TypeError: one is no Tensor, or a group is none.
        ValueError: as ranks_of.
    """
    for i, t in enumerate(owners):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: expected tensors, got {type(t).__name__} for tensor {i}")
    tensors = [None if refusal else t.grad if of_grad else t for t in owners]
    ranks = ranks_of(op, tensors, group, replicated_over, owners, beside)
    there = [(i, local_of(t)) for i, t in enumerate(tensors) if t is not None]
    counted = [(i, t) for i, t in there if ranks.counted[i]]
    copies = [(i, t) for i, t in there if not ranks.counted[i]]
    rows = [i for i, _ in (*counted, *copies)]
    refusal = refusal or _refusal(op, tensors)
    # Ranks of a mesh have the same parameters, those of a group may have any.
    is_grouped = group is not None or replicated_over is not None
    wide = is_grouped or any(t.dtype in _WIDE for t in owners)
    device = local_of(owners[0]).device if owners else None
    return Shares(
        ranks, rows, [t for _, t in counted], [t for _, t in copies], wide, device, refusal
    )


def _refusal(op: str, tensors: Sequence[Tensor | None]) -> ValueError | None:
    for i, t in enumerate(tensors):
        if is_dtensor(t) and any(placement.is_partial() for placement in t.placements):
            return ValueError(
                f"{op}: expected gradients whose sum over ranks is done, got placements "
                f"{t.placements} for tensor {i}; redistribute it first"
            )
    return None
