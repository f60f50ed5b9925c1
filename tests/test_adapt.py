"""adapt_statistics: exact over batches, for every kind of batch norm, and nothing else changes."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import random
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradfuse
from gradfuse import adapt_statistics
from gradfuse.adapt import moments as moments_of
from gradfuse.nn import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d

pytestmark = [pytest.mark.backends("cpu", "reference"), pytest.mark.elsewhere]


def uneven(*shape: int, parts: int = 4) -> list[torch.Tensor]:
    """Batches of unequal sizes, each about another mean."""
    return [3.0 + i + (1 + i) * random(3 + 5 * i, *shape, seed=i) for i in range(parts)]


def timms() -> nn.Module:
    return pytest.importorskip("timm.layers").BatchNormAct2d(6)


NORMS = {
    "1d": (lambda: nn.BatchNorm1d(6), (6,)),
    "1d of sequences": (lambda: nn.BatchNorm1d(6), (6, 5)),
    "2d": (lambda: nn.BatchNorm2d(6), (6, 3, 2)),
    "3d": (lambda: nn.BatchNorm3d(6), (6, 3, 2, 2)),
    "sync": (lambda: nn.SyncBatchNorm(6), (6, 3, 2)),
    "act 1d": (lambda: BatchNormAct1d(6), (6,)),
    "act 2d": (lambda: BatchNormAct2d(6, momentum=None), (6, 3, 2)),
    "act 3d": (lambda: BatchNormAct3d(6), (6, 3, 2, 2)),
    "fused": (lambda: gradfuse.fuse(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())), (6, 3, 2)),
    "timm": (timms, (6, 3, 2)),
    "timm, fused": (lambda: gradfuse.fuse(nn.Sequential(timms())), (6, 3, 2)),
    "compiled": (lambda: torch.compile(nn.Sequential(nn.BatchNorm2d(6)), backend="eager"),
                 (6, 3, 2)),
}  # fmt: skip


def norm_of(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


@pytest.mark.parametrize("kind", NORMS)
def test_exact_as_one_batch(backend, kind: str) -> None:
    make, shape = NORMS[kind]
    model, batches = make(), uneven(*shape)
    norm = norm_of(model)
    model(batches[0])  # compiled before it is adapted, and with statistics of its own
    report = adapt_statistics(model, batches)
    whole = torch.cat(batches).double().transpose(0, 1).flatten(1)
    for found, truth in ((norm.running_mean, whole.mean(1)), (norm.running_var, whole.var(1))):
        np.testing.assert_allclose(found.numpy(), truth.numpy(), rtol=2 * 2.0**-24)
    assert norm.num_batches_tracked == 4
    assert report.rows[0].samples == whole.shape[1]


def test_compiled_code_does_not_pass_by_the_hooks(backend) -> None:
    """Code for the modes of the run is there already, from before the hooks were."""
    torch.compiler.reset()
    model = nn.Sequential(nn.BatchNorm1d(6)).eval()
    model[0].train()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(random(8, 6))
    assert adapt_statistics(compiled, [random(8, 6)]).left == []


def test_large_inputs_are_summed_in_parts(backend, monkeypatch) -> None:
    batches, plain, parts = uneven(6, 4, 4), nn.BatchNorm2d(6).double(), nn.BatchNorm2d(6).double()
    adapt_statistics(plain, [b.double() for b in batches])
    monkeypatch.setattr(moments_of, "CHUNK", 7 * 96)
    adapt_statistics(parts, [b.double() for b in batches])
    torch.testing.assert_close(parts.running_var, plain.running_var, rtol=1e-14, atol=0)
    assert not torch.equal(parts.running_var, plain.running_var)


def test_as_update_bn_where_batches_are_alike(backend) -> None:
    """torch's takes the mean of variances, which leaves out that the batches' means differ."""
    x = random(8, 6, seed=3)
    ours, stock = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
    adapt_statistics(ours, [x])
    torch.optim.swa_utils.update_bn([x], stock)
    torch.testing.assert_close(ours.state_dict(), stock.state_dict())
    adapt_statistics(ours, uneven(6))
    torch.optim.swa_utils.update_bn(uneven(6), stock)
    assert (ours.running_var > stock.running_var).all()


@pytest.mark.parametrize("reset", [True, False])
def test_exponential_as_torchs(backend, reset: bool) -> None:
    norm, stock, batches = nn.BatchNorm1d(6), nn.BatchNorm1d(6, momentum=0.3), uneven(6)
    adapt_statistics(norm, batches, momentum=0.3, reset=reset)
    if reset:
        stock.momentum = 1.0
        stock(batches[0])
        stock.momentum = 0.3
    for batch in batches[reset:]:
        stock(batch)
    torch.testing.assert_close(norm.state_dict(), stock.state_dict())


@pytest.mark.parametrize(("momentum", "worth"), [(0.1, 19), (0.5, 3), (None, 5)])
def test_old_statistics_count_as_the_batches_they_average(backend, momentum, worth) -> None:
    old, new = [random(10, 6, seed=s) for s in range(worth)], [5.0 + 2.0 * random(10, 6, seed=99)]
    norm, whole = nn.BatchNorm1d(6, momentum=momentum), nn.BatchNorm1d(6)
    adapt_statistics(norm, old)
    norm.num_batches_tracked.fill_(5)
    adapt_statistics(norm, new, reset=False)
    adapt_statistics(whole, old + new)
    torch.testing.assert_close(norm.running_mean, whole.running_mean)
    torch.testing.assert_close(norm.running_var, whole.running_var)
    assert norm.num_batches_tracked == 6


class Busy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn, self.second = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.bn2, self.unused = BatchNormAct1d(3), nn.BatchNorm1d(2)
        self.untracked = nn.BatchNorm1d(3, track_running_stats=False)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.second(F.relu(self.bn(self.drop(self.first(x))))) + torch.rand(())
        return self.untracked(self.bn2(input=x))


@pytest.mark.parametrize("training", [True, False])
def test_nothing_else_changes(backend, training: bool) -> None:
    model = Busy().train(training)
    model.bn.train(not training)
    model.first.weight.grad = torch.ones(6, 4)
    seen: list[int] = []
    model.bn.register_forward_pre_hook(lambda m, a: (seen.append(1), a[0] + 1.0)[1:])
    before = copy.deepcopy(model)
    data = TensorDataset(random(40, 4), torch.zeros(40))
    state = torch.get_rng_state()
    report = adapt_statistics(model, DataLoader(data, batch_size=8, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(seen) == 5
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert hooks == [(0, int(m is model.bn)) for m in model.modules()]
    changed = {
        n for n, t in before.state_dict().items() if not torch.equal(t, model.state_dict()[n])
    }
    kept = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{bn}.{name}" for bn in ("bn", "bn2") for name in kept}
    assert torch.equal(model.first.weight.grad, torch.ones(6, 4))
    assert all(p.requires_grad for p in model.parameters())
    # Dropout was off, and the user's hook came first.
    truth = model.first(data.tensors[0]).mean(0) + 1.0
    torch.testing.assert_close(model.bn.running_mean, truth)
    assert [row.path for row in report.rows] == ["bn", "bn2", "unused"]
    assert [row.path for row in report.left] == ["unused"]


def test_later_norms_see_what_batches_make_of_earlier_ones(backend) -> None:
    """The second norm's input has variance 1 on shifted data, though the old statistics are off."""
    model = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6)).eval()
    adapt_statistics(model, [100.0 + 50.0 * random(64, 6, seed=s) for s in range(3)])
    torch.testing.assert_close(model[1].running_var, torch.full((6,), 192 / 191))
    assert model[1].running_mean.abs().max() < 1e-5


def test_shapes_of_batches(backend) -> None:
    x, made = random(8, 6), []
    for batch in (x, (x, 1), [x], {"input": x}):
        norm = nn.BatchNorm1d(6)
        adapt_statistics(norm, iter([batch]))
        made.append(norm.running_mean)
    for mean in made:
        assert torch.equal(mean, made[0])
    norm = nn.BatchNorm1d(6)
    adapt_statistics(nn.DataParallel(norm), [x])
    assert torch.equal(norm.running_mean, made[0])


def test_the_report(backend) -> None:
    norm = nn.BatchNorm1d(2, eps=1e-30)
    norm.running_mean.copy_(torch.tensor([0.0, 1.0]))
    norm.running_var.copy_(torch.tensor([4.0, 1.0]))
    report = adapt_statistics(norm, [torch.tensor([[2.0, 0.0], [4.0, 2.0]])])
    row = report.rows[0]
    assert (row.path, row.samples, row.largest_shift) == ("", 2, 1.5)
    assert row.mean_shift == pytest.approx(1.5 / math.sqrt(2))
    assert row.log_ratio == pytest.approx((math.log(2 / 4) + math.log(2)) / 2)
    assert report.to_dict()["rows"][0]["samples"] == 2
    assert "1 batch norms, 0 left as they were, 1 batches" in str(report)
    assert repr(report) == "AdaptReport(batch_norms=1, left=0, batches=1)"


def restored(model: nn.Module, batches: list, error: type[Exception], says: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=says):
        adapt_statistics(model, batches)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert model.training


def test_errors_name_the_layer_and_restore(backend) -> None:
    x = random(8, 4)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3), nn.BatchNorm1d(3))
    restored(model, [x, x * math.nan], RuntimeError, "inputs of 1 must be finite.* in batch 2")
    with torch.no_grad():
        model[2].weight[0, 0] = math.inf
    restored(model, [x], RuntimeError, "the inputs of 3 must be finite, got NaN or inf in batch 1")
    restored(nn.Sequential(nn.BatchNorm1d(4)), [x, x[:1]], RuntimeError,
             "expected 0 to take batch 2, got ValueError: Expected more than 1 value")  # fmt: skip
    restored(nn.Sequential(nn.BatchNorm1d(4)), [x, None], RuntimeError, "batch 2, got AttributeErr")
    restored(nn.BatchNorm1d(4), [()], RuntimeError, "expected BatchNorm1d to take batch 1, got Typ")
    restored(nn.Sequential(nn.BatchNorm2d(4)), [x], RuntimeError, "expected 4D input")
    restored(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(5, 2)), [x], RuntimeError, "mat1 and mat2")
    restored(nn.Sequential(nn.BatchNorm1d(4).half()), [(x * 1e3).half()], RuntimeError,
             "statistics of 0 must be finite in torch.float16")  # fmt: skip


@pytest.mark.no_kernel
@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: adapt_statistics(3, []), TypeError, "model must be an nn.Module, got int"),
        (lambda: adapt_statistics(nn.BatchNorm1d(2), 3), TypeError, "loader must be an iterable"),
        (lambda: adapt_statistics(nn.BatchNorm1d(2), torch.ones(3, 2)), TypeError, "got Tensor"),
        (lambda: adapt_statistics(nn.BatchNorm1d(2), []), ValueError, "at least one batch, got no"),
        (lambda: adapt_statistics(nn.Linear(2, 2), []), ValueError, "must have a batch norm"),
        (lambda: adapt_statistics(nn.BatchNorm1d(2), [], 0.0), ValueError, r"None or in \(0, 1\]"),
        (lambda: adapt_statistics(nn.BatchNorm1d(2), [], True), ValueError, "got True"),
        (lambda: adapt_statistics(nn.LazyBatchNorm1d(), []), ValueError, "got a lazy module"),
        (lambda: adapt_statistics(nn.BatchNorm1d(2, device="meta"), []), ValueError, "the meta de"),
    ],
)
def test_wrong_arguments(call, error, says) -> None:
    with pytest.raises(error, match=says):
        call()


@pytest.mark.no_kernel
def test_ranks_of_a_sync_batch_norm_are_merged(monkeypatch) -> None:
    parts = [moments_of.moments(x) for x in uneven(6, parts=2)]
    monkeypatch.setattr(moments_of.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(moments_of.dist, "get_world_size", lambda group: 2)

    def all_gather(out, packed, group):
        for target, part in zip(out, parts, strict=True):
            target.copy_(torch.cat([part.mean.new_tensor([part.samples]), part.mean, part.m2]))

    monkeypatch.setattr(moments_of.dist, "all_gather", all_gather)
    together = moments_of.over_ranks(nn.SyncBatchNorm(6), parts[0])
    truth = moments_of.moments(torch.cat(uneven(6, parts=2)))
    assert together.samples == truth.samples == 11
    torch.testing.assert_close(together.m2, truth.m2)
    assert moments_of.over_ranks(nn.BatchNorm1d(6), parts[0]) is parts[0]
