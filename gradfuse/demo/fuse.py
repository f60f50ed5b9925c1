"""A ResNet-18 on the digits, as it is and after `fuse`."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import gradfuse
from gradfuse.demo.plots import loss_plot

__all__ = ["ResNet18", "compare_fused"]

STOCK, FUSED = "torch", "gradfuse.fuse"


class BasicBlock(nn.Module):
    """Two convolutions and a residual: He, Zhang, Ren, Sun 2016, figure 5 (left)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet18(nn.Module):
    """ResNet-18 for small grey images, a quarter as wide: 16 to 128 channels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks = []
        channels = width
        for stage in range(4):
            for i in range(2):
                outputs = width << stage
                blocks.append(BasicBlock(channels, outputs, 2 if stage and not i else 1))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x.reshape(-1, 1, 8, 8), scale_factor=2.0)
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def compare_fused(
    batches: Iterable[tuple[Tensor, Tensor]],
    accuracy: Callable[[nn.Module], float],
    seed: int,
    out: Path,
    console: Console,
) -> None:
    """Trains both from one seed, step by step in turn; prints their speed and plots their loss."""
    torch.manual_seed(seed)
    stock: nn.Module = ResNet18()
    nets = {STOCK: stock, FUSED: gradfuse.fuse(copy.deepcopy(stock))}
    optimizers = {k: torch.optim.AdamW(n.parameters(), lr=1e-3) for k, n in nets.items()}
    losses: dict[str, list[float]] = {k: [] for k in nets}
    times: dict[str, list[float]] = {k: [] for k in nets}
    for step, (x, y) in enumerate(batches):
        for name in (STOCK, FUSED) if step % 2 else (FUSED, STOCK):
            begin = time.perf_counter()
            optimizers[name].zero_grad()
            loss = F.cross_entropy(nets[name](x), y)
            loss.backward()
            optimizers[name].step()
            times[name].append(time.perf_counter() - begin)
            losses[name].append(loss.item())
    grid = Table(title="ResNet-18 on scanned digits, one seed", title_justify="left")
    for column in ("batch norms", "loss", "held-out accuracy", "ms a step", "speed"):
        grid.add_column(column, justify="left" if column == "batch norms" else "right")
    medians = {k: statistics.median(t) for k, t in times.items()}
    for name, net in nets.items():
        net.eval()
        grid.add_row(
            name,
            f"{losses[name][-1]:.3g}",
            f"{accuracy(net):.1%}",
            f"{1e3 * medians[name]:.1f}",
            f"{medians[STOCK] / medians[name]:.2f}x",
        )
    console.print(grid)
    plot(losses, medians, out / "demo_fuse.png")
    console.print(f"written: {out / 'demo_fuse.png'}", highlight=False, soft_wrap=True)


def plot(losses: dict[str, list[float]], medians: dict[str, float], path: Path) -> None:
    figure, ax = loss_plot("ResNet-18 on scanned digits: the same curve, fused or not")
    styles = {STOCK: ("#c0392b", "solid"), FUSED: ("#0b4f9c", "dashed")}
    for name, values in losses.items():
        colour, line = styles[name]
        label = f"{name}: {1e3 * medians[name]:.1f} ms a step"
        ax.plot(range(1, len(values) + 1), values, color=colour, linestyle=line, label=label)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=130)
