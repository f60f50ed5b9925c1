"""Steps on CUDA alone: no wait for the device, graph capture, scalers, skips, many launches."""

import math
import warnings
from functools import partial

import pytest
import torch

import gradfuse
from gradfuse.optim import LAMB, SGD, Adam, AdamW, Lion, ScheduleFreeAdamW
from gradfuse.policies import AGC, AdaGC, AutoClip, Norm, SpikeSkip, Value, ZClip

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

RULES = pytest.mark.parametrize(
    "make",
    [
        partial(SGD, lr=0.1, momentum=0.9),
        AdamW,
        partial(Adam, weight_decay=0.1, eps_follows_clip=True),
        partial(Adam, atan2=True),
        LAMB,
        Lion,
        ScheduleFreeAdamW,
    ],
    ids=["SGD", "AdamW", "Adam", "atan2", "LAMB", "Lion", "ScheduleFreeAdamW"],
)


def parameters(sizes, device="cuda", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=generator) for n in sizes]
    return [torch.nn.Parameter(v.to(device=device, dtype=dtype)) for v in values]


def give(ps, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator).to(p)


@RULES
@pytest.mark.parametrize(
    "policy",
    [None, partial(Norm, 1.0), partial(Value, 0.1), AGC, ZClip, AutoClip, AdaGC, SpikeSkip],
)
def test_steps_wait_for_nothing(make, policy):
    ps = parameters([3, 4097, 70_001])
    give(ps, 0)
    optimizer = make(ps, clip=policy and policy())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(p).all() for p in ps)


@RULES
@pytest.mark.parametrize("count", [1, 700, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_steps_as_on_the_cpu(make, count, dtype):
    sizes = [i % 300 for i in range(count)]
    found = []
    for device in ("cpu", "cuda"):
        ps = parameters(sizes, device, dtype)
        optimizer = make(ps, clip=1.0)
        for seed in range(3):
            give(ps, seed)
            optimizer.step()
        found.append(ps)
    tolerance = 4 * torch.finfo(dtype).eps
    for on_cpu, on_gpu in zip(*found, strict=True):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=tolerance, atol=tolerance)


@RULES
@pytest.mark.parametrize("policy", [partial(Norm, 1.0), partial(ZClip, warmup=2)])
def test_a_step_captured_in_a_graph(make, policy):
    captured, eager = parameters([5, 4097, 70_001]), parameters([5, 4097, 70_001])
    by_graph, by_hand = make(captured, clip=policy()), make(eager, clip=policy())
    for optimizer in (by_graph, by_hand):
        group = optimizer.param_groups[0]
        group["lr"] = torch.tensor(group["lr"], device="cuda")
    for ps in (captured, eager):
        give(ps, 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        by_graph.step()  # warm-up, which makes the state
    torch.cuda.current_stream().wait_stream(side)
    by_hand.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        by_graph.step()
    for seed in range(1, 4):
        for optimizer in (by_graph, by_hand):
            optimizer.param_groups[0]["lr"].mul_(0.5)
        for ps in (captured, eager):
            gradients = [p.grad for p in ps]
            give(ps, seed)
            for p, gradient in zip(ps, gradients, strict=True):
                p.grad = gradient.copy_(p.grad)  # a graph reads the addresses that it was given
        graph.replay()
        by_hand.step()
        for a, b in zip(captured, eager, strict=True):
            assert torch.equal(a, b)


@RULES
def test_a_number_is_not_captured(make):
    optimizer = make(parameters([5]))
    give(optimizer.param_groups[0]["params"], 0)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="lr must be a Tensor on the GPU"),
        torch.cuda.graph(graph),
    ):
        optimizer.step()


@pytest.mark.parametrize("scaler", [torch.amp.GradScaler, gradfuse.optim.GradScaler])
def test_scalers_skip_and_shrink(scaler):
    ps = parameters([3, 4097])
    optimizer, scaler = SGD(ps, lr=0.1, clip=10.0), scaler("cuda", init_scale=4.0)
    scaler.scale(torch.zeros((), device="cuda"))
    before = [p.detach().clone() for p in ps]
    scales = []
    for value in (1.0, math.inf, 1.0):
        for p in ps:
            p.grad = torch.full_like(p, 0.01 * value)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [4.0, 2.0, 2.0]
    assert optimizer.skipped_steps == 1
    for p, b in zip(ps, before, strict=True):
        torch.testing.assert_close(p.detach(), b - 0.1 * 0.01 / 4 - 0.1 * 0.01 / 2)


def test_many_skips_in_a_row_warn_once():
    ps = parameters([3, 4097])
    optimizer = AdamW([("a", ps[0]), ("b", ps[1])])
    for p in ps:
        p.grad = torch.ones_like(p)
    for _ in range(150):
        optimizer.step()
    ps[1].grad[7] = math.nan
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for i in range(450):
            optimizer.step()
            if i % 50 == 0:
                torch.cuda.synchronize()
    messages = [str(w.message) for w in seen]
    assert len(messages) == 1
    assert "the gradient of b has 1 NaN or inf of 4097" in messages[0]
    assert optimizer.skipped_steps == 450


@RULES
def test_steps_on_the_current_stream(make):
    ps = parameters([1_000_003])
    expected = parameters([1_000_003])
    give(ps, 0)
    give(expected, 0)
    make(expected, clip=1.0).step()
    late = ps[0].grad.clone()
    ps[0].grad.zero_()
    optimizer = make(ps, clip=1.0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        ps[0].grad.copy_(late)
        optimizer.step()
    side.synchronize()
    assert torch.equal(ps[0], expected[0])


def test_mixed_devices_in_one_step():
    on_gpu, on_cpu = parameters([1000, 7]), parameters([513], "cpu")
    mixed = [on_gpu[0], on_cpu[0], on_gpu[1]]
    alone = parameters([1000, 513, 7], "cpu")
    for p, source in zip(alone, mixed, strict=True):
        p.data.copy_(source.detach())
    give(alone, 3)
    for p, source in zip(mixed, alone, strict=True):
        p.grad = source.grad.to(p)
    optimizers = [SGD(ps, lr=0.1, momentum=0.9, clip=0.5) for ps in (mixed, alone)]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.step()
    for p, expected in zip(mixed, alone, strict=True):
        torch.testing.assert_close(p.cpu(), expected)


def test_masters_and_float32_gradients():
    found = []
    for device in ("cpu", "cuda"):
        ps = parameters([3, 4097], device, torch.bfloat16)
        optimizer = AdamW(ps, lr=1e-3, clip=1.0, master_weights=True)
        for seed in range(20):
            give(ps, seed)
            if hasattr(ps[0], "grad_dtype"):
                for p in ps:
                    gradient, p.grad = p.grad.float(), None
                    p.grad_dtype = None
                    p.grad = gradient
            optimizer.step()
        found.append([optimizer.state[p]["master_param"].cpu() for p in ps])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
