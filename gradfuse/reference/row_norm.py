"""Layer norm and RMS norm of residual + dropout(input), in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradfuse._codes import RowNorm
from gradfuse._records import RowNormCall, RowNormOptions, RowNormSaved
from gradfuse.reference.dropout import addend

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KEPT_OF_ROW = 4


def row_norm(call: RowNormCall) -> tuple[Tensor | None, Tensor]:
    """(output, sum), differentiable any number of times; no output where there is no norm.

    16-bit inputs are computed in float32; sum and output are rounded once.
    """
    wide = torch.promote_types(call.input.dtype, torch.float32)
    total = addend(call.input.to(wide), call.seed, call.p, call.sample_scale)
    if call.residual is not None:
        total = total + call.residual.to(wide)
    total = total.to(call.sum_dtype)
    if call.op == RowNorm.DROPOUT_ADD:
        return None, total
    s = total.to(wide)
    dims = list(range(-len(call.normalized_shape), 0))
    if RowNorm(call.op).is_centred:
        s = s - s.mean(dims, keepdim=True)
    h = s * (s.square().mean(dims, keepdim=True) + call.eps).rsqrt()
    if call.weight is not None:
        h = h * (call.weight.to(wide) + call.weight_offset)
    if call.bias is not None:
        h = h + call.bias.to(wide)
    return h.to(call.input.dtype), total


def _check_memory(op: str, name: str, t: Tensor) -> None:
    if t.layout != torch.strided or t.is_nested:
        raise TypeError(f"{op}: {name} must be dense, got layout {t.layout}")
    if t.dtype not in _DTYPES:
        raise TypeError(
            f"{op}: {name} must be float16, bfloat16, float32 or float64, got {t.dtype}"
        )


def _check_like(op: str, name: str, t: Tensor | None, like: Tensor, shape: Sequence[int]) -> None:
    if t is None:
        return
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(t).__name__}")
    _check_memory(op, name, t)
    if t.device != like.device:
        raise TypeError(f"{op}: {name} must be on input's device {like.device}, got {t.device}")
    if list(t.shape) != list(shape):
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(t.shape)}")


def check_row_norm(call: RowNormCall) -> None:
    """Raises as the kernels do."""
    op, x, normalized = RowNorm(call.op).name.lower(), call.input, list(call.normalized_shape)
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: input must be a Tensor, got {type(x).__name__}")
    _check_memory(op, "input", x)
    if not normalized:
        raise ValueError(f"{op}: normalized_shape must have one dimension or more, got []")
    if list(x.shape[-len(normalized) :]) != normalized:
        raise ValueError(
            f"{op}: input must end in normalized_shape {normalized}, got {list(x.shape)}"
        )
    _check_like(op, "residual", call.residual, x, x.shape)
    _check_like(op, "weight", call.weight, x, normalized)
    _check_like(op, "bias", call.bias, x, normalized)
    if call.sample_scale is not None and x.ndim == len(normalized):
        raise ValueError(f"{op}: sample_scale needs an input of samples, got {list(x.shape)}")
    _check_like(op, "sample_scale", call.sample_scale, x, x.shape[:1])
    is_16_bit = x.dtype in _DTYPES[:2]
    if call.sum_dtype != x.dtype and not (is_16_bit and call.sum_dtype == torch.float32):
        raise TypeError(
            f"{op}: residual_dtype must be input's dtype {x.dtype}"
            f"{' or torch.float32' if is_16_bit else ''}, got {call.sum_dtype}"
        )
    if not call.eps >= 0.0:
        raise ValueError(f"{op}: eps must be >= 0, got {call.eps}")


def _sum_of(
    input: Tensor, residual: Tensor | None, call: RowNormCall | RowNormSaved, p: float
) -> Tensor:
    total = addend(input.double(), call.seed, p, call.sample_scale)
    return total if residual is None else total + residual.double()


def _as_rows(t: Tensor, rows: int, width: int) -> Tensor:
    return t.reshape(rows, width) if rows else t.new_zeros(0, width)


def _scale_of_rows(s: Tensor, eps: float) -> Tensor:
    """A power of two for each row, by which float64 squares stay in range."""
    if not s.numel():
        return s.new_ones(s.shape[0], 1)
    largest = s.abs().nan_to_num(0.0, 0.0, 0.0).amax(1, keepdim=True)
    exponent = largest.clamp_min(eps**0.5).log2().floor().nan_to_num(0.0, 0.0, 0.0)
    outside = exponent.abs() > 400
    return torch.where(outside, torch.exp2(-exponent.clamp(-1022, 1022)), 1.0)


@torch.no_grad()
def row_norm_forward(call: RowNormCall) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(output, sum, stats); no sum where it is not kept, or is the input itself; that alone where
    there is no norm."""
    check_row_norm(call)
    x = call.input
    kept = torch.promote_types(x.dtype, torch.float32)
    width = torch.Size(call.normalized_shape).numel()
    rows = x.numel() // width if width else 0
    total = _sum_of(x, call.residual, call, call.p).to(call.sum_dtype)
    is_input = call.residual is None and call.sample_scale is None and call.seed is None
    is_input = is_input and call.sum_dtype == x.dtype
    if call.op == RowNorm.DROPOUT_ADD:
        return None, total.contiguous(), None
    s = _as_rows(total.double(), rows, width)
    scale = _scale_of_rows(s, call.eps)
    s = s * scale
    mean = torch.zeros_like(scale)
    if RowNorm(call.op).is_centred:
        mean = s.mean(1, keepdim=True)
        s = s - mean
    deviation = (s.square().mean(1, keepdim=True) + call.eps * scale * scale).sqrt()
    h = (s / deviation).reshape(x.shape)
    if call.weight is not None:
        h = h * (call.weight.double() + call.weight_offset)
    if call.bias is not None:
        h = h + call.bias.double()
    rounded = mean.to(kept)
    stats = torch.cat(
        [rounded, (mean - rounded).to(kept), deviation.to(kept), scale.to(kept)], 1
    ).contiguous()
    total = total.contiguous()
    return h.to(x.dtype).contiguous(), total if call.keeps_sum and not is_input else None, stats


@torch.no_grad()
def row_norm_backward(
    grad_output: Tensor | None,
    grad_sum: Tensor | None,
    saved: RowNormSaved,
    options: RowNormOptions,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, residual, weight and bias; None for those not wanted."""
    dtype = options.dtype
    grad = None if grad_sum is None else grad_sum.double()
    of_weight = of_bias = None
    if grad_output is not None:
        through_norm, of_weight, of_bias = _norm_backward(grad_output, saved, options)
        grad = through_norm if grad is None else grad + through_norm
    assert grad is not None
    of_input = addend(grad, saved.seed, options.p, saved.sample_scale).to(dtype)
    of_residual = None
    if wanted[1] and options.residual_dtype is not None:
        is_same = saved.seed is None and saved.sample_scale is None
        is_same = is_same and options.residual_dtype == dtype and wanted[0]
        of_residual = of_input if is_same else grad.to(options.residual_dtype)
    return (
        of_input if wanted[0] else None,
        of_residual,
        of_weight if wanted[2] else None,
        of_bias if wanted[3] else None,
    )


def _norm_backward(
    grad_output: Tensor, saved: RowNormSaved, options: RowNormOptions
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of the sum, weight and bias through the norm."""
    assert saved.stats is not None
    shape, rows = grad_output.shape, saved.stats.shape[0]
    if saved.sum is not None:
        total = saved.sum
    else:
        assert saved.input is not None
        total = _sum_of(saved.input, saved.residual, saved, options.p).to(options.sum_dtype)
    mean, rest, deviation, scale = saved.stats.double().split(1, 1)
    given = saved.weight if saved.weight is not None else saved.bias
    width = grad_output.numel() // rows if rows else 0 if given is None else given.numel()
    g_out = _as_rows(grad_output.double(), rows, width)
    h = (_as_rows(total.double(), rows, width) * scale - (mean + rest)) / deviation
    g = g_out
    if saved.weight is not None:
        g = g * (saved.weight.double() + options.weight_offset).reshape(1, -1)
    slope = (g * h).mean(1, keepdim=True)
    shift = g.mean(1, keepdim=True) if RowNorm(options.op).is_centred else torch.zeros_like(slope)
    weight, bias = saved.weight, saved.bias
    return (
        ((g - (h * slope + shift)) / deviation * scale).reshape(shape),
        None if weight is None else (g_out * h).sum(0).reshape(weight.shape).to(weight.dtype),
        None if bias is None else g_out.sum(0).reshape(bias.shape).to(bias.dtype),
    )
