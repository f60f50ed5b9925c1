"""Gradient clipping in plain torch.

Everything is computed in float64 after dividing by the largest magnitude, so that no finite
gradient overflows or vanishes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from gradfuse.reference.gradients import check_gradients, magnitudes, read_tensors

KEEP, SCALE, ZERO, REFUSE, SKIP = range(5)
PROPAGATE, ERROR, ZERO_GRADIENTS, SKIP_STEP = range(4)

Result = tuple[Tensor, Tensor, Tensor]


def scaled_norm(x: Tensor, p: float) -> tuple[float, float]:
    """(s, v) such that the p-norm of x is s * v, with s the largest magnitude or 1."""
    a = magnitudes(x)
    amax = float(a.max()) if a.numel() else 0.0
    if amax == 0.0 or not math.isfinite(amax) or math.isinf(p):
        return 1.0, amax
    v = float(torch.linalg.vector_norm(a / amax, p))
    if math.isinf(v):  # a small p: the norm of finite values is beyond float64
        half = 2.0 ** (math.log2(float((a / amax).pow(p).sum())) / p / 2)
        return amax * half, half
    return amax, v


def combine_norms(norms: list[tuple[float, float]], p: float) -> tuple[float, float]:
    """The norm of the concatenation, from the norms of the parts."""
    top = max((s for s, v in norms if v != 0.0), default=1.0)
    parts = torch.tensor([s / top * v if v else 0.0 for s, v in norms], dtype=torch.float64)
    s, v = scaled_norm(parts, p)
    return top, s * v


def clip_plan(
    norm: tuple[float, float], max_norm: float, policy: int
) -> tuple[float, list[float], float, int]:
    """(norm, steps, norm after clipping, action): min(1, max_norm / (norm + 1e-6)).

    The coefficient is the product of the steps.

    A finite norm <= max_norm leaves the gradients alone.
    """
    s, v = norm
    wide = s * v
    if math.isfinite(v):
        if wide <= max_norm:
            return wide, [1.0], wide, KEEP
        steps = [max_norm / (wide + 1e-6)]
        if not math.isfinite(wide):
            steps = [2.0**-600, max_norm / (s * 2.0**-600) / v]
        elif steps[0] < 2.0**-1022:  # float64 has no room for it
            steps = [2.0**-600, max_norm / ((wide + 1e-6) * 2.0**-600)]
        return wide, steps, s * steps[0] * (v * steps[-1] if steps[1:] else v), SCALE
    if policy == ZERO_GRADIENTS:
        return wide, [0.0], 0.0, ZERO
    if policy == ERROR:
        return wide, [1.0], wide, REFUSE
    if policy == SKIP_STEP:
        return wide, [1.0], wide, SKIP
    ratio = max_norm / (wide + 1e-6)
    coefficient = 1.0 if ratio > 1.0 else ratio
    return wide, [coefficient], wide * coefficient, SCALE


def scale_tensor_(x: Tensor, steps: list[float]) -> None:
    """x *= product of steps, computed in float64."""
    wide = torch.complex128 if x.is_complex() else torch.float64
    scaled = x.to(wide)
    for step in steps:
        scaled = scaled * step
    x.copy_(scaled)


@torch.no_grad()
def _result(
    op: str,
    tensors: list[Tensor | None],
    grads: list[tuple[int, Tensor]],
    max_norm: float,
    p: float,
    policy: int,
    scale: float = 1.0,
    found_inf: bool = False,
) -> tuple[Result, list[float], int]:
    """The result, the steps of the factor and the action.

    Norms are of the gradients without their loss scale, which the factor takes off.
    """
    device = grads[0][1].device if grads else torch.device("cpu")
    any_double = any(g.dtype in (torch.float64, torch.complex128) for _, g in grads)
    table = [[0.0, 0.0, 0.0, 0.0, -1.0] for _ in tensors]
    for row, g in grads:
        s, v = scaled_norm(g, 2.0)
        a = magnitudes(g)
        table[row] = [
            s * v / scale,
            float(a.max()) / scale if a.numel() else 0.0,
            float((~a.isfinite()).sum()),
            float((a == 0).sum()),
            float(g.numel()),
        ]
    norm = combine_norms([scaled_norm(g, p) for _, g in grads], p)
    norm = (norm[0], norm[1] / scale)
    wide, steps, clipped, action = clip_plan(norm, max_norm, policy)
    action = SKIP if found_inf else action
    if action == REFUSE:
        raise RuntimeError(
            f"{op}: expected a finite total norm of order {p:g}, got {wide}; nothing was "
            'written (nonfinite="propagate" or "zero" would go on; a GradReport names the layer)'
        )
    totals = torch.tensor(
        [wide, math.prod(steps), clipped, action, norm[1], 0.0, math.prod(steps) / scale, 0.0],
        dtype=torch.float64,
        device=device,
    )
    total_norm = totals[0].clone().to(torch.float64 if any_double else torch.float32)
    rows = torch.tensor(table, dtype=torch.float64, device=device).reshape(-1, 5)
    return (total_norm, totals, rows), steps, action


def measure(
    op: str,
    tensors: list[Tensor | None],
    grads: list[tuple[int, Tensor]],
    max_norm: float,
    p: float,
    policy: int,
    scale: float = 1.0,
    found_inf: bool = False,
) -> Result:
    """The norm, the totals of the plan, and the table; nothing is written."""
    return _result(op, tensors, grads, max_norm, p, policy, scale, found_inf)[0]


def _apply(grads: list[tuple[int, Tensor]], steps: list[float], action: int) -> None:
    for _, g in grads:
        if action == ZERO:
            g.zero_()
        elif action == SCALE:
            scale_tensor_(g, steps)


def stats(tensors: Iterable[Tensor], of_grad: bool, norm_type: float, nonfinite: int) -> Result:
    listed = read_tensors("get_total_norm", tensors, of_grad)
    grads = check_gradients("get_total_norm", listed, writes=False)
    return _result("get_total_norm", listed, grads, math.inf, norm_type, nonfinite)[0]


@torch.no_grad()
def clip_(
    tensors: Iterable[Tensor], of_grad: bool, max_norm: float, norm_type: float, nonfinite: int
) -> Result:
    listed = read_tensors("clip_grad_norm_", tensors, of_grad)
    grads = check_gradients("clip_grad_norm_", listed, writes=True)
    result, steps, action = _result(
        "clip_grad_norm_", listed, grads, max_norm, norm_type, nonfinite
    )
    _apply(grads, steps, action)
    return result


@torch.no_grad()
def scale_(tensors: Iterable[Tensor], of_grad: bool, max_norm: float, total_norm: Tensor) -> None:
    op = "clip_grads_with_norm_"
    grads = check_gradients(op, read_tensors(op, tensors, of_grad), writes=True)
    if total_norm.numel() != 1 or total_norm.is_complex():
        raise ValueError(
            f"{op}: total_norm must be one real number, got {list(total_norm.shape)} of "
            f"{total_norm.dtype} on {total_norm.device}"
        )
    plan = clip_plan((1.0, float(total_norm)), max_norm, PROPAGATE)
    _apply(grads, plan[1], plan[3])


@torch.no_grad()
def clamp_(tensors: Iterable[Tensor], of_grad: bool, clip_value: float) -> None:
    op = "clip_grad_value_"
    grads = check_gradients(op, read_tensors(op, tensors, of_grad), writes=True)
    for i, g in grads:
        if g.is_complex():
            raise TypeError(
                f"{op}: expected real gradients, which have an order, got {g.dtype} for tensor {i}"
            )
    for _, g in grads:
        bound = torch.tensor(clip_value, dtype=torch.float64).to(g)  # rounded; inf beyond the dtype
        g.clamp_(-bound, bound)


class ParameterList:
    """Parameters held between calls."""

    def __init__(self) -> None:
        self._parameters: list[Tensor] = []

    def add(self, parameter: Tensor) -> None:
        self._parameters.append(parameter)

    def clip_(self, max_norm: float, norm_type: float, nonfinite: int) -> Result:
        return clip_(self._parameters, True, max_norm, norm_type, nonfinite)

    @torch.no_grad()
    def measure(self, max_norm: float, norm_type: float, nonfinite: int) -> Result:
        listed = [p.grad for p in self._parameters]
        grads = check_gradients("GradClipper", listed, writes=True)
        return measure("GradClipper", listed, grads, max_norm, norm_type, nonfinite)

    @torch.no_grad()
    def apply_(self, totals: Tensor, coefficients: Tensor | None) -> None:
        grads = check_gradients("GradClipper", [p.grad for p in self._parameters], writes=True)
        action, factor = int(totals[3]), float(totals[6])
        for i, g in grads:
            own = factor if coefficients is None else factor * float(coefficients[i])
            if action == ZERO:
                g.zero_()
            elif action in (KEEP, SCALE) and own != 1.0:
                scale_tensor_(g, [own])

    def clamp_(self, clip_value: float) -> None:
        clamp_(self._parameters, True, clip_value)
