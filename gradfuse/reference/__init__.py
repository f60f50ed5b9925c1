"""The pure-torch meaning of every op: the fallback without the compiled module, the tests' oracle.

One file per stem. This module has the functions and signatures of gradfuse._C.
"""

import torch

from gradfuse.reference.adaptive_clip import adaptive_clip_
from gradfuse.reference.batch_norm import (
    ACTIVATIONS,
    MASKED,
    OUTPUT_SAVED,
    activate,
    batch_norm_act,
    batch_norm_backward,
    batch_norm_forward,
    batch_norm_gradient_sums,
    batch_norm_statistics,
    output_like,
    unpack_mask,
)
from gradfuse.reference.batch_norm_modes import DRIFT_ROWS, ghost_batches, ghost_sizes, split_saved
from gradfuse.reference.clip import (
    ParameterList,
    apply_,
    clamp_,
    clip_,
    scale_,
    stats,
)
from gradfuse.reference.dropout import addend, philox, random_words, stays
from gradfuse.reference.optim import Stepper
from gradfuse.reference.ranks import exact_limbs, exact_plan, plan_of_sums
from gradfuse.reference.row_norm import (
    check_row_norm,
    row_norm,
    row_norm_backward,
    row_norm_forward,
)
from gradfuse.reference.stream import stream

__all__ = [
    "ACTIVATIONS",
    "DRIFT_ROWS",
    "MASKED",
    "OUTPUT_SAVED",
    "ParameterList",
    "Stepper",
    "activate",
    "adaptive_clip_",
    "addend",
    "apply_",
    "batch_norm_act",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_norm_gradient_sums",
    "batch_norm_statistics",
    "check_row_norm",
    "clamp_",
    "clip_",
    "exact_limbs",
    "exact_plan",
    "ghost_batches",
    "ghost_sizes",
    "isa",
    "num_threads",
    "output_like",
    "philox",
    "plan_of_sums",
    "random_words",
    "row_norm",
    "row_norm_backward",
    "row_norm_forward",
    "scale_",
    "split_saved",
    "stats",
    "stays",
    "stream",
    "unpack_mask",
]


def isa() -> str:
    """The instruction set of the kernels: torch's own choice."""
    return "torch"


def num_threads() -> int:
    return torch.get_num_threads()
