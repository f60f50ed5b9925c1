"""What each row of the guide is: how its nets are built and initialised, and what updates them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradfuse import optim, policies
from gradfuse.curriculum import Competence, CurriculumSampler, SequenceLengthWarmup
from gradfuse.demo.digits import BATCH, Digits
from gradfuse.guide.nets import LAYERS, Dense, GatedCell, PlainCell
from gradfuse.init import initialize_
from gradfuse.nn import BatchNormAct1d, Highway, HomeostaticGain, LayerNorm, Residual

__all__ = ["COMBINATIONS", "RECIPES", "SHORT", "Recipe"]

Make = Callable[[int], nn.Module]
Init = Callable[[nn.Module, Tensor], object]
Batches = Callable[[Digits, int, int], Iterator[tuple[Tensor, Tensor]]]

SGD_RATES = (0.1, 0.01, 0.001)
ADAMW_RATES = (0.01, 0.001, 0.0001)
RENORM_WARMUP = (12.5, 100, 62.5)  # the paper's, of a run 400 times as short


def linear(width: int) -> nn.Linear:
    return nn.Linear(width, width)


def plain_block(width: int) -> nn.Module:
    return nn.Sequential(linear(width), nn.ReLU())


def torch_default(net: nn.Module, x: Tensor) -> None:
    """The weights that the constructors drew: uniform, of variance 1 / (3 fan_in)."""


def drawn(draw: Callable[[Tensor], object]) -> Init:
    """Draws every matrix so, and sets every bias to 0."""

    def init(net: nn.Module, x: Tensor) -> None:
        for parameter in net.parameters():
            if parameter.ndim == 2:
                draw(parameter)
            else:
                nn.init.zeros_(parameter)

    return init


def he(weight: Tensor) -> Tensor:
    return nn.init.kaiming_normal_(weight)


@torch.no_grad()
def large(weight: Tensor) -> Tensor:
    return he(weight).mul_(1.5)


def by_data(net: nn.Module, x: Tensor) -> None:
    initialize_(net, x)


def shuffled(digits: Digits, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    return digits.batches(steps, seed)


def easiest_first(digits: Digits, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The share of images near their class's mean grows to all of them over half of the steps."""
    means = torch.stack([digits.x[digits.y == c].mean(0) for c in range(10)])
    difficulty = (digits.x - means[digits.y]).norm(dim=1)
    sampler = CurriculumSampler(difficulty, Competence(max(steps // 2, 1)), BATCH, seed=seed)
    while sampler.steps < steps:
        order = list(sampler)[: BATCH * (steps - sampler.steps)]
        for start in range(0, len(order) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            yield digits.x[batch], digits.y[batch]
            sampler.step()


def shortest_first(digits: Digits, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first 8 pixels of each image at first, all 64 after half of the steps."""
    warmup = SequenceLengthWarmup(max(steps // 2, 1), end=64)
    for x, y in digits.batches(steps, seed):
        yield warmup(x), y
        warmup.step()


@dataclass(frozen=True)
class Recipe:
    """One row. What it does not name is as in the row "nothing".

    Attributes:
        name: of the row.
        chapter: what of the guide it tests.
        block: makes one of the 100 blocks of the deep net from its width; None: no deep net.
        cell: makes the cell of the recurrent net from its width; None: none that fits.
        init: sets the weights of a net, given some images.
        clip: makes the clip of the optimizer.
        optimizer: gradfuse's, which skips steps whose gradients are not finite.
        options: of the optimizer.
        rates: learning rates, of which a short run chooses one.
        batches, sequences: of (images, digits) for either net, given data, steps and seed.
    """

    name: str
    chapter: str
    block: Make | None = plain_block
    cell: Make | None = PlainCell
    init: Init = torch_default
    clip: Callable[[], Any] = lambda: None
    optimizer: Callable[..., torch.optim.Optimizer] = optim.SGD
    options: tuple[tuple[str, Any], ...] = (("momentum", 0.9),)
    rates: tuple[float, ...] = SGD_RATES
    batches: Batches = shuffled
    sequences: Batches = shuffled


def norm_1() -> policies.Policy:
    return policies.Norm(1.0)


def agc() -> policies.Policy:
    return policies.AGC(0.01)


def residual_batch_norm(width: int, p: float = 0.0) -> nn.Module:
    branch = nn.Sequential(linear(width), nn.Dropout(p)) if p else linear(width)
    return Residual(branch, norm=nn.BatchNorm1d(width), activation="relu")


ROWS = (
    Recipe("nothing", "why gradients explode"),
    Recipe("large weights", "why gradients explode", init=drawn(large)),
    Recipe("clipping", "clipping", clip=norm_1),
    Recipe("large weights, clipping", "clipping", init=drawn(large), clip=norm_1),
    Recipe("large weights, AGC", "clipping", init=drawn(large), clip=agc),
    Recipe("Xavier", "initialisation", init=drawn(nn.init.xavier_normal_)),
    Recipe("He", "initialisation", init=drawn(he), cell=None),
    Recipe("orthogonal", "initialisation", init=drawn(nn.init.orthogonal_)),
    Recipe("data-dependent", "initialisation", init=by_data),
    Recipe(
        "batch norm",
        "normalisation",
        block=lambda c: nn.Sequential(linear(c), BatchNormAct1d(c)),
        cell=None,
    ),
    Recipe(
        "layer norm",
        "normalisation",
        block=lambda c: nn.Sequential(linear(c), LayerNorm(c), nn.ReLU()),
        cell=lambda c: PlainCell(c, LayerNorm(c)),
    ),
    Recipe(
        "residual",
        "residual paths",
        block=lambda c: Residual(linear(c), activation="relu"),
        cell=lambda c: PlainCell(c, residual=True),
    ),
    Recipe("batch norm + residual", "residual paths", block=residual_batch_norm, cell=None),
    Recipe(
        "layer norm + residual",
        "residual paths",
        block=lambda c: Residual(linear(c), norm=LayerNorm(c), activation="relu"),
        cell=lambda c: PlainCell(c, LayerNorm(c), residual=True),
    ),
    Recipe("dense", "architectures", block=Dense, cell=None),
    Recipe(
        "highway",
        "architectures",
        block=lambda c: Highway(c, gate_bias=-math.log(LAYERS)),
        cell=GatedCell,
    ),
    Recipe(
        "AdamW + clip + Xavier",
        "adaptive steps",
        init=drawn(nn.init.xavier_normal_),
        clip=norm_1,
        optimizer=optim.AdamW,
        options=(),
        rates=ADAMW_RATES,
    ),
    Recipe(
        "AdamW + clip + data-dependent",
        "adaptive steps",
        init=by_data,
        clip=norm_1,
        optimizer=optim.AdamW,
        options=(),
        rates=ADAMW_RATES,
    ),
    Recipe(
        "dropout + residual + batch norm",
        "dropout",
        block=lambda c: residual_batch_norm(c, p=0.1),
        cell=None,
    ),
    Recipe("curriculum", "curriculum", batches=easiest_first, sequences=shortest_first),
    Recipe(
        "curriculum + residual + batch norm",
        "curriculum",
        block=residual_batch_norm,
        cell=None,
        batches=easiest_first,
    ),
    Recipe(
        "batch renorm + residual",
        "adaptive normalisation",
        block=lambda c: Residual(
            linear(c), norm=BatchNormAct1d(c, renorm=True, warmup=RENORM_WARMUP)
        ),
        cell=None,
    ),
    Recipe(
        "homeostatic gain",
        "biology",
        block=lambda c: nn.Sequential(linear(c), HomeostaticGain(c)),
        cell=None,
    ),
)
RECIPES = {recipe.name: recipe for recipe in ROWS}

SHORT = (
    "nothing",
    "large weights",
    "large weights, clipping",
    "batch norm",
    "residual",
    "batch norm + residual",
)

# Rows of several techniques, and the rows of each alone.
COMBINATIONS = {
    "large weights, clipping": ("large weights",),
    "large weights, AGC": ("large weights",),
    "batch norm + residual": ("batch norm", "residual"),
    "layer norm + residual": ("layer norm", "residual"),
    "AdamW + clip + Xavier": ("clipping", "Xavier"),
    "AdamW + clip + data-dependent": ("AdamW + clip + Xavier", "data-dependent"),
    "dropout + residual + batch norm": ("batch norm + residual",),
    "curriculum + residual + batch norm": ("batch norm + residual", "curriculum"),
    "batch renorm + residual": ("batch norm + residual",),
}
