"""A sampler whose pool grows from the easiest samples to all of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Sampler

from gradfuse.curriculum.order import classes_of, easiest_first, numbers
from gradfuse.curriculum.schedules import check_share
from gradfuse.ops.checks import check_whole, is_number

__all__ = ["CurriculumSampler"]

_STATE = {"steps", "begin", "passes", "samples", "length", "losses", "ranked", "num_replicas",
          "batch_size", "seed"}  # fmt: skip


class CurriculumSampler(Sampler[int]):
    """Samples uniformly from the easiest schedule(t) share of the data at each step t.

    A pass walks through the pool in a shuffled order, again and again while the pool is small; with
    all of the data in the pool it is the usual shuffled epoch. It has N // num_replicas samples a
    rank. Each rank draws from samples of its own in a pass, dealt out anew for the next, so that
    ranks share none; N % num_replicas random samples sit a pass out. Equal samples have a random
    order, anew in each pass. The pool holds at least batch_size samples of a rank.

    What step t gets is a function of seed, pass and t alone, not of when it is asked for. So `step`
    keeps the position, and samples that the workers of a DataLoader were handed in advance do not
    count: neither their number nor prefetch_factor changes what a step gets, and a state_dict
    taken after `step` resumes with the very next batch.

    Args:
        difficulty: [N] finite numbers, Tensor, array or sequence; the least are the easiest.
            Negate them for the hardest first.
        schedule: callable that gives the share in (0, 1] of a step, such as Competence.
        batch_size: samples that this rank takes in a step, as given to the DataLoader.
        labels: [N] integers or strings; the pool is the easiest share of each class. None: of all.
        num_replicas: ranks; None: those of torch.distributed, or 1.
        rank: in [0, num_replicas); None: torch.distributed's, or 0.
        seed: >= 0, the same on all ranks.
        drop_last: leave an incomplete batch out of a pass. Give it here, not to the DataLoader,
            because a pass ends with its last sample.

    Raises:
        ValueError: an argument has no such value.
        TypeError: schedule cannot be called.

    Source: Platanios et al. 2019, algorithm 1. With `update`: Kumar, Packer, Koller 2010,
    "Self-Paced Learning for Latent Variable Models", the threshold 1 / K given as a share.
    """

    def __init__(
        self,
        difficulty: Any,
        schedule: Callable[[int], float],
        batch_size: int = 1,
        *,
        labels: Any = None,
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        op = "CurriculumSampler"
        self._given = numbers(op, "difficulty", difficulty)
        if not len(self._given) or not np.isfinite(self._given).all():
            raise ValueError(f"{op}: difficulty must be finite numbers, at least one, got "
                             f"{np.sum(~np.isfinite(self._given))} of {len(self._given)} that are "
                             "not finite")  # fmt: skip
        if not callable(schedule):
            raise TypeError(f"{op}: schedule must be callable, got {type(schedule).__name__}")
        together = dist.is_available() and dist.is_initialized()
        if num_replicas is None:
            num_replicas = dist.get_world_size() if together else 1
        if rank is None:
            rank = dist.get_rank() if together else 0
        self.schedule, self.drop_last = schedule, bool(drop_last)
        self.batch_size = check_whole(op, "batch_size", batch_size, 1)
        self.num_replicas = check_whole(op, "num_replicas", num_replicas, 1)
        self.rank = check_whole(op, "rank", rank, 0)
        self.seed = check_whole(op, "seed", seed, 0)
        if rank >= num_replicas:
            raise ValueError(f"{op}: rank must be < num_replicas, {num_replicas}, got {rank}")
        self._classes = None if labels is None else classes_of(op, labels, len(self._given))
        if not len(self):
            raise ValueError(f"{op}: difficulty must be of a sample for each rank, or of a batch "
                             f"with drop_last, got {len(self._given)} samples")  # fmt: skip
        self.steps = self._begin = self._passes = 0  # begin: the step with which this pass began
        self._losses: np.ndarray | None = None  # running, NaN where there is none yet
        self._ranked: np.ndarray | None = None  # those that order this pass
        self._resumed = self._exhausted = False
        self._share(0)

    def __len__(self) -> int:
        """Samples of this rank in a whole pass."""
        length = len(self._given) // self.num_replicas
        return length // self.batch_size * self.batch_size if self.drop_last else length

    @property
    def share(self) -> float:
        """The share of the data that the next step draws from."""
        return self._share(self.steps)

    def step(self) -> None:
        """Counts a step: call it after each batch that was trained on."""
        self.steps += 1

    def update(self, indices: Any, losses: Any, decay: float = 0.9) -> None:
        """Makes running losses the difficulty, from the next pass on: self-paced learning.

        A sample's first loss takes the place of its given difficulty, which should have that unit.
        A loss that is not finite makes its sample the hardest until the next one. Several ranks
        should each be given the losses of all (all_gather); they share no samples in any case.

        Args:
            indices: [B] whole numbers in [0, N), as they were drawn.
            losses: [B] numbers, of any device and dtype.
            decay: weight of the past in the running loss, in [0, 1).

        Raises:
            ValueError: an argument has no such value. Nothing has been written then.
        """
        op = "CurriculumSampler.update"
        index, values = numbers(op, "indices", indices), numbers(op, "losses", losses)
        if len(index) != len(values):
            raise ValueError(f"{op}: losses must be as many as indices, {len(index)}, "
                             f"got {len(values)}")  # fmt: skip
        if not ((index >= 0) & (index < len(self._given)) & (index % 1 == 0)).all():
            raise ValueError(f"{op}: indices must be whole numbers in [0, {len(self._given)}), "
                             f"got {indices!r}")  # fmt: skip
        if not is_number(decay) or not 0.0 <= decay < 1.0:
            raise ValueError(f"{op}: decay must be in [0, 1), got {decay!r}")
        if self._losses is None:
            self._losses = np.full(len(self._given), np.nan)
        drawn, place = np.unique(index.astype(np.int64), return_inverse=True)
        values = np.where(np.isfinite(values), values, np.inf)
        new = np.bincount(place, values) / np.bincount(place)  # of a sample that is there twice
        old = self._losses[drawn]
        known = np.isfinite(old) & np.isfinite(new)
        new[known] = decay * old[known] + (1.0 - decay) * new[known]
        self._losses[drawn] = new

    def __iter__(self) -> Iterator[int]:
        position = (self.steps - self._begin) * self.batch_size
        if not self._resumed or not self._passes or position >= len(self):
            if self._exhausted and 2 * position < len(self):
                warnings.warn(
                    f"CurriculumSampler: expected a step() for each batch of {self.batch_size}, "
                    f"got {self.steps - self._begin} in a pass of {len(self)} samples",
                    stacklevel=2,
                )
            self._begin, position = self.steps, 0
            self._passes += 1
            self._ranked = None if self._losses is None else self._losses.copy()
        self._resumed = self._exhausted = False
        return islice(self._draws(self._begin, self._passes, self._shard()), position, None)

    def _draws(self, begin: int, passes: int, shard: np.ndarray) -> Iterator[int]:
        """The samples of a whole pass of this rank."""
        taken = cycle = 0
        pool = self._pool(begin, len(shard))
        while taken < len(self):
            # Twice the pool, because it grows: what joins it meanwhile is drawn as often as others.
            reach = min(len(shard), 2 * pool)
            order = np.random.default_rng([self.seed, passes, self.rank + 1, cycle])
            for place in order.permutation(reach).tolist():
                if taken == len(self) or pool > reach:
                    break
                if place < pool:
                    taken += 1
                    if taken % self.batch_size == 0:
                        pool = self._pool(begin + taken // self.batch_size, len(shard))
                    yield int(shard[place])
            cycle += 1
        self._exhausted = True

    def _pool(self, step: int, samples: int) -> int:
        """How many samples of a rank's own the pool of a step has."""
        easiest = math.ceil(self._share(step) * samples * (1.0 - 1e-12))  # not 4 of 0.1 * 30
        return min(max(easiest, self.batch_size), samples)

    def _share(self, step: int) -> float:
        return check_share("CurriculumSampler", f"schedule({step})", self.schedule(step))

    def _shard(self) -> np.ndarray:
        """The samples of this rank in this pass, easiest first."""
        rng = np.random.default_rng([self.seed, self._passes])
        difficulty = self._given
        if self._ranked is not None:
            difficulty = np.where(np.isnan(self._ranked), difficulty, self._ranked)
        order = easiest_first(difficulty, self._classes, rng.permutation(len(difficulty)))
        left_out = rng.choice(len(order), len(order) % self.num_replicas, replace=False)
        alike = np.delete(order, left_out).reshape(-1, self.num_replicas)
        shard: np.ndarray = rng.permuted(alike, axis=1)[:, self.rank]
        return shard

    def _config(self) -> dict[str, int]:
        return {"length": len(self), "num_replicas": self.num_replicas,
                "batch_size": self.batch_size, "seed": self.seed}  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The position, by the steps that were counted, and the running losses; not the schedule.

        The same on all ranks where all were given the same losses.
        """
        losses = [None if a is None else torch.tensor(a) for a in (self._losses, self._ranked)]
        return {"steps": self.steps, "begin": self._begin, "passes": self._passes,
                "samples": len(self._given), "losses": losses[0], "ranked": losses[1],
                **self._config()}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where the state was taken; the next iteration is the rest of its pass.

        Raises:
            ValueError: the state is not of such a sampler: of as many samples, and, within a pass,
                of the same num_replicas, batch_size, drop_last and seed. All is as it was then.
        """
        op = "CurriculumSampler.load_state_dict"
        if not isinstance(state, Mapping) or state.keys() != _STATE:
            raise ValueError(f"{op}: state must be what state_dict returned, got {state!r}")
        for name in _STATE - {"losses", "ranked"}:
            check_whole(op, name, state[name], 0)
        losses, ranked = (
            None if value is None else numbers(op, name, value)
            for name, value in (("losses", state["losses"]), ("ranked", state["ranked"]))
        )
        within = (state["steps"] - state["begin"]) * state["batch_size"] < state["length"]
        ours = {"samples": len(self._given)} | (self._config() if within else {})
        for name, value in ours.items():
            if state[name] != value:
                raise ValueError(f"{op}: {name} must be {value} here, got {state[name]}")
        if any(kept is not None and len(kept) != len(self._given) for kept in (losses, ranked)):
            raise ValueError(f"{op}: losses and ranked must be of {len(self._given)} samples")
        self.steps, self._begin, self._passes = (state[k] for k in ("steps", "begin", "passes"))
        self._losses, self._ranked = losses, ranked
        self._resumed, self._exhausted = within, False
