"""One block of each kind for the tests, beside its formula in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

IMAGE, ROWS, TOKENS = (3, 4, 5, 5), (6, 8), (3, 5, 8)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of an input
    plain: Callable[[nn.Module, Tensor], Tensor]  # the formula, with the block's parameters


def _bn(bn: nn.Module, x: Tensor) -> Tensor:
    if bn.training:
        return F.batch_norm(x, None, None, bn.weight, bn.bias, True, 0.0, bn.eps)
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)


def _shortcut(m: nn.Module, x: Tensor) -> Tensor:
    return x if m.downsample is None else _bn(m.downsample[1], m.downsample[0](x))


def _basic(m: nn.Module, x: Tensor) -> Tensor:
    h = F.relu(_bn(m.bn1, m.conv1(x)))
    return F.relu(_bn(m.bn2, m.conv2(h)) + _shortcut(m, x))


def _bottleneck(m: nn.Module, x: Tensor) -> Tensor:
    h = F.silu(_bn(m.bn1, m.conv1(x)))
    h = F.silu(_bn(m.bn2, m.conv2(h)))
    return F.silu(_bn(m.bn3, m.conv3(h)) + _shortcut(m, x))


def _preact(m: nn.Module, x: Tensor) -> Tensor:
    h = F.relu(_bn(m.bn1, x))
    shortcut = x if m.downsample is None else m.downsample(h)
    return shortcut + m.conv2(F.relu(_bn(m.bn2, m.conv1(h))))


def _dense(m: nn.Module, x: Tensor) -> Tensor:
    for layer in m.children():
        h = layer.conv1(F.relu(_bn(layer.norm1, x)))
        x = torch.cat([x, layer.conv2(F.relu(_bn(layer.norm2, h)))], 1)
    return x


def _highway(m: nn.Module, x: Tensor) -> Tensor:
    gate = torch.sigmoid(m.gate(x))
    return F.relu(m.transform(x)) * gate + x * (1 - gate)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


def _mlp(m: nn.Module, x: Tensor) -> Tensor:
    return m.fc2(F.gelu(m.fc1(x)))


def _attention(m: nn.Module, x: Tensor, is_causal: bool) -> Tensor:
    n, length, dim = x.shape
    q, k, v = (
        part.reshape(n, length, m.num_heads, -1).transpose(1, 2) for part in m.qkv(x).chunk(3, -1)
    )
    scores = q @ k.mT / (dim // m.num_heads) ** 0.5
    if is_causal:
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return m.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, dim))


def _prenorm(m: nn.Module, x: Tensor) -> Tensor:
    h = x + _attention(m.attn, _norm(m.norm1, x), m.causal)
    return h + _mlp(m.mlp, _norm(m.norm2, h))


def _postnorm(m: nn.Module, x: Tensor) -> Tensor:
    h = _norm(m.norm1, x + _attention(m.attn, x, m.causal))
    return _norm(m.norm2, h + _mlp(m.mlp, h))


CASES = {
    "residual": Case(
        lambda: Residual(nn.Linear(8, 8), norm=nn.BatchNorm1d(8), activation="relu", scale=0.5),
        ROWS,
        lambda m, x: x + 0.5 * m.branch(F.relu(_bn(m.norm, x))),
    ),
    "residual of layer norm": Case(
        lambda: Residual(nn.Linear(8, 8), norm=nn.LayerNorm(8), activation="gelu", scale="zero"),
        TOKENS,
        lambda m, x: x + m.scale * m.branch(F.gelu(_norm(m.norm, x))),
    ),
    "residual alone": Case(lambda: Residual(nn.Linear(8, 8)), ROWS, lambda m, x: x + m.branch(x)),
    "basic": Case(lambda: BasicBlock(4, 4), IMAGE, _basic),
    "basic, smaller": Case(lambda: BasicBlock(4, 6, 2), IMAGE, _basic),
    "bottleneck": Case(lambda: Bottleneck(4, 2, 2, activation="silu"), IMAGE, _bottleneck),
    "preact": Case(lambda: PreActBlock(4, 4), IMAGE, _preact),
    "preact, smaller": Case(lambda: PreActBlock(4, 6, 2), IMAGE, _preact),
    "dense": Case(lambda: DenseBlock(4, 2, 3), IMAGE, _dense),
    "highway": Case(lambda: Highway(8), ROWS, _highway),
    "transformer": Case(lambda: TransformerBlock(8, 2), TOKENS, _prenorm),
    "transformer of layer norm": Case(
        lambda: TransformerBlock(8, 2, norm="layer", causal=True, mlp_ratio=1.5), TOKENS, _prenorm
    ),
    "transformer, post-norm": Case(
        lambda: TransformerBlock(8, 2, norm="layer", prenorm=False), TOKENS, _postnorm
    ),
    "mlp": Case(lambda: ResidualMLP(8, 16), TOKENS, lambda m, x: x + _mlp(m.mlp, _norm(m.norm, x))),
}
