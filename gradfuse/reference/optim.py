"""The optimizers' step in plain torch: elements in float32, float64 for float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gradfuse.reference import clip as clipping
from gradfuse.reference.gradients import check_gradients

SKIP_POLICY, SKIP = 3, 4
_NAMES = (
    ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param", "step"),
    ("momentum_buffer", "", "", "master_param", "step"),
)
_FIRST, _SECOND, _LARGEST, _MASTER, _STEP = range(5)


def _hashed(x: Tensor) -> Tensor:
    """random_bits of csrc/math/updates.h: 32 bits in int64."""
    low = 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & low
    x = ((x ^ (x >> 15)) * 0x846CA68B) & low
    return x ^ (x >> 16)


def _key(row: int, step: float) -> int:
    count = int(_hashed(torch.tensor(int(step))))
    return int(_hashed(torch.tensor(row ^ count)))


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


class Stepper:
    """The parameters of an optimizer and their state. See csrc/stepper.h."""

    def __init__(self, rule: int) -> None:
        self._rule = rule
        self._names = _NAMES[rule]
        self._op = ("AdamW.step", "SGD.step")[rule]
        self._params: list[tuple[Tensor, int]] = []
        self._needs: list[int] = []
        self._state: dict[Tensor, Any] = {}
        self._tensors: list[Any] = []

    def holds(
        self, groups: list[dict[str, Any]], state: dict[Tensor, Any], needs: list[int]
    ) -> bool:
        listed = [(p, g) for g, group in enumerate(groups) for p in group["params"]]
        if (
            len(listed) != len(self._params)
            or any(a is not b or g != h for (a, g), (b, h) in zip(listed, self._params))  # noqa: B905
            or needs != self._needs
            or state is not self._state
        ):
            return False
        now = self._in_state(state)
        if any(a is not b for a, b in zip(now, self._tensors, strict=True)):
            return False  # one was replaced, and may not fit
        return not any(
            p.grad is not None
            and needs[g] >> slot & 1
            and slot != _MASTER
            and not isinstance(state.get(p, {}).get(name), Tensor)
            for p, g in listed
            for slot, name in enumerate(self._names)
        )

    def hold(
        self, groups: list[dict[str, Any]], state: dict[Tensor, Any], needs: list[int]
    ) -> None:
        self._params = [(p, g) for g, group in enumerate(groups) for p in group["params"]]
        self._needs = list(needs)
        self._state = state
        self._tensors = self._in_state(state)

    def _in_state(self, state: dict[Tensor, Any]) -> list[Any]:
        held = [state.get(p, {}) for p, _ in self._params]
        return [of_one.get(name) for of_one in held for name in self._names]

    def parameters(self) -> list[Tensor]:
        return [p for p, _ in self._params]

    def _gradients(self) -> list[Tensor | None]:
        seen: set[int] = set()
        out: list[Tensor | None] = []
        for p, _ in self._params:
            out.append(None if id(p) in seen else p.grad)
            seen.add(id(p))
        return out

    @torch.no_grad()
    def measure(
        self, max_norm: float, nonfinite: int, scale: Tensor | None, found_inf: Tensor | None
    ) -> clipping.Result:
        listed = self._gradients()
        grads = check_gradients(self._op, listed, writes=False)
        of_scale = 1.0 if scale is None else float(scale)
        bad = found_inf is not None and bool(found_inf)
        return clipping.measure(
            self._op, listed, grads, max_norm, 2.0, nonfinite, of_scale, found_inf=bad
        )

    def step(
        self,
        groups: list[tuple[Any, ...]],
        max_norm: float,
        nonfinite: int,
        scale: Tensor | None,
        found_inf: Tensor | None,
        update_clip: bool,
        stochastic_rounding: bool,
        materialize: bool,
    ) -> clipping.Result:
        result = self.measure(max_norm, nonfinite, scale, found_inf)
        self.update(
            groups, result[1], None, math.inf, update_clip, stochastic_rounding, materialize
        )
        return result

    @torch.no_grad()
    def update(
        self,
        groups: list[tuple[Any, ...]],
        totals: Tensor | None,
        coefficients: Tensor | None,
        bound: float,
        update_clip: bool,
        stochastic_rounding: bool,
        materialize: bool,
    ) -> None:
        listed = self._gradients()
        grads = check_gradients(self._op, listed, writes=materialize)
        for i, g in grads:
            self._check(i, g)
        action = clipping.KEEP if totals is None else int(totals[3])
        if action in (clipping.REFUSE, SKIP):
            return
        factor = 1.0 if totals is None else float(totals[6]) * 2.0 ** float(totals[7])
        for i, grad in enumerate(listed):
            if grad is None:
                continue
            own = factor if coefficients is None else factor * float(coefficients[i])
            wide = _wide(grad)
            g = torch.view_as_real(grad) if grad.is_complex() else grad
            g = g.to(torch.float64).mul(own).to(wide)
            if materialize:
                (torch.view_as_real(grad) if grad.is_complex() else grad).copy_(g)
            if not math.isinf(bound):
                g = g.clamp(-bound, bound)
            self._update(i, g, groups[self._params[i][1]], update_clip, stochastic_rounding)

    def _check(self, i: int, g: Tensor) -> None:
        p = self._params[i][0]
        if g.shape != p.shape or g.dtype != p.dtype or g.device != p.device:
            raise ValueError(
                f"{self._op}: expected a gradient of the parameter's shape, dtype and device, "
                f"{list(p.shape)} of {p.dtype} on {p.device}, got {list(g.shape)} of {g.dtype} on "
                f"{g.device} for parameter {i}"
            )
        if p.layout != torch.strided or torch._debug_has_internal_overlap(p) == 1:
            raise TypeError(
                f"{self._op}: expected plain dense parameters with an element per memory location, "
                f"got another kind for parameter {i}"
            )
        for name, t in zip(self._names, self._slots(i), strict=True):
            if t is None:
                continue
            short = p.dtype in (torch.float16, torch.bfloat16)
            types = {p.dtype, torch.float32} if short else {p.dtype}
            if name in ("master_param", "step"):
                types = {torch.float32}
            shape = torch.Size() if name == "step" else p.shape
            if t.dtype not in types or t.shape != shape:
                raise ValueError(
                    f"{self._op}: expected state {name} of {list(shape)} in the type of its "
                    f"parameter or float32, got {list(t.shape)} of {t.dtype} for parameter {i}"
                )

    def _slots(self, i: int) -> list[Tensor | None]:
        p, group = self._params[i]
        held = self._state.get(p, {}) if p in self._state else {}
        return [
            held.get(name) if self._needs[group] >> slot & 1 else None
            for slot, name in enumerate(self._names)
        ]

    def _update(
        self, i: int, g: Tensor, options: tuple[Any, ...], update_clip: bool, stochastic: bool
    ) -> None:
        p, slots = self._params[i][0], self._slots(i)
        master, step = slots[_MASTER], slots[_STEP]
        taken = float(step) if step is not None else 0.0
        key = _key(i, taken) if stochastic else None
        real = [None if t is None else _real(t) for t in slots[:_MASTER]]
        lr, maximize, *numbers = float(options[0]), options[1], *options[2:]
        g = -g if maximize else g
        value = _real(p if master is None else master).to(g.dtype)
        if self._rule == 0:
            new = _adamw(value, g, real, lr, taken + 1.0, numbers, update_clip)
        else:
            new = _sgd(value, g, real, lr, taken == 0.0, numbers)
        for stream, (target, state) in enumerate(zip(real, new[1:], strict=False), 1):
            if target is not None and state is not None:
                _put(target, state, key, stream)
        assert new[0] is not None
        if master is not None:
            _real(master).copy_(new[0])
        _put(_real(p), new[0], key, 0)
        if step is not None:
            step += 1.0


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype in (torch.float64, torch.complex128) else torch.float32


def _real(t: Tensor) -> Tensor:
    t = t.detach()
    return torch.view_as_real(t) if t.is_complex() else t


def _adamw(
    x: Tensor,
    g: Tensor,
    state: list[Tensor | None],
    lr: float,
    step: float,
    numbers: list[float],
    update_clip: bool,
) -> tuple[Tensor | None, ...]:
    """(parameter, first moment, second moment, largest second moment) after the step."""
    beta1, beta2, eps, weight_decay = numbers
    first, second, largest = state
    assert first is not None
    assert second is not None
    correction1, correction2 = 1.0 - beta1**step, 1.0 - beta2**step
    m = first.to(g.dtype).lerp(g, 1.0 - beta1)
    v = second.to(g.dtype) * beta2 + g * g * (1.0 - beta2)
    if update_clip and g.numel():
        ratio = float((g * g / (v / correction2).clamp(min=eps * eps)).double().mean())
        lr /= max(1.0, math.sqrt(ratio))
    top = None if largest is None else torch.maximum(largest.to(g.dtype), v)
    root = (v if top is None else top).sqrt() / math.sqrt(correction2)
    return x * (1.0 - lr * weight_decay) - lr / correction1 * m / (root + eps), m, v, top


def _sgd(
    x: Tensor,
    g: Tensor,
    state: list[Tensor | None],
    lr: float,
    is_first: bool,
    numbers: list[float],
) -> tuple[Tensor | None, ...]:
    """(parameter, momentum buffer) after the step."""
    momentum, dampening, weight_decay, nesterov = numbers
    if weight_decay:
        g = g + x * weight_decay
    buffer = state[0]
    if buffer is None:
        return x - g * lr, None
    b = buffer.to(g.dtype) * momentum + g * (1.0 if is_first else 1.0 - dampening)
    return x - (g + b * momentum if nesterov else b) * lr, b
