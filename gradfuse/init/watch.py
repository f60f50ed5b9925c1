"""Figures of tensors: rms and the like, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Figures", "measured", "rms"]


class Figures(NamedTuple):
    """What one op's result looked like."""

    rms: float
    dead: float  # share of features that are 0 throughout the batch
    flat: float  # share of values within 1 % of a bound, for tanh and sigmoid


def rms(tensor: Tensor) -> float:
    """Root of the mean square; 0 for no elements, NaN on the meta device."""
    if tensor.device.type == "meta":
        return math.nan
    if not tensor.numel():
        return 0.0
    values = tensor.detach()
    size = values.abs() if values.is_complex() else values
    return float(size.double().square().mean().sqrt())


def measured(tensor: Tensor, name: str) -> Figures | None:
    """Figures of a floating-point result; None for any other."""
    if not tensor.is_floating_point() or tensor.device.type == "meta":
        return None
    values = tensor.detach()
    dead = 0.0
    if values.dim() > 1:
        dim = 1 if values.dim() > 3 else values.dim() - 1
        zero = (values == 0).movedim(dim, 0).flatten(1)
        dead = float(zero.all(dim=1).double().mean()) if zero.numel() else 0.0
    flat = 0.0
    if name in ("tanh", "tanh_"):
        flat = float((values.abs() > 0.99).double().mean())
    elif name in ("sigmoid", "sigmoid_"):
        flat = float(((values - 0.5).abs() > 0.49).double().mean())
    return Figures(rms(values), dead, flat)


def restore(saved: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Writes copies back to the tensors they were made of."""
    with torch.no_grad():
        for tensor, copy in saved:
            tensor.copy_(copy)
