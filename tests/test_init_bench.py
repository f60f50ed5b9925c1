"""python -m gradfuse bench init: its tables, at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

for extra in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(extra)

bench = pytest.importorskip("gradfuse.bench.command")


def test_the_tables_of_initialisations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--layers", "3", "--blocks", "2", "--width", "16", "--steps", "2"]
    assert bench.main(["init", *sizes, "--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in ("| softplus", "h + relu(W h) | auto", "held-out accuracy"):
        assert text in printed
    kept = json.loads((tmp_path / "bench_init.json").read_text())
    assert len(kept["plain"]) == 11
    assert [r["init"] for r in kept["trained"]] == ["torch", "auto"] * 3
    low, high = kept["plain"][0]["auto"]["forward"]
    assert 0.5 < low <= high < 2
