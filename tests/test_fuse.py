"""fuse and unfuse keep the function, parameters, keys and paths, and report every site."""

import copy
import functools
import pickle
import random as python_random
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import HOST_BACKENDS, random
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradfuse
from gradfuse.nn import BatchNormAct2d

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# name: (constructor, {pattern: fused sites}, batch norms left alone)
ZOO = {
    "torchvision.resnet18": ({"bn+relu": 9, "bn+add+relu": 8, "bn": 3}, 0),
    "torchvision.resnet50": ({"bn+relu": 33, "bn+add+relu": 16, "bn": 4}, 0),
    "torchvision.wide_resnet50_2": ({"bn+relu": 33, "bn+add+relu": 16, "bn": 4}, 0),
    "torchvision.resnext50_32x4d": ({"bn+relu": 33, "bn+add+relu": 16, "bn": 4}, 0),
    "torchvision.densenet121": ({"bn+relu": 121}, 0),
    "torchvision.mobilenet_v3_small": (
        {"bn+hardswish": 18, "bn+add": 6, "bn+relu": 5, "bn": 1},
        4,
    ),
    "torchvision.efficientnet_b0": ({"bn+silu": 33, "bn": 11}, 5),
    "torchvision.regnet_y_400mf": ({"bn+relu": 33, "bn+add+relu": 16, "bn": 4}, 0),
    "timm.resnet50": ({"bn+relu": 33, "bn+add+relu": 16, "bn": 4}, 0),
    "timm.resnetv2_50": ({"bn+relu": 49}, 0),
}


def build(name):
    library, _, model = name.partition(".")
    if library == "timm":
        return pytest.importorskip("timm").create_model(model)
    return getattr(pytest.importorskip("torchvision").models, model)()


def patterns(report):
    found = {}
    for site in report:
        if site.fused:
            found[site.pattern] = found.get(site.pattern, 0) + 1
    return found


def run(model, x, train):
    """The output, the gradients by name and the buffers."""
    model.train(train)
    for m in model.modules():
        if isinstance(m, nn.Dropout) or type(m).__name__ == "StochasticDepth":
            m.p = 0.0
    y = model(x)
    model.zero_grad()
    y.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), grads, {n: b.clone() for n, b in model.named_buffers()}


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


@pytest.mark.parametrize("name", ZOO)
def test_models_of_torchvision_and_timm(name):
    torch.manual_seed(0)
    model = build(name).double()
    fused = gradfuse.fuse(model)
    expected, left = ZOO[name]
    assert patterns(fused.report) == expected
    assert sum(not s.fused for s in fused.report) == left
    assert list(fused.state_dict()) == list(model.state_dict())
    if "wide" in name or "resnext" in name:  # resnet50's graph, with other numbers of channels
        return
    size = 64 if "densenet" in name else 40  # at 40, its pools leave two values per channel
    x = random(2, 3, size, size, dtype=torch.float64)
    assert_same(model, fused, x)
    plain = gradfuse.unfuse(fused)
    assert not any(type(m).__module__.startswith("gradfuse") for m in plain.modules())
    assert list(plain.state_dict()) == list(model.state_dict())
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
    )
    ACTS = (
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (lambda z: F.relu(z, inplace=True), "relu"),
        (lambda z: F.relu(z, True), "relu"),
        (lambda z: z.relu(), "relu"),
        (lambda z: z.relu_(), "relu"),
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (F.relu6, "relu6"),
        (nn.ReLU6(), "relu6"),
        (nn.LeakyReLU(0.3), "leaky_relu"),
        (lambda z: F.leaky_relu(z, 0.2), "leaky_relu"),
        (lambda z: F.leaky_relu(z, negative_slope=0.1, inplace=True), "leaky_relu"),
        (F.silu, "silu"),
        (nn.SiLU(), "silu"),
        (F.gelu, "gelu"),
        (lambda z: F.gelu(z, approximate="tanh"), "gelu_tanh"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (F.hardswish, "hardswish"),
        (nn.Hardswish(), "hardswish"),
        (torch.sigmoid, "sigmoid"),
        (nn.Sigmoid(), "sigmoid"),
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


@pytest.mark.parametrize("act", range(len(Spellings.ACTS)))
@pytest.mark.parametrize("add", [None, *range(len(Spellings.ADDS))])
def test_spellings(add, act):
    function, name = Spellings.ACTS[act]
    model = Spellings(None if add is None else Spellings.ADDS[add], function).double()
    fused = gradfuse.fuse(model)
    expected = f"bn+{name}" if add is None else f"bn+add+{name}"
    assert [(s.path, s.pattern, s.fused) for s in fused.report] == [("bn", expected, True)]
    x = random(4, 3, 5, 5, dtype=torch.float64)
    assert_same(model, fused, x)
    assert_same(model, gradfuse.unfuse(fused), x)


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


class Untraceable(nn.Module):
    """Its forward reads a tensor's value, which cannot be traced; its blocks can be traced."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.first(x)
        if x.sum() > 0:
            x = self.second(x)
        return self.norm(x)


@HOST_BACKENDS
def test_the_children_of_a_model_that_cannot_be_traced(backend):
    torch.manual_seed(0)
    model = Untraceable().double()
    fused = gradfuse.fuse(model)
    assert type(fused) is Untraceable
    assert patterns(fused.report) == {"bn+add+relu": 2, "bn": 1}
    x = random(4, 3, 5, 5, dtype=torch.float64)
    assert_same(model, fused, x)
    assert_same(model, gradfuse.unfuse(fused), x)


def test_the_very_same_parameters_and_buffers():
    model = nn.Sequential(Block(), Block())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fused = gradfuse.fuse(model)
    assert [*map(id, fused.parameters())] == [*map(id, model.parameters())]
    assert [*map(id, fused.buffers())] == [*map(id, model.buffers())]
    assert type(model[0].bn) is nn.BatchNorm2d  # the given model is unchanged
    assert type(model) is nn.Sequential
    assert isinstance(fused.get_submodule("0.bn"), BatchNormAct2d)
    before = model[0].bn.weight.clone()
    fused(random(4, 3, 5, 5)).sum().backward()
    optimizer.step()
    assert not torch.equal(fused.get_submodule("0.bn").weight, before)
    model.load_state_dict(fused.state_dict())
    fused.load_state_dict(model.state_dict())


def test_copies_and_pickles():
    fused = gradfuse.fuse(nn.Sequential(Block(), nn.Dropout(0.5)))
    fused.note = "kept"
    x = random(4, 3, 5, 5)
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert again.note == "kept"
        assert again.report == fused.report
        assert list(again.state_dict()) == list(fused.state_dict())
        assert torch.equal(again.eval()(x), fused.eval()(x))
        assert again[1] is not fused[1] if hasattr(again, "__getitem__") else True


class WithDropout(Block):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


def test_training_flags_are_not_baked_in():
    model = nn.Sequential(Block(), nn.Dropout(0.5), WithDropout())
    fused = gradfuse.fuse(model)
    x = random(8, 3, 5, 5)
    fused.eval()
    assert torch.equal(fused(x), fused(x))
    fused.train()
    assert not torch.equal(fused(x), fused(x))
    assert [s.pattern for s in fused.report] == ["bn+add+relu", "bn"]
    assert "could not be traced" in fused.report[1].reason


def lambda_module(forward, **children):
    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            for name, child in children.items():
                setattr(self, name, child)

    Made.forward = forward
    return Made()


def with_hook(module):
    module.register_forward_hook(lambda *_: None)
    return module


class Subclass(nn.BatchNorm2d):
    pass


def other_add(self, x):
    x = x * 1.0
    x += self.bn(x)
    return x


REFUSED = {
    "shared": (
        lambda: (lambda bn: nn.Sequential(bn, nn.ReLU(), bn))(nn.BatchNorm2d(3)),
        "shared by several paths",
    ),
    "called twice": (
        lambda: lambda_module(lambda s, x: s.bn(s.bn(x)), bn=nn.BatchNorm2d(3)),
        "called more than once",
    ),
    "used twice": (
        lambda: lambda_module(lambda s, x: (lambda y: y.relu() + y)(s.bn(x)), bn=nn.BatchNorm2d(3)),
        "used more than once",
    ),
    "hooks": (lambda: nn.Sequential(with_hook(nn.BatchNorm2d(3)), nn.ReLU()), "hooks"),
    "subclass": (lambda: nn.Sequential(Subclass(3), nn.ReLU()), "Subclass is not a batch norm"),
    "sync": (lambda: nn.Sequential(nn.SyncBatchNorm(3)), "SyncBatchNorm is not a batch norm"),
    "unused": (lambda: lambda_module(lambda s, x: x, bn=nn.BatchNorm2d(3)), "does not call it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, reason = REFUSED[name]
    model = make()
    fused = gradfuse.fuse(model)
    assert len(fused.report) == 1
    assert not fused.report[0].fused
    assert reason in fused.report[0].reason
    assert not any(isinstance(m, BatchNormAct2d) for m in fused.modules())
    assert reason in str(fused.report)


PARTS = {
    "scaled add": (lambda s, x: torch.add(s.bn(x), x, alpha=2).relu(), "bn", "scaled"),
    "added number": (lambda s, x: (s.bn(x) + 1.0).relu(), "bn", "no other tensor"),
    "added to itself": (lambda s, x: (lambda y: y + y)(s.bn(x)).relu(), "bn", "no other tensor"),
    "added into another": (other_add, "bn", "writes to the tensor"),
    "hooked activation": (lambda s, x: s.act(s.bn(x)), "bn", ""),
    "sum used twice": (lambda s, x: (lambda y: y.relu() * y)(s.bn(x) + x), "bn+add", ""),
}


@pytest.mark.parametrize("name", PARTS)
def test_as_much_as_is_right(name):
    forward, pattern, reason = PARTS[name]
    model = lambda_module(forward, bn=nn.BatchNorm2d(3), act=with_hook(nn.ReLU())).double()
    fused = gradfuse.fuse(model)
    assert [(s.pattern, s.fused) for s in fused.report] == [(pattern, True)]
    assert reason in fused.report[0].reason
    x = random(4, 3, 5, 5, dtype=torch.float64)
    for train in (True, False):
        torch.testing.assert_close(fused.train(train)(x), model.train(train)(x))


def test_an_in_place_add_is_seen_by_other_names():
    """torch.fx alone would record x += y as an out-of-place add."""

    def forward(self, x):
        x = x * 1.0
        other = x
        x += self.bn(x)
        return x + other

    model = lambda_module(forward, bn=nn.BatchNorm2d(3)).double()
    x = random(4, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(gradfuse.fuse(model)(x), copy.deepcopy(model)(x))


def residual_written(self, x):
    r = x * 1.0
    out = self.bn(x) + r
    r.mul_(2.0)
    return out.relu() + r


def without_gradients(self, x):
    with torch.no_grad():
        x = self.conv(x)
    return self.bn(x).relu()


def raised_in_place(self, x):
    x = x * 1.0
    other = x
    x **= 2
    return (self.bn(x) + other).relu()


class Frozen(Block):
    def train(self, mode=True):
        super().train(mode)
        self.bn.eval()
        return self


def from_forward(forward):
    conv = nn.Conv2d(3, 3, 1)
    return lambda: lambda_module(forward, bn=nn.BatchNorm2d(3), conv=conv)


DIFFICULT = {
    "a residual written to before the activation": (from_forward(residual_written), "bn+add"),
    "no_grad around a part": (from_forward(without_gradients), "bn"),
    "any in-place operator": (from_forward(raised_in_place), "bn+add+relu"),
    "an own train()": (Frozen, "bn"),
    "a hook on a block": (lambda: nn.Sequential(with_hook(Block())), "bn+add+relu"),
    "a size added": (from_forward(lambda s, x: (s.bn(x) + x.shape[0] * 2).relu()), "bn"),
    "relu6, then written to": (from_forward(lambda s, x: F.relu6(s.bn(x)).mul_(2)), "bn+relu6"),
    "leaky_relu, then written to": (
        from_forward(lambda s, x: F.leaky_relu(s.bn(x)).mul_(2)),
        "bn+leaky_relu",
    ),
}


@pytest.mark.parametrize("name", DIFFICULT)
def test_what_a_graph_alone_would_get_wrong(name):
    make, pattern = DIFFICULT[name]
    torch.manual_seed(0)
    model = make().double()
    fused = gradfuse.fuse(model)
    assert [(s.pattern, s.fused) for s in fused.report] == [(pattern, True)]
    x = random(4, 3, 5, 5, dtype=torch.float64)
    assert_same(model, fused, x)
    assert_same(model, gradfuse.unfuse(fused), x)


def test_a_part_called_by_itself():
    """The batch norm of a fused part adds and activates; the part's forward would do so again."""
    model = nn.Sequential(Block(), Block())
    fused = gradfuse.fuse(model)
    x = random(4, 3, 5, 5)
    with pytest.raises(RuntimeError, match="Block: expected a call of the fused model as a whole"):
        nn.Sequential(*fused.children())(x)
    plain = gradfuse.unfuse(fused)
    assert torch.equal(nn.Sequential(*plain.eval().children())(x), model.eval()(x))


DRAWS = {
    "random": python_random.random,
    "numpy": np.random.rand,
    "torch": lambda: torch.rand(1).item(),
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_draws_are_not_baked_in(name):
    """The block that draws stays a module; the code around it is still fused."""

    class Drawing(Block):
        def forward(self, x):
            return super().forward(x) * DRAWS[name]()

    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), Drawing())
    states = python_random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    fused = gradfuse.fuse(model).eval()
    assert states[:2] == (python_random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())
    assert [s.pattern for s in fused.report] == ["bn+relu", "bn"]
    assert "could not be traced: the forward draws random numbers" in fused.report[1].reason
    x = random(4, 3, 5, 5)
    assert not torch.equal(fused(x), fused(x))


def if_given(self, x, skip=None):
    y = self.bn(x)
    if skip is not None:
        y = y * skip
    return y.relu()


def both_given(self, x, skip=None, other=None):
    y = self.bn(x).relu()
    return y if skip is None and other is None else y * 2.0


def keywords(self, x, **kwargs):
    skip = kwargs.get("skip")
    return self.bn(x).relu() if skip is None else self.bn(x) * skip


def given_or_not(self, x, skip):
    return self.bn(x).relu() * (2.0 if skip is None else skip)


OPTIONAL = {"one": if_given, "two": both_given, "keywords": keywords, "required": given_or_not}


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_arguments(name):
    """A tracing proxy is not None, so a graph alone is right only for calls that give them."""
    model = lambda_module(OPTIONAL[name], bn=nn.BatchNorm2d(3))
    fused = gradfuse.fuse(model)
    assert [s.pattern for s in fused.report] == ["bn"]
    assert "is given" in fused.report[0].reason
    x = random(4, 3, 5, 5)
    for skip in (None, x.cos()):
        torch.testing.assert_close(fused(x, skip=skip), copy.deepcopy(model)(x, skip=skip))


def test_optional_arguments_that_are_handed_on():
    """If they are only passed on, None works like a tensor, also after unfuse."""

    def forward(self, x, skip=None):
        return self.act(self.norm(x, skip))

    model = lambda_module(forward, norm=BatchNormAct2d(3), act=nn.Tanh())
    for other in (gradfuse.fuse(model), gradfuse.unfuse(model)):
        x = random(4, 3, 5, 5)
        for skip in ((), (None,), (x.cos(),)):
            expected = copy.deepcopy(model)(x, *skip)
            torch.testing.assert_close(copy.deepcopy(other)(x, *skip), expected)

    def added(self, x, skip=None):
        return (self.bn(x) + skip).relu()

    fused = gradfuse.fuse(lambda_module(added, bn=nn.BatchNorm2d(3)))
    assert [s.pattern for s in fused.report] == ["bn+add+relu"]


class Counted(nn.Conv2d):
    calls = 0

    def forward(self, x):
        Counted.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_stay(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()
            self.block.conv = Counted(3, 3, 1)

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=reentrant)

    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), Checkpointed()).double()
    fused = gradfuse.fuse(model)
    assert [s.pattern for s in fused.report] == ["bn+relu", "bn+add+relu"]
    x = random(4, 3, 5, 5, dtype=torch.float64)
    for other in (fused, gradfuse.unfuse(fused)):
        Counted.calls = 0
        found = run(other, x, True)[:2]
        assert Counted.calls == 2  # once more in the backward
        torch.testing.assert_close(found, run(copy.deepcopy(model), x, True)[:2])


@pytest.mark.parametrize("make", [lambda blocks: nn.Sequential(*blocks), nn.ModuleList])
def test_blocks_that_are_iterated(make):
    """The forward that iterates them cannot be traced. Each block is fused by itself, and what is
    not fused reports the forward's reason."""

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if x.sum() > 0 else x.cos()
        return x

    layers = [Block(), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), Block()]
    layers += [nn.BatchNorm2d(3)] if make is nn.ModuleList else []
    model = lambda_module(forward, layers=make(layers)).double()
    fused = gradfuse.fuse(model)
    assert [s.pattern for s in fused.report][:3] == ["bn+add+relu", "bn+relu", "bn+add+relu"]
    assert all("control flow" in s.reason for s in fused.report[3:])
    x = random(4, 3, 5, 5, dtype=torch.float64)
    assert_same(model, fused, x)
    assert_same(model, gradfuse.unfuse(fused), x)


def test_forwards_of_instances():
    """A bound method is bound to the new model, whose batch norm it calls. Others are refused."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), Block())
    model[2].forward = types.MethodType(lambda s, x: s.bn(x).relu() * 2.0, model[2])
    fused = gradfuse.fuse(model)
    assert [s.pattern for s in fused.report] == ["bn+relu", "bn"]
    assert fused.report[1].reason.endswith("its forward was set on the instance")
    x = random(4, 3, 5, 5)
    torch.testing.assert_close(fused(x), copy.deepcopy(model)(x))
    torch.testing.assert_close(fused.eval()(x), gradfuse.unfuse(fused)(x))
    assert model.training

    norm = nn.BatchNorm2d(3)
    norm.forward = types.MethodType(lambda s, x: x, norm)
    site = gradfuse.fuse(nn.Sequential(norm, nn.ReLU())).report[0]
    assert (site.fused, site.reason) == (False, "its forward was set on the instance")

    act = nn.ReLU()
    act.forward = types.MethodType(lambda s, x: x.cos(), act)
    model = nn.Sequential(nn.BatchNorm2d(3), act)
    torch.testing.assert_close(gradfuse.fuse(model)(x), copy.deepcopy(model)(x))

    model[0].forward = functools.partial(nn.BatchNorm2d.forward, model[0])
    with pytest.raises(ValueError, match=r"fuse: expected .* got partial at 0\.forward"):
        gradfuse.fuse(model)


def test_calls_by_keyword():
    model = lambda_module(lambda s, x: s.bn(input=x).relu(), bn=nn.BatchNorm2d(3)).double()
    fused = gradfuse.fuse(model)
    assert [(s.pattern, s.fused) for s in fused.report] == [("bn+relu", True)]
    x = random(4, 3, 5, 5, dtype=torch.float64)
    assert_same(model, fused, x)

    model = lambda_module(
        lambda s, x: s.norm(residual=x.sin(), input=x), norm=BatchNormAct2d(3)
    ).double()
    assert_same(model, gradfuse.unfuse(model), x)


def test_a_quantised_batch_norm_is_refused():
    site = gradfuse.fuse(nn.Sequential(torch.ao.nn.quantized.BatchNorm2d(3))).report[0]
    assert not site.fused
    assert "BatchNorm2d is not a batch norm known" in site.reason


def test_other_dimensions():
    mlp = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU()).double()
    volume = nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.GELU()).double()
    for model, shape in ((mlp, (6, 3)), (volume, (2, 3, 3, 4, 5))):
        assert all(s.fused for s in gradfuse.fuse(model).report)
        assert_same(model, gradfuse.fuse(model), random(*shape, dtype=torch.float64))


def test_compiled_after_fuse():
    torch.compiler.reset()
    fused = gradfuse.fuse(nn.Sequential(Block(), Block()))
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    x = random(4, 3, 5, 5)
    torch.testing.assert_close(compiled(x), fused(x))


def test_wrapped_models_are_refused():
    with pytest.raises(TypeError, match=r"fuse: model must be an nn\.Module, got int"):
        gradfuse.fuse(3)
    with pytest.raises(ValueError, match=r"not yet wrapped.* got DataParallel"):
        gradfuse.fuse(nn.DataParallel(Block()))
    with pytest.raises(ValueError, match="got OptimizedModule"):
        gradfuse.unfuse(torch.compile(Block()))


def test_fusing_twice_changes_nothing_more():
    once = gradfuse.fuse(nn.Sequential(Block()))
    twice = gradfuse.fuse(once)
    assert [s.reason for s in twice.report] == ["it is fused already"]
