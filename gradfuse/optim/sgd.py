"""SGD that unscales, clips, checks and updates in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradfuse._codes import Rule, Slot
from gradfuse._records import SGDGroup
from gradfuse.distributed import Group, ReplicatedOver
from gradfuse.optim.base import Clip, ClippedOptimizer, check_torchs_options

__all__ = ["SGD"]

_NONE = Slot(0)
_MOMENTUM = Slot.EXP_AVG | Slot.STEP
_MASTER = Slot.MASTER_PARAM | Slot.STEP
_MASTER_AND_MOMENTUM = _MASTER | Slot.EXP_AVG


class SGD(ClippedOptimizer, torch.optim.SGD):
    """torch.optim.SGD with clipping, loss scale and the check for NaN and inf inside the step.

    Computes the numbers of torch's clip_grad_norm_ followed by SGD(fused=True), to rounding. Works
    as gradfuse.optim.AdamW in all else.

    Args:
        params: as in torch.optim.SGD.
        lr: as in gradfuse.optim.AdamW.
        momentum: as in torch.optim.SGD.
        dampening: as in torch.optim.SGD.
        weight_decay: as in torch.optim.SGD.
        nesterov: as in torch.optim.SGD.
        maximize: as in torch.optim.SGD.
        foreach, differentiable, fused: as in gradfuse.optim.AdamW.
        clip: as in gradfuse.optim.AdamW.
        nonfinite: as in gradfuse.optim.AdamW.
        materialize_clipped_grads: as in gradfuse.optim.AdamW.
        master_weights: as in gradfuse.optim.AdamW.
        stochastic_rounding: as in gradfuse.optim.AdamW.
        group, replicated_over: as in gradfuse.optim.AdamW.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: clip without group is given within torch's ZeroRedundancyOptimizer.
        TypeError: params holds no tensors.

    Source: Sutskever, Martens, Dahl, Hinton 2013, "On the importance of initialization and momentum
    in deep learning".
    """

    _rule = Rule.SGD

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
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        clip: Clip = None,
        nonfinite: str = "skip",
        materialize_clipped_grads: bool = False,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        group: Group | None = None,
        replicated_over: ReplicatedOver | None = None,
    ) -> None:
        self._configure(
            clip,
            nonfinite,
            materialize_clipped_grads,
            master_weights,
            stochastic_rounding,
            group,
            replicated_over,
        )
        check_torchs_options("SGD", fused, foreach, differentiable)
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)

    def _group(self, group: dict[str, Any], lr: float | Tensor) -> SGDGroup:
        return SGDGroup(
            lr,
            group["maximize"],
            group["momentum"],
            group["dampening"],
            float(group["weight_decay"]),
            group["nesterov"],
        )

    def _needed(self, group: dict[str, Any]) -> Slot:
        if self._master:
            return _MASTER_AND_MOMENTUM if group["momentum"] else _MASTER
        if group["momentum"]:
            return _MOMENTUM
        return Slot.STEP if self._stochastic else _NONE  # random bits come from the step's number
