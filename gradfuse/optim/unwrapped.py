"""The step of an optimizer without what torch wraps around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["unwrapped_step"]


def unwrapped_step(optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    """The function that runs after torch's wrappers, which call hooks and count for schedulers.

    A wrapper of anyone else is returned as it is, because it may change gradients.
    """
    bound: Any = optimizer.step
    step = getattr(bound, "__func__", bound)
    while _is_torchs(step) and hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    found: Callable[..., Any] = step
    return found


def _is_torchs(function: Any) -> bool:
    # Not __module__, which functools.wraps copies.
    name: str = getattr(function, "__globals__", {}).get("__name__", "")
    return name.startswith("torch.optim.")
