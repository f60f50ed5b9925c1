"""The bench of fused models: python -m gradfuse bench fuse."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradfuse
from gradfuse.bench.harness import Contender, Plan, Result, Target, Workload
from gradfuse.bench.registry import Bench
from gradfuse.bench.step_process import (
    COMPILED,
    FUSED,
    FUSED_COMPILED,
    STOCK,
    step_processes,
)

__all__ = ["BENCH"]

EAGER, OP, WAITING = "torch eager", "gradfuse.nn.BatchNormAct2d", "gradfuse.fuse"
SITES = ("relu", "add + relu")
LIMITS = {"forward": 25.0, "backward": 5.0}  # microseconds that waiting may add to a site

# The goals of the project, by layout and dtype.
STEPS = {("NCHW", "float32"): 1.15, ("NHWC", "float32"): 1.12, ("NHWC", "bfloat16"): 1.12}


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


def steps(arguments: argparse.Namespace, notes: list[str]) -> Iterator[Workload]:
    """Training steps of a ResNet-50, each contender in a process of its own."""
    if importlib.util.find_spec("torchvision") is None:
        notes.append("ResNet-50 step: left out, no torchvision")
        return
    size = (2, 64) if arguments.quick else (8, 128)
    for (layout, dtype), goal in STEPS.items():
        if arguments.quick and (layout, dtype) != ("NCHW", "float32"):
            continue
        form = (*size, layout, dtype)
        yield from step((STOCK, FUSED), form, Target(goal), notes, None)
        if arguments.compile_budget > 0:
            budget = arguments.compile_budget
            yield from step((COMPILED, FUSED_COMPILED), form, Target(1.0), notes, budget)


def step(
    kinds: tuple[str, str],
    form: tuple[int, int, str, str],
    target: Target,
    notes: list[str],
    budget: float | None,
) -> Iterator[Workload]:
    """The step of two kinds, if the first ones took no longer than the budget."""
    batch, pixels, layout, dtype = form
    compiled = "" if budget is None else ", compiled"
    name = f"ResNet-50 step{compiled}, batch {batch}, {pixels} px, {layout}"
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
    if arguments.step:
        yield from steps(arguments, notes)


def add_options(parser: argparse.ArgumentParser) -> None:
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
