"""act(batch_norm(input) + residual) in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from gradfuse._codes import Activation
from gradfuse._records import BatchNormCall, BatchNormOptions, BatchNormSaved
from gradfuse.reference.dropout import addend

ACTIVATIONS = (None, *(a.name.lower() for a in Activation if a))  # by Activation
MASKED = ("relu", "relu6", "leaky_relu")  # a bit an element tells their derivative
OUTPUT_SAVED = ("sigmoid", "tanh")  # whose derivative is computed from their output
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def activate(z: Tensor, activation: str | None, negative_slope: float = 0.01) -> Tensor:
    """act(z)."""
    if activation is None:
        return z
    if activation == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    function = getattr(torch, activation, None) or getattr(F, activation)
    result: Tensor = function(z)
    return result


def derivative(z: Tensor, activation: str | None, negative_slope: float) -> Tensor:
    """d act / dz: from the output for those of OUTPUT_SAVED, from z for the others, from either
    for those of MASKED. Not by autograd, which is switched off inside an op of torch.library."""
    one = torch.ones_like(z)
    if activation is None:
        return one
    if activation == "relu":
        return torch.where(z <= 0, 0.0, one)  # a NaN passes the gradient
    if activation == "relu6":
        return torch.where((z > 0) & (z < 6), one, 0.0)
    if activation == "leaky_relu":
        return torch.where(z > 0, one, negative_slope)
    if activation == "sigmoid":
        return z * (1 - z)
    if activation == "tanh":
        return 1 - z * z
    aten = torch.ops.aten
    slope: Tensor
    if activation == "silu":
        slope = aten.silu_backward(one, z)
    elif activation == "hardswish":
        slope = aten.hardswish_backward(one, z)
    else:
        form = "tanh" if activation == "gelu_tanh" else "none"
        slope = aten.gelu_backward(one, z, approximate=form)
    return slope


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
    sample_scale: Tensor | None = None,
) -> Tensor:
    """act(F.batch_norm(input, ...) * sample_scale + residual), differentiable any number of times.

    16-bit inputs are computed in float32 and rounded once.
    """
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    mean, var, w, b = (
        None if p is None else p.to(wide.dtype) for p in (running_mean, running_var, weight, bias)
    )
    out = F.batch_norm(wide, mean, var, w, b, training, float(momentum), eps)
    for running, now in ((running_mean, mean), (running_var, var)):
        if training and running is not None and now is not None and now.dtype != running.dtype:
            running.copy_(now)
    dtype = input.dtype
    out = addend(out, None, 0.0, sample_scale)
    if residual is not None:
        dtype = torch.result_type(input, residual)
        out = out + residual
    return activate(out, activation, negative_slope).to(dtype)


def _per_channel(v: Tensor, like: Tensor) -> Tensor:
    """[C] -> [C, 1, ...], to broadcast over [N, C, ...]."""
    return v.reshape(-1, *[1] * (like.ndim - 2))


def _is_channels_last(x: Tensor) -> bool:
    """Whether the channels are x's innermost dimension, gaps or not: the mask's rows run along."""
    if x.is_contiguous():
        return False
    if x.movedim(1, -1).is_contiguous():
        return True
    return suggest_memory_format(x) != torch.contiguous_format


def output_like(x: Tensor) -> Tensor:
    """Memory for the output: x's strides if it is dense, else those of the format it is nearest."""
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        return torch.empty_like(x)
    if not _is_channels_last(x):
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    n, c, *rest = x.shape
    return x.new_empty(n, *rest, c).movedim(-1, 1)


def _rows(x: Tensor, channels_last: bool) -> Tensor:
    """x as the mask's rows: [C == 1: 1, numel], [positions, C] or [N * C, positions]."""
    if x.shape[1] == 1:
        return (x.movedim(1, -1) if channels_last else x).reshape(1, -1)
    if channels_last or x.shape[2:].numel() == 1:
        return x.movedim(1, -1).reshape(-1, x.shape[1])
    return x.reshape(x.shape[0] * x.shape[1], -1)


def pack_mask(bits: Tensor, channels_last: bool) -> Tensor:
    """bool [N, C, ...] -> uint8 [rows, ceil(length / 8)], bit i % 8 of byte i / 8."""
    rows = _rows(bits, channels_last)
    padded = F.pad(rows, (0, -rows.shape[1] % 8)).reshape(rows.shape[0], -1, 8)
    weights = 2 ** torch.arange(8, device=bits.device)
    return (padded * weights).sum(-1).to(torch.uint8)


def unpack_mask(mask: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    """The inverse of pack_mask for bits of the shape of `like`."""
    bits = (mask[:, :, None] >> torch.arange(8, device=mask.device, dtype=torch.uint8)) & 1
    n, c, *rest = like.shape
    positions = like.shape[2:].numel()
    length = mask.shape[0] and n * c * positions // mask.shape[0]
    bits = bits.reshape(mask.shape[0], -1)[:, :length].bool()
    if channels_last or positions == 1:
        return bits.reshape(n, *rest, c).movedim(-1, 1)
    return bits.reshape(n, c, *rest)


def _check_memory(name: str, t: Tensor) -> None:
    if t.layout != torch.strided or t.is_nested:
        raise TypeError(f"batch_norm_act: {name} must be dense, got layout {t.layout}")
    if t.dtype not in _DTYPES:
        raise TypeError(
            f"batch_norm_act: {name} must be float16, bfloat16, float32 or float64, got {t.dtype}"
        )


def _check_forward(call: BatchNormCall) -> None:
    op, input = "batch_norm_act", call.input
    vectors = {
        "weight": call.weight,
        "bias": call.bias,
        "running_mean": call.running_mean,
        "running_var": call.running_var,
    }
    for name, t in {"input": input, "residual": call.residual, **vectors}.items():
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(t).__name__}")
    _check_memory("input", input)
    if input.ndim < 2:
        raise ValueError(f"{op}: input must be [N, C, ...], got {list(input.shape)}")
    if not call.eps >= 0.0:
        raise ValueError(f"{op}: eps must be >= 0, got {call.eps}")
    if call.training and call.eps == 0.0:
        raise ValueError(f"{op}: eps must be > 0 when training, got 0")
    if call.residual is not None:
        _check_memory("residual", call.residual)
    for name, t in vectors.items():
        if t is not None:
            _check_vector(name, t, input)
    if call.sample_scale is not None:
        _check_memory("sample_scale", call.sample_scale)
        if list(call.sample_scale.shape) != [input.shape[0]]:
            raise ValueError(
                f"{op}: sample_scale must have one element per sample, [{input.shape[0]}], got "
                f"{list(call.sample_scale.shape)}"
            )
    _check_running(call)
    if not call.training:
        return
    if input.numel() // max(input.shape[1], 1) == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{list(input.shape)}"
        )
    if isinstance(call.momentum, Tensor) and call.momentum.numel() != 1:
        raise ValueError(f"{op}: momentum must be one number, got {list(call.momentum.shape)}")


def _check_vector(name: str, t: Tensor, input: Tensor) -> None:
    _check_memory(name, t)
    if t.device != input.device:
        raise TypeError(
            f"batch_norm_act: {name} must be on input's device {input.device}, got {t.device}"
        )
    if t.shape != (input.shape[1],):
        raise ValueError(
            f"batch_norm_act: {name} must have one element per channel, [{input.shape[1]}], got "
            f"{list(t.shape)}"
        )


def _check_running(call: BatchNormCall) -> None:
    op, mean, var = "batch_norm_act", call.running_mean, call.running_var
    if (mean is None) != (var is None):
        raise ValueError(
            f"{op}: running_mean and running_var must come together, got only "
            f"{'running_var' if mean is None else 'running_mean'}"
        )
    if mean is None and not call.training:
        raise ValueError(
            f"{op}: running_mean and running_var must be given when not training, got None"
        )
    for t in (mean, var) if call.training else ():
        if t is not None and t.shape[0] > 1 and t.stride(0) == 0:
            raise RuntimeError(
                f"{op}: running statistics must have an element per memory location, got an "
                "expanded tensor; .clone() it first"
            )


def _batch_statistics(x: Tensor, call: BatchNormCall) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel. Updates the running statistics."""
    dims = [d for d in range(x.ndim) if d != 1]
    count = x.numel() // x.shape[1]
    mean = x.mean(dims)
    var = (x - _per_channel(mean, x)).square().mean(dims)
    m = float(call.momentum)
    unbiased = var * (count / (count - 1))
    for running, now in ((call.running_mean, mean), (call.running_var, unbiased)):
        if running is not None:
            running.copy_((1 - m) * running.double() + m * now)
    return mean, var


def _running_statistics(call: BatchNormCall) -> tuple[Tensor, Tensor]:
    assert call.running_mean is not None
    assert call.running_var is not None
    return call.running_mean.double(), call.running_var.double()


def _kept(mean: Tensor, var: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """[3, C] of the compute type: the mean, what its rounding left, sqrt(var + eps)."""
    rounded = mean.to(dtype)
    return torch.stack([rounded, (mean - rounded).to(dtype), (var + eps).sqrt().to(dtype)])


@torch.no_grad()
def batch_norm_forward(call: BatchNormCall) -> tuple[Tensor, Tensor, Tensor]:
    """(output, mask, stats); the mask is empty where none is wanted."""
    _check_forward(call)
    input, name = call.input, ACTIVATIONS[call.activation]
    no_mask = torch.empty(0, dtype=torch.uint8, device=input.device)
    computed_in = torch.promote_types(input.dtype, torch.float32)
    if input.numel() == 0:
        ones = input.new_ones(3, input.shape[1], dtype=computed_in)
        return torch.empty_like(input), no_mask, ones
    x = input.double()
    mean, var = _batch_statistics(x, call) if call.training else _running_statistics(call)
    stats = _kept(mean, var, call.eps, computed_in)
    z = (x - _per_channel(mean, x)) * _per_channel((var + call.eps).rsqrt(), x)
    if call.weight is not None:
        z = z * _per_channel(call.weight.double(), x)
    if call.bias is not None:
        z = z + _per_channel(call.bias.double(), x)
    z = addend(z, None, 0.0, call.sample_scale)
    if call.residual is not None:
        z = z + call.residual.double()
    output = output_like(input).copy_(activate(z, name, call.negative_slope))
    if not call.wants_mask:
        return output, no_mask, stats
    bits = derivative(z.to(input.dtype), name, 0.0) != 0
    return output, pack_mask(bits, _is_channels_last(output)), stats


@torch.no_grad()
def batch_norm_backward(
    grad_output: Tensor, saved: BatchNormSaved, options: BatchNormOptions, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, residual, weight and bias; None for those not wanted."""
    name = ACTIVATIONS[options.activation]
    weight, bias, dtype = saved.weight, saved.bias, grad_output.dtype
    g = grad_output.double()
    dims = [d for d in range(g.ndim) if d != 1]
    kept, rest, deviation = saved.stats.double()
    mean, invstd = _per_channel(kept + rest, g), _per_channel(1 / deviation, g)
    w = torch.ones_like(deviation) if weight is None else weight.double()
    normalised = None if saved.input is None else (saved.input.double() - mean) * invstd
    if name is not None:
        g = _before_activation(g, normalised, _per_channel(w, g), saved, options, name)
    of_sum = g
    g = addend(g, None, 0.0, saved.sample_scale)
    dot = torch.zeros_like(w) if normalised is None else (g * normalised).sum(dims)
    total = g.sum(dims)
    before = g
    if options.training and normalised is not None and g.numel():
        count = g.numel() // g.shape[1]
        before = g - _per_channel(total / count, g) - normalised * _per_channel(dot / count, g)
    grad_residual = grad_output if name is None else of_sum.to(dtype)
    return (
        (before * _per_channel(w, g) * invstd).to(dtype) if wanted[0] else None,
        grad_residual if wanted[1] else None,
        dot.to(dtype if weight is None else weight.dtype) if wanted[2] else None,
        total.to(dtype if bias is None else bias.dtype) if wanted[3] else None,
    )


def _before_activation(
    g: Tensor,
    normalised: Tensor | None,
    w: Tensor,
    saved: BatchNormSaved,
    options: BatchNormOptions,
    name: str,
) -> Tensor:
    """The gradient g of act(z) as that of z, from whatever was saved."""
    if saved.mask is not None and g.numel():
        flat = g * options.negative_slope if name == "leaky_relu" else torch.zeros_like(g)
        return torch.where(unpack_mask(saved.mask, g, options.channels_last), g, flat)
    if saved.output is not None:
        slope = derivative(saved.output.double(), name, options.negative_slope)
        return torch.where(slope == 0, torch.zeros_like(g), g * slope)  # not inf * 0
    if normalised is None:
        return g
    z = normalised * w
    if saved.bias is not None:
        z = z + _per_channel(saved.bias.double(), g)
    z = addend(z, None, 0.0, saved.sample_scale)
    if saved.residual is not None:
        z = z + saved.residual
    return g * derivative(z, name, options.negative_slope)
