"""Operands as functions: readers give an array of a type, writers store one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ptx.emulator.batch import Batch, Lanes
from ptx.emulator.instructions import SIGNED, UNSIGNED, UnknownInstruction, numpy_type
from ptx.emulator.parser import SIZES, Immediate, Operand, Register, Symbol, Vector

Reader = Callable[[Batch, Lanes], np.ndarray]
Writer = Callable[[Batch, Lanes, np.ndarray], None]

# Generic addresses of shared and local memory and of parameters lie in windows that no host
# address is in.
WINDOW = {"shared": 1 << 56, "local": 1 << 57, "param": 1 << 58}


def immediate(text: str, kind: str) -> np.generic:
    """0d..., 0f... or an integer, as a value of the type."""
    dtype = np.dtype(numpy_type(kind))
    if text[:2] in ("0d", "0D"):
        value = np.uint64(int(text[2:], 16))
        return value.view(np.float64).astype(dtype) if dtype.kind == "f" else value.view(dtype)
    if text[:2] in ("0f", "0F") and len(text) == 10:
        word = np.uint32(int(text[2:], 16))
        return word.view(np.float32).astype(dtype) if dtype.kind == "f" else word.view(dtype)
    if dtype.kind == "b":
        return np.bool_(int(text, 0))
    if dtype.kind == "f":
        raise UnknownInstruction(f"immediate {text} of type {kind}")
    value = int(text.rstrip("U"), 0) % (1 << 8 * dtype.itemsize)
    return UNSIGNED[dtype.itemsize](value).view(dtype)


def resized(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The bits of x as dtype: cut off if it is narrower, else extended by x's sign or by zeros."""
    if x.dtype == dtype:
        return x
    if x.itemsize == dtype.itemsize:
        return x.view(dtype)
    kinds = SIGNED if x.dtype.kind == "i" else UNSIGNED
    whole = x if x.dtype.kind in "iu" else x.view(UNSIGNED[x.itemsize])
    return whole.astype(kinds[dtype.itemsize]).view(dtype)


def reader(operand: Operand | None, kind: str) -> Reader:
    """Reads an operand as a type: an array of the lanes, or a scalar that stands for all."""
    dtype = np.dtype(numpy_type(kind))
    if isinstance(operand, Immediate):
        value = immediate(operand.text, kind)
        return lambda batch, lanes: value
    if isinstance(operand, Register):
        index = operand.index

        def read(batch: Batch, lanes: Lanes) -> np.ndarray:
            whole = batch.register(index)
            return resized(whole if lanes is None else whole[lanes], dtype)

        return read
    if isinstance(operand, Symbol):
        name = operand.name

        def read_symbol(batch: Batch, lanes: Lanes) -> np.ndarray:
            special = batch.special(name)
            if special is not None:
                return resized(special if lanes is None else special[lanes], dtype)
            return np.uint64(address_of(batch, name)).astype(dtype)

        return read_symbol
    raise UnknownInstruction(f"operand {operand}")


def address_of(batch: Batch, name: str) -> int:
    """The address of a variable or parameter in its own space."""
    for layout in (batch.shared_layout, batch.local_layout):
        if name in layout.offsets:
            return layout.offsets[name]
    offset = 0
    for p in batch.kernel.params:
        offset = -(-offset // p.align) * p.align
        if p.name == name:
            return WINDOW["param"] + offset
        offset += p.size
    if name in batch.globals:
        return batch.globals[name]
    raise UnknownInstruction(f"symbol {name}")


def writer(operand: Operand | None) -> Writer:
    """Stores values of any type in a register; a narrower value is extended, as PTX does."""
    if operand is None:  # the sink _
        return lambda batch, lanes, value: None
    if not isinstance(operand, Register):
        raise UnknownInstruction(f"destination {operand}")
    index = operand.index
    dtype = np.dtype(numpy_type(operand.type))

    def write(batch: Batch, lanes: Lanes, value: np.ndarray) -> None:
        value = resized(value, dtype)
        if lanes is not None:
            batch.register(index)[lanes] = value
        elif value.ndim == 0:
            batch.registers[index] = np.full(batch.lanes, value, dtype)
        else:
            batch.registers[index] = value

    return write


def parts(operand: Operand | None) -> Sequence[Operand | None]:
    """The items of a vector; any other operand by itself."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def packed_reader(operand: Operand | None, kind: str) -> Reader:
    """Reads {a, b, ...} as one word, a lowest; anything else as it is."""
    if not isinstance(operand, Vector):
        return reader(operand, kind)
    count = len(operand.items)
    part = "b" + str(8 * SIZES[kind] // count)
    readers = [reader(item, part) for item in operand.items]
    word = UNSIGNED[SIZES[kind]]

    def read(batch: Batch, lanes: Lanes) -> np.ndarray:
        value = readers[0](batch, lanes).astype(word)
        for i, each in enumerate(readers[1:], 1):
            value = value | each(batch, lanes).astype(word) << word(i * 8 * SIZES[part])
        return value

    return read


def packed_writer(operand: Operand | None, kind: str) -> Writer:
    """Takes a word apart into {a, b, ...}."""
    if not isinstance(operand, Vector):
        return writer(operand)
    count = len(operand.items)
    size = SIZES[kind] // count
    writers = [writer(item) for item in operand.items]
    word = UNSIGNED[SIZES[kind]]

    def write(batch: Batch, lanes: Lanes, value: np.ndarray) -> None:
        whole = value.view(word)
        for i, each in enumerate(writers):
            each(batch, lanes, (whole >> word(i * 8 * size)).astype(UNSIGNED[size]))

    return write
