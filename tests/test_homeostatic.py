"""HomeostaticGain: what it moves and by how much, what it leaves, what torch does with it."""

import copy
import json
import os
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import HOST_BACKENDS, REAL, random
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradfuse.nn import HomeostaticGain


def buffers(m):
    return {name: value.clone() for name, value in m.state_dict().items()}


def fed(m, x, steps):
    for _ in range(steps):
        y = m(x)
    return y


@HOST_BACKENDS
def test_within_its_ranges_nothing_moves(backend):
    m = HomeostaticGain(6)
    x = random(64, 6)
    assert torch.equal(fed(m, x, 20), F.relu(x))
    assert torch.equal(m.gain, torch.ones(6))
    assert torch.equal(m.threshold, torch.zeros(6))
    torch.testing.assert_close(m.running_mean, x.mean(0))
    torch.testing.assert_close(m.running_var, x.var(0, correction=0))


@HOST_BACKENDS
@pytest.mark.parametrize("below", [6.0, 100.0, 1e4])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_dead_channel_fires_in_time(backend, below, scale):
    """However far below, within 1.5 / limit steps and 1 / momentum more; a gain alone cannot."""
    x = (random(256, 4) - below) * scale
    m, gain_alone = HomeostaticGain(4, limit=0.02), HomeostaticGain(4, rate=None, limit=0.02)
    share = (fed(m, x, 85) > 0).double().mean(0)
    assert share.min() > 0.02
    assert (fed(gain_alone, x, 85) == 0).all()


@HOST_BACKENDS
def test_the_threshold_moves_by_the_size_of_its_input(backend):
    m = HomeostaticGain(4, rms=None)
    x = random(64, 4) - 100
    m(x)
    torch.testing.assert_close(m.threshold, -0.01 * x.square().mean(0).sqrt())


@HOST_BACKENDS
def test_running_statistics_are_those_of_the_mixture(backend):
    """The first batch counts whole, the next as in an average, all others by momentum."""
    m = HomeostaticGain(3, momentum=0.25).double()
    mean, square = 0.0, 0.0
    for step, weight in enumerate((1, 1 / 2, 1 / 3, 1 / 4, 1 / 4, 1 / 4)):
        x = random(8, 3, dtype=torch.float64, seed=step) * (step + 1) + 10 * step
        m(x)
        mean = (1 - weight) * mean + weight * x.mean(0)
        square = (1 - weight) * square + weight * x.square().mean(0)
    torch.testing.assert_close(m.running_mean, mean)
    torch.testing.assert_close(m.running_var, square - mean.square())


@pytest.mark.no_kernel
def test_the_share_is_certain_where_its_lower_end_is_a_half():
    """Of a normal distribution 5 % would be positive where of this one none is."""
    x = torch.full((100, 1), -0.1)
    x[:5] = -10.0
    assert (fed(HomeostaticGain(1), x, 200) > 0).sum() == 0
    assert (fed(HomeostaticGain(1, rate=(0.5, 0.95)), x, 200) > 0).sum() == 95


@HOST_BACKENDS
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_gain_brings_the_rms_into_its_range(backend, scale):
    m = HomeostaticGain(4, activation=None, rms=(1.0, 1.0), rate=None, limit=0.05, max_gain=1e4)
    x = random(64, 4) * scale
    m(x)
    torch.testing.assert_close(m.gain, torch.full((4,), 1.05 if scale < 1 else 1 / 1.05))
    y = fed(m, x, 200)
    torch.testing.assert_close(y.square().mean(0).sqrt(), torch.ones(4), rtol=1e-3, atol=0.0)
    bounded = HomeostaticGain(4, limit=0.5, max_gain=3.0)
    fed(bounded, x, 20)
    torch.testing.assert_close(bounded.gain, torch.full((4,), 3.0 if scale < 1 else 1 / 3.0))


@HOST_BACKENDS
@pytest.mark.parametrize("shape", [(8, 5), (4, 5, 3), (3, 5, 4, 2), (2, 5, 2, 3, 2)])
@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "tanh"])
def test_output_and_gradient(backend, shape, dtype, activation):
    m = HomeostaticGain(5, activation=activation, rate=(0.4, 0.6))
    x = random(*shape, dtype=dtype).requires_grad_()
    y = fed(m, x * 8, 3)
    gain, threshold = (
        b.double().reshape(-1, *[1] * (len(shape) - 2)) for b in (m.gain, m.threshold)
    )
    assert (m.gain < 1).all()
    wide = x.detach().double().requires_grad_()
    z = gain * (8 * wide - threshold)
    truth = z if activation is None else getattr(torch, activation, F.gelu)(z)
    bound = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    if dtype == torch.float64:  # the buffers are float32, and so exact
        bound = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(y.double(), truth, **bound)
    cotangent = random(*shape, dtype=dtype, seed=1)
    y.backward(cotangent)
    truth.backward(cotangent.double())
    bound["atol"] *= 16
    torch.testing.assert_close(x.grad.double(), wide.grad, **bound)


@HOST_BACKENDS
def test_evaluation_changes_nothing(backend):
    m = HomeostaticGain(4)
    fed(m, random(16, 4) * 100, 5)
    before = buffers(m.eval())
    m(random(16, 4))
    torch.testing.assert_close(m.state_dict(), before, rtol=0, atol=0)
    again = HomeostaticGain(4).eval()
    again.load_state_dict(before)
    x = random(16, 4, seed=3)
    for other in (again, copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(other(x), m(x))
    assert list(m.parameters()) == []


@HOST_BACKENDS
def test_two_forwards_before_a_backward(backend):
    m = HomeostaticGain(4)
    x = (random(16, 4) * 100).requires_grad_()
    (m(x) + m(x)).sum().backward()
    slope = 1 / 1.01 + 1 / 1.01**2
    torch.testing.assert_close(x.grad, torch.where(x.detach() > 0, slope, 0.0))


@HOST_BACKENDS
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_moves_once(backend, reentrant):
    m, once = HomeostaticGain(4), HomeostaticGain(4)
    x = (random(16, 4) * 100).requires_grad_()
    checkpoint(m, x, use_reentrant=reentrant).sum().backward()
    direct = x.detach().clone().requires_grad_()
    once(direct).sum().backward()
    torch.testing.assert_close(m.state_dict(), once.state_dict(), rtol=0, atol=0)
    assert torch.equal(x.grad, direct.grad)


@HOST_BACKENDS
def test_compiled_without_a_break(backend):
    torch.compiler.reset()
    m, eager = HomeostaticGain(4), HomeostaticGain(4)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x = random(8, 4, 3, seed=seed) * 100 - 200
        torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(m.state_dict(), eager.state_dict())


@HOST_BACKENDS
def test_autocast(backend):
    net = nn.Sequential(nn.Linear(4, 6), HomeostaticGain(6))
    with torch.autocast("cpu", torch.bfloat16):
        y = net(random(8, 4))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert net[1].gain.dtype == torch.float32


def train_two_ranks(rank, store):
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 6), HomeostaticGain(6)))
    for step in range(3):
        model(random(8, 4, seed=step) * 10 ** (1 + rank)).sum().backward()
    model(random(8, 4)).sum().backward()  # begins with the buffers of rank 0
    gains = [torch.empty(6) for _ in range(2)]
    dist.all_gather(gains, model.module[1].gain)
    assert torch.equal(*gains)
    assert (gains[0] != 1).any()
    dist.barrier()
    # torch 2.13's reducer, as it is destroyed, holds the GIL for which gloo's thread waits.
    os._exit(0)


@pytest.mark.backends("cpu")
@pytest.mark.elsewhere
@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_ranks_have_the_gains_of_the_first(backend, tmp_path):
    torch.multiprocessing.spawn(train_two_ranks, (f"file://{tmp_path}/store",), nprocs=2)


@HOST_BACKENDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_channel_of_nan_is_left_out(backend, bad):
    m = HomeostaticGain(3)
    x = random(16, 3) * 100
    x[0, 1] = bad
    m(x)
    assert m.gain[1] == 1
    assert m.running_mean[1] == 0
    assert (m.gain[[0, 2]] < 1).all()
    assert m.running_var.isfinite().all()


@HOST_BACKENDS
def test_extremes(backend):
    """A variance beyond the dtype still lowers the gain; silence and empty batches move nothing."""
    for dtype, scale in ((torch.float16, 2e4), (torch.float32, 1e38)):
        m = HomeostaticGain(3, dtype=dtype)
        m((random(16, 3) * scale / 4).to(dtype))
        assert (m.gain < 1).all()
        assert all(b.isfinite().all() for b in m.buffers())
    m = HomeostaticGain(3)
    fed(m, torch.zeros(16, 3), 5)
    assert torch.equal(m.gain, torch.ones(3))
    before = buffers(m)
    assert m(torch.zeros(0, 3)).shape == (0, 3)
    torch.testing.assert_close(m.state_dict(), before, rtol=0, atol=0)


@pytest.mark.no_kernel
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_features": 0}, ValueError, "num_features must be >= 1, got 0"),
        ({"num_features": True}, TypeError, "num_features must be an int, got bool"),
        ({"activation": "swish"}, ValueError, "activation must be"),
        ({"rms": 1.0}, TypeError, "rms must be None or two numbers, got 1.0"),
        ({"rms": (0.0, 1.0)}, ValueError, r"rms must be in \(0, inf\), got 0.0"),
        ({"rms": (2.0, 1.0)}, ValueError, r"rms must not fall, got \(2.0, 1.0\)"),
        ({"rate": (0.1, 1.0)}, ValueError, r"rate must be in \(0, 1\), got 1.0"),
        ({"rate": (0.1, "x")}, TypeError, "rate must be a number, got str"),
        ({"limit": 1.0}, ValueError, r"limit must be in \[0, 1\), got 1.0"),
        ({"limit": float("nan")}, ValueError, r"limit must be in \[0, 1\), got nan"),
        ({"momentum": 0.0}, ValueError, r"momentum must be in \(0, 1\], got 0.0"),
        ({"max_gain": 1.0}, ValueError, r"max_gain must be in \(1, inf\), got 1.0"),
        ({"dtype": torch.int64}, TypeError, "dtype must be a real dtype, got torch.int64"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=f"HomeostaticGain: {message}"):
        HomeostaticGain(**{"num_features": 3, **arguments})


@pytest.mark.no_kernel
def test_wrong_inputs():
    m = HomeostaticGain(3)
    before = buffers(m)
    for x in (random(4, 2), random(3), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"input must be \[N, 3, ...\], got \["):
            m(x)
    for x in (torch.ones(4, 3, dtype=torch.int64), random(4, 3, dtype=torch.complex64), [[1.0]]):
        with pytest.raises(TypeError, match="input must be a Tensor of a real dtype, got"):
            m(x)
    torch.testing.assert_close(m.state_dict(), before, rtol=0, atol=0)


@pytest.mark.backends("cpu")
def test_dead_channels_of_digits_live_again(backend, tmp_path, capsys):
    for extra in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(extra)
    from gradfuse.bench.command import main

    assert main(["homeostatic", "--quick", "--seeds", "1", "--out", str(tmp_path)]) == 0
    assert "alive again" in capsys.readouterr().out
    rows = json.loads((tmp_path / "bench_homeostatic.json").read_text())
    alive = {(r["net"], r["depth"], r["kind"]): r["alive"] for r in rows["dead"]}
    assert min(v for (_, _, kind), v in alive.items() if kind == "HomeostaticGain") >= 0.9
    assert max(v for (_, _, kind), v in alive.items() if kind == "ReLU") == 0
