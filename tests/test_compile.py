"""torch.compile(fullgraph=True) of the clips, in the ways that user code calls them.

Each op's own graph and torch.library's checks are in test_ops.py, batch norm's modules and layouts
in test_batch_norm_autograd.py and test_nn.py.
"""

import math

import pytest
import torch
from helpers import REAL, bits, needs_compiler, owner, owners, random, short

import gradfuse

BACKENDS = ["eager", "aot_eager"]  # of torch.compile, not implementations of gradfuse


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def compiled(function, backend):
    return torch.compile(function, fullgraph=True, backend=backend)


def model(device="cpu"):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    return net.to(device)


def filled(params, scale=1.0):
    """The same parameters, with fresh gradients."""
    for i, p in enumerate(params):
        p.grad = random(*p.shape, dtype=p.dtype, device=p.device, scale=scale, seed=i)
    return params


FUNCTIONS = {
    "get_total_norm of order inf": lambda ps: gradfuse.get_total_norm([ps[0].grad], "inf"),
    "clip_grad_norm_": lambda ps: gradfuse.clip_grad_norm_(ps, 0.3),
    "clip_grad_norm_ of a generator": lambda ps: gradfuse.clip_grad_norm_((p for p in ps), 0.3),
    "clip_grad_norm_ of one tensor": lambda ps: gradfuse.clip_grad_norm_(ps[0], 0.3),
    "clip_grad_norm_ of order 3": lambda ps: gradfuse.clip_grad_norm_(ps, 0.3, 3),
    "clip_grad_norm_, quiet": lambda ps: gradfuse.clip_grad_norm_(ps, 1e4),
    "clip_grad_norm_, policy": lambda ps: gradfuse.clip_grad_norm_(ps, 0.3, nonfinite="zero"),
    "clip_grad_norm_ of tied ones": lambda ps: gradfuse.clip_grad_norm_([ps[0], *ps, ps[0]], 0.3),
    "clip_grads_with_norm_": lambda ps: gradfuse.clip_grads_with_norm_(
        ps, 0.3, gradfuse.get_total_norm([p.grad for p in ps])
    ),
    "adaptive_clip_grad_": lambda ps: gradfuse.adaptive_clip_grad_(ps),
}


def test_the_graph_holds_one_op(device):
    """The graph calls the kernels as one opaque op; torch.compile does not trace a fallback."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    params = filled(list(model(device).parameters()))
    compiled(lambda: gradfuse.clip_grad_norm_(params, 0.3), keep)()
    (graph,) = graphs
    called = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert (
        called.count(torch.ops.gradfuse.clip_grads_)
        + called.count(torch.ops.gradfuse.clip_grads_.default)
        == 1
    )


def assert_same_as_eager(function, params, backend):
    """Compares results and gradients bit for bit."""
    expected = function(filled(params))
    grads = bits([p.grad for p in params if p.grad is not None])
    got = compiled(function, backend)(filled(params))
    assert bits([p.grad for p in params if p.grad is not None]) == grads
    assert (got is None) == (expected is None)
    if expected is not None:
        assert got.dtype == expected.dtype
        assert bits(got) == bits(expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_compile_to_one_graph(name, device):
    params = list(model(device).parameters())
    assert_same_as_eager(FUNCTIONS[name], params, "aot_eager")


@needs_compiler
@pytest.mark.parametrize("name", ["clip_grad_norm_", "adaptive_clip_grad_"])
def test_functions_compile_with_inductor(name, device):
    params = list(model(device).parameters())
    assert_same_as_eager(FUNCTIONS[name], params, "inductor")


@pytest.mark.parametrize("dtypes", [[d] for d in REAL] + [REAL], ids=short)
def test_dtypes_and_strides_compile(dtypes, device):
    def function(ps):
        return gradfuse.clip_grad_norm_(ps, 0.2)

    def fresh():
        grads = [random(7, 9, dtype=d, device=device).t()[::2] for d in dtypes]
        return owners(grads), grads

    params, grads = fresh()
    expected = function(params)
    params, again = fresh()
    got = compiled(function, "aot_eager")(params)
    assert (bits(got), bits(again)) == (bits(expected), bits(grads))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_without_gradient_compile(backend, device):
    params = filled(list(model(device).parameters()))
    params[1].grad = None
    expected = gradfuse.clip_grad_norm_(params, 0.3)
    grads = bits([params[0].grad, params[2].grad])
    filled(params)
    params[1].grad = None
    got = compiled(lambda: gradfuse.clip_grad_norm_(params, 0.3), backend)()
    assert params[1].grad is None
    assert bits(got) == bits(expected)
    assert bits([params[0].grad, params[2].grad]) == grads


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shared_gradient_is_scaled_once(backend, device):
    grad = torch.full((4,), 2.0, device=device)
    first, second = owner(grad), torch.zeros(4, device=device)
    second.grad = grad
    got = compiled(lambda: gradfuse.clip_grad_norm_([first, second], 2.0), backend)()
    assert got.item() == 4.0
    torch.testing.assert_close(grad, torch.full_like(grad, 1.0))


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("inductor", marks=needs_compiler)])
def test_grad_clipper_returns_its_report(backend, device):
    net = model(device)
    clipper = gradfuse.GradClipper(net.named_parameters(), 0.3, nonfinite="zero")
    params = list(net.parameters())
    filled(params)
    params[1].grad = None
    expected = clipper.clip_()
    grads = bits([p.grad for p in params if p.grad is not None])

    filled(params)
    params[1].grad = None
    report = compiled(clipper.clip_, backend)()
    assert isinstance(report, gradfuse.GradReport)
    assert report.to_dict() == expected.to_dict()
    assert str(report) == str(expected)
    assert bits([p.grad for p in params if p.grad is not None]) == grads


def test_settings_may_change_between_compiled_steps(device):
    """torch.compile guards the settings; they are not constants of the graph."""
    params = list(model(device).parameters())
    clipper = gradfuse.GradClipper(params, 0.3)
    step = compiled(lambda: clipper.clip_().norm_tensor, "aot_eager")
    for max_norm in (0.3, 0.5, 0.25, 1e6):
        clipper.max_norm = max_norm
        filled(params)
        step()
        norm = gradfuse.get_total_norm([p.grad for p in params]).item()
        assert norm == pytest.approx(min(max_norm, norm), rel=1e-6)
        filled(params)
        clipper.clip_()
        assert gradfuse.get_total_norm([p.grad for p in params]).item() == norm
    clipper.add(owner(torch.full((9,), 100.0, device=device)))
    assert step().item() > 300.0


def test_policies_act_in_compiled_steps(device):
    params = list(model(device).parameters())
    filled(params)
    params[2].grad[0, 0] = math.nan
    refuse = compiled(
        lambda: gradfuse.clip_grad_norm_(params, 0.3, error_if_nonfinite=True), "aot_eager"
    )
    before = bits([p.grad for p in params])
    with pytest.raises(RuntimeError, match="finite"):
        refuse()
    assert bits([p.grad for p in params]) == before
    zero = compiled(lambda: gradfuse.clip_grad_norm_(params, 0.3, nonfinite="zero"), "aot_eager")
    assert zero().isnan()
    assert not any(p.grad.any() for p in params)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_inside_a_compiled_training_step(backend, device):
    """Gradients come from outside; clip and update are one graph."""
    inputs = random(16, 6, device=device)

    def train(wrap):
        net = model(device)
        params = list(net.parameters())
        clipper = gradfuse.GradClipper(net.named_parameters(), 0.5)

        def update():
            report = clipper.clip_()
            with torch.no_grad():
                for p in params:
                    p.sub_(p.grad * 0.5)
            return report.norm_tensor

        update = wrap(update)
        norms = []
        for _ in range(4):
            net.zero_grad()
            net(inputs).square().sum().backward()
            norms.append(update())
        return bits(params), bits(norms)

    assert train(lambda f: compiled(f, backend)) == train(lambda f: f)


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_the_backward_in_the_same_graph(backend, device):
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch cannot trace torch.autograd.grad")
    net = model(device)
    params = list(net.parameters())
    inputs = random(16, 6, device=device)

    def step(x):
        loss = net(x).square().sum()
        grads = torch.autograd.grad(loss, params)
        norm = gradfuse.get_total_norm(grads)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        gradfuse.clip_grad_norm_(params, 0.5)
        return norm

    expected = step(inputs)
    grads = [p.grad.clone() for p in params]
    for p in params:
        p.grad = None
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        got = compiled(step, backend)(inputs)
    torch.testing.assert_close(got, expected)
    for p, g in zip(params, grads, strict=True):
        torch.testing.assert_close(p.grad, g)
