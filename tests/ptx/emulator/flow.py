"""The control flow of a kernel: basic blocks, and where a register may be read before it is set."""

from __future__ import annotations

from typing import NamedTuple

from ptx.emulator.parser import Address, Instruction, Kernel, Operand, Register, Symbol, Vector

# Instructions whose first operand is not a destination.
WITHOUT_RESULT = {
    "st", "red", "bar", "barrier", "bra", "ret", "exit", "trap", "membar", "fence", "prefetch",
    "nanosleep",
}  # fmt: skip
# Instructions that other lanes take part in: each is a block of its own.
COLLECTIVE = {"bar", "barrier", "shfl", "vote", "match", "redux", "activemask"}
# Instructions that only pass values on: an unset value stays unset, which is not yet an error.
PASSES_ON = {"mov", "selp"}


def base(instruction: Instruction) -> str:
    return instruction.name.partition(".")[0]


def is_float64(instruction: Instruction) -> bool:
    """Whether it computes in float64 or converts to or from it."""
    return ".f64" in instruction.name and base(instruction) not in {"ld", "st", *PASSES_ON}


def registers_in(operand: Operand | None) -> list[Register]:
    if isinstance(operand, Register):
        return [operand]
    if isinstance(operand, Vector):
        return [r for item in operand.items for r in registers_in(item)]
    if isinstance(operand, Address):
        return registers_in(operand.base)
    return []


def results(instruction: Instruction) -> list[Register]:
    # bar.red has a result; a plain barrier's operands are immediates.
    if base(instruction) in WITHOUT_RESULT and ".red." not in instruction.name:
        return []
    return registers_in(instruction.operands[0]) if instruction.operands else []


def sources(instruction: Instruction) -> list[Register]:
    start = 1 if results(instruction) else 0
    found = [r for operand in instruction.operands[start:] for r in registers_in(operand)]
    return found + ([instruction.guard] if instruction.guard else [])


class Block(NamedTuple):
    """Instructions [start, end), run by a lane from first to last."""

    start: int
    end: int
    successors: tuple[int, ...]  # starts of blocks


def target_of(kernel: Kernel, instruction: Instruction) -> int:
    label = instruction.operands[0]
    assert isinstance(label, Symbol)
    return kernel.labels[label.name]


def ends_here(instruction: Instruction) -> bool:
    return base(instruction) in {"bra", "ret", "exit", "trap"} or is_collective(instruction)


def is_collective(instruction: Instruction) -> bool:
    return base(instruction) in COLLECTIVE


def blocks(kernel: Kernel) -> dict[int, Block]:
    """The basic blocks by their start. The end of the kernel is not a block."""
    code = kernel.instructions
    starts = {0, *kernel.labels.values()}
    for pc, instruction in enumerate(code):
        if ends_here(instruction):
            starts |= {pc, pc + 1} if is_collective(instruction) else {pc + 1}
    ordered = sorted(s for s in starts if s < len(code))
    found = {}
    for start, end in zip(ordered, [*ordered[1:], len(code)], strict=True):
        last = code[end - 1]
        following: list[int] = []
        if base(last) == "bra":
            following.append(target_of(kernel, last))
        if base(last) not in {"bra", "ret", "exit", "trap"} or last.guard:
            following.append(end)
        found[start] = Block(start, end, tuple(f for f in following if f < len(code)))
    return found


def maybe_unset(kernel: Kernel, graph: dict[int, Block]) -> dict[int, set[int]]:
    """By instruction, the registers it reads that some path from the start does not set."""
    everything = (1 << len(kernel.registers)) - 1

    def through(pc: int, known: int) -> int:
        instruction = kernel.instructions[pc]
        unset = base(instruction) in PASSES_ON and any(
            not known >> r.index & 1 for r in sources(instruction)
        )
        for register in results(instruction):
            bit = 1 << register.index
            if unset:
                known &= ~bit
            elif instruction.guard is None:
                known |= bit
        return known

    entering = dict.fromkeys(graph, everything)
    entering[0] = 0
    todo = [0]
    seen = {0}
    while todo:
        block = graph[todo.pop()]
        known = entering[block.start]
        for pc in range(block.start, block.end):
            known = through(pc, known)
        for successor in block.successors:
            merged = entering[successor] & known
            if merged != entering[successor] or successor not in seen:
                seen.add(successor)
                entering[successor] = merged
                todo.append(successor)
    found: dict[int, set[int]] = {}
    for start in seen:
        known = entering[start]
        for pc in range(start, graph[start].end):
            instruction = kernel.instructions[pc]
            unset = {r.index for r in sources(instruction) if not known >> r.index & 1}
            if unset:
                found[pc] = unset
            known = through(pc, known)
    return found
