"""Batch normalisation with a residual and an activation, as modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradfuse.nn.batch_norm_mode import (
    DRIFT,
    PAPERS_WARMUP,
    BatchNormMode,
    HasMode,
    averaging,
    is_auto,
)
from gradfuse.ops.batch_norm import batch_norm_act, check_activation, recomputing

if TYPE_CHECKING:
    from gradfuse.ops.batch_norm_ranks import Ranks

__all__ = ["BatchNormAct1d", "BatchNormAct2d", "BatchNormAct3d"]

_STATE = (
    "_parameters",
    "_buffers",
    "num_features",
    "eps",
    "momentum",
    "affine",
    "track_running_stats",
    "training",
)


class _BatchNormAct(HasMode):
    """What the modules for 1, 2 and 3 dimensions share."""

    plain: type[_BatchNorm]

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
        ghost_size: int | None = None,
    ) -> None:
        auto = momentum if isinstance(momentum, str) else None
        mode = BatchNormMode(renorm, r_max, d_max, warmup, ghost_size, auto)
        check_activation(type(self).__name__, activation)
        super().__init__(
            num_features,
            eps,
            0.1 if isinstance(momentum, str) else momentum,
            affine,
            track_running_stats,
            device=device,
            dtype=dtype,
        )
        self.activation = activation
        self.negative_slope = negative_slope
        self._set_mode(mode)

    @classmethod
    def from_batch_norm(
        cls, bn: _BatchNorm, activation: str | None = "relu", negative_slope: float = 0.01
    ) -> _BatchNormAct:
        """The module with bn's own parameters and buffers, not copies of them."""
        check_activation(cls.__name__, activation)
        fused = cls.__new__(cls)
        nn.Module.__init__(fused)
        _share(bn, fused)
        fused.activation = activation
        fused.negative_slope = negative_slope
        if isinstance(bn, HasMode):
            fused._mode, fused._own_momentum = bn._mode, bn._own_momentum
        return fused

    @property
    def mode(self) -> BatchNormMode:
        """How the module takes its statistics in training."""
        return replace(self._mode, momentum="auto" if is_auto(self) else None)

    def to_batch_norm(self) -> _BatchNorm:
        """torch's module with these very parameters and buffers; the activation is left out."""
        plain = self.plain.__new__(self.plain)
        nn.Module.__init__(plain)
        _share(self, plain)
        if is_auto(self):
            plain.momentum = self._own_momentum
            plain._buffers.pop(DRIFT, None)
        return plain

    def forward(
        self, input: Tensor, residual: Tensor | None = None, drop_path: float = 0.0
    ) -> Tensor:
        self._check_input_dim(input)
        slope = self.negative_slope
        return normalise(self, input, residual, self.activation, slope, drop_path=drop_path)

    @property
    def qconfig(self) -> NoReturn:
        # nn.SyncBatchNorm.convert_sync_batchnorm and torch.ao.quantization read this before they
        # replace a batch norm. Their replacement would lose the activation and the residual.
        raise TypeError(
            f"{type(self).__name__}: expected a plain batch norm to convert, got one with "
            f"activation={self.activation!r} and a residual; put to_batch_norm(), an add and an "
            "activation in its place, or call gradfuse.nn.convert_sync_batchnorm"
        )

    def __dir__(self) -> list[str]:
        # torch.jit.trace asks for every name that is listed here.
        return [name for name in super().__dir__() if name != "qconfig"]

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return f"{super().extra_repr()}, activation={self.activation!r}{slope}"


def normalise(
    bn: _BatchNorm,
    input: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    *,
    drop_path: float = 0.0,
    ranks: Ranks | None = None,
) -> Tensor:
    """act(drop_path(bn(input)) + residual) in one op, which counts the batch as bn does. `ranks`
    train with the statistics of all their samples."""
    modes: dict[str, Any] = {}
    if bn.training and isinstance(bn, HasMode) and not bn._is_plain:
        modes = bn._modes()
    factor: float | Tensor = 0.0
    counts = bn.training and bn.track_running_stats
    counted = bn.num_batches_tracked if counts and not recomputing() else None
    if isinstance(bn.momentum, (float, int)):
        factor = bn.momentum
    elif counted is not None and bn.momentum is None:  # a tensor: nothing waits for its value
        factor = averaging(counted, input.shape[0], modes.get("ghost_size"))
    # The backward reads the output where it can: the next layer mostly keeps it anyway. torch's
    # relu6 and leaky_relu keep their input, so that a later op may write to their output.
    tracked = not bn.training or bn.track_running_stats
    output = batch_norm_act(
        input,
        bn.running_mean if tracked else None,
        bn.running_var if tracked else None,
        bn.weight,
        bn.bias,
        residual=residual,
        activation=activation,
        training=bn.training or (bn.running_mean is None and bn.running_var is None),
        momentum=factor,
        eps=bn.eps,
        negative_slope=negative_slope,
        save="bitmask" if activation in ("relu6", "leaky_relu") else "output",
        drop_path=drop_path,
        process_group=ranks,
        **modes,
    )
    if counted is not None:  # last, so that an error leaves all as it was
        counted.add_(1)
    return output


def _share(source: nn.Module, target: nn.Module) -> None:
    for name in _STATE:
        value = getattr(source, name)
        setattr(target, name, dict(value) if isinstance(value, dict) else value)
    target._non_persistent_buffers_set = set(source._non_persistent_buffers_set)


class BatchNormAct1d(_BatchNormAct, nn.BatchNorm1d):
    """act(batch_norm(x) + residual) for inputs [N, C] or [N, C, L].

    Parameters, buffers and state_dict are those of torch.nn.BatchNorm1d.

    Args:
        num_features: channels C of the input [N, C, ...].
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; None for their plain average; "auto"
            sets it for each channel from how the batches differ from the running statistics
            (docs/batch_norm.md), with a buffer `drift` [4, num_features] in the state_dict, which a
            state_dict of torch's may lack.
        affine: learn a weight and a bias.
        track_running_stats: keep running statistics, and normalise with them in eval mode.
        activation: None, "relu", "relu6", "leaky_relu", "silu", "gelu", "gelu_tanh", "hardswish",
            "sigmoid" or "tanh".
        negative_slope: of "leaky_relu".
        renorm, r_max, d_max, warmup, ghost_size: as of BatchNormMode.

    A call takes a `residual` of the input's shape and `drop_path`, the probability that a sample of
    the normalised input is dropped in training, as in `batch_norm_act`.
    A checkpoint's recomputation leaves the running statistics and num_batches_tracked alone, unless
    the module is compiled and the checkpoint around it is not.
    nn.SyncBatchNorm.convert_sync_batchnorm raises TypeError on these modules: it would drop the
    activation and the residual; `convert_sync_batchnorm` keeps them.

    Raises:
        ValueError: the activation is unknown, the mode has no running statistics that it needs, or
            the input has another number of dimensions.
        RuntimeError: renorm in a checkpoint, whose recomputation comes after the update.

    Source: Ioffe, Szegedy 2015, "Batch Normalization", algorithms 1 and 2.
    """

    plain = nn.BatchNorm1d


class BatchNormAct2d(_BatchNormAct, nn.BatchNorm2d):
    """act(batch_norm(x) + residual) for inputs [N, C, H, W].

    Parameters, buffers and state_dict are those of torch.nn.BatchNorm2d; arguments and errors are
    those of BatchNormAct1d.
    """

    plain = nn.BatchNorm2d


class BatchNormAct3d(_BatchNormAct, nn.BatchNorm3d):
    """act(batch_norm(x) + residual) for inputs [N, C, D, H, W].

    Parameters, buffers and state_dict are those of torch.nn.BatchNorm3d; arguments and errors are
    those of BatchNormAct1d.
    """

    plain = nn.BatchNorm3d
