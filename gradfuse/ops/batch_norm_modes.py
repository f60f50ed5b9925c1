"""Modes of batch norm in training: their arguments, checked once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from gradfuse.ops.checks import is_number

__all__ = [
    "NO_MODES",
    "Modes",
    "check_ghost_size",
    "check_recomputed",
    "check_renorm",
    "checked_modes",
]

_OP = "batch_norm_act"


class Limits(NamedTuple):
    """A renorm that was checked."""

    r_max: float
    d_max: float
    begin: float = 0.0
    r_end: float = 0.0
    d_end: float = 0.0


class Modes(NamedTuple):
    """The last fields of a BatchNormCall."""

    ghost_size: int = 0
    renorm: Limits | None = None
    step: Tensor | None = None
    drift: Tensor | None = None

    def recomputed(self) -> Modes:
        """The same in a checkpoint's recomputation, which leaves the running statistics alone."""
        check_recomputed(self.renorm)
        return self._replace(drift=None)

    def arguments(self) -> dict[str, Any]:
        """As batch_norm_act takes them."""
        if self is NO_MODES:
            return {}
        return {**self._asdict(), "ghost_size": self.ghost_size or None}


NO_MODES = Modes()


def check_recomputed(renorm: object) -> None:
    """Raises RuntimeError for a renorm in a checkpoint's recomputation."""
    if renorm is not None:
        raise RuntimeError(
            f"{_OP}: renorm must not be recomputed in a backward pass, because the running "
            "statistics have changed since; got a checkpoint around it"
        )


def check_ghost_size(op: str, ghost_size: Any) -> int:
    """The number that kernels take; an error if it is no number of samples."""
    if ghost_size is None:
        return 0
    if isinstance(ghost_size, bool) or not isinstance(ghost_size, (int, torch.SymInt)):
        raise TypeError(f"{op}: ghost_size must be an int or None, got {ghost_size!r}")
    if not 1 <= ghost_size < 1 << 63:
        raise ValueError(f"{op}: ghost_size must be >= 1 and below 2^63, got {ghost_size}")
    return cast(int, ghost_size)  # torch.compile's stays symbolic


def check_renorm(op: str, renorm: Sequence[float]) -> Limits:
    """The numbers of two or five; an error if there are others, or they are out of range."""
    if type(renorm) is Limits:
        return renorm
    if not isinstance(renorm, Sequence) or not all(map(is_number, renorm)):
        raise TypeError(f"{op}: renorm must be two or five numbers, got {renorm!r}")
    if len(renorm) not in (2, 5):
        raise ValueError(f"{op}: renorm must be two or five numbers, got {len(renorm)}")
    limits = Limits(*map(float, renorm))
    r_max, d_max, begin, r_end, d_end = limits
    if not 1.0 <= r_max < math.inf:
        raise ValueError(f"{op}: r_max must be finite and >= 1, got {r_max}")
    if not 0.0 <= d_max < math.inf:
        raise ValueError(f"{op}: d_max must be finite and >= 0, got {d_max}")
    if not (0.0 <= begin <= r_end < math.inf and begin <= d_end < math.inf):
        raise ValueError(
            f"{op}: renorm's warm-up must have 0 <= begin <= r_end, d_end < inf, got {begin}, "
            f"{r_end} and {d_end}"
        )
    return limits


def checked_modes(
    input: Tensor,
    running_mean: Tensor | None,
    ghost_size: int | None,
    renorm: Sequence[float] | None,
    step: Tensor | None,
    drift: Tensor | None,
) -> Modes:
    """The modes of a call in training."""
    for name, mode in (("renorm", renorm), ("drift", drift)):
        if mode is not None and running_mean is None:
            raise ValueError(f"{_OP}: {name} must come with running statistics, got None")
    limits = None if renorm is None else check_renorm(_OP, renorm)
    for name, t in (("step", step), ("drift", drift)):
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{_OP}: {name} must be a Tensor, got {type(t).__name__}")
    return Modes(check_ghost_size(_OP, ghost_size), limits, None if limits is None else step, drift)
