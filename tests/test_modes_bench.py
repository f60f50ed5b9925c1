"""python -m gradfuse bench modes: its tables, at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

for extra in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(extra)

bench = pytest.importorskip("gradfuse.bench.command")


def test_the_tables_of_modes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["modes", "--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in ("renorm, auto", "batch 64", "fast, 0.03 a batch"):
        assert text in printed
    kept = json.loads((tmp_path / "bench_modes.json").read_text())
    assert all(row["accuracy"][0] > 90.0 for row in kept["digits"])
    assert all(row["auto"] < 0.35 for row in kept["drift"])
