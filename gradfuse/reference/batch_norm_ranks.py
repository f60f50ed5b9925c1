"""Statistics of a batch norm over ranks in plain torch: what a rank tells the others of its batch,
and what follows from all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from gradfuse._records import BatchNormCall

__all__ = ["check_count", "merged", "tally"]


def tally(x: Tensor) -> Tensor:
    """float64 [1 + 2 * C]: count, means and sums of squared deviations of x [N, C, ...]."""
    c = x.shape[1]
    if x.numel() == 0:
        return x.new_zeros(1 + 2 * c, dtype=torch.float64)
    x = x.double().movedim(1, 0).flatten(1)
    mean = x.mean(1)
    m2 = (x - mean[:, None]).square().sum(1)
    return torch.cat([mean.new_full((1,), x.shape[1]), mean, m2])


def merged(gathered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count [], means and sums of squared deviations [C] of rows as of `tally`, in their order.

    Source: Chan, Golub, LeVeque 1983, equation 1.5.
    """
    count, mean, m2 = map(torch.zeros_like, _fields(gathered[0]))
    for row in gathered:
        n, other, deviations = _fields(row)
        if n == 0:
            continue
        total = count + n
        ahead, share = other - mean, n / total
        m2 = m2 + deviations + ahead.square() * (count * share)
        count, mean = total, mean + ahead * share
    return count, mean, m2


def _fields(row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    c = row.shape[0] // 2
    return row[0], row[1 : 1 + c], row[1 + c :]


def check_count(call: BatchNormCall) -> None:
    """Raises if the statistics are those of one value, or a rank has refused its input; on all
    ranks alike. Where that waits for a device, ranks with several values do not look."""
    if not call.training:
        return
    input, in_all = call.input, ""
    count: float = input.numel() // max(input.shape[1], 1)
    if call.gathered is not None:
        if input.device.type != "cpu" and count > 1:
            return
        counts = call.gathered[:, 0].tolist()
        for r, of_rank in enumerate(counts):
            if not of_rank >= 0.0:
                raise RuntimeError(
                    "batch_norm_act: expected an input that every rank takes, got one that rank "
                    f"{r} of {len(counts)} refused; nothing was written, and its own error says why"
                )
        count = sum(counts)
        in_all = f" and one value in all {len(counts)} ranks"
    if count == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{list(input.shape)}{in_all}"
        )
