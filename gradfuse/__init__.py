"""Gradient clipping for PyTorch that is right where gradients explode."""

from gradfuse.clipper import GradClipper
from gradfuse.ops.batch_norm import batch_norm_act
from gradfuse.ops.clip import (
    adaptive_clip_grad_,
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from gradfuse.report import GradReport, ParameterGrad

__version__ = "0.1.0"

__all__ = [
    "GradClipper",
    "GradReport",
    "ParameterGrad",
    "adaptive_clip_grad_",
    "batch_norm_act",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
]
