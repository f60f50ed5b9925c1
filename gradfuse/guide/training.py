"""One training run of a row of the guide, and what it measures."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfuse.demo.digits import Digits
from gradfuse.guide.nets import DeepNet, RecurrentNet
from gradfuse.guide.recipes import RECIPES, Recipe

__all__ = ["KINDS", "Run", "alone", "choose_rate", "fits", "train"]

Net = DeepNet | RecurrentNet

KINDS = ("deep", "recurrent")
TRIAL_SEED, TRIAL_STEPS, TRIAL_END = 1000, 40, 10
SEEN = 256  # images that a data-dependent initialisation gets


@dataclass
class Run:
    """What happened in one run.

    Attributes:
        row, kind, seed, rate: what was run.
        gradients: norm of the loss's gradient by each hidden state, over depth or time, in the
            first step.
        losses: of each batch.
        lost: share of steps and weight matrices in which nothing moved.
        accuracy: on the held-out images.
    """

    row: str
    kind: str
    seed: int
    rate: float
    gradients: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    lost: float = math.nan
    accuracy: float = math.nan

    @property
    def range(self) -> float:
        """Largest over least gradient norm; inf if one of them is 0 or not finite."""
        low, high = min(self.gradients), max(self.gradients)
        return high / low if low > 0 and math.isfinite(high) else math.inf


def alone() -> None:
    """Settings of a process that trains: its nets are too small for threads."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of steps that change nothing: the table counts them


def fits(row: str, kind: str) -> bool:
    """Whether the row has a net of this kind."""
    recipe = RECIPES[row]
    return (recipe.block if kind == "deep" else recipe.cell) is not None


def build(recipe: Recipe, kind: str, digits: Digits, seed: int) -> Net:
    torch.manual_seed(seed)
    make = recipe.block if kind == "deep" else recipe.cell
    assert make is not None
    net = DeepNet(make) if kind == "deep" else RecurrentNet(make)
    recipe.init(net, digits.x[:SEEN])
    return net


def train(row: str, kind: str, seed: int, steps: int, rate: float) -> Run:
    """Trains the net of a row. The seed fixes weights, split and batches.

    The learning rate falls to 0. A step whose gradients are not finite is skipped.
    """
    recipe, run = RECIPES[row], Run(row, kind, seed, rate)
    digits = Digits.load(seed)
    net = build(recipe, kind, digits, seed)
    parameters = list(net.parameters())
    update = recipe.optimizer(
        parameters, lr=rate, clip=recipe.clip(), nonfinite="skip", **dict(recipe.options)
    )
    schedule = torch.optim.lr_scheduler.LinearLR(update, 1.0, 0.0, total_iters=steps)
    matrices = [p for p in parameters if p.ndim == 2]
    lost = 0
    batches = recipe.batches if kind == "deep" else recipe.sequences
    for x, y in batches(digits, steps, seed):
        loss = F.cross_entropy(net(x), y)
        update.zero_grad()
        if not run.losses:
            for state in net.states:
                state.retain_grad()
        loss.backward()
        if not run.losses:
            run.gradients = [norm_of(state.grad) for state in net.states]
        run.losses.append(loss.item())
        before = [p.detach().clone() for p in matrices]
        update.step()
        schedule.step()
        lost += sum(torch.equal(p, b) for p, b in zip(matrices, before, strict=True))
    net.eval()
    run.lost = lost / (steps * len(matrices))
    run.accuracy = digits.accuracy(net)
    return run


def norm_of(gradient: Tensor | None) -> float:
    """In float64, where no square of a float32 number overflows."""
    return 0.0 if gradient is None else float(gradient.double().norm())


def choose_rate(row: str, kind: str, steps: int) -> float:
    """The rate with the lowest mean loss at the end of a short run, with a seed of its own."""
    steps = min(steps, TRIAL_STEPS)

    def loss_at_end(rate: float) -> float:
        losses = train(row, kind, TRIAL_SEED, steps, rate).losses[-TRIAL_END:]
        mean = sum(losses) / len(losses)
        return mean if math.isfinite(mean) else math.inf

    return min(sorted(RECIPES[row].rates), key=loss_at_end)  # of equals the smallest
