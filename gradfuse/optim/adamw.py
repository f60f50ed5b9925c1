"""AdamW that unscales, clips, checks and updates in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradfuse._codes import Rule, Slot
from gradfuse._records import AdamGroup
from gradfuse.distributed import Group, ReplicatedOver
from gradfuse.optim.base import Clip, ClippedOptimizer, check_torchs_options

__all__ = ["AdamW", "adam_group", "adam_state"]

_STATE = Slot.EXP_AVG | Slot.EXP_AVG_SQ | Slot.MASTER_PARAM | Slot.STEP
_AMSGRAD_STATE = _STATE | Slot.MAX_EXP_AVG_SQ


class AdamW(ClippedOptimizer, torch.optim.AdamW):
    """torch.optim.AdamW with clipping, loss scale and the check for NaN and inf inside the step.

    Computes the numbers of torch's clip_grad_norm_ followed by AdamW(fused=True), to rounding, and
    the same bits for any number of threads. Gradients are read, not written: after a step p.grad is
    what backward left (scaled, under a GradScaler) unless materialize_clipped_grads is set.

    Args:
        params: as in torch.optim.AdamW.
        lr: learning rate; a float, or a Tensor of one element, which on CUDA is not waited for. A
            CUDA graph takes a Tensor on the GPU only.
        betas: as in torch.optim.AdamW.
        eps: as in torch.optim.AdamW.
        weight_decay: as in torch.optim.AdamW.
        amsgrad: as in torch.optim.AdamW.
        maximize: as in torch.optim.AdamW.
        foreach, fused: accepted for torch's signature; every step is fused.
        capturable: accepted for torch's signature; a CUDA step can be captured if lr is a Tensor.
        differentiable: must be False, because a fused step has no derivative.
        decoupled_weight_decay: must be True; for AdamW(params, **optimizer.defaults).
        clip: upper bound of the gradients' global norm, a gradfuse.policies.Policy, or None.
        nonfinite: what a NaN or inf gradient does. "skip": no parameter and no state changes, the
            step is counted in skipped_steps. "error": RuntimeError, nothing is written.
            "propagate": what torch does. With clip=None and "propagate" no norm is computed.
        materialize_clipped_grads: write the clipped gradients to p.grad, for those who log them.
        master_weights: keep float32 copies of float16 and bfloat16 parameters in the state, and
            their moments in float32; the parameters are the copies, rounded.
        stochastic_rounding: round bfloat16 parameters and moments at random, right on average.
        update_clip: divide the learning rate of a parameter by the root mean square of
            g / sqrt(second moment), where that is above 1 (StableAdamW).
        eps_follows_clip: multiply eps by the coefficient of the clip, so that the update does not
            depend on the clip's scale: a small layer beside a large one is not stopped by eps.
            Not below what the second moment's dtype resolves, 3e-18 for float32. Where a single
            step is clipped, elements that eps damps move by a learning rate at most in that step.
        atan2: update by atan2(first moment, sqrt(second moment)) in place of their quotient with
            eps, which then bounds update_clip's ratio alone. A constant gradient moves by pi / 4 of
            the learning rate.
        group, replicated_over: as in clip_grad_norm_: ranks whose gradients count in the same norm,
            beyond what DTensors say: within ZeroRedundancyOptimizer, for shards made by hand, over
            pipeline stages. All of them must step, and skip the same steps. With group, clip cannot
            be a policy that looks at single parameters.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: clip without group is given within torch's ZeroRedundancyOptimizer.
        TypeError: params holds no tensors.

    Source: Loshchilov, Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2; Wortsman
    et al. 2023, "Stable and low-precision training for large-scale vision-language models",
    algorithm 2 (update_clip); Everett et al. 2024, "Scaling Exponents Across Parameterizations and
    Optimizers", section 4 (atan2).
    """

    _rule = Rule.ADAMW

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = True,
        clip: Clip = None,
        nonfinite: str = "skip",
        materialize_clipped_grads: bool = False,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        update_clip: bool = False,
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
        self._update_clip = update_clip
        self._eps_follows_clip = eps_follows_clip
        self._atan2 = atan2
        check_torchs_options("AdamW", fused, foreach, differentiable)
        if not decoupled_weight_decay:
            raise ValueError(
                "AdamW: decoupled_weight_decay must be True, got False; that is gradfuse.optim.Adam"
            )
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)

    def _group(self, group: dict[str, Any], lr: float | Tensor) -> AdamGroup:
        return adam_group(group, lr, decoupled=True)

    def _needed(self, group: dict[str, Any]) -> Slot:
        return adam_state(group)


def adam_group(group: dict[str, Any], lr: float | Tensor, decoupled: bool) -> AdamGroup:
    beta1, beta2 = group["betas"]
    decay = float(group["weight_decay"])
    return AdamGroup(
        lr, group["maximize"], float(beta1), float(beta2), float(group["eps"]), decay, decoupled
    )


def adam_state(group: dict[str, Any]) -> Slot:
    return _AMSGRAD_STATE if group["amsgrad"] else _STATE
