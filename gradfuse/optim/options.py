"""What optimizers share that torch does not have: checks of groups, and the state_dicts of others.

The usual implementations of these rules count steps in the parameter groups; gradfuse counts them
for each parameter, as torch does.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradfuse.optim.base import ClippedOptimizer

__all__ = ["OptionsOfGroups"]


class OptionsOfGroups(ClippedOptimizer):
    """An optimizer whose groups are checked here, because torch has none of its kind."""

    # Options of the usual implementations, and the only value that this one has.
    _fixed: ClassVar[dict[str, Any]] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check(self, group: dict[str, Any]) -> None:
        """Raises ValueError if an option of a group is out of range."""
        op = type(self).__name__
        for name in ("lr", "eps", "weight_decay"):
            value = group.get(name, 0.0)
            if isinstance(value, Tensor):
                # On a device it is not waited for.
                if name == "lr" and value.numel() == 1 and value.device.type != "cpu":
                    continue
                value = float(value) if name == "lr" and value.numel() == 1 else value
            if isinstance(value, Real) and 0.0 <= float(value) < math.inf:
                continue
            raise ValueError(f"{op}: {name} must be a finite number >= 0, got {value!r}")
        betas = group["betas"]
        if (
            not isinstance(betas, (tuple, list))
            or len(betas) != 2
            or not all(isinstance(beta, Real) and 0.0 <= float(beta) < 1.0 for beta in betas)
        ):
            raise ValueError(f"{op}: betas must be two numbers in [0, 1), got {betas!r}")
        for name, only in self._fixed.items():
            if group.get(name, only) != only:
                raise ValueError(f"{op}: {name} must be {only}, got {group[name]!r}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # as others made them, they lack options
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def _load_own(self, state_dict: dict[str, Any], old_groups: list[dict[str, Any]]) -> None:
        """As ClippedOptimizer's; refuses a group that has what this optimizer cannot do."""
        super()._load_own(state_dict, old_groups)
        for group in self.param_groups:
            self._check(group)

    def _taken(self, group: dict[str, Any]) -> float:
        """The most steps that a parameter of a group has taken. On CUDA this waits."""
        return max((float(s["step"]) for s in self._states(group) if "step" in s), default=0.0)

    def _states(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        return [self.state[p] for p in group["params"] if self.state.get(p)]

    def _advance(self, group: dict[str, Any], count: float) -> bool:
        """Brings the states of a loaded group to the steps that another implementation counted.

        It may have kept ours as it was while it stepped. Returns whether it has stepped.
        """
        more = count - self._taken(group)
        if more <= 0.0:
            return False
        for p in group["params"]:
            if state := self.state.get(p):
                taken = float(state.get("step", 0.0)) + more
                state["step"] = torch.tensor(taken, dtype=torch.float32, device=p.device)
        return True
