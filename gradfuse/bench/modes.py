"""What modes of batch norm gain, or do not: python -m gradfuse bench modes.

Nothing is timed. Two tables: held-out accuracy of a small net on scanned digits with batches of a
few samples, and how far running statistics lie from the truth of data that drift.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gradfuse.bench.machine import machine
from gradfuse.bench.output import progress
from gradfuse.demo.digits import Digits
from gradfuse.nn import BatchNormAct1d
from gradfuse.optim import SGD

__all__ = ["main"]

Row = dict[str, Any]

SAMPLES = 14_000  # that a net sees, ten epochs
WIDTH = 64


def modes_of(batch: int, steps: int) -> dict[str, Row]:
    """The options of each mode. The warm-up ends with the first half of the steps, renormalisation
    is off in the first tenth."""
    renorm = {"renorm": True, "warmup": (steps // 10, steps // 2, steps // 2)}
    found: dict[str, Row] = {
        "plain": {},
        "renorm": renorm,
        "renorm, auto": {**renorm, "momentum": "auto"},
        "auto": {"momentum": "auto"},
    }
    if batch >= 4:
        found["ghost"] = {"ghost_size": 2 if batch == 4 else 16}
    return found


def trained(digits: Digits, batch: int, seed: int, options: Row) -> float:
    """Held-out accuracy of a net of two hidden layers. SGD: 0.05 sqrt(batch / 64), 0.9."""
    torch.manual_seed(seed)
    layers = [
        nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), BatchNormAct1d(WIDTH, **options))
        for _ in range(2)
    ]
    net = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    optimizer = SGD(net.parameters(), lr=0.05 * math.sqrt(batch / 64), momentum=0.9, clip=1.0)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [
            torch.randperm(len(digits.y), generator=generator)
            for _ in range(SAMPLES // len(digits.y))
        ]
    )
    for indices in order.split(batch):
        if len(indices) < batch:
            break
        optimizer.zero_grad()
        F.cross_entropy(net(digits.x[indices]), digits.y[indices]).backward()
        optimizer.step()
    return 100 * digits.accuracy(net.eval())


def digits_rows(batches: Sequence[int], seeds: int, show: Callable[[str], None]) -> Iterator[Row]:
    for batch in batches:
        for name, options in modes_of(batch, SAMPLES // batch).items():
            accuracies = []
            for seed in range(seeds):
                show(f"digits, batch {batch}, {name}, seed {seed}")
                accuracies.append(trained(Digits.load(seed), batch, seed, options))
            yield {"batch": batch, "mode": name, "accuracy": accuracies}


# Means [steps] of channels of deviation 1.
DRIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "still": lambda t: 0.0 * t,
    "slow, 0.003 a batch": lambda t: 0.003 * t,
    "fast, 0.03 a batch": lambda t: 0.03 * t,
    "step of 3, midway": lambda t: 3.0 * (t >= len(t) // 2),
}
MOMENTA: tuple[float | str, ...] = (0.01, 0.1, 0.5, "auto")


def drift_rows(batches: Sequence[int], seeds: int, steps: int = 500) -> Iterator[Row]:
    """Root mean square error of running_mean against the mean that the next batch will have."""
    for size in batches:
        for name, mean_of in DRIFTS.items():
            mean = mean_of(torch.arange(steps, dtype=torch.float32))
            row: Row = {"batch": size, "drift": name}
            for momentum in MOMENTA:
                norm = BatchNormAct1d(seeds, momentum=momentum, activation=None)
                generator = torch.Generator().manual_seed(0)
                squares = 0.0
                for m, following in itertools.pairwise(mean):
                    norm(torch.randn(size, seeds, generator=generator) + m)
                    assert norm.running_mean is not None
                    squares += float((norm.running_mean - following).square().mean())
                row[str(momentum)] = math.sqrt(squares / (steps - 1))
            yield row


def digits_table(rows: Sequence[Row]) -> Table:
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    table = Table(box=box.SIMPLE_HEAD, title="held-out digits read, %, mean (range of seeds)")
    table.add_column("mode")
    for batch in batches:
        table.add_column(f"batch {batch}", justify="right", no_wrap=True)
    found = {(row["mode"], row["batch"]): row["accuracy"] for row in rows}
    for mode in dict.fromkeys(row["mode"] for row in rows):
        table.add_row(mode, *(spread(found.get((mode, batch))) for batch in batches))
    return table


def spread(values: Sequence[float] | None) -> str:
    if values is None:
        return "-"
    return f"{sum(values) / len(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def drift_table(rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="error of the running mean, in deviations")
    for name in ("batch", "the mean is", *map(str, MOMENTA)):
        table.add_column(name, justify="left" if name == "the mean is" else "right")
    for row in rows:
        errors = (f"{row[str(momentum)]:.3f}" for momentum in MOMENTA)
        table.add_row(str(row["batch"]), row["drift"], *errors)
    return table


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gradfuse bench modes",
        description="What modes of batch norm do for small batches and drifting data.",
    )
    parser.add_argument("--quick", action="store_true", help="one batch size, one seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder to write to")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        parser.error(f"--seeds must be >= 1, got {arguments.seeds}")
    seeds = 1 if arguments.quick else arguments.seeds
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the nets are too small to share
    try:
        with progress() as show:
            learned = list(
                digits_rows((64,) if arguments.quick else (2, 3, 4, 64, 256), seeds, show)
            )
            show("drifting data")
            drifted = list(drift_rows((16,) if arguments.quick else (2, 16, 256), 32))
    finally:
        torch.set_num_threads(threads)
    console = Console()
    console.width = max(console.width, 110)  # a file has 80
    console.print(digits_table(learned), drift_table(drifted))
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "bench_modes.json"
    path.write_text(json.dumps({"machine": machine(), "digits": learned, "drift": drifted}))
    console.print(f"written: {path}")
    return 0
