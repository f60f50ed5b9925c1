"""Gradient clipping: torch.nn.utils' functions, right over the whole range of every dtype."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gradfuse import _native
from gradfuse._codes import NonFinite
from gradfuse._native import define_op
from gradfuse._records import ClipPlan, ClipResult, TensorStats
from gradfuse.distributed import Group, ReplicatedOver, has_dtensor, is_dtensor
from gradfuse.distributed.norm import plan_over_ranks
from gradfuse.distributed.shares import Shares, shares_of
from gradfuse.ops.checks import (
    CLIP_NONFINITE,
    as_sequence,
    check_exact,
    check_max_norm,
    check_nonfinite,
    check_nonnegative,
    check_norm_type,
    grads_of,
)

__all__ = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    exact: bool = False,
    group: Group | None = None,
    replicated_over: ReplicatedOver | None = None,
) -> Tensor:
    """Norm of all tensors, taken as one vector; one that is given twice counts twice.

    Right over the whole finite range of every dtype: accumulated in float64 across blocks, with
    a power-of-two scale where a square would overflow or vanish.

    Args:
        tensors: iterable of Tensors or one, any shapes and strides; float16, bfloat16, float32,
            float64, complex64 or complex128, any mix of dtypes and devices.
        norm_type: p > 0, or inf. Strings such as "inf" are converted, as in torch.
        error_if_nonfinite: raise instead of returning nan or inf. On CUDA this waits.
        foreach: accepted for torch's signature; all paths are fused.
        exact: the correctly rounded square root of the exact sum of squares: the same bits for any
            order, split and number of ranks. Slower, and only for norm_type 2.
        group: ranks over which tensors are disjoint, beyond what the meshes of DTensors say: with
            ZeRO, pipeline stages, shards made by hand. A ProcessGroup or a DeviceMesh of one
            dimension. None: DTensors count over their meshes; plain tensors count on this rank
            alone, or beside DTensors once, as copies.
        replicated_over: ranks over which all tensors are copies that count once, or a mapping from
            such groups to the tensors for which that holds.

    Returns:
        0-d float32 Tensor (float64 if any input is), on the first tensor's device. Unit: that of
        the inputs. A norm beyond float32 is returned as inf though it is used in full for clipping.
        Over ranks a plain Tensor, with the same bits on each.

    Raises:
        RuntimeError: error_if_nonfinite is set and the norm is nan or inf. Or another rank refused
            its tensors; or a call over ranks is traced.
        ValueError: norm_type is not > 0, or not 2 with exact; a DTensor is Partial; or meshes and
            groups do not fit.
        TypeError: an input is no tensor, is neither dense nor sparse COO, of an integer dtype or on
            another device.

    Source: Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural
    networks", Algorithm 1; Blue 1978, "A portable Fortran program to find the Euclidean norm of a
    vector".
    """
    op = "get_total_norm"
    norm_type = check_norm_type(op, norm_type)
    check_exact(op, exact, norm_type)
    code = NonFinite.ERROR if error_if_nonfinite else NonFinite.PROPAGATE
    tensors = as_sequence(op, tensors)
    if (shares := _shares(op, tensors, False, group, replicated_over)) is not None:
        return plan_over_ranks(op, shares, math.inf, norm_type, code, False, exact).norm
    if _native.is_traced():
        norm: Tensor = torch.ops.gradfuse.grad_stats(list(tensors), norm_type, code, exact)[0]
        return norm
    return _native.backend.stats(tensors, False, norm_type, code, exact)[0]


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    nonfinite: str = "propagate",
    exact: bool = False,
    group: Group | None = None,
    replicated_over: ReplicatedOver | None = None,
) -> Tensor:
    """Scales the gradients in place so that their norm, as one vector, is at most max_norm.

    The factor is min(1, max_norm / (norm + 1e-6)), from the float64 norm. Where the norm is at
    most max_norm every gradient is read once and none is written; else there is one more read and
    one write. A gradient that appears twice (tied parameters) counts and is scaled once.

    Args:
        parameters: iterable of Tensors or one, whose .grad is clipped; None gradients are skipped.
        max_norm: upper bound of the norm, >= 0; inf only measures, 0 sets all gradients to 0 and
            warns.
        norm_type: p > 0, or inf.
        error_if_nonfinite: the same as nonfinite="error".
        foreach: accepted for torch's signature; all paths are fused.
        nonfinite: what a NaN or inf gradient does. "propagate": as in torch, the gradients become
            NaN or 0. "error": RuntimeError, nothing is written. "zero": all gradients become 0.
            Over ranks, what one has acts on all alike.
        exact: clip by the correctly rounded square root of the exact sum of squares: the same bits
            for any order, split and number of ranks. Slower, and only for norm_type 2.
        group: ranks over which gradients are disjoint, beyond what the meshes of DTensors say:
            with ZeRO, pipeline stages, shards made by hand. A ProcessGroup or a DeviceMesh of one
            dimension. None: DTensors count over their meshes; plain gradients count on this rank
            alone, or beside DTensors once, as copies.
        replicated_over: ranks over which all gradients are copies that count once, or a mapping
            from such groups to the parameters for which that holds.

    Returns:
        The norm before clipping, as get_total_norm returns it.

    Raises:
        RuntimeError: nonfinite="error" and the norm is nan or inf; or a gradient is expanded, so
            that several elements share memory. Or another rank refused its gradients; or a call
            over ranks is traced.
        ValueError: max_norm is negative or NaN, norm_type is not > 0 or not 2 with exact, nonfinite
            is unknown, or error_if_nonfinite contradicts it. Or a gradient is Partial; or meshes
            and groups do not fit.
        TypeError: as get_total_norm.

    Source: Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural
    networks", Algorithm 1.
    """
    op = "clip_grad_norm_"
    max_norm = check_max_norm(op, "max_norm", max_norm)
    norm_type = check_norm_type(op, norm_type)
    check_exact(op, exact, norm_type)
    code = check_nonfinite(op, nonfinite, CLIP_NONFINITE)
    if error_if_nonfinite:
        if nonfinite == "zero":
            raise ValueError(
                f"{op}: error_if_nonfinite contradicts nonfinite='zero'; pass only one"
            )
        code = NonFinite.ERROR
    is_generator = isinstance(parameters, types.GeneratorType)
    parameters = as_sequence(op, parameters)
    if is_generator and not parameters:
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=2
        )
    if (shares := _shares(op, parameters, True, group, replicated_over)) is not None:
        result = plan_over_ranks(op, shares, max_norm, norm_type, code, True, exact)
        _native.backend.apply_(op, shares.all, result.plan)
        return result.norm
    if _native.is_traced_in_place(op):
        grads = grads_of(parameters)
        norm: Tensor = torch.ops.gradfuse.clip_grads_(grads, max_norm, norm_type, code, exact)[0]
        return norm
    return _native.backend.clip_(parameters, True, max_norm, norm_type, code, exact)[0]


def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    total_norm: Tensor | float,
    foreach: bool | None = None,
) -> None:
    """Scales the gradients in place by min(1, max_norm / (total_norm + 1e-6)).

    Writes nothing if total_norm <= max_norm. Prefer clip_grad_norm_ where norms may leave float32:
    a float32 total_norm of inf scales by 0.

    Args:
        parameters: iterable of Tensors or one, whose .grad is scaled; None gradients are skipped.
        max_norm: upper bound of the norm, >= 0.
        total_norm: one real number, mostly a Tensor, the norm of all gradients.
        foreach: accepted for torch's signature; all paths are fused.

    Raises:
        ValueError: max_norm is negative or NaN, or total_norm is not one real number.
        TypeError, RuntimeError: as clip_grad_norm_.

    Source: Pascanu, Mikolov, Bengio 2013, Algorithm 1.
    """
    max_norm = check_max_norm("clip_grads_with_norm_", "max_norm", max_norm)
    if not isinstance(total_norm, Tensor):
        total_norm = torch.tensor(total_norm, device="cpu")
    parameters = as_sequence("clip_grads_with_norm_", parameters)
    if is_dtensor(total_norm):
        total_norm = total_norm.full_tensor()
    if (shares := _shares("clip_grads_with_norm_", parameters, True)) is not None:
        _native.backend.scale_(_taken(shares), False, max_norm, total_norm)
        return
    if _native.is_traced_in_place("clip_grads_with_norm_"):
        torch.ops.gradfuse.scale_grads_(grads_of(parameters), max_norm, total_norm)
    else:
        _native.backend.scale_(parameters, True, max_norm, total_norm)


def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """Clamps every gradient in place to [-clip_value, clip_value]. NaN stays NaN.

    Reads every gradient once and writes only blocks in which a value changes.

    Args:
        parameters: iterable of Tensors or one, whose .grad is clamped; None gradients are skipped.
        clip_value: the bound, >= 0, rounded to each gradient's dtype.
        foreach: accepted for torch's signature; all paths are fused.

    Raises:
        ValueError: clip_value is negative or NaN.
        TypeError: as get_total_norm, or a gradient is complex.
        RuntimeError: a gradient is expanded.

    Source: torch.nn.utils.clip_grad_value_.
    """
    clip_value = check_nonnegative("clip_grad_value_", "clip_value", clip_value)
    parameters = as_sequence("clip_grad_value_", parameters)
    if (shares := _shares("clip_grad_value_", parameters, True)) is not None:
        _native.backend.clamp_(_taken(shares), False, clip_value)
        return
    if _native.is_traced_in_place("clip_grad_value_"):
        torch.ops.gradfuse.clamp_grads_(grads_of(parameters), clip_value)
    else:
        _native.backend.clamp_(parameters, True, clip_value)


def _shares(
    op: str,
    tensors: Sequence[Tensor],
    of_grad: bool,
    group: Group | None = None,
    replicated_over: ReplicatedOver | None = None,
) -> Shares | None:
    """This rank's shards, or None where all is plain and on this rank alone."""
    is_compiling = torch.compiler.is_compiling()
    if group is None and replicated_over is None and (is_compiling or not has_dtensor(tensors)):
        return None
    if is_compiling:
        raise RuntimeError(
            f"{op}: expected no group within torch.compile, whose graph would not hold the "
            "collective; call it outside of the compiled function"
        )
    _native.refuse_tracing(op)
    return shares_of(op, tensors, of_grad, group, replicated_over)


def _taken(shares: Shares) -> list[Tensor]:
    """All of them, where no collective follows that other ranks would wait in."""
    if shares.refusal is not None:
        raise shares.refusal
    return shares.all


def _fake_result(grads: list[Tensor]) -> ClipResult:
    device = grads[0].device if grads else torch.device("cpu")
    wide = any(g.dtype in (torch.float64, torch.complex128) for g in grads)
    return ClipResult(
        torch.empty((), dtype=torch.float64 if wide else torch.float32, device=device),
        torch.empty(len(ClipPlan._fields), dtype=torch.float64, device=device),
        torch.empty(len(grads), len(TensorStats._fields), dtype=torch.float64, device=device),
    )


define_op(
    "grad_stats(Tensor[] grads, float norm_type, int nonfinite, bool exact=False)"
    " -> (Tensor, Tensor, Tensor)",
    lambda grads, *settings: _native.backend.stats(grads, False, *settings),
    lambda grads, *settings: _fake_result(grads),
)
define_op(
    "clip_grads_(Tensor(a!)[] grads, float max_norm, float norm_type, int nonfinite,"
    " bool exact=False) -> (Tensor, Tensor, Tensor)",
    lambda grads, *settings: _native.backend.clip_(grads, False, *settings),
    lambda grads, *settings: _fake_result(grads),
)
define_op(
    "scale_grads_(Tensor(a!)[] grads, float max_norm, Tensor total_norm) -> ()",
    lambda grads, max_norm, total_norm: _native.backend.scale_(grads, False, max_norm, total_norm),
    lambda grads, max_norm, total_norm: None,
)
define_op(
    "clamp_grads_(Tensor(a!)[] grads, float clip_value) -> ()",
    lambda grads, clip_value: _native.backend.clamp_(grads, False, clip_value),
    lambda grads, clip_value: None,
)
