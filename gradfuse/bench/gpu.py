"""Times on a GPU: of the device alone, and of a graph that replays the call."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from gradfuse.bench.harness import Contender, Plan, Result, Times, Workload, interleave, summarise

__all__ = ["COPY", "EventWatch", "capture", "on_gpu", "timed_on_gpu"]

COPY = "floor: a copy"  # of as many bytes as the work moves, read and written


class EventWatch:
    """Calls a function, waits for the GPU, and notes the milliseconds between the events before
    and after the call. They hold the device's gaps too, where the host cannot keep up with it."""

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run
        self.ms: list[float] = []

    def __call__(self) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._run()
        end.record()
        torch.cuda.synchronize()
        self.ms.append(begin.elapsed_time(end))


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
    """A graph of the call; None if it cannot be captured, because it waits for the device or
    decides on the host."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except Exception:  # of many kinds, by whoever refuses
        return None
    return graph


def timed_on_gpu(workload: Workload, plan: Plan, extra: dict[str, int | None]) -> list[Result]:
    """Times interleaved calls until the device has finished, on the host and between events, then
    the graphs of those that can be captured."""

    def prepare() -> None:
        workload.prepare()
        torch.cuda.synchronize()

    def watch(runs: dict[str, Callable[[], object]]) -> tuple[Times, dict[str, float]]:
        watches = {name: EventWatch(run) for name, run in runs.items()}
        contenders = [Contender(name, watch) for name, watch in watches.items()]
        times = interleave(contenders, prepare, plan, baseline=workload.baseline)
        return times, {name: statistics.median(w.ms) for name, w in watches.items()}

    times, device_ms = watch({c.name: c.run for c in workload.contenders})
    graphs: dict[str, Callable[[], object]] = {}
    for contender in workload.contenders:
        prepare()
        if (graph := capture(contender.run)) is not None:
            graphs[contender.name] = graph.replay
    _, graph_ms = watch(graphs)
    return [
        replace(r, device_ms=device_ms[r.contender], graph_ms=graph_ms.get(r.contender))
        for r in summarise(workload, times, extra)
    ]


def on_gpu(work: Workload) -> Workload:
    """The workload without goals, which are those of the CPU, and with a copy as its floor."""
    if not work.bytes_moved:
        return replace(work, targets={})
    source, target = (
        torch.zeros(work.bytes_moved // 2, dtype=torch.uint8, device=work.device) for _ in range(2)
    )
    contenders = [c for c in work.contenders if c.name != work.floor]
    contenders.append(Contender(COPY, lambda: target.copy_(source)))
    return replace(work, contenders=contenders, floor=COPY, targets={})
