"""The bench of fused models: python -m gradfuse bench fuse."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradfuse
from gradfuse.bench.harness import Contender, Plan, Result, Target, Workload
from gradfuse.bench.registry import Bench
from gradfuse.bench.step_models import MODELS
from gradfuse.bench.step_process import (
    COMPILED,
    FUSED,
    FUSED_COMPILED,
    STOCK,
    step_processes,
)
from gradfuse.fuse import swapped

__all__ = ["BENCH"]

EAGER, OP, WAITING = "torch eager", "gradfuse.nn.BatchNormAct2d", "gradfuse.fuse"
ALONE = "norm alone"
SITES = ("relu", "add + relu")
LIMITS = {"forward": 25.0, "backward": 5.0}  # microseconds that waiting may add to a site

# (batch, size, the project's goal), by model, layout and dtype.
STEPS = {
    ("resnet50", "NCHW", "float32"): (8, 128, 1.15),
    ("resnet50", "NHWC", "float32"): (8, 128, 1.12),
    ("resnet50", "NHWC", "bfloat16"): (8, 128, 1.12),
    ("gpt2", "NCHW", "float32"): (8, 256, 1.15),
    ("vit_tiny", "NCHW", "float32"): (16, 224, 1.15),
}


def site(what: str) -> Iterator[Workload]:
    """One batch norm and what follows it, on a map so small that nothing but overhead counts."""
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    grad = torch.randn_like(x)
    residual = None if what == "relu" else x
    plain, op = nn.BatchNorm2d(8), gradfuse.nn.BatchNormAct2d(8)
    waiting = gradfuse.fuse(nn.BatchNorm2d(8))
    outputs: dict[str, Tensor] = {}

    def follow(bn: nn.Module) -> Tensor:
        return F.relu(bn(x) if residual is None else bn(x) + residual)

    def back(name: str) -> object:
        return torch.autograd.grad(outputs[name], x, grad)

    calls: dict[str, Callable[[], Tensor]] = {
        EAGER: partial(follow, plain),
        OP: partial(op, x, residual),
        WAITING: partial(follow, waiting),
    }

    def prepare() -> None:
        outputs.update({name: call() for name, call in calls.items()})

    yield of_site(f"{what}, forward", [Contender(name, call) for name, call in calls.items()])
    yield of_site(f"{what}, backward", [Contender(n, partial(back, n)) for n in calls], prepare)


def of_site(
    what: str, contenders: list[Contender], prepare: Callable[[], object] = lambda: None
) -> Workload:
    return Workload(
        name=f"one site, {what}",
        dtype="float32",
        contenders=contenders,
        bytes_moved=0,
        baseline=EAGER,
        floor=OP,
        prepare=prepare,
    )


def overheads(results: Sequence[Result]) -> list[str]:
    """What a fused module takes more than the op's own, in microseconds."""
    lines = []
    for what in SITES:
        for way, limit in LIMITS.items():
            name = f"one site, {what}, {way}"
            ms = {r.contender: r.median_ms for r in results if r.workload == name}
            if ms:
                taken = 1e3 * (ms[WAITING] - ms[OP])
                verdict = "reached" if taken <= limit else "not reached"
                line = f"{what}, {way}: waiting takes {taken:.1f} us a site"
                lines.append(f"{line}; goal {limit:g} us, {verdict}")
    return lines


def norm_site(p: float, dtype: torch.dtype) -> Iterator[Workload]:
    """dropout + add + layer norm after a first norm, forward and backward, by size: fused with what
    waits, with the norm's op alone, and not."""
    for rows in (8, 32, 128, 512, 2048):
        tensors = [torch.randn(rows, 768, dtype=dtype) for _ in range(4)]
        x, branch = (t.requires_grad_() for t in tensors[:2])
        plain = nn.ModuleList([nn.LayerNorm(768), nn.Dropout(p), nn.LayerNorm(768)]).to(dtype)
        fused = gradfuse.fuse(plain)

        def run(
            model: nn.Module, least_bytes: int, x: Tensor, branch: Tensor, grads: list[Tensor]
        ) -> None:
            first, drop, second = cast(nn.ModuleList, model)
            swapped.LEAST_BYTES = swapped.LEAST_BYTES_OF_SUM = least_bytes
            first(x)
            total = x + drop(branch)
            torch.autograd.backward([second(total), total], grads)
            x.grad = branch.grad = None

        calls = {EAGER: (plain, 0), ALONE: (fused, sys.maxsize), WAITING: (fused, 0)}
        contenders = [
            Contender(name, partial(run, model, least, x, branch, tensors[2:]))
            for name, (model, least) in calls.items()
        ]
        size = x.numel() * x.element_size() >> 10
        what = "dropout + add + layer norm" if p else "add + layer norm"
        yield Workload(
            name=f"one site, {what}, {size} KiB",
            dtype=str(dtype).removeprefix("torch."),
            contenders=contenders,
            bytes_moved=0,
            baseline=EAGER,
            floor=ALONE,
        )


def steps(arguments: argparse.Namespace, notes: list[str]) -> Iterator[Workload]:
    """Training steps of models, each contender in a process of its own."""
    for (model, layout, dtype), (batch, size, goal) in STEPS.items():
        if not MODELS[model].is_there:
            line = f"{MODELS[model].title} step: left out, no {MODELS[model].library}"
            notes += [line] * (line not in notes)
            continue
        if arguments.quick:
            if (model, layout, dtype) != ("resnet50", "NCHW", "float32"):
                continue
            batch, size = 2, 64
        form = (batch, size, layout, dtype, model)
        yield from step((STOCK, FUSED), form, Target(goal), notes, None)
        if arguments.compile_budget > 0:
            budget = arguments.compile_budget
            yield from step((COMPILED, FUSED_COMPILED), form, Target(1.0), notes, budget)


def step(
    kinds: tuple[str, str],
    form: tuple[int, int, str, str, str],
    target: Target,
    notes: list[str],
    budget: float | None,
) -> Iterator[Workload]:
    """The step of two kinds, if the first ones took no longer than the budget."""
    batch, size, layout, dtype, model = form
    compiled = "" if budget is None else ", compiled"
    sizes = f"{size} tokens" if model == "gpt2" else f"{size} px, {layout}"
    name = f"{MODELS[model].title} step{compiled}, batch {batch}, {sizes}"
    with step_processes(kinds, *form) as processes:
        slowest = max(process.first for process in processes)
        if budget is not None and slowest > budget:
            notes.append(f"{name}, {dtype}: left out, compiled in {slowest:.0f} s")
            return
        yield Workload(
            name=name,
            dtype=dtype,
            contenders=[
                Contender(kind, p.step, p.memory) for kind, p in zip(kinds, processes, strict=True)
            ],
            bytes_moved=0,
            baseline=kinds[0],
            floor=kinds[0],
            targets={kinds[1]: target},
            pids=tuple(p.pid for p in processes),
        )


def workloads(arguments: argparse.Namespace, notes: list[str]) -> Iterator[Workload]:
    for what in SITES:
        yield from site(what)
    if arguments.sizes:
        least = swapped.LEAST_BYTES, swapped.LEAST_BYTES_OF_SUM
        for dtype in (torch.float32, torch.bfloat16):
            for p in (0.0, 0.1):
                yield from norm_site(p, dtype)
        swapped.LEAST_BYTES, swapped.LEAST_BYTES_OF_SUM = least
    if arguments.step:
        yield from steps(arguments, notes)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="time sites of a layer norm by size",
    )
    parser.add_argument(
        "--step", action=argparse.BooleanOptionalAction, default=True, help="time training steps"
    )


BENCH = Bench(
    op="fuse",
    work="fused models",
    workloads=workloads,
    plan=Plan(9, 2000, 20.0),
    quick_plan=Plan(5, 500, 0.5, repeats=0),
    compile_budget=180.0,
    add_options=add_options,
    summarise=overheads,
)
