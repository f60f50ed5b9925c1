"""Checks of arguments that the ops, the policies and the optimizers share."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradfuse._codes import NonFinite

__all__ = [
    "CLIP_NONFINITE",
    "STEP_NONFINITE",
    "as_sequence",
    "check_exact",
    "check_max_norm",
    "check_nonfinite",
    "check_nonnegative",
    "check_norm_type",
    "check_whole",
    "grads_of",
    "is_batched",
    "is_number",
    "is_transformed",
    "iterator_of",
]

T = TypeVar("T")

# What `nonfinite` may be, of a clip and of an optimizer's step.
CLIP_NONFINITE = {
    "propagate": NonFinite.PROPAGATE,
    "error": NonFinite.ERROR,
    "zero": NonFinite.ZERO,
}
STEP_NONFINITE = {
    "skip": NonFinite.SKIP,
    "error": NonFinite.ERROR,
    "propagate": NonFinite.PROPAGATE,
}


def check_nonnegative(op: str, name: str, value: float) -> float:
    """value as a float; ValueError if it is negative or NaN."""
    value = float(value)
    if not value >= 0.0:
        raise ValueError(f"{op}: {name} must be >= 0, got {value}")
    return value


def check_max_norm(op: str, name: str, value: float, off: str = "inf") -> float:
    """value as a float; ValueError if it is negative or NaN.

    Warns of 0, by which some trainers mean no clipping. `off` is what means that here.
    """
    value = check_nonnegative(op, name, value)
    if value == 0.0 and not torch.compiler.is_compiling():
        warnings.warn(
            f"{op}: {name}=0 sets all gradients to 0; for no clipping pass {off}", stacklevel=3
        )
    return value


def is_number(value: Any) -> TypeGuard[float]:
    """Whether value is a real number of Python or numpy; a bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_whole(op: str, name: str, value: Any, least: int) -> int:
    """value as an int; ValueError unless it is a whole number >= least."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{op}: {name} must be a whole number >= {least}, got {value!r}")
    return int(value)


def check_norm_type(op: str, norm_type: float) -> float:
    """norm_type as a float; ValueError unless it is positive or inf."""
    norm_type = float(norm_type)
    if not norm_type > 0.0:
        raise ValueError(f"{op}: norm_type must be > 0 or inf, got {norm_type}")
    return norm_type


def check_exact(op: str, exact: bool, norm_type: float) -> None:
    """ValueError if an exact norm is wanted that is not L2."""
    if exact and norm_type != 2.0:
        raise ValueError(f"{op}: norm_type must be 2 with exact=True, got {norm_type:g}")


def check_nonfinite(op: str, nonfinite: str, known: Mapping[str, NonFinite]) -> NonFinite:
    """known[nonfinite]; ValueError if it is not among them."""
    if nonfinite not in known:
        *names, last = map(repr, known)
        raise ValueError(f"{op}: nonfinite must be {', '.join(names)} or {last}, got {nonfinite!r}")
    return known[nonfinite]


def iterator_of(op: str, items: Iterable[T]) -> Iterator[T]:
    """iter(items); TypeError if there is none. What the iterator raises itself goes through."""
    try:
        return iter(items)
    except TypeError:
        got = type(items).__name__
        raise TypeError(f"{op}: expected a tensor or an iterable of tensors, got {got}") from None


def as_sequence(op: str, parameters: Tensor | Iterable[Tensor]) -> Sequence[Tensor]:
    """The parameters as a sequence: an iterator could be walked only once."""
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, (list, tuple)):
        return parameters
    return list(iterator_of(op, parameters))


def grads_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def is_transformed() -> bool:
    """Whether torch.func or forward-mode AD must see through the call."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


def is_batched(t: Tensor) -> bool:
    """Whether vmap holds the tensor, as for torch.autograd.grad's is_grads_batched."""
    functorch = torch._C._functorch
    result: bool = functorch.is_functorch_wrapped_tensor(t) or functorch.is_legacy_batchedtensor(t)
    return result
