"""All CUDA kernels run, agree with the reference, give the same bits in any order of their blocks,
and count past 2^31."""

import math
import mmap

import numpy as np
import pytest
import torch
from helpers import COMPLEX, REAL, bits, random, short

import gradfuse
import gradfuse.optim
from gradfuse import _native, reference
from ptx.emulator import emulated
from ptx.emulator.checks import Violation
from ptx.emulator.cudart import DRIVER
from ptx.emulator.parser import Module
from ptx.emulator.toolchain import demangled, ptxas, resources
from ptx.traffic import architectures

# A step of each op, on parameters with gradients.
STEPS = {
    "norm 2": lambda p: gradfuse.clip_grad_norm_(p, 0.5),
    "norm 1": lambda p: gradfuse.clip_grad_norm_(p, 0.5, 1.0),
    "norm inf": lambda p: gradfuse.clip_grad_norm_(p, 0.1, math.inf),
    "norm 3": lambda p: gradfuse.clip_grad_norm_(p, 0.5, 3.0),
    "quiet": lambda p: gradfuse.clip_grad_norm_(p, 1e9),
    "report": lambda p: gradfuse.GradClipper(p, 0.5).clip_()._stats,
    "given norm": lambda p: gradfuse.clip_grads_with_norm_(p, 1.0, torch.tensor(7.0)),
    "value": lambda p: gradfuse.clip_grad_value_([q for q in p if not q.is_complex()], 0.25),
    "sums of two ranks": lambda p: sums_of_two(p),
    "adaptive": lambda p: gradfuse.adaptive_clip_grad_(p, 0.05),
    "adaptive 3": lambda p: gradfuse.adaptive_clip_grad_(p, 0.05, norm_type=3.0),
}


def parameters(dtype, sizes=(1, 31, 33, 4097, 32769)):
    """Parameters of awkward sizes and strides, one of them without a gradient."""
    grads = [random(n, dtype=dtype, seed=i) for i, n in enumerate(sizes)]
    grads += [random(4098, dtype=dtype)[1:], random(14, 80, dtype=dtype)[::2, 1::2]]
    grads += [random(7, 40, dtype=dtype).t(), random(3, 1100, dtype=dtype)]
    params = [torch.nn.Parameter(random(*g.shape, dtype=dtype, seed=9)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return [*params[:2], torch.nn.Parameter(torch.ones(3, dtype=dtype)), *params[2:]]


def halves_of(params):
    return [[p.grad for p in half if p.grad is not None] for half in (params[:4], params[4:])]


def plan_of_two(params):
    """Norm and plan of two halves, as two ranks would find them."""
    plans = [_native.backend.stats(half, False, 2.0, 0)[1] for half in halves_of(params)]
    sums = torch.stack([torch.cat([plan[4:6], torch.zeros(2)]) for plan in plans])
    return _native.backend.plan_of_sums("norm", sums, False, 0.5, 2.0, 0, None)


def sums_of_two(params):
    norm, plan = plan_of_two(params)
    first, second = halves_of(params)
    _native.backend.apply_("norm", [*first, *second], plan)
    return norm


def run(step, dtype):
    """(bits of the result and of all gradients) after a step on fresh parameters."""
    params = parameters(dtype)
    result = STEPS[step](params)
    tensors = [p.grad for p in params if p.grad is not None]
    return bits([*([] if result is None else [result]), *tensors])


@pytest.mark.parametrize("step", STEPS)
def test_any_order_of_the_blocks_gives_the_same_bits(ptx, step):
    for dtype in (torch.float32, torch.bfloat16):
        found = {}
        for order in ("forward", "backward", "shuffled"):
            ptx.machine.order = order
            found[order] = run(step, dtype)
        assert found["forward"] == found["backward"] == found["shuffled"]


KERNELS_RUN: set[str] = set()  # by this process, which runs all tests of this file


@pytest.mark.pairs
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=short)
def test_as_the_reference(ptx, monkeypatch, step, dtype):
    ours = parameters(dtype)
    result = STEPS[step](ours)
    KERNELS_RUN.update(launch.kernel for launch in ptx.launches)
    monkeypatch.setattr("gradfuse._native.backend", reference)
    theirs = parameters(dtype)
    expected = STEPS[step](theirs)
    ulp = torch.finfo(dtype).eps
    if result is not None:
        torch.testing.assert_close(result, expected, rtol=2e-6, atol=0.0)
    for p, q in zip(ours, theirs, strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=max(ulp, 2e-6), atol=0.0)


def extreme(grads, info):
    """The same, where half of the first three is scaled to the ends of their range."""
    ends = (info.max, info.tiny, info.smallest_normal * info.eps)
    for g, factor in zip(grads, ends, strict=False):
        g[: g.numel() // 2] *= factor
    return grads


@pytest.mark.parametrize("dtypes", [*([dtype] for dtype in (*REAL, *COMPLEX)), REAL], ids=str)
def test_exact_limbs_are_those_of_integers(ptx, dtypes):
    """Every word, whatever the order of the blocks, and with values of any size."""
    grads = []
    for dtype in dtypes:
        own = [p.grad for p in parameters(dtype) if p.grad is not None]
        grads += extreme(own, torch.finfo(dtype))
    limbs, _ = reference.exact_limbs("norm", grads, False)
    for order in ("forward", "backward", "shuffled"):
        ptx.machine.order = order
        found, _ = _native.backend.exact_limbs("norm", grads, False)
        KERNELS_RUN.update(launch.kernel for launch in ptx.launches)
        assert torch.equal(found, limbs)
        norm, plan = _native.backend.exact_plan("norm", found, False, 0.5, 0, None)
        KERNELS_RUN.update(launch.kernel for launch in ptx.launches)
        expected, _ = reference.exact_plan("norm", limbs, False, 0.5, 0, None)
        assert bits([norm]) == bits([expected])
        assert plan[0] == reference.exact_plan("norm", limbs, True, 0.5, 0, None)[0]


def test_every_kernel_was_run(ptx):
    """The tests above run most kernels; this test runs the rest."""

    def ran(call, *args, **kwargs):
        result = call(*args, **kwargs)
        KERNELS_RUN.update(launch.kernel for launch in ptx.launches)
        return result

    params = parameters(torch.float32)
    params[0].grad[0] = math.nan
    ran(gradfuse.clip_grad_norm_, params, 1.0, nonfinite="zero")
    ran(plan_of_two, parameters(torch.float32))
    mixed = torch.nn.Parameter(torch.ones(5, 7, dtype=torch.float64))
    mixed.grad = random(5, 7, dtype=torch.float64)
    ran(gradfuse.adaptive_clip_grad_, [mixed])
    for dtype in REAL:
        many = [torch.nn.Parameter(torch.zeros(3, dtype=dtype)) for _ in range(257)]
        for p in many:
            p.grad = torch.ones_like(p)
        ran(gradfuse.clip_grad_norm_, many, 0.1)
        # Batch norm, in the shapes of test_batch_norm.py and of either block; with a branch scale,
        # whose gradients' sums per row have a kernel of their own.
        for shape in ((2, 3, 70, 80), (130, 20), (2, 2, 40, 40), (2, 2, 30, 30), (2, 3, 5, 5)):
            for drop_path in (0.0, 0.5):
                x, branch = (random(*shape, dtype=dtype).requires_grad_() for _ in range(2))
                y = ran(
                    gradfuse.batch_norm_act,
                    *(x, None, None),
                    residual=branch,
                    training=True,
                    drop_path=drop_path,
                )
                ran(y.sum().backward)
        for width in (33, 9000):  # rows that a team's registers hold, and rows that they do not
            x = random(3, width, dtype=dtype).requires_grad_()
            weight = torch.nn.Parameter(torch.ones(width, dtype=dtype))
            y = ran(gradfuse.rms_norm, x, width, weight)
            ran(y.sum().backward)
    for dtype in REAL:  # the optimizers
        for master in (False, True):
            params = [torch.nn.Parameter(random(33, dtype=dtype))]
            for optimizer in (
                gradfuse.optim.AdamW(params, master_weights=master, update_clip=True),
                gradfuse.optim.SGD(params, momentum=0.9, master_weights=master),
                gradfuse.optim.LAMB(params, master_weights=master),
                gradfuse.optim.Lion(params, master_weights=master),
                gradfuse.optim.ScheduleFreeAdamW(params, master_weights=master),
            ):
                for of_grad in {dtype, torch.float32 if dtype.itemsize == 2 else dtype}:
                    params[0].grad = None
                    params[0].grad_dtype = of_grad
                    params[0].grad = random(33, dtype=of_grad)
                    ran(optimizer.step)
    _, compiled = emulated.build()
    every = {demangled(k) for c in compiled for k in Module(c.ptx.read_text()).kernel_names}
    assert every <= KERNELS_RUN, f"never run: {sorted(every - KERNELS_RUN)}"


def test_no_kernel_spills_registers():
    """On the architecture that the emulator stands for; .ci/run builds for another one."""
    _, compiled = emulated.build()
    for c in compiled:
        used = resources(ptxas(c.ptx, "sm_90"))
        assert set(used) == set(Module(c.ptx.read_text()).kernel_names)
        assert not {demangled(k): r for k, r in used.items() if r.spilled_bytes}


@pytest.mark.slow
def test_no_kernel_spills_registers_on_any_architecture(nvcc):
    found = architectures()
    assert len(found) == 6
    for arch in found:
        for source in emulated.kernel_sources():
            used = resources(ptxas(source, arch))
            assert used
            spilled = {demangled(k): r for k, r in used.items() if r.spilled_bytes}
            assert not spilled, f"{arch}: {spilled}"


def virtual(numel, dtype):
    """A tensor of zeros that takes address space and no memory until it is touched."""
    size = numel * torch.empty((), dtype=dtype).element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    pages = mmap.mmap(-1, size, flags=flags)
    return torch.from_numpy(np.frombuffer(pages, np.uint8)).view(dtype)


@pytest.fixture
def only(ptx):
    """only(kernel, block, ...) runs these blocks of that kernel, and all of the other kernels."""

    def select(kernel, *blocks):
        ptx.machine.only_blocks = lambda name, block: block in blocks or not name.startswith(kernel)

    return select


LONG = 2**31 + 5
LONG_CHUNK = 2**18  # elements of 16 bits
LAST_BLOCK = LONG // LONG_CHUNK


def test_elements_past_2_to_the_31_are_clamped(only):
    grad = virtual(LONG, torch.float16)
    grad[[0, 2**31 - 1, 2**31, LONG - 1]] = 8.0
    only("dense_clamp", 0, LAST_BLOCK)
    gradfuse.clip_grad_value_(owner_of(grad), 2.0)
    assert grad[[0, 2**31 - 1, 2**31, LONG - 1]].tolist() == [2.0, 8.0, 2.0, 2.0]


def test_elements_past_2_to_the_31_are_scaled(only):
    grad = virtual(LONG, torch.float16)
    grad[[0, 2**31 - 1, 2**31, LONG - 1]] = 8.0
    only("dense_apply", 0, LAST_BLOCK)
    gradfuse.clip_grads_with_norm_(owner_of(grad), 1.0, torch.tensor(4.0, dtype=torch.float64))
    assert grad[[0, 2**31 - 1, 2**31, LONG - 1]].tolist() == [2.0, 8.0, 2.0, 2.0]


def test_elements_past_2_to_the_31_are_read_once(ptx):
    grad = virtual(LONG, torch.bfloat16)
    ptx.machine.only_blocks = lambda name, block: (
        name.startswith("dense") and block in (0, LAST_BLOCK)
    )
    with pytest.raises(
        Violation, match=r"result 0: reads 4 bytes .* not all of which were ever written"
    ):
        gradfuse.get_total_norm([grad])  # the kernels that would write it are left out
    loaded = ptx.traffic.loaded
    assert loaded["tensor 0, beginning", 16] == 2 * LONG_CHUNK
    assert {k: n for k, n in loaded.items() if k[0] == "tensor 0, end"} == {
        ("tensor 0, end", 2): 10
    }


def test_units_past_2_to_the_31_are_clipped(only):
    rows, columns = 2**16 + 1, 2**15
    weight, grad = (virtual(rows * columns, torch.float16).view(rows, columns) for _ in range(2))
    weight[[0, -1]] = 1.0
    grad[[0, -2, -1]] = 1.0
    weight.grad = grad
    only("dense_units", 0, rows - 1)
    gradfuse.adaptive_clip_grad_([weight], clip_factor=0.5)
    assert grad[0].eq(0.5).all()
    assert grad[-1].eq(0.5).all()
    assert grad[-2].eq(1.0).all()  # its block did not run


def test_strides_past_2_to_the_31(only):
    grad = virtual(2 * LONG, torch.float16).view(LONG, 2)[:, 0]
    grad[[0, LONG - 1]] = 8.0
    only("strided_clamp", 0, 16384)
    gradfuse.clip_grad_value_(owner_of(grad), 2.0)
    assert grad[[0, LONG - 1]].tolist() == [2.0, 2.0]


def owner_of(grad):
    """A parameter with this gradient and no memory of its own, because no kernel reads it."""
    parameter = torch.zeros((), dtype=grad.dtype).expand(grad.shape)
    parameter.grad = grad
    return [parameter]


def test_an_endless_loop_would_be_found(ptx):
    """The instruction budget is per launch. Large launches end within the default."""
    ptx.machine.budget = 10_000
    try:
        with pytest.raises(Exception, match="expected to end within 10000"):
            gradfuse.get_total_norm([torch.ones(4097)])
    finally:
        ptx.machine.budget = 2_000_000_000


def test_an_old_driver_is_named(ptx, request):
    """It refuses the parameters of a launch as an invalid argument, which tells nobody why."""
    request.addfinalizer(lambda: ptx.runtime.set_driver(DRIVER))
    ptx.runtime.set_driver(12000)
    message = r"dense_stats: launch failed: expected a driver of CUDA 12.1 .* one of CUDA 12\.0$"
    with pytest.raises(RuntimeError, match=message):
        gradfuse.clip_grad_norm_(parameters(torch.float32), 1.0)
