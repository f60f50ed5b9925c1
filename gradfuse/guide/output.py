"""The tables and the plot of the guide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from gradfuse.guide.recipes import COMBINATIONS
from gradfuse.guide.training import KINDS, Run

__all__ = ["combinations_table", "plot", "rows_table"]

COLOURS = {"deep": "#0b4f9c", "recurrent": "#c9a227"}
WIDEST = 1e20  # of the plot's ranges; wider ones end at the edge


def of(runs: Sequence[Run], row: str, kind: str) -> list[Run]:
    return [r for r in runs if (r.row, r.kind) == (row, kind)]


def rows_table(rows: Sequence[str], runs: Sequence[Run]) -> Table:
    """A line for each row: of each kind of net range, lost steps, rate and accuracy."""
    grid = Table(box=box.MARKDOWN)
    grid.add_column("row", no_wrap=True)
    for kind in KINDS:
        for column in ("range", "lost", "accuracy"):
            grid.add_column(f"{kind}: {column}", justify="right")
    for row in rows:
        grid.add_row(row, *(cell for kind in KINDS for cell in cells(of(runs, row, kind))))
    return grid


def cells(runs: Sequence[Run]) -> tuple[str, str, str]:
    """Range, lost steps and accuracy of a row's runs; dashes for a kind that it has not."""
    if not runs:
        return "-", "-", "-"
    accuracies = [100 * r.accuracy for r in runs]
    return (
        f"{median(r.range for r in runs):.2g}",
        f"{mean(r.lost for r in runs):.0%}",
        f"{mean(accuracies):.0f} ({min(accuracies):.0f} to {max(accuracies):.0f})",
    )


def combinations_table(runs: Sequence[Run]) -> Table:
    """Of each row of several techniques: whether it reads more digits than each of them alone."""
    grid = Table(box=box.MARKDOWN)
    for column in ("combination", "net", "accuracy", "best part alone", "adds"):
        right = column in ("accuracy", "best part alone")
        grid.add_column(column, justify="right" if right else "left", no_wrap=True)
    for row, parts in COMBINATIONS.items():
        for kind in KINDS:
            whole = [r.accuracy for r in of(runs, row, kind)]
            alone = {p: [r.accuracy for r in of(runs, p, kind)] for p in parts}
            if not whole or not all(alone.values()):
                continue
            best = max(alone, key=lambda p: mean(alone[p]))
            verdict = adds(whole, list(alone.values()))
            part = f"{best}: {mean(alone[best]):.1%}"
            grid.add_row(row, kind, f"{mean(whole):.1%}", part, verdict)
    return grid


def adds(whole: Sequence[float], parts: Sequence[Sequence[float]]) -> str:
    """Yes where the worst seed is above every seed of every part, no where the mean is not above
    the best part's."""
    if min(whole) > max(accuracy for part in parts for accuracy in part):
        return "yes"
    return "no" if mean(whole) <= max(map(mean, parts)) else "within the seeds"


def plot(rows: Sequence[str], runs: Sequence[Run], path: Path) -> None:
    """Ranges, lost steps and accuracies, a pair of bars a row."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gradfuse"}):
        figure = Figure(figsize=(10, 1.4 + 0.36 * len(rows)), layout="constrained")
        spread, lost, accuracy = figure.subplots(1, 3, sharey=True)
        bars(spread, rows, runs, lambda r: min(r.range, WIDEST))
        spread.set_xscale("log")
        spread.set_xlim(1, WIDEST)
        spread.set_xlabel("wider ones end at the edge")
        spread.set_title("range of gradient norms\nat the start: largest / least")
        bars(lost, rows, runs, lambda r: 100 * r.lost)
        lost.set_xlim(0, 100)
        lost.set_title("steps lost, %")
        bars(accuracy, rows, runs, lambda r: 100 * r.accuracy)
        accuracy.axvline(10, color="grey", linestyle="dotted")
        accuracy.set_xlim(0, 100)
        accuracy.set_title("held-out accuracy, %\n(dotted: chance)")
        spread.set_yticks(range(len(rows)), rows)
        spread.set_ylim(len(rows) - 0.5, -0.5)
        handles = [matplotlib.patches.Patch(color=COLOURS[kind], label=kind) for kind in KINDS]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, metadata={"Date": None})


def bars(ax: Axes, rows: Sequence[str], runs: Sequence[Run], value: Callable[[Run], float]) -> None:
    """The median of the seeds as a bar, with a line from the least to the largest."""
    for offset, kind in zip((-0.2, 0.2), KINDS, strict=True):
        for place, row in enumerate(rows):
            values = [value(r) for r in of(runs, row, kind)]
            if values:
                y = place + offset
                ax.barh(y, median(values), 0.36, color=COLOURS[kind])
                ax.plot([min(values), max(values)], [y, y], color="black", linewidth=1)
    ax.grid(axis="x", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
