"""Ratios of times within the rounds of a measurement: their median, and how well it is known."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from functools import cache

__all__ = ["is_known", "median_interval", "median_ratio", "quantile", "ratios"]


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """The ratios within each round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(ratios(above, below))


def quantile(values: Iterable[float], q: float) -> float:
    """The q-quantile, with linear interpolation between neighbours."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


@cache
def rank(n: int) -> int:
    """The largest k such that the k-th smallest and the k-th largest of n values hold the median of
    their distribution, whatever it is, with 95 % confidence; 0 if not even the extremes do (n < 6).

    The number of values below the median is binomial with p = 1/2, so the median lies outside with
    a probability of 2 P(number < k). Source: David, Nagaraja 2003, "Order Statistics", section 7.1.
    """
    outside = choices = 1  # of 2**n: whole numbers, since float64 ends at 2**1023
    k = 0
    while 40 * outside <= 2**n:
        choices = choices * (n - k) // (k + 1)  # n over k + 1
        outside += choices
        k += 1
    return k


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the median, by order statistics. The extremes, which hold the
    median less often, where there are fewer than 6 values."""
    ordered = sorted(values)
    k = max(1, rank(len(ordered)))
    return ordered[k - 1], ordered[-k]


def is_known(values: Sequence[float], spread: float) -> bool:
    """Whether the 95 % interval of the median reaches no further than this share from it."""
    if rank(len(values)) == 0:
        return False
    median = statistics.median(values)
    low, high = median_interval(values)
    return max(high - median, median - low) <= spread * median
