"""Parameter shapes of real models, from the rule of the architecture. Needs no model installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

__all__ = ["MODELS", "NormSite", "Shape", "dtype_name", "resnet50_norms"]

Shape = tuple[int, ...]


class NormSite(NamedTuple):
    """A batch norm, and what follows it."""

    shape: Shape  # of its input
    has_residual: bool = True
    has_activation: bool = True


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> float32."""
    return str(dtype).removeprefix("torch.")


def resnet50() -> list[Shape]:
    """ResNet-50 (He et al. 2016), in torchvision's order: 161 tensors, 25,557,032 elements."""

    def conv_and_norm(out: int, into: int, kernel: int) -> list[Shape]:
        return [(out, into, kernel, kernel), (out,), (out,)]

    shapes = conv_and_norm(64, 3, 7)
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv_and_norm(width, into, 1)
            shapes += conv_and_norm(width, width, 3)
            shapes += conv_and_norm(4 * width, width, 1)
            if block == 0:  # the shortcut has to change the number of channels
                shapes += conv_and_norm(4 * width, into, 1)
            into = 4 * width
    return [*shapes, (1000, into), (1000,)]


def resnet50_norms(batch: int, pixels: int) -> list[NormSite]:
    """The 53 batch norms of a ResNet-50 in the order of a forward pass, for square images of a
    multiple of 32 pixels. As in torchvision, the 3x3 convolution has the stride of a stage. A
    shortcut's norm comes before the sum that it goes into."""

    def site(channels: int, size: int, residual: bool = False, activation: bool = True) -> NormSite:
        return NormSite((batch, channels, size, size), residual, activation)

    sites = [site(64, pixels // 2)]
    size = pixels // 4
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            sites.append(site(width, size))
            size //= stride if block == 0 else 1
            sites.append(site(width, size))
            if block == 0:
                sites.append(site(4 * width, size, activation=False))
            sites.append(site(4 * width, size, residual=True))
    return sites


def gpt2_small() -> list[Shape]:
    """GPT-2 small (Radford et al. 2019), output tied to the embedding: 148 tensors, 124,439,808."""
    d = 768
    norm: list[Shape] = [(d,), (d,)]
    attention: list[Shape] = [(d, 3 * d), (3 * d,), (d, d), (d,)]
    feed_forward: list[Shape] = [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *12 * (norm + attention + norm + feed_forward), *norm]


def many_small() -> list[Shape]:
    """2,000 tensors of 128 elements: 1 MB, where the cost per tensor dominates."""
    return [(128,) for _ in range(2000)]


def tiny() -> list[Shape]:
    """For trying out the bench itself."""
    return [(8, 8), (8,), (4, 2, 3, 3), ()]


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "ResNet-50": resnet50,
    "2,000 small": many_small,
    "GPT-2 small": gpt2_small,
    "tiny": tiny,
}
