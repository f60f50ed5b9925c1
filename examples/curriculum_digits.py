"""Counts the steps to 95 % on held-out digits with 30 % of the training labels wrong, by order.

Difficulty is what a user could have: the loss of a linear model on the fifth of the data that it
was not trained on. The last row orders by the noise itself. --seeds and --steps shorten the run.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gradfuse import optim
from gradfuse.curriculum import BabySteps, Competence, CurriculumSampler
from gradfuse.demo.digits import Digits

BATCH, EVERY = 64, 10


def accuracies(x: Tensor, y: Tensor, data: Digits, sampler: CurriculumSampler, steps: int, paced):
    """Held-out accuracy after every 10 steps."""
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                        nn.Linear(128, 10))  # fmt: skip
    optimizer = optim.AdamW(net.parameters(), lr=2e-3, clip=1.0)
    while sampler.steps < steps:
        for index in DataLoader(range(len(y)), BATCH, sampler=sampler):
            losses = F.cross_entropy(net(x[index]), y[index], reduction="none")
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            if paced:
                sampler.update(index, losses)
            sampler.step()
            if sampler.steps % EVERY == 0:
                yield data.accuracy(net)


def cross_fitted_losses(x: Tensor, y: Tensor) -> Tensor:
    losses, fold = torch.empty(len(y)), torch.arange(len(y)) % 5
    for k in range(5):
        net, held = nn.Linear(64, 10), fold == k
        optimizer = optim.AdamW(net.parameters(), lr=0.02)
        for _ in range(50):
            optimizer.zero_grad()
            F.cross_entropy(net(x[~held]), y[~held]).backward()
            optimizer.step()
        losses[held] = F.cross_entropy(net(x[held]), y[held], reduction="none").detach()
    return losses


def main(seeds: int, steps: int) -> None:
    torch.set_num_threads(1)  # which is the fastest for a net so small
    found: dict[str, list[list[float]]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        data = Digits.load(seed)
        wrong = torch.rand(len(data.y)) < 0.3
        y = torch.where(wrong, (data.y + torch.randint(1, 10, data.y.shape)) % 10, data.y)
        loss, grow = cross_fitted_losses(data.x, y), Competence(steps // 2)
        for name, difficulty, schedule in [
            ("shuffled, no curriculum", loss, lambda step: 1.0), ("competence", loss, grow),
            ("baby steps", loss, BabySteps(steps // 2)), ("self-paced", loss, grow),
            ("reversed", -loss, grow), ("competence by the noise", wrong, grow),
        ]:  # fmt: skip
            torch.manual_seed(seed)
            sampler = CurriculumSampler(difficulty, schedule, BATCH, seed=seed)
            runs = accuracies(data.x, y, data, sampler, steps, name == "self-paced")
            found.setdefault(name, []).append(list(runs))
    print("| order | steps to 95 %, by seed | best | last |\n|---|---|---|---|")
    for name, runs in found.items():
        first = [next((EVERY * (i + 1) for i, a in enumerate(r) if a >= 0.95), None) for r in runs]
        to_95 = ", ".join("never" if step is None else str(step) for step in first)
        best, last = (sum(f(r) for r in runs) / len(runs) for f in (max, lambda r: r[-1]))
        print(f"| {name} | {to_95} | {best:.1%} | {last:.1%} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=800)
    main(**vars(parser.parse_args()))
