"""What a bench shows and keeps: table, history, figure; its instruction set; its processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_machine import FakeMachine, fake_workload

from gradfuse import _native
from gradfuse.bench import step_process
from gradfuse.bench.harness import Contender, Plan, Result, Workload, interleave, summarise
from gradfuse.bench.registry import Bench
from gradfuse.bench.step_process import StepProcess

# They need matplotlib and rich.
command, history, output = (
    pytest.importorskip(f"gradfuse.bench.{name}") for name in ("command", "history", "output")
)

ABOUT = {
    "device": "cpu",
    "cpu": "a processor",
    "gpu": None,
    "threads": 2,
    "isa": "avx2",
    "torch": "2.14",
    "date": "2026-01-02T00:00:00+00:00",
}


def results() -> list[Result]:
    machine = FakeMachine()
    work = fake_workload(machine)
    times = interleave(work.contenders, work.prepare, Plan(6, 6, 1e9), machine.clock)
    return summarise(work, times, {})


def fake_bench(runs: list[str]) -> Bench:
    """Notes the instruction set of each call."""

    def isa() -> None:
        runs.append(_native.backend.isa() if _native.available else "none")

    def workloads(arguments: object, notes: list[str]) -> Iterator[Workload]:
        contenders = [Contender(n, isa, lambda: None) for n in ("stock", "ours", "floor")]
        yield Workload("fake", "float32", contenders, 0, "stock", "floor")

    plan = Plan(1, 1, 1.0, repeats=0)
    return Bench("fake", "nothing", workloads, plan, plan, 0.0)


def test_speedup_with_its_interval() -> None:
    ours = next(r for r in results() if r.contender == "ours")
    assert (ours.speedup_low, ours.speedup_high) == (2.0, 2.0)
    unsteady = replace(ours, speedup=1.43, speedup_low=1.42, speedup_high=1.46)
    assert output.speedup(unsteady) == "1.43x ±0.03"
    assert output.speedup(replace(unsteady, contender="stock")) == "1.43x"


def test_isa(native: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _native.backend.isa()
    runs: list[str] = []
    command.run(fake_bench(runs), ["--isa", "baseline", "--out", str(tmp_path)])
    assert set(runs) == {"baseline"}
    assert _native.backend.isa() == before
    document = json.loads((tmp_path / "bench_fake.json").read_text())
    assert document["machine"]["isa"] == "baseline"
    assert "(baseline)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("available", "words"),
    [(True, "expected a set that this machine runs, got avx512"), (False, "compiled module")],
)
def test_isa_refused(
    available: bool,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def set_isa(name: str) -> None:
        raise ValueError(name)

    monkeypatch.setattr(_native, "available", available)
    monkeypatch.setattr(_native.backend, "isa", lambda: "avx2", raising=False)
    monkeypatch.setattr(_native.backend, "set_isa", set_isa, raising=False)
    runs: list[str] = []
    with pytest.raises(SystemExit) as stopped:
        command.run(fake_bench(runs), ["--isa", "avx512"])
    assert (stopped.value.code, runs) == (2, [])
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_processes_have_the_same_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}

    def popen(arguments: list[str], **options: Any) -> None:
        found.update(options["env"])
        raise InterruptedError

    monkeypatch.setattr(step_process.subprocess, "Popen", popen)
    monkeypatch.setattr(_native, "available", True)
    monkeypatch.setattr(_native.backend, "isa", lambda: "avx2", raising=False)
    with pytest.raises(InterruptedError):
        StepProcess("stock", 2, 32, "NCHW", "float32")
    assert found == {**os.environ, "GRADFUSE_ISA": "avx2"}


def test_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "commit", lambda: "abc+")
    path = tmp_path / "new" / "history.jsonl"
    disturbed = [replace(r, others=0.5, speedup_low=1.9) for r in results()]
    history.append(disturbed, ABOUT, "clip", path)
    history.append(results(), ABOUT, "optim", path)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(e["bench"], e["contender"]) for e in entries] == [
        (bench, contender) for bench in ("clip", "optim") for contender in ("ours", "loop")
    ]
    assert entries[0] == {
        "date": "2026-01-02T00:00:00+00:00",
        "commit": "abc+",
        "machine": {"cpu": "a processor", "threads": 2, "isa": "avx2"},
        "torch": "2.14",
        "bench": "clip",
        "row": "fake, float32",
        "contender": "ours",
        "ratio": 2.0,
        "low": 1.9,
        "high": 2.0,
        "x_floor": 2.0,
        "disturbed": True,
    }
    assert not entries[2]["disturbed"]
    history.append([replace(r, floor="stock") for r in results()], ABOUT, "fuse", path)
    assert json.loads(path.read_text().splitlines()[-1])["x_floor"] is None


def test_history_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    options = ["--history", str(path), "--out", str(tmp_path)]
    command.run(fake_bench([]), [*options, "--quick"])
    assert not path.exists()
    command.run(fake_bench([]), options)
    assert [json.loads(line)["contender"] for line in path.read_text().splitlines()] == ["ours"]


def entry(**changes: Any) -> dict[str, Any]:
    made = {
        "date": "2026-01-01",
        "commit": "aaa",
        "machine": {"cpu": "many", "threads": 2, "isa": "avx2"},
        "bench": "clip",
        "row": "small, float32",
        "contender": "gradfuse",
        "ratio": 2.0,
        "disturbed": False,
    }
    return made | changes


@pytest.mark.parametrize("count", [1, 4])
def test_figure_of_the_history(count: int, tmp_path: Path) -> None:
    """Of gradfuse on the machine with the most entries, in the order of their dates."""
    path = tmp_path / "history.jsonl"
    entries = [
        entry(date="2026-01-03", commit="ccc"),
        entry(contender="timm agc"),
        entry(date="2026-01-02", commit="bbb", bench="optim", ratio=0.5, disturbed=True),
        entry(),
    ][:count]
    if count > 1:
        other = {"cpu": "few", "threads": 2, "isa": "avx2"}
        entries.append(entry(date="2025-12-31", commit="zzz", machine=other))
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    arguments = ["history", "--history", str(path), "--out", str(tmp_path / "out")]
    assert command.main(arguments) == 0
    figure = (tmp_path / "out" / "history.svg").read_text()
    assert ("bench clip" in figure, "bench optim" in figure) == (True, count > 1)
    assert "many, 2 threads" in figure
    assert re.findall(">(aaa|ccc)<", figure) == ["aaa", "ccc"][-count:]
    assert not re.search("timm|few|zzz", figure)
    assert command.main(arguments) == 0
    assert (tmp_path / "out" / "history.svg").read_text() == figure


def test_means_are_of_the_rows_that_all_dates_have() -> None:
    entries = [
        entry(row="a", ratio=2.0),
        entry(row="b", ratio=8.0),
        entry(date="2026-01-02", row="a", ratio=3.0),
    ]
    means = history.geometric_means(entries)
    assert means == pytest.approx({"2026-01-01": 2.0, "2026-01-02": 3.0})
    assert history.geometric_means(entries[:2]) == pytest.approx({"2026-01-01": 4.0})
    assert history.geometric_means(entries[1:]) == {}


def test_commit_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("git") is None:
        pytest.skip("no git")

    def git(*arguments: str) -> str:
        user = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *user, *arguments], capture_output=True, text=True
        )
        return done.stdout.strip()

    module = tmp_path / "gradfuse" / "bench" / "history.py"
    module.parent.mkdir(parents=True)
    (tmp_path / "gradfuse" / "__init__.py").touch()
    module.touch()
    monkeypatch.setattr(history, "__file__", str(module))
    assert history.commit() is None  # in no checkout
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "none")
    assert history.commit() is None  # in that of something else
    git("add", "gradfuse")
    git("commit", "-q", "-m", "all")
    (tmp_path / "history.jsonl").touch()
    head = git("rev-parse", "--short", "HEAD")
    assert history.commit() == head
    module.write_text("changed")
    assert history.commit() == f"{head}+"


def test_step_in_a_process_of_its_own() -> None:
    pytest.importorskip("torchvision")
    process = StepProcess("gradfuse", 2, 32, "NCHW", "float32")
    try:
        assert process.first > 0
        memory = process.memory()
        assert memory is None or memory > 1e6
        assert 0 < process.norms() < 60
        process._process.kill()
        with pytest.raises((RuntimeError, BrokenPipeError)):
            process.step()
    finally:
        process.close()
