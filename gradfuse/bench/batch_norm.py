"""The bench of batch norm + add + relu: python -m gradfuse bench batch_norm."""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gradfuse
from gradfuse.bench.harness import Contender, Plan, Result, Target, Workload
from gradfuse.bench.models import dtype_name
from gradfuse.bench.registry import Bench

__all__ = ["BENCH", "setup"]

NATIVE = "torch eager, no cuDNN"
EAGER, FUSED, SAVES_OUTPUT = "torch eager", "gradfuse", "gradfuse, save=output"
COMPILED, ABN, FLOOR = "torch.compile", "inplace_abn", "floor: the same bytes"
FRESH_FLOOR = "the same bytes, fresh memory"

# Of ResNet-50 at batch 32, one at batch 8, and one so small that overhead dominates.
SHAPES = (
    (32, 64, 56, 56),
    (32, 256, 56, 56),
    (32, 512, 28, 28),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
    (8, 2048, 7, 7),
    (4, 32, 14, 14),
)
QUICK = ((8, 256, 28, 28), (4, 32, 14, 14))
# The goals for forward and backward in float32. In bfloat16 only the geometric mean has a goal.
TARGET, OVERHEAD = Target(1.4, 1 / 0.7), Target(1.0)


class Tensors:
    """The tensors that a call reads; x, residual, weight and bias require gradients."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> None:
        generator = torch.Generator(torch.get_default_device()).manual_seed(sum(shape))
        form = torch.channels_last if channels_last else torch.contiguous_format

        def make() -> Tensor:
            t = torch.randn(*shape, generator=generator).to(dtype)
            return t.contiguous(memory_format=form)

        self.x, self.residual, self.grad = make().requires_grad_(), make().requires_grad_(), make()
        channels = shape[1]
        self.weight = torch.ones(channels, requires_grad=True)
        self.bias = torch.zeros(channels, requires_grad=True)
        self.mean, self.var = torch.zeros(channels), torch.ones(channels)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.residual, self.weight, self.bias


def eager(t: Tensors, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, t.mean, t.var, weight, bias, True) + residual)


def native(t: Tensors, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.backends.cudnn.flags(enabled=False):
        return eager(t, x, residual, weight, bias)


def fused(save: str) -> Callable[..., Tensor]:
    def call(t: Tensors, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return gradfuse.batch_norm_act(
            x, t.mean, t.var, weight, bias, residual=residual, training=True, save=save
        )

    return call


def floors(nbytes: int, backward: bool) -> list[Contender]:
    """Loops that read and write the bytes that the op must move, one tensor at a time.

    Forward: reads the input twice and the residual once, writes the output. Backward: reads
    grad_output and input twice, writes the gradients of input and residual. The mask's bit per
    element is left out. The floor writes to existing memory. An op that returns tensors cannot, so
    the second loop allocates new memory.
    """
    a, b, c, d = (torch.ones(nbytes // 4) for _ in range(4))

    def run(results: tuple[Tensor, Tensor] | None) -> None:
        a.sum()
        y = torch.add(a, b, out=results and results[0])
        if backward:
            torch.dot(a, b)
            x = torch.add(a, b, out=results and results[0])
            (results[1] if results else torch.empty_like(x)).fill_(1.0)
        del y

    return [Contender(FLOOR, lambda: run((c, d))), Contender(FRESH_FLOOR, lambda: run(None))]


def setup(
    shape: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    backward: bool,
    compiled: Callable[..., Tensor] | None = None,
) -> tuple[list[Contender], int]:
    """The contenders, and the fewest bytes that must move."""
    t = Tensors(shape, dtype, channels_last)
    functions = {EAGER: eager, FUSED: fused("bitmask"), SAVES_OUTPUT: fused("output")}
    if t.x.is_cuda:
        functions[NATIVE] = native
    if compiled is not None:
        functions[COMPILED] = compiled
    expected = None
    contenders = []
    for name, function in functions.items():

        def run(function: Callable[..., Tensor] = function) -> Any:
            y = function(t, *t.leaves)
            return (y, *torch.autograd.grad(y, t.leaves, t.grad)) if backward else (y,)

        results = run()
        expected = expected or results
        for ours, theirs in zip(results, expected, strict=True):
            difference = (ours.double() - theirs.double()).norm()
            # Near 0, another rounding than torch's makes relu pass or stop a gradient.
            tolerance = 1e-2 if dtype == torch.float32 else 0.1
            if not difference <= tolerance * theirs.double().norm():
                raise RuntimeError(f"{name}: another result than {EAGER} on {tuple(shape)}")
        del results, ours, theirs
        contenders.append(Contender(name, run))
    nbytes = t.x.nbytes
    contenders += floors(nbytes, backward)
    moved = nbytes * (10 if backward else 4) + t.x.numel() * (3 if backward else 1) // 8
    return contenders, moved


def compile_eager(notes: list[str], budget: float) -> Callable[..., Tensor] | None:
    """torch.compile of the eager function, if it compiles in time."""
    if budget <= 0:
        notes.append("torch.compile: left out")
        return None
    begin = time.perf_counter()
    torch._dynamo.config.cache_size_limit = 64
    function: Callable[..., Tensor] = torch.compile(eager, dynamic=False)
    try:
        small = Tensors((2, 8, 4, 4), torch.float32, False)
        function(small, *small.leaves).sum().backward()
    except Exception as error:
        notes.append(f"torch.compile: left out, {type(error).__name__}")
        return None
    if (taken := time.perf_counter() - begin) > budget:
        notes.append(f"torch.compile: left out, compiled in {taken:.0f} s")
        return None
    return function


def workloads(arguments: argparse.Namespace, notes: list[str]) -> Iterator[Workload]:
    notes.append(f"memory from {allocator()} malloc")
    compiled = compile_eager(notes, arguments.compile_budget)
    try:
        importlib.import_module("inplace_abn")
        notes.append(f"{ABN}: installed, but without a residual add: not compared")
    except ImportError as error:
        notes.append(f"{ABN}: left out, {error}")
    for dtype in (torch.float32, torch.bfloat16):
        for channels_last in (False, True):
            for shape in arguments.shapes or (QUICK if arguments.quick else SHAPES):
                for backward in (False, True):
                    peer = compiled if dtype == torch.float32 and backward else None
                    contenders, moved = setup(shape, dtype, channels_last, backward, peer)
                    layout = "NHWC" if channels_last else "NCHW"
                    what = "forward+backward" if backward else "forward"
                    target = OVERHEAD if math.prod(shape) < 1 << 16 else TARGET
                    yield Workload(
                        name=f"{tuple(shape)} {layout} {what}",
                        dtype=dtype_name(dtype),
                        contenders=contenders,
                        bytes_moved=moved,
                        baseline=EAGER,
                        floor=FLOOR,
                        targets={FUSED: target} if backward and dtype == torch.float32 else {},
                    )
                    del contenders


def geometric_means(results: Sequence[Result]) -> list[str]:
    """The means over all shapes and layouts, with their goals."""
    lines = []
    for dtype, peer, goal in (
        ("float32", EAGER, 2.2),
        ("bfloat16", EAGER, 2.2),
        ("float32", COMPILED, 3.0),
        ("float32", FLOOR, 0.7),
        ("bfloat16", FLOOR, 0.7),
        ("float32", FRESH_FLOOR, None),
        ("bfloat16", FRESH_FLOOR, None),
    ):
        ratios = []
        for r in results:
            if r.contender != FUSED or r.dtype != dtype or "backward" not in r.workload:
                continue
            rival = [q for q in results if (q.workload, q.dtype) == (r.workload, r.dtype)]
            times = [q.median_ms for q in rival if q.contender == peer]
            if times and "(4, 32, 14, 14)" not in r.workload:
                ratios.append(times[0] / r.median_ms)
        if ratios:
            mean = statistics.geometric_mean(ratios)
            line = f"{dtype} against {peer}: {mean:.2f}x, geometric mean of {len(ratios)} "
            line += f"(lowest {min(ratios):.2f}x)"
            if goal is not None:
                verdict = "reached" if mean >= goal else "not reached"
                line += f"; goal {goal:g}x, {verdict}"
            lines.append(line)
    return lines


def allocator() -> str:
    """The name of the malloc in use."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return "unknown"
    return next((name for name in ("jemalloc", "tcmalloc") if name in maps), "the C library's")


def shape(text: str) -> tuple[int, ...]:
    """(2, 3, 4, 5) of "2,3,4,5"."""
    sizes = tuple(int(size) for size in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError(text)
    return sizes


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", type=shape, nargs="+", metavar="N,C,H,W", help="instead of ResNet-50's"
    )


BENCH = Bench(
    op="batch_norm",
    work="batch norm + add + relu",
    workloads=workloads,
    plan=Plan(7, 100, 2.0),
    quick_plan=Plan(5, 20, 0.5),
    compile_budget=60.0,
    add_options=add_options,
    summarise=geometric_means,
)
