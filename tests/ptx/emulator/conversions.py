"""cvt: between integers and floating point of every width, as entries of the instruction table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.emulator.instructions import (
    Arithmetic,
    Opcode,
    UnknownInstruction,
    instruction,
    is_float,
    numpy_type,
)
from ptx.emulator.parser import SIZES

ROUND = {"i": np.rint, "n": np.rint, "z": np.trunc, "m": np.floor, "p": np.ceil}


def to_integer(source: str, target: str, rounding: str) -> Callable[[np.ndarray], np.ndarray]:
    """Rounded and clamped to the target's range. NaN becomes 0, or, where either side has 64
    bits, the top bit alone."""
    dtype = np.dtype(numpy_type(target))
    info = np.iinfo(dtype)
    top_bit = dtype.type(info.min) if dtype.kind == "i" else dtype.type((int(info.max) >> 1) + 1)
    of_nan = dtype.type(0) if source != "f64" and SIZES[target] < 8 else top_bit

    def compute(x: np.ndarray) -> np.ndarray:
        y = ROUND[rounding](x.astype(np.float64))
        inside = (y >= float(info.min)) & (y < float(info.max) + 1.0)
        out = np.where(inside, y, 0.0).astype(dtype)
        out = np.where(~inside & (y > 0), dtype.type(info.max), out)
        out = np.where(~inside & (y < 0), dtype.type(info.min), out)
        return np.where(np.isnan(y), of_nan, out)

    return compute


def narrowed(x: np.ndarray, rounding: str) -> np.ndarray:
    """float64 as float32, rounded to nearest or towards zero."""
    near = x.astype(np.float32)
    if rounding == "n":
        return near
    too_large = np.abs(near.astype(np.float64)) > np.abs(x)
    return np.where(too_large, np.nextafter(near, np.float32(0)), near)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of float32 rounded to nearest even; NaN becomes 0x7fff."""
    bits = x.view(np.uint32)
    near = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), near.astype(np.uint16))


def clamped(source: np.dtype, target: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
    """.sat of integers: clamps to the target's range."""
    low = max(int(np.iinfo(source).min), int(np.iinfo(target).min))
    high = min(int(np.iinfo(source).max), int(np.iinfo(target).max))
    return lambda x: np.clip(x, source.type(low), source.type(high)).astype(target)


def between_floats(op: Opcode, rounding: str) -> Callable[[np.ndarray], np.ndarray]:
    """Rounds to a whole number or to the target's precision."""
    target, source = op.types
    dtype = np.dtype(numpy_type(target))
    if len(rounding) == 3:
        return ROUND[rounding[1]]
    if SIZES[source] > SIZES[target] and not rounding:
        raise UnknownInstruction(op.name)
    if (source, target) == ("f64", "f32"):
        return lambda x: narrowed(x, rounding[1])
    if rounding == "rz":
        raise UnknownInstruction(op.name)
    return lambda x: x.astype(dtype)


def converter(op: Opcode) -> Callable[[np.ndarray], np.ndarray]:
    """The conversion; raises UnknownInstruction for combinations that are missing here."""
    target, source = op.types
    rounding = op.one_of("rni", "rzi", "rmi", "rpi", "rn", "rz")
    dtype = np.dtype(numpy_type(target))
    saturates = "sat" in op.modifiers
    if (target, source) == ("f32", "bf16") and not saturates:
        return lambda x: (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if (target, source, rounding) == ("bf16", "f32", "rn") and not saturates:
        return to_bfloat16
    if "bf16" in (target, source):
        raise UnknownInstruction(op.name)
    if is_float(target) and is_float(source):
        convert = between_floats(op, rounding)
        if not saturates:
            return convert
        zero, one = dtype.type(0), dtype.type(1)  # NaN becomes 0
        return lambda x: np.fmin(np.fmax(convert(x), zero), one)
    if is_float(source):
        if len(rounding) != 3:
            raise UnknownInstruction(op.name)
        return to_integer(source, target, rounding[1])
    if is_float(target) and (rounding != "rn" or saturates):
        raise UnknownInstruction(op.name)
    if saturates:
        return clamped(np.dtype(numpy_type(source)), dtype)
    return lambda x: x.astype(dtype)


@instruction(
    "cvt", set(SIZES) - {"b8", "b16", "b32", "b64", "f16x2", "bf16x2", "pred"},
    "rn rz rni rzi rmi rpi sat ftz",
)  # fmt: skip
def _(op: Opcode) -> Arithmetic:
    if len(op.types) != 2:
        raise UnknownInstruction(op.name)
    target, source = op.types
    return Arithmetic(target, (source,), converter(op))
