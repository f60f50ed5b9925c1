"""Optimizers that unscale, clip, check and update in one pass.

torch.optim's AdamW and SGD with gradient clipping inside the step. The gradients are read once for
their norm and once by the update, which multiplies by the coefficient on its way. They are not
written: clip and AdamW move 8 values per element where torch's two calls move 10, or 12 with a
GradScaler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from gradfuse import _native
from gradfuse.clipping.policy import Policy, plan_with_policy
from gradfuse.clipping.report import GradReport
from gradfuse.ops.checks import check_nonnegative
from gradfuse.ops.clip import clip_grad_value_

__all__ = ["Clip", "ClippedOptimizer", "as_number"]

Clip: TypeAlias = "float | Policy | None"

_NONFINITE = {"propagate": 0, "error": 1, "skip": 3}
_OWN = "gradfuse"  # key of what torch's optimizers do not have in a state_dict
_SETTINGS = ("_nonfinite", "_materialize", "_master", "_stochastic", "_update_clip", "_clip")


class ClippedOptimizer(torch.optim.Optimizer):
    """What the optimizers share: a step that measures, decides and updates."""

    _step_supports_amp_scaling = True  # GradScaler hands its scale over instead of unscaling
    _check_is_left = False  # by our GradScaler, during a step: what is not finite skips it
    _rule: ClassVar[int]
    _names: ClassVar[tuple[str, ...]]  # of the state's tensors, by the native slots

    def _configure(
        self, clip: Clip, nonfinite: str, materialize: bool, master: bool, stochastic: bool
    ) -> None:
        op = type(self).__name__
        if nonfinite not in _NONFINITE:
            raise ValueError(
                f"{op}: nonfinite must be 'skip', 'error' or 'propagate', got {nonfinite!r}"
            )
        if master and stochastic:
            raise ValueError(
                f"{op}: expected master_weights or stochastic_rounding, got both: with master "
                "weights nothing is lost that rounding at random could save"
            )
        self._nonfinite = nonfinite
        self._materialize = materialize
        self._master = master
        self._stochastic = stochastic
        self._update_clip = False
        self.clip = clip
        self._reset()

    def _reset(self) -> None:
        """What lives between steps and is no part of the state."""
        self._report: GradReport | None = None
        self._skipped = 0  # steps skipped so far, but for those in _skipped_on
        self._skipped_on: Tensor | None = None  # counted on the device, without waiting for it
        self._parameter_names: list[str] = []
        self._held = _native.backend.Stepper(self._rule)

    @property
    def clip(self) -> Clip:
        """What bounds the gradients: their global norm, a policy, or None. May be changed."""
        return self._clip

    @clip.setter
    def clip(self, value: Clip) -> None:
        if value is not None and not isinstance(value, Policy):
            value = check_nonnegative(type(self).__name__, "clip", value)
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
        code = _NONFINITE["skip" if self._check_is_left else self._nonfinite]
        clip, totals, bound = self._clip, None, math.inf
        groups = [self._options(group, as_number(group["lr"])) for group in self.param_groups]
        options = self._update_clip, self._stochastic, self._materialize
        if isinstance(clip, Policy):
            plan = plan_with_policy(
                clip,
                lambda max_norm: self._held.measure(max_norm, code, scale, found_inf),
                self._held.parameters,
                scale,
                skips=True,
            )
            totals, bound = plan.totals, clip.bound
            self._reported(plan.norm, plan.reported, plan.table, clip.max_norm, repr(clip))
            self._held.update(groups, totals, plan.coefficients, bound, *options)
            clip.keep(plan.state)
        elif clip is not None or code or scale is not None or found_inf is not None:
            max_norm = math.inf if clip is None else clip
            norm, totals, table = self._held.step(
                groups, max_norm, code, scale, found_inf, *options
            )
            self._reported(norm, totals, table, max_norm, None)
        else:
            self._held.update(groups, None, None, bound, *options)
        if self._materialize and bound < math.inf:
            clip_grad_value_(self._held.parameters(), bound)
        if totals is not None:
            self._count(totals)

    def _reported(
        self, norm: Tensor, totals: Tensor, table: Tensor, max_norm: float, policy: str | None
    ) -> None:
        self._report = GradReport(
            self._parameter_names, norm, totals, table, max_norm, 2.0, self._nonfinite, policy
        )

    def _count(self, totals: Tensor) -> None:
        if self._skipped_on is not None:
            self._skipped_on += totals[3].eq(GradReport.SKIP).to(self._skipped_on)
        elif self._report is not None:
            self._skipped += self._report.skipped

    def _options(self, group: dict[str, Any], lr: float | Tensor) -> tuple[Any, ...]:
        """(lr, maximize, then the rule's numbers) as the native update takes them."""
        raise NotImplementedError

    def _needed(self, group: dict[str, Any]) -> int:
        """Which of _names a parameter of the group needs, as bits."""
        raise NotImplementedError

    def _refresh(self) -> None:
        """Makes what the native side holds that of param_groups and state, if it is not."""
        needs = [self._needed(group) for group in self.param_groups]
        if self._held.holds(self.param_groups, self.state, needs):
            return
        names: list[str] = []
        for group, need in zip(self.param_groups, needs, strict=True):
            given = group.get("param_names")
            for i, p in enumerate(group["params"]):
                names.append(given[i] if given else str(len(names)))
                if p.grad is not None and need:
                    self._complete(p, self.state[p], need)
                if self._skipped_on is None and p.device.type != "cpu":
                    self._skipped_on = torch.zeros((), dtype=torch.int64, device=p.device)
        self._parameter_names = names
        self._held.hold(self.param_groups, self.state, needs)

    def _complete(self, p: Tensor, state: dict[str, Any], need: int) -> None:
        """Gives a parameter the state it needs, in the type, device and layout of the kernels."""
        wide = self._master and p.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if wide else p.dtype
        begun = False
        for slot, name in enumerate(self._names):
            old = state.get(name)
            if name == "step":
                if need >> slot & 1:
                    taken = 1.0 if begun else 0.0
                    step = torch.as_tensor(taken if old is None else old, dtype=torch.float32)
                    state[name] = step.reshape(()).to(p.device)
            elif name == "master_param":
                if wide:
                    like = p if old is None else old
                    state[name] = _laid_out(like.to(torch.float32, copy=old is None), p)
            elif isinstance(old, Tensor):
                state[name] = _laid_out(old.to(dtype=dtype, device=p.device), p)
                begun = True
            elif need >> slot & 1:
                state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)

    def state_dict(self) -> dict[str, Any]:
        """The state as torch's optimizer has it, and under "gradfuse" what only this one has:
        skipped_steps, and the state of the policy. torch's optimizers load it as it is."""
        out: dict[str, Any] = super().state_dict()
        own: dict[str, Any] = {"skipped_steps": self.skipped_steps}
        if isinstance(self._clip, Policy):
            own["policy"] = self._clip.state_dict()
        return {**out, _OWN: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of this optimizer or of torch's."""
        super().load_state_dict(state_dict)
        # torch casts the state to the parameter's dtype. A float32 master is there for not being.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        held = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, held, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[p][name].dtype:
                    self.state[p][name] = value.detach().clone().to(p.device)
        own = state_dict.get(_OWN, {})
        if self._skipped_on is not None:
            self._skipped_on.zero_()
        self._skipped = own.get("skipped_steps", 0)
        if isinstance(self._clip, Policy) and "policy" in own:
            self._clip.load_state_dict(own["policy"])

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in _SETTINGS}
        return {**super().__getstate__(), **own, "_skipped": self.skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_held" not in self.__dict__:  # unpickled or copied
            self._reset()
        super().__setstate__(state)


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """t with the strides that zeros_like gives; t itself if it has them."""
    if t.shape == like.shape and t.stride() == _strides(like):
        return t.detach()
    out = torch.empty_like(like, dtype=t.dtype, memory_format=torch.preserve_format)
    return out.copy_(t)


def _strides(like: Tensor) -> tuple[int, ...]:
    return torch.empty_like(like, device="meta", memory_format=torch.preserve_format).stride()


def as_number(value: float | Tensor) -> float | Tensor:
    """A learning rate: a tensor on a device stays there, so that nothing waits for it."""
    if isinstance(value, Tensor) and value.device.type == "cpu":
        return float(value)
    return value
