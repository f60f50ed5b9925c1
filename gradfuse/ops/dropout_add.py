"""residual + dropout(input), in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from gradfuse import _native, reference
from gradfuse._codes import RowNorm
from gradfuse.ops.checks import is_batched
from gradfuse.ops.row_norm import addends, dropout, run

__all__ = ["dropout_add", "run_dropout"]


def dropout_add(
    input: Tensor,
    residual: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    residual_dtype: torch.dtype | None = None,
    sample_scale: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """residual + sample_scale * dropout(input, p), in one pass and rounded once.

    What is left out is selected, not multiplied: inf and NaN go with it. No mask is kept: the
    random numbers come from one draw of torch's generator and each element's index.

    Args:
        input: Tensor; float16, bfloat16, float32 or float64.
        residual: Tensor of input's shape and any of these dtypes.
        p: probability that an element of input is dropped; those that stay are divided by 1 - p.
        training: apply the dropout.
        residual_dtype: dtype of the sum, as in `add_layer_norm`.
        sample_scale: [N] or [N, 1, ...] Tensor of input's first dimension, as a DropPath draws it.
        generator: of the random numbers. Default: that of input's device.

    Returns:
        Tensor of input's shape in residual_dtype, contiguous where there is something to drop.

    Raises:
        ValueError: a shape does not fit, or p is not in [0, 1].
        TypeError: an argument is no tensor, sparse, of another dtype or on another device; the
            sum's dtype is narrower than input's.
        RuntimeError: a tensor's storage was freed.

    Source: Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from
    Overfitting", section 4; Huang et al. 2016, "Deep Networks with Stochastic Depth", equation 2.
    """
    name = "dropout_add"
    if not isinstance(residual, Tensor):
        raise TypeError(f"{name}: residual must be a Tensor, got {type(residual).__name__}")
    input, sum_dtype = addends(name, input, residual, residual_dtype)
    sample_scale, seed = dropout(name, input, p, training, sample_scale, generator)
    return _run(input, residual, p, seed, sample_scale, sum_dtype)


def run_dropout(
    input: Tensor,
    residual: Tensor | None,
    p: float,
    seed: Tensor | None,
    sample_scale: Tensor | None,
) -> Tensor:
    """residual + sample_scale * dropout(input) with the random numbers of a seed that was drawn.

    Without a residual it has input's strides, as torch's dropout; it is its own gradient then.
    """
    if not torch.compiler.is_compiling() and is_batched(input):  # a gradient of is_grads_batched
        return reference.addend(input, seed, p, sample_scale)
    output = _run(input, residual, p, seed, sample_scale, input.dtype)
    if residual is not None or input.is_contiguous():
        return output
    return torch.empty_like(input).copy_(output)


def _run(
    input: Tensor,
    residual: Tensor | None,
    p: float,
    seed: Tensor | None,
    sample_scale: Tensor | None,
    sum_dtype: torch.dtype,
) -> Tensor:
    shape = input.shape
    if not shape:
        input, residual = input.reshape(1), None if residual is None else residual.reshape(1)
    _, total = run(
        RowNorm.DROPOUT_ADD, input, residual, None, None, sample_scale, seed, input.shape[-1:], p,
        0.0, 0.0, sum_dtype, True,
    )  # fmt: skip
    result: Tensor = total
    return result if shape else result.reshape(shape)


if _native.available:
    _native.backend.run_dropout_with(run_dropout)
