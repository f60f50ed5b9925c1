"""Adaptive gradient clipping in plain torch, in float64 after dividing by the largest magnitude."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gradfuse.reference.gradients import Access, check_gradients, magnitudes, read_tensors


def unit_norms(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """(s, v) such that s * v are the norms of x's units, with s the largest magnitudes or 1.

    A unit is a row along the first dimension, or the whole of a vector; Brock et al. 2021, 4.1.
    """
    a = magnitudes(x.reshape(1, -1) if x.ndim <= 1 else x.reshape(x.shape[0], -1))
    s = a.amax(dim=1)
    s = torch.where((s > 0) & s.isfinite(), s, torch.ones_like(s))
    return s, torch.linalg.vector_norm(a / s[:, None], p, dim=1)


def adaptive_clip_tensor_(
    weight: Tensor, grad: Tensor, factor: float, eps: float, p: float, scale: float
) -> None:
    """Scales each unit of grad / scale to a norm of at most factor * max(weight norm, eps)."""
    if grad.numel() == 0:
        return
    ws, wv = unit_norms(weight, p)
    gs, gv = unit_norms(grad, p)
    small = ws * wv < eps
    ws, wv = ws.masked_fill(small, 1.0), wv.masked_fill(small, eps)
    keep = gv * (gs / ws) <= factor * scale * wv
    least = 1e-6 * scale
    tiny = gs * gv < least
    gs, gv = gs.masked_fill(tiny, 1.0), gv.masked_fill(tiny, least)
    shape = (-1, *[1] * (grad.ndim - 1)) if grad.ndim > 1 else (1,) * grad.ndim
    scaled = grad.to(torch.complex128 if grad.is_complex() else torch.float64)
    # In three steps: the whole coefficient may be too small for float64.
    for step in (1.0 / gs, factor * scale * wv / gv, ws):
        scaled = scaled * step.reshape(shape)
    grad.copy_(torch.where(keep.reshape(shape), grad, scaled.to(grad.dtype)))


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
    for i, (w, g) in enumerate(zip(listed_weights, listed, strict=True)):
        if g is not None and w is not None and torch.sparse_coo in (g.layout, w.layout):
            raise TypeError(
                f"{op}: expected dense weights and gradients, got a sparse one for parameter {i}; "
                "clip it by its norm"
            )
    pairs = check_gradients(op, listed, Access.WRITE).each
    for i, g in pairs:
        w = listed_weights[i]
        assert w is not None
        if w.shape != g.shape or w.device != g.device:
            raise ValueError(
                f"{op}: expected a gradient of the parameter's shape and device, got "
                f"{list(g.shape)} on {g.device} for {list(w.shape)} on {w.device}, parameter {i}"
            )
    check_gradients(op, [listed_weights[i] for i, _ in pairs], Access.READ)
    for i, g in pairs:
        w = listed_weights[i]
        assert w is not None
        adaptive_clip_tensor_(
            w, g, clip_factor, eps, norm_type, 1.0 if scale is None else float(scale)
        )
