"""The optimizers' updates of one parameter in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradfuse._codes import LrScale, Slot
from gradfuse._records import (
    AdamGroup,
    LAMBGroup,
    LionGroup,
    ScheduleFreeGroup,
    SGDGroup,
    StepGroup,
    StepOptions,
)

__all__ = ["State", "followed", "updated"]

State = dict[Slot, Tensor]


def followed(group: StepGroup, coefficient: float, smallest: float) -> StepGroup:
    """The group with eps times the clip's coefficient; followed_eps of csrc/math/adamw.h.

    Args:
        smallest: normal number of the second moment's dtype.
    """
    if isinstance(group, (SGDGroup, LionGroup)):
        return group
    least = min(group.eps, math.sqrt(smallest / (1.0 - group.beta2)))
    return group._replace(eps=max(group.eps * coefficient, least))


def updated(
    x: Tensor,
    g: Tensor,
    moments: State,
    numbers: State,
    group: StepGroup,
    taken: float,
    options: StepOptions,
) -> tuple[Tensor, State]:
    """The parameter and its moments after the step; updates WEIGHT_SUM and LR_MAX in numbers.

    Args:
        taken: the steps before this one.
    """
    if isinstance(group, SGDGroup):
        return _sgd(x, g, moments, group, taken == 0.0)
    if isinstance(group, LionGroup):
        return _lion(x, g, moments, group)
    if isinstance(group, ScheduleFreeGroup):
        return _schedule_free(x, g, moments, numbers, group, taken + 1.0)
    return _adam(x, g, moments, group, taken + 1.0, options)


def _adam(
    x: Tensor,
    g: Tensor,
    state: State,
    group: AdamGroup | LAMBGroup,
    step: float,
    options: StepOptions,
) -> tuple[Tensor, State]:
    lr = float(group.lr)
    bias_correction1, bias_correction2 = 1.0 - group.beta1**step, 1.0 - group.beta2**step
    decay = group.weight_decay
    if isinstance(group, AdamGroup) and not group.decoupled:
        g = g + x * decay if decay else g
        decay = 0.0
    exp_avg = state[Slot.EXP_AVG].to(g.dtype).lerp(g, 1.0 - group.beta1)
    exp_avg_sq = state[Slot.EXP_AVG_SQ].to(g.dtype) * group.beta2 + g * g * (1.0 - group.beta2)
    new = {Slot.EXP_AVG: exp_avg, Slot.EXP_AVG_SQ: exp_avg_sq}
    if options.lr_scale == LrScale.UPDATE_CLIP and g.numel():
        least = group.eps * group.eps
        ratio = g * g / (exp_avg_sq / bias_correction2).clamp(min=least)
        mean = float(torch.where(g == 0, 0.0, ratio).double().mean())
        lr /= max(1.0, math.sqrt(mean))
    bound = exp_avg_sq
    if Slot.MAX_EXP_AVG_SQ in state:
        bound = torch.maximum(state[Slot.MAX_EXP_AVG_SQ].to(g.dtype), exp_avg_sq)
        new[Slot.MAX_EXP_AVG_SQ] = bound
    root = bound.sqrt() / math.sqrt(bias_correction2)
    if options.atan2:
        return x * (1.0 - lr * decay) - lr * torch.atan2(exp_avg / bias_correction1, root), new
    if isinstance(group, LAMBGroup) and group.adapts:
        direction = exp_avg / bias_correction1 / (root + group.eps)
        direction = torch.where(exp_avg == 0, 0.0, direction) + x * decay
        lr *= _trust_ratio(x, direction, group.trust_clip)
    update = lr / bias_correction1 * exp_avg / (root + group.eps)
    return x * (1.0 - lr * decay) - update, new


def _trust_ratio(x: Tensor, direction: Tensor, clips: bool) -> float:
    of_param, of_update = (float(torch.linalg.vector_norm(t.double())) for t in (x, direction))
    if not (of_param > 0.0 and of_update > 0.0):
        return 1.0
    ratio = of_param / of_update
    return min(ratio, 1.0) if clips else ratio


def _sgd(
    x: Tensor, g: Tensor, state: State, group: SGDGroup, is_first: bool
) -> tuple[Tensor, State]:
    lr = float(group.lr)
    if group.weight_decay:
        g = g + x * group.weight_decay
    if Slot.EXP_AVG not in state:
        return x - g * lr, {}
    dampening = 0.0 if is_first else group.dampening
    buffer = state[Slot.EXP_AVG].to(g.dtype) * group.momentum + g * (1.0 - dampening)
    return x - (g + buffer * group.momentum if group.nesterov else buffer) * lr, {
        Slot.EXP_AVG: buffer
    }


def _lion(x: Tensor, g: Tensor, state: State, group: LionGroup) -> tuple[Tensor, State]:
    lr, exp_avg = float(group.lr), state[Slot.EXP_AVG].to(g.dtype)
    mean = exp_avg.lerp(g, 1.0 - group.beta1)
    sign = torch.where(mean.isnan(), mean, mean.sign())
    new = {Slot.EXP_AVG: exp_avg.lerp(g, 1.0 - group.beta2)}
    return x * (1.0 - lr * group.weight_decay) - lr * sign, new


def _schedule_free(
    y: Tensor,
    g: Tensor,
    state: State,
    numbers: State,
    group: ScheduleFreeGroup,
    step: float,
) -> tuple[Tensor, State]:
    """schedule_free_step and schedule_free_update of csrc/math."""
    lr = float(group.lr)
    if step <= group.warmup_steps:
        lr *= step / group.warmup_steps
    weight_sum, lr_max = float(numbers[Slot.WEIGHT_SUM]), max(float(numbers[Slot.LR_MAX]), lr)
    weight = step**group.r * lr_max**group.weight_lr_power
    weight_sum += weight
    numbers[Slot.WEIGHT_SUM].fill_(weight_sum)
    numbers[Slot.LR_MAX].fill_(lr_max)
    c = weight / weight_sum if weight_sum > 0.0 else 0.0
    bias_correction2 = 1.0 - group.beta2**step
    z = state[Slot.EXP_AVG].to(g.dtype)
    exp_avg_sq = state[Slot.EXP_AVG_SQ].to(g.dtype) * group.beta2 + g * g * (1.0 - group.beta2)
    move = g / (exp_avg_sq.sqrt() / math.sqrt(bias_correction2) + group.eps)
    if group.weight_decay:
        move = move + y * group.weight_decay
    new_y = y + (z - y) * c - move * (lr * (1.0 - group.beta1 * (1.0 - c)))
    return new_y, {Slot.EXP_AVG: z - move * lr, Slot.EXP_AVG_SQ: exp_avg_sq}
