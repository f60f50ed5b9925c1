"""What a self-supervised net is measured by: collapse, effective rank, a linear probe, a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from gradfuse.demo.digits import Digits

__all__ = ["Run", "augmented", "draw", "effective_rank", "linear_probe", "spread", "table"]

COLORS = ("tab:blue", "tab:red", "tab:green", "tab:orange", "tab:purple", "tab:cyan", "tab:gray",
          "tab:olive")  # fmt: skip


@dataclass
class Run:
    """One training run. Lists have an entry for every measured step."""

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    rank: list[float] = field(default_factory=list)
    gradients: list[Sequence[float]] = field(default_factory=list)  # L2 norm by weight
    probe: float = math.nan  # held-out accuracy
    probe_of_outputs: float = math.nan
    skipped: int = 0

    def note(self, step: int, loss: Tensor, outputs: Tensor, gradients: Sequence[float]) -> None:
        """Adds a step with its outputs [B, d]."""
        self.steps.append(step)
        self.loss.append(float(loss.detach()))
        self.spread.append(spread(outputs))
        self.rank.append(effective_rank(outputs))
        self.gradients.append(gradients)


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Digits [B, 64] moved by up to a pixel each way, with contrast and noise of their own."""
    padded = F.pad(x.view(-1, 8, 8), (1, 1, 1, 1), value=-0.5)
    moved = torch.stack([padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)])
    places = torch.randint(9, (len(x),), generator=generator)
    chosen = moved[places, torch.arange(len(x))].flatten(1)
    contrast = 0.7 + 0.6 * torch.rand(len(x), 1, generator=generator)
    return chosen * contrast + 0.1 * torch.randn(x.shape, generator=generator)


@torch.no_grad()
def spread(z: Tensor) -> float:
    """Mean deviation of the normalised outputs [B, d] over 1 / sqrt(d); Chen, He 2021, figure 2.

    1 where they are uniform on the sphere, 0 where they are a point.
    """
    return float(F.normalize(z).std(dim=0).mean() * math.sqrt(z.shape[1]))


@torch.no_grad()
def effective_rank(z: Tensor) -> float:
    """exp of the entropy of the singular values of [B, d], centred; Roy, Vetterli 2007.

    NaN where an element is not finite.
    """
    if not z.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals((z - z.mean(dim=0)).double())
    share = values / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return float(torch.exp(torch.special.entr(share).sum()))


@torch.no_grad()
def linear_probe(encoder: nn.Module, data: Digits, ridge: float = 1e-3) -> float:
    """Held-out accuracy of ridge regression from the features, standardised, to the classes.

    NaN where a feature is not finite.
    """
    encoder.eval()
    features, held_out = encoder(data.x).double(), encoder(data.held_out_x).double()
    encoder.train()
    mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-9)
    a = F.pad((features - mean) / std, (0, 1), value=1.0)
    b = F.pad((held_out - mean) / std, (0, 1), value=1.0)
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.nan
    gram = a.T @ a + ridge * len(a) * torch.eye(a.shape[1], dtype=a.dtype)
    weights = torch.linalg.solve(gram, a.T @ F.one_hot(data.y, 10).double())
    return float(((b @ weights).argmax(dim=1) == data.held_out_y).double().mean())


def table(runs: dict[str, list[Run]]) -> str:
    """The last values of each way, means over seeds, as Markdown."""
    lines = ["| way | loss | std * sqrt(d) | effective rank | first gradient over last | probe of "
             "features | of outputs | skipped |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, seeds in runs.items():
        ratio = [r.gradients[-1][0] / (r.gradients[-1][-1] or math.nan) for r in seeds]
        figures = [[r.loss[-1] for r in seeds], [r.spread[-1] for r in seeds],
                   [r.rank[-1] for r in seeds], ratio]  # fmt: skip
        probes = [[r.probe for r in seeds], [r.probe_of_outputs for r in seeds]]
        cells = [f"{sum(v) / len(v):.3g}" for v in figures]
        cells += [f"{sum(v) / len(v):.1%}".replace("nan%", "nan") for v in probes]
        skipped = ", ".join(str(r.skipped) for r in seeds)
        lines.append(f"| {name} | {' | '.join(cells)} | {skipped} |")
    return "\n".join(lines)


def draw(runs: dict[str, list[Run]], layers: Sequence[str], path: Path) -> None:
    """One figure: a curve for each way and seed; gradients of the first and the last layer."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    titles = ("loss", "std of normalised outputs * sqrt(d)", "effective rank of outputs",
              f"gradient norm, {layers[0]}", f"gradient norm, {layers[-1]}",
              "linear probe: features (dot), outputs (cross)")  # fmt: skip
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    for (name, seeds), color in zip(runs.items(), COLORS, strict=False):
        style = "--" if "bad" in name else "-"
        for run in seeds:
            norms = [[g[end] for g in run.gradients] for end in (0, -1)]
            for ax, values in zip(axes, (run.loss, run.spread, run.rank, *norms), strict=False):
                ax.plot(run.steps, values, style, color=color, linewidth=0.9)
            axes[5].plot(run.probe, name, "o", color=color, alpha=0.6)
            axes[5].plot(run.probe_of_outputs, name, "x", color=color, alpha=0.8)
    axes[0].set_yscale("symlog")
    for ax in axes[3:5]:
        ax.set_yscale("log")
    for ax in axes[:5]:
        ax.set_xlabel("step")
    axes[5].tick_params(axis="y", labelsize=7)
    axes[5].invert_yaxis()
    figure.savefig(path, dpi=90)
