"""Checks that an installed gradfuse works: python tests/smoke.py [FOLDER IT MUST LIE IN].

`make wheel` runs it without a compiler, which shows that the wheel needs none. It uses only torch
and gradfuse.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from torch import nn

import gradfuse
from gradfuse import _native
from gradfuse.__main__ import main as command_line


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
    )


def check_clip() -> None:
    p = nn.Parameter(torch.zeros(1000))
    p.grad = torch.full((1000,), 1e30)  # torch's own norm is inf here
    norm = gradfuse.clip_grad_norm_([p], max_norm=1.0)
    close(norm / 1e30, torch.tensor(1000.0).sqrt())
    close(p.grad.norm(), torch.tensor(1.0))
    report = gradfuse.GradClipper([("p", p)], max_norm=0.5).clip_()
    assert report.clipped, report
    assert report.worst(1)[0].name == "p", report


def check_batch_norm() -> None:
    plain = small_net()
    fused = gradfuse.fuse(small_net())
    x = torch.randn(5, 3, 8, 8)
    losses = [net(x).square().mean() for net in (plain, fused)]
    report = gradfuse.fuse_report(fused)
    assert all(site.fused for site in report), report
    close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        close(ours.grad, theirs.grad)


def check_step() -> None:
    ours, theirs = small_net(), small_net()
    x = torch.randn(5, 3, 8, 8)
    for net in (ours, theirs):
        net(x).square().mean().backward()
    optimizer = gradfuse.optim.AdamW(ours.named_parameters(), lr=1e-2, clip=0.1)
    optimizer.step()
    nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
    torch.optim.AdamW(theirs.parameters(), lr=1e-2).step()
    assert optimizer.report is not None
    assert optimizer.report.clipped
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(a.detach(), b.detach())


def main(folder: str | None) -> int:
    assert _native.available, _native.reason
    if folder is not None:
        compilers = [name for name in ("c++", "g++", "cc", "gcc", "nvcc") if shutil.which(name)]
        assert not compilers, f"expected no compiler on PATH, found {compilers}"
        for file in (gradfuse.__file__, _native.backend.__file__):
            assert Path(folder).resolve() in Path(file).resolve().parents, file
    assert command_line(["info"]) == 0
    for check in (check_clip, check_batch_norm, check_step):
        check()
        print(f"{check.__name__}: passed")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2] or [None]))
