"""torchvision's stochastic depth. Needs torchvision."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import StochasticDepth

from gradfuse.fuse.dropouts import SwappedDropPath

__all__ = ["SwappedStochasticDepth"]


class SwappedStochasticDepth(SwappedDropPath, StochasticDepth):  # type: ignore[misc]
    """torchvision.ops.StochasticDepth whose output waits for a residual and a norm."""

    p: float

    plain = StochasticDepth

    def _probability(self) -> float:
        return float(self.p)

    def _draw(self, input: Tensor) -> Tensor:
        first = input.shape[0] if self.mode == "row" else 1
        size = [first, *[1] * (input.ndim - 1)]
        noise = torch.empty(size, dtype=input.dtype, device=input.device).bernoulli_(1.0 - self.p)
        return noise if self.p == 1.0 else noise.div_(1.0 - self.p)
