"""SGD that unscales, clips, checks and updates in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradfuse.optim.base import Clip, ClippedOptimizer

__all__ = ["SGD"]


class SGD(ClippedOptimizer, torch.optim.SGD):
    """torch.optim.SGD with clipping, loss scale and the check for NaN and inf inside the step.

    The same numbers as torch's clip_grad_norm_ followed by SGD(fused=True), to rounding. All else
    as in gradfuse.optim.AdamW.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        clip, nonfinite, materialize_clipped_grads, master_weights, stochastic_rounding: as in
            gradfuse.optim.AdamW.

    Raises:
        ValueError: an argument is out of range.
        TypeError: params holds no tensors.

    Source: Sutskever, Martens, Dahl, Hinton 2013, "On the importance of initialization and momentum
    in deep learning".
    """

    _rule = 1
    _names = ("momentum_buffer", "", "", "master_param", "step")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        clip: Clip = None,
        nonfinite: str = "skip",
        materialize_clipped_grads: bool = False,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        self._configure(
            clip, nonfinite, materialize_clipped_grads, master_weights, stochastic_rounding
        )
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)

    def _options(self, group: dict[str, Any], lr: float | Tensor) -> tuple[Any, ...]:
        return (
            lr, group["maximize"], group["momentum"], group["dampening"],
            float(group["weight_decay"]), group["nesterov"],
        )  # fmt: skip

    def _needed(self, group: dict[str, Any]) -> int:
        if self._master:
            return 0b11001 if group["momentum"] else 0b11000
        if group["momentum"]:
            return 0b10001
        return 0b10000 if self._stochastic else 0  # the counter is what the random bits come from
