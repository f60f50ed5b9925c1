"""Instructions that other lanes take part in: barriers, shuffles, votes.

Lanes that arrive wait until all that must take part have come to the same instruction; `ready`
says which may go on. Source: NVIDIA, "Parallel Thread Execution ISA", sections 9.7.9 and 9.7.13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.emulator.batch import Batch, Lanes
from ptx.emulator.checks import Violation
from ptx.emulator.instructions import UNSIGNED, Opcode, UnknownInstruction, numpy_type, opcode
from ptx.emulator.operands import reader, writer
from ptx.emulator.parser import Immediate, Instruction, Vector

if TYPE_CHECKING:
    from ptx.emulator.machine import Machine

WARP = np.arange(32, dtype=np.uint32)
ALL = np.uint32(0xFFFFFFFF)


class Collective:
    """ready() says which arrived lanes may go on; run() executes the instruction for them."""

    waits_for = "lanes of its warp"

    def __init__(self, machine: Machine, instruction: Instruction) -> None:
        self.machine = machine
        self.instruction = instruction

    def is_complete(self, batch: Batch) -> bool:
        """Whether no lane has to wait if all lanes of the batch are here."""
        return True

    def ready(self, batch: Batch, lanes: np.ndarray) -> np.ndarray:
        """Which of the lanes that are here may go on."""
        raise NotImplementedError

    def run(self, batch: Batch, lanes: Lanes) -> None:
        raise NotImplementedError

    def fail(self, check: str, batch: Batch, lane: int, problem: str) -> None:
        raise Violation(check, self.machine.where(self.instruction, batch, lane) + ": " + problem)


class Barrier(Collective):
    """bar.sync 0, and bar.red, which also counts or combines a predicate over the block."""

    waits_for = "threads of its block"

    def __init__(self, machine: Machine, instruction: Instruction) -> None:
        super().__init__(machine, instruction)
        op = opcode(instruction.name)
        self.reduction = op.one_of("popc", "and", "or") if "red" in op.modifiers else ""
        known = {"sync", "red", "aligned", "cta", self.reduction}
        barrier = instruction.operands[1 if self.reduction else 0]
        last = 3 if self.reduction else 1
        if op.modifiers - known or barrier != Immediate("0") or len(instruction.operands) != last:
            raise UnknownInstruction(f"{instruction.name} {instruction.operands}")
        if self.reduction:
            self.predicate = reader(instruction.operands[2], "pred")
            self.write = writer(instruction.operands[0])

    def ready(self, batch: Batch, lanes: np.ndarray) -> np.ndarray:
        arrived = np.bincount(batch.slot[lanes], minlength=len(batch.blocks))
        return arrived[batch.slot[lanes]] == batch.threads

    def run(self, batch: Batch, lanes: Lanes) -> None:
        self.machine.time += 1
        slots = batch.slot[batch.all_lanes(lanes)]
        passed = np.unique(slots)
        self.machine.record.barriers += len(passed)
        batch.pass_barrier(passed, self.machine.time)
        if self.reduction:
            holds = np.broadcast_to(self.predicate(batch, lanes), len(slots))
            counts = np.bincount(slots, weights=holds, minlength=len(batch.blocks))[slots]
            value = {
                "popc": counts.astype(np.uint32),
                "and": counts == batch.threads,
                "or": counts > 0,
            }[self.reduction]
            self.write(batch, lanes, value)


class WarpWide(Collective):
    """An instruction for the lanes that a member mask names.

    All of them must arrive with the same mask. A GPU lets a mask name lanes that have exited; here
    that is an error, because such a mask was not made for the lanes that are left.
    """

    def __init__(self, machine: Machine, instruction: Instruction, mask: int) -> None:
        super().__init__(machine, instruction)
        self.mask = reader(instruction.operands[mask], "b32")

    def is_complete(self, batch: Batch) -> bool:
        """With whole warps and a mask of all lanes; else ready() decides."""
        return batch.threads % 32 == 0 and bool(np.all(self.mask(batch, None) == ALL))

    def masks(self, batch: Batch, lanes: Lanes) -> np.ndarray:
        return np.broadcast_to(self.mask(batch, lanes), len(batch.all_lanes(lanes)))

    def ready(self, batch: Batch, lanes: np.ndarray) -> np.ndarray:
        masks = self.masks(batch, lanes)
        warp, lane = batch.warp_slot[lanes], batch.lane[lanes]
        present = np.zeros((len(batch.known), 32), bool)
        present[batch.warp_slot[~batch.exited], batch.lane[~batch.exited]] = True
        bits = np.uint32(1) << lane.astype(np.uint32)
        alone = (masks & bits) == 0
        if alone.any():
            at = int(np.argmax(alone))
            self.fail(
                "shuffle mask", batch, int(lanes[at]),
                f"mask {int(masks[at]):#010x} does not name the lane itself",
            )  # fmt: skip
        named = (masks[:, None] >> WARP & np.uint32(1)).astype(bool)
        absent = named & ~present[warp]
        if absent.any():
            at, which = (int(i[0]) for i in np.nonzero(absent))
            self.fail(
                "shuffle mask", batch, int(lanes[at]),
                f"mask {int(masks[at]):#010x} names lane {which}, which has exited or is not there",
            )  # fmt: skip
        # A lane may go on once all lanes it names have arrived with the same mask.
        agreed = np.zeros((len(batch.known), 32), np.uint32)
        agreed[warp, lane] = masks
        return ((agreed[warp] == masks[:, None]) | ~named).all(axis=1)

    def table(self, batch: Batch, lanes: Lanes, values: np.ndarray) -> np.ndarray:
        """Values as [warp, lane]; zero where a lane takes no part."""
        everyone = batch.all_lanes(lanes)
        found = np.zeros((len(batch.known), 32), values.dtype)
        found[batch.warp_slot[everyone], batch.lane[everyone]] = values
        return found

    def places(self, batch: Batch, lanes: Lanes) -> tuple[np.ndarray, np.ndarray]:
        everyone = batch.all_lanes(lanes)
        return batch.warp_slot[everyone], batch.lane[everyone]

    def named(self, batch: Batch, lanes: Lanes) -> np.ndarray:
        """[lanes, 32] whether the lane's mask names each lane."""
        return (self.masks(batch, lanes)[:, None] >> WARP & np.uint32(1)).astype(bool)


class SyncWarp(WarpWide):
    """bar.warp.sync: orders the memory accesses of the lanes it names."""

    def __init__(self, machine: Machine, instruction: Instruction) -> None:
        super().__init__(machine, instruction, 0)

    def run(self, batch: Batch, lanes: Lanes) -> None:
        self.machine.time += 1
        warp, lane = self.places(batch, lanes)
        named = self.named(batch, lanes)
        # Each now knows what any of them knew, and what each of them did.
        latest = np.where(named[:, :, None], batch.known[warp], 0).max(axis=1)
        latest[named] = self.machine.time
        batch.known[warp, lane] = latest


class Shuffle(WarpWide):
    """shfl.sync: a register of another lane."""

    def __init__(self, machine: Machine, instruction: Instruction) -> None:
        op = opcode(instruction.name)
        if "sync" not in op.modifiers:
            raise UnknownInstruction(instruction.name)
        super().__init__(machine, instruction, 4)
        self.mode = op.one_of("up", "down", "bfly", "idx")
        if op.modifiers != {"sync", self.mode} or op.types != ("b32",):
            raise UnknownInstruction(instruction.name)
        target = instruction.operands[0]
        both = target.items if isinstance(target, Vector) else (target, None)
        self.write, self.write_inside = writer(both[0]), writer(both[1])
        self.value, self.by, self.clamp = (reader(o, "b32") for o in instruction.operands[1:4])

    def run(self, batch: Batch, lanes: Lanes) -> None:
        warp, lane = self.places(batch, lanes)
        by = self.by(batch, lanes).astype(np.int64) & 31
        clamp = self.clamp(batch, lanes).astype(np.int64)
        segment = clamp >> 8 & 31
        low = lane & segment
        high = low | (clamp & 31 & ~segment)
        source = {
            "up": lane - by,
            "down": lane + by,
            "bfly": lane ^ by,
            "idx": low | (by & ~segment),
        }[self.mode]
        inside = source >= high if self.mode == "up" else source <= high
        source = np.where(inside, source, lane)
        if lanes is not None or not self.is_complete(batch):
            self._check_named(batch, lanes, source)
        values = np.broadcast_to(self.value(batch, lanes), len(lane))
        self.write(batch, lanes, self.table(batch, lanes, values)[warp, source])
        self.write_inside(batch, lanes, inside)

    def _check_named(self, batch: Batch, lanes: Lanes, source: np.ndarray) -> None:
        silent = ~self.named(batch, lanes)[np.arange(len(source)), source]
        if silent.any():
            at = int(np.argmax(silent))
            self.fail(
                "shuffle mask", batch, int(batch.all_lanes(lanes)[at]),
                f"reads lane {int(source[at])}, which its mask does not name",
            )  # fmt: skip


class Vote(WarpWide):
    """vote.sync: all, any, uni, ballot."""

    def __init__(self, machine: Machine, instruction: Instruction) -> None:
        super().__init__(machine, instruction, 2)
        op = opcode(instruction.name)
        self.mode = op.one_of("all", "any", "uni", "ballot")
        if op.modifiers != {"sync", self.mode}:
            raise UnknownInstruction(instruction.name)
        self.predicate = reader(instruction.operands[1], "pred")
        self.write = writer(instruction.operands[0])

    def run(self, batch: Batch, lanes: Lanes) -> None:
        warp, _ = self.places(batch, lanes)
        named = self.named(batch, lanes)
        holds = np.broadcast_to(self.predicate(batch, lanes), len(warp))
        theirs = self.table(batch, lanes, holds)[warp] & named
        value = {
            "all": (theirs == named).all(axis=1),
            "any": theirs.any(axis=1),
            "uni": (theirs == named).all(axis=1) | ~theirs.any(axis=1),
            "ballot": (theirs.astype(np.uint32) << WARP).sum(axis=1, dtype=np.uint32),
        }[self.mode]
        self.write(batch, lanes, value)


class Match(WarpWide):
    """match.sync: which lanes hold the same value."""

    def __init__(self, machine: Machine, instruction: Instruction) -> None:
        super().__init__(machine, instruction, 2)
        op = opcode(instruction.name)
        self.mode = op.one_of("any", "all")
        if op.modifiers != {"sync", self.mode} or op.type not in ("b32", "b64"):
            raise UnknownInstruction(instruction.name)
        target = instruction.operands[0]
        both = target.items if isinstance(target, Vector) else (target, None)
        self.write, self.write_all = writer(both[0]), writer(both[1])
        self.value = reader(instruction.operands[1], op.type)

    def run(self, batch: Batch, lanes: Lanes) -> None:
        warp, _ = self.places(batch, lanes)
        named = self.named(batch, lanes)
        mine = np.broadcast_to(self.value(batch, lanes), len(warp))
        same = (self.table(batch, lanes, mine)[warp] == mine[:, None]) & named
        bits = (same.astype(np.uint32) << WARP).sum(axis=1, dtype=np.uint32)
        agreed = (same == named).all(axis=1)
        self.write(
            batch, lanes, bits if self.mode == "any" else np.where(agreed, bits, np.uint32(0))
        )
        self.write_all(batch, lanes, agreed)


REDUCTIONS = {
    "add": (np.add, 0), "min": (np.minimum, None), "max": (np.maximum, None),
    "and": (np.bitwise_and, None), "or": (np.bitwise_or, 0), "xor": (np.bitwise_xor, 0),
}  # fmt: skip


class Reduction(WarpWide):
    """redux.sync: the sum, minimum, ... of a 32-bit integer over the lanes."""

    def __init__(self, machine: Machine, instruction: Instruction) -> None:
        super().__init__(machine, instruction, 2)
        op = opcode(instruction.name)
        name = op.one_of(*REDUCTIONS)
        if op.modifiers != {"sync", name} or op.type not in ("u32", "s32", "b32"):
            raise UnknownInstruction(instruction.name)
        self.combine, self.neutral = REDUCTIONS[name]
        dtype = np.dtype(numpy_type(op.type))
        if self.neutral is None:
            info = np.iinfo(dtype)
            self.neutral = {"min": info.max, "max": info.min, "and": UNSIGNED[4](ALL)}[name]
        self.value, self.write = (
            reader(instruction.operands[1], op.type),
            writer(instruction.operands[0]),
        )

    def run(self, batch: Batch, lanes: Lanes) -> None:
        warp, _ = self.places(batch, lanes)
        mine = np.broadcast_to(self.value(batch, lanes), len(warp))
        theirs = self.table(batch, lanes, mine)[warp]
        kept = np.where(self.named(batch, lanes), theirs, mine.dtype.type(self.neutral))
        self.write(batch, lanes, self.combine.reduce(kept, axis=1, dtype=mine.dtype))


class ActiveMask(Collective):
    """activemask: the lanes that run together, which no kernel should rely on."""

    def __init__(self, machine: Machine, instruction: Instruction) -> None:
        super().__init__(machine, instruction)
        self.write = writer(instruction.operands[0])

    def ready(self, batch: Batch, lanes: np.ndarray) -> np.ndarray:
        return np.ones(len(lanes), bool)

    def run(self, batch: Batch, lanes: Lanes) -> None:
        everyone = batch.all_lanes(lanes)
        bits = np.zeros(len(batch.known), np.uint32)
        warp = batch.warp_slot[everyone]
        np.bitwise_or.at(bits, warp, np.uint32(1) << batch.lane[everyone].astype(np.uint32))
        self.write(batch, lanes, bits[warp])


def _barrier(machine: Machine, instruction: Instruction) -> Collective:
    op: Opcode = opcode(instruction.name)
    return (SyncWarp if "warp" in op.modifiers else Barrier)(machine, instruction)


BUILDERS: dict[str, Callable[[Machine, Instruction], Collective]] = {
    "bar": _barrier,
    "barrier": _barrier,
    "shfl": Shuffle,
    "vote": Vote,
    "match": Match,
    "redux": Reduction,
    "activemask": ActiveMask,
}
