"""Graphs of torch.compile and torch.export, fused: which calls they hold, and that they mean the
same."""

import copy

import pytest
import torch
import torch._inductor
import torch.nn.functional as F
from helpers import bits, needs_compiler, random
from test_fuse import waits
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradfuse
from gradfuse._codes import Activation

OPS = (torch.ops.gradfuse.batch_norm_act, torch.ops.gradfuse.batch_norm_act.default)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()


class Model(nn.Module):
    """A function of (self, x, r), where self has batch norms and a few modules."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.bn, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 3, 1)
        for p, seed in zip(self.parameters(), range(10), strict=False):
            p.data = random(*p.shape, seed=seed)
        self.double()

    def forward(self, x, r):
        return self.function(self, x, r)


def add_(y, r):
    y += r
    return y


def in_place(f, y, *args):
    """y, after f has written it."""
    f(y, *args)
    return y


def after(y, _):
    """y, where the second argument is for its effect."""
    return y


def without_grad(s, x, r):
    with torch.no_grad():
        y = s.bn(x)
    return F.relu(y) + x


def of_op(s, x, r):
    results = torch.ops.gradfuse.batch_norm_act(
        x, None, s.bn.weight, s.bn.bias, s.bn.running_mean, s.bn.running_var, True, 0.1, 1e-5, 0,
        0.01, False, None,
    )  # fmt: skip
    return F.relu(results[0]) + results[3].sum()


def of_op_by_names(s, x, r):
    results = torch.ops.gradfuse.batch_norm_act(
        x, None, s.bn.weight, s.bn.bias, None, None, True, 0.1, 1e-5, 0, 0.01,
        wants_mask=False, factor=None,
    )  # fmt: skip
    return F.relu(results[0])


def written_view(s, x, r):
    x = x * 1
    view = x[0]
    return F.relu(after(s.bn(x), view.mul_(2)))


# name: the program, and the calls it becomes
PROGRAMS = {
    "relu": (lambda s, x, r: F.relu(s.bn(x)), "relu"),
    "relu of torch": (lambda s, x, r: torch.relu(s.bn(x)), "relu"),
    "relu, a method": (lambda s, x, r: s.bn(x).relu(), "relu"),
    "relu in place": (lambda s, x, r: F.relu(s.bn(x), inplace=True), "relu"),
    "relu in place, positional": (lambda s, x, r: F.relu(s.bn(x), True), "relu"),
    "relu in place, a method": (lambda s, x, r: s.bn(x).relu_(), "relu"),
    "relu whose result is not taken": (lambda s, x, r: in_place(torch.relu_, s.bn(x)), "relu"),
    "relu6": (lambda s, x, r: F.relu6(s.bn(x)), "relu6"),
    "hardtanh": (lambda s, x, r: nn.Hardtanh(0.0, 6.0)(s.bn(x)), "relu6"),
    "leaky_relu": (lambda s, x, r: F.leaky_relu(s.bn(x), 0.3), "leaky_relu"),
    "silu": (lambda s, x, r: F.silu(s.bn(x), inplace=True), "silu"),
    "gelu": (lambda s, x, r: F.gelu(s.bn(x)), "gelu"),
    "gelu of tanh": (lambda s, x, r: F.gelu(s.bn(x), approximate="tanh"), "gelu_tanh"),
    "hardswish": (lambda s, x, r: F.hardswish(s.bn(x)), "hardswish"),
    "sigmoid": (lambda s, x, r: torch.sigmoid(s.bn(x)), "sigmoid"),
    "tanh": (lambda s, x, r: s.bn(x).tanh(), "tanh"),
    "add": (lambda s, x, r: s.bn(x) + r, "add"),
    "add, then relu": (lambda s, x, r: F.relu(s.bn(x) + r), "add+relu"),
    "add on the left": (lambda s, x, r: F.relu(r + s.bn(x)), "add+relu"),
    "add in place": (lambda s, x, r: F.relu(add_(s.bn(x), r), inplace=True), "add+relu"),
    "add, a method": (lambda s, x, r: F.relu(s.bn(x).add(r)), "add+relu"),
    "add in place, a method": (lambda s, x, r: F.silu(s.bn(x).add_(r)), "add+silu"),
    "add of torch": (lambda s, x, r: F.relu(torch.add(s.bn(x), r, alpha=1)), "add+relu"),
    "add of a row": (lambda s, x, r: F.relu(s.bn(x) + r[:, :, :1]), "add+relu"),
    "add of the input": (lambda s, x, r: F.relu(s.bn(x) + x), "add+relu"),
    "two batch norms": (lambda s, x, r: F.relu(s.bn(x) + s.other(r)), "- add+relu"),
    "two calls": (lambda s, x, r: F.relu(s.bn(x)) + F.silu(s.bn(r)), "relu silu"),
    "a write of something else": (
        lambda s, x, r: F.relu(after(s.bn(x), (r * 1).mul_(2))),
        "relu",
    ),
    "a residual made later": (lambda s, x, r: F.relu(s.bn(x) + s.conv(r)), "add+relu"),
    "written after it": (lambda s, x, r: F.relu6(s.bn(x)).mul_(2), "relu6"),
    # computed in its own place, or with less
    "alone": (lambda s, x, r: s.bn(x), "-"),
    "used twice": (lambda s, x, r: F.relu(y := s.bn(x)) * y, "-"),
    "sum used twice": (lambda s, x, r: F.relu(y := s.bn(x) + r) * y, "add"),
    "sum in place, used twice": (lambda s, x, r: F.relu(y := add_(s.bn(x), r)) * y, "add"),
    "sum in place, used twice by its first name": (
        lambda s, x, r: F.relu((y := s.bn(x)).add_(r)) * y,
        "add",
    ),
    "add to one of another layout": (
        lambda s, x, r: F.relu(r.contiguous(memory_format=torch.channels_last) + s.bn(x)),
        "-",
    ),
    "its new statistics used": (of_op, "-"),
    "the op by names": (of_op_by_names, "relu"),
}  # fmt: skip


# torch's backward of these raises, whoever runs them.
FORWARD = (
    "input written between",
    "a view of it written between",
    "statistics written between",
)


def calls(graph_module):
    """What its batch norms became, in order."""
    found = []
    for module in graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            if node.target in OPS:
                name = Activation(node.args[9]).name.lower()
                parts = ["add"] * (node.args[1] is not None) + [name] * (name != "none")
                found.append("+".join(parts) or "-")
    return " ".join(found)


def outcome(module, given, name=""):
    """Output, gradients and buffers."""
    if name in FORWARD:
        with torch.no_grad():
            return [module(*(t.clone() for t in given)), *module.buffers()]
    tensors = [t.detach().clone().requires_grad_() for t in given]
    y = module(*tensors)
    if y.requires_grad:
        y.backward(random(*y.shape, dtype=y.dtype, seed=9))
    gradients = [t.grad for t in (*tensors, *module.parameters())]
    return [y.detach(), *gradients, *module.buffers()]


def inputs(n=4, dtype=torch.float64):
    return [random(n, 3, 4, 5, dtype=dtype, seed=seed) for seed in (n, n + 1)]


class Kept:
    """An inner backend that keeps the graphs it gets, and runs them as they are or compiled."""

    def __init__(self, then=None):
        self.graphs, self.options = [], None
        self.then = then and torch._dynamo.lookup_backend(then)

    def __call__(self, graph, given, **options):
        self.options = options
        self.graphs.append(copy.deepcopy(graph))
        return self.then(graph, given) if self.then else graph


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled(name, fused):
    program, expected = PROGRAMS[name]
    plain, inner = Model(program), Kept()
    model = copy.deepcopy(plain)
    if fused:
        gradfuse.fuse(model, inplace=True)
    compiled = torch.compile(model, fullgraph=True, backend=gradfuse.compile_backend(inner))
    for _ in range(2):  # the statistics of the first call are in the second's
        torch.testing.assert_close(*(outcome(m, inputs(), name) for m in (compiled, plain)))
    (graph,) = inner.graphs
    assert calls(graph) == expected


@pytest.mark.parametrize("name", PROGRAMS)
def test_exported(name):
    program, expected = PROGRAMS[name]
    plain = Model(program)
    graph = torch.export.export(copy.deepcopy(plain), tuple(inputs())).module()
    assert gradfuse.fuse_graph(graph) is graph
    torch.testing.assert_close(*(outcome(m, inputs(), name) for m in (graph, plain)))
    assert calls(graph) == expected


@pytest.mark.parametrize("norm", [F.batch_norm, F.instance_norm])
def test_statistics_of_eval_mode_are_read_before_they_are_updated(norm):
    """By operators whose schemas do not say that they write them."""
    flag = {"training" if norm is F.batch_norm else "use_input_stats": True}

    def program(s, x, r):
        mean, var = s.bn.running_mean, s.bn.running_var
        y = F.batch_norm(x, mean, var)
        z = norm(r, mean, var, **flag)
        return F.relu(y) + z

    plain, kept = Model(program), Kept()
    compiled = torch.compile(Model(program), backend=gradfuse.compile_backend(kept))
    exported = torch.export.export(Model(program), tuple(inputs())).module()
    expected = outcome(plain, inputs(), FORWARD[0])
    for run in (compiled, gradfuse.fuse_graph(exported)):
        torch.testing.assert_close(outcome(run, inputs(), FORWARD[0]), expected)
    add = " add" if norm is F.batch_norm else ""
    assert (calls(kept.graphs[0]), calls(exported)) == (add.strip(), "-" + add)


class Chain(nn.Module):
    """Some of the programs in a row."""

    NAMES = ("add in place", "relu6", "a residual made later", "used twice", "written after it")

    def __init__(self, names=NAMES):
        super().__init__()
        self.models = nn.ModuleList(Model(PROGRAMS[name][0]) for name in names)

    def forward(self, x, r):
        for model in self.models:
            x = x + model(x, r)
        return x


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_compiled_further(inner):
    """Forward and backward by another backend, with dynamic shapes: one graph for all batches."""
    plain, kept = Chain(Chain.NAMES[: 5 if inner == "aot_eager" else 1]), Kept(inner)
    fused = gradfuse.fuse(copy.deepcopy(plain))
    backend = gradfuse.compile_backend(kept)
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend=backend)
    counts = []
    for n in (6, 7, 8):  # no two sizes the same, or the graph would be for such only
        torch.testing.assert_close(*(outcome(m, inputs(n)) for m in (compiled, plain)))
        counts.append(len(kept.graphs))
    assert len(set(counts)) == 1
    assert "add+relu relu6 add+relu - relu6".startswith(calls(kept.graphs[-1]))


@waits
def test_bits_are_those_of_the_eager_model():
    plain = Chain().float()
    eager, model = (gradfuse.fuse(copy.deepcopy(plain)) for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend=gradfuse.compile_backend("aot_eager"))
    given = inputs(dtype=torch.float32)
    for _ in range(2):
        assert bits(compiled(*given)) == bits(eager(*given))
    assert bits([*model.buffers()]) == bits([*eager.buffers()])


def test_checkpoints_are_fused_within():
    plain = Model(lambda s, x, r: F.relu(s.bn(s.conv(x)) + r))
    model, kept = copy.deepcopy(plain), Kept("aot_eager")

    def run(x, r):
        return checkpoint(model, x, r, use_reentrant=False)

    compiled = torch.compile(run, fullgraph=True, backend=gradfuse.compile_backend(kept))
    x, r = inputs()
    torch.testing.assert_close(compiled(x, r), plain(x, r))
    torch.testing.assert_close(list(model.buffers()), list(plain.buffers()))
    assert calls(kept.graphs[0]) == "add+relu"


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_eval_mode_is_left_to_the_inner_backend(fused):
    plain, kept = Model(PROGRAMS["add, then relu"][0]).eval(), Kept()
    model = gradfuse.fuse(copy.deepcopy(plain)) if fused else copy.deepcopy(plain)
    compiled = torch.compile(model, fullgraph=True, backend=gradfuse.compile_backend(kept))
    torch.testing.assert_close(outcome(compiled, inputs()), outcome(plain, inputs()))
    assert calls(kept.graphs[0]) == ""


def test_exported_in_eval_mode():
    plain = Model(PROGRAMS["add, then relu"][0]).eval()
    graph = gradfuse.fuse_graph(torch.export.export(plain, tuple(inputs())).module())
    torch.testing.assert_close(outcome(graph, inputs()), outcome(plain, inputs()))
    assert calls(graph) == "add+relu"


def test_options_go_to_the_inner_backend():
    kept = Kept()
    backend = gradfuse.compile_backend(kept)
    assert gradfuse.compile_backend(kept) is backend
    model = Model(PROGRAMS["relu"][0])
    torch.compile(model, backend=backend, options={"size_asserts": False})(*inputs())
    assert kept.options == {"options": {"size_asserts": False}}


@pytest.mark.parametrize(
    "given", [{}, {"mode": "max-autotune-no-cudagraphs"}, {"options": {"size_asserts": False}}]
)
def test_the_name_stands_for_inductor(given, monkeypatch):
    assert "gradfuse" in torch._dynamo.list_backends(), "install gradfuse again: no entry point"
    seen = []
    monkeypatch.setattr(torch._inductor, "compile", lambda g, i, o: seen.append((calls(g), o)) or g)
    torch.compile(Model(PROGRAMS["relu"][0]), backend="gradfuse", **given)(*inputs())
    of_mode = torch._inductor.list_mode_options(given["mode"]) if "mode" in given else {}
    assert seen == [("relu", given.get("options", of_mode))]


def test_errors():
    model = Model(PROGRAMS["relu"][0])
    with pytest.raises(TypeError, match=r"fuse_graph: graph_module must be a torch.fx.Gr.*Model"):
        gradfuse.fuse_graph(model)
    with pytest.raises(ValueError, match=r"fuse_graph: graph_module must hold fake values"):
        gradfuse.fuse_graph(torch.fx.symbolic_trace(model))
    with pytest.raises(TypeError, match=r"compile_backend: inner must be a backend's name .* 3"):
        gradfuse.compile_backend(3)
    with pytest.raises(torch._dynamo.exc.InvalidBackend, match="nonsense"):
        gradfuse.compile_backend("nonsense")
