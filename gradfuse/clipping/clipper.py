"""GradClipper: clipping for a training loop, with a report of every step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradfuse import _native
from gradfuse._records import ClipResult
from gradfuse.clipping.policy import (
    Policy,
    check_real,
    plan_with_policy,
    refuse_by_parameter,
    wanted_by,
)
from gradfuse.clipping.report import GradReport
from gradfuse.distributed import Group, ReplicatedOver, is_dtensor, kept
from gradfuse.distributed.norm import (
    Merged,
    measured_over_ranks,
    plan_over_ranks,
)
from gradfuse.distributed.shares import shares_of
from gradfuse.ops.checks import (
    CLIP_NONFINITE,
    check_exact,
    check_max_norm,
    check_nonfinite,
    check_norm_type,
    iterator_of,
)

__all__ = ["GradClipper"]


class GradClipper:
    """Clips the gradients of a fixed set of parameters by their global norm.

    Keeps the parameters in a C++ list, because walking a Python list takes most of the time for
    thousands of small tensors. Gradients may be set to None, replaced, or change dtype or device
    between calls.

    Args:
        parameters: iterable of Tensors, or of (name, Tensor) as from model.named_parameters(), or
            one Tensor. Unnamed ones are called "0", "1", ... Duplicates are dropped.
        max_norm: upper bound of the norm, >= 0; inf only measures. Or a gradfuse.policies.Policy.
            May be changed between steps.
        norm_type: p > 0, or inf; 2 with a policy.
        nonfinite: "propagate" | "error" | "zero", as in clip_grad_norm_.
        exact: clip by the exact norm, as in clip_grad_norm_; the parameters' own norms in a report
            are rounded as always. A policy may want it too.
        group, replicated_over: as in clip_grad_norm_. With them, or with DTensors among the
            parameters, each clip is a collective call. With group, max_norm cannot be a policy that
            looks at single parameters.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an item is neither a Tensor nor a (name, Tensor) pair.

    Source: Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural
    networks", Algorithm 1.
    """

    def __init__(
        self,
        parameters: Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        max_norm: float | Policy,
        norm_type: float = 2.0,
        nonfinite: str = "propagate",
        *,
        exact: bool = False,
        group: Group | None = None,
        replicated_over: ReplicatedOver | None = None,
    ) -> None:
        self._norm_type = check_norm_type("GradClipper", norm_type)
        check_exact("GradClipper", exact, self._norm_type)
        self._exact = bool(exact)
        self._group, self._replicated_over = group, kept(replicated_over)
        self._is_over_ranks = group is not None or replicated_over is not None
        self.max_norm = max_norm
        check_nonfinite("GradClipper", nonfinite, CLIP_NONFINITE)
        self._nonfinite = nonfinite
        self._names: list[str] = []
        self._parameters: list[Tensor] = []
        self._ids: set[int] = set()
        self._list = _native.backend.ParameterList()
        items: Iterable[Any] = [parameters] if isinstance(parameters, Tensor) else parameters
        for item in iterator_of("GradClipper", items):
            if isinstance(item, Tensor):
                self.add(item)
            elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor):
                self.add(item[1], str(item[0]))
            else:
                raise TypeError(
                    "GradClipper: parameters must be Tensors or (name, Tensor) pairs, got "
                    + type(item).__name__
                )

    @property
    def max_norm(self) -> float | Policy:
        """Upper bound of the norm, or the policy."""
        return self._max_norm

    @max_norm.setter
    def max_norm(self, value: float | Policy) -> None:
        if not isinstance(value, Policy):
            value = check_max_norm("GradClipper", "max_norm", value)
        elif self._norm_type != 2.0:
            raise ValueError(
                f"GradClipper: norm_type must be 2 with a policy, got {self._norm_type:g}"
            )
        elif self._group is not None:
            refuse_by_parameter("GradClipper", "max_norm", value)
        self._max_norm = value

    @property
    def norm_type(self) -> float:
        """Order of the norm."""
        return self._norm_type

    @property
    def exact(self) -> bool:
        """Whether the norm is the exact one, whatever the policy wants."""
        return self._exact

    @property
    def nonfinite(self) -> str:
        """What a NaN or inf gradient does."""
        return self._nonfinite

    @property
    def names(self) -> list[str]:
        """Names of the parameters, in order."""
        return list(self._names)

    def add(self, parameter: Tensor, name: str | None = None) -> None:
        """Adds a parameter, e.g. of a layer that was unfrozen, unless it is in the list already.

        Args:
            parameter: any Tensor; its .grad may be None.
            name: for the reports; its index in the list if None.

        Raises:
            TypeError: parameter is not a Tensor.
        """
        if not isinstance(parameter, Tensor):
            raise TypeError(f"GradClipper.add: expected a Tensor, got {type(parameter).__name__}")
        if id(parameter) in self._ids:
            return
        self._is_over_ranks |= is_dtensor(parameter)
        self._ids.add(id(parameter))
        # A new list each time: reports made earlier keep the names of their own step.
        self._names = [*self._names, str(len(self._names)) if name is None else name]
        self._parameters.append(parameter)
        self._list.add(parameter)

    def clip_(self) -> GradReport:
        """Clips the gradients in place, as clip_grad_norm_ does, and reports what it saw.

        Returns:
            The GradReport of this call. On CUDA nothing waits until one of its figures is read.

        Raises:
            RuntimeError: nonfinite="error" and a gradient is NaN or inf; nothing was written. Or a
                gradient is expanded, so that several elements share memory.
            TypeError: a gradient is neither dense nor sparse COO, of an integer dtype or on an
                unsupported device.
        """
        if isinstance(self._max_norm, Policy):
            report: GradReport = self._clip_by(self._max_norm)
            return report
        if self._is_over_ranks:
            of_ranks: GradReport = self._clip_over_ranks(self._max_norm)
            return of_ranks
        code = CLIP_NONFINITE[self._nonfinite]
        names = self._names
        if _native.is_traced_in_place("GradClipper.clip_"):
            grads = [p.grad for p in self._parameters if p.grad is not None]
            names = [
                name for name, p in zip(names, self._parameters, strict=True) if p.grad is not None
            ]
            result = torch.ops.gradfuse.clip_grads_(
                grads, self._max_norm, self._norm_type, code, self._exact
            )
        else:
            result = self._list.clip_(self._max_norm, self._norm_type, code, self._exact)
        return GradReport(names, result, self._max_norm, self._norm_type, self._nonfinite)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _clip_over_ranks(self, max_norm: float) -> GradReport:
        op = "GradClipper.clip_"
        _native.refuse_tracing(op)
        shares = shares_of(op, self._parameters, True, self._group, self._replicated_over)
        code = CLIP_NONFINITE[self._nonfinite]
        result = plan_over_ranks(op, shares, max_norm, self._norm_type, code, True, self._exact)
        _native.backend.apply_(op, shares.all, result.plan)
        return GradReport(
            self._names,
            result._replace(stats=shares.tabled(result.stats)),
            max_norm,
            self._norm_type,
            self._nonfinite,
            ranks=shares.reporting(),
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _clip_by(self, policy: Policy) -> GradReport:
        _native.refuse_tracing("GradClipper.clip_")
        if self._is_over_ranks:
            of_ranks: GradReport = self._clip_over_ranks_by(policy)
            return of_ranks
        check_real(policy, self._parameters)
        code = CLIP_NONFINITE[self._nonfinite]
        exact = self._exact or policy.exact

        def measure(max_norm: float, error: Exception | None) -> Merged:
            if error is not None:
                raise error
            result = self._list.measure(max_norm, self._norm_type, code, exact)
            return Merged(ClipResult(*result), None, None)

        step = plan_with_policy(policy, measure, lambda: self._parameters, None, skips=False)
        self._list.apply_(step.plan, step.coefficients)
        if policy.bound < math.inf:
            self._list.clamp_(policy.bound)
        policy.keep(step.state)
        return GradReport(
            self._names, step.reported, policy.max_norm, 2.0, self._nonfinite, repr(policy)
        )

    def _clip_over_ranks_by(self, policy: Policy) -> GradReport:
        op, code = "GradClipper.clip_", CLIP_NONFINITE[self._nonfinite]
        exact = self._exact or policy.exact
        shares = shares_of(op, self._parameters, True, self._group, self._replicated_over)
        try:
            check_real(policy, self._parameters)
        except TypeError as error:
            shares = replace(shares, refusal=error)

        def measure(max_norm: float, error: Exception | None) -> Merged:
            given = shares if error is None else replace(shares, refusal=error)
            merged = measured_over_ranks(
                op, given, max_norm, 2.0, code, True, exact, wanted=wanted_by(policy)
            )
            stats = shares.tabled(merged.result.stats)
            return merged._replace(result=merged.result._replace(stats=stats))

        step = plan_with_policy(policy, measure, lambda: self._parameters, None, skips=False)
        each = None if step.coefficients is None else step.coefficients[shares.rows]
        _native.backend.apply_(op, shares.all, step.plan, each)
        if policy.bound < math.inf:
            _native.backend.clamp_(shares.all, False, policy.bound)
        policy.keep(step.state)
        return GradReport(
            self._names,
            step.reported,
            policy.max_norm,
            2.0,
            self._nonfinite,
            repr(policy),
            shares.reporting(),
        )

    def state_dict(self) -> dict[str, Any]:
        """The state of the policy; empty without one."""
        return self._max_norm.state_dict() if isinstance(self._max_norm, Policy) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what state_dict returned."""
        if isinstance(self._max_norm, Policy):
            self._max_norm.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_list"], state["_ids"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._ids = {id(p) for p in self._parameters}
        self._list = _native.backend.ParameterList()
        for p in self._parameters:
            self._list.add(p)

    def __repr__(self) -> str:
        limit = self._max_norm
        shown = repr(limit) if isinstance(limit, Policy) else f"{limit:g}"
        return (
            f"GradClipper({len(self._names)} parameters, max_norm={shown}, "
            f"norm_type={self._norm_type:g}, nonfinite={self._nonfinite!r}"
            f"{', exact=True' if self._exact else ''})"
        )
