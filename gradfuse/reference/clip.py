"""Gradient clipping in plain torch.

Everything is computed in float64 after dividing by the largest magnitude, so that no finite
gradient overflows or vanishes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from gradfuse._codes import Action, NonFinite
from gradfuse._records import ClipPlan, ClipResult, TensorStats
from gradfuse.reference.exact import ExactSum, exact_sum
from gradfuse.reference.gradients import (
    Access,
    GradList,
    check_gradients,
    magnitudes,
    read_tensors,
)


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
    parts = torch.tensor(
        [s / top * v if v else 0.0 for s, v in norms], dtype=torch.float64, device="cpu"
    )
    s, v = scaled_norm(parts, p)
    return top, s * v


class Scaling(NamedTuple):
    """What a clip multiplies by, and what comes of it."""

    norm: float
    steps: list[float]  # the coefficient is their product, which may be too small for float64
    clipped_norm: float
    action: Action


def scaling_of(norm: tuple[float, float], max_norm: float, nonfinite: int) -> Scaling:
    """min(1, max_norm / (norm + 1e-6)), for a norm as scaled_norm gives it.

    A finite norm <= max_norm leaves the gradients alone.
    """
    s, v = norm
    wide = s * v
    if math.isfinite(v):
        if wide <= max_norm:
            return Scaling(wide, [1.0], wide, Action.KEEP)
        steps = [max_norm / (wide + 1e-6)]
        if not math.isfinite(wide):
            steps = [2.0**-600, max_norm / (s * 2.0**-600) / v]
        elif steps[0] < 2.0**-1022:
            steps = [2.0**-600, max_norm / ((wide + 1e-6) * 2.0**-600)]
        clipped_norm = s * steps[0] * (v * steps[-1] if steps[1:] else v)
        return Scaling(wide, steps, clipped_norm, Action.SCALE)
    if nonfinite == NonFinite.ZERO:
        return Scaling(wide, [0.0], 0.0, Action.ZERO)
    if nonfinite == NonFinite.ERROR:
        return Scaling(wide, [1.0], wide, Action.REFUSE)
    if nonfinite == NonFinite.SKIP:
        return Scaling(wide, [1.0], wide, Action.SKIP)
    ratio = max_norm / (wide + 1e-6)
    coefficient = 1.0 if ratio > 1.0 else ratio
    return Scaling(wide, [coefficient], wide * coefficient, Action.SCALE)


def scale_tensor_(x: Tensor, steps: list[float]) -> None:
    """x *= product of steps, computed in float64."""
    wide = torch.complex128 if x.is_complex() else torch.float64
    scaled = x.to(wide)
    for step in steps:
        scaled = scaled * step
    x.copy_(scaled)


def _stats_of(grad: Tensor, scale: float) -> TensorStats[float]:
    s, v = scaled_norm(grad, 2.0)
    a = magnitudes(grad)
    return TensorStats(
        norm=s * v / scale,
        largest=float(a.max()) / scale if a.numel() else 0.0,
        nonfinite=float((~a.isfinite()).sum()),
        zeros=float((a == 0).sum()),
        numel=float(grad.numel()),
    )


@torch.no_grad()
def planned(
    op: str,
    tensors: list[Tensor | None],
    grads: GradList,
    max_norm: float,
    p: float,
    nonfinite: int,
    scale: float = 1.0,
    found_inf: bool = False,
    exact: bool = False,
) -> tuple[ClipResult, Scaling]:
    """Measures and plans a clip; nothing is written.

    Norms are of the gradients without their loss scale, which the plan's factor takes off.
    """
    stats = stats_of_all(tensors, grads, scale)
    norm: tuple[float, float] | ExactSum
    if exact:
        norm = exact_sum(g for _, g in grads.each)
    else:
        norm = combine_norms([scaled_norm(g, p) for _, g in grads.each], p)
    total_norm, plan, scaling = decided(
        op, norm, max_norm, p, nonfinite, scale, found_inf, is_wide(grads), stats.device
    )
    return ClipResult(total_norm, plan, stats), scaling


def is_wide(grads: GradList) -> bool:
    """Whether any is float64."""
    return any(g.dtype in (torch.float64, torch.complex128) for _, g in grads.each)


def stats_of_all(tensors: list[Tensor | None], grads: GradList, scale: float) -> Tensor:
    """The statistics of a ClipResult."""
    device = grads.each[0][1].device if grads.each else torch.device("cpu")
    rows = [TensorStats.absent() for _ in tensors]
    for row, g in grads.each:
        rows[row] = _stats_of(g, scale)
    for row, first in grads.repeats:
        rows[row] = rows[first]
    stats = torch.tensor(rows, dtype=torch.float64, device=device)
    return stats.reshape(-1, len(TensorStats._fields))


def decided(
    op: str,
    measured: tuple[float, float] | ExactSum,
    max_norm: float,
    p: float,
    nonfinite: int,
    scale: float,
    found_inf: bool,
    wide: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor, Scaling]:
    """The norm, the plan and its scaling for a norm as scaled_norm gives it, or an exact sum."""
    norm = measured.root() if isinstance(measured, ExactSum) else measured
    scaling = scaling_of((norm[0], norm[1] / scale), max_norm, nonfinite)
    if found_inf:
        scaling = scaling._replace(action=Action.SKIP)
    if scaling.action == Action.REFUSE:
        raise RuntimeError(
            f"{op}: expected a finite total norm of order {p:g}, got {scaling.norm}; nothing was "
            'written (nonfinite="propagate" or "zero" would go on; a GradReport names the layer)'
        )
    coefficient = math.prod(scaling.steps)
    power, exponent = _power_of(norm, p)
    fields = ClipPlan(
        norm=scaling.norm,
        coefficient=coefficient,
        clipped_norm=scaling.clipped_norm,
        action=float(scaling.action),
        sum=power,
        sum_exponent=exponent,
        factor=coefficient / scale,
        factor_exponent=0.0,
    )
    plan = torch.tensor(fields, dtype=torch.float64, device=device)
    total = ClipPlan.of(plan).norm.clone()
    if isinstance(measured, ExactSum) and not wide and scale == 1.0:  # rounded once
        total.fill_(math.prod(measured.root(24, -149)))
    return total.to(torch.float64 if wide else torch.float32), plan, scaling


def _power_of(norm: tuple[float, float], p: float) -> tuple[float, float]:
    """(sum, exponent) such that the sum of p-th powers is sum * 2**(p * exponent); for p = inf the
    largest magnitude and 0."""
    s, v = norm
    if math.isinf(p):
        return s * v, 0.0
    if not math.isfinite(v):
        return v, 0.0
    mantissa, exponent = math.frexp(s)
    return float((mantissa * v) ** p), float(exponent)


@torch.no_grad()
def apply_(
    op: str, tensors: Iterable[Tensor], plan: Tensor, coefficients: Tensor | None = None
) -> None:
    grads = check_gradients(op, read_tensors(op, tensors, False), Access.WRITE)
    _follow(grads, plan, coefficients)


def _follow(grads: GradList, plan: Tensor, coefficients: Tensor | None) -> None:
    """Does what the plan says, times a coefficient for each gradient if given."""
    fields = ClipPlan.read(plan)
    for i, g in grads.each:
        own = fields.factor if coefficients is None else fields.factor * float(coefficients[i])
        if fields.action == Action.ZERO:
            g.zero_()
        elif fields.action in (Action.KEEP, Action.SCALE) and own != 1.0:
            scale_tensor_(g, [own])


def _apply(grads: GradList, scaling: Scaling) -> None:
    for _, g in grads.each:
        if scaling.action == Action.ZERO:
            g.zero_()
        elif scaling.action == Action.SCALE:
            scale_tensor_(g, scaling.steps)


def stats(
    tensors: Iterable[Tensor],
    of_grad: bool,
    norm_type: float,
    nonfinite: int,
    exact: bool = False,
) -> ClipResult:
    op = "get_total_norm"
    listed = read_tensors(op, tensors, of_grad)
    grads = check_gradients(op, listed, Access.READ)
    return planned(op, listed, grads, math.inf, norm_type, nonfinite, exact=exact)[0]


@torch.no_grad()
def clip_(
    tensors: Iterable[Tensor],
    of_grad: bool,
    max_norm: float,
    norm_type: float,
    nonfinite: int,
    exact: bool = False,
) -> ClipResult:
    op = "clip_grad_norm_"
    listed = read_tensors(op, tensors, of_grad)
    grads = check_gradients(op, listed, Access.WRITE)
    result, scaling = planned(op, listed, grads, max_norm, norm_type, nonfinite, exact=exact)
    _apply(grads, scaling)
    return result


@torch.no_grad()
def scale_(tensors: Iterable[Tensor], of_grad: bool, max_norm: float, total_norm: Tensor) -> None:
    op = "clip_grads_with_norm_"
    grads = check_gradients(op, read_tensors(op, tensors, of_grad), Access.WRITE)
    if total_norm.numel() != 1 or total_norm.is_complex():
        raise ValueError(
            f"{op}: total_norm must be one real number, got {list(total_norm.shape)} of "
            f"{total_norm.dtype} on {total_norm.device}"
        )
    _apply(grads, scaling_of((1.0, float(total_norm)), max_norm, NonFinite.PROPAGATE))


@torch.no_grad()
def clamp_(tensors: Iterable[Tensor], of_grad: bool, clip_value: float) -> None:
    op = "clip_grad_value_"
    grads = check_gradients(op, read_tensors(op, tensors, of_grad), Access.WRITE)
    for i, g in grads.each:
        if g.is_complex():
            raise TypeError(
                f"{op}: expected real gradients, which have an order, got {g.dtype} for tensor {i}"
            )
    for _, g in grads.each:
        bound = torch.tensor(clip_value, dtype=torch.float64, device="cpu").to(g)  # may be inf
        g.clamp_(-bound, bound)


class ParameterList:
    """Parameters kept between calls."""

    def __init__(self) -> None:
        self._parameters: list[Tensor] = []

    def add(self, parameter: Tensor) -> None:
        self._parameters.append(parameter)

    def clip_(
        self, max_norm: float, norm_type: float, nonfinite: int, exact: bool = False
    ) -> ClipResult:
        return clip_(self._parameters, True, max_norm, norm_type, nonfinite, exact)

    def measure(
        self, max_norm: float, norm_type: float, nonfinite: int, exact: bool = False
    ) -> ClipResult:
        op, listed = "GradClipper", [p.grad for p in self._parameters]
        grads = check_gradients(op, listed, Access.READ_ONCE)
        return planned(op, listed, grads, max_norm, norm_type, nonfinite, exact=exact)[0]

    @torch.no_grad()
    def apply_(self, plan: Tensor, coefficients: Tensor | None) -> None:
        grads = check_gradients("GradClipper", [p.grad for p in self._parameters], Access.WRITE)
        _follow(grads, plan, coefficients)

    def clamp_(self, clip_value: float) -> None:
        clamp_(self._parameters, True, clip_value)
