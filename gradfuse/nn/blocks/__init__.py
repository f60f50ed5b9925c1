"""Residual, dense, gated and attending blocks on the fused ops."""

from gradfuse.nn.blocks.dense import DenseBlock
from gradfuse.nn.blocks.highway import Highway
from gradfuse.nn.blocks.residual import Residual
from gradfuse.nn.blocks.resnet import BasicBlock, Bottleneck, PreActBlock
from gradfuse.nn.blocks.transformer import ResidualMLP, TransformerBlock

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "DenseBlock",
    "Highway",
    "PreActBlock",
    "Residual",
    "ResidualMLP",
    "TransformerBlock",
]
