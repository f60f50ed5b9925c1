"""How the bench measures, with a fake clock, and what: bytes, tensors, shapes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from fake_machine import FakeMachine, fake_workload
from torch import Tensor, nn

import gradfuse
from gradfuse import _native
from gradfuse.bench import batch_norm, clip, harness, norms, optim
from gradfuse.bench.floor import FLOOR, FRESH_FLOOR
from gradfuse.bench.gradients import CACHE
from gradfuse.bench.harness import Contender, Plan, Result, Workload, interleave, measure, summarise
from gradfuse.bench.models import MODELS, NormSite, resnet50_norms
from gradfuse.bench.peers import USUAL, usual_optimizer
from gradfuse.bench.profiled import norm_events, norm_seconds, profiled
from gradfuse.bench.ratios import median_interval
from gradfuse.bench.resnet_norms import setup_model


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


@pytest.mark.parametrize(
    ("n", "low", "high"),
    # Ranks of tables of the sign test; no interval of 5 values has 95 %, so those are the extremes.
    [(5, 1, 5), (6, 1, 6), (9, 2, 8), (10, 2, 9), (20, 6, 15), (30, 10, 21), (100, 40, 61)],
)
def test_interval_of_a_median(n: int, low: int, high: int) -> None:
    values = [float(7 * i % n + 1) for i in range(n)]  # 1 to n in another order
    assert sorted(values) == list(range(1, n + 1))
    assert median_interval(values) == (low, high)


@pytest.mark.parametrize(
    ("change", "rounds"),
    # Six rounds are the fewest that tell. Without a baseline nothing ends early.
    [(0.0, 6), (0.015, 6), (0.05, 40)],
)
def test_rounds_end_when_the_ratios_are_known(change: float, rounds: int) -> None:
    machine = FakeMachine()
    stock = machine.contender("stock", 2.0)

    def unsteady() -> None:
        machine.now += (1.0, 1.0 + change, 1.0 - change)[len(machine.calls) // 2 % 3]
        machine.calls.append("ours")

    contenders = [stock, Contender("ours", unsteady)]
    plan = Plan(3, 40, 1e9, spread=0.02)
    times = interleave(contenders, lambda: None, plan, machine.clock, baseline="stock")
    assert len(times["ours"]) == rounds
    assert len(interleave(contenders, lambda: None, plan, machine.clock)["ours"]) == 40


def test_a_measurement_ends_when_the_ratios_are_known() -> None:
    work = fake_workload(FakeMachine())
    work.contenders = [
        replace(c, memory=lambda: None, seconds=lambda: 1.0) for c in work.contenders
    ]
    assert {r.rounds for r in measure(work, Plan(3, 40, 1e9, repeats=0))} == {6}


def test_a_contender_may_tell_its_time() -> None:
    machine = FakeMachine()
    told = replace(machine.contender("told", 5.0), seconds=lambda: 0.25)
    times = interleave([told], lambda: None, Plan(3, 3, 1e9), machine.clock)
    assert times == {"told": [0.25] * 3}


@pytest.mark.parametrize(
    ("shares", "repeats", "kept"),
    [
        ([0.01], 2, 0.01),
        ([0.5, 0.02], 2, 0.02),
        ([0.5, 0.2, 0.3], 2, 0.2),
        ([0.5], 0, 0.5),
        ([None], 2, None),
    ],
)
def test_a_disturbed_row_is_measured_again(
    shares: list[float | None], repeats: int, kept: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = FakeMachine()
    work = fake_workload(machine)
    work.contenders = [replace(c, memory=lambda: None) for c in work.contenders]
    left = iter(shares)

    class Neighbours:
        def __init__(self, pids: Sequence[int]) -> None: ...

        def share(self) -> float | None:
            return next(left)

    tries: list[float] = []

    def timed(work: Workload, plan: Plan, extra: dict[str, int | None]) -> list[Result]:
        tries.append(len(tries))
        times = interleave(work.contenders, work.prepare, Plan(1, 1, 1e9), machine.clock)
        return [replace(r, bytes_moved=len(tries) - 1) for r in summarise(work, times, extra)]

    monkeypatch.setattr(harness, "Neighbours", Neighbours)
    results = measure(work, Plan(repeats=repeats), timed)
    assert len(tries) == len(shares)
    assert {(r.others, r.bytes_moved) for r in results} == {(kept, shares.index(kept))}


class FakeStream:
    """Counts the bytes of each pass, and notes where it reads and writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[tuple[int, bool]] = []
        self.reads: list[int] = []
        self.writes: list[int] = []
        monkeypatch.setattr(_native.backend, "stream", self, raising=False)

    def __call__(self, reads: list[Tensor], writes: list[Tensor], backwards: bool = False) -> None:
        tensors = [*reads, *writes]
        assert len({(t.dtype, t.shape) for t in tensors}) == 1  # as the reference wants
        assert all(t.is_contiguous() for t in tensors)
        self.passes.append((sum(t.nbytes for t in tensors), backwards))
        self.reads += [t.data_ptr() for t in reads]
        self.writes += [t.data_ptr() for t in writes]


def calls(contenders: Sequence[Contender]) -> dict[str, Callable[[], object]]:
    return {c.name: c.run for c in contenders}


def rows_against_packages(dtype: torch.dtype) -> list[tuple[Workload, list[tuple[int, bool]]]]:
    """Of the rules that torch lacks, if what they are measured against is installed."""
    passes = {
        "Lion": [(1, False), (5, True)],
        "LAMB": [(1, False), (4, False), (7, True)],
        "ScheduleFreeAdamW": [(1, False), (7, True)],
    }
    assert set(passes) == set(USUAL)
    found = [rule for rule in passes if usual_optimizer(rule)]
    return [(optim.setup("tiny", rule, dtype), passes[rule]) for rule in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_the_floors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of clip and step: each pass by itself, and all of them what the table says that must move."""
    stream = FakeStream(monkeypatch)
    shapes = MODELS["tiny"]()
    nbytes = sum(math.prod(s) for s in shapes) * dtype.itemsize
    rows: list[tuple[clip.Setup | Workload, list[tuple[int, bool]]]] = [
        (clip.setup_norm(shapes, dtype, False), [(1, False)]),
        (clip.setup_norm(shapes, dtype, True), [(1, False), (2, True)]),
        (clip.setup_adaptive(shapes, dtype, False), [(2, False)]),
        (clip.setup_adaptive(shapes, dtype, True), [(3, False)]),
        (optim.setup("tiny", "AdamW", dtype), [(1, False), (7, True)]),
        (optim.setup("tiny", "SGD", dtype), [(1, False), (5, True)]),
        (optim.setup("tiny", "AdamW", dtype, clips=False), [(7, False)]),
        (optim.setup("tiny", "Adam", dtype), [(1, False), (7, True)]),
        *rows_against_packages(dtype),
    ]
    for row, passes in rows:
        stream.passes.clear()
        calls(row.contenders)[FLOOR]()
        assert stream.passes == [(n * nbytes, backwards) for n, backwards in passes]
        assert row.bytes_moved == sum(n for n, _ in passes) * nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("site", [NormSite((2, 8, 4, 4)), NormSite((2, 8, 4, 4), False, False)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_bytes_of_the_floor_of_a_batch_norm(
    site: NormSite, dtype: torch.dtype, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = FakeStream(monkeypatch)
    nbytes = 256 * dtype.itemsize
    tensors = (3, 4) if site.has_residual else (2, 3)  # of the forward, and of the backward
    mask = 256 // 8 if site.has_activation else 0
    for backward in (False, True):
        runs = calls(batch_norm.setup(site, dtype, channels_last, backward))
        for name in (FLOOR, FRESH_FLOOR):
            stream.passes.clear()
            runs[name]()
            assert stream.passes == [(n * nbytes, False) for n in tensors[: 1 + backward]]
        moved = nbytes * sum(tensors[: 1 + backward]) + mask * (1 + backward)
        assert norms.bytes_moved(site, dtype, backward) == moved
    stream.passes.clear()
    calls(setup_model([site, site], dtype, channels_last))[FLOOR]()
    assert stream.passes == [(n * nbytes, False) for n in (tensors[0],) * 2 + (tensors[1],) * 2]


def test_cold_tensors_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever calls gets the next set. What it leaves stays until that set's next turn."""
    stream = FakeStream(monkeypatch)
    setup = batch_norm.setup(NormSite((2, 8, 4, 4)), torch.float32, False, False, sets=3)
    runs = calls(setup)
    for name in (FLOOR, FRESH_FLOOR, norms.EAGER, FLOOR, FRESH_FLOOR):
        runs[name]()
    first, second, *again = stream.reads[::2]  # of x; the residual follows
    assert first != second
    assert again == [first, second]
    stream.writes.clear()
    for _ in range(3):
        runs[FRESH_FLOOR]()
    assert len(set(stream.writes)) == 3


def test_cold_tensors_exceed_the_caches() -> None:
    for shape in batch_norm.SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for backward in (False, True):
                moved = norms.bytes_moved(NormSite(shape), dtype, backward)
                assert (batch_norm.cold_sets(moved) - 1) * moved <= CACHE
                assert batch_norm.cold_sets(moved) * moved > CACHE


@pytest.mark.parametrize(
    ("cold", "cache", "rows"),
    [(True, 4000, 4), (False, 4000, 2), (True, 100, 2)],  # a call moves 873 or 2034 bytes
)
def test_rows_of_a_shape(
    cold: bool, cache: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_norm, "CACHE", cache)
    site = NormSite((2, 4, 3, 3))
    works = list(batch_norm.rows(site, torch.float32, False, None, cold))
    hot = ["(2, 4, 3, 3) NCHW forward", "(2, 4, 3, 3) NCHW forward+backward"]
    assert [w.name for w in works if "cold" not in w.name] == hot
    assert [w.name for w in works if "cold" in w.name] == [f"{n}, cold" for n in hot[: rows - 2]]


def test_norms_of_resnet50() -> None:
    sites = resnet50_norms(8, 128)
    assert len(sites) == 53
    assert sum(site.has_residual for site in sites) == 16
    assert sum(not site.has_activation for site in sites) == 4  # of the shortcuts
    vectors = [shape for shape in MODELS["ResNet-50"]() if len(shape) == 1][:-1]
    assert Counter(site.shape[1:2] for site in sites for _ in "wb") == Counter(vectors)
    assert sites[0] == NormSite((8, 64, 64, 64), False, True)
    assert sites[11:15] == [  # the first block of the second stage
        NormSite((8, 128, 32, 32), False, True),
        NormSite((8, 128, 16, 16), False, True),
        NormSite((8, 512, 16, 16), False, False),
        NormSite((8, 512, 16, 16), True, True),
    ]
    assert sites[-1] == NormSite((8, 2048, 4, 4), True, True)


class Block(nn.Module):
    """Of a ResNet. The gradients of its input are summed: of the convolution and of the add."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        y += x
        out: Tensor = self.relu(y)
        return out


@pytest.mark.parametrize("fuses", [False, True])
def test_events_of_batch_norms(fuses: bool) -> None:
    """No sums of gradients and nothing of the optimizer, which calls aten::add_ too."""
    model = nn.Sequential(Block(), Block())
    if fuses:
        gradfuse.fuse(model, inplace=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randn(2, 4, 8, 8)

    def step() -> None:
        model(x).sum().backward()
        optimizer.step()

    step()
    profile = profiled(step)
    events = profile.events()
    assert events is not None
    names = Counter(e.name for e in norm_events(events))
    assert sum(e.name == "aten::add_" for e in events) > names["aten::add_"]
    calls = {"aten::add_": 4, "aten::relu_": 2}  # a sum and a count of batches for each norm
    if not fuses:
        stock = ("aten::batch_norm", "NativeBatchNormBackward0", "AddBackward0", "ReluBackward0")
        assert names == {**calls, **dict.fromkeys(stock, 2)}
    elif _native.available:
        assert names == {**calls, "_BatchNormActBackward": 2}
    else:  # nothing waits for what follows
        plain = ("_BatchNormAct", "_BatchNormActBackward", "AddBackward0", "ReluBackward0")
        assert names == {**calls, **dict.fromkeys(plain, 2)}
    seconds = norm_seconds(step)
    assert 0 < seconds < 60


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
