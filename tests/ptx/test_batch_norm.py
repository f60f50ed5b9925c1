"""Traffic of batch norm kernels: they read the input twice, or once if a block holds a channel."""

import re
from collections import Counter

import pytest
import torch
from helpers import REAL, bits, random, short

import gradfuse
from gradfuse import reference
from gradfuse._codes import Activation
from gradfuse._records import BatchNormCall, BatchNormOptions, BatchNormSaved
from ptx.emulator import emulated
from ptx.test_traffic import Operations

DTYPES = pytest.mark.parametrize("dtype", REAL, ids=short)


def forward(ptx, x, r):
    """Training with relu, without weight, bias and running statistics."""
    nothing = (None, None, None, None)
    return ptx.batch_norm_forward(
        BatchNormCall(x, r, *nothing, True, 0.1, 1e-5, Activation.RELU, 0.0, wants_mask=True)
    )


def backward(ptx, x, g, mask, stats, channels_last):
    saved = BatchNormSaved(x, None, None, mask, None, None, stats)
    options = BatchNormOptions(channels_last, True, 1e-5, Activation.RELU, 0.0)
    ptx.batch_norm_backward(g, saved, options, (True, True, True, True))


def run(ptx, x, r, g):
    """(loaded, stored) bytes by buffer, of the forward and of the backward. Buffers are named after
    the records' fields; grad_output is in no record, so its name is tensor 0."""

    def counts():
        assert ptx.runtime.waits == 0
        assert {launch.stream for launch in ptx.launches} == {0}
        loaded, stored = {}, {}
        for found, by in ((loaded, ptx.traffic.loaded), (stored, ptx.traffic.stored)):
            for (name, width), n in by.items():
                found[name] = {**found.get(name, {}), width: n}
        return loaded, stored

    _, mask, stats = forward(ptx, x, r)
    of_forward = counts()
    backward(ptx, x, g, mask, stats, not x.is_contiguous())
    return of_forward, counts()


def wide(traffic, name):
    """Bytes in 16-byte accesses."""
    return traffic.get(name, {}).get(16, 0)


def written(stored, nbytes):
    """The number of buffers of this size that were stored once, in 16-byte accesses."""
    return sum(by == {16: nbytes} for by in stored.values())


@DTYPES
@pytest.mark.parametrize(
    ("shape", "channels_last"), [((2, 2, 80, 64), False), ((2, 24, 9, 8), True), ((70, 64), False)]
)
def test_each_byte_as_often_as_it_must(ptx, dtype, shape, channels_last):
    def make(seed):
        t = random(*shape, dtype=dtype, seed=seed)
        return t.contiguous(memory_format=torch.channels_last) if channels_last else t

    x, r, g = make(1), make(2), make(3)
    (loaded, stored), (loaded_back, stored_back) = run(ptx, x, r, g)
    assert wide(loaded, "input") == 2 * x.nbytes  # the shifts are loaded by element
    assert wide(loaded, "residual") == r.nbytes
    assert written(stored, x.nbytes) == 1
    assert {1: x.numel() // 8} in stored.values()  # a bit per element
    assert wide(loaded_back, "tensor 0") == 2 * g.nbytes
    assert wide(loaded_back, "input") == 2 * x.nbytes
    assert loaded_back["mask"] == {1: 2 * x.numel() // 8}
    assert written(stored_back, x.nbytes) == 2


@DTYPES
def test_small_maps_are_read_once(ptx, dtype):
    x, r, g = (random(2, 3, 8, 8, dtype=dtype, seed=i) for i in range(3))
    (loaded, stored), (loaded_back, stored_back) = run(ptx, x, r, g)
    assert wide(loaded, "input") == x.nbytes
    assert wide(loaded, "residual") == r.nbytes
    assert written(stored, x.nbytes) == 1
    assert wide(loaded_back, "tensor 0") == wide(loaded_back, "input") == x.nbytes
    assert loaded_back["mask"] == {1: x.numel() // 8}
    assert written(stored_back, x.nbytes) == 2
    assert len(ptx.launches) == 1


@pytest.mark.parametrize(("shape", "rows"), [((2, 2, 80, 64), False), ((160, 64), True)])
def test_coefficients_are_loaded_once_for_a_group(ptx, shape, rows):
    """Eight elements of one channel load each coefficient once. Elements of eight channels take
    16-byte loads."""
    x, r, g = (random(*shape, seed=i) for i in range(3))
    _, mask, stats = forward(ptx, x, r)
    launches = [*ptx.launches]
    backward(ptx, x, g, mask, stats, False)
    narrow = {}
    for launch in (*launches, *ptx.launches):
        found = narrow.setdefault(launch.kernel.partition("<")[0], Counter())
        for (buffer, width), n in launch.traffic.loaded.items():
            found[width] += n if buffer != "stats" else 0  # read once by each block
    groups = x.numel() // 8
    for kernel, coefficients in (("batch_norm_apply", 3), ("batch_norm_grad_apply", 5)):
        assert narrow[kernel][4] == (0 if rows else 4 * coefficients * groups)
    if rows:
        assert narrow["batch_norm_grad_row_sums"][4] == 0


SPLIT = [((6, 3, 70, 80), False), ((6, 24, 9, 8), True), ((140, 64), False), ((6, 3, 8, 8), False)]


def over_ranks(backend, x, g, channels_last, act):
    """Output, input gradients, and what two ranks of 1/3 and 2/3 of the batch tell each other."""
    cut = len(x) // 3
    mean, var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    of_call = (None, None, None, mean, var, True, 0.1, 1e-5, act, 0.0, False)
    calls = [BatchNormCall(part, *of_call) for part in (x[:cut], x[cut:])]
    gathered = torch.stack([backend.batch_norm_statistics(call) for call in calls])
    calls = [c._replace(gathered=gathered) for c in calls]
    results = [backend.batch_norm_forward(call) for call in calls]
    options = BatchNormOptions(channels_last, True, 1e-5, act, 0.0)
    saved = [
        BatchNormSaved(c.input, None, None, None, None, None, stats)
        for c, (_, _, stats) in zip(calls, results, strict=True)
    ]
    parts = (g[:cut], g[cut:])
    sums = [
        backend.batch_norm_gradient_sums(p, s, options) for p, s in zip(parts, saved, strict=True)
    ]
    means = torch.stack(sums).sum(0) / gathered[:, 0].sum()
    grads = [
        backend.batch_norm_backward(
            p, s._replace(means=means), options, (True, False, False, False)
        )[0]
        for p, s in zip(parts, saved, strict=True)
    ]
    outputs = [y for y, _, _ in results]
    return {
        "gathered": gathered, "y": torch.cat(outputs), "sums": torch.stack(sums),
        "dx": torch.cat(grads), "running": torch.stack([mean, var]),
    }  # fmt: skip


@DTYPES
@pytest.mark.parametrize(("shape", "channels_last"), SPLIT)
@pytest.mark.parametrize("act", [Activation.NONE, Activation.SILU], ids=["none", "silu"])
def test_over_ranks_as_the_reference(ptx, dtype, shape, channels_last, act):
    x, g = (random(*shape, dtype=dtype, seed=i) + i for i in range(2))
    if channels_last:
        x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    found = over_ranks(ptx, x, g, channels_last, act)
    expected = over_ranks(reference, x, g, channels_last, act)
    eps = max(torch.finfo(dtype).eps, 1e-9)
    for name, t in expected.items():
        size = float(t.abs().max())
        bound = 8 * eps if name in ("y", "dx") else 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(found[name], t, rtol=bound, atol=bound * size, msg=name)


@pytest.mark.parametrize(("shape", "channels_last"), SPLIT)
def test_over_ranks_no_pass_is_added(ptx, shape, channels_last):
    """Sums read their tensors once, sweeps once, and in any order of the blocks find the same."""
    x, g = (random(*shape, seed=i) for i in range(2))
    if channels_last:
        x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    nothing = (None, None, None, None, None)
    call = BatchNormCall(x, *nothing, True, 0.1, 1e-5, Activation.NONE, 0.0, False)
    row = ptx.batch_norm_statistics(call)
    assert wide(counted(ptx.traffic.loaded), "input") == x.nbytes
    gathered = torch.stack([row, row])
    _, _, stats = ptx.batch_norm_forward(call._replace(gathered=gathered))
    assert wide(counted(ptx.traffic.loaded), "input") == x.nbytes
    saved = BatchNormSaved(x, None, None, None, None, None, stats)
    options = BatchNormOptions(channels_last, True, 1e-5, Activation.NONE, 0.0)
    sums = ptx.batch_norm_gradient_sums(g, saved, options)
    assert wide(counted(ptx.traffic.loaded), "input") == x.nbytes
    assert wide(counted(ptx.traffic.loaded), "tensor 0") == g.nbytes
    saved = saved._replace(means=sums / gathered[:, 0].sum())
    (dx, *_) = ptx.batch_norm_backward(g, saved, options, (True, False, False, False))
    assert wide(counted(ptx.traffic.loaded), "input") == x.nbytes
    assert wide(counted(ptx.traffic.loaded), "tensor 0") == g.nbytes
    assert written(counted(ptx.traffic.stored), x.nbytes) == 1
    for order in ("backward", "shuffled"):
        ptx.machine.order = order
        assert bits(ptx.batch_norm_statistics(call)) == bits(row)
        assert bits(ptx.batch_norm_gradient_sums(g, saved._replace(means=None), options)) == bits(
            sums
        )
    assert dx.shape == x.shape


def counted(by):
    """Bytes by buffer and width."""
    found = {}
    for (name, width), n in by.items():
        found[name] = {**found.get(name, {}), width: n}
    return found


@DTYPES
def test_any_order_of_the_blocks_gives_the_same_bits(ptx, dtype):
    """The second stage adds the chunks' sums in their order, whichever block ends first."""
    shapes = ((2, 3, 70, 80), (300, 70), (2, 3, 8, 8))
    for x in (random(*shape, dtype=dtype) for shape in shapes):
        found = {}
        for order in ("forward", "backward", "shuffled"):
            ptx.machine.order = order
            leaf = x.clone().requires_grad_()
            y = gradfuse.batch_norm_act(leaf, None, None, residual=x, training=True)
            y.sum().backward()
            found[order] = bits([y, leaf.grad])
        assert found["forward"] == found["backward"] == found["shuffled"]


@pytest.mark.parametrize(("shape", "rows"), [((2, 2, 80, 64), False), ((500, 64), True)])
def test_the_sweep_begins_where_the_sums_end(ptx, shape, rows):
    """There the L2 cache still holds what was read."""
    x, r, g = (random(*shape, seed=i) for i in range(3))
    _, mask, stats = forward(ptx, x, r)
    launches = [*ptx.launches]
    backward(ptx, x, g, mask, stats, False)
    first = {
        launch.kernel.partition("<")[0]: launch.first_touched.get("input")
        for launch in (*launches, *ptx.launches)
    }
    kind = "row" if rows else "channel"
    block = 256 * 8 * x.element_size()
    for direction in ("", "grad_"):
        assert first[f"batch_norm_{direction}{kind}_sums"] == 0
        assert first[f"batch_norm_{direction}apply"] == (x.nbytes - 1) // block * block


def test_no_kernel_has_an_atomic_on_floats():
    _, compiled = emulated.build()
    for c in compiled:
        found = re.findall(r"\b(?:atom|red)\.\S*\.b?f\d\S*", c.ptx.read_text())
        assert not found, f"{c.ptx.name}: {found}"


def test_the_host_never_waits(ptx):
    """Not even for running statistics of another dtype or with gaps, or momentum on the device."""
    x = random(2, 3, 70, 80).requires_grad_()
    mean, var = torch.zeros(3, 2)[:, 0], torch.ones(3, dtype=torch.bfloat16)
    momentum = torch.tensor(0.3)
    with Operations() as operations:
        y = gradfuse.batch_norm_act(x, mean, var, residual=x, training=True, momentum=momentum)
        assert ptx.runtime.waits == 0
        y.sum().backward()
    assert ptx.runtime.waits == 0
    assert {launch.stream for launch in ptx.launches} == {0}
    assert "_local_scalar_dense" not in operations.names
    assert mean.all()


def test_without_what_is_not_needed_nothing_is_read(ptx):
    """Eval mode with frozen parameters: the gradient needs the mask and no input."""
    x = random(2, 3, 70, 80).requires_grad_()
    mean, var = torch.zeros(3), torch.ones(3)
    gradfuse.batch_norm_act(x, mean, var).sum().backward()
    names = {launch.kernel.partition("<")[0] for launch in ptx.launches}
    assert names == {"batch_norm_grad_finish", "batch_norm_grad_apply"}
    assert not any(name in ("residual", "input") for name, _ in ptx.traffic.loaded)


def test_as_the_reference(ptx, monkeypatch):
    x = random(2, 3, 70, 80)
    ours = gradfuse.batch_norm_act(x, None, None, training=True)
    monkeypatch.setattr("gradfuse._native.backend", reference)
    torch.testing.assert_close(ours, gradfuse.batch_norm_act(x, None, None, training=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=short)
@pytest.mark.parametrize(
    ("shape", "bound"),
    [((150, 2, 7, 7), 1.8), ((9, 2, 7, 7), 1.8), ((600, 12), 1.3), ((44, 1, 14, 14), 1.3)],
)
def test_runs_of_any_length_touch_few_sectors(ptx, dtype, shape, bound):
    """Neighbouring lanes access neighbours, wherever runs begin. A run's ends may share their
    sectors with others. Words are loaded by halves of a sector."""
    x, r, g = (random(*shape, dtype=dtype, seed=i) for i in range(3))
    leaf = x.clone().requires_grad_()
    for backend in (reference, ptx):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gradfuse._native.backend", backend)
            y = gradfuse.batch_norm_act(leaf, None, None, residual=r, training=True)
            forward = ptx.traffic
            (grad,) = torch.autograd.grad(y, leaf, g)
        if backend is reference:
            expected = y, grad
    torch.testing.assert_close((y, grad), expected)
    run = x[0, 0].numel() if x.dim() == 4 else x.shape[1]
    in_words = run * dtype.itemsize % 16 == 0
    for traffic in (forward, ptx.traffic):
        for stores, moved in ((False, traffic.loaded), (True, traffic.stored)):
            large = {name for name, _ in moved if traffic_of(moved, name) >= x.nbytes}
            bytes_moved = sum(traffic_of(moved, name) for name in large)
            assert bytes_moved
            most = 2 if in_words and not stores else bound
            assert traffic.sector_bytes(large, stores) <= most * bytes_moved


def traffic_of(moved, buffer):
    return sum(n for (name, _), n in moved.items() if name == buffer)
