"""What the clips ask of their arguments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

__all__ = [
    "NONFINITE",
    "as_sequence",
    "check_nonfinite",
    "check_nonnegative",
    "check_norm_type",
    "grads_of",
    "iterator_of",
]

T = TypeVar("T")

NONFINITE = {"propagate": 0, "error": 1, "zero": 2}


def check_nonnegative(op: str, name: str, value: float) -> float:
    """value as a float; ValueError if it is negative or NaN."""
    value = float(value)
    if not value >= 0.0:
        raise ValueError(f"{op}: {name} must be >= 0, got {value}")
    return value


def check_norm_type(op: str, norm_type: float) -> float:
    """norm_type as a float; ValueError unless it is positive or inf."""
    norm_type = float(norm_type)
    if not norm_type > 0.0:
        raise ValueError(f"{op}: norm_type must be > 0 or inf, got {norm_type}")
    return norm_type


def check_nonfinite(op: str, nonfinite: str) -> int:
    """The policy's code; ValueError if there is no such policy."""
    if nonfinite not in NONFINITE:
        raise ValueError(
            f"{op}: nonfinite must be 'propagate', 'error' or 'zero', got {nonfinite!r}"
        )
    return NONFINITE[nonfinite]


def iterator_of(op: str, items: Iterable[T]) -> Iterator[T]:
    """iter(items); TypeError if there is none. What the iterator raises itself goes through."""
    try:
        return iter(items)
    except TypeError:
        got = type(items).__name__
        raise TypeError(f"{op}: expected a tensor or an iterable of tensors, got {got}") from None


def as_sequence(op: str, parameters: Tensor | Iterable[Tensor]) -> Sequence[Tensor]:
    """The parameters as what can be walked twice."""
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, (list, tuple)):
        return parameters
    return list(iterator_of(op, parameters))


def grads_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
