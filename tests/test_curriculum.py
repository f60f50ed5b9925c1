"""Curricula: what the pool holds, what ranks get, and resuming wherever a run was killed."""

from __future__ import annotations

import copy
import math
import pickle
import signal
import sys
from collections import Counter, namedtuple
from itertools import chain

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import run_python
from torch.utils.data import DataLoader

from gradfuse.curriculum import BabySteps, Competence, CurriculumSampler, SequenceLengthWarmup

pytestmark = pytest.mark.no_kernel


def always(share: float):
    return lambda step: share


def flat(lists: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def batches(sampler: CurriculumSampler, steps: int) -> list[list[int]]:
    """What a training loop without workers gets in so many steps."""
    loader = DataLoader(range(len(sampler._given)), batch_size=sampler.batch_size, sampler=sampler)
    found: list[list[int]] = []
    while True:
        for batch in loader:
            if len(found) == steps:
                return found
            found.append(batch.tolist())
            sampler.step()


def test_schedules() -> None:
    root = Competence(100, start=0.1)
    assert [root(0), root(100), root(1000)] == [0.1, 1.0, 1.0]
    assert root(50) == pytest.approx(math.sqrt(0.5 * (1 - 0.01) + 0.01))
    assert Competence(100, start=0.2, power=1)(25) == pytest.approx(0.4)
    assert Competence(100, power=400)(0) == 0.01  # 0.01^400 is 0 in float64
    stages = BabySteps(100, stages=5)
    assert [stages(t) for t in (0, 24, 25, 99, 100)] == [0.2, 0.2, 0.4, 0.8, 1.0]
    assert BabySteps(7, stages=1)(0) == 1.0


def test_the_pool_is_the_easiest_share_of_the_step() -> None:
    difficulty = np.random.default_rng(0).permutation(1000)
    schedule = Competence(150, start=0.05)
    sampler = CurriculumSampler(difficulty, schedule, batch_size=20)
    seen = batches(sampler, 200)
    for step, batch in enumerate(seen):
        assert max(difficulty[batch]) < math.ceil(schedule(step) * 1000)
    assert max(difficulty[flat(seen[:10])]) > 0.9 * schedule(9) * 1000


def test_newcomers_are_drawn_as_often_as_the_rest_of_the_pool() -> None:
    """The mean place in the pool is 1/2 at each step, in a pool that grows fast."""
    places = []
    for seed in range(40):
        sampler = CurriculumSampler(range(2000), Competence(100, 0.05), 20, seed=seed)
        places.append([np.mean(b) / (2000 * sampler.schedule(t)) for t, b in
                       enumerate(batches(sampler, 100))])  # fmt: skip
    by_time = np.reshape(places, (40, 10, 10)).mean(axis=(0, 2))
    deviation = math.sqrt(1 / 12 / (40 * 10 * 20))
    assert np.abs(by_time - 0.5).max() < 5 * deviation


def test_a_small_pool_does_not_fill_a_batch_with_copies() -> None:
    sampler = CurriculumSampler(range(100), always(0.01), batch_size=10)
    assert [sorted(batch) for batch in batches(sampler, 3)] == [list(range(10))] * 3


def test_a_pass_over_all_of_the_data_is_an_epoch() -> None:
    sampler = CurriculumSampler(torch.rand(103), always(1.0), batch_size=10)
    first, second = batches(sampler, 11), batches(sampler, 11)
    assert sorted(flat(first)) == list(range(103))
    assert flat(first) != flat(second)
    small = CurriculumSampler(range(100), always(0.1))
    assert Counter(small) == dict.fromkeys(range(10), 10)


@pytest.mark.parametrize("labels", [None, [i % 7 for i in range(103)]])
def test_ranks_share_nothing_and_have_equal_lengths(labels) -> None:
    ranks = [
        CurriculumSampler(
            torch.arange(103), Competence(30, 0.3), 4, labels=labels, num_replicas=4, rank=r
        )
        for r in range(4)
    ]
    left_out: Counter[int] = Counter(range(103))
    for _ in range(5):
        shares = [list(sampler) for sampler in ranks]
        assert {len(share) for share in shares} == {len(ranks[0])} == {25}
        assert not any(set(a) & set(b) for i, a in enumerate(shares) for b in shares[:i])
        left_out -= Counter(flat(shares))
        for sampler in ranks:
            for _ in range(7):
                sampler.step()
    full = [set(sampler) for sampler in ranks]
    assert len(set.union(*full)) == 100


def test_equal_samples_have_a_random_order_anew_in_each_pass() -> None:
    sampler = CurriculumSampler([0] * 50 + [1] * 50, always(0.25))
    pools = [set(flat(batches(sampler, 100))) for _ in range(2)]
    for pool in pools:
        assert len(pool) == 25
        assert max(pool) < 50
        assert pool != set(range(25))
    assert pools[0] != pools[1]


def test_each_class_gives_its_easiest_share() -> None:
    labels = np.array(["rare"] * 30 + ["common"] * 300)
    difficulty = np.concatenate([np.arange(30) + 1e6, np.arange(300)])  # one class is all harder
    sampler = CurriculumSampler(difficulty, always(0.2), labels=labels)
    assert set(sampler) == {*range(6), *range(30, 90)}


def test_workers_and_prefetching_change_nothing() -> None:
    def run(**options) -> tuple[list[list[int]], dict]:
        sampler = CurriculumSampler(range(90), Competence(12, 0.2), batch_size=10)
        loader = DataLoader(range(90), batch_size=10, sampler=sampler, **options)
        seen = []
        for epoch in range(2):
            for batch in loader:
                if epoch == 1 and len(seen) == 13:
                    break
                seen.append(batch.tolist())
                sampler.step()
        return seen, sampler.state_dict()

    alone = run()
    ahead = run(num_workers=2, prefetch_factor=4, persistent_workers=True)
    assert ahead == alone
    assert [alone[1][k] for k in ("steps", "begin", "passes")] == [13, 9, 2]


@pytest.mark.parametrize("steps", [0, 1, 5, 11, 12, 23])
@pytest.mark.parametrize("drop_last", [False, True])
def test_resumes_with_the_next_batch(steps: int, drop_last: bool) -> None:
    def make() -> CurriculumSampler:
        return CurriculumSampler(range(115), Competence(20, 0.1), 10, drop_last=drop_last)

    whole = batches(make(), 40)
    sampler = make()
    assert batches(sampler, steps) == whole[:steps]
    state = pickle.loads(pickle.dumps(sampler.state_dict()))
    again = make()
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert batches(again, 40 - steps) == whole[steps:]


def paced(sampler: CurriculumSampler, steps: int) -> list[list[int]]:
    """A training loop that reports losses: the later samples become the easier ones."""
    seen: list[list[int]] = []
    while len(seen) < steps:
        for batch in DataLoader(range(200), batch_size=10, sampler=sampler):
            seen.append(batch.tolist())
            sampler.update(batch, -batch - sampler.steps)
            sampler.step()
            if len(seen) == steps:
                break
    return seen


@pytest.mark.filterwarnings("ignore:CurriculumSampler. expected a step")
def test_self_paced_by_running_losses() -> None:
    sampler = CurriculumSampler(range(100), always(0.5), batch_size=10)
    assert set(flat(paced(sampler, 10))) == set(range(50))
    assert min(min(b) for b in paced(sampler, 10)) == 0  # seen ones are below all others
    sampler = CurriculumSampler(range(4), always(0.5), batch_size=1)
    sampler.update([3, 3, 0], [-1.0, -3.0, 9.0])
    sampler.update([3], torch.tensor([-4.0], dtype=torch.bfloat16), decay=0.5)
    assert sampler._losses is not None
    np.testing.assert_equal(sampler._losses, [9.0, np.nan, np.nan, -3.0])
    assert set(sampler) == {3, 1}
    sampler.update([3, 1], [math.nan, math.inf])
    assert set(sampler) == {0, 2}
    sampler.update([3], [-1.0])
    assert set(sampler) == {2, 3}


def test_losses_resume_within_a_pass() -> None:
    def make() -> CurriculumSampler:
        return CurriculumSampler(torch.arange(100) / 100, Competence(40, 0.3), 10)

    whole, sampler = paced(make(), 30), make()
    assert paced(sampler, 14) == whole[:14]
    again = make()
    again.load_state_dict(sampler.state_dict())
    assert paced(again, 16) == whole[14:]


TRAIN = """
import os, sys, torch
from torch.utils.data import DataLoader
from gradfuse.curriculum import Competence, CurriculumSampler

path, data = sys.argv[1], torch.arange(200)
sampler = CurriculumSampler(data, Competence(50, 0.1), batch_size=10)
loader = DataLoader(data, 10, sampler=sampler, num_workers=2, persistent_workers=True)
seen = []
while True:
    for batch in loader:
        seen.append(batch.tolist())
        sampler.update(batch, -batch - sampler.steps)
        sampler.step()
        torch.save({"sampler": sampler.state_dict(), "seen": seen}, path + ".new")
        os.replace(path + ".new", path)
        if len(seen) == 27:
            os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and kills itself")
def test_resumes_after_a_kill(tmp_path) -> None:
    path = tmp_path / "state"
    done = run_python(f"import sys; sys.argv[1:] = [{str(path)!r}]\n{TRAIN}")
    assert done.returncode == -signal.SIGKILL, done.stderr
    state = torch.load(path)  # of the second pass
    whole, again = (CurriculumSampler(range(200), Competence(50, 0.1), 10) for _ in range(2))
    again.load_state_dict(state["sampler"])
    assert state["seen"] + paced(again, 23) == paced(whole, 50)
    np.testing.assert_equal(again._losses, whole._losses)


def test_ranks_of_torch_distributed() -> None:
    store = pytest.importorskip("torch.testing._internal.distributed.fake_pg").FakeStore()
    dist.init_process_group("fake", store=store, rank=1, world_size=2)
    try:
        sampler = CurriculumSampler([1, 2], Competence(5))
        assert (sampler.num_replicas, sampler.rank) == (2, 1)
    finally:
        dist.destroy_process_group()


def test_copies_and_pickles() -> None:
    sampler = CurriculumSampler(range(40), Competence(20), 4)
    batches(sampler, 3)
    for again in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert list(again) == list(copy.deepcopy(sampler))


def test_a_loop_that_forgets_to_step_is_told() -> None:
    sampler = CurriculumSampler(range(40), Competence(20), 4)
    list(sampler)
    with pytest.warns(UserWarning, match=r"expected a step\(\) for each batch of 4, got 0 in a pa"):
        list(sampler)


GOOD = {"difficulty": [1.0, 2.0, 3.0], "schedule": Competence(5)}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"difficulty": []}, "difficulty must be finite numbers, at least one, got 0 of 0"),
        ({"difficulty": [1.0, math.nan]}, "finite numbers, at least one, got 1 of 2"),
        ({"difficulty": [[1.0]]}, r"in one dimension, got shape \(1, 1\) of torch.float32"),
        ({"difficulty": ["a"]}, "difficulty must be real numbers in one dimension, got list"),
        ({"difficulty": torch.ones(3, dtype=torch.complex64)}, "must be real numbers"),
        ({"difficulty": torch.ones(3, device="meta")}, "must be real numbers"),
        ({"difficulty": None}, "must be real numbers in one dimension, got NoneType"),
        ({"schedule": lambda step: 0.0}, r"schedule\(0\) must be in \(0, 1\], got 0.0"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
        ({"batch_size": True}, "batch_size must be a whole number >= 1, got True"),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
        ({"num_replicas": 2, "rank": 2}, "rank must be < num_replicas, 2, got 2"),
        ({"num_replicas": 4}, "difficulty must be of a sample for each rank"),
        ({"batch_size": 4, "drop_last": True}, "or of a batch with drop_last, got 3 samples"),
        ({"labels": [0, 1]}, r"labels must be 3 integers or strings, got shape \(2,\)"),
        ({"labels": [0.0, 1.0, 2.0]}, "labels must be 3 integers or strings"),
    ],
)
def test_wrong_arguments(changed: dict, says: str) -> None:
    with pytest.raises(ValueError, match="CurriculumSampler: .*" + says):
        CurriculumSampler(**{**GOOD, **changed})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Competence(0), "Competence: steps must be a whole number >= 1, got 0"),
        (lambda: Competence(5, start=0.0), r"Competence: start must be in \(0, 1\], got 0.0"),
        (lambda: Competence(5, start=math.nan), r"start must be in \(0, 1\], got nan"),
        (lambda: Competence(5, power=0), "power must be finite and > 0, got 0"),
        (lambda: Competence(5, power="2"), "power must be finite and > 0, got '2'"),
        (lambda: BabySteps(5, 2.5), "stages must be a whole number >= 1, got 2.5"),
        (lambda: SequenceLengthWarmup(5, 4), "end must be a whole number >= 8, got 4"),
        (lambda: SequenceLengthWarmup(5, 64, start=4), "start must be a whole number >= 8, got 4"),
    ],
)
def test_wrong_schedules(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_wrong_updates_and_states_change_nothing() -> None:
    with pytest.raises(TypeError, match="schedule must be callable, got float"):
        CurriculumSampler([1.0], 0.5)
    sampler = CurriculumSampler(range(10), Competence(5), 2)
    batches(sampler, 2)
    before = sampler.state_dict()
    for indices, losses, decay, says in [
        ([1, 10], [1.0, 1.0], 0.9, r"indices must be whole numbers in \[0, 10\), got \[1, 10\]"),
        ([0.5], [1.0], 0.9, "indices must be whole numbers"),
        ([1], [1.0, 2.0], 0.9, "losses must be as many as indices, 1, got 2"),
        ([1], [1.0], 1.0, r"decay must be in \[0, 1\), got 1.0"),
    ]:
        with pytest.raises(ValueError, match=says):
            sampler.update(indices, losses, decay)
    for change, says in [
        ({"samples": 11}, "samples must be 10 here, got 11"),
        ({"batch_size": 1}, "batch_size must be 2 here, got 1"),
        ({"steps": "2"}, "steps must be a whole number >= 0, got '2'"),
        ({"losses": torch.zeros(3)}, "losses and ranked must be of 10 samples"),
        ({"more": 1}, "state must be what state_dict returned"),
    ]:
        with pytest.raises(ValueError, match=says):
            sampler.load_state_dict({**before, **change})
    assert sampler.state_dict() == before
    # After the last step of a pass nothing depends on how it was divided.
    CurriculumSampler(range(10), Competence(5), 5).load_state_dict({**before, "steps": 5})


def test_sequence_length_warmup() -> None:
    warmup = SequenceLengthWarmup(steps=10, end=60, start=8)
    Pair = namedtuple("Pair", "x y")
    batch = {"ids": torch.arange(120).reshape(2, 60), "label": torch.ones(2), "text": "a",
             "more": Pair([torch.ones(2, 5)], (torch.ones(2, 60, 3),))}  # fmt: skip
    lengths = []
    for _ in range(12):
        cut = warmup(batch)
        lengths.append(cut["ids"].shape[1])
        assert torch.equal(cut["ids"], batch["ids"][:, : warmup.length])
        assert cut["more"].x[0].shape == (2, 5)
        assert cut["more"].y[0].shape == (2, warmup.length, 3)
        assert (cut["label"].shape, cut["text"]) == ((2,), "a")
        warmup.step()
    assert lengths == [8, 8, 16, 16, 24, 32, 32, 40, 48, 48, 60, 60]
    again = SequenceLengthWarmup(steps=20, end=60)
    again.load_state_dict(warmup.state_dict())
    assert again.length == 32
    with pytest.raises(ValueError, match="state must be what state_dict returned"):
        again.load_state_dict({})
