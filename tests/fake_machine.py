"""A machine for tests of the bench: only what runs on it moves its clock."""

from __future__ import annotations

from gradfuse.bench.harness import Contender, Target, Workload


class FakeMachine:
    """A clock that only the contenders move, on a machine that slows down with every call."""

    def __init__(self, slowdown: float = 1.0) -> None:
        self.now = 0.0
        self.pace = 1.0
        self.slowdown = slowdown
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def contender(self, name: str, seconds: float) -> Contender:
        def run() -> None:
            self.now += seconds * self.pace
            self.calls.append(name)

        return Contender(name, run)

    def next_round(self, contenders: int) -> None:
        if len(self.calls) % contenders == 0:
            self.pace *= self.slowdown


def fake_workload(machine: FakeMachine) -> Workload:
    seconds = {"stock": 2.0, "ours": 1.0, "loop": 4.0, "floor": 0.5}
    return Workload(
        name="fake",
        dtype="float32",
        contenders=[machine.contender(name, s) for name, s in seconds.items()],
        bytes_moved=3_000_000_000,
        baseline="stock",
        floor="floor",
        prepare=lambda: machine.next_round(4),
        targets={"ours": Target(2.0, 2.0), "loop": Target(1.0), "stock": Target(0.5, 3.9)},
    )
