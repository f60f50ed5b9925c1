"""The optimizers' updates of one parameter in plain torch."""

from __future__ import annotations

import math
from typing import NamedTuple

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

__all__ = ["State", "followed", "lr_sums", "updated"]

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
    lr_scale: float | None = None,
) -> tuple[Tensor, State]:
    """The parameter and its moments after the step; updates WEIGHT_SUM and LR_MAX in numbers.

    Args:
        taken: the steps before this one.
        lr_scale: the factor of options.lr_scale, or None to find it here.
    """
    if isinstance(group, SGDGroup):
        return _sgd(x, g, moments, group, taken == 0.0)
    if isinstance(group, LionGroup):
        return _lion(x, g, moments, group)
    if isinstance(group, ScheduleFreeGroup):
        return _schedule_free(x, g, moments, numbers, group, taken + 1.0)
    return _adam(x, g, moments, group, taken + 1.0, options, lr_scale)


class _Moments(NamedTuple):
    """What an update of Adam, AdamW and LAMB is made of."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    bound: Tensor  # what the update divides by: exp_avg_sq, or its maximum with amsgrad
    root: Tensor  # of bound, without bias


def _moments(
    x: Tensor, g: Tensor, state: State, group: AdamGroup | LAMBGroup, step: float
) -> _Moments:
    bias_correction2 = 1.0 - group.beta2**step
    if isinstance(group, AdamGroup) and not group.decoupled and group.weight_decay:
        g = g + x * group.weight_decay
    exp_avg = state[Slot.EXP_AVG].to(g.dtype).lerp(g, 1.0 - group.beta1)
    exp_avg_sq = state[Slot.EXP_AVG_SQ].to(g.dtype) * group.beta2 + g * g * (1.0 - group.beta2)
    bound = exp_avg_sq
    if Slot.MAX_EXP_AVG_SQ in state:
        bound = torch.maximum(state[Slot.MAX_EXP_AVG_SQ].to(g.dtype), exp_avg_sq)
    return _Moments(exp_avg, exp_avg_sq, bound, bound.sqrt() / math.sqrt(bias_correction2))


def lr_sums(
    x: Tensor,
    g: Tensor,
    state: State,
    group: AdamGroup | LAMBGroup,
    taken: float,
    options: StepOptions,
) -> tuple[float, float]:
    """The sums that options.lr_scale depends on: of the squares of g / sqrt(second moment), or of
    those of the parameter and of its update.

    Args:
        taken: the steps before this one.
    """
    step = taken + 1.0
    m = _moments(x, g, state, group, step)
    if options.lr_scale == LrScale.UPDATE_CLIP:
        second = (m.exp_avg_sq / (1.0 - group.beta2**step)).clamp(min=group.eps * group.eps)
        return float(torch.where(g == 0, 0.0, g * g / second).double().sum()), 0.0
    if not _adapts(group, options):
        return 0.0, 0.0
    direction = m.exp_avg / (1.0 - group.beta1**step) / (m.root + group.eps)
    direction = torch.where(m.exp_avg == 0, 0.0, direction) + x * group.weight_decay
    of_param, of_update = (float(t.double().square().sum()) for t in (x, direction))
    return of_param, of_update


def _adapts(group: AdamGroup | LAMBGroup, options: StepOptions) -> bool:
    is_trusted = options.lr_scale == LrScale.TRUST_RATIO
    return is_trusted and isinstance(group, LAMBGroup) and group.adapts


def _lr_scale(
    sums: tuple[float, float], numel: int, group: AdamGroup | LAMBGroup, options: StepOptions
) -> float:
    if options.lr_scale == LrScale.UPDATE_CLIP:
        return 1.0 / max(1.0, math.sqrt(sums[0] / numel)) if numel else 1.0
    of_param, of_update = sums
    if not (of_param > 0.0 and of_update > 0.0):
        return 1.0
    ratio = math.sqrt(of_param) / math.sqrt(of_update)
    return min(ratio, 1.0) if isinstance(group, LAMBGroup) and group.trust_clip else ratio


def _adam(
    x: Tensor,
    g: Tensor,
    state: State,
    group: AdamGroup | LAMBGroup,
    step: float,
    options: StepOptions,
    lr_scale: float | None,
) -> tuple[Tensor, State]:
    lr = float(group.lr)
    bias_correction1 = 1.0 - group.beta1**step
    decay = 0.0 if isinstance(group, AdamGroup) and not group.decoupled else group.weight_decay
    m = _moments(x, g, state, group, step)
    new = {Slot.EXP_AVG: m.exp_avg, Slot.EXP_AVG_SQ: m.exp_avg_sq}
    if Slot.MAX_EXP_AVG_SQ in state:
        new[Slot.MAX_EXP_AVG_SQ] = m.bound
    if options.lr_scale == LrScale.UPDATE_CLIP or _adapts(group, options):
        if lr_scale is None:
            sums = lr_sums(x, g, state, group, step - 1.0, options)
            lr_scale = _lr_scale(sums, g.numel(), group, options)
        lr *= lr_scale
    if options.atan2:
        return x * (1.0 - lr * decay) - lr * torch.atan2(m.exp_avg / bias_correction1, m.root), new
    update = lr / bias_correction1 * m.exp_avg / (m.root + group.eps)
    return x * (1.0 - lr * decay) - update, new


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
