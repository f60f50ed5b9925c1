"""audit_init: each planted fault is flagged, and sound models are not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from init_models import Mixer, Plain, Recurrent, Stream, digits
from torch import nn

from gradfuse.init import audit_init, initialize_

NAN = math.nan


class Convolutions(nn.Module):
    """A small residual net with batch norm and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.bn0, self.bn1, self.bn2 = (nn.BatchNorm2d(32) for _ in range(3))
        self.one = nn.Conv2d(32, 32, 3, padding=1, groups=8)
        self.two = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        x = torch.relu(x + self.bn2(self.two(torch.relu(self.bn1(self.one(x))))))
        return self.head(x.mean((2, 3)))


def images() -> torch.Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def tokens() -> torch.Tensor:
    return torch.randint(20, (4, 8), generator=torch.Generator().manual_seed(0))


def plain(f: Callable = F.relu, depth: int = 6) -> nn.Module:
    model = Plain(f, depth, 64)
    initialize_(model, digits())
    return model


def ready(model: nn.Module, batch: torch.Tensor) -> nn.Module:
    initialize_(model, batch)
    return model


def fill(parameter: torch.Tensor, value: float) -> None:
    with torch.no_grad():
        parameter.fill_(value)


def scale(parameter: torch.Tensor, factor: float) -> None:
    with torch.no_grad():
        parameter.mul_(factor)


def vanishing() -> nn.Module:
    return Plain(torch.sigmoid, 20, 64)


def unscaled() -> nn.Module:
    return Stream("post", 40)


def forget(model: nn.Module) -> None:
    fill(model.lstm.bias_ih_l0, 0)


def sure(model: nn.Module) -> None:
    fill(model.head.bias, 40)


def chaos(depth: int = 100) -> nn.Module:
    """tanh bounds the signal, and hides that the gradient explodes."""
    model = Plain(torch.tanh, depth, 64)
    for layer in model.layers:
        nn.init.normal_(layer.weight, std=2.5 / 8)
    return model


class Swapped(nn.Module):
    """A weight stored as [in, out], drawn as if it were [out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4096, 32))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(x @ self.weight))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 256)
        self.norm = nn.LayerNorm(256)
        self.head = nn.Linear(256, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embedding(tokens)))


class GroupsIgnored(nn.Module):
    """Depthwise, drawn with the fan of all channels, and no norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16384, 16384, 3, padding=1, groups=16384, bias=False)
        nn.init.normal_(self.conv.weight, std=1 / math.sqrt(16384 * 9))
        self.head = nn.Linear(16384, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


def planted() -> dict[str, tuple[str, str, Callable[[], nn.Module], torch.Tensor]]:
    """By name: the fault, where it is found, the model with it, its batch."""

    def broken(make: Callable[[], nn.Module], fault: Callable[[nn.Module], object]):
        def made() -> nn.Module:
            model = make()
            fault(model)
            return model

        return made

    def twins(model: nn.Module) -> None:
        with torch.no_grad():
            model.layers[2].weight[32:] = model.layers[2].weight[:32]

    def halves(model: nn.Module) -> None:
        with torch.no_grad():
            model.lstm.weight_hh_l0[:16] = model.lstm.weight_hh_l0[16:32]

    def each(factor: float) -> Callable[[nn.Module], None]:
        return lambda m: [scale(layer.weight, factor) for layer in m.layers]

    def in_plain(change: Callable, value: float, f: Callable = F.relu, depth: int = 6):
        """Of the weight of the third of some layers."""
        return broken(lambda: plain(f, depth), lambda m: change(m.layers[2].weight, value))

    def biased(value: float, f: Callable = F.relu):
        return broken(lambda: plain(f), lambda m: fill(m.layers[3].bias, value))

    def in_conv(fault: Callable[[nn.Module], object]):
        return broken(lambda: ready(Convolutions(), image), fault)

    def in_lstm(fault: Callable[[nn.Module], object]):
        return broken(lambda: ready(Recurrent(32), text), fault)

    x, image, text = digits(), images(), tokens()
    third, fourth, last = "layers.2.weight", "layers.3.weight", "layers.39.weight"

    def deep() -> nn.Module:
        model = Plain(F.relu, 40, 64)
        initialize_(model, scheme="he")
        return model

    wide = torch.randn(4, 4096)
    return {
        "nan": ("not finite", "two.weight", in_conv(lambda m: fill(m.two.weight[0], NAN)), image),
        "zero": ("all zero", third, in_plain(fill, 0), x),
        "constant": ("constant", third, in_plain(fill, 0.1), x),
        "twins": ("identical units", third, broken(plain, twins), x),
        "large": ("gain too large", third, in_plain(scale, 30), x),
        "small": ("gain too small", third, in_plain(scale, 1e-3), x),
        "fans": ("fans swapped", "weight", Swapped, wide),
        "groups": ("groups ignored", "conv.weight", GroupsIgnored, torch.randn(2, 16384, 3, 3)),
        "dead": ("dead units", fourth, biased(-9), x),
        "saturated": ("saturated", fourth, biased(9, torch.tanh), x),
        "growth": ("growth with depth", last, broken(deep, each(2.5)), x),
        "decay": ("decay with depth", last, broken(deep, each(0.5)), x),
        "chaos": ("gradient explodes", "layers.0.weight", chaos, x),
        "vanishing": ("gradient vanishes", "layers.0.weight", vanishing, x),
        "unscaled": ("residual branches unscaled", "blocks.39.weight", unscaled, x),
        "norm": ("norm scale zero", "bn0.weight", in_conv(lambda m: fill(m.bn0.weight, 0)), image),
        "forget": ("forget bias below 0.5", "lstm.bias_ih_l0", in_lstm(forget), text),
        "gate": ("gate rank deficient", "lstm.weight_hh_l0", in_lstm(halves), text),
        "logits": ("logits far from uniform", "head.weight", in_conv(sure), image),
        "tied": ("embedding too large for its tied head", "embedding.weight", Tied, text),
    }


@pytest.mark.parametrize("name", planted())
def test_a_planted_fault_is_flagged(name: str) -> None:
    torch.manual_seed(0)
    fault, path, make, batch = planted()[name]
    model = make()
    before = copy.deepcopy(model.state_dict())
    report = audit_init(model, batch)
    assert path in {f.path for f in report.of(fault)}, str(report)
    assert fault in str(report)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", planted())
def test_initialize_repairs_it(name: str) -> None:
    torch.manual_seed(0)
    _, _, make, batch = planted()[name]
    model = make()
    initialize_(model, batch)
    report = audit_init(model, batch)
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (lambda: Plain(F.relu, 3, 64), digits()),
        (Convolutions, images()),
        (lambda: Stream("pre", 6), digits()),
        (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), torch.randn(2, 5, 32)),
        (lambda: nn.Sequential(nn.GRU(8, 16)), torch.randn(3, 2, 8)),
    ],
)
def test_torchs_defaults_of_small_models_pass(model, batch) -> None:
    torch.manual_seed(0)
    report = audit_init(model(), batch)
    assert report.ok, str(report)
    assert str(report) == "audit_init: nothing found"


def test_weights_alone_show_what_they_can() -> None:
    model = plain()
    fill(model.layers[2].weight, 0.1)
    assert audit_init(model).of("constant")[0].path == "layers.2.weight"
    assert audit_init(Mixer(1)).ok


def test_arguments() -> None:
    with pytest.raises(TypeError, match="audit_init: model must be an"):
        audit_init(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="audit_init: model must hold data, got weight without"):
        audit_init(nn.Linear(2, 2, device="meta"))


def test_an_audit_leaves_everything_as_it_was() -> None:
    model, x = Convolutions(), images()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    audit_init(model, x)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.stem.weight.grad is None
    assert model.head.weight.grad.eq(1).all()


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "squeezenet1_1"]
)
def test_no_model_of_torchvision_is_flagged(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    report = audit_init(models.get_model(name, weights=None), torch.randn(2, 3, 96, 96))
    assert report.ok, str(report)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050", "mixer_s32_224"]
)
def test_no_model_of_timm_is_flagged(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    report = audit_init(timm.create_model(name, pretrained=False), torch.randn(2, 3, 224, 224))
    assert report.ok, str(report)
