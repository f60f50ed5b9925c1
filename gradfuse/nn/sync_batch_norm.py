"""Batch norms that train with the statistics of all ranks, and the change of a model to them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradfuse.nn.batch_norm import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    _BatchNormAct,
    normalise,
)
from gradfuse.nn.batch_norm_mode import PAPERS_WARMUP, HasMode
from gradfuse.ops.batch_norm_ranks import Ranks, check_group, together

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "SyncBatchNormAct1d",
    "SyncBatchNormAct2d",
    "SyncBatchNormAct3d",
    "convert_sync_batchnorm",
]


class _SyncBatchNormAct(_BatchNormAct):
    """What the modules share. `process_group` is that of the constructor, None for all ranks."""

    process_group: ProcessGroup | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | str | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = "relu",
        negative_slope: float = 0.01,
        renorm: bool = False,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: Sequence[float] | None = PAPERS_WARMUP,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if process_group is not None:
            check_group(type(self).__name__, process_group)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            activation=activation, negative_slope=negative_slope, renorm=renorm, r_max=r_max,
            d_max=d_max, warmup=warmup,
        )  # fmt: skip
        self.process_group = process_group

    def forward(
        self, input: Tensor, residual: Tensor | None = None, drop_path: float = 0.0
    ) -> Tensor:
        ranks = self._ranks()

        def call() -> Tensor:
            self._check_input_dim(input)
            if ranks is not None:  # which gather rows of as many channels
                self._check_channels(input)
            return normalise(
                self, input, residual, self.activation, self.negative_slope, drop_path=drop_path,
                ranks=ranks,
            )  # fmt: skip

        vectors = (self.running_mean, self.running_var, self.weight, self.bias)
        return together(ranks, (*vectors, input), call, self.num_features)

    def _check_channels(self, input: Tensor) -> None:
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__}: input must have num_features={self.num_features} "
                f"channels, got {list(input.shape)}"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> _SyncBatchNormAct:
        memo[id(self.process_group)] = self.process_group  # shared: a group has no copies
        copied = memo[id(self)] = self.__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def _ranks(self) -> Ranks | None:
        group = self.process_group
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        return None if group is None else Ranks.of("batch_norm_act", group, self.training)


class SyncBatchNormAct1d(_SyncBatchNormAct, BatchNormAct1d):
    """BatchNormAct1d that trains with the statistics of all ranks, on CPU and CUDA.

    Each rank gives a part of the batch, of any size, also none; all of them call the module, and
    the backward. A step sends 2 * num_features + 1 float64 of each rank in the forward and twice
    num_features in the backward, if the input needs a gradient. Counts, means and squared
    deviations are merged in the order of ranks, so that all get the same bits. Eval mode, a single
    rank and a process without torch.distributed send nothing and are BatchNormAct1d.

    Args:
        process_group: the ranks that share statistics. Default: all, of those that are there when
            the module is called. `copy.deepcopy` shares a group that is given; it cannot be
            pickled, nor the module with it, whose state_dict can.

    The other arguments, parameters, buffers and state_dict are those of BatchNormAct1d, but for
    `ghost_size`: a ghost batch is a part of one rank's batch. With `momentum="auto"` and `renorm`
    all ranks find the same. Gradients of weight and bias are those of a rank's own samples, as
    DistributedDataParallel takes them.

    Raises:
        TypeError: process_group is no ProcessGroup.
        ValueError, RuntimeError: those of BatchNormAct1d, and of an input without num_features
            channels, on all ranks if on one; on CUDA the others get NaN. All ranks must have the
            same num_features.

    Source: Ioffe, Szegedy 2015, algorithm 1; Chan, Golub, LeVeque 1983, equation 1.5.
    """


class SyncBatchNormAct2d(_SyncBatchNormAct, BatchNormAct2d):
    """BatchNormAct2d that trains with the statistics of all ranks, as SyncBatchNormAct1d does."""


class SyncBatchNormAct3d(_SyncBatchNormAct, BatchNormAct3d):
    """BatchNormAct3d that trains with the statistics of all ranks, as SyncBatchNormAct1d does."""


class SyncBatchNormActAny(_SyncBatchNormAct):
    """What torch.nn.SyncBatchNorm becomes: it takes inputs of two and more dimensions."""

    plain = nn.SyncBatchNorm

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def to_batch_norm(self) -> _BatchNorm:
        plain = super().to_batch_norm()
        plain.__dict__["process_group"] = self.process_group
        return plain


class SyncBatchNormThenAct2d(SyncBatchNormAct2d):
    """What timm.layers.BatchNormAct2d becomes: its modules `drop` and `act` follow the norm."""

    drop: nn.Module
    act: nn.Module

    def forward(
        self, input: Tensor, residual: Tensor | None = None, drop_path: float = 0.0
    ) -> Tensor:
        activated: Tensor = self.act(self.drop(super().forward(input, residual, drop_path)))
        return activated


_BY_DIMENSIONS: dict[type[_BatchNorm], type[_SyncBatchNormAct]] = {
    nn.BatchNorm1d: SyncBatchNormAct1d,
    nn.BatchNorm2d: SyncBatchNormAct2d,
    nn.BatchNorm3d: SyncBatchNormAct3d,
    nn.SyncBatchNorm: SyncBatchNormActAny,
}
_TIMM = ("BatchNormAct2d", "SyncBatchNormAct")
_COPIED = ("_parameters", "_buffers", "_modules")


def convert_sync_batchnorm(
    model: nn.Module, process_group: ProcessGroup | None = None
) -> nn.Module:
    """Puts a norm that trains with the statistics of all ranks in the place of each batch norm.

    Takes BatchNormAct1d, 2d and 3d with their activation and mode, torch's BatchNorm1d, 2d, 3d and
    SyncBatchNorm, and timm's BatchNormAct2d; all of them also in a model that `fuse` has changed,
    where the add and the activation after such a norm run by themselves then. The new modules hold
    the very same parameters and buffers, under the same names, and the hooks, so that an optimizer
    may be there already; DistributedDataParallel and torch.compile come after.

    Args:
        model: an nn.Module.
        process_group: the ranks that share statistics. Default: all; of a module that has a group,
            that one.

    Returns:
        nn.Module: model, whose batch norms were replaced; a new module if it is a batch norm.

    Raises:
        TypeError: model is no nn.Module, or process_group no ProcessGroup.
        ValueError: a batch norm has a ghost_size. Nothing was changed.

    Warns of batch norms of other classes, and of those whose forward was set on the instance: they
    stay.
    """
    op = "convert_sync_batchnorm"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}")
    if process_group is not None:
        check_group(op, process_group)
    found = {m: path for path, m in model.named_modules() if isinstance(m, _BatchNorm)}
    for module, path in found.items():
        if isinstance(module, HasMode) and module._mode.ghost_size is not None:
            raise ValueError(
                f"{op}: expected batch norms without ghost_size, which is a part of one rank's "
                f"batch, got {module._mode.ghost_size} at {path or 'the model'}"
            )
    made: dict[nn.Module, nn.Module] = {m: _converted(m, process_group) for m in found}
    left = [f"{found[m] or 'the model'} ({type(m).__name__})" for m in found if made[m] is m]
    if left:
        warnings.warn(
            f"{op}: expected batch norms that are known here, left as they are: {', '.join(left)}",
            stacklevel=2,
        )
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in made:
                parent._modules[name] = made[child]
    return made.get(model, model)


def _converted(bn: _BatchNorm, process_group: ProcessGroup | None) -> _BatchNorm:
    """The module in bn's place; bn if its class is not known."""
    cls = _class_for(bn)
    if cls is None or "forward" in bn.__dict__:
        return bn
    # A fused module's has counted what waits, and is that of its class before.
    state_of: Any = getattr(bn, "_state", None)
    state = bn.__dict__ if state_of is None else state_of()
    sync = cls.__new__(cls)
    nn.Module.__init__(sync)
    for name, value in state.items():
        sync.__dict__[name] = type(value)(value) if name in _COPIED else value
    sync.__dict__.setdefault("activation", None)
    sync.__dict__.setdefault("negative_slope", 0.01)
    sync.process_group = process_group or getattr(bn, "process_group", None)
    return sync


def _class_for(bn: _BatchNorm) -> type[_SyncBatchNormAct] | None:
    cls: Any = type(bn)
    if isinstance(bn, _SyncBatchNormAct):
        return type(bn)
    if hasattr(bn, "_state"):
        cls = cls.plain  # before `fuse`
    if cls in (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d):
        cls = cls.plain
    if cls.__module__.startswith("timm.") and cls.__name__ in _TIMM:
        return SyncBatchNormThenAct2d
    return _BY_DIMENSIONS.get(cls)
