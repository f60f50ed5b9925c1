"""Dropout in plain torch, by random numbers that depend on a counter and not on a state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower word of a product of two words; int64 wraps as uint64 does."""
    product = a * b
    return (product >> 32) & _LOW, product & _LOW


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox4x32-10: four random words, in int64, of a counter of four words and a key of two.

    Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3",
    section 3.3.
    """
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        first_high, first = _product(a, _MULTIPLIERS[0])
        second_high, second = _product(c, _MULTIPLIERS[1])
        a, b, c, d = second_high ^ b ^ low, second, first_high ^ d ^ high, first
        low, high = (low + _WEYL[0]) & _LOW, (high + _WEYL[1]) & _LOW
    return [a, b, c, d]


def _halves(seed: Tensor, n: int, upper: bool) -> Tensor:
    """16 random bits, in int64, of each of n elements: element i has half i % 8 of block i / 8,
    whose counter is its number and seed[1], and whose key is seed[0]."""
    blocks = torch.arange((n + 7) // 8, device=seed.device)
    low, high = seed & _LOW, (seed >> 32) & _LOW
    zeros = torch.zeros_like(blocks)
    top = blocks >> 32 if upper else (blocks >> 32) | 1 << 31
    counter = (blocks & _LOW, top, low[1] + zeros, high[1] + zeros)
    words = torch.stack(philox(counter, (low[0], high[0])), -1)
    return torch.stack([words & 0xFFFF, words >> 16], -1).reshape(-1)[:n]


def random_words(seed: Tensor, n: int) -> Tensor:
    """The 32-bit random number, in int64, of each of n elements."""
    return _halves(seed, n, upper=True) << 16 | _halves(seed, n, upper=False)


def stays(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """Whether each element of a tensor of this shape stays in a dropout."""
    n = torch.Size(shape).numel()
    if p >= 1.0:
        return torch.zeros(list(shape), dtype=torch.bool, device=seed.device)
    threshold = min(int(p * 2.0**32), _LOW)
    return (random_words(seed, n) >= threshold).reshape(list(shape))


def addend(input: Tensor, seed: Tensor | None, p: float, sample_scale: Tensor | None) -> Tensor:
    """sample_scale * dropout(input), where what is dropped is 0 whatever it holds."""
    x = input
    if seed is not None:
        scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0
        x = torch.where(stays(seed, input.shape, p), x * scale, 0.0)
    if sample_scale is not None:
        factor = sample_scale.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        x = torch.where(factor == 0, 0.0, x * factor)
    return x
