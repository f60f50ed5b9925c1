"""Modes of batch norm in plain torch: ghost batches, renormalisation, adaptive momentum."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradfuse._records import BatchNormCall, BatchNormSaved

__all__ = [
    "DRIFT_ROWS",
    "adaptive_momentum",
    "ghost_batches",
    "ghost_sizes",
    "renormalisation",
    "split_call",
    "split_saved",
]

DRIFT_ROWS = 4  # smoothed differences of mean and variance, their smoothed square, batches
SMOOTHING = 0.1
LEAST, MOST = 0.02, 0.5  # momentum
MOST_DIFFERENCE = 4.0  # in standard deviations


def ghost_sizes(samples: int, ghost_size: int) -> list[int]:
    """The sizes of a batch's ghost batches: at most ghost_size, and they differ by at most one."""
    count = ghost_batches(samples, ghost_size)
    size, larger = divmod(samples, count)
    return [size + (k < larger) for k in range(count)]


def ghost_batches(samples: int, ghost_size: int) -> int:
    """Their number."""
    return max(-(-samples // ghost_size), 1) if ghost_size else 1


def split_call(call: BatchNormCall, sizes: Sequence[int]) -> Iterator[BatchNormCall]:
    """The calls of a batch's ghost batches."""
    begin, momentum = 0, call.momentum
    several = isinstance(momentum, Tensor) and momentum.numel() > 1
    of_each = torch.as_tensor(momentum).flatten() if several else None
    for k, size in enumerate(sizes):
        part = slice(begin, begin + size)
        begin += size
        yield call._replace(
            input=call.input[part],
            residual=None if call.residual is None else call.residual[part],
            sample_scale=None if call.sample_scale is None else call.sample_scale[part],
            momentum=momentum if of_each is None else of_each[k],
        )


def split_saved(saved: BatchNormSaved, sizes: Sequence[int]) -> Iterator[BatchNormSaved]:
    """What the ghost batches of a batch have saved."""
    if len(sizes) == 1:
        yield saved
        return
    samples, begin = sum(sizes), 0
    for size, stats in zip(sizes, saved.stats.chunk(len(sizes)), strict=True):

        def part(t: Tensor | None, begin: int = begin, size: int = size) -> Tensor | None:
            if t is None:
                return None
            rows = t.shape[0] // samples  # of a sample: several only in a mask
            return t[begin * rows : (begin + size) * rows]

        yield saved._replace(
            input=part(saved.input),
            residual=part(saved.residual),
            output=part(saved.output),
            mask=part(saved.mask),
            sample_scale=part(saved.sample_scale),
            stats=stats,
        )
        begin += size


def _risen(step: float, begin: float, end: float) -> float:
    if step >= end:
        return 1.0
    return 0.0 if step <= begin else (step - begin) / (end - begin)


def renormalisation(
    renorm: Sequence[float],
    step: Tensor | None,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """r and d [C] of the batch's mean and biased variance.

    Source: Ioffe 2017, "Batch Renormalization", algorithm 1.
    """
    r_max, d_max, begin, r_end, d_end = renorm
    now = math.inf if step is None else float(step)
    r_limit = 1.0 + (r_max - 1.0) * _risen(now, begin, r_end)
    d_limit = d_max * _risen(now, begin, d_end)
    deviation = (running_var.to(mean.dtype) + eps).sqrt()
    r = (var + eps).sqrt() / deviation
    d = (mean - running_mean.to(mean.dtype)) / deviation
    return r.clamp(1.0 / r_limit, r_limit).detach(), d.clamp(-d_limit, d_limit).detach()


def adaptive_momentum(
    drift: Tensor,
    mean: Tensor,
    variance: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> Tensor:
    """[C]: the momentum of the next update, from how the batches differ from the running statistics
    [C]. Updates drift [4, C].

    With z the differences of mean and variance in standard deviations, each at most 4, s their
    average smoothed by 0.1 and q that of z's square, the tracking signal is s^2 / q: 1 if all
    batches differ in one direction, 0.1 / 1.9 on average if they are noise. The momentum goes from
    0.02 to 0.5 with what exceeds that, and is at least 1 / (batches + 1).

    Source: Trigg, Leach 1967, "Exponential smoothing with an adaptive response rate".
    """
    of_mean, of_variance, square, batches = drift.to(mean.dtype, copy=True)
    scale = 1.0 / (running_var.to(mean.dtype) + eps)
    z = torch.stack(
        [
            (mean - running_mean) * scale.sqrt(),
            (variance - running_var) * scale * math.sqrt(0.5),
        ]
    ).clamp(-MOST_DIFFERENCE, MOST_DIFFERENCE)
    counts = (batches > 0) & z.isfinite().all(0)
    smoothed = torch.lerp(torch.stack([of_mean, of_variance]), z, SMOOTHING)
    size = torch.lerp(square, z.square().sum(0), SMOOTHING)
    noise = SMOOTHING / (2.0 - SMOOTHING)
    share = torch.where(size > 0, smoothed.square().sum(0) / size, 0.0)
    signal = ((share - noise) / (1.0 - noise)).clamp(0.0, 1.0)
    momentum = LEAST + (MOST - LEAST) * torch.where(counts, signal, 0.0)
    now = torch.stack([*smoothed, size])
    drift.copy_(torch.cat([torch.where(counts, now, drift[:3]), (batches + 1.0)[None]]))
    return torch.maximum(momentum, 1.0 / (batches + 1.0))
