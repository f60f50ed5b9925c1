"""Clipping inside the step of torch's own fused optimizers."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradfuse import _native
from gradfuse._codes import Action, Rule, Slot
from gradfuse._records import ClipPlan
from gradfuse.clipping.report import GradReport
from gradfuse.ops.checks import STEP_NONFINITE, check_max_norm, check_nonfinite
from gradfuse.optim.base import parameter_names
from gradfuse.optim.unwrapped import unwrapped_step

__all__ = ["ClipInStep", "clip_in_step"]

_CLASSES = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_ATTRIBUTES = ("grad_scale", "found_inf")  # what torch's kernels divide by, and skip for
_NO_OPTIONS = ("params", "param_names")
_Path: TypeAlias = tuple[tuple[str, object], ...]
_Key: TypeAlias = tuple[type, torch.device, torch.dtype, _Path]


class ClipInStep:
    """What clip_in_step returns; clips until `remove` is called."""

    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float, nonfinite: str) -> None:
        self.max_norm = max_norm
        self._nonfinite = nonfinite
        self._optimizer = optimizer
        self._proven: set[_Key] = set()
        self._paths: list[_Path] = []  # of the groups
        self._names: list[str] = []
        self._report: GradReport | None = None
        self._skipped: Tensor | None = None
        self._view = _view_class(type(optimizer))
        self._fresh: list[Tensor] = []  # parameters whose momentum begins with this step
        self._state = optimizer.state  # of this step: load_state_dict replaces optimizer.state
        self._no_state: dict[Tensor, Any] = {}
        self._stepper = _native.backend.Stepper(Rule.ADAMW)  # of which only the walk is used
        self._refresh()
        self._hooks = (
            optimizer.register_step_pre_hook(self._begin),
            optimizer.register_step_post_hook(self._end),
        )

    @property
    def max_norm(self) -> float:
        """Upper bound of the norm; may be changed between steps."""
        return self._max_norm

    @max_norm.setter
    def max_norm(self, value: float) -> None:
        self._max_norm = check_max_norm("clip_in_step", "max_norm", value)

    @property
    def report(self) -> GradReport | None:
        """What the last step saw; None before it."""
        return self._report

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing. On CUDA, reading this waits for the device."""
        return 0 if self._skipped is None else int(self._skipped)

    def remove(self) -> None:
        """Takes the hooks off; the optimizer is torch's again."""
        self._drop_unbegun()
        for hook in self._hooks:
            hook.remove()

    def _refresh(self) -> None:
        groups = self._optimizer.param_groups
        needs = [Slot(0)] * len(groups)  # torch keeps the state
        paths = [_path(group) for group in groups]
        if paths == self._paths and self._stepper.is_current(groups, self._no_state, needs):
            return
        for group in groups:
            for p in group["params"]:
                _prove(self._optimizer, group, p, self._proven)
        self._names = [name for names in parameter_names(groups) for name in names]
        self._paths = paths
        self._stepper.bind(groups, self._no_state, needs)

    @torch.no_grad()
    def _begin(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if isinstance(optimizer, self._view):
            return None  # the step of a class calls that of its base
        if any(a is not None and a is not optimizer for a in (*args, kwargs.get("closure"))):
            raise RuntimeError(
                "clip_in_step: expected step() without a closure, got one: it would make new "
                "gradients after their norm was taken. Call it before step()"
            )
        self._drop_unbegun()  # a step that raised did not reach _end
        self._refresh()
        scale, found_inf = (getattr(optimizer, name, None) for name in _ATTRIBUTES)
        result = self._stepper.measure(
            self._max_norm, STEP_NONFINITE[self._nonfinite], scale, found_inf
        )
        plan = ClipPlan.of(result[1])
        factor = torch.ldexp(plan.factor, plan.factor_exponent)
        divisor = factor.reciprocal().float()
        # torch's kernels divide by a float32, which cannot hold this divisor.
        is_beyond = divisor.isinf() & factor.ne(0.0) & factor.isfinite()
        plan.action.copy_(torch.where(is_beyond, float(Action.SKIP), plan.action))  # in result
        skips = plan.action.eq(Action.SKIP)
        self._report = GradReport(self._names, result, self._max_norm, 2.0, self._nonfinite)
        if self._skipped is None:
            self._skipped = torch.zeros((), dtype=torch.int64, device=factor.device)
        self._skipped += skips
        self._fresh, self._state = _without_momentum(optimizer), optimizer.state
        idle = factor.device.type == "cpu" and float(factor) == 1.0 and not bool(skips)
        view = self._view.__new__(self._view)
        view.__dict__ = optimizer.__dict__
        view.grad_scale = None if idle else divisor
        view.found_inf = None if idle else skips.float()
        return (view, *args[1:]), kwargs

    def _end(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._drop_unbegun()

    def _drop_unbegun(self) -> None:
        """Removes the momentum that torch allocated in a skipped step and left uninitialised."""
        if self._fresh and self._report is not None and self._report.skipped:
            for p in self._fresh:
                self._state[p].pop("momentum_buffer", None)
        self._fresh = []


def clip_in_step(
    optimizer: torch.optim.Optimizer, max_norm: float, nonfinite: str = "skip"
) -> ClipInStep:
    """Clips inside every step of torch's own Adam, AdamW or SGD with fused=True.

    Reads the gradients once before a step, for their norm. torch's kernel gets the coefficient as
    the loss scale that it divides by, so that no pass rewrites the gradients for the clip. Works
    under torch.amp.GradScaler, whether unscale_ was called or not.

    torch's kernel stores the divided gradients: after a step that clipped or unscaled, p.grad is
    the clipped gradient; a skipped step leaves it alone. torch documents none of this. So
    clip_in_step tests it first, on the class, options, device and dtype of each parameter.

    A step whose coefficient is below 1 / 3.4e38 is skipped, because the kernel divides by a
    float32. A copied or unpickled optimizer has no hooks and does not clip.

    Args:
        optimizer: torch.optim.Adam, AdamW or SGD, made with fused=True.
        max_norm: upper bound of the gradients' global norm, >= 0; inf only measures.
        nonfinite: what a NaN or inf gradient does. "skip": no parameter and no state changes.
            "error": RuntimeError in step, nothing is written. "propagate": what torch does.

    Returns:
        A handle with `report`, `skipped_steps`, `max_norm` and `remove()`.

    Raises:
        TypeError: optimizer is of another class.
        RuntimeError: it is not fused, has this already, or this torch's kernel does not divide by
            grad_scale and skip for found_inf.
        ValueError: max_norm or nonfinite is out of range.
    """
    if getattr(optimizer, "skipped_steps", None) is not None:
        raise TypeError(
            f"clip_in_step: {type(optimizer).__name__} of gradfuse.optim clips by itself: give it "
            "clip=max_norm"
        )
    if not isinstance(optimizer, _CLASSES):
        raise TypeError(
            "clip_in_step: optimizer must be torch.optim.Adam, AdamW or SGD, got "
            + type(optimizer).__name__
        )
    check_nonfinite("clip_in_step", nonfinite, STEP_NONFINITE)
    hooks = optimizer._optimizer_step_pre_hooks.values()
    if any(isinstance(getattr(h, "__self__", None), ClipInStep) for h in hooks):
        raise RuntimeError("clip_in_step: this optimizer clips in its step already")
    return ClipInStep(optimizer, max_norm, nonfinite)


def _view_class(cls: type[torch.optim.Optimizer]) -> Any:
    """A class for views of an optimizer: they share its __dict__, but have own _ATTRIBUTES.

    _ATTRIBUTES are slots, which Python finds before the __dict__. A step on a view that raises thus
    leaves the optimizer's own attributes alone.
    """
    return type(cls.__name__, (cls,), {"__slots__": _ATTRIBUTES})


def _without_momentum(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [
        p
        for group in optimizer.param_groups
        if group.get("momentum")
        for p in group["params"]
        if p.grad is not None and optimizer.state.get(p, {}).get("momentum_buffer") is None
    ]


def _path(group: dict[str, Any]) -> _Path:
    """The part of a group's options that chooses a kernel, or a branch in one.

    That is whether each option is there, is a Tensor, is zero. Its size is left out: schedules
    change it.
    """

    def kind(value: Any) -> object:
        if isinstance(value, Tensor):
            return value.device, value.dtype
        return value if value is None else bool(value)

    return tuple(sorted((k, kind(v)) for k, v in group.items() if k not in _NO_OPTIONS))


def _prove(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], p: Tensor, proven: set[_Key]
) -> None:
    """Raises unless steps on 4 g with grad_scale 4 are those on g, and found_inf stops one."""
    cls = type(optimizer)
    if not group.get("fused"):
        raise RuntimeError(
            f"clip_in_step: expected {cls.__name__}(fused=True), got fused={group.get('fused')}: "
            "only torch's fused kernels take a coefficient"
        )
    key = (cls, p.device, p.dtype, _path(group))
    if key in proven:
        return
    scaled, stop = (4.0, 0.0), (4.0, 1.0)
    try:
        # Two steps each, as momentum begins with the first.
        plain = _probed(cls, group, p, [None, None])
        divided = _probed(cls, group, p, [scaled, scaled])
        stopped_first = _probed(cls, group, p, [stop])
        stopped_then = _probed(cls, group, p, [None, stop])
    except Exception as error:
        raise RuntimeError(
            f"clip_in_step: {cls.__name__} of torch {torch.__version__} could not be tried out on "
            f"{p.device}, {p.dtype}: {error}"
        ) from error
    begun = _probe_values(p)
    if torch.equal(plain[0][0], begun) or not _same(plain, divided):
        raise RuntimeError(
            f"clip_in_step: {cls.__name__} of torch {torch.__version__} does not divide by "
            f"grad_scale on {p.device}, {p.dtype}; use gradfuse.optim or clip_grad_norm_"
        )
    if not torch.equal(stopped_first[0][0], begun) or not _same(plain[:1] * 2, stopped_then):
        raise RuntimeError(
            f"clip_in_step: {cls.__name__} of torch {torch.__version__} does not skip for "
            f"found_inf on {p.device}, {p.dtype}; use gradfuse.optim or clip_grad_norm_"
        )
    proven.add(key)


def _probe_values(like: Tensor) -> Tensor:
    """A parameter of different values: a weight decay cancels the gradient of one at most."""
    return torch.tensor([1.0, 0.5, -0.25], dtype=like.dtype, device=like.device)


def _same(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x, y) for xs, ys in pairs for x, y in zip(xs, ys, strict=True))


def _probed(
    cls: type, group: dict[str, Any], like: Tensor, steps: list[tuple[float, float] | None]
) -> list[list[Tensor]]:
    """A parameter and its state after each step: plain, or with this grad_scale and found_inf on
    the gradient times grad_scale."""
    with torch.no_grad():
        p = _probe_values(like)
        options = {k: v for k, v in group.items() if k not in _NO_OPTIONS}
        rate = options["lr"]  # which may be 0 while it warms up
        options["lr"] = torch.full_like(rate, 0.5) if isinstance(rate, Tensor) else 0.5
        probe = cls([{"params": [p], **options}])
        step = unwrapped_step(probe)  # without the hooks for the steps of all optimizers
        outcome = []
        for given in steps:
            p.grad = torch.full_like(p, 0.5 if given is None else 0.5 * given[0])
            for name, value in zip(_ATTRIBUTES, given or (None, None), strict=True):
                held = None if value is None else torch.tensor(value, device=like.device)
                setattr(probe, name, held)
            step(probe)
            state = (t for t in probe.state[p].values() if isinstance(t, Tensor))
            outcome.append([t.clone() for t in (p, *state)])
        return outcome
