"""Layers that read all that came before them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradfuse.nn.batch_norm import BatchNormAct2d
from gradfuse.nn.blocks.parts import begin_, check_count, check_share
from gradfuse.ops.batch_norm import check_activation

__all__ = ["DenseBlock"]


class _DenseLayer(nn.Module):
    """growth new feature maps of all those before: batch norm, 1 x 1, batch norm, 3 x 3."""

    def __init__(self, inputs: int, growth: int, bottleneck: int, activation: str | None) -> None:
        super().__init__()
        width = bottleneck * growth
        self.norm1 = BatchNormAct2d(inputs, activation=activation)
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm2 = BatchNormAct2d(width, activation=activation)
        self.conv2 = nn.Conv2d(width, growth, 3, padding=1, bias=False)

    def squeeze(self, *features: Tensor) -> Tensor:
        """What a checkpoint computes again: concatenation, batch norm, 1 x 1 convolution."""
        squeezed: Tensor = self.conv1(self.norm1(torch.cat(features, 1)))
        return squeezed

    def forward(self, features: list[Tensor], is_checkpointed: bool) -> Tensor:
        if is_checkpointed and torch.is_grad_enabled():
            # Nothing within is random.
            squeezed = checkpoint(
                self.squeeze, *features, use_reentrant=False, preserve_rng_state=False
            )
        else:
            squeezed = self.squeeze(*features)
        new: Tensor = self.conv2(self.norm2(squeezed))
        return new


class DenseBlock(nn.Module):
    """Each layer adds `growth` feature maps, made of the input and those of all layers before.

    The output [N, in_channels + layers * growth, H, W] begins with the input [N, in_channels, H,
    W]. A layer is act(batch norm), a 1 x 1 convolution to bottleneck * growth channels, act(batch
    norm), a 3 x 3 convolution to growth channels, dropout; each batch norm runs with its activation
    as one op.

    memory_efficient computes the concatenation, the first batch norm and the 1 x 1 convolution of
    each layer again in the backward, so that memory grows with the layers, not with their square.
    Values, gradients and dropped elements are the same, and a batch is counted once in the running
    statistics; torch's batch norm counts it twice.

    state_dict: that of torchvision's _DenseBlock: denselayer1.norm1, .conv1, .norm2, .conv2, and so
    on to denselayer<layers>.

    Args:
        in_channels: channels of the input.
        growth: feature maps that a layer adds, k in the paper.
        layers: their number.
        bottleneck: channels between a layer's convolutions, over growth.
        dropout: probability that an element of a layer's feature maps is dropped, in training.
            Settable.
        activation: as of `BatchNormAct2d`.
        memory_efficient: compute again in place of keeping. Settable.

    Raises:
        TypeError, ValueError: an argument is no int >= 1, no known activation, or no probability.

    Source: Huang, Liu, van der Maaten, Weinberger 2017, "Densely Connected Convolutional Networks",
    DenseNet-B in section 3; Pleiss et al. 2017, "Memory-Efficient Implementation of DenseNets",
    section 3.
    """

    def __init__(
        self,
        in_channels: int,
        growth: int,
        layers: int,
        *,
        bottleneck: int = 4,
        dropout: float = 0.0,
        activation: str | None = "relu",
        memory_efficient: bool = True,
    ) -> None:
        super().__init__()
        inputs, growth, layers, bottleneck = (
            check_count("DenseBlock", name, value)
            for name, value in (
                ("in_channels", in_channels),
                ("growth", growth),
                ("layers", layers),
                ("bottleneck", bottleneck),
            )
        )
        check_activation("DenseBlock", activation)
        self.activation = activation
        self.dropout = check_share("DenseBlock", "dropout", dropout)
        self.memory_efficient = memory_efficient
        for i in range(layers):
            layer = _DenseLayer(inputs + i * growth, growth, bottleneck, activation)
            self.add_module(f"denselayer{i + 1}", layer)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew: He et al. 2015; batch norms begin as the identity."""
        begin_(self, self.activation)

    def forward(self, input: Tensor) -> Tensor:
        features = [input]
        for layer in self.children():
            new = layer(features, self.memory_efficient)
            features.append(F.dropout(new, self.dropout, self.training))
        return torch.cat(features, 1)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}, memory_efficient={self.memory_efficient}"
