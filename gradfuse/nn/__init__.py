"""The norms with what belongs to them in a residual block, and homeostasis, as modules."""

from gradfuse.nn.batch_norm import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from gradfuse.nn.batch_norm_mode import BatchNormMode
from gradfuse.nn.homeostatic import HomeostaticGain
from gradfuse.nn.layer_norm import AddLayerNorm, AddRMSNorm, DropPath, LayerNorm, RMSNorm

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchNormMode",
    "DropPath",
    "HomeostaticGain",
    "LayerNorm",
    "RMSNorm",
]
