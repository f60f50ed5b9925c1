"""The nets of the guide: 100 narrow layers in a row, and a recurrent net that reads 64 pixels."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradfuse.nn import BatchNormAct1d

__all__ = ["LAYERS", "DeepNet", "Dense", "GatedCell", "PlainCell", "RecurrentNet"]

LAYERS, WIDTH = 100, 32
GROWTH = 4  # features that a dense layer adds


class DeepNet(nn.Module):
    """A linear layer, 100 blocks of one layer each, a linear head.

    Args:
        block: makes the block that reads so many features.
    """

    def __init__(self, block: Callable[[int], nn.Module]) -> None:
        super().__init__()
        width = WIDTH
        self.stem = nn.Linear(64, width)
        self.blocks = nn.ModuleList()
        for _ in range(LAYERS):
            self.blocks.append(block(width))
            width += GROWTH if isinstance(self.blocks[-1], Dense) else 0
        self.head = nn.Linear(width, 10)
        self.states: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """[N, 64] pixels -> [N, 10] logits. `states` are the outputs of the blocks."""
        x = self.stem(x)
        self.states = []
        for block in self.blocks:
            x = block(x)
            self.states.append(x)
        logits: Tensor = self.head(x)
        return logits


class RecurrentNet(nn.Module):
    """Reads one pixel at each of 64 steps; its last state tells the digit.

    Args:
        cell: makes the module of (what is read [N, H], state [N, H]) that gives the next state.
    """

    def __init__(self, cell: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.read = nn.Linear(1, WIDTH)
        self.cell = cell(WIDTH)
        self.head = nn.Linear(WIDTH, 10)
        self.states: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """[N, T] pixels -> [N, 10] logits. `states` are those after each pixel."""
        read = self.read(x.unsqueeze(-1))
        state = read.new_zeros(len(x), WIDTH)
        self.states = []
        for step in read.unbind(1):
            state = self.cell(step, state)
            self.states.append(state)
        logits: Tensor = self.head(state)
        return logits


class Dense(nn.Module):
    """[N, C] -> [N, C + 4]: all that came before, and what a layer makes of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = BatchNormAct1d(width)
        self.layer = nn.Linear(width, GROWTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layer(self.norm(x))], 1)


class PlainCell(nn.Module):
    """tanh(norm(read + W state)), or the state plus that."""

    def __init__(self, width: int, norm: nn.Module | None = None, residual: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.norm = norm
        self.residual = residual

    def forward(self, read: Tensor, state: Tensor) -> Tensor:
        z = read + self.layer(state)
        new = torch.tanh(z if self.norm is None else self.norm(z))
        return state + new if self.residual else new


class GatedCell(nn.Module):
    """A highway in time: a gate decides how much of the state becomes new at each step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.gate = nn.Linear(2 * width, width)
        nn.init.constant_(self.gate.bias, -math.log(64))  # at first a third lasts to the end

    def forward(self, read: Tensor, state: Tensor) -> Tensor:
        new = torch.tanh(read + self.layer(state))
        return torch.lerp(state, new, self.gate(torch.cat([read, state], 1)).sigmoid())
