"""A step with nothing to clip writes nothing. Read-only pages prove it."""

import functools
import json
import math
import os
import sys

import pytest
import torch
from helpers import (
    COMPLEX,
    HOST_BACKENDS,
    REAL,
    assert_ran,
    bits,
    owners,
    random,
    run_python,
    short,
)
from implementations import NATIVE_OFF

import gradfuse


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=short)
def test_a_quiet_step_leaves_every_bit(dtype, device):
    """Also with negative zeros, subnormals and views."""
    base = random(50, 40, dtype=dtype, device=device)
    base[3] = -0.0
    base[4] = torch.finfo(dtype).smallest_normal / 2
    grads = [base, random(dtype=dtype, device=device), base.clone()[::2, 1:].t()]
    params = owners(grads)
    before = bits(grads)
    norm = gradfuse.get_total_norm(grads).item()
    quiet = gradfuse.GradClipper(params, norm + 1.0)

    gradfuse.clip_grad_norm_(params, norm + 1.0)
    gradfuse.clip_grad_norm_(params, math.inf)
    gradfuse.clip_grad_norm_(params, norm + 1.0, nonfinite="zero")
    gradfuse.clip_grads_with_norm_(params, norm, torch.tensor(norm))
    assert quiet.clip_().coefficient == 1.0
    gradfuse.adaptive_clip_grad_(params, 1e6, eps=1e6)
    if not dtype.is_complex:
        gradfuse.clip_grad_value_(params, 1e4)
    assert bits(grads) == before


@pytest.mark.usefixtures("backend")
def test_a_norm_of_exactly_max_norm_is_quiet(device):
    """torch's coefficient is below 1 there, because of its 1e-6, so torch writes."""
    grad = torch.tensor([3.0, 4.0], device=device)
    (param,) = owners([grad])
    gradfuse.clip_grad_norm_(param, 5.0)
    assert grad.tolist() == [3.0, 4.0]
    gradfuse.clip_grad_norm_(param, 4.999)
    assert grad.tolist() != [3.0, 4.0]


@HOST_BACKENDS
@pytest.mark.usefixtures("backend")
def test_version_counters_move_only_with_a_write():
    """On CUDA the host does not know whether the device will write, so this is for the CPU."""
    grads = [random(50), random(8, 4).t()]
    params = owners(grads)
    versions = [g._version for g in grads]

    gradfuse.get_total_norm(grads)
    gradfuse.clip_grad_norm_(params, 1e6)
    gradfuse.clip_grads_with_norm_(params, 1e6, torch.tensor(5.0))
    gradfuse.GradClipper(params, 1e6).clip_()
    assert [g._version for g in grads] == versions

    gradfuse.clip_grad_norm_(params, 0.1)
    assert all(g._version > v for g, v in zip(grads, versions, strict=True))


# Every call runs in its own child process, on gradients that lie on read-only pages.
SCRIPT = """
import ctypes, json, math, mmap, os, traceback
import numpy as np, torch, gradfuse

libc = ctypes.CDLL(None, use_errno=True)
torch.set_num_threads(1)  # a pool of threads does not outlive fork

def locked(values, first_bytes=None):
    pages = mmap.mmap(-1, values.numel() * values.element_size())
    tensor = torch.from_numpy(np.frombuffer(pages, np.uint8)).view(values.dtype)
    tensor = tensor.view(values.shape)
    tensor.copy_(values)
    address, size = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(first_bytes or len(pages))
    assert libc.mprotect(address, size, mmap.PROT_READ) == 0, ctypes.get_errno()
    return tensor

def owner(grad):
    parameter = torch.ones(grad.shape, dtype=grad.dtype)
    parameter.grad = grad
    return parameter

dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
reals = [owner(locked(torch.rand(37, 1100).to(d))) for d in dtypes]
strided = [owner(locked(torch.rand(64, 64)).t()[1::2])]
params = [*reals, *strided, owner(locked(torch.rand(5, dtype=torch.complex64)))]
grads = [p.grad for p in params]
bad = [*params, owner(torch.tensor([math.nan]))]
rows = torch.ones(2, mmap.PAGESIZE // 4)
rows[1] = 1e6
half_locked = owner(locked(rows, first_bytes=mmap.PAGESIZE))

def outcome(call):
    child = os.fork()
    if child == 0:
        try:
            eval(call)
        except BaseException:
            traceback.print_exc()
            os._exit(77)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return {0: "ran", 77 << 8: "raised"}.get(status, "fault")

print(json.dumps({call: outcome(call) for call in json.loads(os.environ["CALLS"])}))
"""

QUIET = [
    "[gradfuse.get_total_norm(grads, p) for p in (2, 1, 3, math.inf)]",
    "gradfuse.clip_grad_norm_(params, 1e9)",
    "gradfuse.clip_grad_norm_(params, 1e9, nonfinite='zero')",
    "gradfuse.clip_grad_norm_(params, math.inf)",
    "gradfuse.GradClipper(params, 1e9).clip_()",
    "gradfuse.clip_grads_with_norm_(params, 2, torch.tensor(1.0))",
]
REFUSING = ["gradfuse.clip_grad_norm_(bad, 1.0, nonfinite='error')"]
# The reference would fault here: it writes back what it read, bit for bit the same.
QUIET_IF_NATIVE = [
    "gradfuse.clip_grad_value_(reals, 10.0)",
    "gradfuse.clip_grad_value_(strided, 10.0)",
    "gradfuse.adaptive_clip_grad_(params, 1e3)",
    "gradfuse.adaptive_clip_grad_(half_locked, 10.0)",  # only rows[1] is clipped
]
WRITING = [
    "gradfuse.clip_grad_norm_(params, 1e-3)",
    "gradfuse.clip_grad_norm_(bad, 1e9, nonfinite='zero')",
    "gradfuse.GradClipper(params, 1e-3).clip_()",
    "gradfuse.clip_grads_with_norm_(params, 1, torch.tensor(2.0))",
    "gradfuse.clip_grad_value_(reals, 1e-3)",
    "gradfuse.clip_grad_value_(strided, 1e-3)",
    "gradfuse.adaptive_clip_grad_(params, 1e-6)",
    "gradfuse.adaptive_clip_grad_(half_locked, 0.1)",
]


each_implementation = pytest.mark.parametrize(
    "implementation", ["reference"] if NATIVE_OFF else ["cpu", "reference"]
)


@pytest.fixture(scope="module")
def outcomes():
    """outcomes(implementation)[call] is "ran", "raised" or "fault", on read-only pages."""

    @functools.cache
    def run(implementation):
        calls = [*QUIET, *REFUSING, *QUIET_IF_NATIVE, *WRITING]
        native = "0" if implementation == "reference" else os.environ.get("GRADFUSE_NATIVE", "1")
        done = run_python(SCRIPT, CALLS=json.dumps(calls), GRADFUSE_NATIVE=native)
        return json.loads(assert_ran(done))

    if sys.platform != "linux":
        pytest.skip("needs mprotect and fork")
    return run


@each_implementation
@pytest.mark.parametrize("call", QUIET)
def test_quiet_steps_run_on_read_only_pages(call, implementation, outcomes):
    assert outcomes(implementation)[call] == "ran"


@each_implementation
@pytest.mark.parametrize("call", REFUSING)
def test_refused_steps_write_nothing(call, implementation, outcomes):
    assert outcomes(implementation)[call] == "raised"


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("call", QUIET_IF_NATIVE)
def test_only_what_changes_is_written(call, outcomes):
    assert outcomes("cpu")[call] == "ran"


@each_implementation
@pytest.mark.parametrize("call", WRITING)
def test_writing_steps_fault_there(call, implementation, outcomes):
    """Otherwise the tests above would prove nothing."""
    assert outcomes(implementation)[call] == "fault"
