"""Whole training steps of small language models of characters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from gradfuse.bench.harness import Contender, Workload

__all__ = ["CharLstm", "CharTransformer", "Maker", "setup_training"]

Maker = Callable[[list[Parameter]], Callable[[], object]]  # of clip and update


class CharLstm(nn.Module):
    """Two layers of LSTM."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(self.embedding(tokens))[0])
        return out


class CharTransformer(nn.Module):
    """Four layers of a transformer."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(width, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(self.embedding(tokens)))
        return out


def setup_training(
    make: Callable[[], nn.Module], name: str, steps: dict[str, Maker], baseline: str
) -> Workload:
    """A whole training step: forward, backward, and the step of each maker, by contender."""
    torch.manual_seed(0)
    model = make()
    tokens = torch.randint(0, 64, (8, 33))

    def trainer(own: nn.Module, maker: Maker) -> Callable[[], object]:
        step = maker(list(own.parameters()))

        def run() -> float:
            for p in own.parameters():
                p.grad = None
            logits = own(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            step()
            return loss.item()

        return run

    contenders = [
        Contender(kind, trainer(copy.deepcopy(model), maker)) for kind, maker in steps.items()
    ]
    return Workload(
        name=f"{name}, whole step",
        dtype="float32",
        contenders=contenders,
        bytes_moved=0,
        baseline=baseline,
        floor=baseline,
    )
