"""Parameter shapes of real models, from the rule of the architecture. Needs no model installed."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["MODELS", "Shape", "dtype_name"]

Shape = tuple[int, ...]


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
