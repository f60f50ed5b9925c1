"""Lion that unscales, clips, checks and updates in one pass."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradfuse._codes import Rule, Slot
from gradfuse._records import LionGroup
from gradfuse.distributed import Group, ReplicatedOver
from gradfuse.optim.base import Clip, ClippedOptimizer, check_torchs_options
from gradfuse.optim.options import OptionsOfGroups

__all__ = ["Lion"]


class Lion(OptionsOfGroups, ClippedOptimizer):
    """Lion: each element moves by the learning rate, in the sign of a mean of its gradients.

    A clip does not change the size of an update, but how much this gradient counts beside those
    before. Moves 6 values per element: the gradient twice, parameter and momentum in and out. Works
    as gradfuse.optim.AdamW in all else; timm's Lion loads its state_dict, and it timm's.

    Args:
        params: tensors, (name, tensor) pairs or parameter groups.
        lr: as in gradfuse.optim.AdamW. The paper takes 3 to 10 times less than for AdamW.
        betas: weight of the momentum in the sign's mean, and its decay, each in [0, 1).
        weight_decay: decoupled, >= 0. The paper takes 3 to 10 times more than for AdamW.
        maximize: ascend.
        foreach: accepted for timm's signature; every step is fused.
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

    Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2.
    """

    _rule = Rule.LION
    _fixed: ClassVar = {"caution": False, "corrected_weight_decay": False}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
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
        check_torchs_options("Lion", None, foreach, None)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def _group(self, group: dict[str, Any], lr: float | Tensor) -> LionGroup:
        beta1, beta2 = group["betas"]
        decay = float(group["weight_decay"])
        return LionGroup(lr, group["maximize"], float(beta1), float(beta2), decay)

    def _needed(self, group: dict[str, Any]) -> Slot:
        state = Slot.EXP_AVG | Slot.MASTER_PARAM
        return state | Slot.STEP if self._stochastic else state  # random bits come from its number
