"""python -m gradfuse guide: its rows, what it measures, what it prints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

for extra in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(extra)

from gradfuse.__main__ import main  # noqa: E402
from gradfuse.demo.digits import Digits  # noqa: E402
from gradfuse.guide import recipes, training  # noqa: E402
from gradfuse.guide.output import adds  # noqa: E402
from gradfuse.guide.recipes import COMBINATIONS, RECIPES, SHORT  # noqa: E402
from gradfuse.guide.training import KINDS, Run, fits, train  # noqa: E402

pytestmark = pytest.mark.no_kernel


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradfuse.guide.nets.LAYERS", 6)


@pytest.mark.parametrize(
    ("row", "kind"), [(row, kind) for row in RECIPES for kind in KINDS if fits(row, kind)]
)
def test_every_row_trains(row: str, kind: str) -> None:
    run = train(row, kind, seed=0, steps=3, rate=1e-3)
    first = 8 if row == "curriculum" else 64
    assert len(run.gradients) == (6 if kind == "deep" else first)
    assert all(math.isfinite(g) and g > 0 for g in run.gradients)
    assert len(run.losses) == 3
    assert run.lost == 0
    assert 0 <= run.accuracy <= 1


def test_a_row_differs_from_nothing_by_what_it_names() -> None:
    digits = Digits.load(0)
    nets = {row: training.build(RECIPES[row], "deep", digits, 0) for row in RECIPES}
    plain = dict(nets["nothing"].named_parameters())
    for row in ("clipping", "batch norm", "layer norm", "homeostatic gain"):
        ours = dict(nets[row].named_parameters())
        assert torch.equal(ours["blocks.2.0.weight"], plain["blocks.2.0.weight"])
    he, large = (nets[row].blocks[2][0].weight.std().item() for row in ("He", "large weights"))
    assert large / he == pytest.approx(1.5)
    assert he == pytest.approx((2 / 32) ** 0.5, rel=0.1)


def test_lost_steps_are_those_that_move_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train("nothing", "deep", 0, 4, rate=0.0).lost == 1
    row = recipes.Recipe("nan", "", batches=lambda d, steps, seed: nan_first(d, steps, seed))
    monkeypatch.setitem(RECIPES, "nan", row)
    run = train("nan", "deep", 0, 4, rate=0.1)
    assert run.lost == 0.25
    assert run.range == math.inf


def nan_first(digits: Digits, steps: int, seed: int):
    for step, (x, y) in enumerate(digits.batches(steps, seed)):
        yield (x if step else x * math.nan), y


def test_range_of_gradients() -> None:
    assert Run("", "", 0, 0.1, gradients=[2.0, 8.0, 4.0]).range == 4
    assert Run("", "", 0, 0.1, gradients=[0.0, 8.0]).range == math.inf


def test_the_rate_of_the_lowest_loss_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {0.1: math.nan, 0.01: 1.0, 0.001: 2.0}
    monkeypatch.setattr(training, "train", lambda *a: Run(*a[:3], a[4], losses=[losses[a[4]]] * 20))
    assert training.choose_rate("nothing", "deep", 40) == 0.01
    losses.update({0.1: 1.0, 0.01: math.inf, 0.001: math.nan})
    assert training.choose_rate("nothing", "deep", 40) == 0.1
    losses.update({0.1: math.nan, 0.001: math.inf})
    assert training.choose_rate("nothing", "deep", 40) == 0.001


def test_what_adds() -> None:
    assert adds([0.9, 0.8], [[0.5, 0.7], [0.1, 0.2]]) == "yes"
    assert adds([0.9, 0.6], [[0.5, 0.7], [0.1, 0.2]]) == "within the seeds"
    assert adds([0.5, 0.6], [[0.5, 0.7], [0.1, 0.2]]) == "no"


def test_combinations_are_of_rows() -> None:
    assert {*COMBINATIONS, *(part for parts in COMBINATIONS.values() for part in parts)} <= {
        *RECIPES
    }
    assert len(SHORT) == 6


def test_a_curriculum_begins_with_what_is_easy() -> None:
    digits = Digits.load(0)
    batches = list(RECIPES["curriculum"].batches(digits, 50, 0))
    assert len(batches) == 50
    means = torch.stack([digits.x[digits.y == c].mean(0) for c in range(10)])
    first, last = ((x - means[y]).norm(dim=1).mean() for x, y in (batches[0], batches[-1]))
    assert first < 0.8 * last
    lengths = [x.shape[1] for x, _ in RECIPES["curriculum"].sequences(digits, 50, 0)]
    assert (lengths[0], lengths[-1], len(lengths)) == (8, 64, 50)


def test_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rows", "clipping", "--steps", "1", "--seeds", "1", "--out", str(tmp_path)]
    assert main(["guide", *options, "--processes", "2"]) == 0
    assert "| clipping" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "guide.json").read_text())) == 2


def test_guide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    rows = ["batch norm", "residual", "batch norm + residual"]
    options = ["--rows", *rows, "--steps", "2", "--seeds", "2", "--out", str(tmp_path)]
    assert main(["guide", *options, "--processes", "1"]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    for text in ("deep: range", "| batch norm + residual", "adds"):
        assert text in printed
    kept = json.loads((tmp_path / "guide.json").read_text())
    assert [(r["row"], r["kind"], r["seed"]) for r in kept] == [
        ("batch norm", "deep", 0),
        ("batch norm", "deep", 1),
        ("residual", "deep", 0),
        ("residual", "deep", 1),
        ("residual", "recurrent", 0),
        ("residual", "recurrent", 1),
        ("batch norm + residual", "deep", 0),
        ("batch norm + residual", "deep", 1),
    ]
    assert "batch norm + residual" in (tmp_path / "guide.svg").read_text()


@pytest.mark.parametrize("option", ["--steps", "--seeds", "--processes"])
def test_numbers_are_at_least_1(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["guide", option, "0"])
    assert f"{option} must be >= 1, got 0" in capsys.readouterr().err
