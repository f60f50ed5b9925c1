"""The command line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from gradfuse import _native
from gradfuse.__main__ import main


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = dict(line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"].strip() == torch.__version__
    if _native.available:
        assert lines["ISA"].strip() == _native.backend.isa()
    else:
        assert _native.reason in lines["compiled module"]


@pytest.mark.parametrize("command", ["bench", "demo", "guide"])
def test_missing_extra_is_one_sentence(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == "rich"] or ["rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in (
        "demo.command", "demo.clip", "bench.command", "bench.output", "guide.command",
        "guide.output",
    ):  # fmt: skip
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


@pytest.mark.parametrize("shape", ["2,8,6", "2,8,6,0", "2,8,6,x"])
def test_bench_batch_norm_refuses_a_shape(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in ("matplotlib", "rich"):
        pytest.importorskip(extra)
    with pytest.raises(SystemExit):
        main(["bench", "batch_norm", "--shapes", shape])
    assert "invalid shape value" in capsys.readouterr().err
