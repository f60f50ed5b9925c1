"""Measures contenders side by side in one process: interleaved calls, medians, paired ratios."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from gradfuse.bench.machine import Neighbours, is_disturbed
from gradfuse.bench.profiled import extra_memory
from gradfuse.bench.ratios import is_known, median_interval, median_ratio, quantile, ratios

__all__ = [
    "Contender",
    "Plan",
    "Result",
    "Target",
    "Workload",
    "interleave",
    "measure",
    "summarise",
]

Times = dict[str, list[float]]


@dataclass(frozen=True)
class Contender:
    """A way to do the work. run() does it once, to the end.

    memory() tells the bytes of one call, where it runs in another process. seconds() does the work
    once and tells the time it took, where that is not the time of the whole call.
    """

    name: str
    run: Callable[[], object]
    memory: Callable[[], int | None] | None = None
    seconds: Callable[[], float] | None = None


@dataclass(frozen=True)
class Target:
    """The goal: at least this speed-up, and at most this multiple of the floor's time."""

    speedup: float
    floor_ratio: float | None = None

    def reached(self, speedup: float, floor_ratio: float) -> bool:
        fast = speedup >= self.speedup
        return fast and (self.floor_ratio is None or floor_ratio <= self.floor_ratio)

    def __str__(self) -> str:
        texts = [f">= {self.speedup:g}x"] if self.speedup else []
        if self.floor_ratio is not None:
            texts.append(f"<= {self.floor_ratio:g} floor")
        return ", ".join(texts)


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
    """How long to measure a workload.

    Attributes:
        min_rounds: the least number of rounds.
        max_rounds, seconds: whichever comes first ends the measurement.
        spread: it ends before, once the 95 % intervals of all speed-ups reach no further than this
            share from their medians.
        repeats: how often a workload is measured again while other processes disturb it.
    """

    min_rounds: int = 7
    max_rounds: int = 200
    seconds: float = 8.0
    spread: float = 0.02
    repeats: int = 2


@dataclass(frozen=True)
class Result:
    """One contender's figures on one workload.

    speedup and floor_ratio are medians of the ratios within each round: a short slowdown of the
    machine affects all calls of a round alike. speedup_low and speedup_high hold speedup's median
    with 95 % confidence. speedup_of_medians is the ratio of the medians.
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
    speedup_low: float
    speedup_high: float
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
    baseline: str | None = None,
) -> Times:
    """Seconds of every call, by contender. Each round calls each contender once.

    The order rotates every second round and is reversed in between, so that no contender always
    follows the same one. With the name of a baseline, rounds end once the ratios to it are known.
    """
    times: Times = {c.name: [] for c in contenders}
    base = times.get(baseline or "")
    look = plan.min_rounds
    begin = clock()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for r in range(plan.max_rounds):
            if r >= plan.min_rounds and clock() - begin > plan.seconds:
                break
            if base is not None and r >= look:
                if all(is_known(ratios(base, mine), plan.spread) for mine in times.values()):
                    break
                look = r + 1 + r // 8  # looking takes time, and each look may end it by chance
            start = r // 2 % len(contenders)
            order = [*contenders[start:], *contenders[:start]]
            for contender in order if r % 2 == 0 else reversed(order):
                prepare()
                times[contender.name].append(seconds_of(contender, clock))
    finally:
        if collecting:
            gc.enable()
    return times


def seconds_of(contender: Contender, clock: Callable[[], float]) -> float:
    """Does the work once, and tells how long it took."""
    if contender.seconds is not None:
        return contender.seconds()
    before = clock()
    contender.run()
    return clock() - before


def summarise(workload: Workload, times: Times, extra: dict[str, int | None]) -> list[Result]:
    """The figures of all contenders, in their order."""
    results = []
    base, floor = times[workload.baseline], times[workload.floor]
    for name, mine in times.items():
        median = statistics.median(mine)
        speedup, floor_ratio = median_ratio(base, mine), median_ratio(mine, floor)
        low, high = median_interval(ratios(base, mine))
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
                speedup_low=low,
                speedup_high=high,
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


def timed_calls(workload: Workload, plan: Plan, extra: dict[str, int | None]) -> list[Result]:
    """Times interleaved calls that end when they return."""
    times = interleave(workload.contenders, workload.prepare, plan, baseline=workload.baseline)
    return summarise(workload, times, extra)


def measure(
    workload: Workload,
    plan: Plan,
    timed: Callable[[Workload, Plan, dict[str, int | None]], list[Result]] = timed_calls,
) -> list[Result]:
    """Warms up and verifies every contender, then measures them all.

    What other processes disturb is measured again; the least disturbed figures are kept.
    """
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
    tries: list[list[Result]] = []
    while len(tries) <= plan.repeats:
        neighbours = Neighbours(workload.pids)
        results = timed(workload, plan, extra)
        others = neighbours.share()
        tries.append([replace(r, others=others) for r in results])
        if not is_disturbed(others):
            break
    return min(tries, key=lambda results: results[0].others or 0.0)
