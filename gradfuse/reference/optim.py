"""The optimizers' step in plain torch: elements in float32, float64 for float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gradfuse._codes import RULE_NAMES, STATE_NAMES, Action, Rule, Slot
from gradfuse._records import (
    AdamGroup,
    ClipPlan,
    ClipResult,
    LAMBGroup,
    StepGroup,
    StepOptions,
)
from gradfuse.reference.clip import planned
from gradfuse.reference.gradients import Access, GradList, check_gradients
from gradfuse.reference.update import State, followed, lr_sums, updated

Groups = Sequence[StepGroup]

_MOMENTS = (Slot.EXP_AVG, Slot.EXP_AVG_SQ, Slot.MAX_EXP_AVG_SQ)
_STATE_TYPES = {
    Slot.MASTER_PARAM: {torch.float32},
    Slot.STEP: {torch.float32},
    Slot.WEIGHT_SUM: {torch.float64},
    Slot.LR_MAX: {torch.float64},
}
_STATE_SHAPES = dict.fromkeys((Slot.STEP, Slot.WEIGHT_SUM, Slot.LR_MAX), torch.Size())


Number = TypeVar("Number", int, Tensor)


def _hashed(x: Number) -> Number:
    """random_bits of csrc/math/updates.h: 32 bits, in int64 if x is a Tensor."""
    low = 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & low
    x = ((x ^ (x >> 15)) * 0x846CA68B) & low
    return x ^ (x >> 16)


def _key(row: int, step: float) -> int:
    return _hashed(row ^ _hashed(int(step)))


def _put(target: Tensor, value: Tensor, key: int | None, stream: int) -> None:
    """target = value, rounded to nearest or, for bfloat16 with a key, at random."""
    if key is None or target.dtype != torch.bfloat16:
        target.copy_(value)
        return
    low = 0xFFFFFFFF
    order = torch.empty_like(target, dtype=torch.int64)  # elements are numbered as they lie
    flat = torch.as_strided(order, (order.numel(),), (1,))
    flat.copy_(torch.arange(order.numel(), device=order.device))
    noise = _hashed(order ^ ((key + stream) & low)) >> 16
    bits = value.float().view(torch.int32).to(torch.int64) & low
    special = bits & 0x7F800000 == 0x7F800000
    cut = (bits + noise) & 0xFFFF0000
    signed = torch.where(cut >= 1 << 31, cut - (1 << 32), cut).to(torch.int32)
    target.copy_(torch.where(special, value.float(), signed.view(torch.float32)))


class _Inputs(NamedTuple):
    """What an update of one parameter is computed from."""

    x: Tensor
    g: Tensor
    moments: State
    group: StepGroup
    taken: float  # steps before this one


class Stepper:
    """The parameters of an optimizer and their state. See csrc/ops/optim.cpp."""

    def __init__(self, rule: int) -> None:
        self._rule = Rule(rule)
        self._names = STATE_NAMES[self._rule]
        self._op = f"{RULE_NAMES[self._rule]}.step"
        self._params: list[tuple[Tensor, int]] = []  # with the index of its group
        self._kinds: list[tuple[torch.dtype, torch.device]] = []
        self._needs: list[int] = []
        self._state: Mapping[Tensor, Any] = {}
        self._tensors: list[Any] = []

    def is_current(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, Any],
        needs: Sequence[int],
    ) -> bool:
        """Whether parameters and state are those that were bound, and no state is missing."""
        listed = _listed(groups)
        if (
            len(listed) != len(self._params)
            or any(a is not b or g != h for (a, g), (b, h) in zip(listed, self._params))  # noqa: B905
            or _kinds(listed) != self._kinds
            or needs != self._needs
            or state is not self._state
        ):
            return False
        now = self._in_state(state)
        if any(a is not b for a, b in zip(now, self._tensors, strict=True)):
            return False  # one was replaced, and may not fit
        return not any(
            p.grad is not None
            and needs[g] & slot
            and slot != Slot.MASTER_PARAM
            and not isinstance(state.get(p, {}).get(name), Tensor)
            for p, g in listed
            for slot, name in self._names.items()
        )

    def bind(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, Any],
        needs: Sequence[int],
    ) -> None:
        """Keeps the parameters of the groups, their state, and the Slots that each group needs."""
        self._params = _listed(groups)
        self._kinds = _kinds(self._params)
        self._needs = list(needs)
        self._state = state
        self._tensors = self._in_state(state)

    def _in_state(self, state: Mapping[Tensor, Any]) -> list[Any]:
        kept = [state.get(p, {}) for p, _ in self._params]
        return [of_one.get(name) for of_one in kept for name in self._names.values()]

    def parameters(self) -> list[Tensor]:
        return [p for p, _ in self._params]

    def _gradients(self) -> list[Tensor | None]:
        seen: set[int] = set()
        out: list[Tensor | None] = []
        for p, _ in self._params:
            out.append(None if id(p) in seen else p.grad)
            seen.add(id(p))
        return out

    def _checked(self, listed: list[Tensor | None], access: Access) -> GradList:
        for i, g in enumerate(listed):
            if g is not None and g.is_sparse and self._rule != Rule.SGD:
                raise RuntimeError(
                    f"{self._op}: {RULE_NAMES[self._rule]} does not support sparse gradients, got "
                    f"one for parameter {i}; consider torch.optim.SparseAdam"
                )
        return check_gradients(self._op, listed, access)

    @torch.no_grad()
    def measure(
        self,
        max_norm: float,
        nonfinite: int,
        scale: Tensor | None,
        found_inf: Tensor | None,
        exact: bool = False,
    ) -> ClipResult:
        listed = self._gradients()
        grads = self._checked(listed, Access.READ_ONCE)
        of_scale = 1.0 if scale is None else float(scale)
        bad = found_inf is not None and bool(found_inf)
        return planned(self._op, listed, grads, max_norm, 2.0, nonfinite, of_scale, bad, exact)[0]

    def step(
        self,
        groups: Groups,
        max_norm: float,
        nonfinite: int,
        scale: Tensor | None,
        found_inf: Tensor | None,
        options: StepOptions,
        exact: bool = False,
    ) -> ClipResult:
        result = self.measure(max_norm, nonfinite, scale, found_inf, exact)
        self.update(groups, result.plan, None, options)
        return result

    @torch.no_grad()
    def update(
        self,
        groups: Groups,
        plan: Tensor | None,
        coefficients: Tensor | None,
        options: StepOptions,
        lr_scales: Tensor | None = None,
    ) -> None:
        listed, grads = self._checked_all(Access.WRITE if options.materialize else Access.READ_ONCE)
        factor = coefficient = 1.0
        if plan is not None:
            fields = ClipPlan.read(plan)
            if fields.action in (Action.REFUSE, Action.SKIP):
                return
            factor = fields.factor * 2.0**fields.factor_exponent
            coefficient = fields.coefficient
        scaled: dict[int, Tensor] = {}
        for i, grad in grads.each:
            own = factor if coefficients is None else factor * float(coefficients[i])
            scaled[i] = _real(grad).to(torch.float64).mul(own).to(_wide(grad))
            if options.materialize:
                _real(grad).copy_(scaled[i])
                scaled[i] = _real(grad).to(scaled[i].dtype)  # rounded, as it was written
        scaled |= {i: scaled[first] for i, first in grads.repeats}
        for i, g in sorted(scaled.items()):
            if not math.isinf(options.bound):
                g = g.clamp(-options.bound, options.bound)
            group, sparse = groups[self._params[i][1]], listed[i]
            rows = None
            if sparse is not None and sparse.is_sparse:
                rows = self._rows_of(i, sparse, group)
                if rows is None:
                    g = _dense(sparse, g)
            own = coefficient if coefficients is None else float(coefficients[i])
            scale = None if lr_scales is None else float(lr_scales[i])
            self._update(i, g, group, options, own, rows, scale)

    def check(self) -> None:
        """Raises what an update would; writes nothing."""
        self._checked_all(Access.READ_ONCE)

    def _checked_all(self, access: Access) -> tuple[list[Tensor | None], GradList]:
        listed = self._gradients()
        grads = self._checked(listed, access)
        for i, g in enumerate(listed):
            if g is not None:
                self._check(i, g)
        return listed, grads

    @torch.no_grad()
    def lr_sums(
        self,
        groups: Groups,
        plan: Tensor | None,
        coefficients: Tensor | None,
        options: StepOptions,
    ) -> Tensor:
        listed, grads = self._checked_all(Access.READ_ONCE)
        device = grads.each[0][1].device if grads.each else torch.device("cpu")
        sums = torch.zeros(len(listed), 2, dtype=torch.float64, device=device)
        fields = None if plan is None else ClipPlan.read(plan)
        if fields is not None and fields.action in (Action.REFUSE, Action.SKIP):
            return sums
        for i, grad in grads.each:
            own = 1.0 if fields is None else fields.factor * 2.0**fields.factor_exponent
            coefficient = 1.0 if fields is None else fields.coefficient
            if coefficients is not None:
                coefficient = float(coefficients[i])
                own *= coefficient
            g = _real(grad).to(torch.float64).mul(own).to(_wide(grad))
            g = g.clamp(-options.bound, options.bound)
            p, group = self._params[i]
            at = self._inputs(i, g, _real(p), groups[group], options, coefficient)
            assert isinstance(at.group, (AdamGroup, LAMBGroup))
            of_one = lr_sums(at.x, at.g, at.moments, at.group, at.taken, options)
            sums[i] = sums.new_tensor(of_one)
        return sums

    def _rows_of(self, i: int, sparse: Tensor, group: StepGroup) -> Tensor | None:
        """The rows that a sparse gradient has, if an update changes nothing else."""
        state = self._state_of(i)
        only = Slot.EXP_AVG not in state and Slot.MASTER_PARAM not in state
        if sparse.sparse_dim() == 1 and only and not group.weight_decay:
            return sparse._indices()[0]
        return None

    def _check(self, i: int, g: Tensor) -> None:
        p = self._params[i][0]
        types = {p.dtype, torch.float32} if _is_short(p) else {p.dtype}
        if g.shape != p.shape or g.dtype not in types or g.device != p.device:
            raise ValueError(
                f"{self._op}: expected a gradient of the parameter's shape and device, of its "
                f"dtype or float32 for a 16-bit one, {list(p.shape)} of {p.dtype} on {p.device}, "
                f"got {list(g.shape)} of {g.dtype} on {g.device} for parameter {i}"
            )
        if p.layout != torch.strided or torch._debug_has_internal_overlap(p) == 1:
            raise TypeError(
                f"{self._op}: expected plain dense parameters with an element per memory location, "
                f"got another kind for parameter {i}"
            )
        for slot, t in self._state_of(i).items():
            of_state = _STATE_TYPES.get(slot, types)
            shape = _STATE_SHAPES.get(slot, p.shape)
            if t.dtype not in of_state or t.shape != shape:
                named = " or ".join(str(dtype) for dtype in sorted(of_state, key=str))
                raise ValueError(
                    f"{self._op}: expected state {self._names[slot]} of {list(shape)} in {named}, "
                    f"got {list(t.shape)} of {t.dtype} for parameter {i}"
                )

    def _state_of(self, i: int) -> State:
        """The tensors of a parameter's state that its group needs."""
        p, group = self._params[i]
        kept = self._state.get(p, {})
        found = {
            slot: kept.get(name) for slot, name in self._names.items() if self._needs[group] & slot
        }
        return {slot: t for slot, t in found.items() if t is not None}

    def _inputs(
        self,
        i: int,
        g: Tensor,
        target: Tensor,
        group: StepGroup,
        options: StepOptions,
        coefficient: float,
    ) -> _Inputs:
        """What the update of a parameter, or of the rows `target` of it, is computed from."""
        p, state = self._params[i][0], self._state_of(i)
        master, step = state.get(Slot.MASTER_PARAM), state.get(Slot.STEP)
        moments = {slot: _real(state[slot]) for slot in _MOMENTS if slot in state}
        x = target.to(g.dtype)
        if master is not None and _is_short(p):
            # Elsewhere someone wrote the parameter since the last step, and that value counts.
            x = torch.where(_same(master.to(p.dtype), p.detach()), master.detach(), x)
        if options.eps_follows_clip:
            smallest = torch.finfo(state[Slot.EXP_AVG_SQ].dtype).smallest_normal
            group = followed(group, coefficient, smallest)
        taken = 0.0 if step is None else float(step)
        return _Inputs(x, -g if group.maximize else g, moments, group, taken)

    def _update(
        self,
        i: int,
        g: Tensor,
        group: StepGroup,
        options: StepOptions,
        coefficient: float,
        rows: Tensor | None,
        lr_scale: float | None,
    ) -> None:
        """Updates a parameter, or some rows of it, by its gradient."""
        p, state = self._params[i][0], self._state_of(i)
        master, step = state.get(Slot.MASTER_PARAM), state.get(Slot.STEP)
        target = _real(p) if rows is None else _real(p)[rows]
        at = self._inputs(i, g, target, group, options, coefficient)
        key = _key(i, at.taken) if options.stochastic_rounding else None
        moments = at.moments
        x, new = updated(at.x, at.g, moments, state, at.group, at.taken, options, lr_scale)
        for stream, slot in enumerate(_MOMENTS, 1):
            if slot in new:
                _put(moments[slot], new[slot], key, stream)
        if master is not None and _is_short(p):
            master.copy_(x)
        _put(target, x, key, 0)
        if rows is not None:
            _real(p).index_copy_(0, rows, target)
        if step is not None:
            step += 1.0


def _listed(groups: Sequence[dict[str, Any]]) -> list[tuple[Tensor, int]]:
    return [(p, g) for g, group in enumerate(groups) for p in group["params"]]


def _kinds(params: Sequence[tuple[Tensor, int]]) -> list[tuple[torch.dtype, torch.device]]:
    return [(p.dtype, p.device) for p, _ in params]


def _is_short(t: Tensor) -> bool:
    return t.dtype in (torch.float16, torch.bfloat16)


def _dense(sparse: Tensor, values: Tensor) -> Tensor:
    """The dense tensor of these values at the sparse one's indices."""
    made = torch.sparse_coo_tensor(
        sparse._indices(), values, sparse.shape, is_coalesced=True, check_invariants=False
    )
    return made.to_dense()


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype in (torch.float64, torch.complex128) else torch.float32


def _real(t: Tensor) -> Tensor:
    t = t.detach()
    return torch.view_as_real(t) if t.is_complex() else t
