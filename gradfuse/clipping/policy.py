"""What a policy is, and a step that one decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradfuse._codes import Action
from gradfuse._records import ClipPlan, ClipResult, TensorStats
from gradfuse.distributed.norm import Merged, Wanted

__all__ = [
    "Decision",
    "PlannedStep",
    "Policy",
    "check_real",
    "plan_with_policy",
    "refuse_by_parameter",
    "to_at_most",
    "wanted_by",
]

_TINY = torch.finfo(torch.float64).tiny


def to_at_most(limit: Tensor | float, norm: Tensor) -> Tensor:
    """The coefficient that brings a norm to at most limit: 1, or limit / (norm + 1e-6)."""
    return torch.where(norm <= limit, torch.ones_like(norm), limit / (norm + 1e-6))


@dataclass(frozen=True)
class Decision:
    """What a policy wants of one step.

    Attributes:
        coefficient: [] or [n] float64 Tensor: the factor of all gradients, or of each.
        skip: [] bool Tensor: leave the step out; None for never. GradClipper, which has no step to
            leave out, sets the gradients to 0.
        state: Tensors to be found in `state` at the next step, under the names and in the shapes
            that `begin` gave them.
    """

    coefficient: Tensor
    skip: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)


class Policy:
    """Base of all policies. Its state lies on the gradients' device, and is never waited for.

    Attributes:
        max_norm: upper bound of the global norm where `decide` is not overridden.
        bound: largest magnitude of an element, after the coefficient; inf for none.
        exact: whether the global norm is the correctly rounded square root of the exact sum of
            squares.
        state: Tensors kept between steps. A step whose norm is 0, NaN, inf or beyond float64, or
            for which a loss scaler found inf, leaves them as they are.
        by_parameter: whether a decision looks at single parameters. A policy that decides by the
            global norm alone sets False: over ranks nothing else is then exchanged for it, and
            `norms` are those of this rank's shards.
    """

    max_norm: float = math.inf
    bound: float = math.inf
    exact: bool = False
    by_parameter: bool = True

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def begin(self, norms: Tensor) -> dict[str, Tensor]:
        """The state before the first step.

        Args:
            norms: [n] float64, for its length and device. When parameters are added later, state of
                shape [n] grows at its end, by the values that this gives there.

        Returns:
            Tensors by name.
        """
        return {}

    def decide(self, norm: Tensor, norms: Tensor, state: dict[str, Tensor]) -> Decision:
        """What to do with a step.

        Args:
            norm: [] float64, L2 norm of all gradients as one vector.
            norms: [n] float64, L2 norm of each parameter's gradient, 0 where there is none.
            state: of the last decision, at first of `begin`.

        Returns:
            The Decision. Its tensors are computed without reading a value on the host.
        """
        return Decision(torch.ones_like(norm))

    def rewrite(self, parameters: Sequence[Tensor], scale: Tensor | None) -> None:
        """Changes gradients in place after they were measured. Most policies do not override it.

        Args:
            parameters: whose gradients they are.
            scale: the loss scale that the gradients carry, or None.
        """

    def plan(
        self, measured: Tensor, norms: Tensor, skips: bool
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Decides on a step.

        Args:
            measured: [8] float64 Tensor, a ClipPlan that leaves finite gradients alone. It is
                overwritten.
            norms: [n] float64, L2 norm of each parameter's gradient, 0 where there is none.
            skips: whether a step can be left out; else its gradients become 0.

        Returns:
            The ClipPlan after the decision, a coefficient for each parameter or None, and the state
            to `keep` when the step is done.
        """
        before = ClipPlan.of(measured)
        # A plan for a non-finite norm, or for found_inf, stands: nonfinite decides then. A step
        # without gradients, or with zeros alone, has no norm to learn from.
        decided = before.norm.isfinite() & (before.norm > 0.0) & (before.action <= Action.SCALE)
        state = self._state_of(norms)
        decision = self.decide(before.norm, norms, dict(state))
        self._check(decision, state, len(norms))
        left_out = float(Action.SKIP if skips else Action.ZERO)
        wanted, each = _wanted(decision, before, norms, left_out)
        # Finite gradients of a norm beyond float64 are beyond any threshold.
        is_beyond = before.norm.isinf() & (before.action == Action.KEEP)
        before.action.masked_fill_(is_beyond, left_out)
        plan = torch.where(decided, ClipPlan.pack(wanted), measured)
        kept = {
            name: torch.where(decided, decision.state.get(name, old).to(old), old)
            for name, old in state.items()
        }
        return plan, each, kept

    def keep(self, state: dict[str, Tensor]) -> None:
        """Stores the state that `plan` returned; in place, for CUDA graphs."""
        old = self.state
        self.state = {
            name: old[name].copy_(new)
            if name in old and (old[name].shape, old[name].device) == (new.shape, new.device)
            else new
            for name, new in state.items()
        }

    def _state_of(self, norms: Tensor) -> dict[str, Tensor]:
        """The state on the norms' device and in their length."""
        return {
            name: _fitted(self.state[name].to(norms.device), fresh) if name in self.state else fresh
            for name, fresh in self.begin(norms).items()
        }

    def _check(self, decision: Decision, state: dict[str, Tensor], parameters: int) -> None:
        op, shape = f"{type(self).__name__}.decide", tuple(decision.coefficient.shape)
        if shape not in ((), (parameters,)):
            raise ValueError(
                f"{op}: expected a coefficient of shape () or ({parameters},), got {shape}"
            )
        if shape and not self.by_parameter:
            raise ValueError(
                f"{op}: expected a coefficient of shape (), because by_parameter is False, got "
                f"{shape}"
            )
        for name, new in decision.state.items():
            if name not in state:
                raise ValueError(f"{op}: expected state that begin names, got {name!r}")
            if new.shape != state[name].shape:
                raise ValueError(
                    f"{op}: expected state {name!r} of the shape that begin gave it, "
                    f"{tuple(state[name].shape)}, got {tuple(new.shape)}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Copies of the state's tensors."""
        return {name: t.clone() for name, t in self.state.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what state_dict returned."""
        self.state = {name: t.clone() for name, t in state_dict.items()}

    def __repr__(self) -> str:
        given = (
            f"{k}={v!r}"
            for k, v in vars(self).items()
            if k not in ("state", "bound") and (k != "exact" or v)
        )
        return f"{type(self).__name__}({', '.join(given)})"


def _wanted(
    decision: Decision, before: ClipPlan[Tensor], norms: Tensor, left_out: float
) -> tuple[ClipPlan[Tensor], Tensor | None]:
    """`before` with the decision in it, and a coefficient for each parameter or None."""
    coefficient = decision.coefficient.to(before.norm)
    factor, each = before.factor, None
    if coefficient.ndim:
        clipped_norm = (norms * coefficient).norm()
        mean = clipped_norm / before.norm.clamp(min=_TINY)
        each = coefficient
    else:
        clipped_norm, mean = before.norm * coefficient, coefficient
        factor = factor * coefficient
    is_kept = (coefficient == 1.0).all()
    action = torch.where(is_kept, float(Action.KEEP), float(Action.SCALE)).to(before.action)
    if decision.skip is not None:
        action = torch.where(decision.skip, left_out, action)
    plan = before._replace(
        coefficient=mean, clipped_norm=clipped_norm, action=action, factor=factor
    )
    return plan, each


class PlannedStep(NamedTuple):
    """What a step with a policy does."""

    norm: Tensor  # as clip_grad_norm_ returns it
    plan: Tensor  # the ClipPlan for the kernels
    coefficients: Tensor | None  # [n]
    reported: ClipResult  # for a GradReport
    state: dict[str, Tensor]  # for Policy.keep, once the step is done: one that raises keeps none


def wanted_by(policy: Policy) -> Wanted:
    """What a policy has to know of all ranks, beside their norm."""
    decides = type(policy).decide is not Policy.decide
    return Wanted(decides and policy.by_parameter, policy.bound)


def refuse_by_parameter(op: str, name: str, policy: Policy) -> None:
    """Raises ValueError where a policy looks at whole parameters, which `group` does not tell."""
    cls = type(policy)
    overrides = cls.decide is not Policy.decide or cls.rewrite is not Policy.rewrite
    if overrides and policy.by_parameter:
        raise ValueError(
            f"{op}: expected {name} to decide by the global norm with group=, which does not say "
            f"what on two ranks is one parameter (DTensors do), got {policy!r}"
        )


def plan_with_policy(
    policy: Policy,
    measure: Callable[[float, Exception | None], Merged],
    parameters: Callable[[], Sequence[Tensor]],
    scale: Tensor | None,
    skips: bool,
) -> PlannedStep:
    """Measures, decides, and rewrites gradients if the policy does.

    Args:
        measure: what came of measuring for a plan with this max_norm; over ranks with what
            wanted_by(policy) says, which then holds for all of them. Raises an error that it is
            given, over ranks on all of them.
        parameters: those that were measured.
        scale: the loss scale that the gradients carry, or None.
        skips: whether a step can be left out.

    Raises:
        ValueError: the policy decided what cannot be done.
    """
    decides = type(policy).decide is not Policy.decide
    merged = measure(math.inf if decides else policy.max_norm, None)
    norm, plan, stats = merged.result
    seen, beyond = TensorStats.of(stats), merged.beyond
    coefficients, state = None, policy.state
    if decides:
        norms = seen.norm if merged.norms is None else merged.norms
        plan, coefficients, state = policy.plan(plan, norms, skips)
    reported = plan
    if policy.bound < math.inf:
        beyond = (seen.largest > policy.bound).any() if beyond is None else beyond
        reported = _clamped(ClipPlan.of(plan), beyond)
    if type(policy).rewrite is not Policy.rewrite:
        error = None
        try:
            policy.rewrite(parameters(), scale)
        except Exception as raised:  # other ranks wait in the next norm
            error = raised
        after = ClipPlan.of(measure(math.inf, error).result.plan).norm
        reported = _rewritten(ClipPlan.of(reported), ClipPlan.of(plan), after)
    return PlannedStep(norm, plan, coefficients, ClipResult(norm, reported, stats), state)


def check_real(policy: Policy, parameters: Sequence[Tensor]) -> None:
    """Raises TypeError if the policy clamps elements and a gradient is complex."""
    if policy.bound == math.inf:
        return
    for i, p in enumerate(parameters):
        if p.grad is not None and p.grad.is_complex():
            raise TypeError(
                f"{type(policy).__name__}: expected real gradients, which have an order, got "
                f"{p.grad.dtype} for parameter {i}"
            )


def _clamped(plan: ClipPlan[Tensor], clamps: Tensor) -> Tensor:
    """The plan to report where elements are clamped: nobody measures the norm after that."""
    clamps = clamps & (plan.action <= Action.SCALE)
    return ClipPlan.pack(
        plan._replace(
            clipped_norm=torch.where(clamps, math.nan, plan.clipped_norm),
            action=torch.where(clamps, float(Action.SCALE), plan.action),
        )
    )


def _rewritten(reported: ClipPlan[Tensor], plan: ClipPlan[Tensor], after: Tensor) -> Tensor:
    """The plan to report where gradients were rewritten, and have this norm now."""
    changed = (after != plan.norm) & (plan.action <= Action.SCALE)
    return ClipPlan.pack(
        reported._replace(
            clipped_norm=after * plan.coefficient,
            action=torch.where(changed, float(Action.SCALE), reported.action),
        )
    )


def _fitted(old: Tensor, fresh: Tensor) -> Tensor:
    """old in the length of fresh: cut at its end, or extended by the end of fresh."""
    if old.shape == fresh.shape:
        return old
    if old.ndim == fresh.ndim == 1:
        kept = min(len(old), len(fresh))
        fresh = fresh.clone()
        fresh[:kept] = old[:kept]
    return fresh
