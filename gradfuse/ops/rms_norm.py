"""RMS norm, alone and of residual + dropout(input)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradfuse._codes import RowNorm
from gradfuse.ops.row_norm import add_norm, norm

__all__ = ["add_rms_norm", "rms_norm"]


def _eps(input: Tensor, eps: float | None) -> float:
    """torch's default: that of the type it computes in."""
    if eps is not None:
        return eps
    is_double = isinstance(input, Tensor) and input.dtype == torch.float64
    return torch.finfo(torch.float64 if is_double else torch.float32).eps


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """F.rms_norm, right over the whole range of its dtype.

    Computed as `layer_norm` is, less its mean and bias.

    Args:
        input: [..., *normalized_shape] Tensor; float16, bfloat16, float32 or float64.
        normalized_shape: ints; one may stand alone.
        weight: Tensor of normalized_shape, of any of these dtypes, or None for ones.
        eps: added to the mean square, >= 0. Default: float32's epsilon, float64's if input is.

    Returns:
        Tensor of input's shape and dtype, contiguous.

    Raises:
        ValueError: a shape does not fit, or eps is negative.
        TypeError: an argument is no tensor, sparse, of another dtype or on another device.
        RuntimeError: a tensor's storage was freed.

    Source: Zhang, Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """
    return norm(RowNorm.RMS_NORM, input, normalized_shape, weight, None, _eps(input, eps))


def add_rms_norm(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    *,
    eps: float | None = None,
    p: float = 0.0,
    training: bool = False,
    prenorm: bool = True,
    residual_dtype: torch.dtype | None = None,
    sample_scale: Tensor | None = None,
    weight_offset: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor] | Tensor:
    """(rms_norm(s), s) of s = residual + sample_scale * dropout(input, p), in one pass.

    Arguments, results and errors are those of `add_layer_norm`, less the bias; eps is that of
    `rms_norm`. Gemma's weights need weight_offset=1.

    Source: Zhang, Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """
    return add_norm(
        RowNorm.ADD_RMS_NORM, input, residual, normalized_shape, weight, None,
        eps=_eps(input, eps), p=p, training=training, prenorm=prenorm,
        residual_dtype=residual_dtype, sample_scale=sample_scale, weight_offset=weight_offset,
        generator=generator,
    )  # fmt: skip
