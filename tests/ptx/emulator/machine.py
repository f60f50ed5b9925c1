"""Runs kernels: launches in batches of blocks, lanes at the lowest instruction first.

A group is the lanes that stand at one basic block. The group furthest back runs to the end of its
block and joins the lanes already there, so divergent lanes meet again where their paths do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ptx.emulator import collectives
from ptx.emulator.batch import Batch, Lanes, Layout
from ptx.emulator.checks import Violation
from ptx.emulator.compiler import Program, compile_kernel
from ptx.emulator.counts import Launch
from ptx.emulator.memory import Memory
from ptx.emulator.parser import Instruction, Kernel, Module
from ptx.emulator.toolchain import ROOT, demangled

BATCH_LANES = 4096


@dataclass
class Target:
    """The limits that launches are checked against: those of sm_90, but for shared memory beyond
    the default, where sm_75, which gradfuse supports, has least."""

    threads: int = 1024
    block: tuple[int, int, int] = (1024, 1024, 64)
    grid: tuple[int, int, int] = (2**31 - 1, 65535, 65535)
    shared_bytes: int = 48 * 1024
    shared_bytes_asked_for: int = 64 * 1024
    parameter_bytes: int = 32764


class Machine:
    """An emulated device: memory, the record of its launches, the order blocks run in."""

    def __init__(self, order: str = "forward", budget: int = 2_000_000_000) -> None:
        self.memory = Memory()
        self.target = Target()
        self.order = order  # of blocks: forward, backward or shuffled
        self.budget = budget  # thread-instructions a launch may take
        self.only_blocks: Callable[[str, int], bool] | None = None  # (kernel, block) to run
        self.time = 0
        self.launch_time = 0
        self.launches: list[Launch] = []
        self.record = Launch("", (0, 0, 0), (0, 0, 0), 0, 0)
        self.shared_bytes_allowed: dict[str, int] = {}
        self._programs: dict[tuple[int, str], Program] = {}
        self._globals: dict[str, np.ndarray] = {}
        self._modules: list[Module] = []  # kept alive, so that their ids stay theirs

    def where(self, instruction: Instruction, batch: Batch, lane: int) -> str:
        """kernel, file:line, block and thread, for messages."""
        lines = instruction.location.lines() if instruction.location else ["?"]
        own = [line.replace(f"{ROOT}/", "") for line in lines if line.startswith(f"{ROOT}/")]
        chain = ", from ".join(own or lines[:1])
        block, thread = int(batch.blocks[batch.slot[lane]]), int(batch.tid[lane])
        return f"{demangled(batch.kernel.name)} at {chain}, block {block} thread {thread}"

    # Launching

    def launch(
        self,
        module: Module,
        name: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        params: bytes,
        dynamic_bytes: int = 0,
        stream: int = 0,
    ) -> Launch:
        """Runs a kernel to its end; raises Violation if a check fails."""
        self.record = Launch(demangled(name), grid, block, dynamic_bytes, stream)
        self.record.parameter_bytes = len(params)
        self.launches.append(self.record)
        kernel = module.kernel(name)
        shared = Layout([v for v in kernel.variables if v.space == "shared"], dynamic_bytes)
        local = Layout([v for v in kernel.variables if v.space == "local"])
        self._check_launch(kernel, grid, block, len(params))
        self._check_shared(kernel, shared.static_bytes, dynamic_bytes)
        program = self._program(module, name)
        addresses = {
            v.name: self._global(v) for v in kernel.variables if v.space in ("global", "const")
        }
        self.time += 1
        self.launch_time = self.time
        padded = np.frombuffer(params.ljust(-(-len(params) // 8) * 8 + 8, b"\0"), np.uint8)
        blocks = self._ordered(grid[0] * grid[1] * grid[2], self.record.kernel)
        size = max(1, BATCH_LANES // (block[0] * block[1] * block[2]))
        for first in range(0, len(blocks), size):
            some = blocks[first : first + size]
            batch = Batch(kernel, some, grid, block, padded, len(params), shared, local, addresses)
            with np.errstate(all="ignore"):
                self._run(program, batch)
        self._count_distinct()
        return self.record

    def _ordered(self, count: int, kernel: str) -> np.ndarray:
        blocks = np.arange(count)
        if self.only_blocks:
            keep = self.only_blocks
            blocks = np.array([b for b in blocks.tolist() if keep(kernel, b)], np.int64)
        if self.order == "backward":
            return blocks[::-1].copy()
        if self.order == "shuffled":
            return np.random.default_rng(count).permutation(blocks)
        return blocks

    def _check_launch(self, kernel: Kernel, grid, block, param_bytes: int) -> None:
        name, target = demangled(kernel.name), self.target

        def check(holds: bool, rule: str, text: str) -> None:
            if not holds:
                raise Violation(rule, f"{name}: {text}")

        threads = block[0] * block[1] * block[2]
        inside = all(1 <= g <= limit for g, limit in zip(grid, target.grid, strict=True))
        check(inside, "launch", f"expected a grid within {target.grid}, got {grid}")
        inside = all(1 <= b <= limit for b, limit in zip(block, target.block, strict=True))
        text = f"expected a block of 1 to {target.threads} threads, got {block}"
        check(inside and threads <= target.threads, "launch", text)
        if kernel.max_threads:
            x, y, z = kernel.max_threads
            most = x * y * z
            text = f"expected at most the {most} threads of its __launch_bounds__, got {threads}"
            check(threads <= most, "launch bounds", text)
            text = f"expected the {most} threads it was compiled for, got {threads}"
            check(threads == most or not kernel.exactly, "launch bounds", text)
        most = target.parameter_bytes
        text = f"expected at most {most} bytes of parameters, got {param_bytes}"
        check(param_bytes <= most, "launch", text)

    def _check_shared(self, kernel: Kernel, static: int, dynamic: int) -> None:
        """A kernel may ask for more dynamic shared memory than it gets by default."""
        name, target = demangled(kernel.name), self.target
        asked, rule = self.shared_bytes_allowed.get(kernel.name, 0), "shared memory size"
        if asked > target.shared_bytes_asked_for:
            raise Violation(
                rule,
                f"{name}: asks for {asked} bytes of shared memory, not all supported devices have "
                f"over {target.shared_bytes_asked_for}",
            )
        most = target.shared_bytes_asked_for if dynamic <= asked else target.shared_bytes
        if static + dynamic > most:
            raise Violation(
                rule,
                f"{name}: expected at most {most} bytes of shared memory, got {static + dynamic}",
            )

    def _global(self, variable) -> int:
        """The address of a __device__ or __constant__ variable, made when first used."""
        if variable.name not in self._globals:
            content = np.zeros(variable.size + 512, np.uint8)
            # An odd multiple of its alignment, so that no wider access happens to be aligned.
            start = -content.ctypes.data % 256 + variable.align
            content[start : start + variable.size] = np.frombuffer(variable.content, np.uint8)
            self._globals[variable.name] = content[start:]
            self.memory.add(content.ctypes.data + start, variable.size, variable.name, True)
        return self._globals[variable.name].ctypes.data

    def _count_distinct(self) -> None:
        traffic = self.record.traffic
        for buffer in self.memory:
            shadow, since = buffer.shadow, self.launch_time
            stored = np.count_nonzero(np.maximum(shadow.store_time, shadow.atomic_time) > since)
            loaded = np.count_nonzero(np.maximum(shadow.load_time, shadow.atomic_time) > since)
            if loaded:
                traffic.distinct_loaded[buffer.name] += loaded * shadow.cell
            if stored:
                traffic.distinct_stored[buffer.name] += stored * shadow.cell

    # Running

    def _run(self, program: Program, batch: Batch) -> None:
        for index in program.suspects:
            batch.unset[index] = np.ones(batch.lanes, bool)
        groups: dict[int, Lanes] = {0: None}
        parked: dict[int, Lanes] = {}
        while groups:
            pc = min(groups)
            lanes = groups.pop(pc)
            if pc in program.collective:
                lanes = join(batch, lanes, parked.pop(pc, _NOBODY))
                lanes = self._gather(program.collective[pc], batch, lanes, parked, pc)
                if lanes is not None and not len(lanes):
                    continue
            code = program.code[pc]
            running = batch.lanes if lanes is None else len(lanes)
            self.record.instructions += code.count * running
            self.record.float64 += code.float64 * running
            if self.record.instructions > self.budget:
                raise Violation(
                    "instruction budget",
                    f"{demangled(batch.kernel.name)}: expected to end within {self.budget} "
                    "instructions; does it loop for ever?",
                )
            for step in code.steps:
                step(batch, lanes)
            for target, who in code.end(batch, lanes):
                if target in groups:
                    groups[target] = join(batch, who, groups[target])
                else:
                    groups[target] = who
        if parked:
            self._report_stuck(program, batch, parked)

    @staticmethod
    def _gather(collective, batch: Batch, lanes: Lanes, parked: dict, pc: int) -> Lanes:
        """The lanes that may go on; the others stay parked."""
        if lanes is None and collective.is_complete(batch):
            return None
        everyone = batch.all_lanes(lanes)
        ready = collective.ready(batch, everyone)
        if ready.all():
            return lanes
        parked[pc] = everyone[~ready]
        return everyone[ready]

    def _report_stuck(self, program: Program, batch: Batch, parked: dict[int, Lanes]) -> None:
        """Raises for lanes that wait for others at a barrier or shuffle when no lane can run."""
        pc = min(parked)
        lanes = parked[pc]
        assert lanes is not None
        waiting = program.collective[pc]
        waiting.ready(batch, lanes)  # is more precise, if lanes have exited since
        lane = int(lanes[0])
        same_block = batch.slot == batch.slot[lane]
        gone = int(np.count_nonzero(batch.exited & same_block))
        here = int(np.count_nonzero(same_block[lanes]))
        check = "divergent barrier" if isinstance(waiting, collectives.Barrier) else "shuffle mask"
        raise Violation(
            check,
            f"{self.where(waiting.instruction, batch, lane)}: {here} lanes wait at "
            f"{waiting.instruction.name} for {waiting.waits_for} that do not come: {gone} of the "
            f"block's {batch.threads} threads have exited, "
            f"{batch.threads - gone - here} wait elsewhere",
        )

    def _program(self, module: Module, name: str) -> Program:
        key = id(module), name
        if key not in self._programs:
            self._modules.append(module)
            self._programs[key] = compile_kernel(self, module.kernel(name))
        return self._programs[key]


_NOBODY = np.zeros(0, np.int64)


def join(batch: Batch, a: Lanes, b: Lanes) -> Lanes:
    """Two groups as one."""
    if a is None or b is None:
        return None
    both = np.concatenate([a, b]) if len(b) else a
    both.sort()
    return None if len(both) == batch.lanes else both


def run_ptx(
    text: str, name: str, threads: int, *buffers: np.ndarray, machine: Machine | None = None
):
    """Runs a kernel of one block on arrays, whose addresses are its parameters."""
    machine = machine or Machine()
    for i, b in enumerate(buffers):
        machine.memory.add(b.ctypes.data, b.nbytes, f"buffer {i}", True)
    params = b"".join(int(b.ctypes.data).to_bytes(8, "little") for b in buffers)
    return machine.launch(Module(text), name, (1, 1, 1), (threads, 1, 1), params)
