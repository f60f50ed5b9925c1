"""The common part of the demo's plots."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["loss_plot"]


def loss_plot(title: str) -> tuple[Figure, Axes]:
    """An empty plot of the loss over training steps."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    ax = figure.subplots()
    ax.set_yscale("log")
    ax.set_xlabel("training step")
    ax.set_ylabel("loss (log scale)")
    ax.set_title(title)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    return figure, ax
