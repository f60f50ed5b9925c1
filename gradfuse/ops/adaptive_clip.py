"""Adaptive gradient clipping: each unit's gradient is bounded by its weight."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gradfuse import _native
from gradfuse._native import define_op
from gradfuse.distributed import has_dtensor
from gradfuse.distributed.units import adaptive_clip_over_ranks_
from gradfuse.ops.checks import as_sequence, check_nonnegative, check_norm_type, grads_of

__all__ = ["adaptive_clip_grad_"]


def adaptive_clip_grad_(
    parameters: Tensor | Iterable[Tensor],
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    norm_type: float = 2.0,
) -> None:
    """Adaptive gradient clipping: bounds each unit's gradient by its weight.

    A unit is a row along the first dimension, or the whole of a vector or scalar, as in timm's agc.
    Its gradient is scaled to a norm of at most clip_factor * max(norm of the weights, eps). Weights
    and gradients are read once; only the units that are clipped are read again and written.

    DTensors are clipped by their whole units, with one all-reduce, which all ranks of their meshes
    must call; plain tensors beside them are copies.

    Args:
        parameters: iterable of Tensors or one; those without gradient are skipped.
        clip_factor: largest ratio of gradient norm to weight norm, >= 0.
        eps: least weight norm, >= 0, so that zero weights can learn.
        norm_type: p > 0, or inf.

    Raises:
        ValueError: an argument is out of range, or a gradient has another shape than its parameter.
            Or a gradient is distributed in another way than its parameter, or the parameter so that
            its units cannot be told.
        TypeError, RuntimeError: as clip_grad_norm_.

    Source: Brock, De, Smith, Simonyan 2021, "High-Performance Large-Scale Image Recognition
    Without Normalization", equation 3.
    """
    op = "adaptive_clip_grad_"
    clip_factor = check_nonnegative(op, "clip_factor", clip_factor)
    eps = check_nonnegative(op, "eps", eps)
    norm_type = check_norm_type(op, norm_type)
    parameters = as_sequence(op, parameters)
    if has_dtensor(parameters) and not torch.compiler.is_compiling():
        _native.refuse_tracing(op)
        adaptive_clip_over_ranks_(op, parameters, clip_factor, eps, norm_type)
    elif _native.is_traced_in_place(op):
        owners = [p for p in parameters if p.grad is not None]
        torch.ops.gradfuse.adaptive_clip_grads_(
            [p.detach() for p in owners], grads_of(owners), clip_factor, eps, norm_type
        )
    else:
        _native.backend.adaptive_clip_(parameters, None, clip_factor, eps, norm_type)


define_op(
    "adaptive_clip_grads_(Tensor[] weights, Tensor(a!)[] grads, float clip_factor, float eps,"
    " float norm_type) -> ()",
    lambda weights, grads, clip_factor, eps, norm_type: _native.backend.adaptive_clip_(
        weights, grads, clip_factor, eps, norm_type
    ),
    lambda weights, grads, clip_factor, eps, norm_type: None,
)
