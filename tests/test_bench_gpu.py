"""Times of a GPU, with a fake one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from fake_machine import FakeMachine, fake_workload

from gradfuse.bench.gpu import COPY, on_gpu, timed_on_gpu
from gradfuse.bench.harness import Contender, Plan, interleave, summarise


class FakeGpu(FakeMachine):
    """A GPU whose events and graphs follow that clock: a replay takes half the time of a call."""

    is_capturing = False

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        class Graph:
            seconds = 0.0

            def replay(self) -> None:
                gpu.now += self.seconds / 2

        @contextmanager
        def captured(graph: Graph) -> Iterator[None]:
            before, gpu.is_capturing = gpu.now, True
            try:
                yield
            finally:
                graph.seconds, gpu.now, gpu.is_capturing = gpu.now - before, before, False

        monkeypatch.setattr("torch.cuda.Event", Event)
        monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
        monkeypatch.setattr("torch.cuda.graph", captured)
        monkeypatch.setattr("torch.cuda.synchronize", lambda: None)


def test_times_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeGpu()
    machine.patch(monkeypatch)

    def waits() -> None:
        if machine.is_capturing:
            raise RuntimeError("not while capturing")
        machine.now += 3.0

    work = fake_workload(machine)
    work.contenders.append(Contender("waits", waits))
    timed = timed_on_gpu(work, Plan(2, 2, 1e9), {})
    assert {r.contender: (r.device_ms, r.graph_ms) for r in timed} == {
        "stock": (2000.0, 1000.0),
        "ours": (1000.0, 500.0),
        "loop": (4000.0, 2000.0),
        "floor": (500.0, 250.0),
        "waits": (3000.0, None),
    }


def test_the_floor_on_a_gpu_is_a_copy() -> None:
    work = replace(fake_workload(FakeMachine()), bytes_moved=64, device="cpu")
    ours = on_gpu(work)
    assert [c.name for c in ours.contenders] == ["stock", "ours", "loop", COPY]
    assert (ours.floor, ours.targets) == (COPY, {})
    ours.contenders[-1].run()


def test_the_table_of_a_gpu() -> None:
    for extra in ("matplotlib", "rich"):
        pytest.importorskip(extra)
    from rich.console import Console

    from gradfuse.bench.output import table

    machine = FakeMachine()
    work = fake_workload(machine)
    times = interleave(work.contenders, work.prepare, Plan(3, 5, 1e9), machine.clock)
    timed = [
        replace(r, device_ms=3000.0, graph_ms=2.5 if r.contender == "ours" else None)
        for r in summarise(work, times, {})
    ]
    shown = Console(width=300, record=True)
    about = {
        "device": "cuda",
        "gpu": "a GPU",
        "threads": 1,
        "isa": "-",
        "torch": "",
        "gradfuse": "",
    }
    shown.print(table(timed, about))
    lines = shown.export_text().splitlines()
    assert any(re.search(r"ours .* 3000\.000 +2\.500 ", line) for line in lines)
    assert any(re.search(r"floor .* 3000\.000 +- ", line) for line in lines)
