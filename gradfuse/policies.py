"""Policies: what a step multiplies its gradients by, decided from their norms.

For gradfuse.optim's optimizers (`clip=`) and gradfuse.GradClipper (`max_norm=`). A policy of your
own says in `decide` what to do with the norms of this step:

    class Halve(Policy):
        def decide(self, norm, norms, state):
            level = state.get("level", norm)
            coefficient = (level / norm).clamp(max=1.0)
            return Decision(coefficient, state={"level": 0.9 * level + 0.1 * norm})
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradfuse.ops.clip import check_nonnegative
from gradfuse.report import GradReport

__all__ = ["Decision", "Norm", "Policy", "Value"]

_KEEP, _SCALE, _ZERO = 0.0, 1.0, 2.0
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Decision:
    """What a policy wants of one step.

    Attributes:
        coefficient: [] or [n] float64 Tensor: the factor of all gradients, or of each.
        skip: [] bool Tensor: leave the step out; None for never.
        state: Tensors to be found in `state` at the next step.
    """

    coefficient: Tensor
    skip: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)


class Policy:
    """Base of all policies. State lies on the gradients' device, and nothing waits for it.

    Attributes:
        bound: largest magnitude of an element, after the coefficient; inf for none.
        state: Tensors kept between steps. A step whose norm is not finite (in float64), or that is
            skipped for a non-finite gradient, leaves them as they are.
    """

    bound: float = math.inf

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def decide(self, norm: Tensor, norms: Tensor, state: dict[str, Tensor]) -> Decision:
        """What to do with a step.

        Args:
            norm: [] float64, L2 norm of all gradients as one vector.
            norms: [n] float64, L2 norm of each parameter's gradient, 0 where there is none.
            state: what the last decision kept; empty at first.
        """
        return Decision(torch.ones_like(norm))

    def rewrite(self, parameters: Sequence[Tensor], scale: Tensor | None) -> None:
        """Changes gradients in place before they are measured; most policies do not.

        Args:
            parameters: whose gradients they are.
            scale: the loss scale that the gradients carry, or None.
        """

    def plan(self, totals: Tensor, table: Tensor, skips: bool) -> tuple[Tensor, Tensor | None]:
        """The totals of a step after the decision, and a coefficient for each parameter or None.

        Args:
            totals: [8] float64 of a plan without a bound.
            table: [n, 5] float64, a row for each parameter.
            skips: whether a step can be left out; else its gradients become 0.
        """
        norm = totals[0]
        # A plan for a non-finite norm, or for found_inf, stands: nonfinite decides then.
        decided = norm.isfinite() & (totals[3] <= _SCALE)
        state = {name: t.to(norm.device) for name, t in self.state.items()}
        decision = self.decide(norm, table[:, 0], dict(state))
        for name, new in decision.state.items():
            old = state.get(name)
            if old is not None and old.shape == new.shape:
                old.copy_(torch.where(decided, new, old))
            elif bool(decided):  # waits, where a state begins
                state[name] = new.clone()
        self.state = state
        coefficient = decision.coefficient
        if coefficient.ndim:
            clipped = (table[:, 0] * coefficient).norm()
            per_parameter = torch.where(decided, coefficient, torch.ones_like(coefficient))
            mean = clipped / norm.clamp(min=_TINY)
            factor = totals[6]
            untouched = (coefficient == 1.0).all()
        else:
            clipped, per_parameter, mean = norm * coefficient, None, coefficient
            factor = torch.where(decided, totals[6] * coefficient, totals[6])
            untouched = coefficient == 1.0
        action = torch.where(untouched, _KEEP, _SCALE).to(totals)
        if decision.skip is not None:
            out = GradReport.SKIP if skips else _ZERO
            action = torch.where(decision.skip, out, action)
        planned = torch.stack([norm, mean, clipped, action])
        out_totals = totals.clone()
        out_totals[:4] = torch.where(decided, planned, totals[:4])
        out_totals[6] = factor
        return out_totals, per_parameter

    def state_dict(self) -> dict[str, Any]:
        """Copies of the state's tensors."""
        return {name: t.clone() for name, t in self.state.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what state_dict returned."""
        self.state = {name: t.clone() for name, t in state_dict.items()}


class Norm(Policy):
    """Global norm clipping, as a number given for `clip` does.

    Source: Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural
    networks", Algorithm 1.
    """

    def __init__(self, max_norm: float) -> None:
        super().__init__()
        self.max_norm = check_nonnegative("Norm", "max_norm", max_norm)

    def decide(self, norm: Tensor, norms: Tensor, state: dict[str, Tensor]) -> Decision:
        scaled = self.max_norm / (norm + 1e-6)
        return Decision(torch.where(norm <= self.max_norm, torch.ones_like(norm), scaled))


class Value(Policy):
    """Clamps each element to [-clip_value, clip_value], as torch.nn.utils.clip_grad_value_."""

    def __init__(self, clip_value: float) -> None:
        super().__init__()
        self.bound = check_nonnegative("Value", "clip_value", clip_value)
