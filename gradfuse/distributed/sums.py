"""Sums over ranks beside a norm: one all-reduce of what each rank counts, or an error on all."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from gradfuse.distributed.ranks import Ranks

__all__ = ["default_device", "refused_elsewhere", "summed"]


def refused_elsewhere(op: str, rank: int, size: int) -> RuntimeError:
    """The error on ranks that wait for one that refused its gradients."""
    return RuntimeError(
        f"{op}: expected gradients that every rank takes, got ones that rank {rank} of {size} "
        "refused; nothing was written, and its own error says why"
    )


def default_device(ranks: Ranks) -> torch.device:
    """Where the group of these ranks works; on a GPU if it can."""
    kinds = [] if ranks.group is None else [d.type for d in ranks.group._device_types]
    if "cuda" not in kinds or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def summed(
    op: str,
    ranks: Ranks,
    shape: tuple[int, ...],
    device: torch.device,
    compute: Callable[[], Tensor],
    largest: bool = False,
) -> Tensor:
    """The sum over ranks, or the largest, of what compute returns. Collective.

    Args:
        shape: of what compute returns, float64, the same on all ranks.
        device: where the collective runs. On CUDA this waits for it.

    Raises:
        RuntimeError, TypeError, ValueError: compute did; or, RuntimeError, it did on another rank.
    """
    both = torch.zeros(ranks.size + torch.Size(shape).numel(), dtype=torch.float64, device=device)
    refused, values = both[: ranks.size], both[ranks.size :]
    error = None
    try:
        values.copy_(compute().flatten())
    except (RuntimeError, TypeError, ValueError) as raised:
        error = raised
        values.zero_()
        refused[ranks.position] = 1.0
    if ranks.size > 1:
        how = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        dist.all_reduce(both, op=how, group=ranks.group)
    if error is not None:
        raise error
    for rank, is_refused in enumerate(refused.tolist()):
        if is_refused:
            raise refused_elsewhere(op, rank, ranks.size)
    return values.reshape(shape)
