"""Norms as numbers that an all-reduce can add up, of any size that float64 holds.

The p-th power of a norm may be beyond float64. So each norm goes into one of a few slots by its
exponent, and each slot is scaled by a power of two of its own (after Blue 1978, "A portable Fortran
program to find the Euclidean norm of a vector"). A float32 norm of order 2 needs one slot.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["norms_from", "powers_of", "slots_of"]

# Binary exponents of norms: of 16- and 32-bit values, and of 64-bit ones.
_NARROW, _WIDE = 400.0, 2150.0
_SPREAD = 1900.0  # of the powers in a slot, which leaves room for sums of them


def slots_of(p: float, wide: bool) -> list[int]:
    """For each slot the binary exponent that its norms are divided by.

    Args:
        p: order of the norms; inf takes one slot, of which the largest counts.
        wide: whether any value is a float64.
    """
    if math.isinf(p):
        return [0]
    spread = _WIDE if wide else _NARROW
    count = math.ceil(spread * p / _SPREAD)
    width = spread / count
    return [round(width * (k - (count - 1) / 2)) for k in range(count)]


def powers_of(norms: Tensor, p: float, slots: list[int]) -> Tensor:
    """[..., slots]: p-th powers, each in its slot and 0 in the others; for inf the norms."""
    if math.isinf(p):
        return norms.unsqueeze(-1)
    centres = torch.tensor(slots, dtype=torch.float64, device=norms.device)
    exponent = norms.frexp().exponent.to(torch.float64).unsqueeze(-1)
    nearest = (exponent - centres).abs().argmin(-1, keepdim=True)
    scaled = _times_power(norms.unsqueeze(-1), -centres[nearest]).pow(p)
    return torch.zeros_like(exponent.expand(*norms.shape, len(slots))).scatter(-1, nearest, scaled)


def norms_from(powers: Tensor, p: float, slots: list[int]) -> Tensor:
    """The norms whose powers_of, or the sums of several, these are: [...]."""
    if math.isinf(p):
        return powers.squeeze(-1)
    centres = torch.tensor(slots, dtype=torch.float64, device=powers.device)
    parts = _times_power(powers.pow(1.0 / p), centres)
    largest = parts.amax(-1)
    divisor = torch.where((largest > 0.0) & largest.isfinite(), largest, 1.0)
    return divisor * (parts / divisor.unsqueeze(-1)).pow(p).sum(-1).pow(1.0 / p)


def _times_power(x: Tensor, exponent: Tensor) -> Tensor:
    """x * 2**exponent, in two steps: the power alone may leave float64."""
    half = (exponent / 2.0).floor()
    return x * half.exp2() * (exponent - half).exp2()
