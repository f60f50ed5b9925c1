"""Layer norm, alone and of residual + dropout(input)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradfuse._codes import RowNorm
from gradfuse.ops.row_norm import add_norm, norm

__all__ = ["add_layer_norm", "layer_norm"]


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """F.layer_norm, with gradients of weight and bias that 16-bit inputs do not spoil.

    Each row, the dimensions of normalized_shape taken as one, is computed in float32 (float64 if
    input is), its statistics in float64 from there on. Rows whose squares overflow or underflow
    are scaled by a power of two.

    Args:
        input: [..., *normalized_shape] Tensor; float16, bfloat16, float32 or float64.
        normalized_shape: ints; one may stand alone.
        weight: Tensor of normalized_shape, of any of these dtypes, or None for ones.
        bias: the same, or None for zeros.
        eps: added to the variance, >= 0. Rows of equal elements give NaN with 0, as in torch.

    Returns:
        Tensor of input's shape and dtype, contiguous.

    Raises:
        ValueError: a shape does not fit, or eps is negative.
        TypeError: an argument is no tensor, sparse, of another dtype or on another device.
        RuntimeError: a tensor's storage was freed.

    Source: Ba, Kiros, Hinton 2016, "Layer Normalization", equation 4.
    """
    return norm(RowNorm.LAYER_NORM, input, normalized_shape, weight, bias, eps)


def add_layer_norm(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    p: float = 0.0,
    training: bool = False,
    prenorm: bool = True,
    residual_dtype: torch.dtype | None = None,
    sample_scale: Tensor | None = None,
    weight_offset: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor] | Tensor:
    """(layer_norm(s), s) of s = residual + sample_scale * dropout(input, p), in one pass.

    The sum is rounded once, and normalised as rounded. What a dropout or a scale of 0 leaves out
    is selected, not multiplied: a sample of inf that is left out gives its residual. The random
    numbers come from one draw of torch's generator and each element's index, so the backward
    computes the mask again, and it has the same bits with any number of threads.

    Args:
        input: [..., *normalized_shape] Tensor; float16, bfloat16, float32 or float64.
        residual: Tensor of input's shape and any of these dtypes, or None for a first block.
        normalized_shape: ints; one may stand alone.
        weight: Tensor of normalized_shape, or None for ones.
        bias: Tensor of normalized_shape, or None for zeros.
        eps: added to the variance, >= 0.
        p: probability that an element of input is dropped; those that stay are divided by 1 - p.
        training: apply the dropout.
        prenorm: return the sum as well, which the next block adds to.
        residual_dtype: dtype of the sum: input's, float32 beside a 16-bit one, or float64. Default:
            that of input + residual.
        sample_scale: [N] or [N, 1, ...] Tensor of input's first dimension, as a DropPath draws it.
        weight_offset: added to a weight that is given; 1 for weights that are kept about 0.
        generator: of p's random numbers. Default: that of input's device.

    Returns:
        (Tensor, Tensor): the norm in input's dtype and the sum in residual_dtype, both contiguous
        and of input's shape; the first alone unless prenorm. A first block without dropout returns
        its input as the sum. Where either of input and residual_dtype is float64, both are.

    Raises:
        ValueError: a shape does not fit, p is not in [0, 1], or eps is negative.
        TypeError: an argument is no tensor, sparse, of another dtype or on another device; the
            sum's dtype is narrower than input's.
        RuntimeError: a tensor's storage was freed.

    Source: Ba, Kiros, Hinton 2016, "Layer Normalization", equation 4; Srivastava et al. 2014,
    "Dropout", section 4; Huang et al. 2016, "Deep Networks with Stochastic Depth", equation 2.
    """
    return add_norm(
        RowNorm.ADD_LAYER_NORM, input, residual, normalized_shape, weight, bias, eps=eps, p=p,
        training=training, prenorm=prenorm, residual_dtype=residual_dtype,
        sample_scale=sample_scale, weight_offset=weight_offset, generator=generator,
    )  # fmt: skip
