"""A deep net whose gradients explode, trained with PyTorch's clip and with gradfuse's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import gradfuse
from gradfuse.demo.digits import Digits

__all__ = ["compare_clips", "train"]

MAX_NORM = 1.0
EVERY = 10  # steps between two evaluations on the held-out images
STOCK, FUSED = "torch clip_grad_norm_", "gradfuse.GradClipper"
FLOAT32_SQUARES = math.sqrt(torch.finfo(torch.float32).max)  # a larger norm has an infinite square


class ResidualNet(nn.Module):
    """Residual blocks without normalisation: h + relu(W h + b). Each makes the gradient grow."""

    def __init__(self, blocks: int, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.head = nn.Linear(width, 10)
        for block in self.blocks:
            assert isinstance(block, nn.Linear)
            nn.init.normal_(block.weight, std=1.5 / math.sqrt(width))
        for module in (self.stem, *self.blocks, self.head):
            assert isinstance(module, nn.Linear)
            nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = h + torch.relu(block(h))
        logits: Tensor = self.head(h)
        return logits


@dataclass
class Run:
    """What happened in one training run."""

    clip: str
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # before clipping, as the clip measured it
    zeroed: int = 0  # steps in which the clip set every gradient to exactly 0
    accuracies: list[float] = field(default_factory=list)  # on held-out images, every EVERY steps
    seconds: float = 0.0
    first_report: gradfuse.GradReport | None = None


def train(
    clip: str,
    optimizer: str,
    steps: int,
    seed: int,
    schedule: str = "constant",
    blocks: int = 80,
    tick: Callable[[], object] = lambda: None,
) -> Run:
    """One run. The seed fixes weights, split and batches, so that runs differ by the clip alone."""
    digits = Digits.load(seed)
    torch.manual_seed(seed)
    net = ResidualNet(blocks)
    parameters = list(net.parameters())
    update: torch.optim.Optimizer
    if optimizer == "sgd":
        update = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    else:
        update = torch.optim.AdamW(parameters, lr=1e-3)
    end = 0.0 if schedule == "linear" else 1.0
    rate = torch.optim.lr_scheduler.LinearLR(update, 1.0, end, total_iters=steps)
    clipper = gradfuse.GradClipper(net.named_parameters(), MAX_NORM)
    run = Run(clip)
    begin = time.perf_counter()
    for x, y in digits.batches(steps, seed):
        loss = nn.functional.cross_entropy(net(x), y)
        update.zero_grad()
        loss.backward()
        if clip == STOCK:
            norm = float(nn.utils.clip_grad_norm_(parameters, MAX_NORM))
        else:
            report = clipper.clip_()
            norm = report.total_norm
            run.first_report = run.first_report or report
        run.losses.append(loss.item())
        run.norms.append(norm)
        run.zeroed += not any(p.grad is not None and bool(p.grad.any()) for p in parameters)
        update.step()
        rate.step()
        if (steps - len(run.losses)) % EVERY == 0:  # counted from the end, to include the last step
            run.accuracies.append(digits.accuracy(net))
        tick()
    run.seconds = time.perf_counter() - begin
    return run


def table(runs: Sequence[Run], title: str) -> Table:
    """Both runs side by side."""
    grid = Table(title=title.replace("; ", "\n"))
    grid.add_column("")
    for run in runs:
        grid.add_column(run.clip, justify="right")
    steps = len(runs[0].losses)
    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("loss, first step", lambda r: f"{r.losses[0]:.3g}"),
        ("loss, last step", lambda r: f"{r.losses[-1]:.3g}"),
        ("gradient norm, first step", lambda r: f"{r.norms[0]:.3g}"),
        ("steps with all gradients 0", lambda r: f"{r.zeroed} of {steps}"),
        ("held-out accuracy", lambda r: f"{r.accuracies[-1]:.1%}"),
        ("  range, last 100 steps", lambda r: spread(r.accuracies[-100 // EVERY :])),
        ("seconds", lambda r: f"{r.seconds:.1f}"),
    ]
    for name, cell in rows:
        grid.add_row(name, *(cell(run) for run in runs))
    return grid


def spread(values: list[float]) -> str:
    return f"{min(values):.0%} to {max(values):.0%}"


def worst_layers(report: gradfuse.GradReport) -> Table:
    """Where the gradient of the first step was largest."""
    grid = Table(title="the worst layers at the first step, from gradfuse's GradReport")
    for name in ("parameter", "gradient norm", "largest |g|", "non-finite"):
        grid.add_column(name, justify="left" if name == "parameter" else "right")
    for p in report.worst(5):
        grid.add_row(p.name, f"{p.norm:.3g}", f"{p.largest:.3g}", str(p.nonfinite))
    return grid


def plot(runs: Sequence[Run], title: str, path: Path) -> None:
    """Loss and gradient norm over steps."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    losses, norms = figure.subplots(2, 1, sharex=True)
    colours = {STOCK: "#c0392b", FUSED: "#0b4f9c"}
    for run in runs:
        steps = range(1, len(run.losses) + 1)
        label = f"{run.clip} ({run.accuracies[-1]:.0%} of held-out digits read correctly)"
        losses.plot(steps, run.losses, color=colours[run.clip], label=label)
        finite = [n if math.isfinite(n) else math.nan for n in run.norms]
        norms.plot(steps, finite, color=colours[run.clip])
        mark_overflow(norms, run, colours[run.clip])
    for ax in (losses, norms):
        ax.set_yscale("log")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    losses.set_title("Training loss: lower is better, a flat line learns nothing")
    losses.set_ylabel("loss (log scale)")
    losses.legend(frameon=False, loc="center right")
    norms.set_title("Size of the gradient before clipping, as each clip measured it")
    norms.set_ylabel("gradient norm (log scale)")
    norms.set_xlabel("training step")
    norms.axhline(FLOAT32_SQUARES, color="grey", linestyle="dotted")
    norms.axhline(MAX_NORM, color="grey", linestyle="dashed")
    norms.set_ylim(bottom=MAX_NORM / 100)
    for y, text in (
        (FLOAT32_SQUARES, "above this line the square of the norm overflows float32"),
        (MAX_NORM, "max_norm: what the clip leaves"),
    ):
        norms.annotate(
            text,
            (1, y),
            (-2, -3),
            xycoords=norms.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=9,
        )
    norms.legend(frameon=False, loc="center right")
    figure.suptitle(title, fontsize=11, fontweight="bold", wrap=True)
    figure.savefig(path, dpi=130)


def mark_overflow(ax: Axes, run: Run, colour: str) -> None:
    """A tick on the upper edge for every step at which the clip measured an infinite norm."""
    overflowed = [i + 1 for i, n in enumerate(run.norms) if not math.isfinite(n)]
    if not overflowed:
        return
    ax.plot(
        overflowed,
        [0.97] * len(overflowed),
        "|",
        color=colour,
        markersize=9,
        transform=ax.get_xaxis_transform(),
        label=f"{run.clip}: inf at {len(overflowed)} of {len(run.norms)} steps",
    )


def compare_clips(
    optimizer: str,
    schedule: str,
    blocks: int,
    steps: int,
    seed: int,
    out: Path,
    console: Console,
) -> None:
    """Trains one net from one seed with each clip; prints both runs side by side and plots them."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    runs = []
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for clip in (STOCK, FUSED):
            tick = partial(progress.advance, progress.add_task(clip, total=steps))
            runs.append(train(clip, optimizer, steps, seed, schedule, blocks, tick))
    update = {"sgd": "SGD 0.1, momentum 0.9", "adamw": "AdamW 1e-3"}[optimizer]
    if schedule == "linear":
        update += " falling to 0"
    net = f"{blocks}-block residual net on scanned digits"
    title = f"{net}; {update}; gradients clipped to norm {MAX_NORM:g}"
    console.print(table(runs, title))
    report = runs[1].first_report
    assert report is not None
    console.print(worst_layers(report))
    path = out / f"demo_{optimizer}.png"
    plot(runs, title, path)
    console.print(f"written: {path}", highlight=False, soft_wrap=True)
