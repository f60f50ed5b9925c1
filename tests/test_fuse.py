"""fuse keeps the program: values, gradients, statistics, classes, names; and says what it did."""

import copy
import gc
import pickle
import types
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers import HOST_BACKENDS, random
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import gradfuse
from gradfuse import _native

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
waits = pytest.mark.skipif(not _native.available, reason="outputs wait in the compiled module only")


@pytest.fixture(autouse=True)
def nothing_waits_for_ever():
    yield
    if _native.available and _native.backend.count_waiting():
        gc.collect()  # slow
        assert _native.backend.count_waiting() == 0


# name: what the batch norms become in a forward
ZOO = {
    "torchvision.resnet18": {"bn+relu": 9, "bn+add+relu": 8, "bn": 3},
    "torchvision.resnet50": {"bn+relu": 33, "bn+add+relu": 16, "bn": 4},
    "torchvision.densenet121": {"bn+relu": 121},
    "torchvision.mobilenet_v3_small": {"bn+hardswish": 18, "bn+add": 6, "bn+relu": 5, "bn": 5},
    "torchvision.regnet_y_400mf": {"bn+relu": 33, "bn+add+relu": 16, "bn": 4},
    "timm.resnet50": {"bn+relu": 33, "bn+add+relu": 16, "bn": 4},
    "timm.resnetv2_50": {"bn+relu": 49},  # batch norms with an activation of their own
}


def build(name):
    library, _, model = name.partition(".")
    if library == "timm":
        return pytest.importorskip("timm").create_model(model)
    return getattr(pytest.importorskip("torchvision").models, model)()


def patterns(model):
    sites = [site for site in gradfuse.fuse_report(model) if site.fused]
    return dict(Counter(site.pattern for site in sites if site.pattern.startswith("bn")))


def run(model, x, train):
    """The output, the gradients by name and the buffers."""
    model.train(train)
    for m in model.modules():
        if isinstance(m, nn.Dropout) or type(m).__name__ == "StochasticDepth":
            m.p = 0.0
    x = x.clone().requires_grad_()
    y = model(x)
    model.zero_grad()
    (y * torch.linspace(-1.0, 2.0, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), {**grads, "input": x.grad}, {n: b.clone() for n, b in model.named_buffers()}


def assert_same(model, fused, x, bound=1e-9):
    """Compares in float64, where only the order of additions makes a difference."""
    for train in (True, False):
        expected, found = run(copy.deepcopy(model), x, train), run(copy.deepcopy(fused), x, train)
        assert (found[0] - expected[0]).norm() <= bound * expected[0].norm()
        largest = max(g.norm().item() for g in expected[1].values())
        assert found[1].keys() == expected[1].keys()
        for name, g in expected[1].items():
            # The gradient of a bias before a batch norm is 0, except for rounding.
            assert (found[1][name] - g).norm() <= bound * (g.norm() + 1e-6 * largest), name
        for name, b in expected[2].items():
            torch.testing.assert_close(found[2][name], b, rtol=1e-9, atol=1e-12)


@waits
@pytest.mark.parametrize("name", ZOO)
def test_models_of_torchvision_and_timm(name):
    torch.manual_seed(0)
    model = build(name).double()
    fused = gradfuse.fuse(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    size = 64 if "densenet" in name else 40  # at 40, its pools leave two values per channel
    x = random(2, 3, size, size, dtype=torch.float64)
    assert_same(model, fused, x)
    fused(x)
    assert patterns(fused) == ZOO[name]
    plain = gradfuse.unfuse(fused)
    assert not any(type(m).__module__.startswith("gradfuse") for m in plain.modules())
    assert torch.equal(plain.eval()(x), model.eval()(x))


def added_in_place(a, b):
    a += b
    return a


class Spellings(nn.Module):
    """Every way to write an add and an activation."""

    ADDS = (
        lambda a, b: a + b,
        lambda a, b: b + a,
        torch.add,
        lambda a, b: a.add(b),
        lambda a, b: a.add_(b),
        added_in_place,
        lambda a, b: torch.add(a, b, alpha=1),
        lambda a, b: a + b[:1],
        lambda a, b: a + b[:, :, :1, 0, None],
    )
    ACTS = (
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (lambda z: F.relu(z, inplace=True), "relu"),
        (lambda z: z.relu_(), "relu"),
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (F.relu6, "relu6"),
        (nn.ReLU6(inplace=True), "relu6"),
        (nn.Hardtanh(0.0, 6.0), "relu6"),
        (nn.LeakyReLU(0.3), "leaky_relu"),
        (lambda z: F.leaky_relu(z, 0.2, True), "leaky_relu"),
        (F.silu, "silu"),
        (nn.SiLU(inplace=True), "silu"),
        (F.gelu, "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (F.hardswish, "hardswish"),
        (nn.Hardswish(inplace=True), "hardswish"),
        (torch.sigmoid, "sigmoid"),
        (nn.Sigmoid(), "sigmoid"),
        (lambda z: z.sigmoid_(), "sigmoid"),
        (lambda z: z.tanh(), "tanh"),
        (nn.Tanh(), "tanh"),
    )

    def __init__(self, add, act):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        nn.init.normal_(self.bn.weight)
        self.add, self.act = add, act

    def forward(self, x):
        z = self.bn(x)
        return self.act(z if self.add is None else self.add(z, x.sin()))


@waits
@pytest.mark.parametrize("act", range(len(Spellings.ACTS)))
@pytest.mark.parametrize("add", [None, *range(len(Spellings.ADDS))])
def test_spellings(add, act):
    function, name = Spellings.ACTS[act]
    model = Spellings(None if add is None else Spellings.ADDS[add], function).double()
    fused = gradfuse.fuse(model)
    x = random(4, 3, 5, 5, dtype=torch.float64)
    assert_same(model, fused, x)
    fused(x)
    expected = f"bn+{name}" if add is None else f"bn+add+{name}"
    assert [(s.path, s.pattern, s.fused) for s in gradfuse.fuse_report(fused)] == [
        ("bn", expected, True)
    ]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn(self.conv(x))
        out += x
        return self.relu(out)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, g):
        return g * 3


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, g):
        return g * 2


def hooked(y):
    y.register_hook(lambda g: g * 3)
    return y


def residual_written(s, x):
    r = x * 1.0
    out = s.bn(x) + r
    r.mul_(2.0)
    return out.relu() + r


def residual_written_in_a_view(s, x):
    r = x * 1.0
    out = s.bn(x) + r
    r[0].mul_(2.0)
    return out.relu() + r


def gradient_kept(s, x):
    y = s.bn(x)
    y.retain_grad() if y.requires_grad else None
    return y.relu() + y


def without_gradients(s, x):
    with torch.no_grad():
        y = s.bn(x)
    return y.relu() + x


def used_without_gradients(s, x):
    y = s.bn(x)
    with torch.no_grad():
        z = y.relu()
    return y + z


def out_of_the_block(s, x):
    y = s.bn(x)
    y += s.bn(x.cos())
    return y.relu()


def alias(s, x):
    y = s.bn(x)
    z = y
    y.relu_()
    return z * 2


def leaf(s, x):
    with torch.no_grad():
        y = s.bn(x)
    y.requires_grad_()
    z = y.relu()
    (g,) = torch.autograd.grad(z.sum(), y)
    return z.detach() + x + g


def seen_by_type(s, x):
    y = s.bn(x)
    return y.relu() * 2 if type(y) is torch.Tensor and torch.is_tensor(y) else y


def metadata(s, x):
    y = s.bn(x)
    n, c, *_ = y.shape
    strides = y.stride() == x.stride() and y.is_contiguous() and y.dtype is x.dtype
    return y.relu() * (n + c + y.dim() + y.numel()) if strides and len(y) == n else y


# Programs around a batch norm `s.bn`, each with what the report says of it.
PROGRAMS = {
    "bare": (lambda s, x: s.bn(x), "bn"),
    "fused and bare": (lambda s, x: (lambda y: y.relu() + y)(s.bn(x)), "bn+relu"),
    "bare and fused": (lambda s, x: (lambda y: y.cos() + y.relu())(s.bn(x)), "bn"),
    "fused twice": (lambda s, x: (lambda y: y.relu() + y.tanh())(s.bn(x)), "bn+tanh"),
    "sum used twice": (lambda s, x: (lambda y: y.relu() * y)(s.bn(x) + x), "bn+add"),
    "sum and bare": (lambda s, x: (lambda y: (y + x).relu() * y)(s.bn(x)), "bn"),
    "Function": (lambda s, x: Double.apply(s.bn(x)), "bn"),
    "Function and fused": (lambda s, x: (lambda y: Double.apply(y) + y.relu())(s.bn(x)), "bn"),
    "Function that returns its input": (lambda s, x: Identity.apply(s.bn(x)), "bn"),
    "Function that marks its input": (lambda s, x: Marked.apply(s.bn(x)), "bn"),
    "view": (lambda s, x: s.bn(x).view(-1).relu(), "bn"),
    "view written": (lambda s, x: (lambda y: y.view(-1).mul_(2).sum() + y)(s.bn(x)), "bn"),
    "mul_": (lambda s, x: s.bn(x).mul_(2).relu(), "bn"),
    "relu_, then written to": (lambda s, x: s.bn(x).tanh().mul(2), "bn+tanh"),
    "relu6, then written to": (lambda s, x: F.relu6(s.bn(x)).mul_(2), "bn+relu6"),
    "leaky_relu, then written to": (lambda s, x: F.leaky_relu(s.bn(x)).mul_(2), "bn+leaky_relu"),
    "cat": (lambda s, x: torch.cat([s.bn(x), x, s.bn(x)]), "bn"),
    "scaled add": (lambda s, x: torch.add(s.bn(x), x, alpha=2).relu(), "bn"),
    "added number": (lambda s, x: (s.bn(x) + 1.0).relu(), "bn"),
    "added to itself": (lambda s, x: (lambda y: y + y)(s.bn(x)).relu(), "bn"),
    "added to a smaller": (lambda s, x: (s.bn(x[:1]) + x).relu(), "bn"),
    "added into another": (lambda s, x: (x * 1.0).add_(s.bn(x)).relu(), "bn"),
    "two residuals": (lambda s, x: (s.bn(x) + x + x.cos()).relu(), "bn+add"),
    "residual of itself": (lambda s, x: (s.bn(x) + x).relu(), "bn+add+relu"),
    "residual written": (residual_written, "bn+add"),
    "residual written in a view": (residual_written_in_a_view, "bn+add"),
    "other hardtanh": (lambda s, x: F.hardtanh(s.bn(x), -1.0, 6.0), "bn"),
    "hook on the output": (lambda s, x: hooked(s.bn(x)).relu() if x.requires_grad else x, "bn"),
    "retain_grad": (gradient_kept, "bn"),
    "made without gradients": (without_gradients, "bn"),
    "used without gradients": (used_without_gradients, "bn"),
    "two that wait": (out_of_the_block, "bn+add+relu"),
    "alias": (alias, "bn+relu"),
    "leaf": (leaf, "bn"),
    "type": (seen_by_type, "bn+relu"),
    "metadata": (metadata, "bn+relu"),
    "data": (lambda s, x: s.bn(x).data.relu() + x, "bn"),
    "keyword": (lambda s, x: s.bn(input=x).relu(), "bn+relu"),
    "checkpoint of a use": (
        lambda s, x: checkpoint(lambda y: y.relu() * y, s.bn(x), use_reentrant=False),
        "bn",
    ),
    "reentrant checkpoint of a use": (
        lambda s, x: checkpoint(lambda y: y.relu() * y, s.bn(x), use_reentrant=True),
        "bn",
    ),
    "vmap": (lambda s, x: torch.func.vmap(lambda r: r.relu() * 2)(s.bn(x)), "bn+relu"),
}


def program(forward, dtype=torch.float64):
    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            nn.init.normal_(self.bn.weight)
            nn.init.normal_(self.bn.bias)

    Made.forward = forward
    torch.manual_seed(0)
    return Made().to(dtype)


@waits
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name):
    forward, pattern = PROGRAMS[name]
    model = program(forward)
    fused = gradfuse.fuse(model)
    x = random(4, 3, 5, 5, dtype=torch.float64)
    assert_same(model, fused, x, 1e-12)
    with torch.no_grad() if name != "leaf" else torch.enable_grad():
        expected, found = (copy.deepcopy(m).eval()(x) for m in (model, fused))
    torch.testing.assert_close(found, expected)
    fused(x.clone().requires_grad_())
    assert patterns(fused) == {pattern: 1}


EXITS = {
    "numpy": lambda y: torch.from_numpy(y.numpy()),
    "tolist": lambda y: torch.tensor(y.tolist(), dtype=y.dtype),
    "item": lambda y: torch.tensor(y[0, 0, 0, 0].item()),
    "pickle": lambda y: pickle.loads(pickle.dumps(y)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "dlpack": torch.from_dlpack,
    "storage": lambda y: torch.tensor([]).to(y.dtype).set_(y.untyped_storage(), 0, y.shape),
    "data_ptr": lambda y: y if y.data_ptr() else None,
    "print": lambda y: y if "0x" not in repr(y) else None,
    "share_memory": lambda y: y.share_memory_(),
    "set data": lambda y: torch.zeros_like(y).set_(y),
    "list": lambda y: torch.stack(list(y)),
    "to": lambda y: y.to(torch.float32).double(),
    "swap": lambda y: (lambda z: torch.utils.swap_tensors(y, z) or z)(torch.zeros_like(y)),
}


@waits
@pytest.mark.parametrize("name", EXITS)
def test_a_value_is_there_for_whoever_reads_memory(name):
    model = program(lambda s, x: s.bn(x))
    x = random(4, 3, 5, 5, dtype=torch.float64)
    expected = EXITS[name](copy.deepcopy(model)(x).detach())
    with torch.no_grad():
        found = EXITS[name](gradfuse.fuse(model)(x))
    if name == "to":
        torch.testing.assert_close(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Counted(nn.Conv2d):
    calls = 0

    def forward(self, x):
        Counted.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant):
    """torch's batch norm counts the batch of a recomputation once more; gradfuse's does not."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(Counted(3, 3, 1), Block(), nn.BatchNorm2d(3))
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            x = self.bn(x)
            return checkpoint(self.block, x, use_reentrant=reentrant).relu()

    model = Checkpointed().double()
    fused = gradfuse.fuse(model)
    x = random(4, 3, 5, 5, dtype=torch.float64)
    expected = run(copy.deepcopy(model), x, True)[:2]
    Counted.calls = 0
    found = run(copy.deepcopy(fused), x, True)[:2]
    assert Counted.calls == 2  # once more in the backward
    torch.testing.assert_close(found, expected)


@waits
def test_backward_of_an_output_that_nobody_used():
    """Its node is in the graph before its value is there."""
    model = program(lambda s, x: s.bn(x))
    x = random(4, 3, 5, 5, dtype=torch.float64).requires_grad_()
    g = random(4, 3, 5, 5, dtype=torch.float64, seed=1)
    found = []
    for m in (copy.deepcopy(model), gradfuse.fuse(model)):
        y = m(x)
        found.append(torch.autograd.grad(y, [x, *m.parameters()], g, create_graph=True))
        second = torch.autograd.grad(found[-1][0].square().sum(), [x, *m.parameters()][:2])
        found[-1] = [*found[-1], *second]
        y = m(x)
        torch.autograd.grad(y, x, g)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y, x, g)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@waits
def test_an_input_written_to_meanwhile():
    """Seen in time through the tensor itself and newer views; an older view raises."""
    model = program(lambda s, x: s.bn(x)).eval()
    fused = gradfuse.fuse(model)
    for write in (lambda x: x.mul_(2), lambda x: x[0].zero_(), lambda x: torch.cos(x, out=x)):
        x = random(4, 3, 5, 5, dtype=torch.float64)
        expected = model(x).relu().detach()
        with torch.no_grad():
            y = fused(x)
            write(x)
            torch.testing.assert_close(y.relu(), expected)
    x = random(4, 3, 5, 5, dtype=torch.float64)
    view = x[0]
    with torch.no_grad():
        y = fused(x)
        view.zero_()
        with pytest.raises(RuntimeError, match="input must not be written to before"):
            y.relu()


@waits
def test_a_parameter_written_to_or_replaced_meanwhile():
    changes = (
        lambda m: m.bn.weight.data.mul_(2),
        lambda m: torch.optim.SGD(m.parameters(), lr=1.0, foreach=True).step(),
        lambda m: gradfuse.optim.SGD(m.parameters(), lr=1.0).step(),
        lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
        lambda m: m.float(),
        lambda m: setattr(m.bn, "weight", nn.Parameter(torch.ones(3))),
        lambda m: setattr(m.bn, "running_mean", torch.ones(3)),
        lambda m: m.bn.reset_parameters(),
    )
    for change in changes:
        model = program(lambda s, x: s.bn(x))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        fused = gradfuse.fuse(copy.deepcopy(model))
        x = random(4, 3, 5, 5, dtype=torch.float64)
        found = []
        for m in (model, fused):
            with torch.no_grad():
                y = m(x)
                change(m)
                found.append((y.relu(), *(b.clone() for b in m.buffers())))
        torch.testing.assert_close(*found)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


@waits
@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda bn: parametrize.register_parametrization(bn, "weight", Doubled()), "bn+relu"),
        (lambda bn: prune.random_unstructured(bn, "weight", 1), "bn"),  # by a hook
    ],
    ids=["parametrized", "pruned"],
)
def test_weights_that_are_computed(change, pattern):
    """They are attributes, but no parameters of the module."""
    model = program(lambda s, x: s.bn(x).relu())
    fused = gradfuse.fuse(copy.deepcopy(model))
    for m in (model, fused):
        torch.manual_seed(0)
        change(m.bn)
    x = random(4, 3, 5, 5, dtype=torch.float64)
    found = [run(m, x, True) for m in (model, fused)]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    assert patterns(fused) == {pattern: 1}


@waits
@pytest.mark.parametrize("train", [True, False])
def test_inference_mode(train):
    model = program(lambda s, x: s.bn(x)).train(train)
    fused = gradfuse.fuse(copy.deepcopy(model))
    x = random(4, 3, 5, 5, dtype=torch.float64)
    found = []
    for m in (model, fused):
        with torch.inference_mode():
            y, z = m(x), m(x).relu_()
            r = x.clone()
            w = m(x) + r
            r.mul_(2)
        found.append((y.relu(), z, w + 1, *(b.clone() for b in m.buffers())))
        assert y.is_inference()
    torch.testing.assert_close(*found)


@waits
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """What was called under autocast is computed so."""
    model = Block()
    fused = gradfuse.fuse(copy.deepcopy(model))
    x, found = random(4, 3, 5, 5), []
    for m in (model, fused):
        with torch.autocast("cpu", dtype):
            inner = m.bn(m.conv(x))
            y = m(x)
        found.append((y, inner.relu()))
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)


@waits
def test_threads_share_an_output():
    fused = gradfuse.fuse(program(lambda s, x: s.bn(x)))
    x = random(4, 3, 5, 5, dtype=torch.float64)
    y = copy.deepcopy(fused)(x).detach()
    uses = (
        (lambda z: z.relu(), y.relu()),
        (lambda z: z + x, y + x),
        (lambda z: (z + x).relu(), (y + x).relu()),
        (lambda z: z.cos(), y.cos()),
        (lambda z: torch.from_numpy(z.detach().numpy()), y),
    )
    with ThreadPoolExecutor(8) as pool:
        for _ in range(100):
            z = fused(x)
            found = list(pool.map(lambda use, z=z: use[0](z), uses * 2))
            torch.testing.assert_close(found, [expected for _, expected in uses * 2])


def statistics(bn):
    return bn.running_mean.clone(), bn.running_var.clone(), bn.num_batches_tracked.clone()


@waits
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_in_the_order_of_the_calls(momentum):
    """Whoever reads them finds all calls counted, used or not, each once."""
    plain = nn.BatchNorm2d(3, momentum=momentum).double()
    fused = gradfuse.fuse(nn.BatchNorm2d(3, momentum=momentum).double())
    xs = [random(4, 3, 5, 5, dtype=torch.float64, seed=s) * (s + 1) + s for s in range(5)]
    readers = (
        lambda: statistics(fused),
        lambda: [b.clone() for b in fused.buffers()],
        lambda: [fused.state_dict()[n].clone() for n in ("running_mean", "running_var")],
        lambda: list(copy.deepcopy(fused).buffers()),
        lambda: list(pickle.loads(pickle.dumps(fused)).buffers()),
    )
    for x, read in zip(xs, readers, strict=True):
        plain(x)
        y = fused(x)
        for a, b in zip(read(), statistics(plain), strict=False):
            torch.testing.assert_close(a, b)
        y.relu(), y.relu(), y.sum()
    fused(xs[0])  # nobody keeps the output
    plain(xs[0])
    held = list(fused.__dict__["_buffers"].values())
    for a, b in zip(held, statistics(plain), strict=True):
        torch.testing.assert_close(a, b)
    y, z = fused(xs[1]), fused(xs[2])
    plain(xs[1]), plain(xs[2])
    z.relu(), y.relu()
    for a, b in zip(held, statistics(plain), strict=True):
        torch.testing.assert_close(a, b)
    fused.eval()
    y = fused(xs[3])
    torch.testing.assert_close(y.relu(), plain.eval()(xs[3]).relu())


def test_the_very_same_modules_parameters_and_buffers():
    model = nn.Sequential(Block(), Block())
    model.blocks_by_name = {"first": model[0]}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fused = gradfuse.fuse(model)
    assert [*map(id, fused.parameters())] == [*map(id, model.parameters())]
    assert [*map(id, fused.buffers())] == [*map(id, model.buffers())]
    assert type(model[0].bn) is nn.BatchNorm2d  # the given model is unchanged
    assert type(fused) is nn.Sequential
    assert isinstance(fused[0].bn, nn.BatchNorm2d)
    assert fused.blocks_by_name["first"] is fused[0] is not model[0]
    before = model[0].bn.weight.clone()
    fused(random(4, 3, 5, 5)).sum().backward()
    optimizer.step()
    assert not torch.equal(fused[0].bn.weight, before)
    model.load_state_dict(fused.state_dict())
    fused.load_state_dict(model.state_dict())

    bn = model[0].bn
    assert gradfuse.fuse(model, inplace=True) is model
    assert model[0].bn is bn
    assert type(bn) is not nn.BatchNorm2d
    assert gradfuse.fuse(gradfuse.fuse(model))[0].bn.weight is bn.weight
    assert gradfuse.unfuse(model, inplace=True) is model
    assert type(bn) is nn.BatchNorm2d
    assert vars(bn).keys() == vars(nn.BatchNorm2d(3)).keys()


def test_copies_and_pickles():
    fused = gradfuse.fuse(nn.Sequential(Block(), nn.Dropout(0.5)))
    fused.note = "kept"
    x = random(4, 3, 5, 5)
    fused(x)
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert again.note == "kept"
        assert again[1] is not fused[1]
        assert list(again.state_dict()) == list(fused.state_dict())
        assert torch.equal(again.eval()(x), fused.eval()(x))


@HOST_BACKENDS
def test_without_waiting(backend, monkeypatch):
    """GRADFUSE_DEFER=0, and no compiled module: the same values, computed at once."""
    monkeypatch.setenv("GRADFUSE_DEFER", "0")
    model = nn.Sequential(Block(), nn.BatchNorm2d(3)).double()
    fused = gradfuse.fuse(model)
    assert_same(model, fused, random(4, 3, 5, 5, dtype=torch.float64))
    fused(random(4, 3, 5, 5, dtype=torch.float64))
    assert patterns(fused) == {"bn": 2}


def hook(*_):
    return None


AT_ONCE = {
    "forward hook": lambda m: m.bn.register_forward_hook(hook),
    "pre-hook": lambda m: m.bn.register_forward_pre_hook(hook),
    "backward hook": lambda m: m.bn.register_full_backward_hook(hook),
    "global hook": lambda m: nn.modules.module.register_module_forward_hook(hook),
}


@waits
@pytest.mark.parametrize("name", AT_ONCE)
def test_hooks_see_values(name):
    fused = gradfuse.fuse(program(lambda s, x: s.bn(x).relu(), torch.float32))
    handle = AT_ONCE[name](fused)
    fused(random(4, 3, 5, 5))
    handle.remove()
    (site,) = gradfuse.fuse_report(fused)
    assert (site.pattern, site.reason) == ("bn", "the module has hooks")


@waits
def test_hooks_on_blocks_fire():
    seen = []
    fused = gradfuse.fuse(nn.Sequential(Block(), nn.Sequential(nn.BatchNorm2d(3))))
    for m in fused:
        m.register_forward_hook(lambda module, _, y: seen.append(y.mean().item()))
    fused(random(4, 3, 5, 5))
    assert len(seen) == 2
    assert patterns(fused) == {"bn+add+relu": 1, "bn": 1}


def test_attributes_set_later_count():
    fused = gradfuse.fuse(Block().double())
    x = random(4, 3, 5, 5, dtype=torch.float64)
    fused.relu = nn.Identity()
    expected = gradfuse.unfuse(fused)
    assert_same(expected, fused, x)
    fused.relu = nn.LeakyReLU(0.3)
    assert_same(gradfuse.unfuse(fused), fused, x)
    parts = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), nn.ReLU()).double()
    fused = gradfuse.fuse(parts)
    assert_same(parts[0], fused[0], x)
    assert_same(parts, nn.Sequential(*fused.children()), x)
    assert_same(parts[:1], fused[:1], x)


class Subclass(nn.BatchNorm2d):
    pass


def test_left_alone():
    own = nn.BatchNorm2d(3)
    own.forward = types.MethodType(lambda s, x: x, own)
    kinds = nn.ModuleList([Subclass(3), nn.SyncBatchNorm(3), own, nn.BatchNorm2d(3)])
    fused = gradfuse.fuse(kinds)
    report = gradfuse.fuse_report(fused)
    assert [s.fused for s in report] == [False, False, False, True]
    reasons = ("Subclass is not", "SyncBatchNorm is not", "set on the instance", "not called yet")
    for site, reason in zip(report, reasons, strict=True):
        assert reason in site.reason
        assert reason in str(report)


def test_wrapped_models():
    with pytest.raises(TypeError, match=r"fuse: model must be an nn\.Module, got int"):
        gradfuse.fuse(3)
    with pytest.raises(ValueError, match=r"not yet wrapped.* got DataParallel"):
        gradfuse.fuse(nn.DataParallel(Block()))
    with pytest.raises(ValueError, match="got OptimizedModule"):
        gradfuse.unfuse(torch.compile(Block()))
    wrapped = nn.DataParallel(Block())
    assert gradfuse.fuse(wrapped, inplace=True) is wrapped


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, torch.jit.script])
def test_conversions(convert):
    fused = gradfuse.fuse(Block())
    made = convert(fused)
    if convert is torch.jit.script:
        x = random(4, 3, 5, 5)
        torch.testing.assert_close(made(x), copy.deepcopy(fused)(x))
    else:
        assert type(made.bn) is nn.SyncBatchNorm


def test_graphs_stay_plain():
    """torch.fx, torch.jit.trace and torch.export record torch's own batch norm."""
    fused = gradfuse.fuse(Block().eval())
    x = random(4, 3, 5, 5)
    expected = fused(x)
    traced = torch.jit.trace(fused, x)
    assert "aten::batch_norm" in str(traced.inlined_graph)
    graph = torch.fx.symbolic_trace(fused)
    exported = torch.export.export(fused, (x,)).module()
    for other in (traced, graph, exported):
        torch.testing.assert_close(other(x), expected)


@pytest.mark.parametrize("train", [True, False])
def test_compiled_after_fuse(train):
    torch.compiler.reset()
    fused = gradfuse.fuse(nn.Sequential(Block(), Block())).train(train)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    x = random(4, 3, 5, 5)
    torch.testing.assert_close(compiled(x), fused(x))


@waits
def test_a_compiled_part_takes_an_output_that_waits():
    torch.compiler.reset()
    fused = gradfuse.fuse(program(lambda s, x: s.bn(x)))
    function = torch.compile(lambda y: y.cos() * 2, backend="aot_eager")
    for seed in range(3):
        x = random(4, 3, 5, 5, dtype=torch.float64, seed=seed).requires_grad_()
        y, z = fused(x), copy.deepcopy(fused)(x)
        torch.testing.assert_close(function(y), z.cos() * 2)


@waits
def test_memory_is_freed():
    fused = gradfuse.fuse(Block())
    x = random(4, 3, 5, 5)
    inner = []
    fused.conv.register_forward_hook(lambda _m, _i, y: inner.append(weakref.ref(y)))
    with torch.no_grad():
        y = fused.bn(fused.conv(x))
        assert inner[0]() is not None
        y.relu_()
        assert inner[0]() is None
        fused.last = y = fused.bn(fused.conv(x))
    del y, fused
    gc.collect()
    assert inner[1]() is None
