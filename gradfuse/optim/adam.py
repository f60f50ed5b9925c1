"""Adam that unscales, clips, checks and updates in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradfuse._codes import Rule, Slot
from gradfuse._records import AdamGroup
from gradfuse.distributed import Group, ReplicatedOver
from gradfuse.optim.adamw import adam_group, adam_state
from gradfuse.optim.base import Clip, ClippedOptimizer, check_torchs_options

__all__ = ["Adam"]


class Adam(ClippedOptimizer, torch.optim.Adam):
    """torch.optim.Adam with clipping, loss scale and the check for NaN and inf inside the step.

    The decay of weights is added to the gradients after the clip (L2). Works as
    gradfuse.optim.AdamW in all else.

    Args:
        params: as in torch.optim.Adam.
        lr: as in gradfuse.optim.AdamW.
        betas: as in torch.optim.Adam.
        eps: as in torch.optim.Adam.
        weight_decay: as in torch.optim.Adam.
        amsgrad: as in torch.optim.Adam.
        maximize: as in torch.optim.Adam.
        foreach, fused, capturable, differentiable: as in gradfuse.optim.AdamW.
        decoupled_weight_decay: as in torch.optim.Adam: True makes this AdamW.
        clip: as in gradfuse.optim.AdamW.
        nonfinite: as in gradfuse.optim.AdamW.
        materialize_clipped_grads: as in gradfuse.optim.AdamW.
        master_weights: as in gradfuse.optim.AdamW.
        stochastic_rounding: as in gradfuse.optim.AdamW.
        eps_follows_clip: as in gradfuse.optim.AdamW.
        atan2: as in gradfuse.optim.AdamW.
        group, replicated_over: as in gradfuse.optim.AdamW.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: clip without group is given within torch's ZeroRedundancyOptimizer.
        TypeError: params holds no tensors.

    Source: Kingma, Ba 2015, "Adam: A Method for Stochastic Optimization", algorithm 1.
    """

    _rule = Rule.ADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        clip: Clip = None,
        nonfinite: str = "skip",
        materialize_clipped_grads: bool = False,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        eps_follows_clip: bool = False,
        atan2: bool = False,
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
        self._eps_follows_clip = eps_follows_clip
        self._atan2 = atan2
        check_torchs_options("Adam", fused, foreach, differentiable)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            **({"decoupled_weight_decay": True} if decoupled_weight_decay else {}),
        )

    def _group(self, group: dict[str, Any], lr: float | Tensor) -> AdamGroup:
        return adam_group(group, lr, bool(group.get("decoupled_weight_decay")))

    def _needed(self, group: dict[str, Any]) -> Slot:
        return adam_state(group)
