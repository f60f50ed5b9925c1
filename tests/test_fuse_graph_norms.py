"""Graphs of torch.compile and torch.export: which norms take up their sums, and that they mean the
same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import needs_compiler, random
from test_fuse_graph import Kept
from torch import nn

import gradfuse
from gradfuse._codes import RowNorm

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
OPS = (torch.ops.gradfuse.row_norm, torch.ops.gradfuse.row_norm.default)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()


class Model(nn.Module):
    """A function of (self, x, r), where self has norms and a few modules."""

    def __init__(self, function, p=0.0):
        super().__init__()
        self.function = function
        self.norm, self.rms = nn.LayerNorm(8), nn.RMSNorm(8)
        self.drop, self.linear = nn.Dropout(p), nn.Linear(8, 8)
        for parameter, seed in zip(self.parameters(), range(10), strict=False):
            parameter.data = random(*parameter.shape, seed=seed)
        self.double()

    def forward(self, x, r):
        return self.function(self, x, r)


def written(y, t):
    t.mul_(2)
    return y


def in_place(x, r):
    x += r
    return x


def drawn(x):
    return torch.empty(x.shape[0], 1, 1, dtype=x.dtype).bernoulli_(0.6)


def in_place_scaled(mask, scale):
    mask.mul_(scale)
    return mask


def dropped_path(x):
    keep = torch.empty(x.shape[0], 1, 1, dtype=x.dtype).bernoulli_(0.6)
    return x * keep.div_(0.6)


# name: the program, and what its norms become
PROGRAMS = {
    "sum": (lambda s, x, r: s.norm(x + r), "add+ln"),
    "torch.add": (lambda s, x, r: s.norm(torch.add(x, r)), "add+ln"),
    "method": (lambda s, x, r: s.norm(x.add(r)), "add+ln"),
    "rms": (lambda s, x, r: s.rms(x + s.linear(r)), "add+rms"),
    "without parameters": (lambda s, x, r: F.layer_norm(x + r, (8,)), "add+ln"),
    "two dimensions": (lambda s, x, r: F.layer_norm(x + r, (5, 8), eps=0.1), "add+ln"),
    "eps of the dtype": (lambda s, x, r: F.rms_norm(x + r, (8,)), "add+rms"),
    "used after": (lambda s, x, r: s.norm(y := x + r) * y, "add+ln"),
    "in turn": (lambda s, x, r: s.rms((y := x + r) + s.linear(s.norm(y))), "add+ln add+rms"),
    "added to itself": (lambda s, x, r: s.norm(x + x), "add+ln"),
    "a write of something else": (
        lambda s, x, r: s.norm(written(x + r, x * 1)), "add+ln",
    ),
    "a dropout that drops nothing": (lambda s, x, r: s.norm(x + s.drop(r)), "add+ln"),
    "a dropped path": (lambda s, x, r: s.norm(x + dropped_path(r)), "path+add+ln"),
    "a dropped path first": (lambda s, x, r: s.rms(dropped_path(r) + x), "path+add+rms"),
    # left as they are
    "alone": (lambda s, x, r: s.norm(x), ""),
    "used before": (lambda s, x, r: (y := x + r).sin() + s.norm(y), ""),
    "normalised twice": (lambda s, x, r: s.norm(y := x + r) + s.rms(y), "add+ln"),
    "scaled": (lambda s, x, r: s.norm(torch.add(x, r, alpha=2)), ""),
    "number": (lambda s, x, r: s.norm(x + 1.0), ""),
    "broadcast": (lambda s, x, r: s.norm(x + r[:1]), ""),
    "another dtype": (lambda s, x, r: s.norm(x + r.float()), ""),
    "in place": (lambda s, x, r: s.norm(in_place(x * 1, r)), ""),
    "written between": (lambda s, x, r: s.norm(written(x * 1 + r, r * 1)) + r, "add+ln"),
    "addend written between": (
        lambda s, x, r: (lambda z: s.norm(written(z + r, z)))(x * 1), "",
    ),
    "sum written between": (lambda s, x, r: s.norm(written(y := x + r, y)), ""),
    "transposed": (lambda s, x, r: s.norm(x.mT.contiguous().mT + r.mT.contiguous().mT), ""),
    "a product that needs its gradient": (
        lambda s, x, r: s.norm(x + r * s.linear.bias[:4, None, None]), "add+ln",
    ),
    "a path that learns its scale": (
        lambda s, x, r: s.norm(x + r * drawn(r).div(s.linear.bias[0])), "add+ln",
    ),
    "a path scaled in place": (
        lambda s, x, r: s.norm(x + r * in_place_scaled(drawn(r), s.linear.bias[0] * 1)), "add+ln",
    ),
    "a product used twice": (
        lambda s, x, r: (lambda d: s.norm(x + d) + d)(dropped_path(r)), "add+ln",
    ),
}  # fmt: skip


def norms(graph_module):
    """What its norms became, in order."""
    found = []
    for node in graph_module.graph.nodes:
        if node.target not in OPS or node.args[0] == RowNorm.DROPOUT_ADD or node.args[2] is None:
            continue
        parts = ["path"] * (node.args[5] is not None) + ["dropout"] * (node.args[6] is not None)
        label = "ln" if node.args[0] == RowNorm.ADD_LAYER_NORM else "rms"
        found.append("+".join([*parts, "add", label]))
    return " ".join(found)


def outcome(module, given):
    """Output and gradients."""
    torch.manual_seed(1)
    tensors = [t.detach().clone().requires_grad_() for t in given]
    y = module(*tensors)
    y.backward(random(*y.shape, dtype=y.dtype, seed=9))
    return [y.detach(), *(t.grad for t in (*tensors, *module.parameters()))]


def inputs(dtype=torch.float64):
    return [random(4, 5, 8, dtype=dtype, seed=seed) for seed in (4, 5)]


def compiled(model, inner):
    return torch.compile(model, fullgraph=True, backend=gradfuse.compile_backend(inner))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled(name, fused):
    program, expected = PROGRAMS[name]
    plain, inner = Model(program), Kept()
    model = copy.deepcopy(plain)
    if fused:
        gradfuse.fuse(model, inplace=True)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if name == "another dtype" else {}
    torch.testing.assert_close(
        *(outcome(m, inputs()) for m in (compiled(model, inner), plain)), **tolerance
    )
    (graph,) = inner.graphs
    assert norms(graph) == expected


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", PROGRAMS)
def test_exported(name, train):
    program, expected = PROGRAMS[name]
    plain = Model(program).train(train)
    graph = torch.export.export(copy.deepcopy(plain), tuple(inputs())).module()
    assert gradfuse.fuse_graph(graph) is graph
    torch.testing.assert_close(*(outcome(m, inputs()) for m in (graph, plain)))
    assert norms(graph) == expected


# With dropouts, whose random numbers are gradfuse's where the norm takes them.
DROPOUTS = {
    "dropout": (lambda s, x, r: s.norm(x + s.drop(s.linear(r))), "dropout+add+ln"),
    "on the left": (lambda s, x, r: s.rms(s.drop(r) + x), "dropout+add+rms"),
    "path of it": (lambda s, x, r: s.norm(x + dropped_path(s.drop(r))), "path+dropout+add+ln"),
    "used twice": (lambda s, x, r: s.norm(x + (d := s.drop(r))) + d, "add+ln"),
    "of two": (lambda s, x, r: s.norm(s.drop(x) + s.drop(r)), "dropout+add+ln"),
    "not normalised": (lambda s, x, r: x + s.drop(r), ""),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropouts(name):
    program, expected = DROPOUTS[name]
    fused, inner = gradfuse.fuse(Model(program, 0.3)), Kept()
    found = outcome(compiled(fused, inner), inputs())
    assert norms(inner.graphs[0]) == expected
    if "path" not in name:  # which is drawn before the seed in one and after it in the other
        torch.testing.assert_close(found, outcome(fused, inputs()))


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropouts_of_plain_models(name):
    program, expected = DROPOUTS[name]
    plain, inner = Model(program, 0.3), Kept()
    outcome(compiled(plain, inner), inputs())
    assert norms(inner.graphs[0]) == expected
    graph = torch.export.export(plain, tuple(inputs())).module()
    gradfuse.fuse_graph(graph)
    assert norms(graph) == expected
    if name in ("dropout", "on the left"):  # where the norm takes all of the program's dropouts
        torch.testing.assert_close(
            outcome(graph, inputs()), outcome(gradfuse.fuse(plain), inputs())
        )


@needs_compiler
def test_inductor():
    model = Model(PROGRAMS["in turn"][0]).float()
    given = inputs(torch.float32)
    found = outcome(torch.compile(model, backend="gradfuse", fullgraph=True), given)
    torch.testing.assert_close(found, outcome(model, given), rtol=1e-4, atol=1e-4)
