"""The factors of learning rates that need norms of whole parameters, from sums over their shards:
LAMB's trust ratios and AdamW's update_clip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradfuse._codes import LrScale

__all__ = ["lr_scales_of"]


def lr_scales_of(
    sums: Tensor, lr_scale: LrScale, numels: Sequence[int], trust_clips: Sequence[bool]
) -> Tensor:
    """The factor for each parameter: update_clip_factor and trust_ratio of csrc/math/adamw.h.

    Args:
        sums: [parameters, 2] float64, what Stepper.lr_sums returns, over all shards.
        numels: elements of each whole parameter; a complex one counts as two.
        trust_clips: whether the trust ratio of each is at most 1.

    Returns:
        [parameters] float64.
    """
    if lr_scale == LrScale.UPDATE_CLIP:
        mean = sums[:, 0] / sums.new_tensor(numels).clamp(min=1.0)
        return torch.where(mean > 1.0, 1.0 / mean.sqrt(), 1.0)
    of_param, of_update = sums.unbind(1)
    ratio = of_param.sqrt() / of_update.sqrt()
    most = torch.where(torch.tensor(trust_clips, device=sums.device), 1.0, torch.inf)
    return torch.where((of_param > 0.0) & (of_update > 0.0), ratio.minimum(most), 1.0)
