"""Shows the figures of a bench: a table, a JSON file and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from gradfuse.bench.floor import FRESH_FLOOR
from gradfuse.bench.harness import Result
from gradfuse.bench.machine import is_disturbed

__all__ = ["COLOURS", "progress", "report", "shown"]

COLOURS = {  # by the contender's name; gradfuse in blue, its peers in grey and ochre
    "gradfuse.GradClipper": "#0b4f9c",
    "gradfuse.clip_grad_norm_": "#4f94d4",
    "gradfuse agc": "#2a9d8f",
    "gradfuse": "#0b4f9c",
    "gradfuse, save=output": "#4f94d4",
    "gradfuse, compiled": "#4f94d4",
    "gradfuse, torch's GradScaler": "#4f94d4",
    "gradfuse.fuse": "#2a9d8f",
    "inplace_abn": "#a8a8a8",
    "torch.compile": "#c9a227",
    "torch for-loop": "#a8a8a8",
    "timm agc": "#a8a8a8",
    "torch agc (loop)": "#d0d0d0",
    FRESH_FLOOR: "#d0d0d0",
}


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A line that says what is being measured."""
    with Console(stderr=True).status("setting up") as status:
        yield lambda text: status.update(f"measuring {text}")


def report(
    results: Sequence[Result],
    about: dict[str, Any],
    notes: Sequence[str],
    out: Path,
    stem: str,
    work: str,
) -> None:
    """Prints the table and writes stem.json and stem.png to the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    grid = table(results, about)
    # A narrow terminal wraps the table; rich would cut it.
    needed = console.measure(grid, options=console.options.update(width=1000)).maximum
    Console(width=max(needed, console.width)).print(grid)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
    document = {
        "machine": about,
        "notes": list(notes),
        "results": [asdict(r) for r in results],
    }
    (out / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    plot(results, about, out / f"{stem}.png", work)
    console.print(f"written: {out / stem}.json, {out / stem}.png", highlight=False, soft_wrap=True)


def headline(about: dict[str, Any]) -> str:
    """The machine in a line."""
    processor = about["gpu" if about["device"] == "cuda" else "cpu"]
    return (
        f"{processor}, {about['threads']} threads, torch {about['torch']}, "
        f"gradfuse {about['gradfuse']} ({about['isa']})"
    )


def disturbance(r: Result) -> str:
    """A warning if other processes took so much of the processors that it affects the figures."""
    return f"disturbed: {r.others:.0%}" if is_disturbed(r.others) else ""


def table(results: Sequence[Result], about: dict[str, Any]) -> Table:
    """A row for every contender, a section for every workload."""
    grid = Table(
        title=headline(about),
        caption=(
            "Medians of interleaved calls. Speed-up (against a workload's first contender) and "
            "x floor are medians of the ratios within each round, ± how far the 95 % interval of "
            "a speed-up reaches from it. GB/s counts the bytes that must "
            "move, not those a contender moves. Extra memory: the peak of torch's allocator in one "
            "call. Disturbed: the share of the processors that other processes took meanwhile; "
            "such figures are not to be relied on. On a GPU, ms is the time until the device has "
            "finished, device ms that between events on the device, graph ms that of a graph."
        ),
        box=box.SIMPLE_HEAD,
    )
    grid.add_column("workload and contender", no_wrap=True)
    for name in ("ms", "p20 - p80", "speed-up", "x floor", "GB/s", "extra memory"):
        grid.add_column(name, justify="right", no_wrap=True)
    on_gpu = any(r.device_ms is not None for r in results)
    if on_gpu:
        grid.add_column("device ms", justify="right", no_wrap=True)
        grid.add_column("graph ms", justify="right", no_wrap=True)
    grid.add_column("target", no_wrap=True)
    grid.add_column("reached", no_wrap=True)
    section = ("", "")
    for r in results:
        if section != (section := (r.workload, r.dtype)):
            grid.add_section()
            warning = f"[red]{disturbance(r)}[/]"
            empty = [""] * (8 if on_gpu else 6)
            grid.add_row(f"[bold]{r.workload}, {r.dtype}[/]", *empty, warning)
        grid.add_row(
            f"  {r.contender}",
            f"{r.median_ms:.3f}",
            f"{r.p20_ms:.3f} - {r.p80_ms:.3f}",
            speedup(r),
            f"{r.floor_ratio:.2f}",
            "" if r.contender == r.floor else f"{r.gb_per_s:.1f}",
            "?" if r.extra_bytes is None else readable(r.extra_bytes),
            *((milliseconds(r.device_ms), milliseconds(r.graph_ms)) if on_gpu else ()),
            "" if r.target is None else str(r.target),
            verdict(r),
        )
    return grid


def speedup(r: Result) -> str:
    """The speed-up with the distance to the farther end of its interval: 1.43x ±0.02."""
    text = f"{r.speedup:.2f}x"
    if r.contender == r.baseline:
        return text
    return f"{text} ±{max(r.speedup_high - r.speedup, r.speedup - r.speedup_low):.2f}"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def verdict(r: Result) -> str:
    if r.reached is None:
        return ""
    if disturbance(r):
        return "?"
    return "[green]yes[/]" if r.reached else "[bold red]no[/]"


def readable(nbytes: float) -> str:
    """1536 -> 1.5 KB."""
    for unit in ("B", "KB", "MB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GB"


def plot(results: Sequence[Result], about: dict[str, Any], path: Path, work: str) -> None:
    """Bars of speed-up, a panel for every dtype, a group for every workload."""
    dtypes = list(dict.fromkeys(r.dtype for r in results))
    bars = max(sum(r.dtype == d and shown(r) for r in results) for d in dtypes)
    groups = max(len({r.workload for r in results if r.dtype == d}) for d in dtypes)
    height = 2.0 + 0.24 * (bars + groups)
    figure = Figure(figsize=(7 * len(dtypes), height), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, len(dtypes), squeeze=False)[0])
    for ax, dtype in zip(axes, dtypes, strict=True):
        panel(ax, [r for r in results if r.dtype == dtype])
        ax.set_title(dtype)
    question = f"How many times as fast as PyTorch: {work} (longer is better)"
    figure.suptitle(f"{question}\n{headline(about)}", fontsize=12)
    handles, labels = [], []
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


def shown(r: Result) -> bool:
    """Whether the contender gets a bar of its own."""
    return r.contender not in (r.baseline, r.floor)


def panel(ax: Axes, results: list[Result]) -> None:
    """The bars of one dtype, first workload on top."""
    y = 0.0
    ticks: list[tuple[float, str]] = []
    top = 1.0
    for workload in dict.fromkeys(r.workload for r in results):
        members = [r for r in results if r.workload == workload]
        bars = [r for r in members if shown(r)]
        for r in bars:
            colour = COLOURS.get(r.contender, "#888888")
            ax.barh(y, r.speedup - 1, 0.85, left=1, color=colour, label=r.contender)
            ax.annotate(
                f"{r.speedup:.3g}x",
                (r.speedup, y),
                (4 if r.speedup >= 1 else -4, 0),
                textcoords="offset points",
                ha="left" if r.speedup >= 1 else "right",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
            top = max(top, r.speedup)
            y += 1
        middle = y - (len(bars) + 1) / 2
        disturbed = "disturbed, " if disturbance(members[0]) else ""
        ticks.append((middle, f"{workload}\n({disturbed}1x = {members[0].baseline})"))
        for floor in (r for r in members if r.contender == r.floor):
            label = "floor: only moving the bytes"
            half = len(bars) / 2
            ax.vlines(floor.speedup, middle - half, middle + half, "black", "dashed", label=label)
            top = max(top, floor.speedup)
        y += 1
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_xscale("log")
    ax.set_xlim(0.3, 2.5 * top)
    ax.set_ylim(y - 1, -1)
    ax.set_yticks([t[0] for t in ticks], [t[1] for t in ticks], fontsize=9)
    marks = [m for m in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if m < 2.5 * top]
    ax.set_xticks(marks, [f"{m:g}x" for m in marks])
    ax.minorticks_off()
    ax.set_xlabel("speed-up (log scale)")
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)
