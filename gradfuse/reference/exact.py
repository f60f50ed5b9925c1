"""Exact sums of squares and their correctly rounded roots, in Python's integers.

The limbs are those of csrc/math/limbs.h: what the compiled module adds up in them, an int holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["NARROW", "WIDE", "ExactSum", "LimbForm", "exact_sum", "form_of", "sum_of_words"]

_LIMB_BITS = 40
_SMALLEST = 1074 + 53  # 2**-_SMALLEST divides every float64 that frexp has split


class LimbForm(NamedTuple):
    """Limb i counts 2**(lowest + 40 i). Words: the limbs, then the counts of inf and of NaN."""

    limbs: int
    lowest: int

    @property
    def words(self) -> int:
        return self.limbs + 2


NARROW = LimbForm(16, -320)  # float32 and narrower
WIDE = LimbForm(107, -2160)  # float64


def form_of(words: Tensor) -> LimbForm:
    """The form of an int64 [words]."""
    return NARROW if words.numel() == NARROW.words else WIDE


class ExactSum(NamedTuple):
    """A sum of squares: total * 2**WIDE.lowest, and how many numbers are not finite."""

    total: int
    infs: int
    nans: int

    def words(self, form: LimbForm) -> Tensor:
        """int64 [words], on the CPU. Equal sums have equal words."""
        rest = self.total >> (form.lowest - WIDE.lowest)
        limbs = []
        for _ in range(form.limbs - 1):
            limbs.append(rest & ((1 << _LIMB_BITS) - 1))
            rest >>= _LIMB_BITS
        words = [*limbs, rest, self.infs, self.nans]
        return torch.tensor(words, dtype=torch.int64, device="cpu")

    def root(self, bits: int = 53, least: int = -1074) -> tuple[float, float]:
        """(s, v) such that the root is s * v, s a power of two: rounded once, to nearest even, to
        `bits` bits, or to a multiple of 2**least where that is coarser."""
        if self.nans or self.infs:
            return 1.0, math.nan if self.nans else math.inf
        if not self.total:
            return 1.0, 0.0
        high = (self.total.bit_length() - 1) // 2 + WIDE.lowest // 2  # exponent of the first bit
        unit = max(high - bits + 1, least)
        # The sum in units of (2**unit / 2)**2: the root has one bit more than the result.
        shift = 2 * (unit - 1) - WIDE.lowest
        scaled = self.total >> shift if shift > 0 else self.total << -shift
        root = math.isqrt(scaled)
        is_more = root * root != scaled or (shift > 0 and scaled << shift != self.total)
        whole = root >> 1
        if root & 1 and (is_more or whole & 1):
            whole += 1
        power = min(max(high, -1022), 1023)
        return math.ldexp(1.0, power), math.ldexp(float(whole), unit - power)


def exact_sum(tensors: Iterable[Tensor]) -> ExactSum:
    """The sum of the squared magnitudes of all elements."""
    total = infs = nans = 0
    for t in tensors:
        x = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
        x = x.detach().double().flatten().cpu()
        infs += int(x.isinf().sum())
        nans += int(x.isnan().sum())
        mantissas, exponents = torch.frexp(x[x.isfinite()])
        whole = (mantissas * 2.0**53).long()
        for m, e in zip(whole.tolist(), exponents.tolist(), strict=True):
            total += m * m << 2 * (e - 53 + _SMALLEST)
    return ExactSum(total >> (2 * _SMALLEST + WIDE.lowest), infs, nans)


def sum_of_words(words: Tensor) -> ExactSum:
    """The sum that int64 [words] of either form hold, carried or not."""
    form = form_of(words)
    *limbs, infs, nans = words.tolist()
    total = sum(limb << (_LIMB_BITS * i) for i, limb in enumerate(limbs))
    return ExactSum(total << (form.lowest - WIDE.lowest), infs, nans)
