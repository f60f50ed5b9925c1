"""Gradient clipping and fused norms for PyTorch, right where gradients explode."""

from gradfuse import curriculum, init, nn, optim, policies
from gradfuse.adapt import AdaptReport, AdaptRow, adapt_statistics
from gradfuse.clipping import GradClipper, GradReport, ParameterGrad
from gradfuse.fuse import (
    FuseReport,
    Site,
    compile_backend,
    fuse,
    fuse_graph,
    fuse_report,
    unfuse,
)
from gradfuse.ops.adaptive_clip import adaptive_clip_grad_
from gradfuse.ops.batch_norm import batch_norm_act
from gradfuse.ops.clip import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from gradfuse.ops.dropout_add import dropout_add
from gradfuse.ops.layer_norm import add_layer_norm, layer_norm
from gradfuse.ops.rms_norm import add_rms_norm, rms_norm

__version__ = "0.1.0"

__all__ = [
    "AdaptReport",
    "AdaptRow",
    "FuseReport",
    "GradClipper",
    "GradReport",
    "ParameterGrad",
    "Site",
    "adapt_statistics",
    "adaptive_clip_grad_",
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm_act",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "compile_backend",
    "curriculum",
    "dropout_add",
    "fuse",
    "fuse_graph",
    "fuse_report",
    "get_total_norm",
    "init",
    "layer_norm",
    "nn",
    "optim",
    "policies",
    "rms_norm",
    "unfuse",
]
