"""The table of instructions: what each computes from its operands, lane by lane.

An entry says which modifiers and types it knows and returns an `Arithmetic`: the types of the
result and of the operands, and a function of numpy arrays. Memory accesses are in `accesses.py`,
instructions across lanes in `collectives.py`. Anything else is unknown, which is an error.

Source: NVIDIA, "Parallel Thread Execution ISA", chapter 9. The `approx` instructions return the
nearest value of their type, from which a GPU's may differ by a few ulps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ptx.emulator.exact import fma
from ptx.emulator.parser import SIZES

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}

INTEGERS = {"u16", "s16", "u32", "s32", "u64", "s64"}
BITS = {"b16", "b32", "b64"}
WIDE_FLOATS = {"f32", "f64"}


def numpy_type(kind: str) -> type:
    """The numpy type that holds a PTX type; bfloat16 and packed pairs are held as their bits."""
    if kind == "pred":
        return np.bool_
    if kind in FLOATS:
        return FLOATS[kind]
    return (SIGNED if kind[0] == "s" else UNSIGNED)[SIZES[kind]]


class UnknownInstruction(Exception):
    """An instruction, modifier or type that the table does not have."""


class DivisionByZero(Exception):
    """Of the lane at this place."""

    def __init__(self, place: int) -> None:
        super().__init__("integer division by zero")
        self.place = place


class Opcode(NamedTuple):
    """The parts of an instruction's name: setp.eq.f64 -> "setp", {"eq"}, ("f64",)."""

    name: str
    base: str
    modifiers: frozenset[str]
    types: tuple[str, ...]

    @property
    def type(self) -> str:
        return self.types[0]

    def one_of(self, *names: str) -> str:
        """Which of these modifiers is present; "" if none is."""
        return next((n for n in names if n in self.modifiers), "")


def opcode(name: str) -> Opcode:
    base, *rest = name.split(".")
    types = tuple(p for p in rest if p in SIZES)
    return Opcode(name, base, frozenset(p for p in rest if p not in SIZES), types)


class Arithmetic(NamedTuple):
    result: str
    sources: tuple[str, ...]
    compute: Callable[..., np.ndarray]


class Entry(NamedTuple):
    types: frozenset[str]  # allowed ones; of the last type where there are several
    modifiers: frozenset[str]
    build: Callable[[Opcode], Arithmetic]


TABLE: dict[str, Entry] = {}


def instruction(names: str, types: set[str], modifiers: str = "") -> Callable:
    """Enters a builder into the table under these base names."""

    def enter(build: Callable[[Opcode], Arithmetic]) -> Callable:
        for name in names.split():
            assert name not in TABLE, name
            TABLE[name] = Entry(frozenset(types), frozenset(modifiers.split()), build)
        return build

    return enter


def arithmetic(name: str) -> Arithmetic:
    """What an instruction computes; UnknownInstruction if the table does not have it."""
    op = opcode(name)
    entry = TABLE.get(op.base)
    if (
        entry is None
        or not op.modifiers <= entry.modifiers
        or not op.types
        or not set(op.types) <= entry.types
    ):
        raise UnknownInstruction(name)
    found = entry.build(op)
    return flushing(found) if "ftz" in op.modifiers else found


def flushing(found: Arithmetic) -> Arithmetic:
    """With subnormal operands and results of .ftz instructions set to zero, their sign kept."""

    def flush(x: np.ndarray) -> np.ndarray:
        if x.dtype not in (np.float32, np.float64):
            return x
        tiny = np.finfo(x.dtype).smallest_normal
        return np.where(np.abs(x) < tiny, np.copysign(x.dtype.type(0), x), x)

    return found._replace(compute=lambda *xs: flush(found.compute(*map(flush, xs))))


def is_float(kind: str) -> bool:
    return kind in FLOATS


def unsigned(x: np.ndarray) -> np.ndarray:
    return x.view(UNSIGNED[x.itemsize])


# Integer and floating-point arithmetic


@instruction("add sub", INTEGERS | WIDE_FLOATS, "rn ftz")
def _(op: Opcode) -> Arithmetic:
    return Arithmetic(op.type, (op.type,) * 2, np.add if op.base == "add" else np.subtract)


def product(kind: str, part: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The low, high or whole product of two integers."""
    bits = 8 * SIZES[kind]
    double = (SIGNED if kind[0] == "s" else UNSIGNED).get(2 * SIZES[kind])
    if part == "lo":
        return np.multiply
    if part == "wide":
        return lambda a, b: a.astype(double) * b.astype(double)
    if double:
        return lambda a, b: ((a.astype(double) * b.astype(double)) >> bits).astype(a.dtype)

    def high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        ua, ub = unsigned(a), unsigned(b)
        low = np.uint64(0xFFFFFFFF)
        a0, a1, b0, b1 = ua & low, ua >> 32, ub & low, ub >> 32
        middle = ((a0 * b0) >> 32) + ((a1 * b0) & low) + a0 * b1
        top = a1 * b1 + ((a1 * b0) >> 32) + (middle >> 32)
        if kind[0] == "s":
            top = top - np.where(a < 0, ub, 0) - np.where(b < 0, ua, 0)
        return top.view(a.dtype)

    return high


def widened(kind: str) -> str:
    return kind[0] + str(16 * SIZES[kind])


@instruction("mul", INTEGERS | WIDE_FLOATS, "lo hi wide rn ftz")
def _(op: Opcode) -> Arithmetic:
    if is_float(op.type):
        return Arithmetic(op.type, (op.type,) * 2, np.multiply)
    part = op.one_of("lo", "hi", "wide")
    result = widened(op.type) if part == "wide" else op.type
    return Arithmetic(result, (op.type,) * 2, product(op.type, part))


@instruction("mad", INTEGERS, "lo hi wide")
def _(op: Opcode) -> Arithmetic:
    part = op.one_of("lo", "hi", "wide")
    result = widened(op.type) if part == "wide" else op.type
    multiply = product(op.type, part)
    return Arithmetic(result, (op.type, op.type, result), lambda a, b, c: multiply(a, b) + c)


@instruction("fma", WIDE_FLOATS, "rn ftz")
def _(op: Opcode) -> Arithmetic:
    return Arithmetic(op.type, (op.type,) * 3, fma)


def truncated_quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b towards zero. The most negative number by -1 wraps around."""
    if not np.all(b):
        raise DivisionByZero(int(np.argmax(b == 0)))
    size = unsigned(np.abs(a)) // unsigned(np.abs(b))
    return np.where((a < 0) != (b < 0), -size, size).view(a.dtype)


@instruction("div", INTEGERS | WIDE_FLOATS, "rn full ftz")
def _(op: Opcode) -> Arithmetic:
    divide = np.divide if is_float(op.type) else truncated_quotient
    return Arithmetic(op.type, (op.type,) * 2, divide)


@instruction("rem", INTEGERS)
def _(op: Opcode) -> Arithmetic:
    return Arithmetic(op.type, (op.type,) * 2, lambda a, b: a - truncated_quotient(a, b) * b)


@instruction("abs", {"s16", "s32", "s64"} | WIDE_FLOATS, "ftz")
def _(op: Opcode) -> Arithmetic:
    return Arithmetic(op.type, (op.type,), np.abs)


@instruction("neg", {"s16", "s32", "s64"} | WIDE_FLOATS, "ftz")
def _(op: Opcode) -> Arithmetic:
    return Arithmetic(op.type, (op.type,), np.negative)


@instruction("min max", INTEGERS | WIDE_FLOATS, "NaN ftz")
def _(op: Opcode) -> Arithmetic:
    """For floats, NaN loses against a number unless .NaN is set; -0 is below +0."""
    least = op.base == "min"
    if not is_float(op.type):
        return Arithmetic(op.type, (op.type,) * 2, np.minimum if least else np.maximum)
    strict, loose = (np.minimum, np.fmin) if least else (np.maximum, np.fmax)
    pick = strict if "NaN" in op.modifiers else loose

    def compute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        ua, ub = unsigned(a), unsigned(b)
        tied = (ua | ub if least else ua & ub).view(a.dtype)
        return np.where(a == b, tied, pick(a, b))

    return Arithmetic(op.type, (op.type,) * 2, compute)


@instruction("copysign", WIDE_FLOATS)
def _(op: Opcode) -> Arithmetic:
    return Arithmetic(op.type, (op.type,) * 2, lambda sign, size: np.copysign(size, sign))


# Functions. Those marked approx are computed in float64 and rounded.


def rounded(kind: str, function: Callable) -> Callable:
    return lambda x: function(x.astype(np.float64)).astype(FLOATS[kind])


def upper_word(function: Callable) -> Callable:
    """The gross approximations of float64: the low 32 bits are zero, subnormals too."""

    def compute(x: np.ndarray) -> np.ndarray:
        return (unsigned(function(x)) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)

    return compute


def reciprocal_root(x: np.ndarray) -> np.ndarray:
    return 1 / np.sqrt(x)


@instruction("rcp rsqrt", WIDE_FLOATS, "rn approx ftz")
def _(op: Opcode) -> Arithmetic:
    function = np.reciprocal if op.base == "rcp" else reciprocal_root
    if "rn" in op.modifiers:
        return Arithmetic(op.type, (op.type,), function)
    if op.type == "f64":
        return Arithmetic("f64", ("f64",), upper_word(function))
    return Arithmetic("f32", ("f32",), rounded("f32", function))


@instruction("sqrt", WIDE_FLOATS, "rn approx ftz")
def _(op: Opcode) -> Arithmetic:
    return Arithmetic(op.type, (op.type,), np.sqrt)


@instruction("ex2 lg2 tanh", {"f32"}, "approx ftz")
def _(op: Opcode) -> Arithmetic:
    function = {"ex2": np.exp2, "lg2": np.log2, "tanh": np.tanh}[op.base]
    return Arithmetic("f32", ("f32",), rounded("f32", function))


# Bits


@instruction("and or xor", BITS | {"pred"})
def _(op: Opcode) -> Arithmetic:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[op.base]
    return Arithmetic(op.type, (op.type,) * 2, function)


@instruction("not", BITS | {"pred"})
def _(op: Opcode) -> Arithmetic:
    return Arithmetic(op.type, (op.type,), np.invert)


@instruction("shl shr", BITS | INTEGERS)
def _(op: Opcode) -> Arithmetic:
    """Amounts beyond the width shift everything out; shr of a signed type keeps the sign."""
    bits = 8 * SIZES[op.type]
    left = op.base == "shl"

    def compute(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
        last = np.minimum(amount, bits - 1).astype(a.dtype)
        if left:
            return np.where(amount >= bits, a.dtype.type(0), a << last)
        gone = a >> a.dtype.type(bits - 1) if op.type[0] == "s" else a.dtype.type(0)
        return np.where(amount >= bits, gone, a >> last)

    return Arithmetic(op.type, (op.type, "u32"), compute)


@instruction("shf", {"b32"}, "l r wrap clamp")
def _(op: Opcode) -> Arithmetic:
    """The upper (l) or lower (r) word of (b, a) shifted as one."""
    wraps = "wrap" in op.modifiers

    def compute(a: np.ndarray, b: np.ndarray, amount: np.ndarray) -> np.ndarray:
        by = (amount & 31 if wraps else np.minimum(amount, 32)).astype(np.uint64)
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        if "l" in op.modifiers:
            # A shift by 32 leaves a in the upper word; uint64 has room for it.
            return ((both << by) >> np.uint64(32)).astype(np.uint32)
        return (both >> by).astype(np.uint32)

    return Arithmetic("b32", ("b32", "b32", "u32"), compute)


@instruction("bfe", {"u32", "u64", "s32", "s64"})
def _(op: Opcode) -> Arithmetic:
    """The field of `length` bits from bit `start` on, the sign extended for signed types."""
    bits = 8 * SIZES[op.type]
    word = UNSIGNED[SIZES[op.type]]

    def compute(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        start, length = (start & 255).astype(np.int64), (length & 255).astype(np.int64)
        sign = (a < 0) & (op.type[0] == "s")
        source = np.minimum(np.minimum(start + length, bits) - 1, bits - 1)
        top = (unsigned(a) >> np.maximum(source, 0).astype(word)) & word(1)
        fill = np.where((op.type[0] == "s") & (length > 0), top, word(0)).astype(bool)
        fill = np.where(start >= bits, sign & (length > 0), fill)
        shifted = np.where(
            start >= bits, word(0), unsigned(a) >> np.minimum(start, bits - 1).astype(word)
        )
        kept = np.maximum(np.minimum(length, bits - start), 0)
        mask = np.where(
            kept >= bits, ~word(0), (word(1) << np.minimum(kept, bits - 1).astype(word)) - word(1)
        )
        return np.where(fill, shifted & mask | ~mask, shifted & mask).astype(word).view(a.dtype)

    return Arithmetic(op.type, (op.type, "u32", "u32"), compute)


@instruction("bfi", {"b32", "b64"})
def _(op: Opcode) -> Arithmetic:
    """b with its `length` bits from bit `start` on taken from a."""
    bits = 8 * SIZES[op.type]
    word = UNSIGNED[SIZES[op.type]]

    def compute(a: np.ndarray, b: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        start, length = start & 255, length & 255
        field = np.where(
            length >= bits,
            ~word(0),
            (word(1) << np.minimum(length, bits - 1).astype(word)) - word(1),
        )
        at = np.minimum(start, bits - 1).astype(word)
        mask = np.where(start >= bits, word(0), field << at)
        return a << at & mask | b & ~mask

    return Arithmetic(op.type, (op.type, op.type, "u32", "u32"), compute)


def bit_length(x: np.ndarray) -> np.ndarray:
    """One more than the index of the highest bit set; float64 holds 32 bits exactly."""
    high, low = (
        (x >> np.uint64(32)).astype(np.float64),
        (x & np.uint64(0xFFFFFFFF)).astype(np.float64),
    )
    return np.where(high > 0, np.frexp(high)[1] + 32, np.frexp(low)[1]).astype(np.uint32)


@instruction("clz", {"b32", "b64"})
def _(op: Opcode) -> Arithmetic:
    bits = np.uint32(8 * SIZES[op.type])
    return Arithmetic("u32", (op.type,), lambda a: bits - bit_length(a.astype(np.uint64)))


@instruction("bfind", {"u32"}, "shiftamt")
def _(op: Opcode) -> Arithmetic:
    shifts = "shiftamt" in op.modifiers

    def compute(a: np.ndarray) -> np.ndarray:
        length = bit_length(a.astype(np.uint64))
        found = np.uint32(32) - length if shifts else length - np.uint32(1)
        return np.where(a == 0, np.uint32(0xFFFFFFFF), found)

    return Arithmetic("u32", (op.type,), compute)


@instruction("popc", {"b32", "b64"})
def _(op: Opcode) -> Arithmetic:
    return Arithmetic("u32", (op.type,), lambda a: np.bitwise_count(a).astype(np.uint32))


@instruction("brev", {"b32", "b64"})
def _(op: Opcode) -> Arithmetic:
    def compute(a: np.ndarray) -> np.ndarray:
        octets = a.reshape(-1, 1).view(np.uint8)
        flipped = np.unpackbits(octets, axis=1, bitorder="little")
        return (
            np.packbits(flipped[:, ::-1], axis=1, bitorder="little").view(a.dtype).reshape(a.shape)
        )

    return Arithmetic(op.type, (op.type,), compute)


@instruction("lop3", {"b32"})
def _(op: Opcode) -> Arithmetic:
    """Bit k of the table is the result of the input bits k = 4a + 2b + c."""

    def compute(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
        out = np.zeros_like(a)
        for k in range(8):
            chosen = np.where(table >> k & 1, ~np.uint32(0), np.uint32(0))
            out |= chosen & (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        return out

    return Arithmetic("b32", ("b32", "b32", "b32", "u32"), compute)


@instruction("prmt", {"b32"})
def _(op: Opcode) -> Arithmetic:
    """Four bytes picked from the eight of (b, a); bit 3 of a selector repeats the byte's sign."""

    def compute(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        out = np.zeros(np.broadcast(a, b, selectors).shape, np.uint32)
        for k in range(4):
            selector = (selectors >> np.uint32(4 * k)) & np.uint32(15)
            octet = (both >> (8 * (selector & 7)).astype(np.uint64)).astype(np.uint32) & np.uint32(
                255
            )
            sign = np.where(octet & 128, np.uint32(255), np.uint32(0))
            out |= np.where(selector & 8, sign, octet) << np.uint32(8 * k)
        return out

    return Arithmetic("b32", ("b32", "b32", "u32"), compute)


# Comparison and selection

ORDERED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def comparison(name: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """False where an operand is NaN; the names in ..u are true there."""
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "ne":  # of floats: ordered
        return lambda a, b: (a < b) | (a > b)
    if name in ORDERED:
        return ORDERED[name]
    inverse = {"eq": "ne", "ne": "eq", "lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}[name[:-1]]
    holds = comparison(inverse)
    return lambda a, b: ~holds(a, b)


@instruction(
    "setp",
    BITS | INTEGERS | WIDE_FLOATS,
    "eq ne lt le gt ge equ neu ltu leu gtu geu num nan lo ls hi hs ftz",
)
def _(op: Opcode) -> Arithmetic:
    name = next(iter(op.modifiers - {"ftz"}))
    name = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)
    return Arithmetic("pred", (op.type,) * 2, comparison(name))


@instruction("selp", BITS | INTEGERS | WIDE_FLOATS)
def _(op: Opcode) -> Arithmetic:
    return Arithmetic(op.type, (op.type, op.type, "pred"), lambda a, b, p: np.where(p, a, b))
