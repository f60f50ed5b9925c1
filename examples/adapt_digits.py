"""Trains a net with batch norms on digits, and fits its statistics to digits that look otherwise.

Held-out accuracy on the changed digits: with the statistics of training, of the changed training
images without their labels, and of 64 of those alone. --seeds and --steps shorten the run.
"""

import argparse
import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradfuse import adapt_statistics, optim
from gradfuse.demo.digits import Digits
from gradfuse.nn import BatchNormAct1d

CHANGES = {
    "none": lambda x: x,
    "half the contrast": lambda x: 0.5 * x,
    "brighter by 0.5": lambda x: x + 0.5,
    "noise of 0.2": lambda x: x + 0.2 * torch.randn_like(x),
    "noise of 0.5": lambda x: x + 0.5 * torch.randn_like(x),
    "inverted": lambda x: -x,
}


def trained(data: Digits, steps: int, seed: int) -> nn.Module:
    net = nn.Sequential(nn.Linear(64, 128), BatchNormAct1d(128), nn.Linear(128, 128),
                        BatchNormAct1d(128), nn.Linear(128, 10))  # fmt: skip
    optimizer = optim.AdamW(net.parameters(), lr=2e-3, clip=1.0)
    for x, y in data.batches(steps, seed):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def adapted(net: nn.Module, x: Tensor) -> nn.Module:
    net = copy.deepcopy(net)
    adapt_statistics(net, x.split(100))
    return net


def main(seeds: int, steps: int) -> None:
    torch.set_num_threads(1)  # which is the fastest for a net so small
    found = torch.zeros(len(CHANGES), 3, seeds, dtype=torch.float64)
    for seed in range(seeds):
        torch.manual_seed(seed)
        data = Digits.load(seed)
        net = trained(data, steps, seed)
        for row, change in zip(found, CHANGES.values(), strict=True):
            other = replace(data, held_out_x=change(data.held_out_x))
            x = change(data.x)
            nets = (net, adapted(net, x), adapted(net, x[:64]))
            row[:, seed] = torch.tensor([other.accuracy(n) for n in nets])
    print("| change | as trained | adapted | adapted to 64 images |\n|---|---|---|---|")
    for name, row in zip(CHANGES, found.mean(dim=2).tolist(), strict=True):
        print(f"| {name} | {' | '.join(f'{a:.1%}' for a in row)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    main(**vars(parser.parse_args()))
