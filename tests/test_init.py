"""initialize_: what each parameter gets, and what stays as it was."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from init_models import Mixer, Plain, Recurrent, Stream
from torch import nn

from gradfuse.init import gain, initialize_

NEAR = {"rtol": 0, "atol": 1e-5}


def std(p: torch.Tensor) -> float:
    return float(p.detach().double().square().mean().sqrt())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("relu", math.sqrt(2)), ("gelu", 1.5335), ("silu", 1.6765), ("mish", 1.4868),
        ("hardswish", 1.7367), ("elu", 1.2452), ("tanh", 1.5925), ("selu", 1.0), ("linear", 1.0),
        ("sigmoid", 1.8462), ("softplus", 1.0419),
    ],
)  # fmt: skip
def test_gains(name: str, expected: float) -> None:
    assert gain(name) == pytest.approx(expected, rel=1e-4)


def test_gains_against_samples_and_torch() -> None:
    z = torch.randn(2_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for f in (F.hardtanh, F.softsign, lambda z: F.gelu(z, approximate="tanh"), torch.sin):
        assert gain(f) == pytest.approx(1 / f(z).square().mean().sqrt().item(), rel=3e-3)
    for slope in (0.0, 0.01, 0.3, 1.0):
        expected = nn.init.calculate_gain("leaky_relu", slope)
        assert gain("leaky_relu", slope) == pytest.approx(expected, rel=1e-9)
        assert gain(nn.LeakyReLU(slope)) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="gain: activation must be"):
        gain("no_such_function")
    with pytest.raises(ValueError, match="one by one"):
        gain(torch.log)


class Functional(nn.Module):
    """Each layer is followed by another function, none by a module."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcdefghij":
            self.add_module(name, nn.Linear(256, 256))
        self.raw = nn.Parameter(torch.zeros(256, 512))
        self.raw_bias = nn.Parameter(torch.ones(512))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(F.gelu(self.a(x)), (256,))
        x = F.layer_norm(torch.relu_(self.b(x)), (256,))
        y = self.c(x)
        x = F.layer_norm(y * torch.sigmoid(y), (256,))
        x = F.layer_norm(self.d(x).tanh(), (256,))
        x = F.layer_norm(F.leaky_relu(self.e(x), 0.3), (256,))
        x = F.layer_norm(F.hardswish(F.dropout(self.f(x), 0.5, self.training)), (256,))
        x = F.layer_norm(F.mish(F.layer_norm(self.g(x), (256,))), (256,))
        x = F.layer_norm(F.silu(self.h(x)) * self.i(x), (256,))
        x = F.layer_norm(2 * self.j(x) + 1, (256,))
        return F.elu(x @ self.raw + self.raw_bias)


def test_the_activation_that_follows_is_found_by_running() -> None:
    model = Functional()
    report = initialize_(model, torch.randn(4, 256))
    expected = {
        "a": "gelu", "b": "relu", "c": "silu", "d": "tanh", "f": "hardswish", "g": "mish",
        "h": "silu", "i": "linear", "j": "linear",
    }  # fmt: skip
    for name, activation in expected.items():
        assert report[f"{name}.weight"].gain == pytest.approx(gain(activation), rel=1e-3), name
        assert std(model.get_submodule(name).weight) == pytest.approx(
            gain(activation) / 16, rel=0.02
        )
    assert report["e.weight"].gain == pytest.approx(gain("leaky_relu", 0.3))
    assert "gelu follows" in report["a.weight"].why
    assert report["raw"].gain == pytest.approx(gain("elu"), rel=1e-6)
    assert std(model.raw) == pytest.approx(gain("elu") / 16, rel=0.02)
    assert not model.raw_bias.any()


def test_modules_tell_what_they_can_without_a_run() -> None:
    model = nn.Sequential(
        nn.Conv2d(16, 64, 3), nn.BatchNorm2d(64), nn.GELU(), nn.Conv2d(64, 64, 3), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip
    report = initialize_(model)
    assert report["0.weight"].gain == pytest.approx(gain("gelu"), rel=1e-6)
    assert "by the modules' order" in report["0.weight"].why
    assert std(model[0].weight) == pytest.approx(gain("gelu") / 12, rel=0.05)
    assert report["3.weight"].gain == 1.0


def test_fans_of_groups_and_transposed_convolutions() -> None:
    """The rms of a convolution's output is that of its input, whatever its layout."""
    x = torch.randn(2, 64, 24, 24)
    for conv in (
        nn.Conv2d(64, 128, 3, groups=8),
        nn.Conv2d(64, 64, 5, groups=64),
        nn.ConvTranspose2d(64, 256, 4),
        nn.ConvTranspose2d(64, 32, 4, stride=2, groups=4),
    ):
        initialize_(nn.Sequential(conv), scheme="lecun")
        inner = conv(x)[..., 6:-6, 6:-6]
        assert std(inner) == pytest.approx(1.0, rel=0.15), conv
    conv = nn.Conv2d(64, 128, 3, groups=8)
    initialize_(nn.Sequential(conv), scheme="he", mode="fan_out")
    assert std(conv.weight) == pytest.approx(1 / math.sqrt(16 * 9), rel=0.03)


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_schemes_have_their_papers_variance(distribution: str) -> None:
    def drawn(scheme: str, **options: object) -> float:
        model = nn.Sequential(nn.Linear(512, 256), nn.ReLU())
        initialize_(model, scheme=scheme, distribution=distribution, **options)
        weight = model[0].weight
        if distribution == "uniform":
            assert float(weight.detach().abs().max()) <= std(weight) * 1.8
        assert not model[0].bias.any()
        return std(weight)

    assert drawn("xavier") == pytest.approx(math.sqrt(2 / 768), rel=0.01)
    assert drawn("he") == pytest.approx(math.sqrt(2 / 512), rel=0.01)
    assert drawn("he", mode="fan_out") == pytest.approx(math.sqrt(2 / 256), rel=0.01)
    assert drawn("lecun") == pytest.approx(math.sqrt(1 / 512), rel=0.01)


def test_orthogonal() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Conv2d(8, 16, 3, groups=4))
    initialize_(model, scheme="orthogonal")
    w = model[0].weight.detach().double()
    torch.testing.assert_close(
        w.T @ w, gain("tanh") ** 2 * torch.eye(64, dtype=torch.float64), **NEAR
    )
    for block in model[2].weight.detach().double().chunk(4):
        flat = block.flatten(1)
        torch.testing.assert_close(flat @ flat.T, torch.eye(4, dtype=torch.float64), **NEAR)


def test_lsuv_gives_each_output_variance_1() -> None:
    model = Plain(torch.tanh, 12, 64)
    x = torch.randn(32, 64) * 30
    report = initialize_(model, x, scheme="lsuv")
    for layer in model.layers:
        x = layer(x)
        assert std(x) == pytest.approx(1, rel=1e-3)
        x = torch.tanh(x)
    assert report.forward["head.weight"] == pytest.approx(1)
    assert not any(layer.bias.any() for layer in model.layers)


class Branches(nn.Module):
    """h + W2 relu(W1 h), with a multiplier at the end of each branch."""

    def __init__(self, blocks: int = 5, multiplier: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 64)
        self.one = nn.ModuleList(nn.Linear(64, 64) for _ in range(blocks))
        self.two = nn.ModuleList(nn.Linear(64, 64) for _ in range(blocks))
        self.scale = nn.ParameterList(torch.ones(1) for _ in range(blocks if multiplier else 0))
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x)
        for i, (one, two) in enumerate(zip(self.one, self.two, strict=True)):
            branch = two(torch.relu(one(h)))
            h = h + (self.scale[i] * branch if len(self.scale) else branch)
        return self.head(h)


def test_fixup_and_skipinit() -> None:
    model, x = Branches(), torch.randn(4, 8)
    initialize_(model, x, scheme="fixup")
    for one, two in zip(model.one, model.two, strict=True):
        assert std(one.weight) == pytest.approx(math.sqrt(2 / 64) * 5**-0.5, rel=0.05)
        assert not two.weight.any()
    assert not model.head.weight.any()
    initialize_(model, x, scheme="skipinit")
    assert all(float(s.detach()) == 0 for s in model.scale)
    assert all(two.weight.any() for two in model.two)


@pytest.mark.parametrize(
    ("scheme", "model", "inputs", "message"),
    [
        ("fixup", lambda: Mixer(1), torch.zeros(1, 4, dtype=torch.int64), "have no norms"),
        ("fixup", lambda: Plain(F.relu, 2, 8), torch.zeros(1, 64), "have residual branches"),
        ("skipinit", lambda: Branches(multiplier=False), torch.zeros(1, 8), "learned multiplier"),
        ("deepnorm", lambda: Mixer(1), torch.zeros(1, 4, dtype=torch.int64), "behind each"),
        ("gpt2", lambda: Plain(F.relu, 2, 8), torch.zeros(1, 64), "have residual branches"),
        ("lsuv", lambda: Plain(F.relu, 2, 8), None, "example_inputs must be"),
        ("gpt2", lambda: Mixer(1), None, "example_inputs must be"),
        ("he ", lambda: Plain(F.relu, 2, 8), None, "scheme must be one of"),
    ],
)
def test_a_scheme_refuses_what_it_is_not_about(scheme, model, inputs, message) -> None:
    net = model()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=f"initialize_: .*{message}.*got"):
        initialize_(net, inputs, scheme=scheme)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_other_arguments_are_checked() -> None:
    for options in ({"residual": "half"}, {"distribution": "cauchy"}, {"mode": "fan"}):
        with pytest.raises(ValueError, match=f"initialize_: {next(iter(options))} must be one of"):
            initialize_(nn.Linear(2, 2), **options)
    with pytest.raises(TypeError, match="initialize_: model must be an"):
        initialize_(torch.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lazy"):
        initialize_(nn.LazyLinear(3))


def test_deepnorm() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    initialize_(model, torch.randn(2, 5, 64), scheme="deepnorm")
    beta = (8 * 4) ** -0.25
    for block in model.layers:
        q, k, v = block.self_attn.in_proj_weight.chunk(3)
        for weight, factor in ((q, 1), (k, 1), (v, beta), (block.self_attn.out_proj.weight, beta)):
            assert std(weight) == pytest.approx(factor / 8, rel=0.05)
        for linear in (block.linear1, block.linear2):
            assert std(linear.weight) == pytest.approx(beta * math.sqrt(2 / 192), rel=0.05)


def test_gpt2_finds_residual_projections_by_the_graph() -> None:
    model = Mixer(3)
    report = initialize_(model, torch.randint(50, (2, 8)), scheme="gpt2")
    found = {row.path for row in report.rows if "1/sqrt(6)" in row.rule}
    assert found == {f"rows.{i}.{name}.weight" for i in range(3) for name in "cf"}
    for row in model.rows:
        assert std(row["c"].weight) == pytest.approx(0.02 / math.sqrt(6), rel=0.1)
        assert std(row["e"].weight) == pytest.approx(0.02, rel=0.1)
    assert std(model.alpha.weight) == pytest.approx(0.02, rel=0.1)
    assert report["beta"].rule == "left"
    assert "omega.weight" in report["alpha.weight"].why


def test_gpt2_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2,
        n_embd=32,
        n_head=2,
        vocab_size=60,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    report = initialize_(model, {"input_ids": torch.randint(60, (2, 8))}, scheme="gpt2")
    found = {row.path for row in report.rows if "1/sqrt(4)" in row.rule}
    expected = {n for n, _ in model.named_parameters() if n.endswith("c_proj.weight")}
    assert len(expected) == 4
    assert found == expected
    auto = initialize_(model, {"input_ids": torch.randint(60, (2, 8))})
    assert auto["transformer.h.0.mlp.c_fc.weight"].gain == pytest.approx(gain("gelu"), rel=1e-3)
    weight = model.transformer.h[0].mlp.c_fc.weight  # [in, out]
    assert std(weight) == pytest.approx(gain("gelu") / math.sqrt(32), rel=0.05)


@pytest.mark.parametrize(
    ("kind", "factor"), [("pre", 16**-0.5), ("after", 16**-0.5), ("post", 1 / 16)]
)
def test_residual_branches_are_scaled_by_how_they_end(kind: str, factor: float) -> None:
    """h + W relu(h) ends linear, so branches add up as 1/sqrt(L); h + relu(W h) adds as 1/L."""
    model = Stream(kind, 16, 64)
    initialize_(model, torch.randn(8, 64), scheme="he")
    own = gain("relu") if kind == "post" else 1.0
    for block in model.blocks:
        assert std(block.weight) == pytest.approx(own * factor / 8, rel=0.05)
    initialize_(model, torch.randn(8, 64), scheme="he", residual=None)
    assert std(model.blocks[0].weight) == pytest.approx(own / 8, rel=0.05)


def test_residual_zero() -> None:
    model = Stream("pre", 4)
    initialize_(model, torch.randn(8, 64), residual="zero")
    assert not any(block.weight.any() for block in model.blocks)
    # relu has no gradient at 0: such a branch would never move.
    model = Stream("post", 4)
    report = initialize_(model, torch.randn(8, 64), residual="zero")
    assert all(block.weight.any() for block in model.blocks)
    assert "no gradient" in report["blocks.0.weight"].why


class NormLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.one, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return torch.relu(x + self.last(self.one(x)))


def test_a_norm_that_ends_a_branch_takes_the_zero() -> None:
    model, x = NormLast(), torch.randn(2, 3, 8, 8)
    report = initialize_(model, x, residual="zero")
    assert not model.last.weight.any()
    assert model.bn.weight.eq(1).all()
    assert std(model.one.weight) == pytest.approx(1 / math.sqrt(72), rel=0.1)
    report = initialize_(model, x)
    assert model.last.weight.eq(1).all()
    assert report["one.weight"].gain == 1.0


def test_recurrent_layers_are_drawn_gate_by_gate() -> None:
    model = Recurrent(32)
    report = initialize_(model)
    for suffix in ("l0", "l1"):
        for gate in getattr(model.lstm, f"weight_hh_{suffix}").detach().double().chunk(4):
            torch.testing.assert_close(gate @ gate.T, torch.eye(32, dtype=torch.float64), **NEAR)
        total = getattr(model.lstm, f"bias_ih_{suffix}") + getattr(model.lstm, f"bias_hh_{suffix}")
        i, f, g, o = total.detach().chunk(4)
        assert f.eq(1).all()
        assert not any(t.any() for t in (i, g, o))
    assert "by gate, 4" in report["lstm.weight_hh_l0"].rule
    cell = nn.GRUCell(8, 16)
    initialize_(cell)
    for gate in cell.weight_hh.detach().double().chunk(3):
        torch.testing.assert_close(gate @ gate.T, torch.eye(16, dtype=torch.float64), **NEAR)


def test_attentions_joint_weight_is_three_matrices() -> None:
    model = nn.MultiheadAttention(32, 4)
    with torch.no_grad():
        model.in_proj_bias.fill_(1)
    initialize_(model, scheme="orthogonal")
    for weight in model.in_proj_weight.detach().double().chunk(3):
        torch.testing.assert_close(weight @ weight.T, torch.eye(32, dtype=torch.float64), **NEAR)
    assert not model.in_proj_bias.any()


def test_tied_weights_are_drawn_once_and_frozen_ones_left() -> None:
    model = Mixer(1)
    drawn = torch.Generator().manual_seed(3)
    initialize_(model, torch.randint(50, (2, 8)), generator=drawn)
    assert model.omega.weight is model.alpha.weight
    assert std(model.alpha.weight) == pytest.approx(1 / math.sqrt(32), rel=0.1)
    first = nn.Linear(4, 4)
    first.weight.requires_grad_(False)
    kept = first.weight.clone()
    report = initialize_(first)
    assert torch.equal(first.weight, kept)
    assert report["weight"].rule == "left"
    assert "requires_grad" in report["weight"].why
    assert not first.bias.any()


def test_parametrized_weights_are_written_through_their_inverse() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(256, 128)), nn.GELU(), nn.Linear(128, 4)
    )
    report = initialize_(model, torch.randn(4, 256), scheme="he")
    assert std(model[0].weight) == pytest.approx(gain("gelu") / 16, rel=0.02)
    assert "parametrization" in report["0.weight"].why

    class OneWay(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.square()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.parametrize.register_parametrization(model[1], "weight", OneWay())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"1\.weight must have .*right_inverse, got OneWay"):
        initialize_(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
