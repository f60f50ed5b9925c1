"""The scale that a dropped path gives each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from gradfuse.ops.row_norm import check_probability

__all__ = ["check_drop_mode", "path_scale"]

_MODES = ("row", "batch")


def check_drop_mode(op: str, mode: str) -> str:
    if mode not in _MODES:
        raise ValueError(f"{op}: drop_mode must be 'row' or 'batch', got {mode!r}")
    return mode


def path_scale(
    op: str,
    input: Tensor,
    drop_path: float,
    drop_mode: str = "row",
    generator: torch.Generator | None = None,
    scale_by_keep: bool = True,
) -> Tensor:
    """[N] numbers, 0 for samples whose path is dropped and 1 / (1 - drop_path) for the others.

    Args:
        input: [N, ...] Tensor.
        drop_path: probability that a path is dropped.
        drop_mode: "row" draws for each sample, "batch" once for all.
        generator: of the draw. Default: that of input's device.
        scale_by_keep: keep the expectation; else the others get 1.

    Raises:
        ValueError: drop_path is not in [0, 1], the mode is unknown, or input has no samples.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth", equation 2.
    """
    check_drop_mode(op, drop_mode)
    check_probability(op, "drop_path", drop_path)
    if not input.ndim:
        raise ValueError(f"{op}: drop_path needs an input of samples, got []")
    n = input.shape[0]
    if drop_path == 1.0:
        return torch.zeros(n, device=input.device)
    drawn = torch.empty(n if drop_mode == "row" else 1, device=input.device)
    drawn = drawn.bernoulli_(1.0 - drop_path, generator=generator)
    if scale_by_keep:
        drawn = drawn / (1.0 - drop_path)
    return drawn if drop_mode == "row" else drawn.expand(n)
