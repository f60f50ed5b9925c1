"""Trains SimSiam and VICReg on digits, whole and without the part that keeps them from collapse.

The last rows have one bad batch, which SpikeSkip leaves out. --seeds and --steps shorten the run.
"""

import argparse
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradfuse import optim, policies
from gradfuse.demo.digits import Digits
from gradfuse.demo.self_supervision import Run, augmented, draw, linear_probe, table
from gradfuse.nn import BatchNormAct1d

LAYERS = ("encoder.0.weight", "encoder.2.weight", "projector.0.weight", "projector.2.weight")


def mlp(*widths: int, last_norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(fan_in, fan_out))
        hidden = i + 2 < len(widths)
        if hidden or last_norm:
            layers.append(BatchNormAct1d(fan_out, activation="relu" if hidden else None))
    return nn.Sequential(*layers)


class SimSiam(nn.Module):
    """Chen, He 2021, algorithm 1."""

    def __init__(self, stop_gradient: bool) -> None:
        super().__init__()
        self.encoder, self.projector = mlp(64, 256, 128), mlp(128, 128, 64, last_norm=True)
        self.predictor, self.stop_gradient = mlp(64, 16, 64), stop_gradient

    def loss(self, a: Tensor, b: Tensor) -> Tensor:
        targets = (a.detach(), b.detach()) if self.stop_gradient else (a, b)
        by_a = F.cosine_similarity(self.predictor(a), targets[1]).mean()
        return -(by_a + F.cosine_similarity(self.predictor(b), targets[0]).mean()) / 2


class VICReg(nn.Module):
    """Bardes, Ponce, LeCun 2022, algorithm 1."""

    def __init__(self, variance: bool) -> None:
        super().__init__()
        self.encoder, self.projector = mlp(64, 256, 128), mlp(128, 128, 64)
        self.variance = 25.0 if variance else 0.0

    def loss(self, a: Tensor, b: Tensor) -> Tensor:
        total = 25.0 * F.mse_loss(a, b)
        for z in (a, b):
            std = (z.var(dim=0) + 1e-4).sqrt()
            cov = z.T.cov().fill_diagonal_(0.0)
            total = total + self.variance * F.relu(1.0 - std).mean() / 2
            total = total + cov.square().sum() / z.shape[1]
        return total


def train(net: SimSiam | VICReg, data: Digits, steps: int, seed: int, clip, bad: int | None) -> Run:
    """Trains in place; the loss of the bad step is multiplied by 1e4."""
    run, generator = Run(), torch.Generator().manual_seed(seed)
    optimizer = optim.SGD(net.named_parameters(), 0.1, momentum=0.9, weight_decay=1e-4, clip=clip)
    for step, (x, _) in enumerate(data.batches(steps, seed)):
        features = [net.encoder(augmented(x, generator)) for _ in range(2)]
        outputs = [net.projector(h) for h in features]
        loss = net.loss(*outputs)
        optimizer.zero_grad()
        (loss * (1e4 if step == bad else 1.0)).backward()
        optimizer.step()
        if step % 10 == 0 or step in (bad, steps - 1):
            norms = {p.name: p.norm for p in optimizer.report.parameters}
            run.note(step, loss, outputs[0], [norms[name] for name in LAYERS])
    run.skipped = optimizer.skipped_steps
    run.probe = linear_probe(net.encoder, data)
    run.probe_of_outputs = linear_probe(nn.Sequential(net.encoder, net.projector), data)
    return run


def main(seeds: int, steps: int, out: Path) -> None:
    torch.set_num_threads(1)  # which is the fastest for nets so small
    runs: dict[str, list[Run]] = {}
    ways: list[tuple[str, Callable[[], SimSiam | VICReg], bool, bool]] = [
        ("SimSiam", lambda: SimSiam(True), False, False),
        ("SimSiam, no stop-gradient", lambda: SimSiam(False), False, False),
        ("VICReg", lambda: VICReg(True), False, False),
        ("VICReg, no variance term", lambda: VICReg(False), False, False),
        ("SimSiam, a bad batch", lambda: SimSiam(True), True, False),
        ("SimSiam, a bad batch, SpikeSkip", lambda: SimSiam(True), True, True),
        ("VICReg, a bad batch", lambda: VICReg(True), True, False),
        ("VICReg, a bad batch, SpikeSkip", lambda: VICReg(True), True, True),
    ]
    for seed in range(seeds):
        data = Digits.load(seed)
        torch.manual_seed(seed)
        probes = [linear_probe(net, data) for net in (nn.Identity(), SimSiam(True).encoder)]
        print(
            f"seed {seed}: probe of pixels {probes[0]:.1%}, of an untrained encoder {probes[1]:.1%}"
        )
        for name, make, planted, rescued in ways:
            torch.manual_seed(seed)
            clip = policies.SpikeSkip() if rescued else math.inf  # inf measures alone
            run = train(make(), data, steps, seed, clip, steps // 2 if planted else None)
            runs.setdefault(name, []).append(run)
    print(table(runs))
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, LAYERS, out)
    print(f"written: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("results/self_supervised_digits.png"))
    main(**vars(parser.parse_args()))
