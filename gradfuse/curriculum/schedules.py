"""Schedules: the share of the data that a step draws from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradfuse.ops.checks import check_whole, is_number

__all__ = ["BabySteps", "Competence", "check_share"]


@dataclass(frozen=True)
class Competence:
    """The share (t (1 - start^power) / steps + start^power)^(1 / power) of step t, at most 1.

    Args:
        steps: steps until the pool is all of the data, >= 1.
        start: the share of step 0, in (0, 1].
        power: > 0. 1 adds samples at a constant pace, 2 at one inverse to the size of the pool.

    Source: Platanios et al. 2019, "Competence-based Curriculum Learning for Neural Machine
    Translation", the root family of competence functions.
    """

    steps: int
    start: float = 0.01
    power: float = 2.0

    def __post_init__(self) -> None:
        check_whole("Competence", "steps", self.steps, 1)
        check_share("Competence", "start", self.start)
        if not is_number(self.power) or not 0.0 < self.power < math.inf:
            raise ValueError(f"Competence: power must be finite and > 0, got {self.power!r}")

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return 1.0
        first = math.pow(self.start, self.power)
        grown = math.pow(first + (1.0 - first) * step / self.steps, 1.0 / self.power)
        return max(self.start, grown)  # as start^power may underflow


@dataclass(frozen=True)
class BabySteps:
    """The share grows by 1 / stages at a time, at steps that are equally far apart.

    Args:
        steps: steps until the pool is all of the data, >= 1.
        stages: how many shares there are, >= 1.

    Source: Bengio et al. 2009, "Curriculum Learning"; Spitkovsky et al. 2010, "From Baby Steps to
    Leapfrog", whose stages accumulate the data.
    """

    steps: int
    stages: int = 5

    def __post_init__(self) -> None:
        check_whole("BabySteps", "steps", self.steps, 1)
        check_whole("BabySteps", "stages", self.stages, 1)

    def __call__(self, step: int) -> float:
        return min(self.stages, 1 + step * (self.stages - 1) // self.steps) / self.stages


def check_share(op: str, name: str, value: float) -> float:
    """value as a float; ValueError unless it is a number in (0, 1]."""
    if not is_number(value) or not 0.0 < value <= 1.0:
        raise ValueError(f"{op}: {name} must be in (0, 1], got {value!r}")
    return float(value)
