"""What initialisations do to deep nets on scanned digits: python -m gradfuse bench init.

Nothing is timed. Two tables: the signal and the gradient of plain nets, on digits that the
initialisation has not seen; and residual nets without norm, trained.
"""

from __future__ import annotations

import argparse
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
from gradfuse.init import initialize_
from gradfuse.ops.clip import clip_grad_norm_

__all__ = ["main"]

Function = Callable[[Tensor], Tensor]
Row = dict[str, Any]

ACTIVATIONS: dict[str, Function] = {
    "relu": F.relu, "leaky_relu": F.leaky_relu, "gelu": F.gelu, "silu": F.silu, "mish": F.mish,
    "hardswish": F.hardswish, "elu": F.elu, "selu": F.selu, "tanh": torch.tanh,
    "softplus": F.softplus, "sigmoid": torch.sigmoid,
}  # fmt: skip
SEEN, MEASURED = 256, 256  # samples that correct the weights, and others that measure
STREAMS = {
    "pre": "h + W relu(h)",
    "post": "h + relu(W h)",
    "after": "relu(h + W h)",
}


class PlainNet(nn.Module):
    """Layers in a row: f(W h + b)."""

    def __init__(self, f: Function, layers: int, width: int) -> None:
        super().__init__()
        self.f = f
        self.layers = nn.ModuleList(
            nn.Linear(64 if i == 0 else width, width) for i in range(layers)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.f(layer(x))
        logits: Tensor = self.head(x)
        return logits


class StreamNet(nn.Module):
    """Residual blocks of one layer each, without norm."""

    def __init__(self, kind: str, blocks: int, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Linear(64, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            if self.kind == "pre":
                h = h + block(torch.relu(h))
            elif self.kind == "post":
                h = h + torch.relu(block(h))
            else:
                h = torch.relu(h + block(h))
        logits: Tensor = self.head(h)
        return logits


def rms_of_passes(net: PlainNet, x: Tensor) -> tuple[list[float], list[float]]:
    """rms of each layer's output, and of a random cotangent's gradient there."""
    outputs: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda m, i, o: outputs.append(o)) for m in net.layers]
    logits = net(x)
    for hook in hooks:
        hook.remove()
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    grads = torch.autograd.grad(logits, outputs, cotangent)
    return [size(o) for o in outputs], [size(g) for g in grads]


def size(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())


def initialised(net: nn.Module, scheme: str, x: Tensor, seed: int) -> nn.Module:
    """The net after "auto", "he" without data, or torch's default, which its constructor drew."""
    generator = torch.Generator().manual_seed(seed)
    if scheme == "auto":
        initialize_(net, x, generator=generator)
    elif scheme == "gain":  # the gain of each activation, as the textbook has it
        initialize_(net, x[:2], scheme="he", residual=None, generator=generator)
    return net


def plain_rows(layers: int, width: int, seeds: int, show: Callable[[str], None]) -> Iterator[Row]:
    """Range of the rms over all layers, in units of the last layer's gradient, by activation."""
    for name, f in ACTIVATIONS.items():
        for seed in range(seeds):
            show(f"{layers} layers of {name}, seed {seed}")
            x = Digits.load(seed).x
            row: Row = {"activation": name, "seed": seed}
            for scheme in ("torch", "gain", "auto"):
                torch.manual_seed(seed)
                net = initialised(PlainNet(f, layers, width), scheme, x[:SEEN], seed)
                assert isinstance(net, PlainNet)
                forward, backward = rms_of_passes(net, x[SEEN : SEEN + MEASURED])
                last = backward[-1]
                row[scheme] = {
                    "forward": [min(forward), max(forward)],
                    "backward": [b / last if last else math.nan for b in extremes(backward)],
                    "last": forward[-1],
                    "first_gradient": backward[0] / last if last else math.nan,
                }
            yield row


def extremes(values: Sequence[float]) -> tuple[float, float]:
    known = [v for v in values if not math.isnan(v)]
    return (min(known), max(known)) if len(known) == len(values) else (math.nan, math.nan)


def trained_rows(
    blocks: int, width: int, steps: int, seeds: int, show: Callable[[str], None]
) -> Iterator[Row]:
    """Loss and held-out accuracy of residual nets, SGD 0.01 with momentum, clipped to 1."""
    for kind, formula in STREAMS.items():
        for scheme in ("torch", "auto"):
            for seed in range(seeds):
                show(f"{blocks} blocks of {formula}, {scheme}, seed {seed}")
                digits = Digits.load(seed)
                torch.manual_seed(seed)
                net = initialised(StreamNet(kind, blocks, width), scheme, digits.x[:SEEN], seed)
                with torch.no_grad():
                    logits = size(net(digits.x[:SEEN]))
                parameters = list(net.parameters())
                update = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
                rate = torch.optim.lr_scheduler.LinearLR(update, 1.0, 0.0, total_iters=steps)
                losses = []
                for x, y in digits.batches(steps, seed):
                    loss = F.cross_entropy(net(x), y)
                    update.zero_grad()
                    loss.backward()
                    clip_grad_norm_(parameters, 1.0)
                    update.step()
                    rate.step()
                    losses.append(loss.item())
                    if not math.isfinite(losses[-1]):
                        break  # nothing comes back from there
                yield {
                    "net": formula,
                    "init": scheme,
                    "seed": seed,
                    "logits": logits,
                    "first_loss": losses[0],
                    "last_loss": losses[-1],
                    "accuracy": digits.accuracy(net),
                }


def plain_table(rows: Sequence[Row], title: str) -> Table:
    grid = Table(title=title, box=box.MARKDOWN)
    grid.add_column("activation")
    for name in (
        "torch: last rms", "gain: last rms", "gain: first gradient", "auto: rms",
        "auto: gradient",
    ):  # fmt: skip
        grid.add_column(name, justify="right")
    for name in dict.fromkeys(r["activation"] for r in rows):
        mine = [r for r in rows if r["activation"] == name]
        grid.add_row(
            name,
            spread([r["torch"]["last"] for r in mine]),
            spread([r["gain"]["last"] for r in mine]),
            spread([r["gain"]["first_gradient"] for r in mine]),
            spread([v for r in mine for v in r["auto"]["forward"]], always=True),
            spread([v for r in mine for v in r["auto"]["backward"]], always=True),
        )
    return grid


def spread(values: Sequence[float], always: bool = False) -> str:
    """One value, or from the least to the largest."""
    low, high = extremes(values)
    if math.isnan(low):
        return "nan"
    return f"{low:.2g} to {high:.2g}" if always or f"{low:.1g}" != f"{high:.1g}" else f"{low:.2g}"


def trained_table(rows: Sequence[Row], title: str) -> Table:
    grid = Table(title=title, box=box.MARKDOWN)
    for name in ("block", "init"):
        grid.add_column(name)
    for name in ("rms of logits", "first loss", "last loss", "held-out accuracy"):
        grid.add_column(name, justify="right")
    for formula, scheme in dict.fromkeys((r["net"], r["init"]) for r in rows):
        mine = [r for r in rows if (r["net"], r["init"]) == (formula, scheme)]
        grid.add_row(
            formula,
            scheme,
            *(spread([r[key] for r in mine]) for key in ("logits", "first_loss", "last_loss")),
            ", ".join(f"{r['accuracy']:.1%}" for r in mine),
        )
    return grid


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gradfuse bench init",
        description="Measures what initialisations do to deep nets on digits. Nothing is timed.",
    )
    parser.add_argument("--full", action="store_true", help="1,000 layers and blocks, two seeds")
    parser.add_argument("--quick", action="store_true", help="30 layers and blocks")
    parser.add_argument("--layers", type=int, help="of the plain nets")
    parser.add_argument("--blocks", type=int, help="of the residual nets")
    parser.add_argument("--width", type=int, default=128, help="of the plain nets")
    parser.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--seeds", type=int, help="runs of each row")
    parser.add_argument("--threads", type=int, default=1, help="of torch; matrices are small")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder to write to")
    arguments = parser.parse_args(argv)
    usual = (1000, 200, 2) if arguments.full else (30, 150, 1) if arguments.quick else (200, 150, 1)
    depth, steps, seeds = usual
    layers, blocks = arguments.layers or depth, arguments.blocks or depth
    steps, seeds = arguments.steps or steps, arguments.seeds or seeds
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    try:
        with progress() as show:
            plain = list(plain_rows(layers, arguments.width, seeds, show))
        title = f"{layers} plain layers of {arguments.width}, digits not seen before"
        console.print(plain_table(plain, title))
        with progress() as show:
            trained = list(trained_rows(blocks, 64, steps, seeds, show))
        console.print(trained_table(trained, f"{blocks} residual blocks of 64, {steps} steps"))
    finally:
        torch.set_num_threads(before)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "bench_init.json"
    about = machine() | {"layers": layers, "blocks": blocks, "width": arguments.width}
    path.write_text(json.dumps({"machine": about, "plain": plain, "trained": trained}, indent=1))
    console.print(f"written: {path}", highlight=False, soft_wrap=True)
    return 0
