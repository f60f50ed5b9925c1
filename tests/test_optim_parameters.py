"""What may happen to parameters and gradients between the steps of gradfuse.optim."""

import gc
import importlib
import math
import threading
import weakref

import pytest
import torch
from helpers import HOST_BACKENDS, bits, random, short

import gradfuse
from gradfuse.optim import SGD, AdamW

pytestmark = pytest.mark.usefixtures("backend")

BOTH = pytest.mark.parametrize("rule", [AdamW, SGD], ids=lambda r: r.__name__)
each_short = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)


def parameter(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.nn.Parameter(random(*shape, dtype=dtype, device=device, seed=seed))


def give(p, seed, dtype=None):
    """Gives the parameter a gradient, of another dtype than its own if asked."""
    p.grad = None
    if dtype is not None:
        p.grad_dtype = dtype
    p.grad = random(*p.shape, dtype=dtype or p.dtype, device=p.device, seed=seed)


# Master weights, and what else follows a parameter's dtype.


def copy(p, value):
    p.data.copy_(torch.full_like(p, value))


def fill(p, value):
    p.data.fill_(value)


def replace(p, value):
    p.data = torch.full_like(p, value)


def initialise(p, value):
    torch.nn.init.constant_(p, value)


def load(p, value):
    module = torch.nn.Module()
    module.p = p
    module.load_state_dict({"p": torch.full_like(p, value)})


def swap_average(p, value):
    """As an exponential average of the weights that is swapped in."""
    with torch.no_grad():
        other = torch.full_like(p, value)
        kept = p.clone()
        p.copy_(other)
        other.copy_(kept)


@BOTH
@each_short
@pytest.mark.parametrize("write", [copy, fill, replace, initialise, load, swap_average])
def test_a_written_parameter_counts_more_than_its_master(rule, dtype, write, device):
    p = parameter(65, dtype=dtype, device=device)
    optimizer = rule([p], lr=0.125, master_weights=True)
    give(p, 1)
    optimizer.step()
    write(p, 5.0)
    q = torch.nn.Parameter(torch.full_like(p, 5.0))
    fresh = rule([q], lr=0.125, master_weights=True)
    if rule is AdamW:  # the moments of p, without its master
        fresh.state[q] = {
            k: v.clone() for k, v in optimizer.state[p].items() if k != "master_param"
        }
    give(p, 2)
    give(q, 2)
    optimizer.step()
    fresh.step()
    assert torch.equal(optimizer.state[p]["master_param"], fresh.state[q]["master_param"])
    assert torch.equal(p, q)


@each_short
def test_elements_that_nobody_wrote_keep_their_master(dtype, device):
    p = parameter(64, dtype=dtype, device=device)
    optimizer = SGD([p], lr=1e-4, master_weights=True)
    give(p, 1)
    optimizer.step()
    master = optimizer.state[p]["master_param"].clone()
    assert not torch.equal(master, p.float())
    with torch.no_grad():
        p[3] = 7.0
    p.grad.zero_()
    optimizer.step()
    master[3] = 7.0
    assert torch.equal(optimizer.state[p]["master_param"], master)


@each_short
def test_nan_and_inf_stay_in_the_master(dtype, device):
    p = parameter(6, dtype=dtype, device=device)
    optimizer = SGD([p], lr=1.0, master_weights=True, nonfinite="propagate")
    p.grad = torch.tensor([math.nan, math.inf, -math.inf, 0, 0, 0], dtype=dtype, device=device)
    optimizer.step()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    master = optimizer.state[p]["master_param"]
    assert master.isnan().tolist() == [True, False, False, False, False, False]
    assert master[1:3].tolist() == [-math.inf, math.inf]


@HOST_BACKENDS
def test_masters_that_went_through_torchs_adamw():
    p = parameter(33, dtype=torch.bfloat16)
    ours = AdamW([p], lr=0.01, master_weights=True)
    give(p, 1)
    ours.step()
    theirs = torch.optim.AdamW([p], lr=0.01)
    theirs.load_state_dict(ours.state_dict())
    for seed in (2, 3):
        give(p, seed)
        theirs.step()
    again = AdamW([p], lr=0.01, master_weights=True)
    again.load_state_dict(theirs.state_dict())
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    again.param_groups[0].update(lr=0.0)
    again.step()
    assert torch.equal(p, before)
    assert again.state[p]["master_param"].dtype == torch.float32


@BOTH
@HOST_BACKENDS
@pytest.mark.parametrize("through", ["data", "swap"])
def test_a_model_that_changes_its_dtype_after_a_step(rule, through):
    """bfloat16 gets its master then, and the moments follow."""
    torch.__future__.set_swap_module_params_on_conversion(through == "swap")
    try:
        model = torch.nn.Linear(5, 3)
        optimizer = rule(model.parameters(), lr=0.01, master_weights=True, clip=1.0)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            model.to(dtype)
            for i, p in enumerate(model.parameters()):
                give(p, i)
            before = bits(model.parameters())
            optimizer.step()
            assert bits(model.parameters()) != before
            masters = [s.get("master_param") for s in optimizer.state.values()]
            if dtype == torch.bfloat16:
                assert all(m.dtype == torch.float32 for m in masters)
            assert {p.dtype for p in model.parameters()} == {dtype}
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


# Gradients of another type than their parameter.


@BOTH
@each_short
@pytest.mark.parametrize("master", [False, True], ids=["", "master"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_float32_gradients_of_short_parameters(rule, dtype, master, clip, device):
    """A gradient that float32 and the short type both hold gives the same step."""
    steps = []
    for of_grad in (dtype, torch.float32):
        p = parameter(40, 3, dtype=dtype, device=device)
        optimizer = rule([p], lr=0.01, master_weights=master, clip=clip)
        for seed in range(3):
            p.grad = None
            p.grad_dtype = of_grad
            p.grad = random(40, 3, dtype=dtype, device=device, seed=seed).to(of_grad)
            optimizer.step()
        steps.append(bits([p, *(t for t in optimizer.state[p].values())]))
    assert steps[0] == steps[1]


@each_short
def test_float32_gradients_are_not_rounded(dtype, device):
    p = torch.nn.Parameter(torch.zeros(9, dtype=dtype, device=device))
    optimizer = SGD([p], lr=1.0, master_weights=True)
    give(p, 1, torch.float32)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["master_param"], -p.grad)


def test_clips_take_float32_gradients_of_short_parameters(device):
    p = parameter(9, dtype=torch.bfloat16, device=device)
    give(p, 1, torch.float32)
    expected = p.grad * (0.5 / (p.grad.double().norm() + 1e-6)).float()
    gradfuse.clip_grad_norm_([p], 0.5)
    assert torch.allclose(p.grad, expected)


# Parameters that share memory.


def shared_data(a, b):
    b.data = a.data


def a_view_of_some(a, b):
    b.data = a.data[7:]


def rows_of_a_matrix(a, b):
    b.data = a.data.view(-1, 2)[: len(a) // 4]


@BOTH
@pytest.mark.parametrize("share", [shared_data, a_view_of_some, rows_of_a_matrix])
def test_parameters_that_share_memory_are_updated_in_order(rule, share, device):
    def run(apart):
        a, b, c = (parameter(40_000, seed=i, device=device) for i in range(3))
        share(a, b)
        params = [c, a, b]
        options = {"lr": 0.1, "clip": 2.0 if not apart else None}
        optimizers = [rule([p], **options) for p in params] if apart else [rule(params, **options)]
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = random(*p.shape, seed=10 * step + i, device=device)
            if apart:
                gradfuse.clip_grad_norm_(params, 2.0)
            for optimizer in optimizers:
                optimizer.step()
        return [a.detach(), b.detach(), c.detach()]

    together, one_by_one = run(False), run(True)
    for x, y in zip(together, one_by_one, strict=True):
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-7)
    assert bits(together) == bits(run(False))


@HOST_BACKENDS
def test_a_state_that_two_parameters_share():
    p, q = parameter(40_000), parameter(40_000, seed=1)
    optimizer = SGD([p, q], lr=0.1, momentum=0.5)
    for i, each in enumerate((p, q)):
        give(each, i)
    optimizer.step()
    optimizer.state[q] = optimizer.state[p]
    before = optimizer.state[p]["momentum_buffer"].clone()
    optimizer.step()
    expected = (before * 0.5 + p.grad) * 0.5 + q.grad
    assert torch.allclose(optimizer.state[p]["momentum_buffer"], expected, atol=1e-6)


@HOST_BACKENDS
def test_parameters_that_share_memory_no_more():
    a, b = parameter(40_000), parameter(40_000, seed=1)
    optimizer = SGD([a, b], lr=1.0)
    b.data = a.data
    for step in range(2):
        start = a.detach().clone()
        give(a, step)
        give(b, step + 5)
        optimizer.step()
        if step == 0:
            assert torch.allclose(a, start - a.grad - b.grad, atol=1e-6)
            b.data = b.data.clone()
    assert torch.allclose(a, start - a.grad, atol=1e-6)
    assert torch.allclose(b, start - b.grad, atol=1e-6)


# One gradient of two parameters.


@BOTH
@pytest.mark.parametrize("clip", [3.0, gradfuse.policies.AdaGC(max_norm=3.0)], ids=["3", "AdaGC"])
@pytest.mark.parametrize("materialize", [False, True], ids=["", "materialize"])
@pytest.mark.parametrize("shared", ["tensor", "memory"])
def test_one_gradient_of_two_parameters_counts_once(rule, clip, materialize, shared, device):
    p, q, r = (torch.nn.Parameter(torch.zeros(64, device=device)) for _ in range(3))
    optimizer = rule([p, q, r], clip=clip, lr=1.0, materialize_clipped_grads=materialize)
    p.grad = torch.full_like(p, 0.5)
    q.grad = p.grad if shared == "tensor" else p.grad.view(-1)
    r.grad = torch.full_like(r, 1.0)
    expected = math.sqrt(16.0 + 64.0)
    assert float(gradfuse.clip_grad_norm_([p, q, r], math.inf)) == pytest.approx(expected)
    optimizer.step()
    assert optimizer.report.total_norm == pytest.approx(expected)
    assert [g.norm for g in optimizer.report.parameters] == pytest.approx([4.0, 4.0, 8.0])
    assert torch.equal(p, q)
    if rule is SGD:
        factor = 3.0 / expected
        assert torch.allclose(q, torch.full_like(q, -0.5 * factor))
        if materialize:
            assert torch.allclose(q.grad, torch.full_like(q, 0.5 * factor))


# Sparse gradients.


def embedding(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Embedding(50, 6, sparse=True)


def look_up(layer, indices=(3, 7, 3, 3, 49)):
    """A backward pass whose gradient names a row three times."""
    layer.weight.grad = None
    (layer(torch.tensor(indices)) * torch.arange(1.0, 7.0)).sum().backward()
    assert layer.weight.grad.is_sparse


@HOST_BACKENDS
def test_clips_take_sparse_gradients():
    layer = embedding()
    look_up(layer)
    dense = layer.weight.grad.to_dense()
    assert float(gradfuse.get_total_norm([layer.weight.grad])) == pytest.approx(float(dense.norm()))
    norm = gradfuse.clip_grad_norm_(layer.parameters(), 1.0)
    assert float(norm) == pytest.approx(float(dense.norm()))
    assert torch.allclose(layer.weight.grad.to_dense(), dense / (dense.norm() + 1e-6))
    gradfuse.clip_grad_value_(layer.parameters(), 0.125)
    expected = (dense / (dense.norm() + 1e-6)).clamp(-0.125, 0.125)
    assert torch.allclose(layer.weight.grad.to_dense(), expected)
    report = gradfuse.GradClipper(layer.named_parameters(), 0.5).clip_()
    assert report.total_norm == pytest.approx(float(expected.norm()))
    assert report.parameters[0].numel == 3 * 6  # the rows that are there


@HOST_BACKENDS
def test_get_total_norm_of_a_sparse_tensor_twice():
    layer = embedding()
    look_up(layer)
    grad = layer.weight.grad
    expected = float(grad.to_dense().norm()) * math.sqrt(2)
    assert float(gradfuse.get_total_norm([grad, grad])) == pytest.approx(expected)


@HOST_BACKENDS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip": 1.0},
        {"clip": 1.0, "materialize_clipped_grads": True},
        {"momentum": 0.9, "clip": 1.0},
        {"momentum": 0.9, "nesterov": True},
        {"maximize": True},
    ],
    ids=str,
)
def test_sgd_takes_sparse_gradients_as_torch_does(options):
    ours, theirs = embedding(), embedding()
    optimizer = SGD(ours.parameters(), lr=0.1, **options)
    clip = options.pop("clip", None)
    options.pop("materialize_clipped_grads", None)
    expected = torch.optim.SGD(theirs.parameters(), lr=0.1, **options)
    for indices in [(3, 7, 3, 3, 49), (0, 7), (1, 1)]:
        look_up(ours, indices)
        look_up(theirs, indices)
        if clip:
            grad = theirs.weight.grad.coalesce()
            grad.values().mul_(min(1.0, clip / (float(grad.values().norm()) + 1e-6)))
            theirs.weight.grad = grad
        optimizer.step()
        expected.step()
        assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)


@HOST_BACKENDS
def test_weight_decay_reaches_rows_without_a_gradient():
    layer, dense = embedding(), embedding()
    look_up(layer)
    dense.weight.grad = layer.weight.grad.to_dense()
    for each in (layer, dense):
        SGD(each.parameters(), lr=0.1, weight_decay=0.5).step()
    assert torch.equal(layer.weight, dense.weight)


@HOST_BACKENDS
def test_sgd_touches_no_other_rows():
    layer = embedding()
    optimizer = SGD(layer.parameters(), lr=0.1, nonfinite="propagate")
    look_up(layer)
    layer.weight.grad = layer.weight.grad * math.inf
    before = layer.weight.detach().clone()
    optimizer.step()
    touched = ~layer.weight.isfinite().all(dim=1)
    assert touched.nonzero().flatten().tolist() == [3, 7, 49]
    assert torch.equal(layer.weight[~touched], before[~touched])


@HOST_BACKENDS
def test_adamw_refuses_sparse_gradients_as_torch_does():
    layer = embedding()
    optimizer = AdamW(layer.parameters(), clip=1.0)
    look_up(layer)
    before = bits([layer.weight])
    with pytest.raises(RuntimeError, match=r"AdamW does not support sparse gradients.*SparseAdam"):
        optimizer.step()
    assert bits([layer.weight]) == before


# Python's references.


@HOST_BACKENDS
@pytest.mark.parametrize("make", [
    lambda ps: AdamW(ps, clip=1.0).step,
    lambda ps: SGD(ps, momentum=0.9, clip=gradfuse.policies.ZClip()).step,
    lambda ps: gradfuse.GradClipper(ps, 1.0).clip_,
    lambda ps: gradfuse.GradClipper(ps, gradfuse.policies.ZClip()).clip_,
], ids=["AdamW", "SGD", "GradClipper", "policy"])  # fmt: skip
def test_swapped_parameters(make):
    """Someone else's reference to a parameter's tensor makes torch refuse to swap it."""
    model = torch.nn.Linear(4, 3)
    run = make(list(model.parameters()))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            run()
            model.double()
            model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    run()


@HOST_BACKENDS
@pytest.mark.parametrize("kind", ["optimizer", "clipper", "wrapped"])
def test_a_parameter_that_refers_to_its_owner_is_freed(kind):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    importlib.import_module("torch.distributed.optim")  # with it, constructors look at the stack
    if kind == "optimizer":
        owner = AdamW([p], clip=1.0)
        owner.step()
    elif kind == "clipper":
        owner = gradfuse.GradClipper([p], 1.0)
        owner.clip_()
    else:
        owner = gradfuse.optim.clip_in_step(torch.optim.SGD([p], lr=0.1, fused=True), 1.0)
        owner._optimizer.step()
    p.owner = owner
    gone = weakref.ref(owner)
    del p, owner
    gc.collect()
    assert gone() is None


@pytest.mark.backends("cpu")
def test_a_step_keeps_the_parameters_that_it_began_with(backend):
    """Another thread binds others meanwhile."""
    if backend == "reference":
        pytest.skip("plain torch holds the parameters as lists, which threads do change")
    params = [torch.nn.Parameter(torch.ones(400_000)) for _ in range(4)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = SGD(params, lr=0.01, clip=1.0)
    errors = []

    def run(of):
        try:
            for _ in range(30):
                optimizer.param_groups[0]["params"] = of
                optimizer.step()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(list(params[i:]),)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def many(optimizer_of, device="cpu"):
    """Three steps on 1,500 parameters. Some have no gradient, one a sparse one, one is strided, and
    two share their memory."""
    rows = random(50, 3, device=device)
    table = torch.nn.Embedding.from_pretrained(rows, freeze=False, sparse=True)
    params = [random(1 + i % 37, device=device, seed=i) for i in range(1500)]
    params[700] = random(6, 4, device=device).t()
    params[900] = params[20]
    params = [torch.nn.Parameter(p) for p in params]
    params[1200] = table.weight
    optimizer = optimizer_of(params)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = None if i % 11 == 3 else random(*p.shape, device=device, seed=i + step)
        params[901].grad = params[902].grad = None
        table(torch.tensor([1, 7, 7], device=device)).sum().backward()
        optimizer.step()
    return [p.detach() for p in params]


def test_threads_share_the_walk_over_thousands_of_parameters(native, threads):
    def clipped(params):
        return SGD(params, lr=0.1, momentum=0.9, clip=1.0)

    found = {}
    for count in (1, 2, 5):
        threads(count)
        found[count] = many(clipped)
    assert bits(found[1]) == bits(found[2]) == bits(found[5])
    truth = many(Stock)
    for ours, theirs in zip(found[2], truth, strict=True):
        torch.testing.assert_close(ours, theirs)


class Stock:
    """torch's clip, then torch's SGD."""

    def __init__(self, params):
        self._params = params
        self._sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)

    def step(self):
        torch.nn.utils.clip_grad_norm_(self._params, 1.0)
        self._sgd.step()
