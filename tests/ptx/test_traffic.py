"""Traffic of the kernels in bytes: gradients are read once, and written only where clipped."""

import math
import re

import pytest
import torch
from helpers import REAL, owners, random, short
from torch.utils._python_dispatch import TorchDispatchMode

import gradfuse
from ptx.emulator import emulated

# Awkward sizes: around a warp, a block of words, and a chunk.
SIZES = [1, 31, 32, 33, 4097]
CHUNK = 131_072  # bytes
DTYPES = pytest.mark.parametrize("dtype", REAL, ids=short)


def gradients(dtype, scale=1e-3):
    """One gradient of each size. Every other one does not begin at a 16-byte boundary."""
    found = []
    chunk = CHUNK // dtype.itemsize
    for i, n in enumerate([*SIZES, chunk - 1, chunk, chunk + 1]):
        skip = 1 + i % 3 if i % 2 else 0
        found.append(random(n + 3, dtype=dtype, scale=scale, seed=i)[skip : skip + n])
    return found


def total_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def narrow_elements(grad):
    """Elements before the first 16-byte boundary and after the last, of each chunk."""
    per_word, chunk = 16 // grad.element_size(), CHUNK // grad.element_size()
    count = 0
    for start in range(0, grad.numel(), chunk):
        n = min(chunk, grad.numel() - start)
        address = grad.data_ptr() + start * grad.element_size()
        head = min(-address % 16 // grad.element_size(), n)
        count += head + (n - head) % per_word
    return count


def assert_loaded(ptx, grads, times, prefix="grad"):
    """Every byte of every gradient is loaded so many times, 16 at a time except at the ends."""
    for i, g in enumerate(grads):
        name = f"{prefix} {i}"
        size, narrow = total_bytes([g]), narrow_elements(g) * g.element_size()
        assert sum(n for (b, _), n in ptx.traffic.loaded.items() if b == name) == times * size
        per_launch = [
            launch.traffic for launch in ptx.launches if launch.traffic.distinct_loaded[name]
        ]
        assert len(per_launch) == times
        for traffic in per_launch:
            loaded = {w: n for (b, w), n in traffic.loaded.items() if b == name}
            assert loaded.get(16, 0) == size - narrow
            assert loaded.get(g.element_size(), 0) == narrow
            assert set(loaded) <= {16, g.element_size()}


def assert_stored(ptx, grads, times, prefix="grad"):
    for i, g in enumerate(grads):
        name = f"{prefix} {i}"
        stored = {w: n for (b, w), n in ptx.traffic.stored.items() if b == name}
        size, narrow = total_bytes([g]), narrow_elements(g) * g.element_size()
        assert sum(stored.values()) == times * size
        assert stored.get(16, 0) == times * (size - narrow)
        distinct = ptx.traffic.distinct_stored[name]
        assert distinct >= size if times else distinct == 0  # the ends count as whole cells


def assert_few_sectors(ptx):
    """A warp's 512 bytes lie in 16 sectors, or 17 where they begin inside one."""
    full = [r for r in ptx.traffic.requests if r.width == 16 and r.lanes == 32]
    assert full
    assert max(r.sectors for r in full) <= 17


@DTYPES
def test_a_quiet_step_reads_each_byte_once_and_writes_none(ptx, dtype):
    grads = gradients(dtype)
    gradfuse.clip_grad_norm_(owners(grads), 1e9)
    assert_loaded(ptx, grads, times=1)
    assert_stored(ptx, grads, times=0)
    assert_few_sectors(ptx)


@DTYPES
@pytest.mark.parametrize("norm_type", [1.0, 3.0, math.inf])
def test_the_same_for_every_norm(ptx, dtype, norm_type):
    grads = [g for g in gradients(dtype) if g.numel() < 5000]
    gradfuse.get_total_norm(grads, norm_type)
    assert_loaded(ptx, grads, times=1, prefix="tensor")
    assert_stored(ptx, grads, times=0, prefix="tensor")


@DTYPES
def test_a_clipping_step_reads_twice_and_writes_once(ptx, dtype):
    grads = gradients(dtype, scale=1.0)
    gradfuse.clip_grad_norm_(owners(grads), 0.1)
    assert_loaded(ptx, grads, times=2)
    assert_stored(ptx, grads, times=1)
    assert_few_sectors(ptx)


def test_zeroing_does_not_read_what_it_writes(ptx):
    grads = gradients(torch.float32)
    grads[1][3] = math.nan
    gradfuse.clip_grad_norm_(owners(grads), 1.0, nonfinite="zero")
    assert_loaded(ptx, grads, times=1)
    assert_stored(ptx, grads, times=1)


@DTYPES
def test_clamping_reads_once_and_writes_the_words_that_change(ptx, dtype):
    grad = random(4097, dtype=dtype)
    grad.clamp_(-0.5, 0.5)
    grad[1000] = grad[4096] = 3.0
    gradfuse.clip_grad_value_(owners([grad]), 1.0)
    assert ptx.traffic.bytes_loaded("grad") == total_bytes([grad])
    per_word = 16 // grad.element_size()
    written = ptx.stored(grad).nonzero().flatten().tolist()
    assert written == [*range(1000 // per_word * per_word, (1000 // per_word + 1) * per_word), 4096]
    assert grad[1000] == grad[4096] == 1.0


@DTYPES
@pytest.mark.parametrize("columns", [33, 600, 2048])
def test_adaptive_clipping_writes_the_clipped_rows_alone(ptx, dtype, columns):
    weight = torch.nn.Parameter(torch.ones(13, columns, dtype=dtype))
    weight.grad = random(13, columns, dtype=dtype, scale=1e-4)
    clipped = [0, 5, 12]
    weight.grad[clipped] = 3.0
    before = weight.grad.clone()
    gradfuse.adaptive_clip_grad_([weight], clip_factor=0.1)

    size = total_bytes([weight])
    assert ptx.traffic.bytes_loaded("tensor") == size  # the weights, once
    assert ptx.traffic.bytes_stored("tensor") == 0
    part = len(clipped) * columns * weight.element_size()
    assert ptx.traffic.bytes_loaded("grad") == size + part  # the gradients, clipped rows twice
    assert ptx.traffic.bytes_stored("grad") == part
    quiet = [i for i in range(13) if i not in clipped]
    assert torch.equal(weight.grad[quiet], before[quiet])
    if columns % (16 // weight.element_size()) == 0:
        assert ptx.stored(weight.grad).all(dim=1).nonzero().flatten().tolist() == clipped
        assert not ptx.stored(weight.grad)[quiet].any()
        assert_few_sectors(ptx)


def test_the_report_adds_nothing(ptx):
    grads = gradients(torch.float32, scale=1.0)
    gradfuse.clip_grad_norm_(owners([g.clone() for g in grads]), 0.1)
    plain = ptx.traffic
    report = gradfuse.GradClipper(owners(grads), 0.1).clip_()
    assert report.clipped
    assert ptx.traffic.bytes_loaded("grad") == plain.bytes_loaded("grad")
    assert ptx.traffic.bytes_stored("grad") == plain.bytes_stored("grad")


def launches_of(ptx, count, call):
    params = owners([random(1 + i % 67, seed=i) for i in range(count)])
    call(params)
    return [launch.kernel for launch in ptx.launches]


@pytest.mark.parametrize(
    "call",
    [
        lambda p: gradfuse.clip_grad_norm_(p, 0.1),
        lambda p: gradfuse.GradClipper(p, 1e9).clip_(),
        lambda p: gradfuse.clip_grad_value_(p, 0.1),
    ],
    ids=["clip_grad_norm_", "GradClipper", "clip_grad_value_"],
)
def test_700_tensors_take_no_more_than_four_launches(ptx, call):
    """Few of them send few parameters, and take one launch less."""
    assert len(launches_of(ptx, 1, call)) <= 3
    assert sum(launch.parameter_bytes for launch in ptx.launches[:3]) <= 32_000
    assert len(launches_of(ptx, 65, call)) <= 4
    assert len(launches_of(ptx, 700, call)) <= 4


def test_a_second_sweep_begins_where_the_first_has_ended(ptx):
    """There the L2 cache still holds what was read."""
    chunks = 3
    (param,) = owners([random(chunks * CHUNK // 4)])
    gradfuse.clip_grad_norm_([param], 0.1)
    optimizer = gradfuse.optim.AdamW([param], clip=1.0)
    swept = [launch for launch in ptx.launches if launch.kernel.startswith("dense_apply")]
    for _ in range(2):
        optimizer.step()
    swept += [launch for launch in ptx.launches if launch.kernel.startswith("optim_update")]
    assert len(swept) == 2
    for launch in swept:
        assert launch.first_touched["grad 0"] // CHUNK == chunks - 1


def test_500_parameters_are_clipped_adaptively_in_one_launch(ptx):
    assert launches_of(ptx, 500, gradfuse.adaptive_clip_grad_) == ["dense_units<float, 32>"]


def test_the_host_never_waits(ptx):
    params = owners(gradients(torch.float32, scale=1.0)[:4])
    strided = owners([random(20, 30).t()])
    clipper = gradfuse.GradClipper(params, 0.1, nonfinite="zero")
    for call in (
        lambda: gradfuse.clip_grad_norm_(params, 1.0),
        lambda: clipper.clip_(),
        lambda: gradfuse.clip_grad_value_(params, 0.1),
        lambda: gradfuse.adaptive_clip_grad_([*params, *strided]),
        lambda: gradfuse.get_total_norm([p.grad for p in params]),
        lambda: gradfuse.clip_grads_with_norm_(params, 1.0, torch.tensor(3.0)),
    ):
        call()
        assert ptx.runtime.waits == 0
        assert ptx.launches
        assert {launch.stream for launch in ptx.launches} == {0}


class Operations(TorchDispatchMode):
    """Notes the torch operations that a call makes."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_nothing_is_read_back_through_torch(ptx):
    """The emulator does not see .item() as a wait, because its memory is the host's."""
    params = owners(gradients(torch.float32)[:4])
    clipper = gradfuse.GradClipper(params, 0.1, nonfinite="zero")
    with Operations() as operations:
        clipper.clip_()
        gradfuse.adaptive_clip_grad_(params)
        gradfuse.clip_grads_with_norm_(params, 1.0, torch.tensor(3.0))
        gradfuse.clip_grad_value_(params, 0.1)
    assert "_local_scalar_dense" not in operations.names
    with Operations() as operations:
        torch.ones(()).item()
    assert "_local_scalar_dense" in operations.names
    for source in emulated.torch_sources():  # there only on_host() may wait
        assert not re.search(r"\.(cpu|item)\b", source.read_text()), source


def test_raising_waits_once(ptx):
    """nonfinite="error" has to read the norm. Also shows that the tests above would see a wait."""
    params = owners(gradients(torch.float32)[:4])
    gradfuse.clip_grad_norm_(params, 1.0, nonfinite="error")
    assert ptx.runtime.waits == 1


def test_scratch_is_small(ptx):
    """Slots of 56 bytes: one per chunk and one per gradient."""
    grads = gradients(torch.float32)
    gradfuse.clip_grad_norm_(owners(grads), 1e9)
    chunks = sum(-(-g.nbytes // CHUNK) for g in grads)
    stats = next(launch for launch in ptx.launches if launch.kernel.startswith("dense_stats"))
    assert stats.traffic.bytes_stored("allocation") == 56 * chunks
