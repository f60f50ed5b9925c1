"""Gradient clipping in plain torch.

Everything is computed in float64 after dividing by the largest magnitude, so that no finite
gradient overflows or vanishes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

KEEP, SCALE, ZERO, REFUSE, SKIP = range(5)
PROPAGATE, ERROR, ZERO_GRADIENTS, SKIP_STEP = range(4)
_DTYPES = {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
}

Result = tuple[Tensor, Tensor, Tensor]


def magnitudes(x: Tensor) -> Tensor:
    """|x| as float64, of the same shape."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64).abs()


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


def unit_norms(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """(s, v) such that s * v are the norms of x's units, with s the largest magnitudes or 1.

    A unit is a row along the first dimension, or the whole of a vector; Brock et al. 2021, 4.1.
    """
    a = magnitudes(x.reshape(1, -1) if x.ndim <= 1 else x.reshape(x.shape[0], -1))
    s = a.amax(dim=1)
    s = torch.where((s > 0) & s.isfinite(), s, torch.ones_like(s))
    return s, torch.linalg.vector_norm(a / s[:, None], p, dim=1)


def adaptive_clip_tensor_(
    weight: Tensor, grad: Tensor, factor: float, eps: float, p: float
) -> None:
    """Scales each unit of grad to a norm of at most factor * max(weight norm, eps)."""
    if grad.numel() == 0:
        return
    ws, wv = unit_norms(weight, p)
    gs, gv = unit_norms(grad, p)
    small = ws * wv < eps
    ws, wv = ws.masked_fill(small, 1.0), wv.masked_fill(small, eps)
    keep = gv * (gs / ws) <= factor * wv
    tiny = gs * gv < 1e-6
    gs, gv = gs.masked_fill(tiny, 1.0), gv.masked_fill(tiny, 1e-6)
    shape = (-1, *[1] * (grad.ndim - 1)) if grad.ndim > 1 else (1,) * grad.ndim
    scaled = grad.to(torch.complex128 if grad.is_complex() else torch.float64)
    # In three steps: the whole coefficient may be too small for float64.
    for step in (1.0 / gs, factor * wv / gv, ws):
        scaled = scaled * step.reshape(shape)
    grad.copy_(torch.where(keep.reshape(shape), grad, scaled.to(grad.dtype)))


def read_tensors(op: str, tensors: Tensor | Iterable[Tensor], of_grad: bool) -> list[Tensor | None]:
    """The tensors, or their gradients, None where there is none."""
    items = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for i, t in enumerate(items):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: expected tensors, got {type(t).__name__} for tensor {i}")
    return [t.grad if of_grad else t for t in items]


def layout_of(x: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions in order of stride, adjoining ones as one."""
    dims: list[tuple[int, int]] = []
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if dims and dims[-1][0] * dims[-1][1] == stride:
            dims[-1] = (dims[-1][0], dims[-1][1] * size)
        else:
            dims.append((stride, size))
    return dims


def check_gradients(
    op: str, tensors: list[Tensor | None], writes: bool
) -> list[tuple[int, Tensor]]:
    """(row, gradient) of every gradient, a repeated one once if it may be written."""
    found: list[tuple[int, Tensor]] = []
    seen: dict[int, object] = {}
    for i, t in enumerate(tensors):
        if t is None:
            continue
        if t.dtype not in _DTYPES:
            raise TypeError(
                f"{op}: expected float16, bfloat16, float32, float64, complex64 or complex128, "
                f"got {t.dtype} for tensor {i}"
            )
        if t.is_nested or t.layout != torch.strided:
            raise TypeError(
                f"{op}: expected dense gradients, got layout {t.layout} for tensor {i}; "
                "convert it with .to_dense() or clip it apart"
            )
        if t.device.type == "meta":
            raise TypeError(f"{op}: expected gradients with memory, got meta for tensor {i}")
        if t.numel() == 0:
            found.append((i, t))
            continue
        if type(t) in (Tensor, torch.nn.Parameter):
            last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            needed = (t.storage_offset() + last + 1) * t.element_size()
            if t.untyped_storage().nbytes() < needed:
                raise RuntimeError(
                    f"{op}: expected storage of at least {needed} bytes, got "
                    f"{t.untyped_storage().nbytes()} for tensor {i}; was it resized or freed?"
                )
        if writes and any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True)):
            raise RuntimeError(
                f"{op}: expected gradients with an element per memory location, got an expanded "
                f"one for tensor {i}; .clone() it first"
            )
        if writes:
            address = t.data_ptr() if type(t) in (Tensor, torch.nn.Parameter) else id(t)
            extent = (t.dtype, t.numel(), layout_of(t))
            if seen.get(address, extent) != extent:
                raise RuntimeError(
                    f"{op}: expected gradients that do not overlap in memory, got one that begins "
                    f"where another does for tensor {i}; .clone() it first"
                )
            if address in seen:
                continue
            seen[address] = extent
        found.append((i, t))
    return found


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


@torch.no_grad()
def adaptive_clip_(
    weights: Iterable[Tensor],
    grads: Iterable[Tensor] | None,
    clip_factor: float,
    eps: float,
    norm_type: float,
    scale: Tensor | None = None,
) -> None:
    op = "adaptive_clip_grad_"
    listed_weights = read_tensors(op, weights, False)
    listed = read_tensors(op, listed_weights if grads is None else grads, grads is None)  # type: ignore[arg-type]
    if len(listed) != len(listed_weights):
        raise ValueError(
            f"{op}: expected a gradient for each parameter, got {len(listed)} for "
            f"{len(listed_weights)}"
        )
    pairs = check_gradients(op, listed, writes=True)
    for i, g in pairs:
        w = listed_weights[i]
        assert w is not None
        if w.shape != g.shape or w.device != g.device:
            raise ValueError(
                f"{op}: expected a gradient of the parameter's shape and device, got "
                f"{list(g.shape)} on {g.device} for {list(w.shape)} on {w.device}, parameter {i}"
            )
    check_gradients(op, [listed_weights[i] for i, _ in pairs], writes=False)
    for i, g in pairs:
        w = listed_weights[i]
        assert w is not None
        factor = clip_factor if scale is None else clip_factor * float(scale)
        adaptive_clip_tensor_(w, g, factor, eps, norm_type)


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
