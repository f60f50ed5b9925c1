"""The command line of the demo: python -m gradfuse demo."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from gradfuse.demo.clip import compare_clips
from gradfuse.demo.digits import Digits
from gradfuse.demo.frozen import compare_frozen
from gradfuse.demo.fuse import compare_fused
from gradfuse.demo.policies import compare_bfloat16, compare_policies

__all__ = ["main"]

FUSE_STEPS = 300  # at most, for the ResNet-18


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gradfuse demo",
        description="Trains a deep residual net on real digits with either clip.",
    )
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument(
        "--schedule",
        choices=("constant", "linear"),
        default="constant",
        help="of the learning rate",
    )
    parser.add_argument("--blocks", type=int, default=80)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the plot")
    parser.add_argument(
        "--threads", type=int, default=1, help="default 1: 64 x 64 matrices are too small to share"
    )
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps must be >= 1, got {arguments.steps}")
    return arguments


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    steps, seed, out = arguments.steps, arguments.seed, arguments.out
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    with threads(arguments.threads):
        compare_clips(
            arguments.optimizer, arguments.schedule, arguments.blocks, steps, seed, out, console
        )
    digits = Digits.load(seed)
    batches = digits.batches(min(steps, FUSE_STEPS), seed)
    compare_fused(batches, digits.accuracy, seed, out, console)
    with threads(arguments.threads):
        compare_policies(digits, steps, seed, out, console)
        compare_bfloat16(digits, steps, seed, console)
        compare_frozen(console)
    return 0
