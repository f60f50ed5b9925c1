"""The bench of layer norm and RMS norm of a sum: python -m gradfuse bench layer_norm."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import gradfuse
from gradfuse.bench.floor import FLOOR, Pass, flat_bytes, flat_view, move
from gradfuse.bench.harness import Contender, Plan, Result, Target, Workload
from gradfuse.bench.models import dtype_name
from gradfuse.bench.peers import compiles_in_time
from gradfuse.bench.registry import Bench

__all__ = ["BENCH", "setup"]

EAGER, FUSED, COMPILED = "torch eager", "gradfuse", "torch.compile"

# Tokens and features: of a GPT-2, of a large model, of narrow rows, and so few that overhead
# dominates.
SHAPES = ((8192, 768), (4096, 4096), (65536, 128), (32, 768))
QUICK = ((2048, 768), (32, 768))
SMALL = 1 << 16  # elements, below which overhead dominates


class Work(NamedTuple):
    """What a row computes, and its goals in float32 and bfloat16."""

    name: str
    is_rms: bool
    p: float
    goals: dict[torch.dtype, float]
    compiled_goal: float


WORKS = (
    Work("add + rms_norm", True, 0.0, {torch.float32: 4.0, torch.bfloat16: 6.0}, 1.8),
    Work("add + layer_norm", False, 0.0, {torch.float32: 1.5, torch.bfloat16: 2.5}, 1.0),
    Work("dropout + add + layer_norm", False, 0.1, {torch.float32: 5.0, torch.bfloat16: 5.0}, 10.0),
)
NARROW_GOAL, OVERHEAD_GOAL, FLOOR_GOAL = 2.0, 1.0, 1.3


class Tensors:
    """The tensors that a block's norm reads. The leaves require gradients."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, work: Work) -> None:
        generator = torch.Generator(torch.get_default_device()).manual_seed(sum(shape))

        def make() -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.work, self.width = work, shape[1]
        self.x, self.residual = make().requires_grad_(), make().requires_grad_()
        self.grads = (make(), make())  # of the norm and of the sum
        self.weight = torch.ones(shape[1], dtype=dtype, requires_grad=True)
        self.bias = None if work.is_rms else torch.zeros_like(self.weight, requires_grad=True)

    def backward(self, results: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        leaves = [self.x, self.residual, self.weight, *([] if self.bias is None else [self.bias])]
        return torch.autograd.grad(results, leaves, self.grads)


Norm = Callable[[Tensors], tuple[Tensor, Tensor]]


def formula(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, is_rms: bool, p: float
) -> tuple[Tensor, Tensor]:
    """A block's norm in torch's ops."""
    s = residual + (F.dropout(x, p) if p else x)
    shape = weight.shape
    return (F.rms_norm(s, shape, weight) if is_rms else F.layer_norm(s, shape, weight, bias)), s


def eager(t: Tensors) -> tuple[Tensor, Tensor]:
    return formula(t.x, t.residual, t.weight, t.bias, t.work.is_rms, t.work.p)


def compiled() -> Norm:
    """torch.compile of the formula, which compiles for each shape."""
    torch._dynamo.config.cache_size_limit = 64
    f = torch.compile(formula, dynamic=False)

    def call(t: Tensors) -> tuple[Tensor, Tensor]:
        results: tuple[Tensor, Tensor] = f(
            t.x, t.residual, t.weight, t.bias, t.work.is_rms, t.work.p
        )
        return results

    return call


def fused(t: Tensors) -> tuple[Tensor, Tensor]:
    shape, p = t.weight.shape, t.work.p
    if t.work.is_rms:
        found = gradfuse.add_rms_norm(t.x, t.residual, shape, t.weight, p=p, training=True)
    else:
        found = gradfuse.add_layer_norm(
            t.x, t.residual, shape, t.weight, t.bias, p=p, training=True
        )
    return cast("tuple[Tensor, Tensor]", found)


class Floor:
    """The bytes alone: forward reads x and residual and writes the sum and its norm; backward reads
    the sum and both gradients, and writes that of x and residual; theirs differ with a dropout."""

    def __init__(self, t: Tensors) -> None:
        self._given = [flat_view(t.x), flat_view(t.residual)]
        self._results = [flat_bytes(t.x.nbytes) for _ in range(2)]
        self._of_backward = [*(flat_view(g) for g in t.grads), self._results[0]]
        self._gradients = [flat_bytes(t.x.nbytes) for _ in range(2 if t.work.p else 1)]

    def __call__(self) -> None:
        move(Pass(self._given, self._results))
        move(Pass(self._of_backward, self._gradients))


def check(t: Tensors, ways: dict[str, Norm]) -> None:
    """Raises unless all ways have eager's results, where no dropout makes them different."""
    if t.work.p:
        return
    tolerance = 1e-4 if t.x.dtype == torch.float32 else 0.3  # torch's bfloat16 gradients are wrong
    results = eager(t)
    expected = (*results, *t.backward(results))
    for name, norm in ways.items():
        results = norm(t)
        for ours, theirs in zip((*results, *t.backward(results)), expected, strict=True):
            difference = (ours.double() - theirs.double()).norm()
            if not difference <= tolerance * theirs.double().norm():
                raise RuntimeError(f"{name}: another result than {EAGER} on {tuple(t.x.shape)}")


def setup(
    shape: tuple[int, int], dtype: torch.dtype, work: Work, compiled: Norm | None = None
) -> list[Contender]:
    """The contenders: forward and backward of one work."""
    t = Tensors(shape, dtype, work)
    ways: dict[str, Norm] = {EAGER: eager, FUSED: fused}
    if compiled is not None:
        ways[COMPILED] = compiled
    check(t, ways)

    def of(norm: Norm) -> Callable[[], None]:
        return lambda: (t.backward(norm(t)), None)[1]

    contenders = [Contender(name, of(norm)) for name, norm in ways.items()]
    return [*contenders, Contender(FLOOR, Floor(t))]


def target_of(shape: tuple[int, int], dtype: torch.dtype, work: Work) -> Target:
    if shape[0] * shape[1] < SMALL:
        return Target(OVERHEAD_GOAL)
    goal = work.goals[dtype]
    return Target(min(goal, NARROW_GOAL) if shape[1] < 256 else goal, FLOOR_GOAL)


def compile_formula(notes: list[str], budget: float) -> Norm | None:
    """torch.compile of the formula, if it compiles in time."""
    function = compiled()
    t = Tensors((4, 8), torch.float32, WORKS[-1])
    return function if compiles_in_time(lambda: t.backward(function(t)), notes, budget) else None


def workloads(arguments: argparse.Namespace, notes: list[str]) -> Iterator[Workload]:
    peer = compile_formula(notes, arguments.compile_budget)
    for work in WORKS:
        for dtype in (torch.float32, torch.bfloat16):
            for shape in QUICK if arguments.quick else SHAPES:
                passes = 9 if work.p else 8
                yield Workload(
                    name=f"{work.name} {shape[0]} x {shape[1]}",
                    dtype=dtype_name(dtype),
                    contenders=setup(shape, dtype, work, peer),
                    bytes_moved=passes * shape[0] * shape[1] * dtype.itemsize,
                    baseline=EAGER,
                    floor=FLOOR,
                    targets={FUSED: target_of(shape, dtype, work)},
                )


def against_compile(results: Sequence[Result]) -> list[str]:
    """The means over the shapes of each work and dtype against torch.compile."""
    ms = {(r.workload, r.dtype, r.contender): r.median_ms for r in results}
    lines = []
    for work in WORKS:
        for dtype in ("float32", "bfloat16"):
            ratios = [
                ms[name, of, COMPILED] / mine
                for (name, of, who), mine in ms.items()
                if who == FUSED
                and of == dtype
                and name.startswith(f"{work.name} ")
                and not name.endswith("32 x 768")
                and (name, of, COMPILED) in ms
            ]
            if not ratios:
                continue
            mean = statistics.geometric_mean(ratios)
            verdict = "reached" if mean >= work.compiled_goal else "not reached"
            lines.append(
                f"{work.name}, {dtype}, against {COMPILED}: {mean:.2f}x, geometric mean of "
                f"{len(ratios)}; goal {work.compiled_goal:g}x, {verdict}"
            )
    return lines


BENCH = Bench(
    op="layer_norm",
    work="layer norm and RMS norm of residual + dropout(x), forward and backward",
    workloads=workloads,
    plan=Plan(7, 100, 2.0),
    quick_plan=Plan(5, 20, 0.5, repeats=0),
    compile_budget=60.0,
    summarise=against_compile,
)
