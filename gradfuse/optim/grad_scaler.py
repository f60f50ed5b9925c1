"""torch.amp.GradScaler that leaves the check for NaN and inf to gradfuse's own optimizers.

torch's scaler reads and writes all gradients before a step, to look for NaN and inf. A step of
gradfuse.optim finds those anyway when it takes the norm.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import optimizer as torch_optimizer

from gradfuse._codes import Action
from gradfuse._records import ClipPlan
from gradfuse.clipping.report import GradReport
from gradfuse.distributed import is_dtensor
from gradfuse.optim.base import ClippedOptimizer
from gradfuse.optim.sgd import SGD
from gradfuse.optim.unwrapped import unwrapped_step

__all__ = ["GradScaler"]

_OWN_STEP = ClippedOptimizer.step


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler without its pass over the gradients of gradfuse's optimizers.

    Has the same scale as torch's, skips the same steps, and has the same state_dict. Falls back to
    torch's check where a step cannot stand in for it: after unscale_, with a hook before the step,
    with a step that someone else replaced, for other optimizers, or if this torch's scaler works in
    another way.

    Over ranks the outcome is that of the step's norm: NaN or inf on one rank skips the step on all,
    and halves the scale on all, whoever looked for them. A rank without gradients takes part.
    A step that raises counts as one with inf.

    Takes the arguments of torch.amp.GradScaler.
    """

    _stepping: Any = None  # the optimizer whose step is running and checks for itself
    _left = False  # whether torch asked for the check, and it was left to the step

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """As torch.amp.GradScaler.step."""
        if kwargs or not self._enabled or unwrapped_step(optimizer) is not _OWN_STEP:
            return super().step(optimizer, *args, **kwargs)
        leaves = not args and not _has_pre_hooks(optimizer) and _torch_is_as_known()
        return self._step_of(optimizer, leaves, *args)

    def _step_of(self, optimizer: Any, leaves: bool, *args: Any) -> Any:
        """Runs a step of gradfuse.

        Args:
            leaves: whether it checks for itself, if torch asks _check_inf_per_device for the check.
        """
        before = optimizer._reports
        self._stepping = optimizer if leaves else None
        optimizer._has_own_scaler = True
        try:
            result = super().step(optimizer, *args)
        except BaseException:
            if optimizer._is_over_ranks:
                self._record_failure(optimizer, before)
            elif self._left:
                super()._check_inf_per_device(optimizer)
            raise
        else:
            if self._left or optimizer._is_over_ranks:
                self._record(optimizer, before)
            return result
        finally:
            self._stepping, self._left, optimizer._leaves_check = None, False, False
            optimizer._has_own_scaler, optimizer._scaler_error = False, None

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[Any, Tensor]:
        if self._stepping is not optimizer or not _may_have_gradients(optimizer):
            return self._checked_by_torch(optimizer)
        self._left = optimizer._leaves_check = True
        scale = self._get_scale_async()
        assert scale is not None
        return self._put(optimizer, torch.zeros_like(scale))

    def _checked_by_torch(self, optimizer: Any) -> dict[Any, Tensor]:
        """torch's check. What it raises on one of several ranks, the step then raises on all."""
        try:
            checked: dict[Any, Tensor] = super()._check_inf_per_device(optimizer)
            return checked
        except (RuntimeError, TypeError, ValueError) as error:
            if not (getattr(optimizer, "_has_own_scaler", False) and optimizer._is_over_given):
                raise
            optimizer._scaler_error = error
            assert self._scale is not None
            return self._put(optimizer, torch.ones_like(self._scale))

    def _record(self, optimizer: Any, before: list[GradReport]) -> None:
        """Stores what the step found, without waiting for the device."""
        reports: list[GradReport] = optimizer._reports
        if not reports or reports is before:
            super()._check_inf_per_device(optimizer)
            return
        plans = [ClipPlan.of(report._plan) for report in reports]
        # Over ranks, what torch's check found on any of them; it looks at this one alone.
        bad = [] if optimizer._found is None else [optimizer._found]
        if self._left:
            # No sum of finite gradients is infinite, because it has an exponent of its own.
            bad += [~plan.sum.isfinite() for plan in plans]
        if optimizer._is_over_ranks:  # on CUDA a refusal elsewhere raises nothing here
            bad += [plan.action == Action.REFUSE for plan in plans]
        device = bad[0].device
        self._put(optimizer, torch.stack([b.to(device) for b in bad]).any().float())

    def _record_failure(self, optimizer: Any, before: list[GradReport]) -> None:
        """Stores inf for a step over ranks that raised, as all ranks do: the scale must not grow.

        torch's check may be collective, and not all ranks have got as far.
        """
        reports = optimizer._reports
        if reports and reports is not before:  # a hook raised after the step
            self._record(optimizer, before)
        elif (
            self._scale is not None
            and self._per_optimizer_states[id(optimizer)]["stage"] is not OptState.STEPPED
        ):
            self._put(optimizer, torch.ones_like(self._scale))

    def _put(self, optimizer: Any, found_inf: Tensor) -> dict[Any, Tensor]:
        found = {found_inf.device: found_inf}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
        return found


def _has_pre_hooks(optimizer: Any) -> bool:
    """Whether a step may begin with other gradients than the scaler has."""
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", True) or getattr(
        torch_optimizer, "_global_optimizer_pre_hooks", True
    )
    return bool(hooks)


def _may_have_gradients(optimizer: Any) -> bool:
    """Whether there is a gradient, here or on another rank that decides with this one."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return optimizer._is_over_ranks or any(is_dtensor(p) or p.grad is not None for p in params)


class _Probe(SGD):
    """Takes the scale, although its step is replaced."""

    _step_supports_amp_scaling = True


@functools.cache
def _torch_is_as_known() -> bool:
    """Tests what torch does not promise: that its scaler's step takes the check from a method, and
    that update() looks for the outcome where that method put it."""
    p = torch.nn.Parameter(torch.ones(1, device="cpu"))
    try:
        optimizer = _Probe([p], lr=1.0)
        # Hooks for the steps of all optimizers are not called for this one.
        optimizer.step = functools.partial(_OWN_STEP, optimizer)  # type: ignore[method-assign]
        scaler = GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros((), device="cpu"))
        outcomes = []
        for gradient in (float("inf"), 1.0):
            p.grad = torch.full_like(p, gradient)
            scaler._step_of(optimizer, leaves=True)
            scaler.update()
            outcomes.append((p.item(), p.grad.item(), scaler.get_scale()))
    except Exception:
        return False
    return outcomes == [(1.0, float("inf"), 2.0), (0.5, 1.0, 2.0)]
