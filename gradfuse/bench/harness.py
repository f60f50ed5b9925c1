"""Measures contenders side by side in one process: interleaved calls, medians, paired ratios."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from gradfuse.bench.machine import Neighbours

__all__ = [
    "Contender",
    "Plan",
    "Result",
    "Target",
    "Workload",
    "extra_memory",
    "interleave",
    "measure",
    "summarise",
]

Times = dict[str, list[float]]


@dataclass(frozen=True)
class Contender:
    """A way to do the work. run() does it once, to the end.

    memory() tells the bytes of one call, where it runs in another process.
    """

    name: str
    run: Callable[[], object]
    memory: Callable[[], int | None] | None = None


@dataclass(frozen=True)
class Target:
    """The goal: at least this speed-up, and at most this multiple of the floor's time."""

    speedup: float
    floor_ratio: float | None = None

    def reached(self, speedup: float, floor_ratio: float) -> bool:
        fast = speedup >= self.speedup
        return fast and (self.floor_ratio is None or floor_ratio <= self.floor_ratio)

    def __str__(self) -> str:
        text = f">= {self.speedup:g}x"
        return text if self.floor_ratio is None else f"{text}, <= {self.floor_ratio:g} floor"


@dataclass
class Workload:
    """Contenders that do the same work.

    Attributes:
        bytes_moved: the fewest bytes the work has to read and write.
        baseline: name of the contender that speed-ups refer to.
        floor: name of the contender that only moves the bytes.
        prepare: runs untimed before every call, the same for every contender.
        verify: raises unless the last call did the work. Not called for the floor.
        device: "cpu" or "cuda", where a call ends when the device has finished; torch's default
            device unless given.
        pids: the processes that do the work, where this one does not.
    """

    name: str
    dtype: str
    contenders: list[Contender]
    bytes_moved: int
    baseline: str
    floor: str
    prepare: Callable[[], object] = lambda: None
    verify: Callable[[], object] = lambda: None
    targets: dict[str, Target] = field(default_factory=dict)
    device: str = field(default_factory=lambda: torch.get_default_device().type)
    pids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """How long to measure a workload: to max_rounds or for some seconds, whichever ends first."""

    min_rounds: int = 7
    max_rounds: int = 200
    seconds: float = 8.0


@dataclass(frozen=True)
class Result:
    """One contender's figures on one workload.

    speedup and floor_ratio are medians of the ratios within each round: a short slowdown of the
    machine affects all calls of a round alike. speedup_of_medians is the ratio of the medians.
    """

    workload: str
    dtype: str
    contender: str
    rounds: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    baseline: str
    speedup: float
    speedup_of_medians: float
    floor: str
    floor_ratio: float
    bytes_moved: int
    gb_per_s: float
    extra_bytes: int | None
    target: Target | None
    reached: bool | None
    others: float | None = None  # share of the processors that other processes took meanwhile
    device_ms: float | None = None  # on a GPU: median between events before and after the call
    graph_ms: float | None = None  # the same for a graph of the call, where it can be captured


def interleave(
    contenders: Sequence[Contender],
    prepare: Callable[[], object],
    plan: Plan,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Seconds of every call, by contender. Each round calls each contender once.

    The order rotates every second round and is reversed in between, so that no contender always
    follows the same one.
    """
    times: Times = {c.name: [] for c in contenders}
    begin = clock()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for r in range(plan.max_rounds):
            if r >= plan.min_rounds and clock() - begin > plan.seconds:
                break
            start = r // 2 % len(contenders)
            order = [*contenders[start:], *contenders[:start]]
            for contender in order if r % 2 == 0 else reversed(order):
                prepare()
                before = clock()
                contender.run()
                times[contender.name].append(clock() - before)
    finally:
        if collecting:
            gc.enable()
    return times


def quantile(values: Iterable[float], q: float) -> float:
    """The q-quantile, with linear interpolation between neighbours."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def median_ratio(above: list[float], below: list[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def summarise(workload: Workload, times: Times, extra: dict[str, int | None]) -> list[Result]:
    """The figures of all contenders, in their order."""
    results = []
    base, floor = times[workload.baseline], times[workload.floor]
    for name, mine in times.items():
        median = statistics.median(mine)
        speedup, floor_ratio = median_ratio(base, mine), median_ratio(mine, floor)
        target = workload.targets.get(name)
        results.append(
            Result(
                workload=workload.name,
                dtype=workload.dtype,
                contender=name,
                rounds=len(mine),
                median_ms=1e3 * median,
                p20_ms=1e3 * quantile(mine, 0.2),
                p80_ms=1e3 * quantile(mine, 0.8),
                baseline=workload.baseline,
                speedup=speedup,
                speedup_of_medians=statistics.median(base) / median,
                floor=workload.floor,
                floor_ratio=floor_ratio,
                bytes_moved=workload.bytes_moved,
                gb_per_s=workload.bytes_moved / median / 1e9,
                extra_bytes=extra.get(name),
                target=target,
                reached=None if target is None else target.reached(speedup, floor_ratio),
            )
        )
    return results


def extra_memory(run: Callable[[], object], device: str = "cpu") -> int | None:
    """The most bytes that torch's allocator held during one call, beyond what it held before.

    None if this torch's profiler does not report them. On the CPU, plain C++ buffers do not count.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler prints two lines per call
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    try:
        trace: Any = profile.profiler
        events = [e for e in trace.kineto_results.events() if e.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
    except AttributeError:
        return None
    return peak


def timed_calls(workload: Workload, plan: Plan, extra: dict[str, int | None]) -> list[Result]:
    """Times interleaved calls that end when they return."""
    return summarise(workload, interleave(workload.contenders, workload.prepare, plan), extra)


def measure(
    workload: Workload,
    plan: Plan,
    timed: Callable[[Workload, Plan, dict[str, int | None]], list[Result]] = timed_calls,
) -> list[Result]:
    """Warms up and verifies every contender, then measures them all."""
    extra: dict[str, int | None] = {}
    for contender in workload.contenders:
        for call in ("first", "second"):
            workload.prepare()
            contender.run()
            if call == "first" and contender.name != workload.floor:
                workload.verify()
        workload.prepare()
        memory = contender.memory or partial(extra_memory, contender.run, workload.device)
        extra[contender.name] = memory()
    neighbours = Neighbours(workload.pids)
    results = timed(workload, plan, extra)
    others = neighbours.share()
    return [replace(r, others=others) for r in results]
