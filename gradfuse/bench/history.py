"""The speed-ups of all runs so far, one JSON object a line, and a figure of them."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradfuse.bench.harness import Result
from gradfuse.bench.machine import is_disturbed
from gradfuse.bench.output import COLOURS, shown

__all__ = ["append", "draw", "main"]

Entry = dict[str, Any]  # a line: see `append`
SOURCES = ("csrc", "gradfuse", "setup.py")  # what a measured speed depends on


def append(results: Sequence[Result], about: dict[str, Any], bench: str, path: Path) -> None:
    """Appends a line for each contender with a speed-up: neither baseline nor floor."""
    machine = {key: about[key] for key in ("cpu", "threads", "isa")}
    if about["device"] == "cuda":
        machine["gpu"] = about["gpu"]
    version = commit()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lines:
        for r in results:
            if not shown(r):
                continue
            entry: Entry = {
                "date": about["date"],
                "commit": version,
                "machine": machine,
                "torch": about["torch"],
                "bench": bench,
                "row": f"{r.workload}, {r.dtype}",
                "contender": r.contender,
                "ratio": round(r.speedup, 4),
                "low": round(r.speedup_low, 4),
                "high": round(r.speedup_high, 4),
                "x_floor": None if r.floor == r.baseline else round(r.floor_ratio, 4),
                "disturbed": is_disturbed(r.others),
            }
            lines.write(json.dumps(entry) + "\n")


def commit() -> str | None:
    """The checkout's commit, with "+" if its sources have changed since; None outside of one."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # A package that is installed somewhere in another checkout is not tracked there.
        git("ls-files", "--error-unmatch", str(package / "__init__.py"))
        changed = git("status", "--porcelain", "--", *SOURCES)
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def read(path: Path) -> list[Entry]:
    """All entries, the oldest first."""
    entries = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return sorted(entries, key=lambda e: str(e["date"]))


def of_one_machine(entries: Sequence[Entry]) -> list[Entry]:
    """The entries of the machine with the most: figures of two machines make no line."""
    keys = [json.dumps(e["machine"], sort_keys=True) for e in entries]
    most = Counter(keys).most_common(1)
    return [e for e, key in zip(entries, keys, strict=True) if key == most[0][0]]


def draw(path: Path, out: Path) -> Path:
    """Writes history.svg to the folder `out`: a panel a bench, a line for each row and contender of
    gradfuse on the machine with the most entries."""
    everything = of_one_machine(read(path))
    entries = [e for e in everything if e["contender"].startswith("gradfuse")]
    if not entries:
        raise SystemExit(f"bench history: expected entries of gradfuse, got none in {path}")
    benches = list(dict.fromkeys(e["bench"] for e in entries))
    out.mkdir(parents=True, exist_ok=True)
    # Text stays text and ids stay the same, so that the file changes only where a figure does.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gradfuse"}):
        rows = -(-len(benches) // 2)
        figure = Figure(figsize=(9, 0.6 + 3.6 * rows), layout="constrained")
        for i, bench in enumerate(benches):
            ax = figure.add_subplot(rows, min(2, len(benches)), i + 1)
            panel(ax, [e for e in entries if e["bench"] == bench])
            ax.set_title(f"bench {bench}")
        machine = entries[0]["machine"]
        named = f"{machine.get('gpu') or machine['cpu']}, {machine['threads']} threads"
        figure.suptitle(f"How many times as fast as PyTorch ({named}, {machine['isa']})")
        target = out / "history.svg"
        figure.savefig(target, metadata={"Date": None})
    return target


def panel(ax: Axes, entries: Sequence[Entry]) -> None:
    """A thin line for every row, and a thick one for the geometric mean of the rows that all of a
    contender's runs have. Disturbed figures are hollow."""
    dates = list(dict.fromkeys(e["date"] for e in entries))
    commits = {e["date"]: e["commit"] or "?" for e in entries}
    place = {date: i for i, date in enumerate(dates)}
    for contender in dict.fromkeys(e["contender"] for e in entries):
        mine = [e for e in entries if e["contender"] == contender]
        colour = COLOURS.get(contender, "#888888")
        for row in dict.fromkeys(e["row"] for e in mine):
            line = [e for e in mine if e["row"] == row]
            x, y = [place[e["date"]] for e in line], [e["ratio"] for e in line]
            full = [i for i, e in enumerate(line) if not e["disturbed"]]
            ax.plot(x, y, "o-", color=colour, alpha=0.5, linewidth=0.6, ms=2.5, mfc="white")
            ax.plot(x, y, "o", color=colour, alpha=0.5, ms=2.5, markevery=full)
        means = geometric_means(mine)
        x = [place[date] for date in means]
        ax.plot(x, list(means.values()), "o-", color=colour, linewidth=2.2, label=contender)
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set_yscale("log")
    top = max(e["ratio"] for e in entries)
    bottom = min(e["ratio"] for e in entries)
    marks = [m for m in (0.25, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if bottom / 2 < m < 2 * top]
    ax.set_yticks(marks, [f"{m:g}x" for m in marks])
    ax.minorticks_off()
    ax.set_xticks(range(len(dates)), [commits[d] for d in dates], rotation=60, fontsize=8)
    ax.set_xlim(-0.5, max(len(dates) - 0.5, 1.5))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.3)
    ax.legend(frameon=False, fontsize=8)


def geometric_means(entries: Sequence[Entry]) -> dict[str, float]:
    """The mean of a contender's rows, by date: over those that all dates have, so that a new row
    makes no step."""
    rows: dict[str, dict[str, float]] = {}
    for e in entries:
        rows.setdefault(e["date"], {})[e["row"]] = e["ratio"]
    common = set.intersection(*(set(of_date) for of_date in rows.values()))
    if not common:
        return {}
    return {
        date: statistics.geometric_mean(of_date[row] for row in common)
        for date, of_date in rows.items()
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gradfuse bench history", description="Draws the speed-ups of all runs."
    )
    parser.add_argument("--history", type=Path, required=True, metavar="FILE", help="to read")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder to write to")
    arguments = parser.parse_args(argv)
    print(f"written: {draw(arguments.history, arguments.out)}")
    return 0
