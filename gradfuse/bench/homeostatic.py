"""What homeostasis does to nets on scanned digits: python -m gradfuse bench homeostatic.

Nothing is timed. Two tables: how many dead ReLU channels come back to life, and what the same
module costs nets that are healthy.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
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
from gradfuse.init import initialize_
from gradfuse.nn import HomeostaticGain

__all__ = ["main"]

Activation = Callable[[int], nn.Module]
Row = dict[str, Any]

WIDTH = 128
LR, MOMENTUM = 0.05, 0.9
DEPTHS = (3.0, 10.0, 100.0)  # of a planted death: bias below the largest input, in rms of inputs


def relu(channels: int) -> nn.Module:
    return nn.ReLU()


KINDS: dict[str, Activation] = {"ReLU": relu, "HomeostaticGain": HomeostaticGain}


def dense(act: Activation) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, WIDTH), act(WIDTH), nn.Linear(WIDTH, WIDTH), act(WIDTH), nn.Linear(WIDTH, 10)
    )


def convolutional(act: Activation) -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 32, 3, padding=1), act(32),
        nn.Conv2d(32, 32, 3, stride=2, padding=1), act(32), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


INITS = ("torch", "auto")
NETS = {"dense": dense, "convolutional": convolutional}


def hidden(net: nn.Sequential) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Each layer with the activation that follows it."""
    for layer, act in zip(net, list(net)[1:], strict=False):
        if isinstance(act, (nn.ReLU, HomeostaticGain)):
            yield layer, act


@torch.no_grad()
def plant(net: nn.Sequential, x: Tensor, depth: float) -> dict[nn.Module, Tensor]:
    """Kills every second channel of each hidden layer by its bias; which ones, by activation."""
    dead = {}
    for layer, act in hidden(net):
        z = outputs_of(net, layer, x)
        other = list(range(0, z.shape[1], 2))
        dims = [0, *range(2, z.ndim)]
        below = z.amax(dims) + depth * z.square().mean(dims).sqrt()
        assert isinstance(layer.bias, Tensor)
        layer.bias[other] -= below[other]
        dead[act] = torch.tensor(other)
    return dead


@torch.no_grad()
def outputs_of(net: nn.Sequential, last: nn.Module, x: Tensor) -> Tensor:
    training = net.training
    net.eval()
    for module in net:
        x = module(x)
        if module is last:
            break
    net.train(training)
    return x


def alive(net: nn.Sequential, dead: dict[nn.Module, Tensor], x: Tensor) -> float:
    """Share of the planted channels that answer to any of the images."""
    shares = []
    for act, channels in dead.items():
        y = outputs_of(net, act, x)
        shares.append((y.amax([0, *range(2, y.ndim)])[channels] > 0).float())
    return float(torch.cat(shares).mean())


def train(net: nn.Sequential, digits: Digits, steps: int, seed: int) -> float:
    """SGD with momentum at a rate that falls to 0; the held-out accuracy."""
    update = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)
    rate = torch.optim.lr_scheduler.LinearLR(update, 1.0, 0.0, total_iters=steps)
    net.train()
    for x, y in digits.batches(steps, seed):
        update.zero_grad()
        F.cross_entropy(net(x), y).backward()
        update.step()
        rate.step()
    net.eval()
    return digits.accuracy(net)


def revival_rows(
    depths: Sequence[float], seeds: int, steps: int, show: Callable[[str], None]
) -> Iterator[Row]:
    for name, make in NETS.items():
        for depth in depths:
            for kind, act in KINDS.items():
                for seed in range(seeds):
                    show(f"dead channels, {name}, {kind}, seed {seed}")
                    digits = Digits.load(seed)
                    torch.manual_seed(seed)
                    net = make(act)
                    dead = plant(net, digits.x, depth)
                    assert alive(net, dead, digits.x) == 0.0
                    accuracy = train(net, digits, steps, seed)
                    yield {"net": name, "depth": depth, "kind": kind, "seed": seed,
                           "alive": alive(net, dead, digits.x), "accuracy": accuracy}  # fmt: skip


def healthy_rows(seeds: int, steps: int, show: Callable[[str], None]) -> Iterator[Row]:
    """The same nets with nothing planted; share of channels whose gain or threshold has moved."""
    for name, init in ((name, init) for name in NETS for init in INITS):
        for seed in range(seeds):
            show(f"healthy nets, {name}, {init}, seed {seed}")
            digits = Digits.load(seed)
            row: Row = {"net": name, "init": init, "seed": seed}
            for kind, act in KINDS.items():
                torch.manual_seed(seed)
                net = NETS[name](act)
                if init != "torch":
                    plain = NETS[name](relu)  # both kinds begin with the same weights
                    initialize_(plain, digits.x[:256], scheme=init)
                    net.load_state_dict(plain.state_dict(), strict=False)
                row[kind] = train(net, digits, steps, seed)
                moved = [
                    ((m.gain != 1) | (m.threshold != 0)).float()
                    for m in net
                    if isinstance(m, HomeostaticGain)
                ]
                row["moved"] = float(torch.cat(moved).mean()) if moved else 0.0
            yield row


def revival_table(rows: Sequence[Row], title: str) -> Table:
    grid = Table(title=title, box=box.MARKDOWN)
    for column in ("net", "rms below 0", "activation", "alive again", "held-out accuracy"):
        grid.add_column(column, justify="left" if column in ("net", "activation") else "right")
    for key in dict.fromkeys((r["net"], r["depth"], r["kind"]) for r in rows):
        mine = [r for r in rows if (r["net"], r["depth"], r["kind"]) == key]
        name, depth, kind = key
        cells = (spread([r[column] for r in mine]) for column in ("alive", "accuracy"))
        grid.add_row(name, f"{depth:g}", kind, *cells)
    return grid


def spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1%} ({min(values):.0%} to {max(values):.0%})"


def healthy_table(rows: Sequence[Row], title: str) -> Table:
    grid = Table(title=title, box=box.MARKDOWN)
    for column in ("net", "init", *KINDS, "difference, points", "channels moved"):
        grid.add_column(column, justify="left" if column in ("net", "init") else "right")
    for name, init in dict.fromkeys((r["net"], r["init"]) for r in rows):
        mine = [r for r in rows if (r["net"], r["init"]) == (name, init)]
        gains = [100 * (r["HomeostaticGain"] - r["ReLU"]) for r in mine]
        error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
        grid.add_row(
            name,
            init,
            *(f"{mean(r[kind] for r in mine):.2%}" for kind in KINDS),
            f"{mean(gains):+.2f} ± {error:.2f}",
            f"{mean(r['moved'] for r in mine):.1%}",
        )
    return grid


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gradfuse bench homeostatic",
        description="Measures nn.HomeostaticGain on digits. Nothing is timed.",
    )
    parser.add_argument("--quick", action="store_true", help="one seed, few steps")
    parser.add_argument("--seeds", type=int, help="runs of each row of dead channels")
    parser.add_argument("--healthy-seeds", type=int, help="pairs of runs of healthy nets")
    parser.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--threads", type=int, default=1, help="of torch; matrices are small")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder to write to")
    arguments = parser.parse_args(argv)
    usual = (1, 1, 150) if arguments.quick else (5, 20, 200)
    seeds, healthy_seeds = arguments.seeds or usual[0], arguments.healthy_seeds or usual[1]
    steps = arguments.steps or usual[2]
    depths = DEPTHS[-1:] if arguments.quick else DEPTHS
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    try:
        with progress() as show:
            revived = list(revival_rows(depths, seeds, steps, show))
            healthy = list(healthy_rows(healthy_seeds, steps, show))
    finally:
        torch.set_num_threads(before)
    title = f"every second channel planted dead; {steps} steps, {seeds} seeds"
    console.print(revival_table(revived, title))
    console.print(healthy_table(healthy, f"healthy nets; {steps} steps, {healthy_seeds} seeds"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "bench_homeostatic.json"
    path.write_text(json.dumps({"machine": machine(), "dead": revived, "healthy": healthy}))
    console.print(f"written: {path}", highlight=False, soft_wrap=True)
    return 0
