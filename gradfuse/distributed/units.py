"""Adaptive clipping of DTensors: units whose parts lie on several ranks.

A unit is a row along the first dimension, or the whole of a vector or scalar. Where shards hold
whole units, as those of FSDP2 do of matrices, each rank clips its own. The norms of all others, of
weights and of gradients, are added up over the ranks in one all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradfuse import _native
from gradfuse._codes import Action
from gradfuse._records import ClipPlan
from gradfuse.distributed.locals import is_dtensor, local_gradient, local_of
from gradfuse.distributed.powers import norms_from, powers_of, slots_of
from gradfuse.distributed.ranks import ranks_of
from gradfuse.distributed.sums import summed

__all__ = ["adaptive_clip_over_ranks_"]

_WIDE = (torch.float64, torch.complex128)


class _Cut(NamedTuple):
    """A parameter whose units lie on several ranks."""

    param: int  # its place among the caller's
    rows: slice  # of the units that this rank has a part of, among those of all parameters


@torch.no_grad()
def adaptive_clip_over_ranks_(
    op: str,
    parameters: Sequence[Tensor],
    clip_factor: float,
    eps: float,
    norm_type: float,
    scale: Tensor | None = None,
) -> None:
    """Clips the gradients of DTensors, and of plain ones beside them, by their units. Collective.

    Args:
        scale: the loss scale that the gradients carry, or None.

    Raises:
        ValueError: the units of a parameter cannot be told, on all ranks.
        ValueError, TypeError, RuntimeError: this rank refuses a gradient; RuntimeError: another
            rank did. Nothing is written on any.
    """
    ranks = ranks_of(op, parameters)
    cuts, count = _cuts(op, parameters)
    slots = slots_of(norm_type, any(p.dtype in _WIDE for p in parameters))
    device = local_of(parameters[0]).device
    grads: list[Tensor | None] = []

    def powers() -> Tensor:
        grads.extend(_checked_gradients(op, parameters))
        out = torch.zeros(count, 2, len(slots), dtype=torch.float64, device=device)
        for cut in cuts:
            grad = grads[cut.param]
            if grad is not None and ranks.counted[cut.param]:
                for k, t in enumerate((local_of(parameters[cut.param]), grad)):
                    out[cut.rows, k] = powers_of(_norms_of(t, norm_type), norm_type, slots).to(out)
        return out

    largest = norm_type == float("inf")
    shape = (count, 2, len(slots))
    norms = norms_from(summed(op, ranks, shape, device, powers, largest), norm_type, slots)
    coefficients = _coefficients(norms, clip_factor, eps, scale)
    is_cut = {cut.param for cut in cuts}
    whole = [i for i, g in enumerate(grads) if g is not None and i not in is_cut]
    _native.backend.adaptive_clip_(
        [local_of(parameters[i]) for i in whole],
        [g for i in whole if (g := grads[i]) is not None],
        clip_factor,
        eps,
        norm_type,
        scale,
    )
    for cut in cuts:
        grad = grads[cut.param]
        if grad is not None and grad.numel():
            own = coefficients[cut.rows].to(grad.device)
            grad.mul_(own.reshape(-1, *[1] * (grad.ndim - 1)) if grad.ndim else own.squeeze())


def _cuts(op: str, parameters: Sequence[Tensor]) -> tuple[list[_Cut], int]:
    """The parameters whose units lie on several ranks, and the number of all these units."""
    cuts, count = [], 0
    for i, p in enumerate(parameters):
        if not is_dtensor(p):
            continue
        if any(placement.is_partial() for placement in p.placements):
            raise ValueError(
                f"{op}: expected parameters whose sum over ranks is done, got placements "
                f"{p.placements} for parameter {i}"
            )
        if not _is_cut(p):
            continue
        units, first, here = (p.shape[0], *_rows_of(op, p, i)) if p.ndim > 1 else (1, 0, 1)
        cuts.append(_Cut(i, slice(count + first, count + first + here)))
        count += units
    return cuts, count


def _dims(p: Any) -> list[int | None]:
    """The dimension of a DTensor that each dimension of its mesh splits, or None."""
    return [
        None if size == 1 or placement.is_replicate() else placement.dim
        for placement, size in zip(p.placements, p.device_mesh.shape, strict=True)
    ]


def _is_cut(p: Any) -> bool:
    return any(dim is not None and (p.ndim < 2 or dim != 0) for dim in _dims(p))


def _rows_of(op: str, p: Any, index: int) -> tuple[int, int]:
    """The first of the rows of which this rank has a part, and their number."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(
        dim == 0 and type(placement) is not Shard
        for dim, placement in zip(_dims(p), p.placements, strict=True)
    ):
        raise ValueError(
            f"{op}: expected rows that lie one after another on a rank, or whole ones, got "
            f"placements {p.placements} for parameter {index}; clip it by its norm"
        )
    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return (offset[0], shape[0]) if shape[0] else (0, 0)


def _checked_gradients(op: str, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The shards of gradients that this rank has, which can be clipped.

    Raises:
        ValueError, TypeError, RuntimeError: one cannot.
    """
    grads = [local_gradient(op, p, i) for i, p in enumerate(parameters)]
    keep = ClipPlan(0.0, 1.0, 0.0, float(Action.KEEP), 0.0, 0.0, 1.0, 0.0)
    plan = torch.tensor(keep, dtype=torch.float64, device="cpu")
    _native.backend.apply_(op, [g for g in grads if g is not None], plan)  # checks alone
    for i, (p, g) in enumerate(zip(parameters, grads, strict=True)):
        if g is not None and (g.is_sparse or g.shape != local_of(p).shape):
            raise ValueError(
                f"{op}: expected a dense gradient of the parameter's shape, got "
                f"{list(g.shape)} in {g.layout} for parameter {i}"
            )
    return grads


def _norms_of(t: Tensor, p: float) -> Tensor:
    """[rows] float64: the norms of the parts of units that a shard holds."""
    rows = t.shape[0] if t.ndim > 1 else 1
    if not t.numel():
        return torch.zeros(rows, dtype=torch.float64, device=t.device)
    magnitudes = t.detach().reshape(rows, -1).abs().to(torch.float64)
    largest = magnitudes.amax(1)
    divisor = torch.where((largest > 0.0) & largest.isfinite(), largest, 1.0)
    norms: Tensor = torch.linalg.vector_norm(magnitudes / divisor[:, None], p, dim=1)
    return divisor * norms


def _coefficients(norms: Tensor, clip_factor: float, eps: float, scale: Tensor | None) -> Tensor:
    """[units]: unit_coefficient of csrc/math/adaptive_clip.h, for the norms [units, 2] of weights
    and gradients (Brock et al. 2021, equation 3)."""
    one = torch.ones((), dtype=norms.dtype, device=norms.device)
    of_scale = one if scale is None else scale.reshape(()).to(norms)
    of_weight, of_grad = norms.unbind(1)
    limit = clip_factor * of_scale * torch.where(of_weight < eps, eps, of_weight)
    least = 1e-6 * of_scale
    clipped = limit / torch.where(of_grad < least, least, of_grad)
    coefficients: Tensor = torch.where(of_grad <= limit, 1.0, clipped)
    return coefficients
