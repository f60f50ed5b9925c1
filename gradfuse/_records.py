"""What Python and the kernels hand each other, by name instead of by position.

The kernels take and return these as plain tuples and tensors of the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeAlias, TypeVar

import torch
from torch import Tensor
from typing_extensions import NamedTuple  # typing's is not generic in Python 3.10

__all__ = [
    "AdamGroup",
    "BatchNormCall",
    "BatchNormOptions",
    "BatchNormSaved",
    "ClipPlan",
    "ClipResult",
    "LAMBGroup",
    "LionGroup",
    "RowNormCall",
    "RowNormOptions",
    "RowNormSaved",
    "SGDGroup",
    "ScheduleFreeGroup",
    "StepGroup",
    "StepOptions",
    "TensorStats",
]

T = TypeVar("T", Tensor, float)


class ClipPlan(NamedTuple, Generic[T]):
    """What a clip does to all gradients: 0-d Tensors, or floats once they are read.

    The kernels keep it as a float64 Tensor [8]. `sum` and `factor` have exponents of their own,
    because they may lie beyond float64.
    """

    norm: T  # before clipping
    coefficient: T  # what the gradients are multiplied by
    clipped_norm: T
    action: T  # an Action
    sum: T  # sum * 2**(p * sum_exponent): the p-th powers' sum; for p = inf the largest magnitude
    sum_exponent: T
    factor: T  # factor * 2**factor_exponent: the coefficient, divided by the loss scale
    factor_exponent: T

    @classmethod
    def of(cls, plan: Tensor) -> ClipPlan[Tensor]:
        """The fields of a [8] Tensor, as 0-d views."""
        return ClipPlan(*plan.unbind())

    @classmethod
    def read(cls, plan: Tensor) -> ClipPlan[float]:
        """The fields of a [8] Tensor, as floats. On CUDA this waits."""
        return ClipPlan(*plan.tolist())

    @staticmethod
    def pack(plan: ClipPlan[Tensor]) -> Tensor:
        """The [8] Tensor of these fields."""
        return torch.stack(plan)


class TensorStats(NamedTuple, Generic[T]):
    """What a clip saw of each gradient: columns [n] of a float64 Tensor [n, 5], or one row read."""

    norm: T  # L2
    largest: T  # largest magnitude; NaN if any is
    nonfinite: T  # count of NaN and inf
    zeros: T  # count of exact zeros
    numel: T  # -1 in a row without gradient

    @classmethod
    def absent(cls) -> TensorStats[float]:
        """The row of a parameter without gradient."""
        return TensorStats(0.0, 0.0, 0.0, 0.0, -1.0)

    @classmethod
    def of(cls, stats: Tensor) -> TensorStats[Tensor]:
        """The columns of a [n, 5] Tensor, as views."""
        return TensorStats(*stats.unbind(1))

    @classmethod
    def read(cls, stats: Tensor) -> list[TensorStats[float]]:
        """The rows of a [n, 5] Tensor, as floats. On CUDA this waits."""
        return [TensorStats(*row) for row in stats.tolist()]


class ClipResult(NamedTuple):
    """What a clip returns."""

    norm: Tensor  # [], float32, or float64 if any gradient is; inf where that cannot hold it
    plan: Tensor  # [8], see ClipPlan
    stats: Tensor  # [n, 5], see TensorStats


class BatchNormCall(NamedTuple):
    """The arguments of a batch norm's forward."""

    input: Tensor  # [N, C, ...]
    residual: Tensor | None  # of input's shape and dtype
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    running_mean: Tensor | None  # [C]
    running_var: Tensor | None  # [C]
    training: bool
    momentum: float | Tensor  # a Tensor has one element, or one for each ghost batch
    eps: float
    activation: int  # an Activation
    negative_slope: float
    wants_mask: bool
    sample_scale: Tensor | None = None  # [N], of the normalised input; 0 leaves a sample out
    ghost_size: int = 0  # samples at most that share statistics; 0 for all
    renorm: Sequence[float] | None = None  # r_max, d_max, and steps: begin, r_end, d_end
    step: Tensor | None = None  # int64 [], of renorm's warm-up
    drift: Tensor | None = None  # [4, C]; sets the momentum, and is updated
    # float64 [ranks, 1 + 2 * C]: of each rank the count, the means and the sums of squared
    # deviations, in place of input's own.
    gathered: Tensor | None = None
    group: str | None = None  # the name of the ranks' process group


class BatchNormSaved(NamedTuple):
    """The tensors that a batch norm keeps for its backward; None for those it does not read."""

    input: Tensor | None
    residual: Tensor | None
    output: Tensor | None
    mask: Tensor | None  # uint8, a bit an element
    weight: Tensor | None
    bias: Tensor | None
    # [ghost batches * 3, C] float32 (float64 if input is): mean, its rest, sqrt(var + eps); with
    # renorm 5 rows each, whose last are r and d.
    stats: Tensor
    sample_scale: Tensor | None = None
    # float64 [2, C]: over all ranks, of the gradient g before the norm and of g * normalised input.
    means: Tensor | None = None


class BatchNormOptions(NamedTuple):
    """What a batch norm's backward must know of its forward, beside tensors."""

    channels_last: bool  # of the output
    training: bool
    eps: float
    activation: int  # an Activation
    negative_slope: float
    ghost_size: int = 0


class RowNormCall(NamedTuple):
    """The arguments of a layer norm's or RMS norm's forward."""

    op: int  # a RowNorm
    input: Tensor  # [..., *normalized_shape]
    residual: Tensor | None  # of input's shape
    weight: Tensor | None  # normalized_shape
    bias: Tensor | None  # normalized_shape
    sample_scale: Tensor | None  # [input.shape[0]]
    seed: Tensor | None  # int64 [2]: key and offset of a dropout
    normalized_shape: Sequence[int]
    p: float
    eps: float
    weight_offset: float
    sum_dtype: torch.dtype
    keeps_sum: bool


class RowNormSaved(NamedTuple):
    """The tensors that a row norm keeps for its backward; None for those it does not read."""

    sum: Tensor | None  # else input and residual
    input: Tensor | None
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    sample_scale: Tensor | None
    seed: Tensor | None
    # [rows, 4] float32 (float64 if input is): mean, its rest, deviation, scale. None for a sum.
    stats: Tensor | None


class RowNormOptions(NamedTuple):
    """What a row norm's backward must know of its forward, beside tensors."""

    op: int  # a RowNorm
    p: float
    eps: float
    weight_offset: float
    dims: int  # of normalized_shape
    dtype: torch.dtype  # input's
    residual_dtype: torch.dtype | None
    sum_dtype: torch.dtype


class StepOptions(NamedTuple):
    """What all parameters of an optimizer's step have in common."""

    bound: float  # largest magnitude of a gradient's element; inf for none
    lr_scale: int  # an LrScale
    eps_follows_clip: bool  # eps times the clip's coefficient
    atan2: bool  # in place of a quotient with eps
    stochastic_rounding: bool
    materialize: bool  # write the clipped gradients


class AdamGroup(NamedTuple):
    """A parameter group of Adam and AdamW."""

    lr: float | Tensor
    maximize: bool
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool  # the decay of weights, as in AdamW


class SGDGroup(NamedTuple):
    """A parameter group of SGD."""

    lr: float | Tensor
    maximize: bool
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool


class LAMBGroup(NamedTuple):
    """A parameter group of LAMB."""

    lr: float | Tensor
    maximize: bool
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    adapts: bool  # else the trust ratio is 1
    trust_clip: bool  # it is at most 1


class LionGroup(NamedTuple):
    """A parameter group of Lion."""

    lr: float | Tensor
    maximize: bool
    beta1: float
    beta2: float
    weight_decay: float


class ScheduleFreeGroup(NamedTuple):
    """A parameter group of ScheduleFreeAdamW."""

    lr: float | Tensor
    maximize: bool
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    warmup_steps: float
    r: float
    weight_lr_power: float


StepGroup: TypeAlias = AdamGroup | SGDGroup | LAMBGroup | LionGroup | ScheduleFreeGroup
