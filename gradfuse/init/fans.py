"""Fans: how many inputs an output sums, and how many outputs an input reaches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Fans", "conv_fans", "matrix_fans"]


class Fans(NamedTuple):
    """Terms in one output's sum, and outputs that one input is a term of."""

    fan_in: float
    fan_out: float

    def of(self, mode: str) -> float:
        """The fan of a mode: "fan_in", "fan_out" or "fan_avg"."""
        if mode == "fan_avg":
            return (self.fan_in + self.fan_out) / 2
        return self.fan_in if mode == "fan_in" else self.fan_out


def matrix_fans(inputs: int, outputs: int) -> Fans:
    """Fans of a product with a matrix, whichever way the matrix is stored."""
    return Fans(max(1, inputs), max(1, outputs))


def conv_fans(
    shape: Sequence[int],  # [out, in / groups, *kernel], transposed: [in, out / groups, *kernel]
    groups: int = 1,
    transposed: bool = False,
    stride: Sequence[int] = (),
) -> Fans:
    """Fans of a convolution.

    A group's outputs see only its own inputs; torch.nn.init counts the outputs of all groups. A
    transposed convolution has the same connections the other way round, which torch.nn.init takes
    for a plain one. A stride drops all but 1 / stride of the sums, so that the side at which it
    skips has fewer.
    """
    first, second, kernel = shape[0] // groups, shape[1], math.prod(shape[2:])
    skipped = math.prod(stride) if stride else 1
    whole, strided = second * kernel, max(1.0, first * kernel / skipped)
    return Fans(strided, whole) if transposed else Fans(whole, strided)
