"""The blocks that run in lockstep: registers, shared and local memory, who waits where."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ptx.emulator.checks import Actors, Shadow
from ptx.emulator.instructions import numpy_type
from ptx.emulator.parser import Kernel, Variable

# Lanes of a batch: None for all of them, else their indices in ascending order.
Lanes = np.ndarray | None

GAP = 16  # unused bytes between two variables in shared and local memory


def _aligned(offset: int, align: int) -> int:
    return -(-offset // align) * align


class Layout:
    """Offsets of the variables of one memory space, with gaps that catch overruns."""

    def __init__(self, variables: Sequence[Variable], dynamic_bytes: int = 0) -> None:
        self.offsets: dict[str, int] = {}
        self.static_bytes = 0  # without the gaps
        ranges = []
        offset = GAP
        dynamic: int | None = None  # extern arrays are all the same memory
        for v in variables:
            if not v.size and dynamic is not None:
                self.offsets[v.name] = dynamic
                continue
            size = v.size or dynamic_bytes
            # An odd multiple of the alignment, so that no wider access happens to be aligned.
            self.offsets[v.name] = start = _aligned(offset, 2 * v.align) + v.align
            ranges.append((start, start + size))
            offset = start + size + GAP
            if v.size:
                self.static_bytes = _aligned(self.static_bytes, v.align) + size
            else:
                dynamic = start
        self.stride = _aligned(offset, 16)
        self.inside = np.zeros(self.stride + 1, bool)
        for start, end in ranges:
            self.inside[start:end] = True


class Batch:
    """One array element per lane. Lanes are the threads of the blocks, block after block."""

    def __init__(
        self,
        kernel: Kernel,
        blocks: np.ndarray,  # [blocks] linear indices
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        params: np.ndarray,  # bytes, padded for wide words
        param_bytes: int,
        shared: Layout,
        local: Layout,
        module_variables: dict[str, int],  # addresses of __device__ and __constant__ ones
    ) -> None:
        threads = block[0] * block[1] * block[2]
        warps = -(-threads // 32)
        count = len(blocks)
        self.kernel = kernel
        self.grid, self.block_shape = grid, block
        self.lanes = count * threads
        self.threads, self.warps = threads, warps
        self.blocks = blocks
        self.params, self.param_bytes = params, param_bytes
        self.globals = module_variables
        self.registers: list[np.ndarray | None] = [None] * len(kernel.registers)
        self.unset: dict[int, np.ndarray] = {}
        self.slot = np.repeat(np.arange(count), threads)  # of the lane's block in the batch
        self.tid = np.tile(np.arange(threads), count)  # in the block
        self.warp_slot = self.slot * warps + self.tid // 32
        self.lane = self.tid % 32
        self.exited = np.zeros(self.lanes, bool)
        self.barrier_time = np.zeros(count, np.int32)
        self.known = np.zeros((count * warps, 32, 32), np.int32)
        self.shared_layout, self.local_layout = shared, local
        self.shared = np.full(count * shared.stride, 0xA5, np.uint8)
        self.shared_shadow = Shadow(0, len(self.shared), written=False)
        self.local = np.full(self.lanes * local.stride, 0xA5, np.uint8)
        self.local_written = np.zeros(len(self.local), bool)
        self._specials: dict[str, np.ndarray] = {}
        block_index = blocks[self.slot]
        self._everyone = Actors(
            thread=block_index * threads + self.tid,
            warp=block_index * warps + self.tid // 32,
            lane=self.lane,
            block=block_index,
            barrier=self.barrier_time[self.slot],
            warp_slot=self.warp_slot,
            known=self.known,
            threads_per_block=threads,
            warps_per_block=warps,
        )

    def actors(self, lanes: Lanes) -> Actors:
        return self._everyone if lanes is None else self._everyone.take(lanes)

    def all_lanes(self, lanes: Lanes) -> np.ndarray:
        return np.arange(self.lanes) if lanes is None else lanes

    def pass_barrier(self, slots: np.ndarray, now: int) -> None:
        """Orders all that the threads of these blocks did before `now`."""
        self.barrier_time[slots] = now
        self._everyone = self._everyone._replace(barrier=self.barrier_time[self.slot])

    def register(self, index: int) -> np.ndarray:
        found = self.registers[index]
        if found is None:
            found = np.zeros(self.lanes, numpy_type(self.kernel.registers[index]))
            self.registers[index] = found
        return found

    def special(self, name: str) -> np.ndarray | None:
        """A special register by its name, e.g. %tid.x; None if there is no such register."""
        if name not in self._specials:
            found = self._make_special(name)
            if found is None:
                return None
            self._specials[name] = found.astype(np.uint32)
        return self._specials[name]

    def _make_special(self, name: str) -> np.ndarray | None:
        base, _, axis = name.partition(".")
        if axis in ("x", "y", "z"):
            i = "xyz".index(axis)
            before = [1, self.block_shape[0], self.block_shape[0] * self.block_shape[1]]
            rows = [1, self.grid[0], self.grid[0] * self.grid[1]]
            if base == "%tid":
                return self.tid // before[i] % self.block_shape[i]
            if base == "%ctaid":
                return self.blocks[self.slot] // rows[i] % self.grid[i]
            if base in ("%ntid", "%nctaid"):
                shape = self.block_shape if base == "%ntid" else self.grid
                return np.full(self.lanes, shape[i])
        bit = np.uint32(1) << self.lane.astype(np.uint32)
        table = {
            "%laneid": self.lane,
            "%warpid": self.tid // 32,
            "%lanemask_eq": bit,
            "%lanemask_lt": bit - np.uint32(1),
            "%lanemask_le": bit | (bit - np.uint32(1)),
            "%lanemask_gt": ~(bit | (bit - np.uint32(1))),
            "%lanemask_ge": ~(bit - np.uint32(1)),
        }
        return table.get(name)
