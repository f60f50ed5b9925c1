"""Each check finds the bug planted for it in bugs.cu, names its line, and is silent without it."""

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest

from ptx.emulator.checks import Violation
from ptx.emulator.cudart import Runtime
from ptx.emulator.toolchain import compile_cuda, cuda_library

BUGS_CU = Path(__file__).with_name("bugs.cu")
# Host function of bugs.cu: the check that finds its bug, and a part of the message.
BUGS = {
    "out_of_bounds_load": ("out of bounds", "0 bytes past the end of in"),
    "out_of_bounds_store": ("out of bounds", "4 bytes before out"),
    "misaligned_load": ("misaligned", "load of 16 bytes: 4 bytes past"),
    "unwritten_output": ("uninitialised", "never written, of out"),
    "out_of_bounds_shared": ("out of bounds", "shared store of 4 bytes"),
    "misaligned_shared": ("misaligned", "shared load of 16 bytes"),
    "unwritten_shared": ("uninitialised", "thread 7"),
    "missing_syncthreads": ("shared race", "nothing orders the two"),
    "missing_syncwarp": ("shared race", "nothing orders the two"),
    "half_synced_warp": ("shared race", "nothing orders the two"),
    "reused_storage": ("shared race", "loaded"),
    "atomic_race": ("shared race", "changed atomically"),
    "out_of_bounds_local": ("out of bounds", "local load"),
    "unwritten_local": ("uninitialised", "of local memory"),
    "unset_register": ("uninitialised", "a register that was never set"),
    "blocks_store": ("global race", "stored"),
    "blocks_exchange": ("global race", "what block 0 thread 0 stored"),
    "threads_exchange": ("global race", "stored"),
    "barrier_after_exit": ("divergent barrier", "24 of the block's 64 threads have exited"),
    "divergent_barrier": ("divergent barrier", "32 wait elsewhere"),
    "exited_lanes": ("shuffle mask", "names lane 20"),
    "absent_lanes": ("shuffle mask", "names lane 8"),
    "unnamed_lane": ("shuffle mask", "reads lane 16"),
    "launch_bounds": ("launch bounds", "64 threads of its __launch_bounds__, got 65"),
    "shared_by_default": ("shared memory size", "expected at most 49152 bytes"),
    "shared_asked_for": ("shared memory size", "asks for 66560 bytes"),
    "endless_loop": ("instruction budget", "loop for ever"),
    "division_by_zero": ("division by zero", "thread 3"),
    "trap": ("trap", "trap"),
    "freed_memory": ("out of bounds", "global load"),
    "copied_unwritten": ("uninitialised", "cudaMemcpy: reads 128 bytes of allocation"),
    "too_many_blocks": ("launch", "expected a grid within"),
}
# These are found at the launch, or by its length, so the message names no line.
WITHOUT_LINE = {
    "launch_bounds", "shared_by_default", "shared_asked_for", "endless_loop", "freed_memory",
    "copied_unwritten", "too_many_blocks",
}  # fmt: skip
ORDERS = ["forward", "backward", "shuffled"]


@pytest.fixture(scope="module")
def runtime():
    compiled = compile_cuda(BUGS_CU)
    return Runtime(cuda_library("bugs.so", [compiled.object]), [compiled.ptx])


def run(runtime, name, bug):
    """Calls a host function on fresh arrays. Raises the Violation that the emulator found."""
    memory = runtime.machine.memory
    runtime.machine.budget = 1_000_000
    backing = np.zeros(192, np.float32)
    skip = -backing.ctypes.data % 256 // 4
    given, out = backing[skip : skip + 32], backing[skip + 64 : skip + 96]
    given[:] = np.arange(32)
    buffers = [
        memory.add(given.ctypes.data, 128, "in", written=True),
        memory.add(out.ctypes.data, 128, "out", written=False),
    ]
    try:
        function = getattr(runtime.library, name)
        function.argtypes = [ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p]
        function(bug, given.ctypes.data, out.ctypes.data)
        runtime.raise_pending()
    finally:
        memory.remove_all(buffers)
        runtime.reset()
        runtime.machine.shared_bytes_allowed.clear()


def marked_line(name):
    for number, line in enumerate((BUGS_CU).read_text().splitlines(), 1):
        if line.endswith(f"// BUG: {name}"):
            return number
    raise AssertionError(f"bugs.cu marks no line for {name}")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", BUGS)
def test_the_bug_is_found_and_its_line_named(runtime, name, order):
    check, text = BUGS[name]
    runtime.machine.order = order
    with pytest.raises(Violation, match=re.escape(text)) as found:
        run(runtime, name, bug=True)
    assert found.value.check == check
    if name not in WITHOUT_LINE:
        assert f"tests/ptx/bugs.cu:{marked_line(name)}," in str(found.value)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", BUGS)
def test_the_correct_twin_is_silent(runtime, name, order):
    runtime.machine.order = order
    run(runtime, name, bug=False)


def test_every_host_function_is_tested():
    assert set(re.findall(r"^RUN\((\w+)\)", (BUGS_CU).read_text(), re.M)) == set(BUGS)
