"""fuse keeps the program around layer norms, RMS norms and dropouts, and says what it did."""

import copy
import gc
import importlib
import pickle
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers import random
from test_fuse import Double, nothing_waits_for_ever, waits  # noqa: F401
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import gradfuse
from gradfuse import _native

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
swapped = importlib.import_module("gradfuse.fuse.swapped")


@pytest.fixture(autouse=True)
def small_tensors_wait(monkeypatch):
    monkeypatch.setattr(swapped, "LEAST_BYTES", 0)
    monkeypatch.setattr(swapped, "LEAST_BYTES_OF_SUM", 0)


# ---- models of the libraries ----

TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "vocab_size": 99, "max_position_embeddings": 64,
}  # fmt: skip


def of_transformers(name, **options):
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, name)
    return cls(cls.config_class(**options)), torch.randint(0, 99, (2, 11))


def llama_like(name, **options):
    return of_transformers(f"{name}ForCausalLM", **TINY, num_key_value_heads=2, **options)


def gpt2(p):
    return of_transformers(
        "GPT2LMHeadModel", n_layer=2, n_embd=32, n_head=4, vocab_size=99, n_positions=64,
        resid_pdrop=p, attn_pdrop=0.0, embd_pdrop=p,
    )  # fmt: skip


def bert(p):
    drops = {"hidden_dropout_prob": p, "attention_probs_dropout_prob": 0.0}
    return of_transformers("BertForMaskedLM", **TINY, **drops)


def t5(p):
    return of_transformers(
        "T5EncoderModel", d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99,
        dropout_rate=p,
    )  # fmt: skip


def encoder(p, norm_first):
    layer = nn.TransformerEncoderLayer(32, 4, 64, p, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), random(2, 11, 32)


def vit(p):
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=3, drop_path_rate=p, num_classes=10
    )
    return model, random(2, 3, 32, 32)


def swin(p):
    models = pytest.importorskip("torchvision").models
    sizes = ([4, 4], 24, [1, 1], [2, 2], [4, 4])
    return models.SwinTransformer(*sizes, stochastic_depth_prob=p, num_classes=10), random(
        2, 3, 64, 64
    )


# name: the model and an input, whether it computes in float32 by itself, what its norms become.
# The input of the first norm is no sum; those of the others are.
PRENORM = {"ln": 1, "add+ln": 4}
ZOO = {
    "Llama": (lambda: llama_like("Llama"), True, {"rms": 1, "add+rms": 4}),
    "Mistral": (lambda: llama_like("Mistral"), True, {"rms": 1, "add+rms": 4}),
    "Qwen2": (lambda: llama_like("Qwen2"), True, {"rms": 1, "add+rms": 4}),
    "Gemma": (lambda: llama_like("Gemma", head_dim=8), True, {"rms": 1, "add+rms": 4}),
    "T5": (lambda: t5(0.0), True, {"rms": 1, "add+rms": 4}),
    "GPT-2": (lambda: gpt2(0.0), False, PRENORM),
    "BERT": (lambda: bert(0.0), False, {"ln": 2, "add+ln": 4}),
    "encoder": (lambda: encoder(0.0, True), False, {"ln": 1, "add+ln": 3}),
    "post-norm encoder": (lambda: encoder(0.0, False), False, {"add+ln": 4}),
    "ViT": (lambda: vit(0.0), False, {"ln": 1, "add+ln": 6}),
    "ViT with dropped paths": (
        lambda: vit(0.2), False, {"ln": 1, "add+ln": 2, "drop_path+add+ln": 4},
    ),
    "Swin": (lambda: swin(0.0), False, {"ln": 4, "add+ln": 3}),
    "Swin with dropped paths": (
        lambda: swin(0.2), False, {"ln": 4, "add+ln": 1, "drop_path+add+ln": 2},
    ),
}  # fmt: skip
DROPPED = {  # the same with dropouts, which have random numbers of their own
    "T5": (lambda: t5(0.1), {"dropout+rms": 1, "dropout+add+rms": 4}),
    "GPT-2": (lambda: gpt2(0.1), {"dropout+ln": 1, "dropout+add+ln": 4}),
    "BERT": (lambda: bert(0.1), {"ln": 2, "dropout+add+ln": 4}),
    "encoder": (lambda: encoder(0.1, True), {"ln": 1, "dropout+add+ln": 3}),
    "post-norm encoder": (lambda: encoder(0.1, False), {"dropout+add+ln": 4}),
}


def prepared(build, double):
    torch.manual_seed(0)
    model, x = build()
    model = model.double() if double else model
    return model, x.double() if double and x.is_floating_point() else x


def run(model, x):
    """The output and the gradients by name."""
    torch.manual_seed(1)
    y = model(x)
    y = y if isinstance(y, torch.Tensor) else y[0]
    model.zero_grad()
    (y * random(*y.shape, dtype=y.dtype)).sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(expected, found, bound):
    assert (found[0] - expected[0]).norm() <= bound * expected[0].norm()
    assert found[1].keys() == expected[1].keys()
    largest = max(g.norm() for g in expected[1].values())
    for name, g in expected[1].items():
        # Some biases before a norm have a gradient of 0, except for rounding.
        assert (found[1][name] - g).norm() <= bound * (g.norm() + 1e-3 * largest), name


def norms(model):
    """How often each pattern of a norm is reported."""
    sites = [s for s in gradfuse.fuse_report(model) if s.pattern.endswith(("ln", "rms"))]
    assert all(site.fused for site in sites)
    return dict(Counter(site.pattern for site in sites))


@waits
@pytest.mark.parametrize("name", ZOO)
def test_models_of_torchvision_and_others(name):
    build, is_single, patterns = ZOO[name]
    model, x = prepared(build, not is_single)
    fused = gradfuse.fuse(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    bound = 1e-5 if is_single else 1e-10
    for train in (False, True):
        expected = run(model.train(train), x)
        assert_same(expected, run(fused.train(train), x), bound)
    assert norms(fused) == patterns
    plain = gradfuse.unfuse(pickle.loads(pickle.dumps(copy.deepcopy(fused))))
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(run(plain, x)[0], expected[0])


@waits
@pytest.mark.parametrize("name", DROPPED)
def test_dropouts_of_models(name, monkeypatch):
    build, patterns = DROPPED[name]
    model, x = prepared(build, name != "T5")
    gradfuse.fuse(model, inplace=True)
    found = run(model, x)
    assert norms(model) == patterns
    assert "dropout+add+norm" in {s.pattern for s in gradfuse.fuse_report(model)}
    monkeypatch.setenv("GRADFUSE_DEFER", "0")
    assert_same(run(copy.deepcopy(model), x), found, 1e-5 if name == "T5" else 1e-10)


@waits
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT", "encoder", "ViT"])
def test_fifty_steps(name):
    build, is_single, _ = ZOO[name]
    losses = []
    for swap in (lambda m: m, gradfuse.fuse):
        model, x = prepared(build, not is_single)
        model = swap(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        losses.append([])
        for _ in range(50):
            y = model(x)
            y = y if isinstance(y, torch.Tensor) else y[0]
            loss = F.cross_entropy(y.flatten(0, -2), torch.arange(y[..., 0].numel()) % y.shape[-1])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.9 * losses[0][0]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4 if is_single else 1e-7, atol=0)


# ---- programs ----


def added(x, f):
    x += f
    return x


def written(t, value):
    """value, after t was written to."""
    t.mul_(2)
    return value


def written_between(s, x):
    r, f = x * 1.0, x * 2.0
    y = r + s.drop(f)
    f.mul_(3)
    r.mul_(3)
    return s.norm(y) + y


def sum_written(s, x):
    y = x + s.drop(s.f(x))
    y.mul_(2)
    return s.norm(y)


def without_gradients(s, x):
    with torch.no_grad():
        y = x + s.drop(s.f(x))
    return s.norm(y) + x


def used_without_gradients(s, x):
    y = x + s.drop(s.f(x))
    with torch.no_grad():
        z = s.norm(y)
    return y + z


def hooked(s, x):
    y = x + s.drop(s.f(x))
    y.register_hook(lambda g: g * 3)
    return s.norm(y)


def asked_for_later(s, x):
    d = s.drop(s.f(x))
    y = x + d
    z = s.norm(y)
    loss = ((z + y) * y.detach()).sin().sum()
    of_sum, of_dropout = torch.autograd.grad(loss, (y, d), retain_graph=True)
    return z + of_sum + 2 * of_dropout


def hooked_later(s, x):
    d = s.drop(s.f(x))
    y = x + d
    z = s.norm(y)
    y.register_hook(lambda g: g * 3)
    d.register_hook(lambda g: g * 5)
    return z + y


def gradient_kept(s, x):
    y = x + s.drop(s.f(x))
    y.retain_grad()
    z = s.norm(y)
    (g,) = torch.autograd.grad(z.sin().sum(), y, retain_graph=True)
    return z + g


def autocast(s, x):
    y = x + s.drop(s.f(x))
    with torch.autocast("cpu", torch.bfloat16):
        return s.norm(y)


def saved_elsewhere(s, x):
    y = x + s.drop(s.f(x))
    with torch.autograd.graph.save_on_cpu():
        return s.norm(y)


def metadata(s, x):
    y = x + s.drop(s.f(x))
    same = y.shape == x.shape and y.stride() == x.stride() and y.dtype is x.dtype
    return s.norm(y) if same and y.requires_grad and type(y) is torch.Tensor else y


def strides(s, x):
    """The outputs, weighted by the strides that the tensors have."""
    t = x.mT.contiguous().mT
    dropped = s.drop(t)
    sums = x + dropped, dropped + x, t + s.drop(x)
    z = s.norm(sums[0])
    weights = [a.stride(1) + 10 * a.stride(2) for a in (dropped, *sums, z)]
    return z * weights[0] + sum(y * w for y, w in zip(sums, weights[1:], strict=False))


def path(s, x):
    return x + s.path(s.f(x))


# Programs around `s.norm`, `s.drop` and `s.path`, with what the reports say of norm and dropout.
D, ADDED, LEFT = "dropout+add+norm", "dropout+add", "dropout"
PROGRAMS = {
    "sum": (lambda s, x: s.norm(x + s.drop(s.f(x))), "dropout+add+ln", D),
    "other order": (lambda s, x: s.norm(s.drop(s.f(x)) + x), "dropout+add+ln", D),
    "torch.add": (lambda s, x: s.norm(torch.add(x, s.drop(s.f(x)))), "dropout+add+ln", D),
    "used after": (lambda s, x: (lambda y: s.norm(y) * y)(x + s.drop(x)), "dropout+add+ln", D),
    "used before": (lambda s, x: (lambda y: y.sin() + s.norm(y))(x + s.drop(x)), "ln", ADDED),
    "only used": (lambda s, x: x + s.drop(s.f(x)), None, ADDED),
    "normalised twice": (
        lambda s, x: (lambda y: s.norm(y) - s.norm(y) * 3)(x + s.drop(x)), "ln", D,
    ),
    "alone": (lambda s, x: s.norm(s.drop(s.f(x))), "dropout+ln", "dropout+norm"),
    "not normalised": (lambda s, x: s.drop(s.f(x)).sin(), None, LEFT),
    "two uses": (
        lambda s, x: (lambda d: s.norm(x + d) + d)(s.drop(s.f(x))), "dropout+add+ln", ADDED,
    ),
    "two dropouts": (lambda s, x: s.norm(s.drop(x) + s.drop(s.f(x))), "dropout+add+ln", D),
    "dropout of a dropout": (lambda s, x: s.norm(x + s.drop(s.drop(x))), "dropout+add+ln", D),
    "two sums": (lambda s, x: s.norm(x + s.drop(s.f(x)) + s.drop(x)), "dropout+add+ln", D),
    "three addends": (lambda s, x: s.norm(x + s.drop(s.f(x)) + x.sin()), "ln", ADDED),
    "in place": (lambda s, x: s.norm(added(x * 1.0, s.drop(s.f(x)))), "ln", LEFT),
    "into the dropout": (lambda s, x: s.norm(added(s.drop(s.f(x)), x)), "ln", LEFT),
    "scaled": (lambda s, x: s.norm(torch.add(x, s.drop(s.f(x)), alpha=2)), "ln", LEFT),
    "number": (lambda s, x: s.norm(s.drop(s.f(x)) + 1.0), "ln", LEFT),
    "broadcast": (lambda s, x: s.norm(x[:1] + s.drop(s.f(x))), "ln", LEFT),
    "another dtype": (lambda s, x: s.norm(x.float() + s.drop(s.f(x))), "ln", LEFT),
    "transposed": (lambda s, x: s.norm(x + s.drop(s.f(x).mT.contiguous().mT)), "dropout+add+ln", D),
    "transposed residual": (
        lambda s, x: s.norm(x.mT.contiguous().mT + s.drop(s.f(x))), "ln", LEFT,
    ),
    "strides": (strides, "dropout+add+ln", D),
    "view": (lambda s, x: s.norm((x + s.drop(s.f(x))).view(-1, 8)), "ln", ADDED),
    "Function": (lambda s, x: s.norm(Double.apply(x + s.drop(s.f(x)))), "ln", ADDED),
    "itself": (lambda s, x: (lambda d: s.norm(d + d))(s.drop(s.f(x))), "ln", LEFT),
    "written between": (written_between, "ln", ADDED),
    "sum written": (sum_written, "ln", ADDED),
    "made without gradients": (without_gradients, "ln", ADDED),
    "used without gradients": (used_without_gradients, "ln", ADDED),
    "hook": (hooked, "dropout+add+ln", D),
    "retain_grad": (gradient_kept, "dropout+add+ln", D),
    "gradient asked for later": (asked_for_later, "dropout+add+ln", D),
    "hooks set later": (hooked_later, "dropout+add+ln", D),
    "autocast between": (autocast, "ln", ADDED),
    "saved-tensor hooks": (saved_elsewhere, "ln", ADDED),
    "metadata": (metadata, "dropout+add+ln", D),
    "detached": (lambda s, x: s.norm((x + s.drop(s.f(x))).detach()) + x, "ln", ADDED),
    "pre-norm": (lambda s, x: (lambda y: s.norm(x + y))(s.f(s.norm(x))), "add+ln", None),
    "pre-norm, used before": (
        lambda s, x: (lambda z: z.sin() + s.norm(z))(s.f(s.norm(x)) + x), "ln", None,
    ),
    "norm of a norm's input": (lambda s, x: s.norm(x) + s.norm(x), "ln", None),
    "sum of a norm's input with itself": (
        lambda s, x: (lambda _: s.norm(x + x))(s.norm(x)), "ln", None,
    ),
    "path": (lambda s, x: s.norm(path(s, x)), "drop_path+add+ln", None),
    "path of a dropout": (
        lambda s, x: s.norm(x + s.path(s.drop(s.f(x)))), "drop_path+dropout+add+ln", D,
    ),
    "dropout of a path": (lambda s, x: s.norm(x + s.drop(s.path(x))), "dropout+add+ln", D),
    "of a batch norm": (lambda s, x: s.norm(x + s.drop(s.bn(x))), "dropout+add+ln", D),
    "checkpoint": (
        lambda s, x: checkpoint(lambda y: s.norm(y + s.drop(s.f(y))), x, use_reentrant=False),
        "ln", LEFT,
    ),
    "reentrant checkpoint": (
        lambda s, x: checkpoint(lambda y: s.norm(y + s.drop(s.f(y))), x, use_reentrant=True),
        "ln", LEFT,
    ),
    "checkpoint of a use": (
        lambda s, x: checkpoint(lambda y: s.norm(y) * y, x + s.drop(s.f(x)), use_reentrant=False),
        "ln", ADDED,
    ),
}  # fmt: skip


class Site(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.f, self.norm, self.drop = nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.3)
        self.bn = nn.BatchNorm1d(6)
        self.path = gradfuse.nn.DropPath(0.4)
        timm = importlib.util.find_spec("timm")
        if timm:
            self.path = importlib.import_module("timm.layers").DropPath(0.4)
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        return self.function(self, x)


def outcome(model, x):
    """The output and the gradients."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x * 1.0)
    (y * random(*y.shape, dtype=y.dtype, seed=5)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@waits
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name, monkeypatch):
    function, of_norm, of_dropout = PROGRAMS[name]
    if "path" in name:
        pytest.importorskip("timm")
    model = gradfuse.fuse(Site(function).double())
    x = random(5, 6, 8, dtype=torch.float64)
    found = outcome(model, x)
    report = {site.path: site for site in gradfuse.fuse_report(model)}
    if of_norm is not None:
        assert report["norm"].pattern == of_norm, report["norm"]
    if of_dropout is not None:
        assert report["drop"].pattern == of_dropout, report["drop"]
    monkeypatch.setenv("GRADFUSE_DEFER", "0")
    expected = outcome(copy.deepcopy(model), x)
    rtol = 2e-2 if "autocast" in name else 1e-5 if "dtype" in name else 1e-11
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


@waits
def test_second_derivatives():
    model = gradfuse.fuse(Site(PROGRAMS["used after"][0]).double())
    x = random(2, 6, 8, dtype=torch.float64).requires_grad_()

    def call(x, weight):
        torch.manual_seed(3)
        return torch.func.functional_call(model, {"norm.weight": weight}, x * 1.0)

    weight = model.norm.weight.detach().clone().requires_grad_()
    torch.autograd.gradgradcheck(call, (x, weight))


@pytest.mark.parametrize("defer", ["0", "1"])
def test_a_dropped_path_is_selected(defer, monkeypatch):
    monkeypatch.setenv("GRADFUSE_DEFER", defer)
    timm_layers = pytest.importorskip("timm.layers")
    model = gradfuse.fuse(nn.ModuleList([nn.LayerNorm(8), timm_layers.DropPath(0.5)]))
    x = random(64, 8)
    torch.manual_seed(0)
    total = x + model[1](torch.full_like(x, torch.inf))
    model[0](total)
    waited = defer == "1" and _native.available
    pattern = "drop_path+add+norm" if waited else "drop_path"
    assert gradfuse.fuse_report(model)[1].pattern == pattern
    dropped = (total == x).all(1)
    assert 16 < dropped.sum() < 48
    assert total[~dropped].isinf().all()


@waits
def test_only_large_tensors_wait(monkeypatch):
    monkeypatch.undo()
    for program, kib, pattern in (
        ("sum", 32, "ln"),
        ("sum", 128, "dropout+add+ln"),
        ("pre-norm", 512, "ln"),
        ("pre-norm", 2048, "add+ln"),
    ):
        model = gradfuse.fuse(Site(PROGRAMS[program][0]))
        with torch.no_grad():
            model(torch.randn(kib * 4, 8, 8))
        assert gradfuse.fuse_report(model)[0].pattern == pattern, (program, kib)


@waits
def test_a_marked_tensor_is_an_ordinary_one():
    norm = gradfuse.fuse(nn.LayerNorm(8))
    x = random(4, 8)
    norm(x)
    assert "DeferredInit" in str(torch._C._dispatch_keys(x))
    copied = pickle.loads(pickle.dumps(x))
    assert torch.equal(copied, x)
    assert torch.equal(copy.deepcopy(x), x)
    norm(x)
    view = x[1:]
    assert torch.equal(view + 1, copied[1:] + 1)
    norm(x)
    x.add_(1)
    assert torch.equal(x, copied + 1)
    assert "DeferredInit" not in str(torch._C._dispatch_keys(x))


@waits
def test_a_norm_of_other_tensors_keeps_its_own_way():
    class Like(torch.Tensor):
        pass

    norm = gradfuse.fuse(nn.LayerNorm(8))
    rms = gradfuse.fuse(nn.RMSNorm(8))
    x = random(4, 8)
    assert type(norm(x.as_subclass(Like))) is Like
    assert gradfuse.fuse_report(norm)[0].reason == "a tensor of another kind or dtype"
    expected = nn.RMSNorm(8)(x.bfloat16())
    assert torch.equal(rms(x.bfloat16()), expected)
    assert gradfuse.fuse_report(rms)[0].reason == "weight has another dtype than the input"


def test_calls_by_keyword():
    """The libraries' modules name their input as they like."""
    timm_layers = pytest.importorskip("timm.layers")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = random(4, 8)
    for module, name in (
        (nn.LayerNorm(8), "input"),
        (nn.Dropout(0.0), "input"),
        (llama.LlamaRMSNorm(8), "hidden_states"),
        (timm_layers.RmsNorm(8), "x"),
        (timm_layers.DropPath(0.5).eval(), "x"),
    ):
        fused = gradfuse.fuse(module)
        assert torch.equal(fused(**{name: x}), module(**{name: x}))
        with pytest.raises(TypeError):
            fused(wrong=x)
        with pytest.raises(TypeError):
            fused()


def test_recorded_by_fx():
    layers = pytest.importorskip("timm.layers")
    vision = pytest.importorskip("torchvision.ops")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    for train in (True, False):
        model = nn.Sequential(
            nn.LayerNorm(8), layers.LayerNorm(8), layers.RmsNorm(8), layers.DropPath(0.5),
            vision.StochasticDepth(0.5, "row"), llama.LlamaRMSNorm(8),
        ).train(train)  # fmt: skip
        targets = [
            [str(n.target) for n in torch.fx.symbolic_trace(m).graph.nodes]
            for m in (model, gradfuse.fuse(model))
        ]
        assert targets[0] == targets[1]


@pytest.mark.parametrize("module", [nn.LayerNorm(8), nn.BatchNorm1d(8)], ids=["ln", "bn"])
def test_parametrized_since(module):
    fused = gradfuse.fuse(nn.Sequential(copy.deepcopy(module)))
    parametrize.register_parametrization(fused[0], "weight", nn.Softplus())
    x = random(4, 8)
    expected = fused(x)
    for again in (gradfuse.unfuse(fused), gradfuse.fuse(fused)):
        assert torch.equal(again(x), expected)


@waits
def test_buffers_of_inference_mode():
    """Their writes leave no trace, so nothing waits for them."""
    norm = gradfuse.fuse(nn.LayerNorm(8))
    with torch.inference_mode():
        buffer = random(16, 8)
        h = buffer[:8]
        norm(h)
        total = h + 0.0 * h
        buffer.zero_()
        assert total.abs().min() > 0.0


def test_fast_norms_of_timm():
    layers = pytest.importorskip("timm.layers")
    norm = layers.LayerNorm(8)
    norm._fast_norm = True
    with torch.autocast("cpu", torch.bfloat16):
        assert gradfuse.fuse(norm)(random(4, 8)).dtype == norm(random(4, 8)).dtype


def test_left_alone():
    class Own(nn.LayerNorm):
        pass

    model = nn.Sequential(Own(8), nn.Dropout(0.5, inplace=True), nn.Dropout(0.5))
    model[2].forward = lambda x: x
    fused = gradfuse.fuse(model)
    reasons = [site.reason for site in gradfuse.fuse_report(fused)]
    assert "Own is not known here" in reasons[0]
    assert reasons[2] == "its forward was set on the instance"
    torch.manual_seed(0)
    x = random(3, 8)
    fused[1](x)
    torch.manual_seed(0)
    assert torch.equal(x, F.dropout(random(3, 8), 0.5))


def test_graphs_stay_plain():
    model = nn.Sequential(nn.LayerNorm(8), nn.Dropout(0.5), nn.RMSNorm(8))
    fused = gradfuse.fuse(model)
    x = random(3, 8)
    recorded = [
        [str(n.target) for n in torch.fx.symbolic_trace(m).graph.nodes] for m in (model, fused)
    ]
    assert recorded[0] == recorded[1]
    exported = [
        [str(n.target) for n in torch.export.export(m, (x,)).graph.nodes] for m in (model, fused)
    ]
    assert exported[0] == exported[1]
    model.eval()
    scripted = torch.jit.script(fused.eval())
    assert torch.equal(scripted(x), model(x))
    traced = torch.jit.trace(fused, (x,))
    assert torch.equal(traced(x), model(x))


@waits
def test_an_input_written_to_meanwhile():
    """A write through an older view is seen when the sum is used, wherever the input waited."""
    model = gradfuse.fuse(Site(PROGRAMS["sum"][0]))
    x, f = random(4, 6, 8), random(4, 6, 8)
    for written_late in (False, True):
        view = f[0]
        dropped = model.drop(f)
        if not written_late:
            view.mul_(2)
        total = x + dropped
        if written_late:
            view.mul_(2)
        with pytest.raises(RuntimeError, match="input must not be written to before"):
            model.norm(total)
        del dropped, total


@waits
def test_a_compiled_part_takes_a_marked_tensor():
    norm, x = gradfuse.fuse(nn.LayerNorm(8)), random(4, 8)
    compiled = torch.compile(lambda t: t.sin() + 1, backend="aot_eager", fullgraph=True)
    norm(x)
    torch.testing.assert_close(compiled(x), x.sin() + 1)
    norm(x)
    assert torch.equal(torch.func.vmap(torch.sin)(x), x.sin())


@waits
def test_memory_is_freed():
    """The nodes keep neither what was dropped nor what was added."""
    model = gradfuse.fuse(Site(PROGRAMS["sum"][0]))
    x = random(4, 6, 8).requires_grad_()
    branch = x * 2
    dropped = model.drop(branch)
    y = model.norm(x * 3 + dropped)
    kept = weakref.ref(branch)
    del branch, dropped
    gc.collect()
    assert kept() is None
    y.sum().backward()
    assert _native.backend.count_waiting() == 0
