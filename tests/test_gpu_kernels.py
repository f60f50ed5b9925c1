"""The scripts for a machine with a GPU: they run here as far as they can."""

import json
import re
import sys

import pytest
import torch
from gpu import check, kernels

import gradfuse

CASES = [case for case in kernels.cases("cpu") if case.is_small]


@pytest.mark.backends("cpu", "ptx", arithmetic=False)
@pytest.mark.pairs
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case, backend):
    case.run()


@pytest.mark.backends("cpu")
def test_a_wrong_element_is_found(backend, monkeypatch, capsys):
    """Without the last element of a gradient, and with a result that is not written."""
    clip = gradfuse.clip_grad_value_

    def lazy(parameters, value):
        clip([torch.nn.Parameter(p.detach()[:-1]) for p in parameters], value)

    monkeypatch.setattr(gradfuse, "clip_grad_value_", lazy)
    monkeypatch.setattr("sys.argv", ["kernels", "--device", "cpu", "--small", "--only", "clip rag"])
    assert kernels.main() == 1
    out = capsys.readouterr().out
    assert re.search(r"FAILED clip ragged float32 \+3: clamped 1: element \d is", out)
    assert "0 passed, 4 failed" in out


def test_no_case_is_no_success(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["kernels", "--device", "cpu", "--only", "nothing"])
    assert kernels.main() == 1
    assert "0 passed" in capsys.readouterr().out


def test_no_step_stops_another(tmp_path, monkeypatch, capsys):
    def stage(folder):
        yield check.Step("good", [sys.executable, "-c", "print('fine')"], 60)
        yield check.Step("bad", [sys.executable, "-c", "raise SystemExit('broken')"], 60)
        yield check.Step("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
        yield check.Step("absent", ["no-such-program"], 60)
        yield check.Step("last", [sys.executable, "-c", "pass"], 60)

    monkeypatch.setitem(check.STAGES, "A", stage)
    out = tmp_path / "out"
    assert check.main(["--out", str(out), "A"]) == 1
    assert check.main(["--out", str(out), "A"]) == 1  # appends
    found = json.loads((out / "gpu.json").read_text())
    assert [step["status"] for step in found] == 2 * [0, 1, None, 127, 0]
    assert found[0]["output"] == "fine\n"
    shown = capsys.readouterr().out
    assert "A slow" in shown
    assert "timed out" in shown
    assert "broken" in shown
    with pytest.raises(SystemExit):
        check.main(["--out", str(out), "D"])
    assert "expected some of A, B, C, got D" in capsys.readouterr().err


def test_a_stage_ends_in_time(tmp_path, monkeypatch):
    """With the processes that a step has started, which hold its output open."""
    sleep = ["sh", "-c", "sleep 60 & sleep 60"]
    monkeypatch.setattr(check, "STAGE_SECONDS", 0.5)
    monkeypatch.setitem(check.STAGES, "A", lambda _: [check.Step("slow", sleep, 60)])
    assert check.main(["--out", str(tmp_path / "out"), "A"]) == 1
    (step,) = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert step["status"] is None
    assert step["seconds"] < 30


@pytest.mark.parametrize("stage", check.STAGES)
def test_scripts_of_steps_compile(stage, tmp_path):
    for step in check.STAGES[stage](tmp_path / "out"):
        if "-c" in step.command:
            compile(step.command[-1], step.name, "exec")
