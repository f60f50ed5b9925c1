"""The blocks' first weights, state_dicts and errors."""

from __future__ import annotations

import math

import pytest
import torch
from block_cases import CASES
from helpers import random
from torch import nn
from torch._subclasses import FakeTensorMode

import gradfuse
from gradfuse.init import initialize_
from gradfuse.nn import (
    BasicBlock,
    Bottleneck,
    DenseBlock,
    Highway,
    PreActBlock,
    Residual,
    ResidualMLP,
    TransformerBlock,
)
from gradfuse.nn.blocks import parts


def test_initialize_sees_through_the_fused_ops():
    net = nn.Sequential(
        nn.Linear(8, 8), *[TransformerBlock(8, 2) for _ in range(3)], Highway(8, gate_bias=-3.0)
    )
    rows = {row.path: row for row in initialize_(net, random(4, 5, 8)).rows}
    for end, fan_in in (("attn.proj", 8), ("mlp.fc2", 32)):
        assert rows[f"2.{end}.weight"].rule == f"auto, fan_in {fan_in}, 1/sqrt(6)"
    assert rows["2.mlp.fc1.weight"].why == "gelu follows; He 2015"
    assert rows["2.norm2.weight"].rule == "1"
    assert set(net[4].gate.bias.tolist()) == {-3.0}
    assert rows["4.gate.weight"].gain == 1.0

    images = random(4, 4, 5, 5)
    net = nn.Sequential(BasicBlock(4, 4), PreActBlock(4, 4), nn.Conv2d(4, 2, 1))
    rows = {row.path: row for row in initialize_(net, images, residual="zero").rows}
    assert rows["0.conv1.weight"].why == "relu follows; He 2015"
    assert rows["0.bn2.weight"].rms_after == 0.0
    assert rows["1.conv2.weight"].rms_after == 0.0

    net = nn.Sequential(*[Residual(nn.Linear(8, 8), scale="zero") for _ in range(3)])
    rows = {row.path: row for row in initialize_(net, random(4, 8), residual="zero").rows}
    assert rows["1.branch.weight"].rms_after > 0.1  # its scale is 0: both would never move
    rows = {row.path: row for row in initialize_(net, random(4, 8), scheme="skipinit").rows}
    assert rows["1.scale"].why == "De 2020: SkipInit"
    post = [TransformerBlock(8, 2, norm="layer", prenorm=False) for _ in range(2)]
    rows = {
        row.path: row
        for row in initialize_(nn.Sequential(*post), random(4, 5, 8), scheme="deepnorm").rows
    }
    assert rows["0.mlp.fc2.weight"].why.startswith("Wang 2022: beta of 2 layers")


def test_a_new_block_is_drawn_by_the_gain_of_its_activation():
    torch.manual_seed(0)
    block = Bottleneck(64, 64, activation="gelu")
    torch.testing.assert_close(block.conv2.weight.std().item(), 1.5335 / 24, rtol=0.02, atol=0)
    mlp = ResidualMLP(64, 256, activation="gelu_tanh").mlp
    torch.testing.assert_close(mlp.fc1.weight.std().item(), 1.5335 / 8, rtol=0.02, atol=0)
    torch.testing.assert_close(mlp.fc2.weight.std().item(), 1 / 16, rtol=0.02, atol=0)
    assert not mlp.fc2.bias.any()
    preact = PreActBlock(64, 64)
    torch.testing.assert_close(preact.conv1.weight.std().item(), 2**0.5 / 24, rtol=0.02, atol=0)
    torch.testing.assert_close(preact.conv2.weight.std().item(), 1 / 24, rtol=0.02, atol=0)
    highway = Highway(64, gate_bias=-3.0)
    assert set(highway.gate.bias.tolist()) == {-3.0}
    before = highway.gate.weight.clone()
    nn.init.zeros_(highway.gate.bias)
    highway.reset_parameters()
    assert set(highway.gate.bias.tolist()) == {-3.0}
    assert not torch.equal(highway.gate.weight, before)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_block_is_made_without_data(case):
    parts._gain.cache_clear()
    with FakeTensorMode():
        case.make()
    parts._gain.cache_clear()
    with torch.device("meta"):
        block = case.make()
    assert all(p.is_meta for p in block.parameters())
    block.to_empty(device="cpu")
    for module in block.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert block(random(*case.shape)).isfinite().all()


@pytest.mark.parametrize(("name", "stock"), [("BasicBlock", (4, 6, 2)), ("Bottleneck", (8, 2, 1))])
def test_torchvisions_state_dict_loads(name, stock):
    resnet = pytest.importorskip("torchvision").models.resnet
    inputs, channels, stride = stock
    ours = getattr(gradfuse.nn, name)(inputs, channels, stride)
    theirs = getattr(resnet, name)(inputs, channels, stride)
    if ours.downsample is not None:
        norm = nn.BatchNorm2d(channels)
        theirs.downsample = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), norm)
    ours.load_state_dict(theirs.state_dict())
    x = random(3, inputs, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_the_state_dict_of_torchvisions_dense_block_loads():
    densenet = pytest.importorskip("torchvision").models.densenet
    ours, theirs = DenseBlock(4, 2, 3), densenet._DenseBlock(3, 4, 4, 2, 0.0)
    ours.load_state_dict(theirs.state_dict())
    x = random(3, 4, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_state_dict_of_timms_transformer_loads():
    timm = pytest.importorskip("timm.models.vision_transformer")
    ours = TransformerBlock(8, 2, norm="layer")
    theirs = timm.Block(8, 2, qkv_bias=True)
    ours.load_state_dict(theirs.state_dict())
    x = random(3, 5, 8)
    theirs.norm1.eps = theirs.norm2.eps = ours.norm1.eps
    torch.testing.assert_close(ours(x), theirs(x))


LINEAR = nn.Linear(4, 4)


@pytest.mark.no_kernel
@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Residual(torch.relu), TypeError, "Residual: branch must be an nn.Module, got"),
        (lambda: Residual(LINEAR, norm="layer"), TypeError, "norm must be an nn.Module, got 'lay"),
        (lambda: Residual(LINEAR, activation="swish"), ValueError, "activation must be None, 're"),
        (lambda: Residual(LINEAR, scale="one"), ValueError, "scale must be None, a number or 'ze"),
        (lambda: Residual(LINEAR, scale=True), TypeError, "scale must be a number, got True"),
        (lambda: Residual(LINEAR, scale=math.nan), ValueError, "scale must be finite, got nan"),
        (lambda: Residual(LINEAR, drop_path=1.5), ValueError, "drop_path must lie between 0 and 1"),
        (lambda: Residual(LINEAR, drop_path="a"), TypeError, "drop_path must be a number, got 'a'"),
        (
            lambda: Residual(LINEAR, norm=gradfuse.nn.BatchNormAct1d(4), activation="gelu"),
            ValueError,
            "activation must be None beside a norm that has its own, got 'gelu'",
        ),
        (
            lambda: Residual(nn.Linear(4, 1))(torch.ones(2, 4)),
            ValueError,
            r"branch must return its input's shape \[2, 4\], got \[2, 1\]",
        ),
        (
            lambda: Residual(nn.LSTM(4, 4))(torch.ones(2, 4)),
            TypeError,
            "branch must return a Tensor, got tuple",
        ),
        (lambda: BasicBlock(0, 4), ValueError, "BasicBlock: in_channels must be >= 1, got 0"),
        (lambda: Bottleneck(4, True), TypeError, "channels must be an int, got True"),
        (lambda: PreActBlock(4, 4, 1.0), TypeError, "stride must be an int, got 1.0"),
        (lambda: PreActBlock(4, 4, activation="x"), ValueError, "PreActBlock: activation must be"),
        (lambda: DenseBlock(4, 4, 0), ValueError, "DenseBlock: layers must be >= 1, got 0"),
        (lambda: DenseBlock(4, 4, 1, dropout=-1), ValueError, "dropout must lie between 0 and 1"),
        (lambda: Highway(4.0), TypeError, "Highway: dim must be an int, got 4.0"),
        (lambda: Highway(4, gate_bias=None), TypeError, "gate_bias must be a number, got None"),
        (lambda: TransformerBlock(8, 3), ValueError, "num_heads must divide dim 8, got 3"),
        (lambda: TransformerBlock(8, 2, norm="batch"), ValueError, "norm must be 'rms' or 'layer'"),
        (lambda: TransformerBlock(8, 2, mlp_ratio=0), ValueError, "mlp_ratio must give a hidden"),
        (lambda: TransformerBlock(8, 2, dropout=2), ValueError, "dropout must lie between 0 and 1"),
        (
            lambda: TransformerBlock(8, 2)(torch.ones(5, 8)),
            ValueError,
            r"input must be \[N, L, 8\], got \[5, 8\]",
        ),
        (lambda: TransformerBlock(8, 2)(None), TypeError, "input must be a Tensor, got None"),
        (lambda: ResidualMLP(8, 0), ValueError, "ResidualMLP: hidden must be >= 1, got 0"),
    ],
)
def test_errors(make, error, match):
    with pytest.raises(error, match=match):
        make()
