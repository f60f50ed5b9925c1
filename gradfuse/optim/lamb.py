"""LAMB that unscales, clips, checks and updates in two passes."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradfuse._codes import LrScale, Rule, Slot
from gradfuse._records import LAMBGroup
from gradfuse.distributed import Group, ReplicatedOver
from gradfuse.optim.base import Clip, ClippedOptimizer, check_torchs_options
from gradfuse.optim.options import OptionsOfGroups

__all__ = ["LAMB"]


class LAMB(OptionsOfGroups, ClippedOptimizer):
    """LAMB: AdamW whose learning rate is multiplied by the trust ratio of each parameter.

    The ratio is the parameter's norm over its update's, in float64: whatever a clip made of the
    gradients, a parameter moves by the learning rate times its own size. One sweep takes the norms,
    a second one updates; with the clip's both move 12 values per element. Where ranks hold parts of
    a parameter, an all-reduce of 16 bytes for each adds up the norms. Works as
    gradfuse.optim.AdamW in all else; timm's Lamb loads its state_dict, and it timm's.

    Args:
        params: tensors, (name, tensor) pairs or parameter groups.
        lr: as in gradfuse.optim.AdamW.
        betas: decay of the moments, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: part of the update, >= 0. A group with 0 has the trust ratio 1, as biases and
            norms are meant to, unless always_adapt is set.
        trust_clip: bound the ratio by 1.
        always_adapt: take the ratio in groups without weight decay, too.
        maximize: ascend.
        foreach: accepted for timm's signature; every step is fused.
        clip: as in gradfuse.optim.AdamW; the paper's implementations take 1.
        nonfinite: as in gradfuse.optim.AdamW.
        materialize_clipped_grads: as in gradfuse.optim.AdamW.
        master_weights: as in gradfuse.optim.AdamW.
        stochastic_rounding: as in gradfuse.optim.AdamW.
        eps_follows_clip: as in gradfuse.optim.AdamW.
        group, replicated_over: as in gradfuse.optim.AdamW.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: clip without group is given within torch's ZeroRedundancyOptimizer.
        TypeError: params holds no tensors.

    Source: You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76
    minutes", algorithm 2, with the identity as phi.
    """

    _rule = Rule.LAMB
    _fixed: ClassVar = {
        "bias_correction": True,
        "grad_averaging": True,
        "caution": False,
        "decoupled_decay": False,
        "corrected_weight_decay": False,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        trust_clip: bool = False,
        always_adapt: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        clip: Clip = None,
        nonfinite: str = "skip",
        materialize_clipped_grads: bool = False,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        eps_follows_clip: bool = False,
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
        check_torchs_options("LAMB", None, foreach, None)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "trust_clip": trust_clip,
            "always_adapt": always_adapt,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _lr_scale(self) -> LrScale:
        return LrScale.TRUST_RATIO

    def _group(self, group: dict[str, Any], lr: float | Tensor) -> LAMBGroup:
        beta1, beta2 = group["betas"]
        decay = float(group["weight_decay"])
        adapts = bool(decay or group["always_adapt"])
        return LAMBGroup(
            lr,
            group["maximize"],
            float(beta1),
            float(beta2),
            float(group["eps"]),
            decay,
            adapts,
            bool(group["trust_clip"]),
        )

    def _needed(self, group: dict[str, Any]) -> Slot:
        return Slot.EXP_AVG | Slot.EXP_AVG_SQ | Slot.MASTER_PARAM | Slot.STEP

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        bound = group.get("max_grad_norm")  # of a state_dict of timm or apex
        clip = group.get("clip", self._clip)
        if bound is not None and bound not in (clip, getattr(clip, "max_norm", clip)):
            raise ValueError(
                f"LAMB: clip must be the max_grad_norm of the loaded group, {bound}, got {clip!r}"
            )

    def state_dict(self) -> dict[str, Any]:
        """As gradfuse.optim.AdamW's, with the step's number in each group, as timm has it."""
        out = super().state_dict()
        for saved, group in zip(out["param_groups"], self.param_groups, strict=True):
            saved |= {"step": self._taken(group), "bias_correction": True, "grad_averaging": True}
        return out

    def _load_own(self, state_dict: dict[str, Any], old_groups: list[dict[str, Any]]) -> None:
        super()._load_own(state_dict, old_groups)
        for group in self.param_groups:
            group.pop("max_grad_norm", None)
            self._advance(group, float(group.pop("step", 0.0)))
