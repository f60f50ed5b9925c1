"""Parameter groups that are clipped by one norm: how a step measures, decides and updates them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradfuse import _native
from gradfuse._codes import Action, LrScale, NonFinite, Rule
from gradfuse._records import ClipPlan, ClipResult, StepGroup, StepOptions
from gradfuse.clipping.policy import (
    PlannedStep,
    Policy,
    check_real,
    plan_with_policy,
    wanted_by,
)
from gradfuse.clipping.report import GradReport
from gradfuse.distributed.locals import local_of
from gradfuse.distributed.norm import Merged, Wanted, measured_over_ranks
from gradfuse.distributed.ranks import Ranks
from gradfuse.distributed.sums import summed
from gradfuse.ops.clip import clip_grad_value_
from gradfuse.optim.lr_scales import lr_scales_of
from gradfuse.optim.shards import Shards

__all__ = ["Clip", "Part", "StepCall", "refuse", "step_apart"]

Clip: TypeAlias = "float | Policy | None"
Groups: TypeAlias = Sequence[StepGroup]


class StepCall(NamedTuple):
    """What all parts of a step have in common."""

    code: NonFinite
    nonfinite: str  # its name in reports
    scale: Tensor | None  # the loss scale that the gradients carry
    found_inf: Tensor | None
    lr_scale: LrScale
    eps_follows_clip: bool
    atan2: bool
    stochastic_rounding: bool
    materialize: bool

    def options(self, bound: float = math.inf) -> StepOptions:
        return StepOptions(
            bound,
            self.lr_scale,
            self.eps_follows_clip,
            self.atan2,
            self.stochastic_rounding,
            self.materialize,
        )


class Part:
    """The parameter groups that share a clip: all of an optimizer, but for those with their own."""

    def __init__(self, rule: Rule) -> None:
        self.stepper = _native.backend.Stepper(rule)
        self.names: list[str] = []  # of its parameters
        self.indices: Sequence[int] = []  # of its groups
        self.clip: Clip = None
        self.report: GradReport | None = None  # of the last step
        self.shards: Shards | None = None  # if a parameter is a DTensor
        self.ranks: Ranks | None = None  # who took part in the last norm, if it was over ranks
        self.found: Tensor | None = None  # whether a scaler found inf on any of them

    def step(self, groups: Groups, call: StepCall) -> Tensor | None:
        """A whole step. Returns the plan that decided on it, or None if nothing was measured."""
        clip = self.clip
        if not self.measures(call):
            self._update(groups, call, None, None, call.options())
            return None
        if isinstance(clip, Policy) or self.shards is not None:
            planned = self.plan(call)
            self.update(groups, call, planned)
            return planned.plan
        max_norm = math.inf if clip is None else clip
        result = self.stepper.step(
            groups, max_norm, call.code, call.scale, call.found_inf, call.options()
        )
        self.report = GradReport(self.names, result, max_norm, 2.0, call.nonfinite)
        return result[1]

    def rewrites(self) -> bool:
        """Whether a policy writes gradients before the step."""
        return isinstance(self.clip, Policy) and (type(self.clip).rewrite is not Policy.rewrite)

    def measures(self, call: StepCall) -> bool:
        """Whether a step of this part alone takes a norm."""
        given = self.clip is not None or call.scale is not None or call.found_inf is not None
        return given or bool(call.code)

    def measure(self, max_norm: float, call: StepCall, error: Exception | None = None) -> Merged:
        """Norm, plan and statistics of the gradients. Over ranks collective, and the same plan on
        all of them. Raises the given error, over ranks on all of them."""
        if self.shards is not None:
            return self._measure_over_ranks(self.shards, max_norm, call, error)
        if error is not None:
            raise error
        if isinstance(self.clip, Policy):
            check_real(self.clip, self.stepper.parameters())
        result = self.stepper.measure(
            max_norm, call.code, call.scale, call.found_inf, self._is_exact()
        )
        return Merged(ClipResult(*result), None, None)

    def _is_exact(self) -> bool:
        return isinstance(self.clip, Policy) and self.clip.exact

    def _measure_over_ranks(
        self, shards: Shards, max_norm: float, call: StepCall, error: Exception | None
    ) -> Merged:
        shares = shards.shares(error or self._refusal(shards))
        merged = measured_over_ranks(
            shards.op,
            shares,
            max_norm,
            2.0,
            call.code,
            True,
            self._is_exact(),
            call.scale,
            call.found_inf,
            wanted_by(self.clip) if isinstance(self.clip, Policy) else Wanted(),
        )
        self.ranks, self.found = shares.reporting(), merged.found
        stats = shares.tabled(merged.result.stats)
        return merged._replace(result=merged.result._replace(stats=stats))

    def _refusal(self, shards: Shards) -> Exception | None:
        """What an update would raise on this rank, for the others to know before they go on."""
        if shards.refusal is not None:
            return shards.refusal
        try:
            self.stepper.check()
            if isinstance(self.clip, Policy):
                check_real(self.clip, self.stepper.parameters())
        except (RuntimeError, TypeError, ValueError) as error:
            return error
        return None

    def plan(self, call: StepCall) -> PlannedStep:
        """Measures the gradients and decides."""
        clip, shards = self.clip, self.shards
        if isinstance(clip, Policy):
            return plan_with_policy(
                clip,
                lambda max_norm, error: self.measure(max_norm, call, error),
                lambda: self.stepper.parameters() if shards is None else shards.owners,
                call.scale,
                skips=True,
            )
        result = self.measure(math.inf if clip is None else clip, call).result
        return PlannedStep(result.norm, result.plan, None, result, {})

    def update(self, groups: Groups, call: StepCall, planned: PlannedStep) -> None:
        """Does what was decided."""
        clip = self.clip
        if not isinstance(clip, Policy):
            max_norm = math.inf if clip is None else clip
            self.report = GradReport(
                self.names, planned.reported, max_norm, 2.0, call.nonfinite, ranks=self.ranks
            )
            self._update(groups, call, planned.plan, None, call.options())
            return
        self.report = GradReport(
            self.names,
            planned.reported,
            clip.max_norm,
            2.0,
            call.nonfinite,
            repr(clip),
            self.ranks,
        )
        options = call.options(clip.bound)
        self._update(groups, call, planned.plan, planned.coefficients, options)
        clip.keep(planned.state)
        if call.materialize and clip.bound < math.inf:
            clip_grad_value_(self.stepper.parameters(), clip.bound)

    def _update(
        self,
        groups: Groups,
        call: StepCall,
        plan: Tensor | None,
        coefficients: Tensor | None,
        options: StepOptions,
    ) -> None:
        scales = None
        if self.needs_wholes(call):
            scales = self.lr_scales(groups, call, plan, coefficients, options)
        self.stepper.update(groups, plan, coefficients, options, scales)

    def needs_wholes(self, call: StepCall) -> bool:
        """Whether learning rates depend on norms of parameters of which others hold a part."""
        divided = self.shards is not None and self.shards.divided is not None
        return divided and call.lr_scale != LrScale.NONE

    def lr_scales(
        self,
        groups: Groups,
        call: StepCall,
        plan: Tensor | None,
        coefficients: Tensor | None,
        options: StepOptions,
    ) -> Tensor:
        """The factor of the learning rate of each parameter, from sums over its shards. Collective;
        raises on all ranks what one refuses."""
        shards = self.shards
        assert shards is not None
        ranks, owners = shards.ranks(), shards.owners
        device = local_of(owners[0]).device

        def sums() -> Tensor:
            if shards.refusal is not None:
                raise shards.refusal
            mine = self.stepper.lr_sums(groups, plan, coefficients, options).to(device)
            return mine * mine.new_tensor(ranks.counted).unsqueeze(1)

        total = summed(shards.op, ranks, (len(owners), 2), device, sums)
        return lr_scales_of(
            total,
            call.lr_scale,
            [p.numel() * (2 if p.is_complex() else 1) for p in owners],
            [bool(getattr(groups[i], "trust_clip", False)) for i in shards.groups],
        )


def refuse(parts: Sequence[Part], call: StepCall, error: Exception) -> None:
    """Raises an error that this rank has found before the norm. Takes part in the collective that
    the others begin with, if there is one, so that they raise as well."""
    first = parts[0]
    assert first.shards is not None
    first.shards.refusal = error
    if len(parts) > 1 or first.measures(call):
        first.measure(math.inf, call)
    elif first.needs_wholes(call):
        first.lr_scales((), call, None, None, call.options())
    raise error


def step_apart(parts: Sequence[Part], groups: Sequence[Groups], call: StepCall) -> Tensor:
    """A step of several parts, each with its own norm. If one leaves it out, all do.

    Returns:
        The plan of the first part.
    """
    rewrites = any(part.shards is not None and part.rewrites() for part in parts)
    if call.code == NonFinite.ERROR or rewrites:  # before a policy rewrites gradients
        for part in parts:
            part.measure(math.inf, call)
    planned = [part.plan(call) for part in parts]
    device = planned[0].plan.device
    # Over ranks on CUDA, nobody has raised for a refusal yet.
    left_out = [ClipPlan.of(p.plan).action.ge(Action.REFUSE).to(device) for p in planned]
    is_skipped = torch.stack(left_out).any()
    for p in planned:
        for plan in (p.plan, p.reported.plan):
            ClipPlan.of(plan).action.masked_fill_(is_skipped.to(plan.device), Action.SKIP)
    for part, of_part, p in zip(parts, groups, planned, strict=True):
        part.update(of_part, call, p)
    return planned[0].plan
