"""Tests that every op of the registry in ops.py must pass."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from helpers import bits, short
from ops import OPS, Op

import gradfuse
from gradfuse import _native, reference

each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
KERNELS = pytest.mark.backends("cpu", "ptx", "cuda")


def every(field: str):
    """A case for each op and each item of this field of its entry; a mapping gives its items."""
    cases = []
    for op in OPS.values():
        items = getattr(op, field)
        for item in items.items() if isinstance(items, dict) else items:
            named = item[0] if isinstance(item, tuple) else getattr(item, "what", short(item))
            marks = [pytest.mark.no_kernel] if getattr(item, "in_python", False) else []
            cases.append(pytest.param((op, item), id=f"{op.name}-{named}", marks=marks))
    return pytest.mark.parametrize("case", cases)


def test_every_registered_op_has_an_entry():
    schemas = torch._C._jit_get_all_schemas()
    names = {s.name for s in schemas if s.name.startswith("gradfuse::")}
    assert names == {f"gradfuse::{name}" for op in OPS.values() for name in op.registered}


def test_every_function_has_an_entry():
    functions = {n for n in gradfuse.__all__ if n.islower() and callable(getattr(gradfuse, n))}
    of_models = {
        "adapt_statistics", "compile_backend", "fuse", "fuse_graph", "fuse_report", "unfuse",
    }  # fmt: skip
    assert functions - of_models <= set(OPS)


def assert_as_the_reference(op: Op, ours: dict, theirs: dict) -> None:
    narrow, exact = op.tolerance
    for name, value in ours.items():
        other = theirs[name]
        assert (value.dtype, value.stride()) == (other.dtype, other.stride()), name
        tolerance = exact if value.dtype in (torch.float64, torch.complex128) else narrow
        tolerance = max(tolerance, 2 * torch.finfo(value.dtype).eps)
        size = other.abs().double().nan_to_num(0.0, 0.0, 0.0).max().item() if other.numel() else 0.0
        torch.testing.assert_close(value, other, rtol=tolerance, atol=tolerance * size)


@every("dtypes")
def test_numbers(case, backend, device, monkeypatch, pytestconfig):
    """Results are as close to float64 as torch's, and close to the reference's."""
    op, dtype = case
    samples = list(op.samples(dtype, device))
    if backend == "ptx" and not pytestconfig.getoption("full"):
        # Each sample in one dtype, because the emulator is a thousand times slower.
        i = list(op.dtypes).index(dtype)
        samples = samples[i % len(samples) :: len(op.dtypes)]
    for sample in samples:
        ours = op.ours(sample.fresh())
        op.assert_as_close_as_torch(sample, ours)
        if backend != "reference":
            with monkeypatch.context() as patch:
                patch.setattr(_native, "backend", reference)
                assert_as_the_reference(op, ours, op.ours(sample.fresh()))


@pytest.mark.backends("cpu", "reference", arithmetic=False)
@each_op
def test_the_default_device_and_dtype_change_nothing(op, backend):
    """Models are built under torch.device("meta"), and some steps are taken there."""

    def elsewhere(call):
        def run():
            with torch.device("meta"):
                return call()

        return run

    for sample in list(op.samples(torch.float32, "cpu"))[:3]:
        expected = op.ours(sample.fresh())
        torch.set_default_dtype(torch.float64)
        try:
            found = op.ours(sample.fresh(), elsewhere)
        finally:
            torch.set_default_dtype(torch.float32)
        assert bits([*found.values()]) == bits([*expected.values()])


@pytest.mark.backends("cpu", "reference", arithmetic=False)
@every("errors")
def test_errors_leave_everything_untouched(case, backend, device):
    op, bad = case
    sample = op.good() if op.good else next(iter(op.samples(torch.float32, device)))
    bad.change(sample)
    kept = [t for t in sample.tensors.values() if isinstance(t, torch.Tensor)]
    kept = [t for t in kept if t.layout == torch.strided and t.device.type != "meta"]
    kept = [t for t in kept if t.untyped_storage().nbytes() >= t.nbytes or not t.is_contiguous()]
    before, versions = bits(kept), [t._version for t in kept]
    with pytest.raises(bad.error, match=bad.match) as raised:
        op.ours(sample)
    message = str(raised.value)
    assert message.startswith(op.name)
    assert "\n" not in message
    assert bits(kept) == before
    assert [t._version for t in kept] == versions


def outcome_bits(op: Op, sample) -> list[bytes]:
    return bits([t for _, t in sorted(op.ours(sample.fresh()).items())])


@every("dtypes")
def test_bits_do_not_depend_on_threads(case, native, threads):
    """Bits do not change from run to run either: 7 threads finish in a new order each time."""
    op, dtype = case
    for sample in op.large(dtype):
        threads(1)
        expected = outcome_bits(op, sample)
        for n in (2, 3, 7):
            threads(n)
            same = outcome_bits(op, sample) == expected  # pytest takes minutes to show megabytes
            assert same, f"{n} threads"


REGISTERED = [(op, name) for op in OPS.values() for name in op.registered]


@pytest.mark.backends("cpu", "reference", arithmetic=False)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=short)
@pytest.mark.parametrize(("op", "name"), REGISTERED, ids=[name for _, name in REGISTERED])
def test_opcheck(op, name, dtype, backend):
    if dtype not in op.dtypes:
        dtype = torch.bfloat16
    overload = getattr(torch.ops.gradfuse, name).default
    for arguments in op.registered[name](dtype):
        empty = isinstance(arguments[0], list) and not arguments[0]
        only = {"test_utils": ("test_schema", "test_faketensor")} if empty else {}
        torch.library.opcheck(overload, arguments, **only)


@pytest.mark.backends("cpu", "reference", arithmetic=False)
@every("derivatives")
def test_first_and_second_derivatives(case, backend):
    _, (_, make) = case
    call, tensors = make()
    torch.autograd.gradcheck(call, tensors, check_batched_grad=True)
    torch.autograd.gradgradcheck(call, tensors)
    first, *frozen = tensors[0], *(t.detach() for t in tensors[1:])
    torch.autograd.gradgradcheck(lambda x: call(x, *frozen), (first,))


@pytest.mark.parametrize("dynamo", ["eager", "aot_eager"])
@pytest.mark.parametrize("op", [op for op in OPS.values() if op.compiles], ids=lambda op: op.name)
def test_compiles_to_one_graph(op, dynamo):
    for sample in [*op.samples(torch.float32, "cpu")][:3]:
        torch._dynamo.reset()
        expected = op.ours(sample.fresh())
        got = op.ours(
            sample.fresh(), lambda call: torch.compile(call, fullgraph=True, backend=dynamo)
        )
        if op.compiles == "bits":
            assert bits([*got.values()]) == bits([*expected.values()])
        assert_as_the_reference(op, got, expected)


# On the emulator.


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_any_order_of_the_blocks_gives_the_same_bits(op, dtype, ptx):
    sample = [*op.samples(dtype, "cpu")][1]
    found = {}
    for order in ("forward", "backward", "shuffled"):
        ptx.machine.order = order
        found[order] = outcome_bits(op, sample)
    assert found["forward"] == found["backward"] == found["shuffled"]


@each_op
def test_the_host_never_waits(op, ptx):
    op.ours(next(iter(op.samples(torch.float32, "cpu"))))
    assert ptx.launches
    assert ptx.runtime.waits == 0
    assert {launch.stream for launch in ptx.launches} == {0}


@every("traffic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_traffic(case, dtype, ptx):
    """Each byte moves as often as the entry says, in 16-byte accesses."""
    op, traffic = case
    sample = traffic.make(dtype)
    op.ours(sample)
    for stores, times in ((False, traffic.loaded), (True, traffic.stored)):
        for prefix, often in times.items():
            moved = ptx.traffic.widths(prefix, stores)
            of_one = sum(b.size for b in ptx.buffers if b.name.startswith(prefix))
            assert Counter({16: int(often * of_one)}) == +moved or (not often and not moved)


def test_no_module_binds_an_implementation():
    """Modules look it up at each call, so that a test can replace it for all of them."""
    import importlib
    import pkgutil

    kept = {"gradfuse._native", "gradfuse.reference"}
    functions = {
        id(getattr(module, name)): name
        for module in (reference, *([_native._module] if _native.available else []))
        for name in dir(reference)
        if name
        in {"stats", "clip_", "scale_", "clamp_", "apply_", "plan_of_sums", "adaptive_clip_"}
        | {"exact_limbs", "exact_plan"}
        | {"Stepper", "batch_norm_forward", "batch_norm_backward", "ParameterList"}
        | {"batch_norm_statistics", "batch_norm_gradient_sums"}
    }
    modules = {id(reference): "reference", id(_native.backend): "backend"}
    bound = []
    for found in pkgutil.walk_packages(gradfuse.__path__, "gradfuse."):
        if found.name in kept or found.name.startswith("gradfuse.reference."):
            continue
        if found.name == "gradfuse._C" or found.name.endswith("__main__"):
            continue
        try:
            module = importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            if error.name not in ("timm", "torchvision"):  # the modules of fuse for these need them
                raise
            continue
        for name, value in vars(module).items():
            if id(value) in functions or (id(value) in modules and name != "reference"):
                bound.append(f"{found.name}.{name}")
    assert not bound


def test_the_search_would_find_one(monkeypatch):
    monkeypatch.setattr(gradfuse.ops.clip, "stats", reference.stats, raising=False)
    with pytest.raises(AssertionError, match=re.escape("gradfuse.ops.clip.stats")):
        test_no_module_binds_an_implementation()
