"""Global memory: the buffers that kernels may touch, and loads and stores at host addresses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from ptx.emulator.checks import Shadow

_LOW = 1 << 16  # no buffer lies below
_HIGH = 1 << 47


class _WholeMemory:
    """All addresses as one array of a type, so that lanes anywhere are one numpy index."""

    def __init__(self, kind: str, size: int) -> None:
        count = (_HIGH - _LOW) // size
        self.__array_interface__ = {
            "data": (_LOW, False),
            "shape": (count,),
            "typestr": kind,
            "version": 3,
        }


_WORDS = {s: np.asarray(_WholeMemory(f"<u{s}" if s > 1 else "|u1", s)) for s in (1, 2, 4, 8)}


def load_words(addresses: np.ndarray, size: int) -> np.ndarray:
    """Unsigned words of `size` bytes at aligned host addresses. The caller has checked them."""
    return _WORDS[size][(addresses - _LOW) // size]


def store_words(addresses: np.ndarray, words: np.ndarray) -> None:
    _WORDS[words.itemsize][(addresses - _LOW) // words.itemsize] = words


class Buffer:
    """A run of memory that kernels may touch."""

    def __init__(self, start: int, size: int, name: str, written: bool) -> None:
        self.start = start
        self.size = size
        self.name = name
        self.shadow = Shadow(start, size, written)

    @property
    def end(self) -> int:
        return self.start + self.size

    def stored(self) -> np.ndarray:
        """By byte, whether a kernel has stored to it."""
        shadow = self.shadow
        cells = np.maximum(shadow.store_time, shadow.atomic_time) > 0
        skip = self.start - shadow.start
        return np.repeat(cells, shadow.cell)[skip : skip + self.size]

    def __repr__(self) -> str:
        return f"{self.name} ({self.size} bytes)"


class Memory:
    """The buffers, by address. They do not overlap."""

    def __init__(self) -> None:
        self._buffers: list[Buffer] = []
        self._starts = np.zeros(0, np.int64)
        self._ends = np.zeros(0, np.int64)

    def add(self, start: int, size: int, name: str, written: bool) -> Buffer:
        buffer = Buffer(start, size, name, written)
        if size:
            self._buffers.append(buffer)
            self._index()
        return buffer

    def add_all(self, buffers: list[Buffer]) -> None:
        self._buffers += [b for b in buffers if b.size]
        self._index()

    def remove(self, start: int) -> None:
        self._buffers = [b for b in self._buffers if b.start != start]
        self._index()

    def remove_all(self, buffers: list[Buffer]) -> None:
        gone = set(map(id, buffers))
        self._buffers = [b for b in self._buffers if id(b) not in gone]
        self._index()

    def _index(self) -> None:
        self._buffers.sort(key=lambda b: b.start)
        self._starts = np.array([b.start for b in self._buffers], np.int64)
        self._ends = np.array([b.end for b in self._buffers], np.int64)

    def __iter__(self) -> Iterator[Buffer]:
        return iter(self._buffers)

    def at(self, address: int) -> Buffer | None:
        """The buffer that holds this address."""
        found = int(np.searchsorted(self._starts, address, "right")) - 1
        if found < 0 or address >= self._buffers[found].end:
            return None
        return self._buffers[found]

    def outside(self, addresses: np.ndarray, width: int) -> int | None:
        """The first lane whose bytes do not lie in one buffer."""
        if not len(self._starts):
            return 0
        index = np.searchsorted(self._starts, addresses, "right") - 1
        inside = (index >= 0) & (addresses + width <= self._ends[index])
        return None if inside.all() else int(np.argmin(inside))

    def runs(
        self, addresses: np.ndarray, width: int
    ) -> Iterator[tuple[Buffer, np.ndarray | slice]]:
        """Splits lanes, all of them inside, by buffer: (buffer, lanes). If their addresses form a
        few dense runs, yields each run by itself."""
        breaks = np.flatnonzero(np.diff(addresses) != width) + 1
        if len(breaks) < 16:
            edges = [0, *breaks.tolist(), len(addresses)]
            for begin, end in itertools.pairwise(edges):
                first, last = self.at(int(addresses[begin])), self.at(int(addresses[end - 1]))
                assert first
                if first is last:
                    yield first, slice(begin, end)
                else:  # buffers that touch each other
                    yield from self._by_buffer(addresses, np.arange(begin, end))
        else:
            yield from self._by_buffer(addresses, np.arange(len(addresses)))

    def _by_buffer(self, addresses: np.ndarray, lanes: np.ndarray) -> Iterator:
        index = np.searchsorted(self._starts, addresses[lanes], "right") - 1
        for found in np.unique(index):
            yield self._buffers[found], lanes[index == found]

    def describe(self, address: int) -> str:
        """Where an address lies, in words."""
        nearest: tuple[int, str] | None = None
        for b in self._buffers:
            if address >= b.end:
                distance, text = address - b.end, f"{address - b.end} bytes past the end of {b}"
            elif address < b.start:
                distance, text = b.start - address, f"{b.start - address} bytes before {b}"
            else:
                distance, text = 0, f"at byte {address - b.start} of {b}"
            if nearest is None or distance < nearest[0]:
                nearest = distance, text
        if nearest is None or nearest[0] > 1 << 20:
            return f"address {address:#x} is near no buffer"
        return nearest[1]
