"""How far a clip lets a small layer move beside one that explodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import Parameter

from gradfuse import optim

__all__ = ["compare_frozen", "moved"]

LR, STEPS, SHAPE = 1e-4, 20, (64, 64)
RATIOS = (1.0, 1e5, 1e10, 1e15)

Make = Callable[..., torch.optim.Optimizer]
RULES: dict[str, Make] = {
    "AdamW": optim.AdamW,
    "AdamW, eps_follows_clip": partial(optim.AdamW, eps_follows_clip=True),
    "AdamW, atan2": partial(optim.AdamW, atan2=True),
    "Adam, eps_follows_clip": partial(optim.Adam, eps_follows_clip=True),
    "Lion": optim.Lion,
    "LAMB": partial(optim.LAMB, always_adapt=True),
    "ScheduleFreeAdamW, eps_follows_clip": partial(optim.ScheduleFreeAdamW, eps_follows_clip=True),
}


def moved(make: Make, ratio: float, seed: int = 0) -> float:
    """Root mean square of a step of the small layer, in learning rates.

    Its gradients are of the size 1 and of one sign, so that a healthy layer moves by about the
    learning rate; those of the large layer are `ratio` times as large, and the clip is 1.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, SHAPE, generator=generator)
    large, small = Parameter(draw()), Parameter(draw())
    before = small.detach().clone()
    optimizer = make([large, small], lr=LR, weight_decay=0.0, clip=1.0)
    for _ in range(STEPS):
        large.grad, small.grad = ratio * draw(), draw().abs()
        optimizer.step()
    return float((small.detach() - before).square().mean().sqrt()) / (LR * STEPS)


def by_torch(parameters: list[Parameter], clip: float, **options: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters, **options)

    def before(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, clip)

    optimizer.register_step_pre_hook(before)
    return optimizer


def rows() -> Iterator[tuple[str, list[float]]]:
    for name, make in {"torch's clip and AdamW": by_torch, **RULES}.items():
        yield name, [moved(make, ratio) for ratio in RATIOS]


def compare_frozen(console: Console) -> None:
    """Prints what the small layer moves, for norms that are 1 to 1e15 apart."""
    grid = Table(
        title="a small layer beside one that explodes: its step, in learning rates; clip 1",
        title_justify="left",
    )
    grid.add_column("optimizer")
    for ratio in RATIOS:
        grid.add_column(f"norms {ratio:g} apart", justify="right")
    for name, row in rows():
        grid.add_row(name, *(f"{value:.2g}" for value in row))
    console.print(grid)
