"""Shadow memory: which bytes have been written, and which accesses race.

Two accesses race if different threads touch the same bytes, one of them stores, not both are
atomic, and nothing orders them: no __syncthreads (same block) and no __syncwarp (same warp) since.
Blocks are ordered by the end of a launch only. Races are found from what each thread did, not from
values, so the order in which the lanes happen to run does not matter.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Violation(Exception):
    """Something a kernel must not do. `check` names the rule, the message says where."""

    def __init__(self, check: str, message: str) -> None:
        super().__init__(message)
        self.check = check


class Actors(NamedTuple):
    """The threads behind the lanes of an access, and what is known to have happened before it."""

    thread: np.ndarray  # [lanes] in the launch
    warp: np.ndarray  # [lanes] in the launch
    lane: np.ndarray  # [lanes] in the warp
    block: np.ndarray  # [lanes] in the launch
    barrier: np.ndarray  # [lanes] time of the block's last __syncthreads
    warp_slot: np.ndarray  # [lanes] row of `known`
    known: np.ndarray  # [warps, lane, other lane] time up to which a lane knows another's accesses
    threads_per_block: int
    warps_per_block: int

    def take(self, lanes: np.ndarray | slice) -> Actors:
        return self._replace(
            thread=self.thread[lanes],
            warp=self.warp[lanes],
            lane=self.lane[lanes],
            block=self.block[lanes],
            barrier=self.barrier[lanes],
            warp_slot=self.warp_slot[lanes],
        )


class Conflict(NamedTuple):
    """A race: the lane of the access, the other thread, and what that one did."""

    lane: int
    other_thread: int | None
    what: str


# Who loaded a cell, or changed it atomically, since the last event that ordered it: a warp or a
# thread, or one of these.
SEVERAL_BLOCKS = -1


def several_of(block: np.ndarray) -> np.ndarray:
    """Several warps or threads of one block."""
    return -(block + 2)


def block_of(who: np.ndarray, per_block: int) -> np.ndarray:
    """The block of a warp or thread, or of several of one block; -1 for several blocks."""
    return np.where(who >= 0, who // per_block, -who - 2)


class Shadow:
    """The history of a run of bytes, in cells of 4 bytes, or smaller ones after a narrower
    access."""

    def __init__(self, start: int, size: int, written: bool) -> None:
        self.start = start // 16 * 16
        self.cell = 4
        cells = (start + size - self.start + 3) // 4
        self.written = np.full(cells, written)
        self.store_time = np.zeros(cells, np.int32)
        self.store_thread = np.zeros(cells, np.int64)
        self.atomic_time = np.zeros(cells, np.int32)
        self.atomic_thread = np.zeros(cells, np.int64)
        self.load_time = np.zeros(cells, np.int32)
        self.load_warp = np.zeros(cells, np.int64)
        self.load_lanes = np.zeros(cells, np.uint32)

    _ARRAYS = (
        *("written", "store_time", "store_thread", "atomic_time", "atomic_thread"),
        *("load_time", "load_warp", "load_lanes"),
    )

    def refine(self, width: int) -> None:
        """Makes the cells as small as an access of this many bytes needs."""
        if width < self.cell:
            for name in self._ARRAYS:
                setattr(self, name, np.repeat(getattr(self, name), self.cell // width))
            self.cell = width

    def cells(self, addresses: np.ndarray, width: int) -> np.ndarray | slice:
        """The cells of each lane's bytes: an index array [lanes, n], or a slice where lanes follow
        each other without a gap."""
        self.refine(width)
        first = (addresses - self.start) // self.cell
        count = width // self.cell
        if len(first) == 1 or np.all(np.diff(first) == count):
            return slice(int(first[0]), int(first[-1]) + count)
        return first[:, None] + np.arange(count)

    def mark_written(self, start: int, size: int) -> None:
        """Records a copy or a fill by the host."""
        self.refine(1 if (start | size) % 4 else 4)
        begin = (start - self.start) // self.cell
        self.written[begin : begin + -(-size // self.cell)] = True

    def is_written(self, start: int, size: int) -> bool:
        begin = (start - self.start) // self.cell
        return bool(self.written[begin : begin + -(-size // self.cell)].all())

    def unwritten_lane(self, cells: np.ndarray | slice, lanes: int) -> int | None:
        """The first lane that reads what was never written."""
        written = self.written[cells]
        if written.all():
            return None
        return int(np.argmin(written.reshape(lanes, -1).all(axis=1)))

    def load(self, cells, actors: Actors, now: int, since: int) -> Conflict | None:
        """Records a load. `since` is when the launch began: older accesses are ordered."""
        found = self._against_stores(cells, actors, since, atomics=True)
        if found is None:
            self._record_load(cells, actors, now, since)
        return found

    def store(self, cells, actors: Actors, now: int, since: int) -> Conflict | None:
        """Records a store."""
        found = self._against_stores(cells, actors, since, atomics=True)
        found = found or self._against_loads(cells, actors, since)
        thread = self._per_cell(actors.thread, cells)
        self._put(self.store_thread, cells, thread)
        self.store_time[cells] = now
        self.written[cells] = True
        if found is None and not isinstance(cells, slice):
            lost = self.store_thread[cells] != thread
            if lost.any():
                lane = int(np.argmax(lost.any(axis=1)))
                other = int(self.store_thread[cells][lane][np.argmax(lost[lane])])
                return Conflict(lane, other, "stored in the same instruction")
        return found

    def atomic(self, cells, actors: Actors, now: int, since: int) -> Conflict | None:
        """Records an atomic access, which races only with loads and stores."""
        found = self._against_stores(cells, actors, since, atomics=False)
        found = found or self._against_loads(cells, actors, since)
        thread = self._per_cell(actors.thread, cells)
        block, barrier = actors.block[:, None], actors.barrier[:, None]
        time, old = (
            self._get(a, cells, len(thread)) for a in (self.atomic_time, self.atomic_thread)
        )
        same_block = block_of(old, actors.threads_per_block) == block
        stale = (time <= since) | (same_block & (time < barrier))
        many = np.where(same_block, several_of(block), SEVERAL_BLOCKS)
        new = np.where(stale | (old == thread), thread, many)
        self._put_all(self.atomic_thread, cells, new, actors.block, actors.threads_per_block)
        self.atomic_time[cells] = now
        self.written[cells] = True
        return found

    def _put_all(
        self, array: np.ndarray, cells, new: np.ndarray, block: np.ndarray, per_block: int
    ):
        """Records who touched the cells: several where lanes of this access share one."""
        self._put(array, cells, new)
        if isinstance(cells, slice):
            return
        kept = array[cells]
        lost = kept != new
        if lost.any():
            block = np.broadcast_to(block[:, None], cells.shape)
            same = block_of(kept, per_block) == block
            array[cells[lost & same]] = several_of(block[lost & same])
            array[cells[lost & ~same]] = SEVERAL_BLOCKS

    @staticmethod
    def _per_cell(of_lane: np.ndarray, cells) -> np.ndarray:
        """A value of each lane for each of its cells."""
        shape = Shadow._shape(cells, len(of_lane))
        return np.broadcast_to(of_lane[:, None], shape)

    @staticmethod
    def _get(array: np.ndarray, cells, lanes: int) -> np.ndarray:
        return array[cells].reshape(Shadow._shape(cells, lanes))

    @staticmethod
    def _put(array: np.ndarray, cells, values: np.ndarray) -> None:
        array[cells] = values.reshape(-1) if isinstance(cells, slice) else values

    @staticmethod
    def _shape(cells, lanes: int) -> tuple[int, int]:
        return (
            (lanes, (cells.stop - cells.start) // lanes)
            if isinstance(cells, slice)
            else cells.shape
        )

    def _against_stores(self, cells, actors: Actors, since: int, atomics: bool) -> Conflict | None:
        found = self._against(self.store_time, self.store_thread, cells, actors, since, "stored")
        if found is None and atomics:
            found = self._against(
                self.atomic_time, self.atomic_thread, cells, actors, since, "changed atomically"
            )
        return found

    def _against(self, times, threads, cells, actors: Actors, since: int, what: str):
        time = times[cells]
        if time.max(initial=0) <= since:
            return None
        lanes = len(actors.thread)
        time, thread = time.reshape(lanes, -1), threads[cells].reshape(lanes, -1)
        row, column = np.nonzero((time > since) & (thread != actors.thread[:, None]))
        if not len(row):
            return None
        time, other = time[row, column], thread[row, column]
        who = actors.take(row)
        same_block = block_of(other, actors.threads_per_block) == who.block
        in_block = other % actors.threads_per_block
        same_warp = in_block // 32 == who.warp % actors.warps_per_block
        same_warp &= same_block & (other >= 0)
        known = actors.known[who.warp_slot, who.lane, in_block % 32]
        ordered = (same_block & (who.barrier > time)) | (same_warp & (known > time))
        if ordered.all():
            return None
        first = int(np.argmin(ordered))
        whom = int(other[first]) if other[first] >= 0 else None
        return Conflict(int(row[first]), whom, what)

    def _against_loads(self, cells, actors: Actors, since: int) -> Conflict | None:
        time = self.load_time[cells]
        if time.max(initial=0) <= since:
            return None
        lanes = len(actors.thread)
        time = time.reshape(lanes, -1)
        warp, mask = (
            self.load_warp[cells].reshape(lanes, -1),
            self.load_lanes[cells].reshape(lanes, -1),
        )
        mine = np.uint32(1) << actors.lane.astype(np.uint32)
        alone = (warp == actors.warp[:, None]) & (mask == mine[:, None])
        row, column = np.nonzero((time > since) & ~alone)
        if not len(row):
            return None
        time, warp, mask = time[row, column], warp[row, column], mask[row, column]
        who = actors.take(row)
        same_block = block_of(warp, actors.warps_per_block) == who.block
        others = (mask[:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(bool)
        others[np.arange(len(row)), who.lane] = False
        known = actors.known[who.warp_slot, who.lane] > time[:, None]
        same_warp = (warp == who.warp) & (known | ~others).all(axis=1)
        ordered = (same_block & (who.barrier > time)) | same_warp
        if ordered.all():
            return None
        first = int(np.argmin(ordered))
        other = None
        if warp[first] >= 0:
            block, index = divmod(int(warp[first]), actors.warps_per_block)
            other = block * actors.threads_per_block + 32 * index + int(np.argmax(others[first]))
        return Conflict(int(row[first]), other, "loaded")

    def _record_load(self, cells, actors: Actors, now: int, since: int) -> None:
        lanes = len(actors.thread)
        warp = self._per_cell(actors.warp, cells)
        bit = self._per_cell(np.uint32(1) << actors.lane.astype(np.uint32), cells)
        time = self._get(self.load_time, cells, lanes)
        if time.max(initial=0) > since:
            block, barrier = actors.block[:, None], actors.barrier[:, None]
            old = self._get(self.load_warp, cells, lanes)
            same_block = block_of(old, actors.warps_per_block) == block
            # Loads that a barrier ordered before this one can be forgotten: what is ordered after
            # this one is ordered after them too.
            stale = (time <= since) | (same_block & (time < barrier))
            many = np.where(same_block, several_of(block), SEVERAL_BLOCKS)
            new = np.where(stale | (old == warp), warp, many)
            known = actors.known[actors.warp_slot, actors.lane][:, None, :] > time[:, :, None]
            past = (known.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(
                axis=2, dtype=np.uint32
            )
            mask = self._get(self.load_lanes, cells, lanes) & ~past
            mask = np.where(stale, np.uint32(0), mask)
        else:
            new, mask = warp, np.zeros(warp.shape, np.uint32)
        self.load_time[cells] = now
        self._put_all(self.load_warp, cells, new, actors.block, actors.warps_per_block)
        if isinstance(cells, slice):
            self._put(self.load_lanes, cells, mask | bit)
        else:
            self.load_lanes[cells] = mask
            np.bitwise_or.at(self.load_lanes, cells, bit)
