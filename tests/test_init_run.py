"""initialize_: what the run leaves behind, which is nothing, and the two proofs at small size."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from init_models import Mixer, Plain, Recurrent, Stream, digits
from processes import on_ranks
from torch import nn

from gradfuse.init import initialize_

ACTIVATIONS = {
    "relu": F.relu, "leaky_relu": F.leaky_relu, "gelu": F.gelu, "silu": F.silu, "mish": F.mish,
    "hardswish": F.hardswish, "elu": F.elu, "selu": F.selu, "tanh": torch.tanh,
    "softplus": F.softplus, "sigmoid": torch.sigmoid,
}  # fmt: skip


class Busy(nn.Module):
    """Batch norm, dropout, a hook's target and attention, which has a fused path."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(F.relu(self.bn(self.conv(x))))
        x = F.dropout(x, 0.1)  # random in any mode
        return self.head(self.attention(x.flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize("training", [True, False])
def test_the_run_leaves_nothing_behind(training: bool) -> None:
    model = Busy().train(training)
    model.bn.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    calls: list[int] = []
    model.conv.register_forward_hook(lambda *a: calls.append(1))
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    x = torch.randn(2, 3, 8, 8)
    generator = torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    initialize_(model, x, generator=generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert model.conv.weight.grad is None
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_the_default_generator_advances_by_the_drawing_alone() -> None:
    model, x = Busy(), torch.randn(2, 3, 8, 8)
    torch.manual_seed(5)
    initialize_(model, x)
    with_a_run = torch.get_rng_state()
    torch.manual_seed(5)
    initialize_(model)
    assert torch.equal(torch.get_rng_state(), with_a_run)


def test_same_seed_same_weights_whatever_the_threads(threads) -> None:
    x, seen = digits(), set()

    def activation(z: torch.Tensor) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        return F.silu(z)

    def weights(count: int) -> list[torch.Tensor]:
        threads(count)
        model = Plain(activation, 60, 64)
        initialize_(model, x, generator=torch.Generator().manual_seed(7))
        assert torch.get_num_threads() == count
        return list(model.parameters())

    for one, four in zip(weights(1), weights(4), strict=True):
        assert torch.equal(one, four)
    assert seen == {1}


@pytest.mark.parametrize("at", [1, 2])
def test_a_run_that_fails_leaves_the_model_as_it_was(at: int) -> None:
    """At the first call nothing is drawn yet; at the second all is."""

    class Failing(Plain):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == at:
                raise RuntimeError("no more")
            return super().forward(x)

    model = Failing(F.relu, 3, 16)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="no more"):
        initialize_(model, digits(8))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU()).to(dtype)
    report = initialize_(model, scheme="he", generator=torch.Generator().manual_seed(0))
    assert model[0].weight.dtype == dtype
    assert report["0.weight"].rms_after == pytest.approx(math.sqrt(2 / 256), rel=0.02)
    full = nn.Sequential(nn.Linear(256, 128), nn.ReLU())
    initialize_(full, scheme="he", generator=torch.Generator().manual_seed(0))
    if dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(model[0].weight, full[0].weight.to(dtype))


def test_bfloat16_is_corrected_by_data() -> None:
    model = Plain(F.gelu, 50, 64).bfloat16()
    report = initialize_(model, digits().bfloat16())
    assert all(0.5 < f < 2 for f in report.forward.values())


def test_meta_device_reports_without_drawing() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 2))
    state = torch.get_rng_state()
    report = initialize_(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert report["0.weight"].gain == pytest.approx(1.5335, rel=1e-3)
    assert math.isnan(report["0.weight"].rms_after)
    by_run = initialize_(model, torch.empty(4, 64, device="meta"))
    assert by_run["0.weight"].gain == report["0.weight"].gain
    with pytest.raises(ValueError, match=r"must hold data for scheme 'lsuv', got 0\.weight"):
        initialize_(model, torch.empty(4, 64, device="meta"), scheme="lsuv")


def initialize_shards(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    whole = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    for m in (model[0], model[2]):
        for name in ("weight", "bias"):
            sharded = distribute_tensor(getattr(m, name).detach(), mesh, [Shard(0)])
            setattr(m, name, nn.Parameter(sharded))
    report = initialize_(model, generator=torch.Generator().manual_seed(1))
    expected = initialize_(whole, generator=torch.Generator().manual_seed(1))
    assert report.rows[0].rms_after == expected.rows[0].rms_after
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b)
    with pytest.raises(ValueError, match="example_inputs must be None for a model of DTensors"):
        initialize_(model, torch.zeros(1, 16))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_shards_of_dtensors_are_those_of_the_whole(tmp_path: Path) -> None:
    on_ranks(2, initialize_shards, tmp_path)


def test_inputs_may_be_a_tuple_or_a_mapping() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
            return F.silu(self.a(x)) * scale

    for inputs in (torch.randn(4, 8), (torch.randn(4, 8),), {"x": torch.randn(4, 8), "scale": 2.0}):
        assert "silu" in initialize_(Two(), inputs)["a.weight"].why


def measured(model: nn.Module, x: torch.Tensor) -> tuple[list[float], list[float]]:
    """rms of each hidden layer's output, and of the gradient there over that at the last."""
    outputs: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda m, i, o: outputs.append(o)) for layer in model.layers
    ]
    logits = model(x)
    for handle in handles:
        handle.remove()
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    grads = torch.autograd.grad(logits, outputs, cotangent)
    sizes = [float(g.double().square().mean().sqrt()) for g in grads]
    forward = [float(o.detach().double().square().mean().sqrt()) for o in outputs]
    return forward, [s / sizes[-1] for s in sizes]


@pytest.mark.parametrize("name", ["relu", "elu", "sigmoid"])
def test_1000_plain_layers_keep_both_passes(name: str) -> None:
    """Digits that the correction has not seen, and torch's default for comparison."""
    x = digits(320)
    model = Plain(ACTIVATIONS[name], 1000, 128)
    initialize_(model, x[:256], generator=torch.Generator().manual_seed(0))
    forward, backward = measured(model, x[256:])
    assert min(forward) > 0.1
    assert max(forward) < 10
    assert min(backward) > 0.1
    assert max(backward) < 10


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_200_plain_layers_keep_both_passes(name: str) -> None:
    x = digits(320)
    model = Plain(ACTIVATIONS[name], 200, 128)
    initialize_(model, x[:256], generator=torch.Generator().manual_seed(0))
    forward, backward = measured(model, x[256:])
    assert min(forward + backward) > 0.1
    assert max(forward + backward) < 10


def test_the_gain_alone_does_not_do_100_layers_of_silu() -> None:
    x = digits(128)
    x = x / x.square().mean().sqrt()
    model = Plain(F.silu, 100, 256)
    initialize_(model, x, scheme="he", generator=torch.Generator().manual_seed(0))
    assert max(measured(model, x)[0]) > 1e4


def test_a_shallow_plain_net_keeps_biases_of_0() -> None:
    model = Plain(F.relu, 5, 64)
    report = initialize_(model, digits())
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith("bias"))
    assert all(f == pytest.approx(1, rel=1e-3) for f in report.forward.values())
    assert "corrected by data" in report["layers.2.weight"].why


@pytest.mark.parametrize("kind", ["pre", "post", "after"])
def test_1000_residual_blocks_start_at_the_log_of_the_classes(kind: str) -> None:
    x = digits()
    model = Stream(kind, 1000, 32)
    assert not bool((model(x).detach().abs() < 1e6).all())  # torch's default: inf, or on its way
    initialize_(model, x, generator=torch.Generator().manual_seed(0))
    logits = model(x)
    loss = F.cross_entropy(logits, torch.arange(64) % 10)
    assert loss.item() < math.log(10) + 2
    grads = torch.autograd.grad(loss, [b.weight for b in model.blocks])
    sizes = [float(g.norm()) for g in grads]
    assert max(sizes) / min(sizes) < 100


def test_200_residual_blocks_learn() -> None:
    x, y = digits(64), torch.arange(64) % 10
    for kind in ("pre", "post"):
        model = Stream(kind, 200, 32)
        initialize_(model, x, generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(40):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert loss.item() < 0.5, kind


def test_a_report_reads_as_a_table() -> None:
    report = initialize_(Recurrent(8))
    assert "lstm.bias_ih_l0" in str(report)
    assert "forget gate 1" in str(report)
    assert report.to_dict()["rows"][0]["path"] == "embedding.weight"
    assert repr(report).startswith("InitReport(scheme='auto', parameters=11")
    with pytest.raises(KeyError):
        report["no.such.path"]


def test_no_model_library_is_imported() -> None:
    code = (
        "import sys, gradfuse.init; "
        "assert not {'timm', 'torchvision', 'transformers', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_a_stem_and_the_head_of_a_normed_net_keep_their_rule() -> None:
    report = initialize_(Mixer(2), torch.randint(50, (2, 8)))
    assert report.forward == {}
