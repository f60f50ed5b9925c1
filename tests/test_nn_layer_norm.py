"""The modules of layer norm, RMS norm and dropped paths: torch's state and semantics."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import HOST_BACKENDS, random
from torch import nn

from gradfuse.nn import AddLayerNorm, AddRMSNorm, DropPath, LayerNorm, RMSNorm

PAIRS = [(LayerNorm, nn.LayerNorm), (RMSNorm, nn.RMSNorm)]
SUMS = [(AddLayerNorm, nn.LayerNorm), (AddRMSNorm, nn.RMSNorm)]


def trained(module: nn.Module) -> nn.Module:
    """With parameters that are not those of the beginning."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(random(*p.shape, seed=20 + i))
    return module


@HOST_BACKENDS
@pytest.mark.parametrize(("ours", "stock"), PAIRS)
@pytest.mark.parametrize("affine", [True, False])
def test_as_torchs(ours, stock, affine, backend):
    a = trained(ours((3, 8), eps=1e-3, elementwise_affine=affine))
    b = stock((3, 8), eps=1e-3, elementwise_affine=affine)
    b.load_state_dict(a.state_dict())
    x, r = random(4, 3, 8), random(4, 3, 8, seed=2)
    torch.testing.assert_close(a(x), b(x))
    y, s = a(x, r)
    torch.testing.assert_close(s, x + r)
    torch.testing.assert_close(y, b(x + r))
    assert isinstance(a, stock)
    a.load_state_dict(b.state_dict())
    twin = pickle.loads(pickle.dumps(copy.deepcopy(a)))
    assert torch.equal(twin(x), a(x))


@HOST_BACKENDS
@pytest.mark.parametrize(("ours", "stock"), SUMS)
def test_norms_of_a_sum(ours, stock, backend):
    a = trained(ours(8, eps=1e-3, p=0.5, drop_prob=0.5))
    b = stock(8, eps=1e-3)
    b.load_state_dict(a.state_dict())
    x, r = random(64, 3, 8), random(64, 3, 8, seed=2)
    a.eval()
    y, s = a(x, r)
    assert torch.equal(s, x + r)
    torch.testing.assert_close(y, b(s))
    a.train()
    y, s = a(x, r)
    torch.testing.assert_close(y, b(s))
    branch = s - r
    dropped = (branch == 0).flatten(1).all(1)
    assert 10 < int(dropped.sum()) < 54
    stays = branch[~dropped]
    assert 0.3 < (stays == 0).float().mean() < 0.7
    torch.testing.assert_close(stays[stays != 0], 4 * x[~dropped][stays != 0], rtol=1e-4, atol=1e-4)
    a.drop_prob, a.p = 0.0, 0.0
    assert torch.equal(a(x, r)[1], x + r)
    alone = ours(8, prenorm=False)
    torch.testing.assert_close(alone(x, r), alone(x + r, None))
    wide = ours(8, residual_dtype=torch.float32, dtype=torch.bfloat16)
    y, s = wide(x.bfloat16(), r)
    assert (y.dtype, s.dtype) == (torch.bfloat16, torch.float32)
    assert "p=0.0, drop_prob=0.0" in repr(a)


@HOST_BACKENDS
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_a_dropped_path_is_selected(mode, backend):
    torch.manual_seed(1)
    x = torch.full((200, 4), math.inf)
    path = DropPath(0.25, mode)
    seen = {0.0: 0, math.inf: 0}
    for _ in range(40 if mode == "batch" else 1):
        y = path(x)
        for sample in y if mode == "row" else y[:1]:
            (value,) = set(sample.tolist())
            seen[value] += 1
        if mode == "batch":
            assert len(set(y[:, 0].tolist())) == 1
    share = seen[0.0] / sum(seen.values())
    assert 0.05 < share < 0.45
    ones = path(torch.ones(200, 2, 2))
    assert set(ones.unique().tolist()) <= {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(DropPath(0.5, scale_by_keep=False)(torch.ones(50, 1)).unique(),
                       torch.tensor([0.0, 1.0]))  # fmt: skip
    assert path.eval()(x) is x
    path.drop_prob = 1.0
    assert not path.train()(x).any()
    assert not AddRMSNorm(4, drop_prob=1.0)(x, torch.zeros(200, 4))[1].any()


@pytest.mark.no_kernel
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AddLayerNorm(4, p=1.5), "AddLayerNorm: p must lie between 0 and 1, got 1.5"),
        (lambda: AddRMSNorm(4, drop_prob=-1), "drop_prob must lie between 0 and 1, got -1"),
        (lambda: DropPath(2.0), "DropPath: drop_prob must lie between 0 and 1, got 2.0"),
        (lambda: DropPath(0.1, "column"), "drop_mode must be 'row' or 'batch', got 'column'"),
        (lambda: DropPath(0.5)(torch.tensor(1.0)), "drop_path needs an input of samples"),
    ],
)
def test_errors(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@HOST_BACKENDS
def test_a_block_trains_as_torchs(backend):
    """A pre-norm block, with gradients of everything."""
    torch.manual_seed(0)
    norm, linear = AddLayerNorm(8), nn.Linear(8, 8)
    x, r = random(5, 8).requires_grad_(), random(5, 8, seed=2).requires_grad_()
    y, s = norm(x, r)
    loss = (s + F.gelu(linear(y))).square().sum()
    leaves = [x, r, *norm.parameters(), *linear.parameters()]
    ours = torch.autograd.grad(loss, leaves)
    s = x + r
    y = F.layer_norm(s, (8,), norm.weight, norm.bias)
    theirs = torch.autograd.grad((s + F.gelu(linear(y))).square().sum(), leaves)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
