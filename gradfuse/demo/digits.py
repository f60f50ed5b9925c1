"""The data of the demo: scanned digits, which scikit-learn includes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

__all__ = ["Digits"]

BATCH = 64
TRAINING = 1400  # images to train on; the other 397 are held out


@dataclass
class Digits:
    """scikit-learn's 1,797 scanned digits, 8 x 8 grey levels as numbers from -0.5 to 0.5."""

    x: Tensor
    y: Tensor
    held_out_x: Tensor
    held_out_y: Tensor

    @classmethod
    def load(cls, seed: int) -> Digits:
        digits = load_digits()
        x = torch.tensor(digits.data, dtype=torch.float32) / 16 - 0.5
        y = torch.tensor(digits.target)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        train, held_out = order[:TRAINING], order[TRAINING:]
        return cls(x[train], y[train], x[held_out], y[held_out])

    @torch.no_grad()
    def accuracy(self, net: nn.Module) -> float:
        """Share of the held-out digits that the net reads correctly."""
        right: Tensor = net(self.held_out_x).argmax(dim=1) == self.held_out_y
        return float(right.double().mean())

    def batches(self, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches, shuffled again in every epoch; the incomplete one at its end is left out."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) < BATCH:
                order = torch.randperm(len(self.y), generator=generator)
            batch, order = order[:BATCH], order[BATCH:]
            yield self.x[batch], self.y[batch]
