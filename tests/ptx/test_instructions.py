"""Each instruction against results worked out by hand, or by numpy in a wider type."""

import math
from fractions import Fraction

import numpy as np
import pytest

from ptx import accesses, collectives
from ptx.checks import Violation
from ptx.instructions import TABLE, UnknownInstruction, numpy_type
from ptx.machine import Machine, run_ptx
from ptx.parser import SIZES, Module

INF, NAN = math.inf, math.nan
F32 = np.finfo(np.float32)
F64 = np.finfo(np.float64)
NUMBERS = {"f32": "%f", "f64": "%fd"}
tested: set[str] = set()


def container(kind):
    """The register type that holds a type: 8 bits live in 16, half floats in their bits."""
    size = max(SIZES[kind], 2)
    return kind if kind in ("f32", "f64") else f"b{8 * size}"


def program(body, kinds, threads):
    """A kernel that loads an array of each kind into a0, a1, ..., runs the body, and stores d."""
    *sources, result = kinds
    lines = [".version 8.0", ".target sm_90", ".address_size 64", ".visible .entry test("]
    lines.append(",\n".join(f".param .u64 p{i}" for i in range(len(kinds))))
    lines += [")", "{", ".reg .b64 %rd<40>;", ".reg .b32 %t<4>;", ".reg .pred %p<8>;"]
    lines += [f".reg .{container(k)} a{i};" for i, k in enumerate(sources)]
    lines += [f".reg .{container(result)} d;", "mov.u32 %t0, %tid.x;"]
    for i, kind in enumerate(kinds):
        lines += [
            f"ld.param.u64 %rd{3 * i}, [p{i}];",
            f"mul.wide.u32 %rd{3 * i + 1}, %t0, {SIZES[kind]};",
            f"add.s64 %rd{3 * i + 2}, %rd{3 * i}, %rd{3 * i + 1};",
        ]
    for i, kind in enumerate(sources):
        lines.append(f"ld.global.{moved(kind)} a{i}, [%rd{3 * i + 2}];")
    lines += [body, f"st.global.{moved(result)} [%rd{3 * len(sources) + 2}], d;", "ret;", "}"]
    return "\n".join(lines)


def moved(kind):
    return kind if kind in ("f32", "f64") else f"{'s' if kind[0] == 's' else 'u'}{8 * SIZES[kind]}"


def evaluate(body, sources, result, *arrays):
    """Runs a body over arrays of the source types; the array of d."""
    given = [exactly(a) for a in arrays]
    count = max(len(a) for a in given)
    buffers = []
    for kind, a in zip(sources, given, strict=True):
        dtype = np.dtype(numpy_type(kind))
        if dtype.kind != "f":
            a = np.array([int(v) % (1 << 8 * dtype.itemsize) for v in a.tolist()], np.uint64)
            a = a.astype(f"u{dtype.itemsize}").view(dtype)
        buffers.append(aligned(np.resize(a.astype(dtype), count)))
    out = aligned(np.zeros(count, numpy_type(result)))
    run_ptx(program(body, [*sources, result], count), "test", count, *buffers, out)
    return out


def exactly(values):
    """An array of whole numbers as they are: numpy would make float64 of large and small ones."""
    values = list(values)
    whole = all(isinstance(v, (int, np.integer)) for v in values)
    return np.array(values, object if whole else None)


def aligned(a):
    backing = np.zeros(a.nbytes + 256, np.uint8)
    skip = -backing.ctypes.data % 256
    view = backing[skip : skip + a.nbytes].view(a.dtype)
    view[:] = a
    return view


def instruction(name, sources, result, *arrays):
    tested.add(name.split(".")[0])
    operands = ", ".join(f"a{i}" for i in range(len(sources)))
    return evaluate(f"{name} d, {operands};", sources, result, *arrays)


def same(got, expected):
    """Equal in every bit but those of a NaN, and the sign of zero counts."""
    if got.dtype.kind == "f":
        expected = np.asarray(expected, np.float64).astype(got.dtype)
        assert np.array_equal(np.isnan(got), np.isnan(expected)), (got, expected)
        solid = ~np.isnan(got)
        assert np.array_equal(got[solid], expected[solid]), (got, expected)
        assert np.array_equal(np.signbit(got[solid]), np.signbit(expected[solid])), (got, expected)
    else:
        bits = 8 * got.itemsize
        assert [int(v) % (1 << bits) for v in got] == [int(v) % (1 << bits) for v in expected]


# name, source types, result type, source arrays, expected
CASES = [
    # Integer arithmetic wraps around.
    ("add.s32", ["s32", "s32"], "s32", [[1, 2**31 - 1, -5], [2, 1, 3]], [3, -(2**31), -2]),
    ("add.u16", ["u16", "u16"], "u16", [[65535], [2]], [1]),
    ("add.s64", ["s64", "s64"], "s64", [[2**63 - 1, 7], [1, -9]], [-(2**63), -2]),
    ("sub.s32", ["s32", "s32"], "s32", [[1, -(2**31)], [2, 1]], [-1, 2**31 - 1]),
    ("sub.u64", ["u64", "u64"], "u64", [[0], [1]], [2**64 - 1]),
    ("mul.lo.s32", ["s32", "s32"], "s32", [[65536, -3], [65536, 7]], [0, -21]),
    ("mul.lo.u64", ["u64", "u64"], "u64", [[2**63 + 3], [2]], [6]),
    ("mul.hi.u32", ["u32", "u32"], "u32", [[2**32 - 1], [2**32 - 1]], [2**32 - 2]),
    ("mul.hi.s32", ["s32", "s32"], "s32", [[-1, -(2**31)], [1, -(2**31)]], [-1, 2**30]),
    ("mul.hi.u64", ["u64", "u64"], "u64",
     [[2**64 - 1, 2**63, 12345678901234567], [2**64 - 1, 6, 98765432109876543]],
     [2**64 - 2, 3, 12345678901234567 * 98765432109876543 >> 64]),
    ("mul.hi.s64", ["s64", "s64"], "s64",
     [[-1, -(2**63), -12345678901234567], [1, -(2**63), 98765432109876543]],
     [-1, 2**62, -12345678901234567 * 98765432109876543 >> 64]),
    ("mul.wide.u32", ["u32", "u32"], "u64", [[2**32 - 1], [2**32 - 1]], [(2**32 - 1) ** 2]),
    ("mul.wide.s32", ["s32", "s32"], "s64", [[-(2**31)], [-(2**31)]], [2**62]),
    ("mul.wide.u16", ["u16", "u16"], "u32", [[65535], [65535]], [65535**2]),
    ("mad.lo.s32", ["s32"] * 3, "s32", [[65536, 3], [65536, 4], [5, -20]], [5, -8]),
    ("mad.lo.s64", ["s64"] * 3, "s64", [[2**62], [4], [-1]], [-1]),
    ("mad.wide.s32", ["s32", "s32", "s64"], "s64", [[-2], [2**31 - 1], [2**40]], [2**40 - 2**32 + 2]),
    ("mad.hi.u32", ["u32"] * 3, "u32", [[2**31], [4], [7]], [9]),
    ("div.s32", ["s32", "s32"], "s32", [[7, -7, 7, -7, -(2**31)], [2, 2, -2, -2, -1]], [3, -3, -3, 3, -(2**31)]),
    ("div.u32", ["u32", "u32"], "u32", [[2**32 - 1], [2]], [2**31 - 1]),
    ("div.s64", ["s64", "s64"], "s64", [[-(2**63), 10**18], [3, -7]], [-(2**63 // 3), -(10**18 // 7)]),
    ("rem.s32", ["s32", "s32"], "s32", [[7, -7, 7, -7], [3, 3, -3, -3]], [1, -1, 1, -1]),
    ("rem.u64", ["u64", "u64"], "u64", [[2**64 - 1], [10]], [5]),
    ("abs.s32", ["s32"], "s32", [[-5, 5, -(2**31)]], [5, 5, -(2**31)]),
    ("neg.s64", ["s64"], "s64", [[5, -(2**63)]], [-5, -(2**63)]),
    ("min.s32", ["s32", "s32"], "s32", [[-1, 3], [1, 2]], [-1, 2]),
    ("max.u32", ["u32", "u32"], "u32", [[2**32 - 1, 3], [1, 4]], [2**32 - 1, 4]),
    ("min.u64", ["u64", "u64"], "u64", [[2**64 - 1], [1]], [1]),
    ("max.s64", ["s64", "s64"], "s64", [[-1], [-2]], [-1]),
    # Floating point: rounded to nearest even, subnormals kept unless .ftz, NaN.
    ("add.f32", ["f32", "f32"], "f32", [[1, 1, 16777216, INF, 3e38], [2**-24, 3 * 2**-25, 1, -INF, 3e38]],
     [1, 1 + 2**-23, 16777216, NAN, INF]),
    ("add.rn.f64", ["f64", "f64"], "f64", [[1, 1, -0.0], [2**-53, 3 * 2**-54, 0.0]], [1, 1 + 2**-52, 0.0]),
    ("add.ftz.f32", ["f32", "f32"], "f32", [[1e-40, -1e-40, 1], [1, 0.0, 1e-40]], [1, 0.0, 1]),
    ("sub.f64", ["f64", "f64"], "f64", [[1, INF], [1, INF]], [0.0, NAN]),
    ("mul.f32", ["f32", "f32"], "f32", [[1e-30, 1e30, 0, -1e-30], [1e-10, 1e30, INF, 1e-30]],
     [np.float32(1e-30) * np.float32(1e-10), INF, NAN, -0.0]),
    ("mul.rn.f64", ["f64", "f64"], "f64", [[1 + 2**-52], [1 + 2**-52]], [1 + 2**-51]),
    ("mul.ftz.f32", ["f32", "f32"], "f32", [[1e-30, -1e-30], [1e-10, 1e-10]], [0.0, -0.0]),
    ("div.rn.f32", ["f32", "f32"], "f32", [[1, 1, 0, -1], [3, 0, 0, INF]], [np.float32(1) / np.float32(3), INF, NAN, -0.0]),
    ("div.rn.f64", ["f64", "f64"], "f64", [[1], [3]], [1 / 3]),
    ("div.full.f32", ["f32", "f32"], "f32", [[6], [3]], [2]),
    ("abs.f64", ["f64"], "f64", [[-0.0, -INF, -1.5]], [0.0, INF, 1.5]),
    ("neg.f32", ["f32"], "f32", [[0.0, -INF, 1.5]], [-0.0, INF, -1.5]),
    ("min.f32", ["f32", "f32"], "f32", [[NAN, 1, NAN, 0.0, 2], [1, NAN, NAN, -0.0, 1]], [1, 1, NAN, -0.0, 1]),
    ("max.f64", ["f64", "f64"], "f64", [[NAN, 1, -0.0, 2], [1, NAN, 0.0, 3]], [1, 1, 0.0, 3]),
    ("min.NaN.f32", ["f32", "f32"], "f32", [[NAN, 1, 2], [1, NAN, 3]], [NAN, NAN, 2]),
    ("copysign.f64", ["f64", "f64"], "f64", [[-0.0, 1.0], [2.0, -3.0]], [-2.0, 3.0]),
    ("rcp.rn.f64", ["f64"], "f64", [[3, 0.0, -0.0, INF]], [1 / 3, INF, -INF, 0.0]),
    ("rcp.approx.ftz.f32", ["f32"], "f32", [[4, 1e-40]], [0.25, INF]),
    ("sqrt.rn.f64", ["f64"], "f64", [[2, -1, -0.0, 5e-324]], [math.sqrt(2), NAN, -0.0, math.sqrt(5e-324)]),
    ("sqrt.rn.f32", ["f32"], "f32", [[2]], [np.sqrt(np.float32(2))]),
    ("rsqrt.approx.f32", ["f32"], "f32", [[4, 0.0]], [0.5, INF]),
    ("ex2.approx.ftz.f32", ["f32"], "f32", [[0, 3, -200, 200, -INF, NAN]], [1, 8, 0, INF, 0, NAN]),
    ("lg2.approx.f32", ["f32"], "f32", [[8, 0, -1, INF]], [3, -INF, NAN, INF]),
    ("tanh.approx.f32", ["f32"], "f32", [[0, 40, -40]], [0, 1, -1]),
    # Bits
    ("and.b32", ["b32", "b32"], "b32", [[0b1100], [0b1010]], [0b1000]),
    ("or.b16", ["b16", "b16"], "b16", [[0b1100], [0b1010]], [0b1110]),
    ("xor.b64", ["b64", "b64"], "b64", [[2**63 + 12], [10]], [2**63 + 6]),
    ("not.b32", ["b32"], "b32", [[0, 5]], [2**32 - 1, 2**32 - 6]),
    ("shl.b32", ["b32", "u32"], "b32", [[1, 3, 1, 1], [31, 31, 32, 1000]], [2**31, 2**31, 0, 0]),
    ("shl.b64", ["b64", "u32"], "b64", [[1, 1], [63, 64]], [2**63, 0]),
    ("shr.u32", ["u32", "u32"], "u32", [[2**31, 2**31], [31, 32]], [1, 0]),
    ("shr.s32", ["s32", "u32"], "s32", [[-8, -8, 8, -8], [1, 32, 40, 2**31]], [-4, -1, 0, -1]),
    ("shr.s64", ["s64", "u32"], "s64", [[-(2**63), -1], [63, 100]], [-1, -1]),
    ("shr.b16", ["b16", "u32"], "b16", [[0x8000], [15]], [1]),
    ("shf.l.wrap.b32", ["b32", "b32", "u32"], "b32", [[0x80000001, 1, 1], [0x12345678, 2, 2], [4, 32, 0]], [0x23456788, 2, 2]),
    ("shf.r.wrap.b32", ["b32", "b32", "u32"], "b32", [[0x80000001, 5], [0x12345678, 9], [4, 32]], [0x88000000, 5]),
    ("shf.l.clamp.b32", ["b32", "b32", "u32"], "b32", [[1, 1], [2, 2], [32, 99]], [1, 1]),
    ("shf.r.clamp.b32", ["b32", "b32", "u32"], "b32", [[1], [2], [32]], [2]),
    ("bfe.u32", ["u32"] * 3, "u32", [[0xABCD1234, 0xABCD1234, 0xABCD1234, 0xF], [8, 28, 40, 0], [8, 8, 4, 0]], [0x12, 0xA, 0, 0]),
    ("bfe.s32", ["s32", "u32", "u32"], "s32", [[0x00000F00, 0x00000700, -2, -2], [8, 8, 28, 40], [4, 4, 8, 4]], [-1, 7, -1, -1]),
    ("bfe.u64", ["u64", "u32", "u32"], "u64", [[0xFEDCBA9876543210], [52], [11]], [0x7ED]),
    ("bfi.b32", ["b32", "b32", "u32", "u32"], "b32", [[0xF, 0xFF, 1], [0, 0x12345678, 9], [4, 28, 32], [4, 8, 4]], [0xF0, 0xF2345678, 9]),
    ("bfi.b64", ["b64", "b64", "u32", "u32"], "b64", [[0x7FF, 3], [1, 1], [52, 0], [11, 64]], [(0x7FF << 52) + 1, 3]),
    ("clz.b32", ["b32"], "u32", [[0, 1, 2**31, 255]], [32, 31, 0, 24]),
    ("clz.b64", ["b64"], "u32", [[0, 1, 2**63, 2**53 - 1, 2**32]], [64, 63, 0, 11, 31]),
    ("popc.b32", ["b32"], "u32", [[0, 2**32 - 1, 5]], [0, 32, 2]),
    ("popc.b64", ["b64"], "u32", [[2**64 - 1, 5]], [64, 2]),
    ("brev.b32", ["b32"], "b32", [[1, 6, 0x80000000]], [0x80000000, 0x60000000, 1]),
    ("brev.b64", ["b64"], "b64", [[1, 0b1011]], [2**63, 0b1101 << 60]),
    ("prmt.b32", ["b32", "b32", "u32"], "b32",
     [[0x44332211, 0x44332211, 0x00008000], [0x88776655, 0x88776655, 0], [0x3210, 0x7160, 0x0009]],
     [0x44332211, 0x88227711, 0x000000FF]),
    # Conversion
    ("cvt.u32.u64", ["u64"], "u32", [[2**40 + 7]], [7]),
    ("cvt.u64.u32", ["u32"], "u64", [[2**32 - 1]], [2**32 - 1]),
    ("cvt.s64.s32", ["s32"], "s64", [[-1]], [-1]),
    ("cvt.u16.u64", ["u64"], "u16", [[0x12345]], [0x2345]),
    ("cvt.u64.u16", ["u16"], "u64", [[65535]], [65535]),
    ("cvt.s32.s8", ["s8"], "s32", [[-1, 127]], [-1, 127]),
    ("cvt.u32.u8", ["u8"], "u32", [[255]], [255]),
    ("cvt.sat.u8.s32", ["s32"], "u8", [[-5, 300, 77]], [0, 255, 77]),
    ("cvt.rn.f32.s32", ["s32"], "f32", [[16777217, -3, 16777219]], [16777216, -3, 16777220]),
    ("cvt.rn.f32.u64", ["u64"], "f32", [[2**64 - 1, 2**40 + 2**16, 2**40 + 2**16 + 1]], [2**64, 2**40, 2**40 + 2**17]),
    ("cvt.rn.f64.s64", ["s64"], "f64", [[2**53 + 1, -(2**63)]], [2**53, -(2**63)]),
    ("cvt.rn.f64.u32", ["u32"], "f64", [[2**32 - 1]], [2**32 - 1]),
    ("cvt.f64.f32", ["f32"], "f64", [[0.1, NAN, -0.0]], [float(np.float32(0.1)), NAN, -0.0]),
    ("cvt.rn.f32.f64", ["f64"], "f32", [[1 + 2**-24, 1 + 3 * 2**-24, 1e300, 1e-46]], [1, 1 + 2**-22, INF, 0]),
    ("cvt.rz.f32.f64", ["f64"], "f32", [[1 + 3 * 2**-24, -1 - 3 * 2**-24, 1e300]], [1 + 2**-23, -1 - 2**-23, F32.max]),
    ("cvt.rni.f64.f64", ["f64"], "f64", [[0.5, 1.5, -0.5]], [0, 2, -0.0]),
    ("cvt.rzi.f64.f64", ["f64"], "f64", [[1.9, -1.9]], [1, -1]),
    ("cvt.rmi.f64.f64", ["f64"], "f64", [[1.9, -1.1]], [1, -2]),
    ("cvt.rpi.f32.f32", ["f32"], "f32", [[1.1, -1.9]], [2, -1]),
    ("cvt.sat.f32.f32", ["f32"], "f32", [[-1, 0.5, 2, NAN]], [0, 0.5, 1, 0]),
    ("cvt.rzi.s32.f32", ["f32"], "s32", [[1.9, -1.9, 3e9, -3e9, NAN]], [1, -1, 2**31 - 1, -(2**31), 0]),
    ("cvt.rni.s32.f64", ["f64"], "s32", [[2.5, 3.5, 1e300, NAN]], [2, 4, 2**31 - 1, -(2**31)]),
    ("cvt.rzi.u32.f32", ["f32"], "u32", [[-1, 4294967040.0, 1e10, NAN]], [0, 4294967040, 2**32 - 1, 0]),
    ("cvt.rzi.u64.f64", ["f64"], "u64", [[1.8e19, 1e30, -2, NAN]], [18 * 10**18, 2**64 - 1, 0, 2**63]),
    ("cvt.rmi.s64.f64", ["f64"], "s64", [[-1.5, 1e19, NAN]], [-2, 2**63 - 1, -(2**63)]),
    ("cvt.f32.f16", ["f16"], "f32", [[1.5, INF, NAN, 6e-8]], [1.5, INF, NAN, 2**-24]),
    ("cvt.rn.f16.f32", ["f32"], "f16", [[1 + 2**-11, 1 + 3 * 2**-11, 65519, 65520, NAN]], [1, 1 + 2**-9, 65504, INF, NAN]),
    ("cvt.f32.bf16", ["bf16"], "f32", [[0x3F80, 0xFF80, 0x0001]], [1, -INF, 2**-133]),
    ("cvt.rn.bf16.f32", ["f32"], "bf16",
     [[1, 1 + 2**-8, 1 + 3 * 2**-8, -INF, F32.max, NAN, 2**-134]],
     [0x3F80, 0x3F80, 0x3F82, 0xFF80, 0x7F80, 0x7FFF, 0]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sources", "result", "given", "expected"),
    CASES,
    ids=[c[0] for c in CASES],
)
def test_instruction(name, sources, result, given, expected):
    same(instruction(name, sources, result, *given), expected)


def exact_fma(a, b, c, dtype):
    """a * b + c in rational arithmetic, rounded once."""
    value = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    # float() of a Fraction rounds once to float64; float32 needs its own single rounding.
    near = dtype(float(value)) if dtype is np.float64 else np.float32(float(value))
    candidates = [near, np.nextafter(near, dtype(-INF)), np.nextafter(near, dtype(INF))]
    errors = [abs(Fraction(float(x)) - value) for x in candidates]
    best = min(errors)
    tied = [x for x, e in zip(candidates, errors, strict=True) if e == best]
    return min(tied, key=lambda x: int(x.view(f"u{x.itemsize}")) & 1)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_fma_rounds_once(kind):
    dtype = numpy_type(kind)
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(500).astype(dtype) for _ in range(2))
    c = (-a * b * (1 + generator.integers(-2, 3, 500) * np.finfo(dtype).eps)).astype(dtype)
    # A product and an addend whose sum is a tie but for a bit far below.
    a[0], b[0], c[0] = 1 + np.finfo(dtype).eps, 1 - np.finfo(dtype).eps, np.finfo(dtype).eps ** 2
    got = instruction(f"fma.rn.{kind}", [kind] * 3, kind, a, b, c)
    same(got, np.array([exact_fma(*abc, dtype) for abc in zip(a, b, c, strict=True)], dtype))
    same(instruction(f"fma.rn.{kind}", [kind] * 3, kind, [INF, 0.0, 2], [0, -1, 3], [1, 0.0, -INF]), [NAN, 0.0, -INF])


def test_approximations_of_float64_keep_the_upper_word():
    x = np.array([3.0, 1e-300, -7.0])
    got = instruction("rcp.approx.ftz.f64", ["f64"], "f64", x)
    assert np.all(got.view(np.uint64) & np.uint64(0xFFFFFFFF) == 0)
    assert np.all(np.abs(got * x - 1) < 2.0**-19)
    got = instruction("rsqrt.approx.ftz.f64", ["f64"], "f64", np.abs(x))
    assert np.all(np.abs(got * np.sqrt(np.abs(x)) - 1) < 2.0**-19)


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [  # over (1, 2), (2, 1), (1, 1), (nan, 1)
        ("eq", "f32", [0, 0, 1, 0]), ("ne", "f32", [1, 1, 0, 0]), ("lt", "f64", [1, 0, 0, 0]),
        ("le", "f64", [1, 0, 1, 0]), ("gt", "f32", [0, 1, 0, 0]), ("ge", "f32", [0, 1, 1, 0]),
        ("equ", "f32", [0, 0, 1, 1]), ("neu", "f64", [1, 1, 0, 1]), ("ltu", "f32", [1, 0, 0, 1]),
        ("leu", "f64", [1, 0, 1, 1]), ("gtu", "f32", [0, 1, 0, 1]), ("geu", "f64", [0, 1, 1, 1]),
        ("num", "f32", [1, 1, 1, 0]), ("nan", "f64", [0, 0, 0, 1]),
    ],
)  # fmt: skip
def test_comparison_of_floats(name, kind, expected):
    tested.update({"setp", "selp"})
    body = f"setp.{name}.{kind} %p1, a0, a1; selp.u32 d, 1, 0, %p1;"
    same(evaluate(body, [kind, kind], "u32", [1, 2, 1, NAN], [2, 1, 1, 1]), expected)


def test_comparison_of_integers():
    high = [2**31, 1]
    for name, kind, expected in [
        ("lt", "s32", [1, 0]), ("lt", "u32", [0, 0]), ("lo", "u32", [0, 0]), ("hi", "u32", [1, 0]),
        ("ls", "u32", [0, 1]), ("hs", "u32", [1, 1]), ("ge", "s32", [0, 1]), ("eq", "b32", [0, 1]),
        ("ne", "s32", [1, 0]),
    ]:  # fmt: skip
        body = f"setp.{name}.{kind} %p1, a0, a1; selp.u32 d, 1, 0, %p1;"
        same(evaluate(body, [kind, kind], "u32", high, [1, 1]), expected)


def test_selection_and_predicates():
    tested.update({"selp", "and", "or", "xor", "not", "mov"})
    body = """setp.gt.f64 %p1, a0, a1; setp.gt.f64 %p2, a0, 0d0000000000000000;
        and.pred %p3, %p1, %p2; not.pred %p4, %p3; xor.pred %p4, %p4, %p1; or.pred %p4, %p4, %p2;
        mov.pred %p5, -1; and.pred %p4, %p4, %p5; selp.f64 d, a0, a1, %p4;"""
    a, b = np.array([1.0, 5.0, -3.0, -1.0]), np.array([2.0, 4.0, -4.0, 0.0])
    p1, p2 = a > b, a > 0
    same(evaluate(body, ["f64", "f64"], "f64", a, b), np.where((~(p1 & p2) ^ p1) | p2, a, b))


def test_any_function_of_three_bits():
    tested.add("lop3")
    a, b, c = [0xF0F0F0F0], [0xCCCCCCCC], [0xAAAAAAAA]
    for table, expected in [(0x80, 0x80808080), (0xFE, 0xFEFEFEFE), (0x96, 0x96969696), (0xCA, 0xCACACACA)]:
        got = evaluate(f"lop3.b32 d, a0, a1, a2, {table};", ["b32"] * 3, "b32", a, b, c)
        same(got, expected=[expected])


def test_words_are_taken_apart_and_put_together():
    tested.add("mov")
    body = ".reg .b32 low, high; mov.b64 {low, high}, a0; mov.b64 d, {high, low};"
    same(evaluate(body, ["b64"], "b64", [0x1122334455667788]), [0x5566778811223344])
    body = ".reg .b32 high; mov.b64 {_, high}, a0; cvt.u64.u32 d, high;"
    same(evaluate(body, ["f64"], "u64", [1.0]), [0x3FF00000])
    body = ".reg .b16 l, h; mov.b32 {l, h}, a0; mov.b32 d, {h, l};"
    same(evaluate(body, ["f32"], "b32", [1.0]), [0x00003F80])
    same(evaluate("mov.b32 d, a0;", ["f32"], "b32", [-1.0]), [0xBF800000])


def test_a_moved_register_keeps_its_value():
    """The source changes afterwards, in some lanes only."""
    body = "mov.f32 d, a0; setp.gt.f32 %p1, a0, 0f40000000; @%p1 mov.f32 a0, 0f00000000;"
    same(evaluate(body, ["f32"], "f32", [1, 2, 3, 4]), [1, 2, 3, 4])


def test_immediates():
    same(evaluate("add.f64 d, a0, 0dBFF8000000000000;", ["f64"], "f64", [1.0]), [-0.5])
    same(evaluate("add.f32 d, a0, 0f3F000000;", ["f32"], "f32", [1.0]), [1.5])
    same(evaluate("add.s32 d, a0, -7;", ["s32"], "s32", [3]), [-4])
    same(evaluate("and.b32 d, a0, 0xFF00;", ["b32"], "b32", [0x1234]), [0x1200])
    same(evaluate("mul.lo.s64 d, a0, -4294967296;", ["s64"], "s64", [2]), [-(2**33)])


def test_branches_and_loops():
    """Collatz: every lane has its own number of rounds."""
    tested.update({"bra", "ret"})
    body = """mov.u32 d, 0;
    $loop: setp.eq.u32 %p1, a0, 1; @%p1 bra $done;
    and.b32 %t1, a0, 1; setp.eq.s32 %p2, %t1, 0; @%p2 bra $even;
    mad.lo.s32 a0, a0, 3, 1; bra.uni $next;
    $even: shr.u32 a0, a0, 1;
    $next: add.s32 d, d, 1; bra $loop;
    $done:"""

    def rounds(n):
        return 0 if n == 1 else 1 + rounds(n // 2 if n % 2 == 0 else 3 * n + 1)

    starts = np.arange(1, 98)
    same(evaluate(body, ["u32"], "u32", starts), [rounds(int(n)) for n in starts])


def test_guards():
    body = "setp.gt.f32 %p1, a0, 0f40000000; mov.f32 d, 0f3F800000; @%p1 mov.f32 d, a0; @!%p1 neg.f32 d, d;"
    same(evaluate(body, ["f32"], "f32", [1, 2, 3]), [-1, -1, 3])


def test_special_registers():
    text = """.version 8.0
.target sm_90
.address_size 64
.visible .entry test(.param .u64 p0)
{
.reg .b32 %r<20>; .reg .b64 %rd<4>;
mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mov.u32 %r2, %ntid.x; mov.u32 %r3, %ntid.y;
mov.u32 %r4, %laneid; mov.u32 %r5, %lanemask_lt; mov.u32 %r6, %warpid; mov.u32 %r7, %nctaid.x;
mad.lo.s32 %r8, %r1, %r2, %r0; mul.lo.s32 %r9, %r8, 16;
ld.param.u64 %rd0, [p0]; cvt.u64.u32 %rd1, %r9; add.s64 %rd2, %rd0, %rd1;
st.global.v4.u32 [%rd2], {%r3, %r4, %r5, %r6};
ret;
}"""
    machine = Machine()
    out = aligned(np.zeros(4 * 48, np.uint32))
    machine.memory.add(out.ctypes.data, out.nbytes, "out", written=False)
    params = int(out.ctypes.data).to_bytes(8, "little")
    machine.launch(Module(text), "test", (1, 1, 1), (8, 6, 1), params)
    threads = np.arange(48)
    assert out.reshape(48, 4).tolist() == [
        [6, t % 32, (1 << t % 32) - 1, t // 32] for t in threads.tolist()
    ]


def test_loads_and_stores_of_every_width():
    tested.update({"ld", "st", "cvta"})
    x = np.arange(16, dtype=np.uint32)
    body = """.reg .b32 w<4>; cvta.to.global.u64 %rd20, %rd0; shl.b64 %rd21, %rd1, 1;
        setp.lt.u32 %p1, %t0, 8; @!%p1 mov.u64 %rd21, 0; add.s64 %rd22, %rd20, %rd21;
        and.b64 %rd22, %rd22, -16; ld.global.nc.v4.u32 {w0, w1, w2, w3}, [%rd22+0];
        add.s32 w0, w0, w3; ld.global.v2.u32 {w1, w2}, [%rd22+8]; mad.lo.s32 d, w1, w2, w0;"""
    first = [i // 2 * 4 if i < 8 else 0 for i in range(16)]
    same(evaluate(body, ["u32"], "u32", x), [a + a + 3 + (a + 2) * (a + 3) for a in first])
    body = ".reg .b16 h; ld.global.u8 h, [%rd2+1]; cvt.u32.u16 d, h;"
    same(evaluate(body, ["u32"], "u32", [0x11223344]), [0x33])
    body = ".reg .b16 h; ld.global.s8 h, [%rd2]; cvt.s32.s16 d, h;"
    same(evaluate(body, ["s32"], "s32", [0x112233F4]), [0xF4 - 256])
    body = "st.global.u8 [%rd2], 7; ld.volatile.global.u32 d, [%rd2];"
    same(evaluate(body, ["u32"], "u32", [0x11223344]), [0x11223307])


SHARED = """.shared .align 16 .b8 box[256]; .reg .b32 at; shl.b32 at, %t0, 2;
    .reg .b64 where, generic; mov.u64 where, box; cvt.u64.u32 generic, at; add.s64 where, where, generic;
    st.shared.u32 [where], a0; bar.sync 0;"""


def test_shared_memory_and_its_generic_addresses():
    body = SHARED + "cvta.shared.u64 generic, where; ld.u32 d, [generic]; add.s32 d, d, 1; st.u32 [generic], d;"
    same(evaluate(body, ["u32"], "u32", np.arange(40)), np.arange(1, 41))


def test_local_memory_is_each_lanes_own():
    body = """.local .align 8 .b8 own[16]; .reg .b64 here, generic; mov.u64 here, own;
        cvta.local.u64 generic, here; st.local.u32 [here+4], a0; ld.u32 d, [generic+4];"""
    same(evaluate(body, ["u32"], "u32", np.arange(40)), np.arange(40))


def test_a_store_reaches_a_mixture_of_spaces():
    """Even lanes store to shared memory, odd ones to global, through generic addresses."""
    body = SHARED + """cvta.shared.u64 generic, where; and.b32 %t1, %t0, 1; setp.eq.s32 %p1, %t1, 0;
        selp.b64 generic, generic, %rd2, %p1; add.s32 %t2, a0, 100; st.u32 [generic], %t2;
        ld.shared.u32 %t3, [where]; ld.global.u32 d, [%rd2]; mad.lo.s32 d, %t3, 1000, d;"""
    i = np.arange(8)
    expected = np.where(i % 2 == 0, (i + 100) * 1000 + i, i * 1000 + i + 100)
    same(evaluate(body, ["u32"], "u32", i), expected)


@pytest.mark.parametrize(
    ("name", "given", "after"),
    [
        ("add.u32", [1, 2, 3], 10 + 6), ("min.s32", [7, -2, 12], -2), ("max.u32", [7, 20, 12], 20),
        ("and.b32", [6, 14, 15], 2), ("or.b32", [1, 4, 0], 15), ("xor.b32", [1, 2, 8], 1),
        ("exch.b32", [5, 6, 7], 7), ("inc.u32", [20, 11, 0], 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("space", ["global", "shared", ""])
def test_atomics_take_turns(name, given, after, space):
    """On a word that holds 10; the old values tell in which order."""
    tested.add("atom")
    where = {"global": "%rd0", "shared": "where", "": "%rd0"}[space]
    dot = f".{space}" if space else ""
    body = """.shared .align 4 .b8 word[4]; .reg .b64 where; mov.u64 where, word;
        setp.eq.s32 %p1, %t0, 0; @%p1 st.shared.u32 [where], 10; bar.sync 0;"""
    body += f"atom{dot}.{name} d, [{where}], a1; bar.sync 0; ld{dot}.u32 d, [{where}];"
    got = evaluate(body, ["u32", "u32"], "u32", [10, 10, 10], given)
    same(got, [after] * 3)


def test_compare_and_swap_and_reductions():
    tested.update({"atom", "red", "membar", "fence", "prefetch"})
    body = """membar.gl; bar.sync 0; fence.acq_rel.gpu; prefetch.global.L2 [%rd0]; .reg .b32 next; add.s32 next, %t0, 1;
        atom.global.cas.b32 d, [%rd0], %t0, next;"""
    same(evaluate(body, ["u32"], "u32", [0, 0, 0, 0]), [0, 1, 2, 3])
    body = "bar.sync 0; red.global.add.f32 [%rd0], 0f3F800000; bar.sync 0; ld.global.f32 d, [%rd0];"
    same(evaluate(body, ["f32"], "f32", [2.0, 0, 0]), [5.0, 5.0, 5.0])
    body = "bar.sync 0; red.relaxed.gpu.global.add.u64 [%rd0], 3; bar.sync 0; ld.global.u64 d, [%rd0];"
    same(evaluate(body, ["u64"], "u64", [2, 0, 0]), [11, 11, 11])


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "source"),
    [
        ("down", 1, 31, lambda i: i + 1 if i % 32 < 31 else i),
        ("up", 3, 0, lambda i: i - 3 if i % 32 >= 3 else i),
        ("bfly", 5, 31, lambda i: i ^ 5),
        ("idx", 7, 31, lambda i: i // 32 * 32 + 7),
        ("down", 2, 0x181F, lambda i: i + 2 if i % 8 < 6 else i),  # segments of 8
        ("idx", 3, 0x181F, lambda i: i // 8 * 8 + 3),
        ("up", 1, 0x1800, lambda i: i - 1 if i % 8 else i),
    ],
)
def test_shuffles(mode, by, clamp, source):
    tested.add("shfl")
    lanes = np.arange(64)
    expected = np.array([source(i) for i in lanes.tolist()])
    body = f"shfl.sync.{mode}.b32 d|%p1, a0, {by}, {clamp}, -1;"
    same(evaluate(body, ["u32"], "u32", lanes + 100), expected + 100)
    body += " selp.u32 d, 1, 0, %p1;"
    inside = evaluate(body, ["u32"], "u32", lanes).astype(bool)
    assert np.array_equal(inside, expected != lanes) or mode in ("idx", "bfly")
    assert inside.all() or mode not in ("idx", "bfly")


def test_a_part_of_a_warp_shuffles_by_itself():
    body = """setp.lt.u32 %p1, %t0, 16; mov.u32 d, 0; @%p1 bra $low; bra $end;
        $low: shfl.sync.down.b32 d, a0, 1, 31, 0xffff; $end:"""
    with pytest.raises(Violation, match="reads lane 16, which its mask does not name"):
        evaluate(body, ["u32"], "u32", np.arange(32))
    got = evaluate(body.replace(", 31, 0xffff", ", 15, 0xffff"), ["u32"], "u32", np.arange(32))
    same(got, [*range(1, 16), 15, *[0] * 16])


def test_votes():
    tested.update({"vote", "activemask"})
    x = np.arange(64)
    test = "setp.eq.u32 %p1, a0, 5; "
    same(evaluate(test + "vote.sync.ballot.b32 d, %p1, -1;", ["u32"], "u32", x), [32] * 32 + [0] * 32)
    for name, expected in [("any", [1, 0]), ("all", [0, 0]), ("uni", [0, 1])]:
        body = f"{test} vote.sync.{name}.pred %p2, %p1, -1; selp.u32 d, 1, 0, %p2;"
        same(evaluate(body, ["u32"], "u32", x), np.repeat(expected, 32))
    same(evaluate("activemask.b32 d;", ["u32"], "u32", np.arange(40)), [2**32 - 1] * 32 + [255] * 8)


def test_matches():
    tested.add("match")
    got = evaluate("match.any.sync.b32 d, a0, -1;", ["u32"], "u32", np.arange(32) % 2)
    same(got, [0x55555555, 0xAAAAAAAA] * 16)
    body = "match.all.sync.b64 d|%p1, a0, -1; selp.u32 d, d, 7, %p1;"
    same(evaluate(body, ["u64"], "u32", [2**40] * 32), [2**32 - 1] * 32)
    same(evaluate(body, ["u64"], "u32", [2**40] * 31 + [1]), [7] * 32)


def test_reductions_over_a_warp():
    tested.add("redux")
    x = np.arange(32) * 3 - 40
    for name, expected in [
        ("add.s32", x.sum()), ("min.s32", -40), ("max.s32", 53), ("max.u32", 2**32 - 1),
        ("and.b32", np.bitwise_and.reduce(x)), ("or.b32", np.bitwise_or.reduce(x)),
        ("xor.b32", np.bitwise_xor.reduce(x)),
    ]:  # fmt: skip
        got = evaluate(f"redux.sync.{name} d, a0, -1;", ["s32"], "s32", x)
        same(got, [int(expected)] * 32)


def test_barriers():
    tested.update({"bar", "barrier"})
    counted = "setp.lt.u32 %p1, %t0, 40; bar.red.popc.u32 d, 0, %p1;"
    same(evaluate(counted, ["u32"], "u32", np.arange(64)), [40] * 64)
    for name, expected in [("and", 0), ("or", 1)]:
        body = f"setp.lt.u32 %p1, %t0, 40; bar.red.{name}.pred %p2, 0, %p1; selp.u32 d, 1, 0, %p2;"
        same(evaluate(body, ["u32"], "u32", np.arange(64)), [expected] * 64)
    body = "barrier.sync.aligned 0; bar.warp.sync -1; mov.u32 d, a0;"
    same(evaluate(body, ["u32"], "u32", [1, 2] * 16), [1, 2] * 16)


@pytest.mark.parametrize(
    "body",
    [
        "sad.u32 d, a0, a0, a0;", "add.rz.f32 d, a0, a0;", "add.sat.s32 d, a0, a0;",
        "cvt.rna.f32.f32 d, a0;", "ld.global.b128 d, [%rd2];", "bar.sync 1;", "bar.sync 0, 64;",
        "shfl.down.b32 d, a0, 1, 31;", "atom.global.add.noftz.f16x2 d, [%rd0], a0;", "dp4a.u32.u32 d, a0, a0, a0;",
        "cvt.f32.f64 d, a0;", "setp.eq.and.s32 %p1, a0, a0, %p1;", "mov.u32 d, %clock;",
        "ld.shared::cluster.u32 d, [%rd2];", "add.cc.u32 d, a0, a0;", "fma.f32 d, a0, a0;",
    ],
)  # fmt: skip
def test_what_is_not_known_is_named(body):
    """At once, though no lane need come to it."""
    name = body.split()[0]
    with pytest.raises(Exception, match=name.replace(".", r"\.") + r"|symbol %clock") as found:
        evaluate(body, ["u32"], "u32", [1])
    assert isinstance(found.value, UnknownInstruction)


def test_every_instruction_is_tested():
    """Runs last in this file: what the tests above ran is all that there is."""
    tested.update(c[0].split(".")[0] for c in CASES)
    known = {*TABLE, *accesses.BUILDERS, *collectives.BUILDERS, "mov", "bra"}
    assert known <= tested, f"no test of {sorted(known - tested)}"
