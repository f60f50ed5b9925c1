"""act(batch_norm(input) + residual) in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from gradfuse._codes import Activation
from gradfuse._records import BatchNormCall, BatchNormOptions, BatchNormSaved
from gradfuse.reference.batch_norm_modes import (
    DRIFT_ROWS,
    adaptive_momentum,
    ghost_sizes,
    renormalisation,
    split_call,
    split_saved,
)
from gradfuse.reference.batch_norm_ranks import check_count, merged, tally
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
    ghost_size: int = 0,
    renorm: Sequence[float] | None = None,
    step: Tensor | None = None,
    drift: Tensor | None = None,
) -> Tensor:
    """act(F.batch_norm(input, ...) * sample_scale + residual), differentiable any number of times.

    16-bit inputs are computed in float32 and rounded once.
    """
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    sizes = ghost_sizes(input.shape[0], ghost_size if training else 0)
    if input.numel() and (len(sizes) > 1 or renorm is not None or drift is not None):
        call = BatchNormCall(
            wide, None, weight, bias, running_mean, running_var, training, momentum, eps, 0, 0.0,
            False, None, ghost_size, renorm, step, drift,
        )  # fmt: skip
        check_modes(call)
        out = torch.cat([_normalise_one(part) for part in split_call(call, sizes)])
    else:
        mean, var, w, b = (
            None if p is None else p.to(wide.dtype)
            for p in (running_mean, running_var, weight, bias)
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


def _normalise_one(call: BatchNormCall) -> Tensor:
    """Norm, correction and affine part of a ghost batch in training, differentiable."""
    x = call.input
    out = F.batch_norm(x, None, None, None, None, True, 0.0, call.eps)
    with torch.no_grad():
        *_, correction = _training_statistics(x.detach().double(), call)
    scale, shift = (x.new_ones(()), x.new_zeros(())) if correction is None else correction
    w = scale if call.weight is None else call.weight.to(x.dtype) * scale
    b = shift if call.weight is None else call.weight.to(x.dtype) * shift
    b = b if call.bias is None else b + call.bias.to(x.dtype)
    return (out * _per_channel(w, x) + _per_channel(b, x)).to(x.dtype)


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


def _rows(x: Tensor, channels_last: bool, by_sample: bool = False) -> Tensor:
    """x as the mask's rows: [positions, C] or [N * C, positions]; a single channel's is [1, numel]
    unless samples are told apart."""
    if x.shape[1] == 1 and not by_sample:
        return (x.movedim(1, -1) if channels_last else x).reshape(1, -1)
    if channels_last or x.shape[2:].numel() == 1:
        return x.movedim(1, -1).reshape(-1, x.shape[1])
    return x.reshape(x.shape[0] * x.shape[1], -1)


def pack_mask(bits: Tensor, channels_last: bool, by_sample: bool = False) -> Tensor:
    """bool [N, C, ...] -> uint8 [rows, ceil(length / 8)], bit i % 8 of byte i / 8."""
    rows = _rows(bits, channels_last, by_sample)
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
    check_modes(call)


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


def check_modes(call: BatchNormCall) -> None:
    """Raises where a mode of a call is none, or does not fit its tensors."""
    op = "batch_norm_act"
    if call.ghost_size < 0:
        raise ValueError(f"{op}: ghost_size must be >= 0, got {call.ghost_size}")
    for name, mode in (("renorm", call.renorm), ("drift", call.drift)):
        if mode is not None and not (call.training and call.running_mean is not None):
            raise ValueError(
                f"{op}: {name} must come with running statistics and training, got none"
            )
    if call.renorm is not None and not (call.renorm[0] >= 1.0 and call.renorm[1] >= 0.0):
        raise ValueError(
            f"{op}: renorm must have r_max >= 1 and d_max >= 0, got {call.renorm[0]} and "
            f"{call.renorm[1]}"
        )
    if call.step is not None and (call.step.dtype != torch.int64 or call.step.numel() != 1):
        raise ValueError(
            f"{op}: step must be one int64, got {list(call.step.shape)} of {call.step.dtype}"
        )
    if call.drift is not None:
        _check_memory("drift", call.drift)
        if 0 in call.drift.stride() and call.input.shape[1] > 1:
            raise RuntimeError(
                f"{op}: drift must have an element per memory location, got an expanded tensor; "
                ".clone() it first"
            )
        if call.drift.shape != (DRIFT_ROWS, call.input.shape[1]):
            raise ValueError(
                f"{op}: drift must be [{DRIFT_ROWS}, {call.input.shape[1]}], got "
                f"{list(call.drift.shape)}"
            )
    if not call.training:
        return
    input = call.input
    sizes = ghost_sizes(input.shape[0], call.ghost_size)
    if input.numel() and len(sizes) > 1 and input.shape[2:].numel() * sizes[-1] == 1:
        raise ValueError(
            f"{op}: ghost_size must leave more than 1 value per channel in each ghost batch, got "
            f"{len(sizes)} ghost batches of input size {list(input.shape)}"
        )
    if isinstance(call.momentum, Tensor) and call.momentum.numel() not in (1, len(sizes)):
        of_each = " or one for each ghost batch" if call.ghost_size else ""
        raise ValueError(
            f"{op}: momentum must be one number{of_each}, got {list(call.momentum.shape)}"
        )


def _training_statistics(
    x: Tensor, call: BatchNormCall
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Mean, biased variance and correction of each channel. Updates the running statistics."""
    count: float | Tensor
    if call.gathered is None:
        dims = [d for d in range(x.ndim) if d != 1]
        count = x.numel() // x.shape[1]
        mean = x.mean(dims)
        var = (x - _per_channel(mean, x)).square().mean(dims)
    else:
        count, mean, m2 = merged(call.gathered)
        var = m2 / count
    running_mean, running_var, correction = call.running_mean, call.running_var, None
    if running_mean is None or running_var is None:
        return mean, var, None
    old_mean, old_var = running_mean.double(), running_var.double()
    if call.renorm is not None:
        correction = renormalisation(call.renorm, call.step, mean, var, old_mean, old_var, call.eps)
    unbiased = var * (count / (count - 1))
    m: float | Tensor = float(call.momentum)
    if call.drift is not None:
        m = adaptive_momentum(call.drift, mean, unbiased, old_mean, old_var, call.eps)
    new_mean, new_var = (1 - m) * old_mean + m * mean, (1 - m) * old_var + m * unbiased
    if call.gathered is not None:  # NaN if a rank refused its input
        new_mean, new_var = (
            torch.where(call.gathered[:, 0].sum() > 0.0, new, old)
            for new, old in ((new_mean, old_mean), (new_var, old_var))
        )
    running_mean.copy_(new_mean)
    running_var.copy_(new_var)
    return mean, var, correction


def _running_statistics(call: BatchNormCall) -> tuple[Tensor, Tensor]:
    assert call.running_mean is not None
    assert call.running_var is not None
    return call.running_mean.double(), call.running_var.double()


def _kept(
    mean: Tensor,
    var: Tensor,
    eps: float,
    correction: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> Tensor:
    """[3 or 5, C] of the compute type: the mean, what its rounding left, sqrt(var + eps), r, d."""
    rounded = mean.to(dtype)
    rows = [rounded, mean - rounded, (var + eps).sqrt(), *(correction or ())]
    return torch.stack([row.to(dtype) for row in rows])


def _affine(weight: Tensor | None, bias: Tensor | None, stats: Tensor) -> tuple[Tensor, Tensor]:
    """weight and bias [C] in float64, with the correction of what the forward kept."""
    _, _, deviation, *correction = stats.double()
    w = torch.ones_like(deviation) if weight is None else weight.double()
    b = torch.zeros_like(deviation) if bias is None else bias.double()
    if not correction:
        return w, b
    scale, shift = correction
    return w * scale, b + w * shift


@torch.no_grad()
def batch_norm_forward(call: BatchNormCall) -> tuple[Tensor, Tensor, Tensor]:
    """(output, mask, stats); the mask is empty where none is wanted."""
    _check_forward(call)
    check_count(call)
    input, name = call.input, ACTIVATIONS[call.activation]
    no_mask = torch.empty(0, dtype=torch.uint8, device=input.device)
    computed_in = torch.promote_types(input.dtype, torch.float32)
    sizes = ghost_sizes(input.shape[0], call.ghost_size if call.training else 0)
    if input.numel() == 0 and call.gathered is not None and call.gathered[:, 0].sum() > 0.0:
        # A rank without values updates its running statistics by those of the others.
        _training_statistics(input.double(), call)
    if input.numel() == 0:
        rows = len(sizes) * (3 if call.renorm is None else 5)
        ones = input.new_ones(rows, input.shape[1], dtype=computed_in)
        return torch.empty_like(input), no_mask, ones
    if len(sizes) > 1:
        parts = [batch_norm_forward(part) for part in split_call(call, sizes)]
        outputs, masks, stats = (torch.cat(t) for t in zip(*parts, strict=True))
        return output_like(input).copy_(outputs), masks, stats
    x = input.double()
    mean, var, correction = (
        _training_statistics(x, call) if call.training else (*_running_statistics(call), None)
    )
    stats = _kept(mean, var, call.eps, correction, computed_in)
    z = (x - _per_channel(mean, x)) * _per_channel((var + call.eps).rsqrt(), x)
    w, b = _affine(call.weight, call.bias, stats)
    z = z * _per_channel(w, x) + _per_channel(b, x)
    z = addend(z, None, 0.0, call.sample_scale)
    if call.residual is not None:
        z = z + call.residual.double()
    output = output_like(input).copy_(activate(z, name, call.negative_slope))
    if not call.wants_mask:
        return output, no_mask, stats
    bits = derivative(z.to(input.dtype), name, 0.0) != 0
    return output, pack_mask(bits, _is_channels_last(output), bool(call.ghost_size)), stats


@torch.no_grad()
def batch_norm_statistics(call: BatchNormCall) -> Tensor:
    """This rank's row of `gathered`. Checks the call as the forward does, but for the count."""
    _check_forward(call)
    return tally(call.input)


@torch.no_grad()
def batch_norm_gradient_sums(
    grad_output: Tensor, saved: BatchNormSaved, options: BatchNormOptions
) -> Tensor:
    """float64 [2, C]: the sums over this batch of what `saved.means` are the means of."""
    return _backward_of_one(grad_output, saved, options)[4]


@torch.no_grad()
def batch_norm_backward(
    grad_output: Tensor, saved: BatchNormSaved, options: BatchNormOptions, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, residual, weight and bias; None for those not wanted."""
    sizes = ghost_sizes(grad_output.shape[0], options.ghost_size)
    pieces = zip(grad_output.split(sizes), split_saved(saved, sizes), strict=True)
    parts = [_backward_of_one(g, s, options) for g, s in pieces]
    inputs, residuals, weights, biases, _ = zip(*parts, strict=True)
    dtype = grad_output.dtype
    w_dtype, b_dtype = (dtype if t is None else t.dtype for t in (saved.weight, saved.bias))
    no_activation = ACTIVATIONS[options.activation] is None
    grad_residual = grad_output if no_activation else torch.cat(residuals).to(dtype)
    return (
        torch.cat(inputs).to(dtype) if wanted[0] else None,
        grad_residual if wanted[1] else None,
        torch.stack(weights).sum(0).to(w_dtype) if wanted[2] else None,
        torch.stack(biases).sum(0).to(b_dtype) if wanted[3] else None,
    )


def _backward_of_one(
    grad_output: Tensor, saved: BatchNormSaved, options: BatchNormOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of a ghost batch in float64, and the sums [2, C] that they come from."""
    name = ACTIVATIONS[options.activation]
    g = grad_output.double()
    dims = [d for d in range(g.ndim) if d != 1]
    kept, rest, deviation, *correction = saved.stats.double()
    mean, invstd = _per_channel(kept + rest, g), _per_channel(1 / deviation, g)
    w, b = _affine(saved.weight, saved.bias, saved.stats)
    normalised = None if saved.input is None else (saved.input.double() - mean) * invstd
    if name is not None:
        g = _before_activation(g, normalised, w, b, saved, options, name)
    of_sum = g
    g = addend(g, None, 0.0, saved.sample_scale)
    dot = torch.zeros_like(w) if normalised is None else (g * normalised).sum(dims)
    total = g.sum(dims)
    before = g
    if options.training and normalised is not None and g.numel():
        count = g.numel() // g.shape[1]
        means = (total / count, dot / count) if saved.means is None else saved.means
        of_g, of_product = (_per_channel(t, g) for t in means)
        before = g - of_g - normalised * of_product
    grad_weight = dot * correction[0] + total * correction[1] if correction else dot
    grad_input = before * _per_channel(w, g) * invstd
    return grad_input, of_sum, grad_weight, total, torch.stack([total, dot])


def _before_activation(
    g: Tensor,
    normalised: Tensor | None,
    w: Tensor,
    b: Tensor,
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
    z = normalised * _per_channel(w, g) + _per_channel(b, g)
    z = addend(z, None, 0.0, saved.sample_scale)
    if saved.residual is not None:
        z = z + saved.residual
    return g * derivative(z, name, options.negative_slope)
