"""Loads, stores and atomics: addresses checked, races looked for, traffic counted, bytes moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ptx.emulator import memory as host
from ptx.emulator.batch import Batch, Lanes
from ptx.emulator.checks import Conflict, Shadow, Violation
from ptx.emulator.counts import Request, sectors_of_warps
from ptx.emulator.instructions import UNSIGNED, UnknownInstruction, numpy_type, opcode
from ptx.emulator.memory import Buffer
from ptx.emulator.operands import WINDOW, parts, reader, writer
from ptx.emulator.parser import SIZES, Address, Instruction

if TYPE_CHECKING:
    from ptx.emulator.compiler import Step
    from ptx.emulator.machine import Machine

SPACES = ("global", "shared", "local", "param", "const")
# What does not change the meaning of an access: volatility, scope, order, caching.
HINTS = frozenset(
    [
        "volatile",
        "relaxed",
        "weak",
        "acquire",
        "release",
        "acq_rel",
        "cta",
        "gpu",
        "sys",
        "nc",
        "ca",
        "cg",
        "cs",
        "lu",
        "cv",
        "wb",
        "wt",
    ]
)
VECTORS = {"v2": 2, "v4": 4, "v8": 8}
GLOBAL_END = 1 << 47


class Access:
    """The load, store or atomic of an instruction; its space may be known only at run time."""

    def __init__(self, machine: Machine, instruction: Instruction, address: Address, width: int):
        self.machine = machine
        self.instruction = instruction
        self.width = width
        self.verb = {"ld": "load", "st": "store"}.get(instruction.name.split(".")[0], "atomic")
        # Loads and stores with an order are atomic: they race only with plain ones.
        ordered = opcode(instruction.name).modifiers & {"relaxed", "acquire", "release"}
        self.is_atomic = self.verb == "atomic" or bool(ordered)
        self.offset = address.offset
        self._base = reader(address.base, "u64")

    def addresses(self, batch: Batch, lanes: Lanes) -> np.ndarray:
        base = np.broadcast_to(self._base(batch, lanes), len(batch.all_lanes(lanes)))
        return base.view(np.int64) + self.offset

    def fail(self, check: str, batch: Batch, lane: int, problem: str) -> None:
        raise Violation(check, self.machine.where(self.instruction, batch, lane) + ": " + problem)

    def check_alignment(
        self, batch: Batch, lanes: Lanes, addresses: np.ndarray, space: str
    ) -> None:
        odd = addresses % self.width
        if odd.any():
            at = int(np.argmax(odd != 0))
            self.fail(
                "misaligned", batch, int(batch.all_lanes(lanes)[at]),
                f"misaligned {space} {self.verb} of {self.width} bytes: "
                f"{int(odd[at])} bytes past a multiple",
            )  # fmt: skip

    def check_conflict(
        self, batch: Batch, lanes: np.ndarray, found: Conflict | None, space: str
    ) -> None:
        if found is None:
            return
        who = "several threads"
        if found.other_thread is not None:
            block, thread = divmod(found.other_thread, batch.threads)
            who = f"block {block} thread {thread}"
        self.fail(
            f"{space} race", batch, int(lanes[found.lane]),
            f"race in {space} memory: this {self.verb} of {self.width} bytes touches what {who} "
            f"{found.what}, and nothing orders the two",
        )  # fmt: skip

    # Global memory

    def check_global(self, batch: Batch, lanes: Lanes, addresses: np.ndarray) -> None:
        """Checks bounds, alignment, initialisation and races; counts the traffic."""
        memory = self.machine.memory
        everyone = batch.all_lanes(lanes)
        self.check_alignment(batch, lanes, addresses, "global")
        at = memory.outside(addresses, self.width)
        if at is not None:
            self.fail(
                "out of bounds", batch, int(everyone[at]),
                f"out-of-bounds global {self.verb} of {self.width} bytes "
                + memory.describe(int(addresses[at])),
            )  # fmt: skip
        machine = self.machine
        machine.time += 1
        actors = batch.actors(lanes)
        runs = list(memory.runs(addresses, self.width))
        self._count_requests(batch, everyone, addresses, runs)
        for buffer, run in runs:
            shadow = buffer.shadow
            cells = shadow.cells(addresses[run], self.width)
            machine.record.first_touched.setdefault(
                buffer.name, int(addresses[run][0]) - buffer.start
            )
            self._count_bytes(buffer, everyone[run])
            if self.verb != "store":
                self._check_written(shadow, cells, batch, everyone[run], repr(buffer))
            record = self._record(shadow)
            found = record(cells, actors.take(run), machine.time, machine.launch_time)
            self.check_conflict(batch, everyone[run], found, "global")

    def _record(self, shadow: Shadow) -> Callable:
        if self.is_atomic:
            return shadow.atomic
        return shadow.load if self.verb == "load" else shadow.store

    def _check_written(
        self, shadow: Shadow, cells, batch: Batch, lanes: np.ndarray, of: str
    ) -> None:
        at = shadow.unwritten_lane(cells, len(lanes))
        if at is not None:
            self.fail(
                "uninitialised", batch, int(lanes[at]),
                f"{self.verb} of {self.width} bytes that were never written, of {of}",
            )  # fmt: skip

    def _count_requests(
        self,
        batch: Batch,
        lanes: np.ndarray,
        addresses: np.ndarray,
        runs: list[tuple[Buffer, np.ndarray | slice]],
    ) -> None:
        requests = self.machine.record.traffic.requests
        if all(buffer is runs[0][0] for buffer, _ in runs):  # a run may begin inside a warp
            runs = [(runs[0][0], slice(None))]
        for buffer, run in runs:
            found = sectors_of_warps(addresses[run], batch.warp_slot[lanes[run]])
            for (count, sectors), n in found.items():
                request = Request(buffer.name, self.verb != "load", self.width, count, sectors)
                requests[request] += n

    def _count_bytes(self, buffer: Buffer, lanes: np.ndarray) -> None:
        traffic = self.machine.record.traffic
        key = (buffer.name, self.width)
        if self.verb != "store":
            traffic.loaded[key] += self.width * len(lanes)
        if self.verb != "load":
            traffic.stored[key] += self.width * len(lanes)

    # Shared and local memory: `own` is the address in the space, the result an index into its array

    def shared_index(self, batch: Batch, lanes: Lanes, own: np.ndarray) -> np.ndarray:
        layout, everyone = batch.shared_layout, batch.all_lanes(lanes)
        self.check_alignment(batch, lanes, own, "shared")
        self._check_inside(batch, everyone, own, layout.inside, "shared")
        index = batch.slot[everyone] * layout.stride + own
        shadow, machine = batch.shared_shadow, self.machine
        machine.time += 1
        cells = shadow.cells(index, self.width)
        if self.verb != "store":
            self._check_written(shadow, cells, batch, everyone, "shared memory")
        record = self._record(shadow)
        found = record(cells, batch.actors(lanes), machine.time, 0)
        self.check_conflict(batch, everyone, found, "shared")
        return index

    def local_index(self, batch: Batch, lanes: Lanes, own: np.ndarray) -> np.ndarray:
        layout, everyone = batch.local_layout, batch.all_lanes(lanes)
        self.check_alignment(batch, lanes, own, "local")
        self._check_inside(batch, everyone, own, layout.inside, "local")
        index = everyone * layout.stride + own
        touched = index[:, None] + np.arange(self.width)
        if self.verb == "load":
            written = batch.local_written[touched].all(axis=1)
            if not written.all():
                self.fail(
                    "uninitialised", batch, int(everyone[np.argmin(written)]),
                    f"load of {self.width} bytes that were never written, of local memory",
                )  # fmt: skip
        batch.local_written[touched] = True
        return index

    def _check_inside(self, batch: Batch, lanes, own: np.ndarray, inside: np.ndarray, space: str):
        last = len(inside) - 1  # never inside
        ends = np.minimum(own + self.width - 1, last)
        good = (own >= 0) & inside[np.clip(own, 0, last)] & inside[np.clip(ends, 0, last)]
        if not good.all():
            at = int(np.argmin(good))
            self.fail(
                "out of bounds", batch, int(lanes[at]),
                f"out-of-bounds {space} {self.verb} of {self.width} bytes at byte {int(own[at])}",
            )  # fmt: skip

    def split(self, space: str, batch: Batch, lanes: Lanes) -> Iterator:
        """(space, lanes, places of the lanes in the access or None for all, addresses there)."""
        addresses = self.addresses(batch, lanes)
        if space != "generic":
            yield space, lanes, None, addresses
            return
        if addresses.max(initial=0) < GLOBAL_END and addresses.min(initial=0) >= 0:
            yield "global", lanes, None, addresses
            return
        everyone = batch.all_lanes(lanes)
        left = np.ones(len(addresses), bool)
        for name, window in WINDOW.items():
            at = (addresses >= window) & (addresses < window + (1 << 32))
            left &= ~at
            if at.any():
                own = addresses[at] - (0 if name == "param" else window)
                yield name, everyone[at], np.flatnonzero(at), own
        if left.any():
            yield "global", everyone[left], np.flatnonzero(left), addresses[left]


def space_of(instruction: Instruction) -> str:
    op = opcode(instruction.name)
    unknown = op.modifiers - HINTS - set(SPACES) - set(VECTORS)
    if unknown or len(op.types) != 1:
        raise UnknownInstruction(instruction.name)
    space = op.one_of(*SPACES) or "generic"
    return "global" if space == "const" else space


def kind_of(instruction: Instruction) -> str:
    """The type of the instruction's words; half floats move as bits."""
    kind = opcode(instruction.name).type
    return "b16" if kind in ("f16", "bf16") else kind


def load(machine: Machine, instruction: Instruction) -> Step:
    space, kind = space_of(instruction), kind_of(instruction)
    size = SIZES[kind]
    writers = [writer(item) for item in parts(instruction.operands[0])]
    address = instruction.operands[1]
    assert isinstance(address, Address)
    access = Access(machine, instruction, address, size * len(writers))
    dtype = np.dtype(numpy_type(kind))

    def fetch(name: str, batch: Batch, lanes: Lanes, own: np.ndarray) -> list[np.ndarray]:
        starts = range(0, access.width, size)
        if name == "global":
            access.check_global(batch, lanes, own)
            return [host.load_words(own + s, size) for s in starts]
        if name == "param":
            offsets = own - WINDOW["param"]
            access.check_alignment(batch, lanes, offsets, "parameter")
            outside = (offsets < 0) | (offsets + access.width > batch.param_bytes)
            if outside.any():
                lane = int(batch.all_lanes(lanes)[np.argmax(outside)])
                access.fail("out of bounds", batch, lane, "out-of-bounds load of a parameter")
            return [batch.params.view(UNSIGNED[size])[(offsets + s) // size] for s in starts]
        index = access.shared_index if name == "shared" else access.local_index
        array = (batch.shared if name == "shared" else batch.local).view(UNSIGNED[size])
        at = index(batch, lanes, own)
        return [array[(at + s) // size] for s in starts]

    def step(batch: Batch, lanes: Lanes) -> None:
        for name, who, places, own in access.split(space, batch, lanes):
            words = fetch(name, batch, who, own)
            # Parts of a generic access go to the lanes they belong to.
            target = lanes if places is None else who
            for write, word in zip(writers, words, strict=True):
                write(batch, target, word.view(dtype))

    return step


def store(machine: Machine, instruction: Instruction) -> Step:
    space, kind = space_of(instruction), kind_of(instruction)
    if ".const" in instruction.name:
        raise UnknownInstruction(instruction.name)
    size = SIZES[kind]
    address, value = instruction.operands
    assert isinstance(address, Address)
    readers = [reader(item, kind) for item in parts(value)]
    access = Access(machine, instruction, address, size * len(readers))

    def put(
        name: str, batch: Batch, lanes: Lanes, own: np.ndarray, words: list[np.ndarray]
    ) -> None:
        if name == "param":
            lane = int(batch.all_lanes(lanes)[0])
            access.fail("out of bounds", batch, lane, "store to a parameter")
        if name == "global":
            access.check_global(batch, lanes, own)
            for i, word in enumerate(words):
                host.store_words(own + i * size, word)
            return
        index = access.shared_index if name == "shared" else access.local_index
        array = (batch.shared if name == "shared" else batch.local).view(UNSIGNED[size])
        at = index(batch, lanes, own)
        for i, word in enumerate(words):
            array[(at + i * size) // size] = word

    def step(batch: Batch, lanes: Lanes) -> None:
        count = len(batch.all_lanes(lanes))
        words = [
            np.broadcast_to(read(batch, lanes), count).view(UNSIGNED[size]) for read in readers
        ]
        for name, who, places, own in access.split(space, batch, lanes):
            put(name, batch, who, own, words if places is None else [w[places] for w in words])

    return step


TINY = np.finfo(np.float32).smallest_normal
ATOMICS: dict[str, Callable] = {
    "add": lambda old, x: old + x,
    "min": min,
    "max": max,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "exch": lambda old, x: x,
    "inc": lambda old, x: old.dtype.type(0) if old >= x else old + old.dtype.type(1),
    "cas": lambda old, x, new: new if old == x else old,
}


def atomic(machine: Machine, instruction: Instruction) -> Step:
    """atom and red, which has no result. Lanes run one after the other, in order."""
    op = opcode(instruction.name)
    name = op.one_of(*ATOMICS)
    unknown = op.modifiers - HINTS - {"global", "shared", name}
    if unknown or not name or len(op.types) != 1:
        raise UnknownInstruction(instruction.name)
    size = SIZES[op.type]
    if size < 4:
        raise UnknownInstruction(instruction.name)
    space = op.one_of("global", "shared") or "generic"
    has_result = op.base == "atom"
    address, *values = instruction.operands[1:] if has_result else instruction.operands
    assert isinstance(address, Address)
    readers = [reader(v, op.type) for v in values]
    write = writer(instruction.operands[0]) if has_result else None
    access = Access(machine, instruction, address, size)
    dtype = np.dtype(numpy_type(op.type))

    def step(batch: Batch, lanes: Lanes) -> None:
        count = len(batch.all_lanes(lanes))
        operands = [np.broadcast_to(read(batch, lanes), count) for read in readers]
        for where, who, places, own in access.split(space, batch, lanes):
            order = np.arange(count) if places is None else places
            old = np.empty(len(order), dtype)
            if where == "global":
                access.check_global(batch, who, own)
            elif where == "shared":
                own = access.shared_index(batch, who, own) // size
            else:
                lane = int(batch.all_lanes(who)[0])
                access.fail("out of bounds", batch, lane, f"atomic on {where} memory")
            shared = batch.shared.view(dtype)
            for i, lane in enumerate(order):
                one = own[i : i + 1]
                old[i] = (
                    host.load_words(one, size).view(dtype)[0]
                    if where == "global"
                    else shared[one[0]]
                )
                new = ATOMICS[name](old[i], *(x[lane] for x in operands))
                word = np.array([new], dtype)
                if op.type == "f32" and where == "global":  # flushes subnormals
                    word = np.where(np.abs(word) < TINY, np.copysign(np.float32(0), word), word)
                if where == "global":
                    host.store_words(one, word.view(UNSIGNED[size]))
                else:
                    shared[one[0]] = new
            if write:
                write(batch, lanes if places is None else who, old)

    return step


def convert_address(machine: Machine, instruction: Instruction) -> Step:
    """cvta: between an address in a space and the generic address of the same byte."""
    op = opcode(instruction.name)
    space = op.one_of(*SPACES)
    if op.modifiers - {"to", space} or not space:
        raise UnknownInstruction(instruction.name)
    shift = WINDOW.get(space, 0) if space != "param" else 0
    delta = np.uint64((-shift if "to" in op.modifiers else shift) % (1 << 64))
    read, write = reader(instruction.operands[1], "u64"), writer(instruction.operands[0])
    return lambda batch, lanes: write(batch, lanes, read(batch, lanes) + delta)


def nothing(machine: Machine, instruction: Instruction) -> Step:
    """Fences and prefetches: in the emulator every access is visible to all at once."""
    return lambda batch, lanes: None


BUILDERS: dict[str, Callable[[Machine, Instruction], Step]] = {
    "ld": load,
    "st": store,
    "atom": atomic,
    "red": atomic,
    "cvta": convert_address,
    "membar": nothing,
    "fence": nothing,
    "prefetch": nothing,
}
