"""The backward of batch_norm_act by torch's own ops, which can be differentiated again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradfuse import reference
from gradfuse._records import BatchNormOptions, BatchNormSaved

__all__ = ["differentiable_backward"]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def differentiable_backward(
    grad_output: Tensor, saved: BatchNormSaved, options: BatchNormOptions, wanted: Sequence[bool]
) -> Gradients:
    """The gradients of input, residual, weight and bias; None for those not wanted."""
    sizes = reference.ghost_sizes(grad_output.shape[0], options.ghost_size)
    if len(sizes) == 1:
        return _of_one(grad_output, saved, options, wanted)
    pieces = zip(grad_output.split(sizes), reference.split_saved(saved, sizes), strict=True)
    inputs, residuals, weights, biases = zip(
        *(_of_one(g, s, options, wanted) for g, s in pieces), strict=True
    )
    return (
        torch.cat(inputs) if wanted[0] else None,
        torch.cat(residuals) if wanted[1] else None,
        None if weights[0] is None else torch.stack(weights).sum(0),
        torch.stack(biases).sum(0) if wanted[3] else None,
    )


def _activation_backward(
    g: Tensor, at: Tensor, name: str, negative_slope: float, is_output: bool
) -> Tensor:
    """g * act', from z, or from act(z) where is_output; torch's ops, which differentiate."""
    aten = torch.ops.aten
    result: Tensor
    if name == "relu":
        result = aten.threshold_backward(g, at, 0)
    elif name == "relu6":
        result = aten.hardtanh_backward(g, at, 0, 6)
    elif name == "leaky_relu":
        result = aten.leaky_relu_backward(g, at, negative_slope, is_output)
    elif name in ("gelu", "gelu_tanh"):
        result = aten.gelu_backward(g, at, approximate="tanh" if name == "gelu_tanh" else "none")
    elif name == "silu":  # aten's has no derivative
        s = at.sigmoid()
        result = g * (s * (1 + at * (1 - s)))
    else:
        result = getattr(aten, f"{name}_backward")(g, at)
    return result


def _of_one(
    grad_output: Tensor, saved: BatchNormSaved, options: BatchNormOptions, wanted: Sequence[bool]
) -> Gradients:
    """The gradients of a ghost batch."""
    name = reference.ACTIVATIONS[options.activation]
    dtype = grad_output.dtype
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = saved.weight, saved.bias
    mean, invstd, var = (t.to(wide) for t in _statistics(saved.stats, options.eps))
    w, b = _affine(saved, wide)
    x = None if saved.input is None else saved.input.to(wide)
    g = grad_output.to(wide)
    if name is not None:
        g = _before_activation(g, x, w, b, saved, options, name)
    of_sum = g
    g = reference.addend(g, None, 0.0, saved.sample_scale)
    if x is None or not x.numel():  # torch's divides by the number of elements
        scale = invstd if w is None else invstd * w
        grad_input = g * scale.reshape(-1, *[1] * (g.ndim - 2))
        grad_weight = None if x is None else torch.zeros_like(invstd)
        grad_bias = g.sum([d for d in range(g.ndim) if d != 1])
    else:
        grad_input, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            g, x, w, mean, var, mean, invstd, options.training, options.eps, [True, True, True]
        )
        correction = _correction(saved.stats, wide)
        if correction is not None:
            scale, shift = correction
            grad_weight = grad_weight * scale + grad_bias * shift
    grad_residual = grad_output if name is None else of_sum.to(dtype)
    return (
        grad_input.to(dtype) if wanted[0] else None,
        grad_residual if wanted[1] else None,
        None if grad_weight is None or weight is None else grad_weight.to(weight.dtype),
        grad_bias.to(dtype if bias is None else bias.dtype) if wanted[3] else None,
    )


def _statistics(stats: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, 1 / sqrt(var + eps) and var, from what the forward kept."""
    mean, rest, deviation = stats[:3].double()
    return mean + rest, 1 / deviation, deviation.square() - eps


def _correction(stats: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """r and d of a renormalisation."""
    return None if stats.shape[0] == 3 else (stats[3].to(dtype), stats[4].to(dtype))


def _affine(saved: BatchNormSaved, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """weight and bias, corrected."""
    w = None if saved.weight is None else saved.weight.to(dtype)
    b = None if saved.bias is None else saved.bias.to(dtype)
    correction = _correction(saved.stats, dtype)
    if correction is None:
        return w, b
    scale, shift = correction
    corrected, added = (scale, shift) if w is None else (w * scale, w * shift)
    return corrected, added if b is None else b + added


def _before_activation(
    g: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    b: Tensor | None,
    saved: BatchNormSaved,
    options: BatchNormOptions,
    name: str,
) -> Tensor:
    """The gradient g of act(z) as that of z, from whatever was saved; x: the input, widened."""
    if saved.mask is not None and saved.mask.numel():
        flat = g * options.negative_slope if name == "leaky_relu" else torch.zeros_like(g)
        return torch.where(reference.unpack_mask(saved.mask, g, options.channels_last), g, flat)
    if saved.output is not None:
        output = saved.output.to(g.dtype)
        return _activation_backward(g, output, name, options.negative_slope, True)
    if x is None or not x.numel():
        return g
    mean, var = None, None
    if not options.training:
        mean, _, var = (t.to(g.dtype) for t in _statistics(saved.stats, options.eps))
    z = torch.nn.functional.batch_norm(x, mean, var, w, b, options.training, 0.0, options.eps)
    z = reference.addend(z, None, 0.0, saved.sample_scale)
    z = z if saved.residual is None else z + saved.residual
    return _activation_backward(g, z, name, options.negative_slope, False)
