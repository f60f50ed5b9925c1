"""What optimizers share that torch does not have: checks of groups, and the state_dicts of others.

The usual implementations of these rules count steps in the parameter groups; gradfuse counts them
for each parameter, as torch does.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, ClassVar

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
                if name == "lr" and value.numel() == 1:
                    continue  # on a device, which is not waited for
            elif isinstance(value, Real) and 0.0 <= float(value) < math.inf:
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As gradfuse.optim.AdamW's; also takes the state_dict of the usual implementation.

        Raises:
            ValueError: a group has an option that this optimizer does not have.
        """
        for group in state_dict["param_groups"]:
            self._check({**self.defaults, **group})
        super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # as others made them, they lack options
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def _adopted(self, group: dict[str, Any], name: str) -> list[dict[str, Any]]:
        """The states of a group's parameters that have no `name`: others made them."""
        states = [self.state[p] for p in group["params"] if p in self.state]
        return [state for state in states if state and name not in state]

    def _taken(self, group: dict[str, Any]) -> float:
        """The most steps that a parameter of a group has taken. On CUDA this waits."""
        steps = [self.state[p]["step"] for p in group["params"] if "step" in self.state.get(p, ())]
        return max((float(step) for step in steps), default=0.0)
