"""timm's norms and dropped paths. Needs timm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm, RmsNorm
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from gradfuse.fuse.dropouts import SwappedDropPath
from gradfuse.fuse.modules import _Deferred
from gradfuse.fuse.norms import SwappedLayerNorm, SwappedNorm
from gradfuse.fuse.swapped import Swapped

__all__ = ["SWAPPED"]


class DeferredBatchNormAct2d(_Deferred, BatchNormAct2d):
    """timm.layers.BatchNormAct2d, computed with its activation in one op."""

    plain = BatchNormAct2d

    def _finish(self, output: Tensor) -> Tensor:
        activated: Tensor = self.act(self.drop(output))
        return activated


class _Fast(SwappedNorm):
    """timm's fast norms compute in autocast's dtype."""

    _fast_norm: bool

    def _reason_against(self, input: Tensor, weight: Tensor | None) -> str:
        if self._fast_norm and torch.is_autocast_enabled(input.device.type):
            return "autocast"
        return super()._reason_against(input, weight)


class SwappedTimmLayerNorm(_Fast, SwappedLayerNorm, LayerNorm):
    """timm.layers.LayerNorm by gradfuse's op."""

    plain = LayerNorm


class SwappedRmsNorm(_Fast, RmsNorm):
    """timm.layers.RmsNorm by gradfuse's op."""

    plain = RmsNorm

    def _shape(self) -> Sequence[int]:
        shape: Sequence[int] = self.normalized_shape
        return shape


class SwappedTimmDropPath(SwappedDropPath, DropPath):
    """timm.layers.DropPath whose output waits for a residual and a norm."""

    plain = DropPath

    def _probability(self) -> float:
        return float(self.drop_prob)

    def _draw(self, input: Tensor) -> Tensor:
        keep = 1.0 - self.drop_prob
        size = [input.shape[0], *[1] * (input.ndim - 1)]
        scale = torch.empty(size, dtype=input.dtype, device=input.device).bernoulli_(keep)
        return scale.div_(keep) if keep > 0.0 and self.scale_by_keep else scale


SWAPPED: dict[type[nn.Module], type[Swapped]] = {
    BatchNormAct2d: DeferredBatchNormAct2d,
    LayerNorm: SwappedTimmLayerNorm,
    RmsNorm: SwappedRmsNorm,
    DropPath: SwappedTimmDropPath,
}
