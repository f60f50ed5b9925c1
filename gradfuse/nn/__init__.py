"""The norms with what belongs to them in a residual block, blocks made of them, and homeostasis."""

from gradfuse.nn.batch_norm import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from gradfuse.nn.batch_norm_mode import BatchNormMode
from gradfuse.nn.blocks import (
    BasicBlock,
    Bottleneck,
    DenseBlock,
    Highway,
    PreActBlock,
    Residual,
    ResidualMLP,
    TransformerBlock,
)
from gradfuse.nn.homeostatic import HomeostaticGain
from gradfuse.nn.layer_norm import AddLayerNorm, AddRMSNorm, DropPath, LayerNorm, RMSNorm
from gradfuse.nn.sync_batch_norm import (
    SyncBatchNormAct1d,
    SyncBatchNormAct2d,
    SyncBatchNormAct3d,
    convert_sync_batchnorm,
)

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "BasicBlock",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchNormMode",
    "Bottleneck",
    "DenseBlock",
    "DropPath",
    "Highway",
    "HomeostaticGain",
    "LayerNorm",
    "PreActBlock",
    "RMSNorm",
    "Residual",
    "ResidualMLP",
    "SyncBatchNormAct1d",
    "SyncBatchNormAct2d",
    "SyncBatchNormAct3d",
    "TransformerBlock",
    "convert_sync_batchnorm",
]
