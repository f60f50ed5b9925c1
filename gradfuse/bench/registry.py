"""The parts of an op's bench."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gradfuse.bench.harness import Plan, Result, Workload

__all__ = ["Bench"]


@dataclass(frozen=True)
class Bench:
    """A bench, as `python -m gradfuse bench OP` runs it.

    Attributes:
        op: the op's stem, which also names the files that are written.
        work: what is timed, for the plot's title.
        workloads: yields the workloads one at a time, and adds notes for the reader to the list.
        plan: how long to measure a workload.
        quick_plan: the same with --quick.
        compile_budget: seconds that torch.compile may take, unless --compile-budget says otherwise.
        add_options: adds the options that this bench alone has.
        summarise: returns lines of text about all results together.
    """

    op: str
    work: str
    workloads: Callable[[argparse.Namespace, list[str]], Iterator[Workload]]
    plan: Plan
    quick_plan: Plan
    compile_budget: float
    add_options: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    summarise: Callable[[Sequence[Result]], list[str]] = lambda results: []
