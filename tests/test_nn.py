"""BatchNormAct modules: torch's state and semantics, with a residual and an activation."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import HOST_BACKENDS, random
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradfuse.nn import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d

PAIRS = [
    (BatchNormAct1d, nn.BatchNorm1d, (4, 6)),
    (BatchNormAct1d, nn.BatchNorm1d, (4, 6, 5)),
    (BatchNormAct2d, nn.BatchNorm2d, (4, 6, 5, 3)),
    (BatchNormAct3d, nn.BatchNorm3d, (2, 6, 3, 4, 5)),
]


@HOST_BACKENDS
@pytest.mark.parametrize(("ours", "stock", "shape"), PAIRS)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_as_torchs_through_training_and_evaluation(
    backend, ours, stock, shape, momentum, tracked, affine
):
    a = ours(6, momentum=momentum, affine=affine, track_running_stats=tracked).double()
    b = stock(6, momentum=momentum, affine=affine, track_running_stats=tracked).double()
    for step in range(4):
        if step == 3:
            a.eval()
            b.eval()
        x = random(*shape, dtype=torch.float64, seed=step)
        r = random(*shape, dtype=torch.float64, seed=9)
        torch.testing.assert_close(a(x, r), F.relu(b(x) + r))
        torch.testing.assert_close(a(x), F.relu(b(x)))
    assert list(a.state_dict()) == list(b.state_dict())
    for name, value in b.state_dict().items():
        torch.testing.assert_close(a.state_dict()[name], value)
    options = {"momentum": momentum, "affine": affine, "track_running_stats": tracked}
    for source, target in ((a, stock(6, **options)), (b, ours(6, **options))):
        target.double().load_state_dict(source.state_dict())
        torch.testing.assert_close(target.state_dict(), source.state_dict())


def test_the_same_parameters_go_in_and_out():
    bn = nn.BatchNorm2d(3, eps=1e-3, momentum=None).eval()
    fused = BatchNormAct2d.from_batch_norm(bn, "silu")
    plain = fused.to_batch_norm()
    assert type(plain) is nn.BatchNorm2d
    for m in (fused, plain):
        assert m.weight is bn.weight
        assert m.running_mean is bn.running_mean
        assert (m.eps, m.momentum, m.training) == (1e-3, None, False)


def test_repr_copies_and_pickles():
    m = BatchNormAct2d(3, activation="leaky_relu", negative_slope=0.2)
    assert "activation='leaky_relu', negative_slope=0.2" in repr(m)
    for again in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert repr(again) == repr(m)
        x = random(4, 3, 5, 5)
        assert torch.equal(again(x), m(x))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="BatchNormAct2d: activation must be"):
        BatchNormAct2d(3, activation="swish")
    with pytest.raises(ValueError, match="expected 4D input"):
        BatchNormAct2d(3)(random(4, 3))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        BatchNormAct1d(3)(random(1, 3))


def test_an_error_leaves_the_count_of_batches():
    m = BatchNormAct1d(3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        m(random(1, 3))
    assert m.num_batches_tracked == 0


def test_no_silent_conversion_to_sync_batch_norm():
    """timm#1254: the activation would be dropped."""
    with pytest.raises(TypeError, match=r"got one with activation='relu'.*put to_batch_norm\(\)"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(BatchNormAct2d(3)))


@HOST_BACKENDS
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_checkpoint_counts_its_batch_once(backend, reentrant, momentum):
    """pytorch#96136: torch's recomputation counts the batch again."""
    m, once = BatchNormAct2d(3, momentum=momentum), BatchNormAct2d(3, momentum=momentum)
    x = random(4, 3, 5, 5).requires_grad_()
    checkpoint(m, x, use_reentrant=reentrant).sum().backward()
    once(x)
    assert m.num_batches_tracked == 1
    assert torch.equal(m.running_mean, once.running_mean)
    assert torch.equal(m.running_var, once.running_var)


@HOST_BACKENDS
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_without_a_break(backend, momentum):
    """pytorch#194504: momentum=None broke the graph."""
    torch.compiler.reset()
    m = BatchNormAct2d(3, momentum=momentum)
    stock = nn.BatchNorm2d(3, momentum=momentum)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x = random(4, 3, 5, 5, seed=seed)
        torch.testing.assert_close(compiled(x, x), F.relu(stock(x) + x))
    torch.testing.assert_close(m.state_dict(), stock.state_dict())
