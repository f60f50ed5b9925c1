"""The command line of the benches: python -m gradfuse bench [op] [options]."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from gradfuse import _native
from gradfuse.bench import (
    batch_norm,
    clip,
    distributed,
    fuse,
    history,
    homeostatic,
    init,
    layer_norm,
    modes,
    optim,
)
from gradfuse.bench.gpu import on_gpu, timed_on_gpu
from gradfuse.bench.harness import Result, Workload, measure, timed_calls
from gradfuse.bench.machine import machine
from gradfuse.bench.output import progress, report
from gradfuse.bench.registry import Bench

__all__ = ["BENCHES", "main"]

BENCHES = {
    bench.op: bench
    for bench in (
        clip.BENCH,
        batch_norm.BENCH,
        layer_norm.BENCH,
        fuse.BENCH,
        optim.BENCH,
        distributed.BENCH,
    )
}

# What is measured without a clock, and the plot of all that was.
UNTIMED = {
    "history": history.main,
    "homeostatic": homeostatic.main,
    "init": init.main,
    "modes": modes.main,
}


def parser_of(bench: Bench | None) -> argparse.ArgumentParser:
    """The options of a bench, or those that all benches have."""
    if bench is None:
        parser = argparse.ArgumentParser(
            prog="python -m gradfuse bench",
            description="Times gradfuse against its peers: one op, or all in turn. "
            "`bench OP -h` lists an op's own options. `bench history` draws what --history kept, "
            "`bench init`, `modes` and `homeostatic` measure what ops do to training.",
        )
        parser.add_argument("op", nargs="?", choices=[*BENCHES, *UNTIMED])
    else:
        parser = argparse.ArgumentParser(
            prog=f"python -m gradfuse bench {bench.op}",
            description=f"Times {bench.work} against its peers.",
        )
    parser.add_argument("--quick", action="store_true", help="small work, without torch.compile")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder to write to")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch, default: torch's own choice")
    parser.add_argument(
        "--isa",
        choices=("baseline", "avx2", "avx512"),
        help="instruction set of gradfuse's kernels, default: the widest",
    )
    parser.add_argument(
        "--history", type=Path, metavar="FILE", help="append the speed-ups, unless --quick"
    )
    parser.add_argument(
        "--compile-budget",
        type=float,
        metavar="SECONDS",
        help="leave torch.compile out where compiling takes longer; 0: everywhere",
    )
    if bench is not None:
        bench.add_options(parser)
    return parser


@contextmanager
def instruction_set(name: str | None, parser: argparse.ArgumentParser) -> Iterator[None]:
    """The kernels run with this set in the block. Ends the program where they cannot."""
    if name is None:
        yield
        return
    if not _native.available:
        parser.error(f"--isa: expected the compiled module, which is not there: {_native.reason}")
    before = _native.backend.isa()
    try:
        _native.backend.set_isa(name)
    except ValueError:
        parser.error(f"--isa: expected a set that this machine runs, got {name}")
    try:
        yield
    finally:
        _native.backend.set_isa(before)


def made_on(device: str, workloads: Iterator[Workload]) -> Iterator[Workload]:
    """The workloads, made while this is torch's default device. They run without a default device,
    which would cost each call of torch a microsecond."""
    while True:
        with nullcontext() if device == "cpu" else torch.device(device):
            work = next(workloads, None)
        if work is None:
            return
        yield work
        del work  # frees its memory before the next is made


def run(bench: Bench, argv: Sequence[str]) -> None:
    """Measures all workloads of a bench and reports them."""
    parser = parser_of(bench)
    arguments = parser.parse_args(argv)
    arguments.quick = arguments.quick or os.environ.get("GRADFUSE_BENCH_QUICK") == "1"
    if arguments.compile_budget is None:
        arguments.compile_budget = bench.compile_budget
    if arguments.quick:
        arguments.compile_budget = 0.0
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    with instruction_set(arguments.isa, parser):
        notes: list[str] = []
        results = results_of(bench, arguments, notes)
        about = machine() | {"device": arguments.device, "quick": arguments.quick}
    report(results, about, notes, arguments.out, f"bench_{bench.op}", bench.work)
    if arguments.history is not None and not arguments.quick:
        history.append(results, about, bench.op, arguments.history)


def results_of(bench: Bench, arguments: argparse.Namespace, notes: list[str]) -> list[Result]:
    """The figures of all workloads. Adds notes for the reader to the list."""
    plan = bench.quick_plan if arguments.quick else bench.plan
    results: list[Result] = []
    with progress() as show:
        for work in made_on(arguments.device, bench.workloads(arguments, notes)):
            timed = timed_calls
            if work.device != "cpu" and not work.pids:
                work, timed = on_gpu(work), timed_on_gpu
            show(f"{work.name}, {work.dtype}")
            results += measure(work, plan, timed)
            del work
    notes += bench.summarise(results)
    return results


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in BENCHES:
        run(BENCHES[argv[0]], argv[1:])
        return 0
    if argv and argv[0] in UNTIMED:
        return UNTIMED[argv[0]](argv[1:])
    parser = parser_of(None)
    if parser.parse_args(argv).op:
        parser.error("the op comes first, options after it")
    for bench in BENCHES.values():
        run(bench, argv)
    return 0
