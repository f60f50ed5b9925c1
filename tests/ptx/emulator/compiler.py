"""Turns a kernel's instructions into functions: a step each, and where lanes go next."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ptx.emulator import accesses, collectives, flow
from ptx.emulator import conversions as conversions  # enters cvt in the table of instructions
from ptx.emulator.batch import Batch, Lanes
from ptx.emulator.checks import Violation
from ptx.emulator.instructions import DivisionByZero, Opcode, UnknownInstruction, arithmetic, opcode
from ptx.emulator.operands import packed_reader, packed_writer, reader, writer
from ptx.emulator.parser import SIZES, Instruction, Kernel, Vector

if TYPE_CHECKING:
    from ptx.emulator.machine import Machine

Step = Callable[[Batch, Lanes], None]
# Where the lanes go after a block: (start of a block, lanes), ...; nowhere if they have exited.
End = Callable[[Batch, Lanes], list[tuple[int, Lanes]]]


class Code(NamedTuple):
    """A basic block, compiled: its steps, and what decides where the lanes go from there."""

    steps: tuple[Step, ...]
    count: int  # instructions
    float64: int  # of them, arithmetic and conversions in float64
    end: End


class Program(NamedTuple):
    kernel: Kernel
    code: dict[int, Code]
    collective: dict[int, collectives.Collective]
    suspects: frozenset[int]  # registers that may be read before they are set


def compile_kernel(machine: Machine, kernel: Kernel) -> Program:
    """The kernel's blocks as functions. UnknownInstruction names what the emulator lacks."""
    graph = flow.blocks(kernel)
    unset = flow.maybe_unset(kernel, graph)
    suspects = frozenset(itertools.chain.from_iterable(unset.values()))
    compiler = _Compiler(machine, kernel, unset, suspects)
    code = {start: compiler.block(block) for start, block in graph.items()}
    return Program(kernel, code, compiler.collectives, suspects)


class _Compiler:
    """Turns the instructions of one kernel into steps."""

    def __init__(
        self, machine: Machine, kernel: Kernel, unset: dict[int, set[int]], suspects
    ) -> None:
        self.machine = machine
        self.kernel = kernel
        self.unset = unset
        self.suspects = suspects
        self.collectives: dict[int, collectives.Collective] = {}

    def block(self, block: flow.Block) -> Code:
        code = self.kernel.instructions
        last = code[block.end - 1]
        steps: list[Step] = []
        if flow.is_collective(last):
            found = collectives.BUILDERS[flow.base(last)](self.machine, last)
            if last.guard:
                raise UnknownInstruction(f"guarded {last.name}")
            self.collectives[block.start] = found
            steps.append(self._with_checks(block.end - 1, found.run))
            end = self._falls_to(block.end)
        elif flow.ends_here(last):
            steps += [self._step(pc) for pc in range(block.start, block.end - 1)]
            end = self._ending(block)
        else:
            steps += [self._step(pc) for pc in range(block.start, block.end)]
            end = self._falls_to(block.end)
        float64 = sum(flow.is_float64(i) for i in code[block.start : block.end])
        return Code(tuple(steps), block.end - block.start, float64, end)

    def _falls_to(self, pc: int):
        if pc < len(self.kernel.instructions):
            return lambda batch, lanes: [(pc, lanes)]
        return _exit

    def _ending(self, block: flow.Block):
        last = self.kernel.instructions[block.end - 1]
        if flow.base(last) == "trap":
            taken = self._trap(last)
        elif flow.base(last) == "bra":
            target = flow.target_of(self.kernel, last)
            taken = self._falls_to(target)
        else:
            taken = _exit
        if last.guard is None:
            return taken
        holds = self._guard(last, block.end - 1)
        onwards = self._falls_to(block.end)

        def split(batch: Batch, lanes: Lanes) -> list[tuple[int, Lanes]]:
            goes = holds(batch, lanes)
            if goes.all():
                return taken(batch, lanes)
            if not goes.any():
                return onwards(batch, lanes)
            everyone = batch.all_lanes(lanes)
            return taken(batch, everyone[goes]) + onwards(batch, everyone[~goes])

        return split

    def _trap(self, instruction: Instruction):
        def end(batch: Batch, lanes: Lanes):
            lane = int(batch.all_lanes(lanes)[0])
            raise Violation("trap", self.machine.where(instruction, batch, lane) + ": trap")

        return end

    def _guard(self, instruction: Instruction, pc: int):
        assert instruction.guard
        read = reader(instruction.guard, "pred")
        check = self._require_set(pc, {instruction.guard.index} & self.unset.get(pc, set()))

        def holds(batch: Batch, lanes: Lanes) -> np.ndarray:
            check(batch, lanes)
            value = read(batch, lanes)
            return ~value if instruction.negated else value

        return holds

    def _step(self, pc: int) -> Step:
        instruction = self.kernel.instructions[pc]
        inner = self._with_checks(pc, self._plain(instruction))
        if instruction.guard is None:
            return inner
        holds = self._guard(instruction, pc)

        def guarded(batch: Batch, lanes: Lanes) -> None:
            goes = holds(batch, lanes)
            if goes.all():
                inner(batch, lanes)
            elif goes.any():
                inner(batch, batch.all_lanes(lanes)[goes])

        return guarded

    def _plain(self, instruction: Instruction) -> Step:
        name = flow.base(instruction)
        if name in accesses.BUILDERS:
            return accesses.BUILDERS[name](self.machine, instruction)
        if name == "mov":
            return _move(instruction)
        found = arithmetic(instruction.name)
        write = writer(instruction.operands[0])
        operands = instruction.operands[1:]
        if len(operands) != len(found.sources):
            raise UnknownInstruction(f"{instruction.name} with {len(operands)} operands")
        readers = [reader(o, kind) for o, kind in zip(operands, found.sources, strict=True)]
        compute = found.compute

        def step(batch: Batch, lanes: Lanes) -> None:
            try:
                write(batch, lanes, compute(*[read(batch, lanes) for read in readers]))
            except DivisionByZero as error:
                lane = int(batch.all_lanes(lanes)[error.place])
                where = self.machine.where(instruction, batch, lane)
                raise Violation("division by zero", f"{where}: {error}") from None

        return step

    # Registers that may be unset

    def _require_set(self, pc: int, indices: set[int]) -> Step:
        instruction = self.kernel.instructions[pc]

        def check(batch: Batch, lanes: Lanes) -> None:
            for index in indices:
                unset = batch.unset[index] if lanes is None else batch.unset[index][lanes]
                if unset.any():
                    lane = int(batch.all_lanes(lanes)[np.argmax(unset)])
                    raise Violation(
                        "uninitialised",
                        self.machine.where(instruction, batch, lane)
                        + f": {instruction.name} reads a register that was never set",
                    )

        return check

    def _with_checks(self, pc: int, step: Step) -> Step:
        instruction = self.kernel.instructions[pc]
        targets = [r.index for r in flow.results(instruction) if r.index in self.suspects]
        passes_on = flow.base(instruction) in flow.PASSES_ON and pc in self.unset
        if not targets and pc not in self.unset:
            return step
        unset_here = self.unset.get(pc, set())
        check = self._require_set(pc, unset_here)
        marks = self._marks(instruction, unset_here)

        def checked(batch: Batch, lanes: Lanes) -> None:
            if not passes_on:
                check(batch, lanes)
            step(batch, lanes)
            where = slice(None) if lanes is None else lanes
            unset = marks(batch) if passes_on else np.zeros(batch.lanes, bool)
            for index in targets:
                batch.unset[index][where] = unset[where]

        return checked

    @staticmethod
    def _marks(instruction: Instruction, unset_here: set[int]) -> Callable[[Batch], np.ndarray]:
        """The lanes where a mov or selp passes on an unset value; of selp, the chosen one."""

        def of(operands) -> Callable[[Batch], np.ndarray]:
            found = [
                r.index for o in operands for r in flow.registers_in(o) if r.index in unset_here
            ]

            def marks(batch: Batch) -> np.ndarray:
                unset = np.zeros(batch.lanes, bool)
                for index in found:
                    unset |= batch.unset[index]
                return unset

            return marks

        if flow.base(instruction) != "selp":
            return of(instruction.operands[1:])
        first, second, condition = (of([o]) for o in instruction.operands[1:])
        chosen = reader(instruction.operands[3], "pred")
        return lambda batch: (
            condition(batch) | np.where(chosen(batch, None), first(batch), second(batch))
        )


def _exit(batch: Batch, lanes: Lanes) -> list[tuple[int, Lanes]]:
    batch.exited[slice(None) if lanes is None else lanes] = True
    return []


def _move(instruction: Instruction) -> Step:
    """mov, which also packs {a, b} into a word and takes a word apart."""
    op: Opcode = opcode(instruction.name)
    if op.modifiers or len(op.types) != 1:
        raise UnknownInstruction(instruction.name)
    target, source = instruction.operands
    kind = op.type if op.type == "pred" else "b" + str(8 * SIZES[op.type])
    if isinstance(source, Vector) or isinstance(target, Vector):
        read, write = packed_reader(source, kind), packed_writer(target, kind)
    else:
        read, write = reader(source, op.type), writer(target)

    def step(batch: Batch, lanes: Lanes) -> None:
        value = read(batch, lanes)
        # A copy: a later change of some lanes must not reach the source.
        write(batch, lanes, value.copy() if lanes is None and value.ndim else value)

    return step
