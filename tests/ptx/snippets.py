"""Runs a line or two of PTX over arrays, for the tests of single instructions."""

import numpy as np

from ptx.emulator.instructions import numpy_type
from ptx.emulator.machine import run_ptx
from ptx.emulator.parser import SIZES


def container(kind):
    """The register type that holds a type: 16 bits for 8-bit types, the bits of half floats."""
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
    """Runs a body over arrays of the source types. Returns the array of d."""
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
    """An array that keeps whole numbers exact: numpy makes float64 of large and negative ones."""
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
    operands = ", ".join(f"a{i}" for i in range(len(sources)))
    return evaluate(f"{name} d, {operands};", sources, result, *arrays)


def same(got, expected):
    """Asserts that all bits are equal, signs of zero included. Any NaN equals any other."""
    if got.dtype.kind == "f":
        expected = np.asarray(expected, np.float64).astype(got.dtype)
        assert np.array_equal(np.isnan(got), np.isnan(expected)), (got, expected)
        solid = ~np.isnan(got)
        assert np.array_equal(got[solid], expected[solid]), (got, expected)
        assert np.array_equal(np.signbit(got[solid]), np.signbit(expected[solid])), (got, expected)
    else:
        bits = 8 * got.itemsize
        assert [int(v) % (1 << bits) for v in got] == [int(v) % (1 << bits) for v in expected]
