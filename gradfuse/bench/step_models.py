"""The models whose training steps the benches time: a function from an input to a loss each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MODELS", "Model"]


class Made(NamedTuple):
    """A model, the input of its steps, and the loss of an output."""

    module: nn.Module
    input: Tensor
    loss: Callable[[Tensor], Tensor]


class Model(NamedTuple):
    """A model of a library.

    Attributes:
        library: that it comes from.
        title: its name in tables.
        make: of the batch, the size of an image or number of tokens, and the memory format.
    """

    library: str
    title: str
    make: Callable[[int, int, torch.memory_format], Made]

    @property
    def is_there(self) -> bool:
        return importlib.util.find_spec(self.library) is not None


def _of_images(module: nn.Module, batch: int, size: int, form: torch.memory_format) -> Made:
    images = torch.randn(batch, 3, size, size).to(memory_format=form)
    labels = torch.arange(batch) % 1000
    return Made(module.to(memory_format=form), images, lambda y: F.cross_entropy(y, labels))


def _resnet50(batch: int, size: int, form: torch.memory_format) -> Made:
    from torchvision.models import resnet50

    return _of_images(resnet50(), batch, size, form)


def _vit_tiny(batch: int, size: int, form: torch.memory_format) -> Made:
    """With the dropped paths of its training recipe (Touvron et al. 2021, table 9)."""
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=size, drop_path_rate=0.1)
    return _of_images(model, batch, size, form)


class _Stack(nn.Module):
    """The blocks of GPT-2 small and its last norm, without embeddings and head."""

    def __init__(self, tokens: int) -> None:
        from transformers import GPT2Config, GPT2Model

        super().__init__()
        self.body = GPT2Model(
            GPT2Config(n_layer=4, n_positions=tokens, vocab_size=1, bos_token_id=0, eos_token_id=0)
        )

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.body(inputs_embeds=x, use_cache=False)[0]
        return output


def _gpt2(batch: int, size: int, form: torch.memory_format) -> Made:
    """With the dropouts of its configuration, 0.1."""
    x, target = (torch.randn(batch, size, 768) for _ in range(2))
    return Made(_Stack(size), x, lambda y: F.mse_loss(y, target))


MODELS = {
    "resnet50": Model("torchvision", "ResNet-50", _resnet50),
    "gpt2": Model("transformers", "GPT-2 small, 4 blocks", _gpt2),
    "vit_tiny": Model("timm", "ViT-tiny", _vit_tiny),
}
