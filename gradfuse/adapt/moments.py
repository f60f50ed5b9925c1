"""Mean and variance in float64, merged over batches and ranks."""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["Moments", "moments", "over_ranks"]

CHUNK = 1 << 24  # elements that are held in float64 at a time


class Moments(NamedTuple):
    """Mean and sum of squared deviations [C], in float64, of so many values a channel."""

    samples: float
    mean: Tensor
    m2: Tensor

    def merged(self, other: Moments) -> Moments:
        """Of both together; Chan, Golub, LeVeque 1983, equation 1.5."""
        samples = self.samples + other.samples
        ahead, share = other.mean - self.mean, other.samples / samples
        m2 = self.m2 + other.m2 + ahead.square() * (self.samples * share)
        return Moments(samples, self.mean + ahead * share, m2)

    @property
    def var(self) -> Tensor:
        """Unbiased, as torch keeps it."""
        return self.m2 / max(self.samples - 1.0, 1.0)

    def faded(self, new: Moments, momentum: float) -> Moments:
        """The exponential average of mean and variance, with this weight of the new ones."""
        samples = self.samples + new.samples
        mean, var = torch.lerp(self.mean, new.mean, momentum), self.var.lerp(new.var, momentum)
        return Moments(samples, mean, var * max(samples - 1.0, 1.0))


def moments(input: Tensor) -> Moments:
    """Of the channels of an input [N, C, ...] that is not empty."""
    dims = [d for d in range(input.dim()) if d != 1]
    found = []
    for part in input.split(max(1, CHUNK * len(input) // input.numel())):
        var, mean = torch.var_mean(part.double(), dims, correction=0)
        samples = float(part.numel() // part.shape[1])
        found.append(Moments(samples, mean, var * samples))
    return reduce(Moments.merged, found)


def over_ranks(bn: nn.Module, batch: Moments) -> Moments:
    """What the ranks of a SyncBatchNorm saw together; all ranks get the same bits."""
    if not hasattr(bn, "process_group") or not (dist.is_available() and dist.is_initialized()):
        return batch
    group: Any = bn.process_group
    packed = torch.cat([batch.mean.new_tensor([batch.samples]), batch.mean, batch.m2])
    gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, packed, group)
    size = len(batch.mean)
    return reduce(
        Moments.merged,
        (Moments(float(t[0]), t[1 : 1 + size], t[1 + size :]) for t in gathered),
    )
