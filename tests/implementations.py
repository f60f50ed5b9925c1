"""The implementations that the tests run on, by name.

cpu          the CPU kernels, with the widest instruction set of this machine
cpu-<isa>    with a narrower one
reference    plain torch
ptx          the CUDA kernels, on the emulator of tests/ptx
cuda         the CUDA kernels, on a GPU
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from gradfuse import _native

NATIVE_OFF = _native.reason == "GRADFUSE_NATIVE=0"
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
NARROWER = ("avx2", "baseline")

# GRADFUSE_PTX: auto (emulate if nvcc is there), 0 (never), 1 (it must be there, and be used).
PTX = os.environ.get("GRADFUSE_PTX", "auto")
PTX_REQUIRED = PTX == "1"

# These files run with each instruction set, because they test the kernels' arithmetic. Nothing else
# differs between instruction sets.
ARITHMETIC = {
    "test_adaptive_clip.py",
    "test_batch_norm.py",
    "test_batch_norm_hypothesis.py",
    "test_clip.py",
    "test_dropout.py",
    "test_exact_norm.py",
    "test_hypothesis.py",
    "test_layer_norm.py",
    "test_nonfinite.py",
    "test_ops.py",
    "test_optim.py",
    "test_quiet.py",
    "test_range.py",
    "test_stream.py",
    "test_value.py",
}
# These files do not run on the emulator, a thousand times slower than the CPU kernels: they test
# thousands of examples, other processes, errors raised before any kernel runs, what only the CPU
# has, or how torch treats an op, which does not depend on the kernel.
NOT_ON_PTX = {
    "test_compile.py",
    "test_errors.py",
    "test_hypothesis.py",
    "test_batch_norm_hypothesis.py",
    "test_process.py",
    "test_stream.py",
}


@functools.cache
def narrower_isas() -> list[str]:
    """The instruction sets that this machine runs and that are narrower than the one in use."""
    if not _native.available:
        return []
    now, found = _native.backend.isa(), []
    for name in NARROWER[NARROWER.index(now) + 1 :] if now in NARROWER else NARROWER:
        try:
            _native.backend.set_isa(name)
            found.append(name)
        except ValueError:
            continue
    _native.backend.set_isa(os.environ.get("GRADFUSE_ISA", ""))
    return found


def isas(definition: Any) -> list[str]:
    """The instruction sets that a test of the compiled module runs with; "" is the widest."""
    return ["", *(narrower_isas() if definition.path.name in ARITHMETIC else [])]


def backends(definition: Any) -> list[str]:
    """The implementations that a test runs on: all, or those of its `backends` mark. With
    arithmetic=False in the mark, the test runs with the widest instruction set only."""
    if NATIVE_OFF:
        return ["reference"]
    mark = definition.get_closest_marker("backends")
    wanted = mark.args if mark else ("cpu", "reference", "ptx", *DEVICES[1:])
    if definition.get_closest_marker("no_kernel"):
        return [wanted[0]]
    found = []
    for name in wanted:
        if name == "ptx" and (PTX == "0" or definition.path.name in NOT_ON_PTX):
            continue
        found.append(name)
        is_arithmetic = not mark or mark.kwargs.get("arithmetic", True)
        if name == "cpu" and is_arithmetic and definition.path.name in ARITHMETIC:
            found += [f"cpu-{isa}" for isa in narrower_isas()]
    return found


class Recorder:
    """Wraps an implementation and records whether one of its functions was called."""

    # Functions that describe or configure the module and call no kernel.
    _SAID = frozenset({"codes", "isa", "num_threads", "set_isa", "set_last_level_cache"})

    def __init__(self, implementation: Any) -> None:
        self._implementation = implementation
        self.called = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._implementation, name)
        if name in self._SAID or not callable(found):
            return found

        @functools.wraps(found, updated=())
        def call(*arguments: Any, **options: Any) -> Any:
            self.called = True
            return found(*arguments, **options)

        return call
