"""What a launch did: instructions, barriers, and its traffic with global memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Request(NamedTuple):
    """One warp's execution of one load or store, as far as it touches one buffer."""

    buffer: str
    is_store: bool
    width: int  # bytes a lane
    lanes: int
    sectors: int  # of 32 bytes


@dataclass
class Traffic:
    """Bytes by buffer name and width of access; distinct bytes by buffer name; warp requests."""

    loaded: Counter[tuple[str, int]] = field(default_factory=Counter)
    stored: Counter[tuple[str, int]] = field(default_factory=Counter)
    distinct_loaded: Counter[str] = field(default_factory=Counter)
    distinct_stored: Counter[str] = field(default_factory=Counter)
    requests: Counter[Request] = field(default_factory=Counter)

    def __iadd__(self, other: Traffic) -> Traffic:
        for name in ("loaded", "stored", "distinct_loaded", "distinct_stored", "requests"):
            getattr(self, name).update(getattr(other, name))
        return self

    def bytes_loaded(self, prefix: str = "") -> int:
        return sum(n for (name, _), n in self.loaded.items() if name.startswith(prefix))

    def bytes_stored(self, prefix: str = "") -> int:
        return sum(n for (name, _), n in self.stored.items() if name.startswith(prefix))

    def widths(self, prefix: str = "", stores: bool = False) -> Counter[int]:
        """Bytes by width of access."""
        found: Counter[int] = Counter()
        for (name, width), n in (self.stored if stores else self.loaded).items():
            if name.startswith(prefix):
                found[width] += n
        return found

    def sector_bytes(self, buffers: Iterable[str], stores: bool) -> int:
        """Bytes of the 32-byte sectors that the requests of these buffers touch."""
        names = set(buffers)
        return sum(
            32 * r.sectors * n
            for r, n in self.requests.items()
            if r.is_store == stores and r.buffer in names
        )


@dataclass
class Launch:
    """The record of one launch."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    stream: int
    instructions: int = 0  # of one thread each
    float64: int = 0  # of them, arithmetic and conversions in float64
    barriers: int = 0  # of one block each
    parameter_bytes: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    first_touched: dict[str, int] = field(default_factory=dict)  # offset in each buffer


def sectors_of_warps(addresses: np.ndarray, warp_slot: np.ndarray) -> Counter:
    """(lanes, sectors) of each warp's request. Lanes are ordered by warp."""
    sector = addresses >> 5  # accesses are aligned, so none reaches into the next
    edges = np.flatnonzero(np.diff(warp_slot)) + 1
    begin = np.concatenate([[0], edges])
    lanes = np.diff(np.concatenate([begin, [len(addresses)]]))
    # A table [warp, lane] of sectors; missing lanes repeat the warp's first.
    row = np.repeat(np.arange(len(begin)), lanes)
    column = np.arange(len(addresses)) - np.repeat(begin, lanes)
    table = np.repeat(sector[begin][:, None], 32, axis=1)
    table[row, column] = sector
    table.sort(axis=1)
    sectors = 1 + np.count_nonzero(np.diff(table, axis=1), axis=1)
    return Counter(zip(lanes.tolist(), sectors.tolist(), strict=True))
