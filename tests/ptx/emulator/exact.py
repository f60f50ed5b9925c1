"""fma(a, b, c) on numpy arrays, rounded once: numpy has none."""

from __future__ import annotations

import ctypes
import functools

import numpy as np

from ptx.emulator.toolchain import shared_library


@functools.cache
def _functions() -> dict[np.dtype, ctypes._CFuncPtr]:
    library = ctypes.CDLL(str(shared_library("exact.cpp")))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    found = {np.dtype(np.float32): library.ptx_fma_f32, np.dtype(np.float64): library.ptx_fma_f64}
    for function in found.values():
        function.argtypes = [pointer] * 4 + [count]
        function.restype = None
    return found


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of one floating-point type, operands broadcast."""
    a, b, c = (np.ascontiguousarray(x) for x in np.broadcast_arrays(a, b, c))
    out = np.empty_like(a)
    _functions()[a.dtype](a.ctypes.data, b.ctypes.data, c.ctypes.data, out.ctypes.data, a.size)
    return out
