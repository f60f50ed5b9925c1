"""The bench of batch norm + add + relu: python -m gradfuse bench batch_norm."""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gradfuse.bench import norms
from gradfuse.bench.floor import FLOOR, FRESH_FLOOR
from gradfuse.bench.gradients import CACHE
from gradfuse.bench.harness import Contender, Plan, Result, Target, Workload
from gradfuse.bench.models import NormSite, Shape, dtype_name
from gradfuse.bench.norms import (
    COLD,
    DROPS,
    EAGER,
    FUSED,
    SAVES_OUTPUT,
    Floor,
    Norm,
    Tensors,
)
from gradfuse.bench.peers import compiles_in_time
from gradfuse.bench.registry import Bench
from gradfuse.bench.resnet_norms import model_row, model_steps

__all__ = ["BENCH", "cold_sets", "setup"]

NATIVE = "torch eager, no cuDNN"
COMPILED, ABN, COPY = "torch.compile", "inplace_abn", "one copy"

# Of ResNet-50 at batch 32, one at batch 8, and one so small that overhead dominates.
SMALL = (4, 32, 14, 14)
SHAPES: tuple[Shape, ...] = (
    (32, 64, 56, 56),
    (32, 256, 56, 56),
    (32, 512, 28, 28),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
    (8, 2048, 7, 7),
    SMALL,
)
QUICK: tuple[Shape, ...] = ((8, 256, 28, 28), SMALL)
MODES_SHAPES: tuple[Shape, ...] = ((32, 256, 56, 56), (32, 1024, 14, 14), SMALL)
MODEL, QUICK_MODEL = (8, 128), (2, 64)  # images, and their pixels
ALL = "forward+backward"
MOST_SETS = 512
TARGET, OVERHEAD = Target(1.6), Target(1.0)  # the goals for forward and backward
MEAN, COPIES = 2.4, 6.5  # of the geometric means
COPIED = (1 << 20, 60 << 20)  # bytes of a tensor where time counts in copies of it


class Place:
    """Where a call works, and what it leaves there."""

    def __init__(self, site: NormSite, dtype: torch.dtype, channels_last: bool) -> None:
        self.tensors = Tensors(site, dtype, channels_last)
        self.floor = Floor(self.tensors)
        self.results: Sequence[Tensor] = ()


def cold_sets(moved: int) -> int:
    """The sets of tensors that are more than the caches hold, where a call moves so many bytes."""
    return min(CACHE // moved + 1, MOST_SETS)


def setup(
    site: NormSite,
    dtype: torch.dtype,
    channels_last: bool,
    backward: bool,
    compiled: Norm | None = None,
    sets: int = 1,
) -> list[Contender]:
    """The contenders on one site.

    With several sets of tensors each call takes the next, whoever calls. The results of a call live
    until its set's next turn: the memory that a call gets from malloc is as cold as what it reads.
    """
    places = [Place(site, dtype, channels_last) for _ in range(sets)]
    turns = itertools.cycle(places)

    def in_turn(work: Callable[[Place], Sequence[Tensor]]) -> Callable[[], None]:
        def run() -> None:
            place = next(turns)
            results = work(place)
            if sets > 1:
                place.results = results

        return run

    def of(norm: Norm) -> Callable[[Place], Sequence[Tensor]]:
        def work(place: Place) -> Sequence[Tensor]:
            y = norm(place.tensors)
            return (y, *place.tensors.backward(y)) if backward else (y,)

        return work

    def least(place: Place) -> Sequence[Tensor]:
        place.floor.forward()
        if backward:
            place.floor.backward()
        return ()

    def copy(place: Place) -> Sequence[Tensor]:
        place.floor.copy()
        return ()

    ways = {
        EAGER: norms.eager,
        FUSED: norms.fused("bitmask"),
        SAVES_OUTPUT: norms.fused("output"),
    }
    if torch.get_default_device().type == "cuda":
        ways[NATIVE] = norms.native
    if compiled is not None:
        ways[COMPILED] = compiled
    norms.check(places[0].tensors, ways)
    works = {name: of(norm) for name, norm in ways.items()}
    works[DROPS] = of(norms.fused("bitmask", drop_path=0.1))  # other numbers
    works[FLOOR] = least
    if NATIVE not in works:  # on a GPU the floor is a copy, and these are of the CPU
        works[COPY] = copy
        works[FRESH_FLOOR] = lambda place: place.floor.with_fresh_memory(backward)
    return [Contender(name, in_turn(work)) for name, work in works.items()]


def modes_row(shape: Shape, dtype: torch.dtype, channels_last: bool) -> Workload:
    """Forward and backward in each mode of the op, on cold tensors."""
    site = NormSite(shape)
    moved = norms.bytes_moved(site, dtype, True)
    places = [Place(site, dtype, channels_last) for _ in range(cold_sets(moved))]
    turns = itertools.cycle(places)

    def of(norm: Norm) -> Callable[[], None]:
        def run() -> None:
            place = next(turns)
            y = norm(place.tensors)
            place.results = (y, *place.tensors.backward(y))

        return run

    def least() -> None:
        floor = next(turns).floor
        floor.forward()
        floor.backward()

    ways = {SAVES_OUTPUT: norms.fused("output")} | {m: norms.in_mode(m) for m in norms.MODES}
    contenders = [Contender(name, of(norm)) for name, norm in ways.items()]
    return Workload(
        name=f"{tuple(shape)} {'NHWC' if channels_last else 'NCHW'} modes{COLD}",
        dtype=dtype_name(dtype),
        contenders=[*contenders, Contender(FLOOR, least)],
        bytes_moved=moved,
        baseline=SAVES_OUTPUT,
        floor=FLOOR,
        targets={mode: Target(0.98) for mode in norms.MODES},
    )


def compile_formula(notes: list[str], budget: float) -> Norm | None:
    """torch.compile of the formula, if it compiles in time."""
    function = norms.compiled()

    def call() -> None:
        function(Tensors(NormSite((2, 8, 4, 4)), torch.float32, False)).sum().backward()

    return function if compiles_in_time(call, notes, budget) else None


def workloads(arguments: argparse.Namespace, notes: list[str]) -> Iterator[Workload]:
    notes.append(f"memory from {allocator()} malloc")
    compiled = compile_formula(notes, arguments.compile_budget)
    try:
        importlib.import_module("inplace_abn")
        notes.append(f"{ABN}: installed, but without a residual add: not compared")
    except ImportError as error:
        notes.append(f"{ABN}: left out, {error}")
    # Not asked for and not refused, the rows that take longest are left out of a quick run.
    cold, model = (
        not arguments.quick if wanted is None else wanted
        for wanted in (arguments.cold, arguments.model)
    )
    for dtype in (torch.float32, torch.bfloat16):
        for channels_last in (False, True):
            for shape in arguments.shapes or (QUICK if arguments.quick else SHAPES):
                yield from rows(NormSite(shape), dtype, channels_last, compiled, cold)
            if cold:
                size = QUICK_MODEL if arguments.quick else MODEL
                yield model_row(*size, dtype, channels_last)
    if cold:
        for shape in QUICK if arguments.quick else MODES_SHAPES:
            yield modes_row(shape, torch.float32, False)
            yield modes_row(shape, torch.bfloat16, True)
    if model:
        yield from model_steps(*(QUICK_MODEL if arguments.quick else MODEL), notes)


def rows(
    site: NormSite, dtype: torch.dtype, channels_last: bool, compiled: Norm | None, cold: bool
) -> Iterator[Workload]:
    """One shape: forward alone and with backward, on the same tensors, and on cold ones where a
    call does not fill the caches by itself."""
    layout = "NHWC" if channels_last else "NCHW"
    for what in ("forward", ALL):
        moved = norms.bytes_moved(site, dtype, what == ALL)
        for sets in (1, cold_sets(moved)) if cold and cold_sets(moved) > 1 else (1,):
            is_hot = sets == 1
            peer = compiled if dtype == torch.float32 and what == ALL and is_hot else None
            target = OVERHEAD if math.prod(site.shape) < 1 << 16 else TARGET
            yield Workload(
                name=f"{tuple(site.shape)} {layout} {what}{'' if is_hot else COLD}",
                dtype=dtype_name(dtype),
                contenders=setup(site, dtype, channels_last, what == ALL, peer, sets),
                bytes_moved=moved,
                baseline=EAGER,
                floor=FLOOR,
                targets={FUSED: target} if what == ALL and is_hot else {},
            )


def geometric_means(results: Sequence[Result]) -> list[str]:
    """The means over all shapes and layouts, with their goals."""
    lines = []
    for dtype, peer, goal in (
        ("float32", EAGER, MEAN),
        ("bfloat16", EAGER, MEAN),
        ("float32", COMPILED, 3.0),
        ("float32", FLOOR, None),
        ("bfloat16", FLOOR, None),
        ("float32", FRESH_FLOOR, None),
        ("bfloat16", FRESH_FLOOR, None),
    ):
        for end in (ALL, ALL + COLD):
            ratios = ratios_to(peer, [r for r in results if r.dtype == dtype], end)
            if not ratios:
                continue
            mean = statistics.geometric_mean(ratios)
            line = f"{dtype}{end.removeprefix(ALL)} against {peer}: {mean:.2f}x, "
            line += f"geometric mean of {len(ratios)} (lowest {min(ratios):.2f}x)"
            if goal is not None and end == ALL:
                verdict = "reached" if mean >= goal else "not reached"
                line += f"; goal {goal:g}x, {verdict}"
            lines.append(line)
    return lines + [line for dtype in ("float32", "bfloat16") for line in copies(results, dtype)]


def copies(results: Sequence[Result], dtype: str) -> list[str]:
    """How many copies of a tensor forward and backward take. Ten passes over a tensor, five copies,
    are what two sweeps each way must do without caches."""
    least, most = (7 * nbytes for nbytes in COPIED)  # a call moves seven tensors
    sizable = [r for r in results if r.dtype == dtype and least <= r.bytes_moved <= most]
    taken = [1 / ratio for ratio in ratios_to(COPY, sizable, ALL)]
    if not taken:
        return []
    mean = statistics.geometric_mean(taken)
    verdict = "reached" if mean <= COPIES else "not reached"
    line = f"{dtype}: {mean:.2f} copies of a tensor, geometric mean of {len(taken)}"
    return [f"{line}; goal {COPIES:g}, {verdict}"]


def ratios_to(peer: str, results: Sequence[Result], end: str) -> list[float]:
    """The peer's times over gradfuse's in rows of this end, but for the smallest shape."""
    ms = {(r.workload, r.contender): r.median_ms for r in results}
    return [
        ms[row, peer] / mine
        for (row, contender), mine in ms.items()
        if contender == FUSED
        and row.endswith(end)
        and not row.startswith(str(SMALL))
        and (row, peer) in ms
    ]


def allocator() -> str:
    """The name of the malloc in use."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return "unknown"
    return next((name for name in ("jemalloc", "tcmalloc") if name in maps), "the C library's")


def shape(text: str) -> Shape:
    """(2, 3, 4, 5) of "2,3,4,5"."""
    sizes = tuple(int(size) for size in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError(text)
    return sizes


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", type=shape, nargs="+", metavar="N,C,H,W", help="instead of ResNet-50's"
    )
    for name, what in (
        ("--cold", "time tensors that are in no cache too"),
        ("--model", "time batch norms within training steps too"),
    ):
        parser.add_argument(
            name, action=argparse.BooleanOptionalAction, help=f"{what}, default: unless --quick"
        )


BENCH = Bench(
    op="batch_norm",
    work="batch norm + add + relu",
    workloads=workloads,
    plan=Plan(7, 100, 2.0),
    quick_plan=Plan(5, 20, 0.5, repeats=0),
    compile_budget=60.0,
    add_options=add_options,
    summarise=geometric_means,
)
