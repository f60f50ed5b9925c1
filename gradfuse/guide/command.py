"""The command line of the guide: python -m gradfuse guide."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gradfuse.guide.output import combinations_table, plot, rows_table
from gradfuse.guide.recipes import RECIPES, SHORT
from gradfuse.guide.training import KINDS, Run, alone, choose_rate, fits, train

__all__ = ["main"]

T = TypeVar("T")
Submit = Callable[..., "Future[Any]"]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gradfuse guide",
        description="Trains a plain net of 100 layers and a plain recurrent net on real digits "
        "with one technique after another, and says what each does to the gradients.",
    )
    parser.add_argument("--seeds", type=int, help="runs of each row, default 3")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", nargs="+", choices=RECIPES, metavar="ROW", help="default: all")
    parser.add_argument("--short", action="store_true", help="two seeds of six rows")
    parser.add_argument(
        "--processes", type=int, help="of one thread each, default: one a core; 1: none but this"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder to write to")
    arguments = parser.parse_args(argv)
    arguments.rows = arguments.rows or (SHORT if arguments.short else tuple(RECIPES))
    arguments.seeds = arguments.seeds if arguments.seeds is not None else 3 - arguments.short
    if arguments.processes is None:
        arguments.processes = cores()
    for name in ("seeds", "steps", "processes"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(arguments, name)}")
    return arguments


def cores() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def workers(processes: int) -> Iterator[Submit]:
    """A function that submits calls to so many processes, or runs them here if that is 1."""
    if processes == 1:
        threads = torch.get_num_threads()
        with warnings.catch_warnings():
            alone()
            try:
                yield run_here
            finally:
                torch.set_num_threads(threads)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=alone)
    try:
        yield pool.submit
    finally:
        pool.shutdown(cancel_futures=True)


def run_here(function: Callable[..., T], *arguments: Any) -> Future[T]:
    done: Future[T] = Future()
    done.set_result(function(*arguments))
    return done


def measure(rows: Sequence[str], seeds: int, steps: int, processes: int) -> list[Run]:
    """All runs, in the order of the rows: first those that choose a rate, then the others."""
    pairs = [(row, kind) for row in rows for kind in KINDS if fits(row, kind)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with (
        Progress(*columns, TimeElapsedColumn(), console=console) as progress,
        workers(processes) as submit,
    ):
        bar = progress.add_task("guide", total=len(pairs) * (1 + seeds))
        trials = {submit(choose_rate, row, kind, steps): (row, kind) for row, kind in pairs}
        runs = []
        for trial in as_completed(trials):
            row, kind = trials[trial]
            progress.update(bar, advance=1, description=f"{row}, {kind}: rate")
            rate = trial.result()
            runs += [submit(train, row, kind, seed, steps, rate) for seed in range(seeds)]
        for run in as_completed(runs):
            done: Run = run.result()
            progress.update(bar, advance=1, description=f"{done.row}, {done.kind}")
    order = {pair: place for place, pair in enumerate(pairs)}
    return sorted((r.result() for r in runs), key=lambda r: (order[r.row, r.kind], r.seed))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = measure(arguments.rows, arguments.seeds, arguments.steps, arguments.processes)
    console = Console(width=150)
    console.print(rows_table(arguments.rows, runs))
    console.print(combinations_table(runs))
    plot(arguments.rows, runs, arguments.out / "guide.svg")
    kept = [asdict(r) | {"range": r.range} for r in runs]
    (arguments.out / "guide.json").write_text(json.dumps(kept))
    for name in ("guide.svg", "guide.json"):
        console.print(f"written: {arguments.out / name}", highlight=False, soft_wrap=True)
    return 0
