"""Effects of summation order, threads and instruction sets on results; see also test_ops.py."""

import math
import os

import pytest
import torch
from helpers import (
    REAL,
    assert_norm,
    assert_ran,
    bits,
    owner,
    random,
    run_python,
    short,
    true_norm,
)

import gradfuse

# More than half a million elements: from there on the library uses threads.
SIZES = [1, 33, 4097, 16383, 16385, 32769, 100_003, 1_200_000]


def fresh(dtype, device="cpu"):
    """Gradients of many sizes and layouts, always the same."""
    grads = [random(n, dtype=dtype, device=device, seed=n) for n in SIZES]
    grads += [random(5, dtype=dtype, device=device, seed=i) for i in range(500)]
    return [*grads, random(400, 300, dtype=dtype, device=device).t()[::2]]


@pytest.mark.parametrize("n", [1000, 1_500_000])
@pytest.mark.parametrize("dtype", REAL, ids=short)
def test_subnormals_count_whatever_the_threads_flush(dtype, n, native):
    """torch.set_flush_denormal holds for one thread only; other threads would see other values."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    grad = torch.full((n,), tiny, dtype=dtype)
    norm, before = true_norm([grad]), bits(grad)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        total = gradfuse.GradClipper(owner(grad), float(norm)).clip_()
        gradfuse.clip_grad_value_(owner(grad), 1.0)
    finally:
        torch.set_flush_denormal(False)
    assert total.parameters[0].zeros == 0
    assert_norm(total.norm_tensor, norm, [dtype])
    assert bits(grad) == before


def test_threads_that_begin_with_the_flag(native):
    """A thread begins with the flag of the one that starts it."""
    script = """
import torch, gradfuse
flushes = torch.set_flush_denormal(True)  # before torch has started a thread
torch.set_num_threads(2)
grad = torch.empty(2**22)
grad.view(torch.int32).fill_(2**19)  # 2**-130
norm = gradfuse.get_total_norm([grad])
torch.set_flush_denormal(False)
print(flushes, norm.item() == 2.0**-119)
"""
    assert assert_ran(run_python(script)) in ("True True\n", "False True\n")


def test_another_order_is_another_sum(native):
    """Otherwise no test of determinism could tell one order of summation from another."""
    grads = fresh(torch.float64)
    rotated = [grads[i:] + grads[:i] for i in range(0, len(grads), 10)]
    assert len({bits(gradfuse.get_total_norm(r, 1.0))[0] for r in rotated}) > 1


ISAS = ("baseline", "avx2", "avx512")


def outcome():
    """Norms and clipped gradients of many sizes and dtypes."""
    norms, clipped = [], []
    for dtype in REAL:
        for n in (1, 31, 33, 4097, 100003):
            for p in (2.0, 1.0, 3.0, math.inf):
                x = random(n, dtype=dtype, seed=n)
                norms.append(gradfuse.get_total_norm(x, p).item())
                gradfuse.clip_grad_norm_(owner(x), 0.5, p)
                clipped += [x.double().sum().item(), x.double().abs().max().item()]
    return norms, clipped


def test_instruction_sets_agree(native):
    widest = native.isa()
    narrower = list(ISAS[: ISAS.index(widest)])
    expected = outcome()
    try:
        for name in narrower:
            native.set_isa(name)
            assert native.isa() == name
            norms, clipped = outcome()
            assert norms == pytest.approx(expected[0], rel=1e-6, abs=0.0)
            assert clipped == pytest.approx(expected[1], rel=1e-3, abs=1e-3)
    finally:
        native.set_isa(os.environ.get("GRADFUSE_ISA", ""))
    assert native.isa() == widest


def test_the_environment_chooses_the_instruction_set(native):
    script = "from gradfuse import _native; print(_native.backend.isa())"
    assert assert_ran(run_python(script, GRADFUSE_ISA="baseline")) == "baseline\n"
    if os.environ.get("GRADFUSE_ISA"):
        assert native.isa() == os.environ["GRADFUSE_ISA"]
    else:  # the widest that this machine runs
        wider = ISAS[ISAS.index(native.isa()) + 1 :]
        for name in wider:
            with pytest.raises(ValueError, match=f"this machine does not run {name}"):
                native.set_isa(name)


def test_an_unknown_instruction_set_is_an_error(native):
    words = "GRADFUSE_ISA: expected baseline, avx2 or avx512, got nonsense"
    with pytest.raises(ValueError, match=words):
        native.set_isa("nonsense")
    done = run_python("import gradfuse", GRADFUSE_ISA="nonsense")
    assert done.returncode != 0
    assert words in done.stderr.strip().splitlines()[-1]


def test_native_0_runs_quietly_without_the_compiled_module():
    script = """
    import warnings
    warnings.simplefilter("error")
    import sys, torch, gradfuse
    from gradfuse import _native
    assert not _native.available and _native.reason == "GRADFUSE_NATIVE=0"
    assert "gradfuse._C" not in sys.modules
    p = torch.zeros(4)
    p.grad = torch.full((4,), 2.0)
    print(gradfuse.clip_grad_norm_(p, 1.0).item(), gradfuse.GradClipper(p, 1.0).clip_())
    """
    out = assert_ran(run_python(script, GRADFUSE_NATIVE="0"))
    assert out.startswith("4.0 gradient norm (L2) 1")
