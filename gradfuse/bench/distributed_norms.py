"""Batch norm with the statistics of two ranks, for the bench of norms over ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gradfuse.bench.batch_norm import cold_sets
from gradfuse.bench.models import NormSite, Shape
from gradfuse.bench.norms import Floor, Norm, Tensors, bytes_moved, fused

__all__ = ["BY_HAND", "OVER_RANKS", "OWN_BATCH", "NormTurns", "site_of"]

BY_HAND = "torch's ops and all_reduce"
OVER_RANKS = "gradfuse, all ranks"
OWN_BATCH = "gradfuse, own batch"


def site_of(shape: Shape, ranks: int) -> NormSite:
    """A rank's part of a batch norm + add + relu on inputs of this shape."""
    return NormSite((shape[0] // ranks, *shape[1:]))


class AllReduce(torch.autograd.Function):
    """The sum over ranks, also of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return AllReduce.forward(ctx, grad)


def by_hand(t: Tensors) -> Tensor:
    """What one writes where torch.nn.SyncBatchNorm refuses the CPU: two sums, all-reduced, and the
    formula."""
    dims = [d for d in range(t.x.ndim) if d != 1]
    count = t.x.numel() // t.x.shape[1] * dist.get_world_size()
    sums = torch.stack([t.x.sum(dims), t.x.square().sum(dims)])
    mean, square = AllReduce.apply(sums) / count
    var = square - mean.square()
    with torch.no_grad():
        t.mean.lerp_(mean, 0.1)
        t.var.lerp_(var * (count / (count - 1)), 0.1)
    scale = t.weight * (var + 1e-5).rsqrt()
    shape = [1, -1, *[1] * (t.x.ndim - 2)]
    y = t.x * scale.view(shape) + (t.bias - mean * scale).view(shape)
    assert t.residual is not None
    return F.relu(y + t.residual)


class NormTurns:
    """Forward and backward of a site by name; each call takes the next set of cold tensors."""

    def __init__(self, site: NormSite) -> None:
        self.bytes_moved = bytes_moved(site, torch.float32, backward=True)
        self._places = [
            Tensors(site, torch.float32, channels_last=False)
            for _ in range(cold_sets(self.bytes_moved))
        ]
        self._floors = [Floor(place) for place in self._places]
        self._results: list[tuple[Tensor, ...]] = [()] * len(self._places)
        self._turns = itertools.cycle(range(len(self._places)))
        over_ranks = fused("output", process_group=dist.group.WORLD)
        self._check(over_ranks)
        self.run: dict[str, Callable[[], None]] = {
            BY_HAND: partial(self._call, by_hand),
            OWN_BATCH: partial(self._call, fused("output")),
            OVER_RANKS: partial(self._call, over_ranks),
        }

    def _call(self, norm: Norm) -> None:
        i = next(self._turns)
        place = self._places[i]
        y = norm(place)
        # They live until the next turn, so that the memory of new ones is as cold as what is read.
        self._results[i] = (y, *place.backward(y))

    def least(self) -> None:
        """The bytes alone."""
        floor = self._floors[next(self._turns)]
        floor.forward()
        floor.backward()

    def _check(self, norm: Norm) -> None:
        place = self._places[0]
        y = by_hand(place)
        expected = (y, *place.backward(y))
        y = norm(place)
        for ours, theirs in zip((y, *place.backward(y)), expected, strict=True):
            if not (ours - theirs).norm() <= 1e-2 * theirs.norm():
                raise RuntimeError(f"{OVER_RANKS}: another result than {BY_HAND}")
