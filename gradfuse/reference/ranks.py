"""The norm from the sums of several ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from gradfuse._codes import Action
from gradfuse.reference.clip import combine_norms, decided, is_wide, stats_of_all
from gradfuse.reference.exact import NARROW, WIDE, exact_sum, form_of, sum_of_words
from gradfuse.reference.gradients import Access, check_gradients, read_tensors

__all__ = ["exact_limbs", "exact_plan", "plan_of_sums"]


def plan_of_sums(
    op: str,
    sums: Tensor,
    wide: bool,
    max_norm: float,
    norm_type: float,
    nonfinite: int,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    p = norm_type
    norms = [
        (1.0, power) if math.isinf(p) or not math.isfinite(power) else (2.0**e, power ** (1 / p))
        for power, e, _, _ in sums.tolist()
    ]
    found_inf, refused = (bool((sums[:, i] != 0).any()) for i in (2, 3))
    total_norm, plan, _ = decided(
        op,
        combine_norms(norms, p),
        max_norm,
        p,
        nonfinite,
        1.0 if scale is None else float(scale),
        found_inf,
        wide,
        sums.device,
    )
    if refused:
        plan[3] = Action.REFUSE
    return total_norm, plan


@torch.no_grad()
def exact_limbs(op: str, tensors: Iterable[Tensor], written: bool) -> tuple[Tensor, Tensor]:
    listed = read_tensors(op, tensors, False)
    grads = check_gradients(op, listed, Access.WRITE if written else Access.READ)
    stats = stats_of_all(listed, grads, 1.0)
    form = WIDE if is_wide(grads) else NARROW
    return exact_sum(g for _, g in grads.each).words(form).to(stats.device), stats


def exact_plan(
    op: str,
    limbs: Tensor,
    wide: bool,
    max_norm: float,
    nonfinite: int,
    scale: Tensor | None,
    found_inf: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if limbs.shape != (form_of(limbs).words,) or limbs.dtype != torch.int64:
        raise ValueError(
            f"{op}: limbs must be int64 [{NARROW.words}] or [{WIDE.words}], got {limbs.dtype} "
            f"{list(limbs.shape)}"
        )
    of_scale = 1.0 if scale is None else float(scale)
    bad = found_inf is not None and bool(found_inf)
    total_norm, plan, _ = decided(
        op, sum_of_words(limbs), max_norm, 2.0, nonfinite, of_scale, bad, wide, limbs.device
    )
    return total_norm, plan
