"""What gradfuse's optimizers share: a step that measures, decides and updates."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from gradfuse import _native
from gradfuse._codes import STATE_NAMES, Action, Rule, Slot
from gradfuse._records import AdamWGroup, ClipPlan, SGDGroup, StepOptions
from gradfuse.clipping.policy import Policy, plan_with_policy
from gradfuse.clipping.report import GradReport
from gradfuse.ops.checks import STEP_NONFINITE, check_max_norm, check_nonfinite
from gradfuse.ops.clip import clip_grad_value_

__all__ = ["Clip", "ClippedOptimizer", "as_number", "check_torchs_options", "parameter_names"]

Clip: TypeAlias = "float | Policy | None"

_OWN = "gradfuse"  # key in a state_dict's first group of what torch's optimizers do not have
_SETTINGS = ("_nonfinite", "_materialize", "_master", "_stochastic", "_update_clip", "_clip")


class ClippedOptimizer(torch.optim.Optimizer):
    """What the optimizers share: a step that measures, decides and updates."""

    _step_supports_amp_scaling = True  # GradScaler hands its scale over instead of unscaling
    _leaves_check = False  # our GradScaler sets it during a step, which then skips for NaN and inf
    _rule: ClassVar[Rule]

    def _configure(
        self, clip: Clip, nonfinite: str, materialize: bool, master: bool, stochastic: bool
    ) -> None:
        op = type(self).__name__
        check_nonfinite(op, nonfinite, STEP_NONFINITE)
        if master and stochastic:
            raise ValueError(
                f"{op}: expected master_weights or stochastic_rounding, got both: with master "
                "weights nothing is lost that rounding at random could save"
            )
        if clip is not None and _is_made_by_zero():
            raise RuntimeError(
                f"{op}: expected clip=None in a ZeroRedundancyOptimizer, got {clip!r}: each rank "
                "would clip by the norm of its own parameters; call clip_grad_norm_ before step()"
            )
        self._nonfinite = nonfinite
        self._materialize = materialize
        self._master = master
        self._stochastic = stochastic
        self._update_clip = False
        self.clip = clip
        self._reset()

    def _reset(self) -> None:
        """Sets what lives between steps but is not part of the state."""
        self._report: GradReport | None = None
        self._skipped = 0  # steps skipped so far, except those in _skipped_on
        self._skipped_on: Tensor | None = None  # counted on the device, without waiting for it
        self._parameter_names: list[str] = []
        self._stepper = _native.backend.Stepper(self._rule)

    @property
    def clip(self) -> Clip:
        """What bounds the gradients: their global norm, a policy, or None. May be changed.

        0 sets all gradients to 0, with a warning.
        """
        return self._clip

    @clip.setter
    def clip(self, value: Clip) -> None:
        if value is not None and not isinstance(value, Policy):
            value = check_max_norm(type(self).__name__, "clip", value, "None")
        self._clip = value

    @property
    def nonfinite(self) -> str:
        """What a NaN or inf gradient does."""
        return self._nonfinite

    @property
    def report(self) -> GradReport | None:
        """What the last step saw; None before it, and where steps measure nothing."""
        return self._report

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing: a gradient was NaN or inf, or a policy wanted it.

        On CUDA, reading this waits for the device.
        """
        return self._skipped + (0 if self._skipped_on is None else int(self._skipped_on))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer.add_param_group.

        Raises:
            ValueError: the group wants an option that a fused step does not have.
        """
        check_torchs_options(
            type(self).__name__,
            *(param_group.get(name) for name in ("fused", "foreach", "differentiable")),
        )
        super().add_param_group(param_group)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}clip: {self._clip!r}\nnonfinite: {self._nonfinite}\n)"

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Unscales, clips, checks and updates.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: nonfinite="error" and a gradient is NaN or inf; nothing was written.
            ValueError: a gradient has another shape or dtype than its parameter.
            TypeError: a gradient or parameter is sparse, an integer or on an unsupported device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _step(self) -> None:
        self._refresh()
        scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):  # torch's 0 where there are no gradients
            found_inf = None
        code = STEP_NONFINITE["skip" if self._leaves_check else self._nonfinite]
        groups = [self._group(group, as_number(group["lr"])) for group in self.param_groups]
        clip = self._clip
        if isinstance(clip, Policy):
            self._step_with_policy(clip, groups, code, scale, found_inf)
        elif clip is not None or code or scale is not None or found_inf is not None:
            max_norm = math.inf if clip is None else clip
            result = self._stepper.step(
                groups, max_norm, code, scale, found_inf, self._options(math.inf)
            )
            self._report = self._report_of(result, max_norm, None)
            self._count(result[1])
        else:
            self._stepper.update(groups, None, None, self._options(math.inf))

    def _step_with_policy(
        self,
        policy: Policy,
        groups: Sequence[AdamWGroup] | Sequence[SGDGroup],
        code: int,
        scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        step = plan_with_policy(
            policy,
            lambda max_norm: self._stepper.measure(max_norm, code, scale, found_inf),
            self._stepper.parameters,
            scale,
            skips=True,
        )
        self._report = self._report_of(step.reported, policy.max_norm, repr(policy))
        self._stepper.update(groups, step.plan, step.coefficients, self._options(policy.bound))
        policy.keep(step.state)
        if self._materialize and policy.bound < math.inf:
            clip_grad_value_(self._stepper.parameters(), policy.bound)
        self._count(step.plan)

    def _options(self, bound: float) -> StepOptions:
        return StepOptions(bound, self._update_clip, self._stochastic, self._materialize)

    def _report_of(
        self, result: tuple[Tensor, Tensor, Tensor], max_norm: float, policy: str | None
    ) -> GradReport:
        return GradReport(self._parameter_names, result, max_norm, 2.0, self._nonfinite, policy)

    def _count(self, plan: Tensor) -> None:
        """Counts a step that was left out; on a device without waiting for it."""
        if self._skipped_on is not None:
            self._skipped_on += ClipPlan.of(plan).action.eq(Action.SKIP).to(self._skipped_on)
        elif self._report is not None:
            self._skipped += self._report.skipped

    def _group(self, group: dict[str, Any], lr: float | Tensor) -> Any:
        """A parameter group as the native update takes it."""
        raise NotImplementedError

    def _needed(self, group: dict[str, Any]) -> Slot:
        """The state that a parameter of the group needs."""
        raise NotImplementedError

    def _refresh(self) -> None:
        """Binds the parameters and their state anew, if param_groups or state have changed."""
        needs = [self._needed(group) for group in self.param_groups]
        if self._stepper.is_current(self.param_groups, self.state, needs):
            return
        for group, need in zip(self.param_groups, needs, strict=True):
            for p in group["params"]:
                if p.grad is not None and need:
                    self._complete(p, self.state[p], need)
                if self._skipped_on is None and p.device.type != "cpu":
                    self._skipped_on = torch.zeros((), dtype=torch.int64, device=p.device)
        self._parameter_names = parameter_names(self.param_groups)
        self._stepper.bind(self.param_groups, self.state, needs)

    def _complete(self, p: Tensor, state: dict[str, Any], need: Slot) -> None:
        """Gives a parameter the state it needs, in the type, device and layout of the kernels."""
        is_wide = self._master and p.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if is_wide else p.dtype
        has_moments = False
        for slot, name in STATE_NAMES[self._rule].items():
            old = state.get(name)
            if slot == Slot.STEP:
                if slot in need:
                    taken = (1.0 if has_moments else 0.0) if old is None else old
                    step = torch.as_tensor(taken, dtype=torch.float32, device=p.device)
                    state[name] = step.reshape(())
            elif slot == Slot.MASTER_PARAM:
                if is_wide:
                    like = p if old is None else old
                    state[name] = _laid_out(like.to(torch.float32, copy=old is None), p)
            elif isinstance(old, Tensor):
                state[name] = _laid_out(old.to(dtype=dtype, device=p.device), p)
                has_moments = True
            elif slot in need:
                state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)

    def state_dict(self) -> dict[str, Any]:
        """The state as torch's optimizer has it, and in the first parameter group, as "gradfuse",
        skipped_steps and the state of the policy. torch's optimizers load it as it is.

        torch.distributed.checkpoint keeps the groups, and would drop a key beside them.
        """
        out: dict[str, Any] = super().state_dict()
        own: dict[str, Any] = {"skipped_steps": self.skipped_steps}
        if isinstance(self._clip, Policy):
            own["policy"] = self._clip.state_dict()
        out["param_groups"][0][_OWN] = own
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of this optimizer or of torch's, as torch does, with its hooks.

        A load that raises leaves the optimizer and its policy as they were.
        """
        policy = self._clip if isinstance(self._clip, Policy) else None
        before = self.state, self.param_groups, self.skipped_steps
        policy_before = None if policy is None else policy.state
        given: dict[str, Any] = {}  # what the pre-hooks made of state_dict
        hooks = [
            self.register_load_state_dict_pre_hook(lambda _, made: given.update(made)),
            self.register_load_state_dict_post_hook(lambda _: self._load_own(given), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.state, self.param_groups, skipped = before
            self._set_skipped(skipped)
            if policy is not None and policy_before is not None:
                policy.state = policy_before
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def _load_own(self, state_dict: dict[str, Any]) -> None:
        """Loads what torch's load_state_dict does not, before post-hooks see the state."""
        # torch casts the state to the parameter's dtype, which would round a float32 master.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        held = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, held, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[p][name].dtype:
                    self.state[p][name] = value.detach().clone().to(p.device)
        own = state_dict.get(_OWN, {})  # where it was before it moved into the first group
        for group in self.param_groups:
            own = group.pop(_OWN, own)
        self._set_skipped(own.get("skipped_steps", 0))
        if isinstance(self._clip, Policy) and "policy" in own:
            self._clip.load_state_dict(own["policy"])

    def _set_skipped(self, steps: int) -> None:
        if self._skipped_on is not None:
            self._skipped_on.zero_()
        self._skipped = steps

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in _SETTINGS}
        return {**super().__getstate__(), **own, "_skipped": self.skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_stepper" not in self.__dict__:  # unpickled or copied
            self._reset()
        super().__setstate__(state)


def _is_made_by_zero() -> bool:
    """Whether torch's ZeroRedundancyOptimizer is calling the constructor. It says so nowhere else
    than in the stack."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe(1) if module is not None else None
    while module is not None and frame is not None:
        if isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):
            return True
        frame = frame.f_back
    return False


def check_torchs_options(
    op: str, fused: bool | None, foreach: bool | None, differentiable: bool | None
) -> None:
    """Refuses what torch's optimizers take and these cannot do, or torch does not take either."""
    if fused and foreach:
        raise RuntimeError(f"{op}: expected fused or foreach, got True for both")
    if differentiable:
        raise ValueError(
            f"{op}: differentiable must be False, because a fused step has no derivative, got "
            f"{differentiable}"
        )


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """t with the strides that zeros_like(like) has; t itself if it has them already."""
    if t.shape == like.shape and t.stride() == _strides(like):
        return t.detach()
    out = torch.empty_like(like, dtype=t.dtype, memory_format=torch.preserve_format)
    return out.copy_(t)


def _strides(like: Tensor) -> tuple[int, ...]:
    return torch.empty_like(like, device="meta", memory_format=torch.preserve_format).stride()


def parameter_names(groups: Sequence[dict[str, Any]]) -> list[str]:
    """The names that the groups were made with, else "0", "1", ..."""
    names: list[str] = []
    for group in groups:
        given = group.get("param_names")
        for i, _ in enumerate(group["params"]):
            names.append(given[i] if given else str(len(names)))
    return names


def as_number(value: float | Tensor) -> float | Tensor:
    """A learning rate as the kernels take it: a Tensor on a device stays there, unread."""
    if isinstance(value, Tensor) and value.device.type == "cpu":
        return float(value)
    return value
