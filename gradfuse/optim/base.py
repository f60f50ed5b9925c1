"""What gradfuse's optimizers share: a step that measures, decides and updates."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from gradfuse import _native
from gradfuse._codes import STATE_NAMES, LrScale, Rule, Slot
from gradfuse._records import StepGroup
from gradfuse.clipping.policy import Policy, refuse_by_parameter
from gradfuse.clipping.report import GradReport
from gradfuse.distributed import Group, ReplicatedOver, has_dtensor, kept
from gradfuse.ops.checks import STEP_NONFINITE, check_max_norm, check_nonfinite
from gradfuse.optim.parts import Clip, Part, StepCall, refuse, step_apart
from gradfuse.optim.shards import Shards
from gradfuse.optim.skips import SkipCounter
from gradfuse.optim.unwrapped import unwrapped_step

__all__ = ["Clip", "ClippedOptimizer", "as_number", "check_torchs_options", "parameter_names"]

_SHORT = {torch.float16, torch.bfloat16}
_LONG = {torch.float32, torch.float64, torch.complex64, torch.complex128}
_OWN = "gradfuse"  # key in a state_dict's groups of what torch's optimizers do not have
_SETTINGS = (
    "_nonfinite",
    "_materialize",
    "_master",
    "_stochastic",
    "_update_clip",
    "_eps_follows_clip",
    "_atan2",
    "_clip",
    "_group_of_ranks",
    "_replicated_over",
)


class ClippedOptimizer(torch.optim.Optimizer):
    """What the optimizers share: a step that measures, decides and updates."""

    _leaves_check = False  # our GradScaler sets it during a step, which then skips for NaN and inf
    _has_own_scaler = False  # our GradScaler, during a step over ranks, whose outcome it takes
    _scaler_error: Exception | None = None  # what its check raised on this rank
    _rule: ClassVar[Rule]
    # Options that not every optimizer has.
    _update_clip = _eps_follows_clip = _atan2 = False
    _group_of_ranks: Group | None = None
    _replicated_over: ReplicatedOver | None = None

    def _configure(
        self,
        clip: Clip,
        nonfinite: str,
        materialize: bool,
        master: bool,
        stochastic: bool,
        group: Group | None,
        replicated_over: ReplicatedOver | None,
    ) -> None:
        op = type(self).__name__
        check_nonfinite(op, nonfinite, STEP_NONFINITE)
        if master and stochastic:
            raise ValueError(
                f"{op}: expected master_weights or stochastic_rounding, got both: with master "
                "weights nothing is lost that rounding at random could save"
            )
        self._group_of_ranks, self._replicated_over = group, kept(replicated_over)
        if clip is not None and group is None:
            _refuse_in_zero(op, clip)
        self._nonfinite = nonfinite
        self._materialize = materialize
        self._master = master
        self._stochastic = stochastic
        self.clip = clip
        self._reset()

    @property
    def _is_over_given(self) -> bool:
        """Whether the caller named ranks."""
        return self._group_of_ranks is not None or self._replicated_over is not None

    def _reset(self) -> None:
        """Sets what lives between steps but is not part of the state."""
        self._whole = Part(self._rule)  # the groups without a clip of their own
        self._apart: dict[int, Part] = {}  # the others, by their number
        self._is_over_ranks = self._is_over_given  # whether a step decides with other ranks
        self._reports: list[GradReport] = []  # of the last step
        self._found: Tensor | None = None  # whether a scaler found inf, on any rank of that step
        self._skips = SkipCounter(type(self).__name__)
        self._step_name = f"{type(self).__name__}.step"

    @property
    def clip(self) -> Clip:
        """What bounds the gradients: their global norm, a policy, or None. May be changed.

        0 sets all gradients to 0, with a warning.
        """
        return self._clip

    @clip.setter
    def clip(self, value: Clip) -> None:
        self._clip = self._checked_clip(value)

    def _checked_clip(self, value: Clip) -> Clip:
        if isinstance(value, Policy) and self._group_of_ranks is not None:
            refuse_by_parameter(type(self).__name__, "clip", value)
        if value is None or isinstance(value, Policy):
            return value
        return check_max_norm(type(self).__name__, "clip", value, "None")

    def _policies(self) -> list[Policy]:
        """All policies: the optimizer's, and those of groups."""
        clips = [self._clip, *(group.get("clip") for group in self.param_groups)]
        return [clip for clip in clips if isinstance(clip, Policy)]

    @property
    def nonfinite(self) -> str:
        """What a NaN or inf gradient does."""
        return self._nonfinite

    @property
    def report(self) -> GradReport | None:
        """What the last step saw of the groups without a clip of their own.

        None before the first step, and where steps measure nothing.
        """
        return self._whole.report

    @property
    def reports(self) -> list[GradReport | None]:
        """What the last step saw of each group; groups that are clipped together share a report."""
        parts = (self._apart.get(i, self._whole) for i, _ in enumerate(self.param_groups))
        return [part.report for part in parts]

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing: a gradient was NaN or inf, or a policy wanted it.

        On CUDA, reading this waits for the device.
        """
        return self._skips.total

    def _takes_scale(self) -> bool:
        """Whether torch's GradScaler hands its scale over, for the step to unscale and check.

        Not to a step that someone replaced, as Accelerate does: they see a skipped step by its not
        being called.
        """
        return unwrapped_step(self) is ClippedOptimizer.step

    _step_supports_amp_scaling: Any = property(_takes_scale)  # torch's name

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer.add_param_group.

        A group may have a "clip" of its own: its gradients are then bounded by their own norm, or
        with None by nothing, and count in no other norm.

        Raises:
            ValueError: the group wants an option that a fused step does not have, its clip is out
                of range, or is a policy that another group has.
            RuntimeError: the group has a clip within torch's ZeroRedundancyOptimizer, and the
                optimizer no group of ranks.
        """
        op = type(self).__name__
        check_torchs_options(
            op, *(param_group.get(name) for name in ("fused", "foreach", "differentiable"))
        )
        if self._group_of_ranks is not None and self._lr_scale() != LrScale.NONE:
            what = "trust ratios" if self._rule == Rule.LAMB else "update_clip"
            raise ValueError(
                f"{op}: expected no group= with {what}, which need norms of whole parameters: it "
                "does not say what on two ranks is one parameter (DTensors do)"
            )
        clip = param_group.get("clip")
        if clip is not None:
            if self._group_of_ranks is None:
                _refuse_in_zero(op, clip)
            param_group["clip"] = self._checked_clip(clip)
        if isinstance(clip, Policy) and any(clip is other for other in self._policies()):
            raise ValueError(
                f"{op}: expected a policy for each group, because it has state, got one twice: "
                f"{clip!r}"
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
            RuntimeError: nonfinite="error" and a gradient is NaN or inf; nothing was written. Or a
                gradient is sparse (SGD takes them), a tracer is recording, a CUDA graph is captured
                while lr is a number, or ScheduleFreeAdamW is in eval(), or another GradScaler than
                gradfuse.optim's leads a step with group=.
            ValueError: a gradient has another shape or dtype than its parameter.
            TypeError: a gradient or parameter is an integer or on an unsupported device.
        """
        unready = self._unready()
        if unready is not None and not (self._is_over_ranks or has_dtensor(self._parameters())):
            raise unready  # over ranks together with the others, who may evaluate and measure
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._step()
        finally:
            for part in (self._whole, *self._apart.values()):
                if part.shards is not None:
                    part.shards.take_gradients_back()
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _step(self) -> None:
        _native.refuse_tracing(self._step_name)
        self._reports = []
        parts = self._parts()
        refusal = self._refresh(parts)
        if self._skips.is_on_gpu and torch.cuda.is_current_stream_capturing():
            self._refuse_numbers()
        call = self._call()
        refusal = self._unready() or refusal or self._scaler_refusal()
        groups = [self._group(group, as_number(group["lr"])) for group in self.param_groups]
        if torch._C._current_graph_task_id() != -1:
            self._warn_in_backward(parts)
        if refusal is not None:
            refuse(parts, call, refusal)
        if len(parts) == 1:
            plan = parts[0].step(groups, call)
        else:
            plan = step_apart(parts, [[groups[i] for i in part.indices] for part in parts], call)
        if plan is not None:
            reports = [part.report for part in parts if part.report is not None]
            self._found = parts[0].found
            self._reports = reports  # which another thread's step may replace
            self._skips.count(plan, reports)

    def _refuse_numbers(self) -> None:
        """Raises where a CUDA graph would keep the learning rate of its capture for ever."""
        for group in self.param_groups:
            lr = group["lr"]
            if not isinstance(lr, Tensor) or not lr.is_cuda:
                raise RuntimeError(
                    f"{self._step_name}: lr must be a Tensor on the GPU while a CUDA graph is "
                    f"captured, which would repeat a number whatever becomes of it, got {lr!r}"
                )

    def _call(self) -> StepCall:
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and not isinstance(found_inf, Tensor):
            # torch's 0 where there are no gradients. Other ranks, which have some, have a Tensor.
            found_inf = torch.zeros((), device="cpu") if self._is_over_ranks else None
        return StepCall(
            STEP_NONFINITE["skip" if self._leaves_check else self._nonfinite],
            self._nonfinite,
            getattr(self, "grad_scale", None),
            found_inf,
            self._lr_scale(),
            self._eps_follows_clip,
            self._atan2,
            self._stochastic,
            self._materialize,
        )

    def _scaler_refusal(self) -> Exception | None:
        """What our scaler raised on this rank; or why another than ours must not lead a step over a
        group: its scale would follow what this rank found, and the ranks' scales would part."""
        if self._scaler_error is not None:
            return self._scaler_error
        is_led = getattr(self, "found_inf", None) is not None
        if self._group_of_ranks is None or self._has_own_scaler or not is_led:
            return None
        for name in ("grad_scale", "found_inf"):  # torch leaves them where a step raises
            self.__dict__.pop(name, None)
        return RuntimeError(
            f"{self._step_name}: expected gradfuse.optim.GradScaler with group=, got found_inf of "
            "another scaler, whose scale would follow what this rank alone has found"
        )

    def _unready(self) -> Exception | None:
        """Why a step would be one on the wrong values."""
        return None

    def _lr_scale(self) -> LrScale:
        return LrScale.UPDATE_CLIP if self._update_clip else LrScale.NONE

    def _initial(self, slot: Slot, p: Tensor, dtype: torch.dtype) -> Tensor:
        """A moment before the first step."""
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)

    def _warn_in_backward(self, parts: Sequence[Part]) -> None:
        if any(part.clip is not None for part in parts):
            warnings.warn(
                f"{self._step_name}: runs within a backward pass, where other gradients are still "
                "missing, so clip bounds the norm of this optimizer's own",
                stacklevel=7,
            )

    def _parts(self) -> list[Part]:
        """The groups by the norm that clips them."""
        self._whole.clip = self._clip
        for group in self.param_groups:
            if "clip" in group:
                return self._divided()
        self._apart = {}
        self._whole.indices = range(len(self.param_groups))
        return [self._whole]

    def _divided(self) -> list[Part]:
        groups, whole = self.param_groups, self._whole
        whole.indices = [i for i, group in enumerate(groups) if "clip" not in group]
        own = [i for i, group in enumerate(groups) if "clip" in group]
        self._apart = {i: self._apart.get(i) or Part(self._rule) for i in own}
        for i, part in self._apart.items():
            part.clip, part.indices = self._checked_clip(groups[i]["clip"]), [i]
        return [*([whole] if whole.indices else []), *self._apart.values()]

    def _group(self, group: dict[str, Any], lr: float | Tensor) -> StepGroup:
        """A parameter group as the native update takes it."""
        raise NotImplementedError

    def _needed(self, group: dict[str, Any]) -> Slot:
        """The state that a parameter of the group needs."""
        raise NotImplementedError

    def _refresh(self, parts: Sequence[Part]) -> Exception | None:
        """Binds the parameters and their state anew, if param_groups or state have changed.

        Returns:
            Over ranks, why this one refuses a gradient or a state, which it must not raise alone.
        """
        needs = [[self._needed(self.param_groups[i]) for i in part.indices] for part in parts]
        if not self._is_over_ranks:
            groups = [self._groups_of(part) for part in parts]
            if all(
                part.stepper.is_current(own, self.state, need)
                for part, own, need in zip(parts, groups, needs, strict=True)
            ):
                return None
            self._is_over_ranks = self._is_over_given or has_dtensor(self._parameters())
        refusal: Exception | None = None
        for part, need in zip(parts, needs, strict=True):
            if not self._is_over_ranks:
                self._bind(part, need)
                continue
            if part.shards is None:
                part.shards = Shards(self._step_name, self._group_of_ranks, self._replicated_over)
            part.shards.beside = self._parameters()
            try:
                self._bind(part, need)
            except (RuntimeError, TypeError, ValueError) as error:
                refusal = refusal or error
        return refusal

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _groups_of(self, part: Part) -> list[dict[str, Any]]:
        """The groups of a part: the very list of the optimizer where there is one part."""
        groups = self.param_groups
        whole = len(part.indices) == len(groups)
        return groups if whole else [groups[i] for i in part.indices]

    def _bind(self, part: Part, needs: Sequence[Slot]) -> None:
        groups, shards = self._groups_of(part), part.shards
        seen, state = groups, cast("dict[Tensor, Any]", self.state)
        if shards is not None:
            seen = shards.lend_gradients(groups)
            state = shards.states(groups, self.state)
        if part.stepper.is_current(seen, state, needs):
            return
        for group, need in zip(groups, needs, strict=True):
            for p in group["params"]:
                if need and p.grad is not None and _fits(p.grad, p):
                    self._complete_any(p, need, shards)
                self._skips.put_on(p.device)
        names = parameter_names(self.param_groups)
        part.names = [name for i in part.indices for name in names[i]]
        if shards is not None:
            state = shards.states(groups, self.state)
        part.stepper.bind(seen, state, needs)

    def _complete_any(self, p: Tensor, need: Slot, shards: Shards | None) -> None:
        if shards is None:
            self._complete(p, self.state[p], need)
            return
        names = STATE_NAMES[self._rule]
        numbers = [name for slot, name in names.items() if slot >= Slot.STEP]
        shards.complete(
            p, self.state[p], lambda local, state: self._complete(local, state, need), numbers
        )

    def _complete(self, p: Tensor, state: dict[str, Any], need: Slot) -> None:
        """Gives a parameter the state it needs, in the type, device and layout of the kernels."""
        is_wide = self._master and p.dtype in _SHORT
        dtype = torch.float32 if is_wide else p.dtype
        has_moments = False
        for slot, name in STATE_NAMES[self._rule].items():
            old = state.get(name)
            if isinstance(old, Tensor):
                self._check_shape(name, old, p, slot)
            if slot >= Slot.STEP:
                if slot in need:
                    if old is None:
                        old = 1.0 if has_moments and slot == Slot.STEP else 0.0
                    number_type = torch.float32 if slot == Slot.STEP else torch.float64
                    number = torch.as_tensor(old, dtype=number_type, device=p.device)
                    state[name] = number.reshape(())
            elif slot == Slot.MASTER_PARAM:
                if is_wide:
                    like = p if old is None else old
                    state[name] = _laid_out(like.to(torch.float32, copy=old is None), p)
            elif isinstance(old, Tensor):
                state[name] = _laid_out(old.to(dtype=dtype, device=p.device), p)
                has_moments = True
            elif slot in need:
                state[name] = self._initial(slot, p, dtype)

    def _check_shape(self, name: str, t: Tensor, p: Tensor, slot: Slot) -> None:
        """Refuses what copying into a parameter's shape would broadcast."""
        if t.numel() != 1 if slot >= Slot.STEP else t.shape != p.shape:
            shape = [] if slot >= Slot.STEP else list(p.shape)
            raise ValueError(
                f"{self._step_name}: expected state {name} of {shape} for a parameter of "
                f"{list(p.shape)}, got {list(t.shape)}"
            )

    def state_dict(self) -> dict[str, Any]:
        """The state as torch's optimizer has it, and in the parameter groups, as "gradfuse",
        skipped_steps and the state of the policies. torch's optimizers load it as it is.

        torch.distributed.checkpoint keeps the groups, and would drop a key beside them.
        """
        out: dict[str, Any] = super().state_dict()
        for i, group in enumerate(out["param_groups"]):
            own: dict[str, Any] = {"skipped_steps": self.skipped_steps} if i == 0 else {}
            if i == 0 and isinstance(self._clip, Policy):
                own["policy"] = self._clip.state_dict()
            clip = group.get("clip")
            if isinstance(clip, Policy):  # its place stays, for who expects the group's keys
                own["group_policy"], group["clip"] = clip.state_dict(), repr(clip)
            if own:
                group[_OWN] = own
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of this optimizer or of torch's, as torch does, with its hooks.

        A load that raises leaves the optimizer and its policies as they were. Policies are those
        of this optimizer; only their state is loaded.
        """
        before = self.state, self.param_groups, self.skipped_steps
        policies_before = [(policy, policy.state) for policy in self._policies()]
        given: dict[str, Any] = {}  # what the pre-hooks made of state_dict
        hooks = [
            self.register_load_state_dict_pre_hook(lambda _, made: given.update(made)),
            self.register_load_state_dict_post_hook(
                lambda _: self._load_own(given, before[1]), prepend=True
            ),
        ]
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.state, self.param_groups, skipped = before
            self._skips.reset(skipped)
            for policy, state in policies_before:
                policy.state = state
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def _load_own(self, state_dict: dict[str, Any], old_groups: list[dict[str, Any]]) -> None:
        """Loads what torch's load_state_dict does not, before post-hooks see the state."""
        # torch casts the state to the parameter's dtype, which would round a float32 master.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        held = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, held, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[p][name].dtype:
                    self.state[p][name] = value.detach().clone().to(p.device)
        own = state_dict.get(_OWN, {})  # where it was before it moved into the first group
        for i, (group, old) in enumerate(zip(self.param_groups, old_groups, strict=True)):
            of_group = group.pop(_OWN, {})
            if i == 0:
                own = of_group or own
            if isinstance(group.get("clip", ""), str):  # neither a number nor None was saved
                group.pop("clip", None)
                if "clip" in old:
                    group["clip"] = old["clip"]
            if isinstance(group.get("clip"), Policy) and "group_policy" in of_group:
                group["clip"].load_state_dict(of_group["group_policy"])
        self._skips.reset(own.get("skipped_steps", 0))
        if isinstance(self._clip, Policy) and "policy" in own:
            self._clip.load_state_dict(own["policy"])

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in _SETTINGS}
        return {**super().__getstate__(), **own, "_skipped": self.skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_whole" not in self.__dict__:  # unpickled or copied
            self._reset()
        self._skips.reset(state.pop("_skipped", self.skipped_steps))
        super().__setstate__(state)


def _refuse_in_zero(op: str, clip: Clip) -> None:
    if _is_made_by_zero():
        raise RuntimeError(
            f"{op}: expected clip=None in a ZeroRedundancyOptimizer, got {clip!r}: each rank would "
            "clip by the norm of its own parameters; pass group= with functools.partial, or call "
            "clip_grad_norm_ before step()"
        )


def _is_made_by_zero() -> bool:
    """Whether torch's ZeroRedundancyOptimizer is calling the constructor.

    It says so nowhere else than in the stack. Its functions are known by their globals, because a
    frame whose f_locals someone read keeps the locals alive.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe(1) if module is not None else None
    while module is not None and frame is not None:
        if frame.f_globals is vars(module):
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


def _fits(grad: Tensor, p: Tensor) -> bool:
    """Whether a step takes the gradient; one that does not leaves the state as it is."""
    types = {p.dtype, torch.float32} if p.dtype in _SHORT else {p.dtype} & _LONG
    return grad.shape == p.shape and grad.device == p.device and grad.dtype in types


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """t with the strides that zeros_like(like) has; t itself if it has them already."""
    if t.shape == like.shape and t.stride() == _strides(like):
        return t.detach()
    out = torch.empty_like(like, dtype=t.dtype, memory_format=torch.preserve_format)
    return out.copy_(t)


def _strides(like: Tensor) -> tuple[int, ...]:
    return torch.empty_like(like, device="meta", memory_format=torch.preserve_format).stride()


def parameter_names(groups: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The names that each group was made with, else "0", "1", ... over all groups."""
    names: list[list[str]] = []
    count = 0
    for group in groups:
        n = len(group["params"])
        names.append(list(group.get("param_names") or map(str, range(count, count + n))))
        count += n
    return names


def as_number(value: float | Tensor) -> float | Tensor:
    """A learning rate as the kernels take it: a Tensor on a device stays there, unread."""
    if isinstance(value, Tensor) and value.device.type == "cpu":
        return float(value)
    return value
