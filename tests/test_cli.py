"""The command line, the bench's arithmetic with a fake clock, and the models' shapes."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gradfuse import _native
from gradfuse.__main__ import main
from gradfuse.bench.gpu import COPY, on_gpu, timed_on_gpu
from gradfuse.bench.harness import Contender, Plan, Target, Workload, interleave, summarise
from gradfuse.bench.models import MODELS
from gradfuse.bench.step_process import StepProcess


class FakeMachine:
    """A clock that only the contenders move, on a machine that slows down with every call."""

    def __init__(self, slowdown: float = 1.0) -> None:
        self.now = 0.0
        self.pace = 1.0
        self.slowdown = slowdown
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def contender(self, name: str, seconds: float) -> Contender:
        def run() -> None:
            self.now += seconds * self.pace
            self.calls.append(name)

        return Contender(name, run)

    def next_round(self, contenders: int) -> None:
        if len(self.calls) % contenders == 0:
            self.pace *= self.slowdown


def fake_workload(machine: FakeMachine) -> Workload:
    seconds = {"stock": 2.0, "ours": 1.0, "loop": 4.0, "floor": 0.5}
    return Workload(
        name="fake",
        dtype="float32",
        contenders=[machine.contender(name, s) for name, s in seconds.items()],
        bytes_moved=3_000_000_000,
        baseline="stock",
        floor="floor",
        prepare=lambda: machine.next_round(4),
        targets={"ours": Target(2.0, 2.0), "loop": Target(1.0), "stock": Target(0.5, 3.9)},
    )


def test_ratios() -> None:
    machine = FakeMachine()
    work = fake_workload(machine)
    times = interleave(work.contenders, work.prepare, Plan(3, 5, 1e9), machine.clock)
    by_name = {r.contender: r for r in summarise(work, times, {"ours": 12})}
    assert [r.rounds for r in by_name.values()] == [5] * 4
    assert by_name["ours"].speedup == by_name["ours"].speedup_of_medians == 2.0
    assert by_name["loop"].speedup == 0.5
    assert by_name["ours"].floor_ratio == 2.0
    assert by_name["ours"].median_ms == 1000.0
    assert by_name["ours"].gb_per_s == 3.0
    assert by_name["ours"].extra_bytes == 12
    assert by_name["floor"].reached is None
    reached = {name: r.reached for name, r in by_name.items() if r.target}
    assert reached == {"ours": True, "loop": False, "stock": False}


def test_paired_ratios_survive_a_machine_that_slows_down() -> None:
    machine = FakeMachine(slowdown=1.5)
    work = fake_workload(machine)
    times = interleave(work.contenders, work.prepare, Plan(3, 8, 1e9), machine.clock)
    ours = next(r for r in summarise(work, times, {}) if r.contender == "ours")
    assert ours.speedup == pytest.approx(2.0)
    assert ours.p20_ms < ours.median_ms < ours.p80_ms


def test_every_round_calls_each_once_and_the_order_changes() -> None:
    machine = FakeMachine()
    work = fake_workload(machine)
    interleave(work.contenders, work.prepare, Plan(8, 8, 1e9), machine.clock)
    rounds = [tuple(machine.calls[i : i + 4]) for i in range(0, len(machine.calls), 4)]
    assert all(sorted(r) == sorted(rounds[0]) for r in rounds)
    assert {r[0] for r in rounds} == set(rounds[0])


def test_rounds_end_with_the_time_but_not_before_the_least_number() -> None:
    machine = FakeMachine()
    work = fake_workload(machine)
    assert (
        len(interleave(work.contenders, work.prepare, Plan(3, 99, 0.0), machine.clock)["ours"]) == 3
    )


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


def test_the_floor_on_a_gpu_is_a_copy() -> None:
    work = replace(fake_workload(FakeMachine()), bytes_moved=64, device="cpu")
    ours = on_gpu(work)
    assert [c.name for c in ours.contenders] == ["stock", "ours", "loop", COPY]
    assert (ours.floor, ours.targets) == (COPY, {})
    ours.contenders[-1].run()


@pytest.mark.parametrize(
    ("model", "tensors", "elements"),
    [
        ("ResNet-50", 161, 25_557_032),
        ("GPT-2 small", 148, 124_439_808),
        ("2,000 small", 2000, 256_000),
    ],
)
def test_shapes(model: str, tensors: int, elements: int) -> None:
    shapes = MODELS[model]()
    assert len(shapes) == tensors
    assert sum(math.prod(s) for s in shapes) == elements


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = dict(line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"].strip() == torch.__version__
    if _native.available:
        assert lines["ISA"].strip() == _native.backend.isa()
    else:
        assert _native.reason in lines["compiled module"]


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_missing_extra_is_one_sentence(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == "rich"] or ["rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("demo.command", "demo.clip", "bench.command", "bench.output"):
        monkeypatch.delitem(sys.modules, f"gradfuse.{name}", raising=False)
    pytest.importorskip("matplotlib")
    assert main([command]) == 1
    error = capsys.readouterr().err
    assert "pip install gradfuse[demo]" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_demo(optimizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(extra)
    threads = torch.get_num_threads()
    assert main(["demo", "--optimizer", optimizer, "--steps", "3", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    assert "3 of 3" in out  # stock clipping: every gradient of every step is 0
    assert "0 of 3" in out
    assert "no clip, NaN skipped" in out
    assert "master_weights" in out
    for plot in (f"demo_{optimizer}", "demo_policies"):
        assert (tmp_path / f"{plot}.png").read_bytes().startswith(b"\x89PNG")


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in ("matplotlib", "rich"):
        pytest.importorskip(extra)
    assert main(["bench", "clip", "--quick", "--models", "tiny", "--out", str(tmp_path)]) == 0
    assert "gradfuse.GradClipper" in capsys.readouterr().out
    document = json.loads((tmp_path / "bench_clip.json").read_text())
    assert document["machine"]["quick"]
    assert document["machine"]["torch"] == torch.__version__
    assert {r["dtype"] for r in document["results"]} == {"float32", "bfloat16"}
    assert all(r["median_ms"] > 0 and r["speedup"] > 0 for r in document["results"])
    assert (tmp_path / "bench_clip.png").read_bytes().startswith(b"\x89PNG")


def test_bench_batch_norm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in ("matplotlib", "rich"):
        pytest.importorskip(extra)
    options = ["--quick", "--shapes", "2,8,6,6", "3,4,5,5", "--out", str(tmp_path)]
    assert main(["bench", "batch_norm", *options]) == 0
    out = capsys.readouterr().out
    assert "float32 against torch eager" in out
    document = json.loads((tmp_path / "bench_batch_norm.json").read_text())
    found = {(r["workload"], r["dtype"]) for r in document["results"]}
    assert len(found) == 2 * 2 * 2 * 2  # shapes, layouts, dtypes, with the backward and without
    assert {r["contender"] for r in document["results"]} >= {"torch eager", "gradfuse"}
    assert all(r["median_ms"] > 0 and r["speedup"] > 0 for r in document["results"])


def test_bench_fuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in ("matplotlib", "rich"):
        pytest.importorskip(extra)
    assert main(["bench", "fuse", "--quick", "--no-step", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"(forward|backward): waiting takes .* us a site", out)) == 4
    document = json.loads((tmp_path / "bench_fuse.json").read_text())
    assert len(document["results"]) == 2 * 2 * 3  # sites, ways, contenders


def test_step_in_a_process_of_its_own() -> None:
    pytest.importorskip("torchvision")
    process = StepProcess("gradfuse", 2, 32, "NCHW", "float32")
    try:
        assert process.first > 0
        memory = process.memory()
        assert memory is None or memory > 1e6
        process._process.kill()
        with pytest.raises((RuntimeError, BrokenPipeError)):
            process.step()
    finally:
        process.close()


@pytest.mark.parametrize("shape", ["2,8,6", "2,8,6,0", "2,8,6,x"])
def test_bench_batch_norm_refuses_a_shape(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in ("matplotlib", "rich"):
        pytest.importorskip(extra)
    with pytest.raises(SystemExit):
        main(["bench", "batch_norm", "--shapes", shape])
    assert "invalid shape value" in capsys.readouterr().err
