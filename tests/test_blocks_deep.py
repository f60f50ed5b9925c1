"""Nets of many blocks on scanned digits: 16 here, 1,000 with -m slow."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import random
from torch import Tensor, nn

import gradfuse
from gradfuse.init import initialize_
from gradfuse.nn import (
    BasicBlock,
    BatchNormAct2d,
    Bottleneck,
    DenseBlock,
    Highway,
    PreActBlock,
    Residual,
    ResidualMLP,
    RMSNorm,
    TransformerBlock,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread(threads):
    """For tensors so small that threads wait for each other."""
    threads(1)


class Mean(nn.Module):
    """The mean over positions: of [N, C, H, W] over the last two, of [N, L, C] over the second."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.ndim == 4 else x.mean(1)


def of_images(width: int, blocks: list[nn.Module], *tail: nn.Module) -> nn.Module:
    stem = nn.Conv2d(1, width, 3, 2, 1, bias=False)
    last = tail[-1].num_features if tail else width
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), stem, *blocks, *tail, Mean(), nn.Linear(last, 10)
    )


def of_rows(make: Callable[[], nn.Module], depth: int, *tail: nn.Module) -> nn.Module:
    blocks = [make() for _ in range(depth)]
    return nn.Sequential(nn.Linear(64, 32), *blocks, *tail, nn.Linear(32, 10))


def transformer(depth: int, norm: str) -> nn.Module:
    blocks = [TransformerBlock(16, 2, norm=norm, mlp_ratio=2) for _ in range(depth)]
    return nn.Sequential(
        nn.Unflatten(1, (8, 8)), nn.Linear(8, 16), *blocks, RMSNorm(16), Mean(), nn.Linear(16, 10)
    )


NETS: dict[str, Callable[[int], nn.Module]] = {
    "basic": lambda n: of_images(8, [BasicBlock(8, 8) for _ in range(n)]),
    "bottleneck": lambda n: of_images(16, [Bottleneck(16, 4) for _ in range(n)]),
    "preact": lambda n: of_images(8, [PreActBlock(8, 8) for _ in range(n)], BatchNormAct2d(8)),
    "residual": lambda n: of_rows(
        lambda: Residual(nn.Linear(32, 32), activation="relu", scale="zero"), n
    ),
    "residual of batch norm": lambda n: of_rows(
        lambda: Residual(nn.Linear(32, 32), norm=nn.BatchNorm1d(32), activation="relu"), n
    ),
    "mlp": lambda n: of_rows(lambda: ResidualMLP(32, 32), n, RMSNorm(32)),
    "transformer": lambda n: transformer(n, "rms"),
    "transformer of layer norm": lambda n: transformer(n, "layer"),
    "dense": lambda n: of_images(8, [DenseBlock(8, 1, n)], BatchNormAct2d(8 + n)),
    "highway": lambda n: of_rows(lambda: Highway(32, gate_bias=-math.log(n)), n),
}


def losses(net: nn.Module, steps: int, lr: float, residual: str) -> list[float]:
    """The loss of each step of clipped AdamW, from the initialisation by gradfuse.init."""
    digits = pytest.importorskip("gradfuse.demo.digits").Digits.load(0)
    initialize_(net, digits.x[:64], residual=residual)
    optimizer = gradfuse.optim.AdamW(net.named_parameters(), lr=lr, clip=1.0)
    found = []
    for x, y in digits.batches(steps, 0):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert optimizer.skipped_steps == 0
    return found


def assert_learns(name: str, depth: int, steps: int, lr: float, residual: str = "scale") -> None:
    """The last five losses are below the first five, and below what guessing gives."""
    torch.manual_seed(0)
    found = losses(NETS[name](depth), steps, lr, residual)
    assert all(map(math.isfinite, found))
    first, last = sum(found[:5]) / 5, sum(found[-5:]) / 5
    assert last < min(first, math.log(10) - 0.1), found


@pytest.mark.backends("cpu")
@pytest.mark.elsewhere
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", NETS)
def test_nets_of_some_blocks_learn(name):
    assert_learns(name, 16, 30, lr=3e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NETS.keys() - {"dense"}))
def test_nets_of_a_thousand_blocks_learn(name):
    """Adam moves all branches alike, so that a step of the net grows with its depth."""
    lr = 1e-4 if name.startswith(("transformer", "residual of batch norm")) else 1e-3
    assert_learns(name, 1000, 30, lr, residual="zero")


def test_gates_that_are_open_forget_the_input():
    """The paper's bias is for tens of layers: a share of (1 - sigmoid(-2))^200 = 1e-11 is left."""
    x, shares = random(32, 64), {}
    for bias in (-2.0, -math.log(200)):
        torch.manual_seed(0)
        net = of_rows(lambda bias=bias: Highway(32, gate_bias=bias), 200)
        shares[bias] = (net[:-1](x).norm() / net[0](x).norm()).item()
    assert shares[-2.0] < 1e-4
    assert shares[-math.log(200)] > 0.1
