"""The same bits for any number of threads and from run to run; close ones for each GRADFUSE_ISA."""

import json
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
    owners,
    random,
    run_python,
    short,
    true_norm,
)

import gradfuse
from gradfuse import _native

# More than the half a million elements from which on the library uses threads.
SIZES = [1, 33, 4097, 16383, 16385, 32769, 100_003, 1_200_000]


def fresh(dtype, device="cpu"):
    """Gradients of many sizes and layouts, always the same."""
    grads = [random(n, dtype=dtype, device=device, seed=n) for n in SIZES]
    grads += [random(5, dtype=dtype, device=device, seed=i) for i in range(500)]
    return [*grads, random(400, 300, dtype=dtype, device=device).t()[::2]]


def everything(dtype, device="cpu"):
    """The exact outcome of every function."""
    outcome = []
    for norm_type in (2.0, 1.0, 3.0, math.inf):
        grads = fresh(dtype, device)
        report = gradfuse.GradClipper(owners(grads), 0.5, norm_type).clip_()
        outcome += [bits(grads), bits(report.norm_tensor), str(report.to_dict())]
    grads = fresh(dtype, device)
    outcome.append(bits(gradfuse.get_total_norm(grads)))
    gradfuse.clip_grad_value_(owners(grads), 0.1)
    outcome.append(bits(grads))
    grads = fresh(dtype, device)
    params = owners(grads)
    for p in params:
        p.fill_(1.0)
    gradfuse.adaptive_clip_grad_(params)
    return [*outcome, bits(grads)]


@pytest.mark.parametrize("dtype", REAL, ids=short)
def test_any_number_of_threads(dtype, native, threads):
    threads(1)
    expected = everything(dtype)
    for n in (2, 3, 7):
        threads(n)
        assert torch.get_num_threads() == n
        assert everything(dtype) == expected, f"{n} threads"


def test_run_to_run(native, threads, device):
    """More threads than cores, so that they finish in ever new orders."""
    threads(7)
    first = everything(torch.float32, device)
    assert all(everything(torch.float32, device) == first for _ in range(4))

    grads = fresh(torch.bfloat16, device)
    norms = {bits(gradfuse.get_total_norm(grads))[0] for _ in range(100)}
    assert len(norms) == 1


@pytest.mark.parametrize("n", [1000, 1_500_000])
@pytest.mark.parametrize("dtype", REAL, ids=short)
def test_subnormals_count_whatever_the_threads_flush(dtype, n, native):
    """torch.set_flush_denormal holds for one thread, so that another would see other values."""
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


def test_another_order_is_another_sum(native):
    """Else the tests above could not tell one order of adding up from another."""
    grads = fresh(torch.float64)
    rotated = [grads[i:] + grads[:i] for i in range(0, len(grads), 10)]
    assert len({bits(gradfuse.get_total_norm(r, 1.0))[0] for r in rotated}) > 1


ISA_SCRIPT = """
import json, torch, gradfuse
from gradfuse import _native

generator = torch.Generator().manual_seed(0)
dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
norms, clipped = [], []
for dtype in dtypes:
    for n in (1, 31, 33, 4097, 100003):
        for p in (2.0, 1.0, 3.0, float("inf")):
            x = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
            norms.append(gradfuse.get_total_norm(x, p).item())
            owner = torch.zeros_like(x)
            owner.grad = x
            gradfuse.clip_grad_norm_(owner, 0.5, p)
            clipped += [x.double().sum().item(), x.double().abs().max().item()]
print(json.dumps({"isa": _native.backend.isa(), "norms": norms, "clipped": clipped}))
"""
ISAS = ("baseline", "avx2", "avx512")


@pytest.fixture(scope="module")
def of_each_isa():
    """What the script prints, for every instruction set that this machine runs."""
    if not _native.available:
        pytest.skip(f"no compiled module: {_native.reason}")
    found = {}
    for isa in ISAS:
        done = run_python(ISA_SCRIPT, GRADFUSE_ISA=isa)
        if "this machine does not run" in done.stderr:
            assert isa != "baseline"
            continue
        found[isa] = json.loads(assert_ran(done))
    return found


def test_instruction_sets_agree(native, of_each_isa):
    baseline = of_each_isa["baseline"]
    for isa, outcome in of_each_isa.items():
        assert outcome["isa"] == isa
        assert outcome["norms"] == pytest.approx(baseline["norms"], rel=1e-6, abs=0.0)
        assert outcome["clipped"] == pytest.approx(baseline["clipped"], rel=1e-3, abs=1e-3)


def test_the_chosen_instruction_set_is_the_widest(native, of_each_isa):
    done = run_python(ISA_SCRIPT, GRADFUSE_ISA="")
    assert json.loads(assert_ran(done))["isa"] == list(of_each_isa)[-1]
    if os.environ.get("GRADFUSE_ISA"):
        assert native.isa() == os.environ["GRADFUSE_ISA"]


def test_an_unknown_instruction_set_is_an_error(native):
    done = run_python("import gradfuse", GRADFUSE_ISA="nonsense")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "GRADFUSE_ISA: expected baseline, avx2 or avx512, got nonsense" in last


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
