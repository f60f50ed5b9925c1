"""Clip policies on a run with spikes, and ways to train in bfloat16."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gradfuse import optim, policies
from gradfuse.demo.digits import Digits
from gradfuse.demo.plots import loss_plot

__all__ = ["compare_bfloat16", "compare_policies"]

SPIKE_EVERY, SPIKE = 50, 1e4  # every 50th batch's loss is multiplied by 1e4
CLIPS: dict[str, Callable[[], policies.Policy]] = {
    "Norm(1)": lambda: policies.Norm(1.0),
    "Value(0.01)": lambda: policies.Value(0.01),
    "AGC(0.01)": lambda: policies.AGC(0.01),
    "ZClip()": policies.ZClip,
    "AutoClip(50)": lambda: policies.AutoClip(50.0),
    "AdaGC()": policies.AdaGC,
    "SpikeSkip(10)": lambda: policies.SpikeSkip(10.0),
}
WAYS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16, stochastic_rounding": (torch.bfloat16, {"stochastic_rounding": True}),
    "bfloat16, master_weights": (torch.bfloat16, {"master_weights": True}),
}


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)  # of each batch, before its spike
    accuracy: float = math.nan
    skipped: int = 0
    clipped: int = 0


def small_net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                         nn.Linear(128, 10))  # fmt: skip


class Cast(nn.Module):
    """A net of another dtype that takes and gives float32."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x.to(self.dtype))
        return out.float()


def compare_policies(data: Digits, steps: int, seed: int, out: Path, console: Console) -> None:
    """Trains one net from one seed with SGD, with a spike every 50 steps and one NaN batch."""
    runs = {"no clip": spiked(data, steps, seed, None, "propagate")}
    runs["no clip, NaN skipped"] = spiked(data, steps, seed, None, "skip")
    for name, make in CLIPS.items():
        runs[name] = spiked(data, steps, seed, make(), "skip")
    grid = Table(
        title=f"policies; {steps} steps, every {SPIKE_EVERY}th loss times {SPIKE:g}, one NaN batch",
        title_justify="left",
    )
    for column in ("clip", "held-out accuracy", "last loss", "skipped", "clipped"):
        grid.add_column(column, justify="left" if column == "clip" else "right")
    for name, run in runs.items():
        loss, counts = f"{run.losses[-1]:.3g}", (str(run.skipped), str(run.clipped))
        grid.add_row(name, f"{run.accuracy:.1%}", loss, *counts)
    console.print(grid)
    plot(runs, out / "demo_policies.png")
    console.print(f"written: {out / 'demo_policies.png'}", highlight=False, soft_wrap=True)


def spiked(
    data: Digits, steps: int, seed: int, clip: policies.Policy | None, nonfinite: str
) -> Run:
    net = small_net(seed)
    optimizer = optim.SGD(net.parameters(), 0.05, momentum=0.9, clip=clip, nonfinite=nonfinite)
    run = Run()
    for step, (x, y) in enumerate(data.batches(steps, seed), 1):
        loss = F.cross_entropy(net(x), y)
        run.losses.append(loss.item())
        optimizer.zero_grad()
        factor = math.nan if step == steps // 3 else SPIKE if step % SPIKE_EVERY == 0 else 1.0
        (loss * factor).backward()
        optimizer.step()
        run.clipped += optimizer.report is not None and optimizer.report.clipped
    run.accuracy, run.skipped = data.accuracy(net), optimizer.skipped_steps
    return run


def compare_bfloat16(data: Digits, steps: int, seed: int, console: Console) -> None:
    """Trains one net from one seed with AdamW, with parameters in float32 and bfloat16."""
    grid = Table(title="parameters in bfloat16; AdamW 1e-3, clip=1", title_justify="left")
    for column in ("parameters", "loss, mean of last 50 steps", "held-out accuracy"):
        grid.add_column(column, justify="left" if column == "parameters" else "right")
    for name, (dtype, options) in WAYS.items():
        net = Cast(small_net(seed), dtype)
        optimizer = optim.AdamW(net.parameters(), 1e-3, clip=1.0, **options)
        losses = []
        for x, y in data.batches(steps, seed):
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        last = losses[-50:]
        grid.add_row(name, f"{sum(last) / len(last):.2g}", f"{data.accuracy(net):.1%}")
    console.print(grid)


def plot(runs: dict[str, Run], path: Path) -> None:
    figure, ax = loss_plot("Scanned digits with spikes and one NaN batch")
    for name, run in runs.items():
        finite = [v if math.isfinite(v) else math.nan for v in run.losses]
        steps = range(1, len(finite) + 1)
        ax.plot(steps, finite, label=f"{name}: {run.accuracy:.0%} read correctly", linewidth=1)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=130)
