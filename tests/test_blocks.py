"""The blocks: their formulas, copies, compiled graphs, dropped paths and memory."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from block_cases import CASES, IMAGE, Case
from helpers import HOST_BACKENDS, random
from torch import nn

import gradfuse
from gradfuse.nn import (
    BasicBlock,
    Bottleneck,
    DenseBlock,
    PreActBlock,
    Residual,
    ResidualMLP,
    TransformerBlock,
)

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
# Highway and a bare Residual are torch's ops alone.
on_host = [HOST_BACKENDS, pytest.mark.elsewhere, pytest.mark.usefixtures("backend")]


def marked(marks):
    def decorate(function):
        for mark in marks:
            function = mark(function)
        return function

    return decorate


def made(case: Case, dtype=torch.float64) -> tuple[nn.Module, torch.Tensor]:
    """A block with parameters that are not those of the beginning, and an input."""
    block = case.make().to(dtype)
    with torch.no_grad():
        for i, (name, t) in enumerate([*block.named_parameters(), *block.named_buffers()]):
            if t.ndim == 1 and t.is_floating_point():
                value = random(*t.shape, dtype=dtype, scale=0.3, seed=i)
                t.copy_(value.abs() + 0.5 if name.endswith(("var", "scale")) else value + 0.5)
    return block, random(*case.shape, dtype=dtype, seed=9).requires_grad_()


@marked(on_host)
@each_case
@pytest.mark.parametrize("training", [True, False])
def test_a_block_is_its_formula(case, training):
    block, x = made(case)
    block.train(training)
    leaves = [x, *block.parameters()]
    outputs = block(x), case.plain(block, x)
    weight = random(*outputs[0].shape, dtype=torch.float64, seed=3)
    ours, plain = (torch.autograd.grad((y * weight).sum(), leaves) for y in outputs)
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(ours, plain)
    if training:
        assert torch.autograd.gradcheck(block, (x,), fast_mode=True)


@marked(on_host)
@each_case
def test_a_block_is_copied_pickled_and_computed_in_bfloat16(case):
    block, x = made(case, torch.float32)
    for again in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert repr(again) == repr(block)
        assert torch.equal(again(x), copy.deepcopy(block)(x))
    fresh = case.make()
    fresh.load_state_dict(block.state_dict())
    torch.testing.assert_close(fresh.eval()(x), block.eval()(x))
    y = block.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), fresh(x), rtol=0.1, atol=0.1)


@pytest.mark.backends("cpu")  # torch.compile takes a second a block
@pytest.mark.elsewhere
@pytest.mark.usefixtures("backend")
@each_case
def test_a_block_compiles_to_one_graph(case):
    torch.compiler.reset()
    block, x = made(case, torch.float32)
    eager = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), eager(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for ours, plain in zip(block.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(block.named_buffers()), dict(eager.named_buffers()))


@marked(on_host)
@each_case
def test_fuse_leaves_a_block_as_it_is(case):
    block, x = made(case, torch.float32)
    fused = gradfuse.fuse(nn.Sequential(copy.deepcopy(block), nn.ReLU()))
    torch.testing.assert_close(fused(x), torch.relu(block(x)))


DROPPING = {
    "residual": lambda p: Residual(nn.Linear(8, 8), scale=0.5, drop_path=p),
    "residual that learns": lambda p: Residual(nn.Conv2d(4, 4, 1), scale="zero", drop_path=p),
    "preact": lambda p: PreActBlock(4, 4, drop_path=p),
    "basic": lambda p: BasicBlock(4, 4, activation=None, drop_path=p),
    "bottleneck": lambda p: Bottleneck(4, 1, activation=None, drop_path=p),
    "mlp": lambda p: ResidualMLP(8, 16, drop_path=p),
}


@marked(on_host)
@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_dropped_path_leaves_the_stream(name, memory_format):
    torch.manual_seed(0)
    block = DROPPING[name](0.5)
    if name == "residual that learns":
        nn.init.constant_(block.scale, 0.5)
    x = random(64, 8) if name in ("mlp", "residual") else random(64, *IMAGE[1:])
    if x.ndim == 4:
        x = x.contiguous(memory_format=memory_format)
    whole = DROPPING[name](0.0)
    whole.load_state_dict(block.state_dict())
    branch = whole(x) - x
    y = block(x)
    assert y.is_contiguous(memory_format=memory_format) or x.ndim == 2
    dropped = (y == x).flatten(1).all(1)
    assert 16 < int(dropped.sum()) < 48
    torch.testing.assert_close((y - x)[~dropped], 2 * branch[~dropped], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(block.eval()(x), whole.eval()(x))


@marked(on_host)
@pytest.mark.parametrize("prenorm", [True, False])
def test_dropout_and_dropped_paths_of_a_transformer(prenorm):
    x = random(4, 5, 8)
    plain = TransformerBlock(8, 2, prenorm=prenorm)
    options = {"dropout": 0.3, "attention_dropout": 0.3, "drop_path": 0.3}
    block = TransformerBlock(8, 2, prenorm=prenorm, **options)
    block.load_state_dict(plain.state_dict())
    torch.testing.assert_close(block.eval()(x), plain(x))
    block.train()
    torch.manual_seed(1)
    first, second = block(x), block(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(block(x), first)
    dropped = TransformerBlock(8, 2, drop_path=1.0)
    assert torch.equal(dropped(x), x)


@marked(on_host)
def test_masks_of_a_transformer():
    block, x = TransformerBlock(8, 2, causal=True), random(2, 5, 8)
    free = TransformerBlock(8, 2)
    free.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(x), free(x, is_causal=True))
    past = torch.ones(5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(block(x), free(x, past))
    padding = torch.tensor([True, True, True, False, False]).reshape(1, 1, 1, 5)
    torch.testing.assert_close(block(x, padding), free(x, past & padding))
    added = torch.zeros(1, 1, 1, 5).masked_fill(~padding, -math.inf)
    torch.testing.assert_close(block(x, added), free(x, past & padding))


@marked(on_host)
def test_a_dense_block_forgets_and_counts_once():
    """torch's batch norm counts the batch again when a checkpoint computes it again."""
    x = random(4, 2, 5, 5).requires_grad_()
    efficient = DenseBlock(2, 2, 16, bottleneck=1, dropout=0.3)
    keeping = copy.deepcopy(efficient)
    keeping.memory_efficient = False
    seen = []
    for block in (efficient, keeping):
        held: dict[int, int] = {}

        def pack(t: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        torch.manual_seed(2)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = block(x)
        seen.append((y, sum(held.values())))
        y.square().sum().backward()
    assert seen[0][1] < 0.5 * seen[1][1]
    assert torch.equal(seen[0][0], seen[1][0])
    for a, b in zip(efficient.parameters(), keeping.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(efficient.buffers(), keeping.buffers(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(efficient.eval()(x), efficient(x))
    assert efficient.denselayer16.norm1.num_batches_tracked == 1
