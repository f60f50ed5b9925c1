"""timm's batch norm with an activation of its own, as one op. Needs timm."""

from __future__ import annotations

from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor

from gradfuse.fuse.modules import _Deferred

__all__ = ["DeferredBatchNormAct2d"]


class DeferredBatchNormAct2d(_Deferred, BatchNormAct2d):
    """timm.layers.BatchNormAct2d, computed with its activation in one op."""

    plain = BatchNormAct2d

    def _finish(self, output: Tensor) -> Tensor:
        activated: Tensor = self.act(self.drop(output))
        return activated
