"""Behaviour of CUDA alone: no wait for the device, graph capture, streams, mixed devices."""

from contextlib import contextmanager

import pytest
import torch

import gradfuse

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make(sizes, device="cuda", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.ones(n, dtype=dtype, device=device)) for n in sizes]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p)
    return parameters


@contextmanager
def no_sync():
    """Makes a synchronising torch call an error. A copy to the GPU is one: make tensors before."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def side_stream():
    """Another stream, which begins after what the current one has been given, and ends before what
    it will be given."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield side
    torch.cuda.current_stream().wait_stream(side)


def test_nothing_waits_for_the_device():
    parameters = make([3, 4097, 100_003])
    with no_sync():
        clips(parameters)


def clips(parameters):
    gradfuse.clip_grad_norm_(parameters, 1.0)
    gradfuse.clip_grad_value_(parameters, 0.1)
    gradfuse.adaptive_clip_grad_(parameters)
    norm = gradfuse.get_total_norm([p.grad for p in parameters])
    gradfuse.clip_grads_with_norm_(parameters, 1.0, norm)
    gradfuse.GradClipper(parameters, 1.0, nonfinite="zero").clip_()


@pytest.mark.parametrize("count", [1, 700, 1025, 3000])
def test_many_tensors_as_on_the_cpu(count):
    sizes = [i % 300 for i in range(count)]
    on_gpu, on_cpu = make(sizes), make(sizes, "cpu")
    report, expected = (gradfuse.GradClipper(p, 1.0).clip_() for p in (on_gpu, on_cpu))
    assert report.total_norm == pytest.approx(expected.total_norm, rel=1e-7)
    assert report.parameters[-1].norm == pytest.approx(expected.parameters[-1].norm, rel=1e-6)
    for a, b in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad)


def test_captured_in_a_graph():
    parameters = make([5, 4097, 70_001])
    clipper = gradfuse.GradClipper(parameters, 1.0)
    fresh = [p.grad.clone() for p in parameters]
    with side_stream():
        clipper.clip_()  # warm-up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report = clipper.clip_()
    for scale in (1.0, 1e20, 1e-30):
        for p, g in zip(parameters, fresh, strict=True):
            p.grad.copy_(g * scale)
        expected = gradfuse.get_total_norm([p.grad.double() for p in parameters]).item()
        graph.replay()
        again = gradfuse.GradReport([], (report._norm, report._plan, report._stats), 1.0, 2.0, "")
        assert again.total_norm == pytest.approx(expected, rel=1e-6)
        after = gradfuse.get_total_norm([p.grad.double() for p in parameters]).item()
        assert after == pytest.approx(min(expected, 1.0), rel=1e-4)


def test_runs_on_the_current_stream():
    parameters = make([1_000_003])
    with side_stream():
        torch.cuda._sleep(50_000_000)
        parameters[0].grad.fill_(1.0)
        norm = gradfuse.clip_grad_norm_(parameters, 1.0)
    assert norm.item() == pytest.approx(1_000_003**0.5, rel=1e-6)


def test_mixed_devices_count_as_one_vector():
    on_gpu, on_cpu = make([1000, 7]), make([513], "cpu", seed=1)
    mixed = [on_gpu[0], *on_cpu, on_gpu[1]]
    expected = torch.cat([p.grad.double().cpu() for p in mixed]).norm()
    norm = gradfuse.clip_grad_norm_(mixed, 0.5)
    assert norm.device.type == "cuda"
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    after = torch.cat([p.grad.double().cpu() for p in mixed]).norm()
    assert after.item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("policy", ["zero", "error"])
def test_policies(policy):
    parameters = make([10, 4097])
    parameters[1].grad[77] = float("nan")
    before = [p.grad.clone() for p in parameters]
    clipper = gradfuse.GradClipper(parameters, 1.0, nonfinite=policy)
    if policy == "error":
        with pytest.raises(RuntimeError, match="expected a finite total norm"):
            clipper.clip_()
        for p, b in zip(parameters, before, strict=True):
            assert torch.equal(p.grad.view(torch.int32), b.view(torch.int32))
    else:
        assert clipper.clip_().void
        assert all(not p.grad.any() for p in parameters)


MAPS = [((8, 6, 40, 50), False), ((8, 6, 40, 50), True), ((4, 6, 7, 7), False), ((300, 70), False)]


def normalise(x, residual, weight, mean, var):
    """Output and gradients of a training step of batch norm + add + relu."""
    y = gradfuse.batch_norm_act(x, mean, var, weight, residual=residual, training=True)
    return y, *torch.autograd.grad(y.square().sum(), (x, residual, weight))


def batch_norm_tensors(shape, channels_last, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    form = torch.channels_last if channels_last else torch.contiguous_format
    x, r = (
        torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=form)
        for _ in range(2)
    )
    w = torch.rand(shape[1], generator=generator)
    return x, r, w, torch.zeros(shape[1]), torch.ones(shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "channels_last"), MAPS)
def test_batch_norm_as_on_the_cpu(shape, channels_last, dtype):
    tensors = batch_norm_tensors(shape, channels_last, dtype)
    found = {}
    for device in ("cpu", "cuda"):
        x, r, w, mean, var = (t.to(device, copy=True) for t in tensors)  # statistics are written
        for t in (x, r, w):
            t.requires_grad_()
        found[device] = (*normalise(x, r, w, mean, var), mean, var)
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-4)
    for a, b in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("shape", "channels_last"), MAPS)
def test_batch_norm_captured_in_a_graph(shape, channels_last):
    """Also shows that nothing waits, because a capture does not allow waits."""
    tensors = [t.cuda() for t in batch_norm_tensors(shape, channels_last)]
    for t in tensors[:3]:
        t.requires_grad_()
    with side_stream():
        normalise(*tensors)  # warm-up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = normalise(*tensors)
    with torch.no_grad():
        tensors[0].mul_(3.0).add_(1.0)
    graph.replay()
    for a, b in zip(captured, normalise(*tensors), strict=True):
        assert torch.equal(a, b)


def test_layer_norm_under_autocast_is_torchs():
    x = torch.randn(4, 64, device="cuda", dtype=torch.float16)
    with torch.autocast("cuda"):
        for ours, torchs in (
            (gradfuse.layer_norm, torch.nn.functional.layer_norm),
            (gradfuse.rms_norm, torch.nn.functional.rms_norm),
        ):
            torch.testing.assert_close(ours(x, (64,)), torchs(x, (64,)))


def test_a_dropout_is_captured_and_drawn_anew():
    x = torch.randn(64, 256, device="cuda")
    w = torch.ones(256, device="cuda")

    def call():
        return gradfuse.add_rms_norm(x, None, (256,), w, p=0.5, training=True)[1]

    with side_stream():
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        s = call()
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(s.clone())
    assert not torch.equal(*seen)
