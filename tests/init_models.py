"""Models that the tests of gradfuse.init share."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn


class Plain(nn.Module):
    """Layers in a row, without norm or residual."""

    def __init__(self, f: Callable, depth: int, width: int, inputs: int = 64) -> None:
        super().__init__()
        self.f = f
        sizes = [inputs] + [width] * depth
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.f(layer(x))
        return self.head(x)


class Stream(nn.Module):
    """Residual blocks without norm: "pre" activation, "post", or the sum "after" it."""

    def __init__(self, kind: str, blocks: int, width: int = 32, f: Callable = torch.relu) -> None:
        super().__init__()
        self.kind, self.f = kind, f
        self.stem = nn.Linear(64, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            if self.kind == "pre":
                h = h + block(self.f(h))
            elif self.kind == "post":
                h = h + self.f(block(h))
            else:
                h = self.f(h + block(h))
        return self.head(h)


class Mixer(nn.Module):
    """A pre-norm transformer whose modules have names that say nothing."""

    def __init__(self, layers: int = 3, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.alpha = nn.Embedding(50, width)
        self.beta = nn.Parameter(torch.randn(16, width))
        self.rows = nn.ModuleList(
            nn.ModuleDict(
                {
                    "a": nn.LayerNorm(width),
                    "b": nn.Linear(width, 3 * width),
                    "c": nn.Linear(width, width),
                    "d": nn.LayerNorm(width),
                    "e": nn.Linear(width, 4 * width),
                    "f": nn.Linear(4 * width, width),
                }
            )
            for _ in range(layers)
        )
        self.omega = nn.Linear(width, 50, bias=False)
        self.omega.weight = self.alpha.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.alpha(tokens) + self.beta[: tokens.shape[1]]
        for row in self.rows:
            q, k, v = row["b"](row["a"](h)).chunk(3, dim=-1)
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + nn.functional.dropout(
                row["c"](mixed.transpose(1, 2).flatten(2)), 0.1, self.training
            )
            up = row["e"](row["d"](h))
            h = h + row["f"](0.5 * up * (1 + torch.tanh(0.7978845608 * (up + 0.044715 * up**3))))
        return self.omega(nn.functional.layer_norm(h, h.shape[-1:]))


class Recurrent(nn.Module):
    """An embedding, two layers of LSTM and a head."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


def digits(samples: int = 64) -> Tensor:
    """Scanned digits where scikit-learn is installed, else blobs that are as correlated."""
    try:
        from gradfuse.demo.digits import Digits

        return Digits.load(0).x[:samples]
    except ModuleNotFoundError:
        g = torch.Generator().manual_seed(0)
        common = torch.randn(1, 64, generator=g)
        return 0.25 * (common + torch.randn(samples, 64, generator=g))
