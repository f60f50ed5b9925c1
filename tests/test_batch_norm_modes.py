"""Renormalisation, ghost batches and momentum="auto": what they mean, in ops and modules."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from batch_norm_papers import tracked_momentum
from helpers import HOST_BACKENDS, bits, random
from torch.utils.checkpoint import checkpoint

import gradfuse
from gradfuse.nn import BatchNormAct1d, BatchNormAct2d, BatchNormMode


def statistics(channels, device="cpu"):
    return torch.zeros(channels, device=device), torch.ones(channels, device=device)


def test_within_the_limits_training_computes_what_inference_does(backend, device):
    x, w = random(4, 9, 6, device=device), random(9, device=device, seed=1)
    mean, var = statistics(9, device)
    options = {"weight": w, "bias": -w, "activation": "relu"}
    expected = gradfuse.batch_norm_act(x, mean, var, **options)
    y = gradfuse.batch_norm_act(x, mean, var, training=True, renorm=(1e3, 1e3), **options)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert mean.any()  # the update comes after


def test_the_narrowest_limits_give_the_plain_norm(backend, device):
    x = random(4, 9, 6, device=device)
    plain = gradfuse.batch_norm_act(x, *statistics(9, device), training=True)
    y = gradfuse.batch_norm_act(x, *statistics(9, device), training=True, renorm=(1.0, 0.0))
    assert bits(y) == bits(plain)


@HOST_BACKENDS
def test_the_limits_rise_with_the_batches_counted(backend):
    norm = BatchNormAct1d(3, activation=None, renorm=True, r_max=5.0, d_max=2.0, warmup=(2, 4, 6))
    x = random(8, 3, scale=9.0, seed=1) + 40.0  # beyond every limit
    h = F.batch_norm(x, None, None, training=True)
    for r, d in ((1, 0), (1, 0), (1, 0), (3, 0.5), (5, 1), (5, 1.5), (5, 2), (5, 2)):
        norm.running_mean.zero_(), norm.running_var.fill_(0.01)
        torch.testing.assert_close(norm(x), h * r + d)
    again = BatchNormAct1d(3, activation=None, renorm=True, r_max=5.0, d_max=2.0, warmup=(2, 4, 6))
    again.load_state_dict(norm.state_dict())
    assert bits(again(x)) == bits(norm(x))  # the warm-up goes on where it was


def test_r_and_d_are_constants_of_the_gradient(backend, device):
    """The gradient is the plain norm's by the corrected weight; that of weight sees h * r + d."""
    x = (random(6, 5, 4, device=device) + 1.0).requires_grad_()
    w = random(5, device=device, seed=1).requires_grad_()
    g = random(6, 5, 4, device=device, seed=2)
    mean, var = statistics(5, device)
    y = gradfuse.batch_norm_act(
        x, mean.clone(), var.clone(), w, None, training=True, activation=None, renorm=(9.0, 9.0)
    )
    y.backward(g)
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
    batch_var, batch_mean = torch.var_mean(x64.detach(), (0, 2), correction=0)
    r, d = ((batch_var + 1e-5) / (1 + 1e-5)).sqrt(), batch_mean / math.sqrt(1 + 1e-5)
    h = F.batch_norm(x64, None, None, training=True)
    ((h * r[:, None] + d[:, None]) * w64[:, None]).backward(g.double())
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(w.grad.double(), w64.grad, rtol=1e-4, atol=1e-4)


def test_a_batch_with_nan_is_not_hidden_by_the_limits(backend, device):
    x = random(4, 2, 6, device=device)
    x[0, 0, 0] = math.nan
    mean, var = statistics(2, device)
    drift = torch.zeros(4, 2, device=device)
    drift[3] = 3
    y = gradfuse.batch_norm_act(
        x, mean, var, training=True, renorm=(2.0, 1.0), drift=drift, activation=None
    )
    assert y[:, 0].isnan().all()
    assert mean.isnan().tolist() == [True, False]
    assert drift.isfinite().all()  # a reset of the running statistics is enough


@pytest.mark.parametrize("samples", [7, 8])
def test_ghost_batches_are_norms_of_slices(backend, device, samples):
    """Bit for bit, with the same updates in turn."""
    x = random(samples, 12, 3, 5, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    mean, var = statistics(12, device)
    sliced = [mean.clone(), var.clone()]
    y = gradfuse.batch_norm_act(x, mean, var, training=True, ghost_size=3)
    parts = [gradfuse.batch_norm_act(part, *sliced, training=True) for part in x.tensor_split(3)]
    assert bits([y, mean, var]) == bits([torch.cat(parts), *sliced])
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_ghost_size_that_holds_the_batch_changes_nothing(backend, device):
    x = random(6, 12, 3, 5, device=device)
    plain = gradfuse.batch_norm_act(x, None, None, training=True)
    assert bits(gradfuse.batch_norm_act(x, None, None, training=True, ghost_size=6)) == bits(plain)


@HOST_BACKENDS
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("shape", [(5, 1, 3, 3), (6, 1), (5, 9, 3, 3), (6, 9)])
def test_the_mask_of_ghost_batches_is_that_of_the_output(backend, activation, shape):
    grads = []
    for save in ("bitmask", "output"):
        x = random(*shape, scale=9.0).requires_grad_()
        options = {"training": True, "ghost_size": 3, "activation": activation, "save": save}
        gradfuse.batch_norm_act(x, None, None, **options).backward(random(*shape, seed=1))
        grads.append(x.grad)
    assert bits(grads[0]) == bits(grads[1])
    assert grads[0].any()


@HOST_BACKENDS
def test_the_plain_average_counts_ghost_batches(backend):
    norm = BatchNormAct1d(3, momentum=None, ghost_size=2)
    batches = random(5, 6, 3)
    for x in batches:
        norm(x)
    torch.testing.assert_close(norm.running_mean, batches.flatten(0, 1).mean(0))
    ghosts = batches.reshape(15, 2, 3).var(1)
    torch.testing.assert_close(norm.running_var, ghosts.mean(0))
    assert norm.num_batches_tracked == 5


def drifting(kind, steps, seed):
    """[steps, 16, 1] of deviation 1 around a mean [steps] that moves."""
    t = torch.arange(steps)
    mean = {"still": t * 0.0, "step": (t >= steps // 2) * 3.0, "ramp": t * 0.03}[kind]
    return random(steps, 16, 1, seed=seed) + mean[:, None, None], mean


@HOST_BACKENDS
def test_the_momentum_follows_the_rule_of_the_docs(backend):
    norm = BatchNormAct1d(1, momentum="auto")
    state, mean, var, found = [0.0] * 4, 0.0, 1.0, []
    for x in drifting("step", 60, 3)[0]:
        m, state = tracked_momentum(state, x.mean().item(), x.var().item(), mean, var, 1e-5)
        mean, var = (1 - m) * mean + m * x.mean().item(), (1 - m) * var + m * x.var().item()
        found.append(m)
        norm(x)
        torch.testing.assert_close(norm.running_mean.item(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.item(), var, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.drift[:, 0].tolist(), state, rtol=1e-3, atol=1e-4)
    assert found[0] == 1.0
    assert all(0.02 <= m <= 0.5 for m in found[1:])
    assert max(found[31:38]) > 3 * found[29]  # after the step


@HOST_BACKENDS
@pytest.mark.parametrize("kind", ["still", "step", "ramp"])
def test_the_momentum_that_follows_is_never_much_worse_than_the_fixed_one(backend, kind):
    """Of the mean's squared error over 200 batches, of eight seeds."""
    errors = {"auto": 0.0, 0.1: 0.0}
    for momentum in errors:
        norm = BatchNormAct1d(8, momentum=momentum, activation=None)
        data = [drifting(kind, 200, seed) for seed in range(8)]
        xs, mean = torch.cat([x for x, _ in data], 2), data[0][1]
        for x, m in zip(xs, mean, strict=True):
            norm(x)
            errors[momentum] += (norm.running_mean - m).square().mean().item()
    assert errors["auto"] < (1.0 if kind != "step" else 0.8) * errors[0.1]


@HOST_BACKENDS
def test_a_state_dict_of_torchs_has_seen_its_batches(backend):
    plain = torch.nn.BatchNorm2d(3)
    for _ in range(4):
        plain(random(8, 3, 2, 2, seed=1))
    norm = BatchNormAct2d(3, momentum="auto")
    norm.load_state_dict(plain.state_dict())
    assert norm.drift[3].tolist() == [4.0] * 3
    before = norm.running_mean.clone()
    norm(random(8, 3, 2, 2, seed=1))
    assert not torch.equal(norm.running_mean, before)
    assert (norm.running_mean - before).abs().max() < 0.5 * before.abs().max()
    norm.reset_running_stats()
    assert not norm.drift.any()
    back = norm.to_batch_norm()
    assert list(back.state_dict()) == list(plain.state_dict())
    back(random(8, 3, 2, 2))


MODES = [
    {"renorm": True, "warmup": None},
    {"ghost_size": 3},
    {"momentum": "auto"},
    {"momentum": None, "ghost_size": 2},
    {"renorm": True, "warmup": (0, 4, 4), "ghost_size": 2, "momentum": "auto"},
]


@HOST_BACKENDS
@pytest.mark.parametrize("modes", MODES, ids=str)
def test_copies_and_compiled_modules_go_on_alike(backend, modes):
    norm = BatchNormAct2d(3, activation="silu", **modes)
    norm(random(6, 3, 2, 2))
    copied, pickled = copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))
    compiled = torch.compile(copy.deepcopy(norm), fullgraph=True, backend="aot_eager")
    results = []
    for module in (norm, copied, pickled, compiled):
        x = random(6, 3, 2, 2, seed=1).requires_grad_()
        module(x).sum().backward()
        results.append([x.grad, *module.state_dict().values()])
    for found in results[1:3]:
        assert bits(found) == bits(results[0])
    torch.testing.assert_close(results[3], results[0])
    norm.eval(), (plain := norm.to_batch_norm().eval())
    x = random(6, 3, 2, 2, seed=2)
    torch.testing.assert_close(norm(x), F.silu(plain(x)))


@HOST_BACKENDS
def test_a_checkpoint_counts_once_and_renorm_refuses_it(backend):
    for modes in ({"ghost_size": 3}, {"momentum": "auto"}):
        norm = BatchNormAct2d(3, **modes)
        norm(random(6, 3, 2, 2))
        plain = copy.deepcopy(norm)
        plain(random(6, 3, 2, 2, seed=1))
        x = random(6, 3, 2, 2, seed=1).requires_grad_()
        checkpoint(norm, x, use_reentrant=False).sum().backward()
        assert bits([*norm.state_dict().values()]) == bits([*plain.state_dict().values()])
    norm = BatchNormAct2d(3, renorm=True)
    y = checkpoint(norm, random(6, 3, 2, 2).requires_grad_(), use_reentrant=False)
    with pytest.raises(RuntimeError, match="renorm must not be recomputed in a backward pass"):
        y.sum().backward()


@pytest.mark.no_kernel
@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"renorm": 1}, "renorm must be True or False, got 1"),
        ({"renorm": True, "r_max": 0.5}, "r_max must be finite and >= 1, got 0.5"),
        ({"d_max": -1.0}, "d_max must be finite and >= 0, got -1.0"),
        ({"warmup": 3}, r"warmup must be \(begin, r_end, d_end\) or None, got 3"),
        ({"warmup": (5, 4, 9)}, "warm-up must have 0 <= begin <= r_end"),
        ({"ghost_size": 0}, r"ghost_size must be >= 1 and below 2\^63, got 0"),
        ({"ghost_size": 2.5}, "ghost_size must be an int or None, got 2.5"),
        ({"momentum": "fast"}, "momentum must be a number, None or 'auto', got 'fast'"),
        ({"momentum": "auto", "track_running_stats": False}, "must come with track_running_stats"),
        ({"renorm": True, "track_running_stats": False}, "must come with track_running_stats"),
        ({"r_max": "3"}, "r_max must be a number, got '3'"),
        ({"warmup": "abc"}, r"warmup must be \(begin, r_end, d_end\) or None, got 'abc'"),
        ({"ghost_size": 1 << 63}, r"ghost_size must be >= 1 and below 2\^63"),
    ],
)
def test_modes_that_are_none(backend, bad, match):
    with pytest.raises((TypeError, ValueError), match=match):
        BatchNormAct1d(3, **bad)


@pytest.mark.no_kernel
def test_the_module_says_its_mode(backend):
    norm = BatchNormAct1d(3, momentum="auto", renorm=True, r_max=2.0, ghost_size=8)
    for words in ("momentum=auto", "renorm=True, r_max=2.0", "ghost_size=8"):
        assert words in repr(norm)
    assert "renorm" not in repr(BatchNormAct1d(3))
    assert norm.mode == BatchNormMode(renorm=True, r_max=2.0, ghost_size=8, momentum="auto")


class Block(torch.nn.Module):
    """relu(bn(conv(x)) + x), whose batch norm `fuse` swaps."""

    def __init__(self, **options):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.bn = torch.nn.BatchNorm2d(3, **options)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)) + x)


@HOST_BACKENDS
@pytest.mark.parametrize("modes", [m for m in MODES if m.get("momentum", 0) is not None], ids=str)
def test_fuse_gives_a_mode_to_every_batch_norm(backend, modes):
    model = Block()
    fused = gradfuse.fuse(model, mode=BatchNormMode(**modes))
    own = BatchNormAct2d(3, **modes)
    copied = copy.deepcopy(fused)
    for seed in range(3):
        x = random(6, 3, 4, 4, seed=seed)
        expected = own(model.conv(x), x)
        torch.testing.assert_close(fused(x), expected)
        torch.testing.assert_close(copied(x), expected)
    torch.testing.assert_close(fused.bn.state_dict(), own.state_dict())
    report = str(gradfuse.fuse_report(fused))
    if backend == "cpu":
        assert ("renorm" if modes.get("renorm") else "bn+add+relu") in report
    assert list(gradfuse.unfuse(fused).state_dict()) == list(Block().state_dict())
    assert type(model.bn) is torch.nn.BatchNorm2d
    assert "drift" not in model.state_dict()


@HOST_BACKENDS
def test_an_output_that_two_ops_take_counts_its_batch_once(backend):
    model = gradfuse.fuse(
        torch.nn.BatchNorm2d(3), mode=BatchNormMode(ghost_size=2, momentum="auto")
    )
    own = BatchNormAct2d(3, activation=None, ghost_size=2, momentum="auto")
    x = random(6, 3, 4, 4)
    y = model(x)
    (torch.relu(y).sum() + y.sum()).item()
    own(x)
    torch.testing.assert_close(model.state_dict(), own.state_dict())


@HOST_BACKENDS
def test_fuse_gives_gradfuses_own_modules_the_mode(backend):
    model = torch.nn.Sequential(BatchNormAct1d(3, momentum="auto"))
    gradfuse.fuse(model, inplace=True, mode=BatchNormMode(ghost_size=2))
    assert model[0].mode == BatchNormMode(ghost_size=2, momentum="auto")
    model(random(4, 3))


@pytest.mark.no_kernel
def test_fuse_refuses_what_is_no_mode(backend):
    with pytest.raises(TypeError, match="mode must be a BatchNormMode, got dict"):
        gradfuse.fuse(Block(), mode={"renorm": True})
    with pytest.warns(UserWarning, match=r"left as they are: 0 \(SyncBatchNorm\)"):
        gradfuse.fuse(
            torch.nn.Sequential(torch.nn.SyncBatchNorm(3)), mode=BatchNormMode(renorm=True)
        )
    foreign = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    foreign[0].register_buffer("drift", torch.zeros(5))
    with pytest.raises(ValueError, match=r"a buffer 'drift' of its own, got .* at 0"):
        gradfuse.fuse(foreign, mode=BatchNormMode(momentum="auto"))
    model = Block(track_running_stats=False)
    with pytest.raises(ValueError, match=r"renorm must come with track_running_stats.* at bn"):
        gradfuse.fuse(model, inplace=True, mode=BatchNormMode(renorm=True))
    assert type(model.bn) is torch.nn.BatchNorm2d


@HOST_BACKENDS
def test_a_graph_reads_the_step_before_it_is_counted(backend):
    """fuse_graph may move a norm to its activation, but not past num_batches_tracked.add_(1)."""
    model = Block()
    model.bn = BatchNormAct2d(
        3, activation=None, renorm=True, r_max=9.0, d_max=9.0, warmup=(0, 4, 4)
    )
    x = random(6, 3, 4, 4, scale=5.0) + 3.0
    exported = torch.export.export(copy.deepcopy(model).train(), (x,)).module()
    fused = gradfuse.fuse_graph(copy.deepcopy(exported))
    compiled = torch.compile(copy.deepcopy(model), backend=gradfuse.compile_backend("aot_eager"))
    for _ in range(5):
        expected = model(x)
        for other in (exported, fused, compiled):
            torch.testing.assert_close(other(x), expected)


@HOST_BACKENDS
def test_a_compiled_checkpoint_refuses_renorm(backend):
    norm = BatchNormAct2d(3, renorm=True, warmup=None)
    norm(random(6, 3, 2, 2, seed=3) * 2)

    def checkpointed(x):
        return checkpoint(norm, x, use_reentrant=False)

    compiled = torch.compile(norm, backend="aot_eager")
    for call in (
        torch.compile(checkpointed, backend="aot_eager"),
        lambda x: checkpoint(compiled, x, use_reentrant=False),
    ):
        y = call(random(6, 3, 2, 2).requires_grad_())
        with pytest.raises(RuntimeError, match="renorm must not be recomputed"):
            y.sum().backward()


@HOST_BACKENDS
def test_a_ragged_batch_compiles(backend):
    for modes in ({"momentum": None, "ghost_size": 4}, {"renorm": True, "ghost_size": 4}):
        norm = BatchNormAct1d(3, **modes)
        compiled = torch.compile(copy.deepcopy(norm), fullgraph=True, backend="aot_eager")
        for samples in (9, 7, 12):
            x = random(samples, 3, seed=samples)
            torch.testing.assert_close(compiled(x), norm(x))
        torch.testing.assert_close(compiled._orig_mod.state_dict(), norm.state_dict())


@HOST_BACKENDS
def test_the_momentum_may_be_set_later(backend):
    data = torch.arange(20.0)[:, None, None] + random(20, 8, 3, scale=1e-3)
    for norm in (
        BatchNormAct1d(3, momentum="auto", activation=None),
        gradfuse.fuse(torch.nn.BatchNorm1d(3), mode=BatchNormMode(momentum="auto")),
    ):
        torch.optim.swa_utils.update_bn(data, norm)  # sets None, and what was there again
        torch.testing.assert_close(norm.running_mean, torch.full((3,), 9.5), rtol=1e-2, atol=0)
        assert norm.momentum == "auto"
        norm.momentum = 0.0
        norm(data[0] + 1e3)
        torch.testing.assert_close(norm.running_mean, torch.full((3,), 9.5), rtol=1e-2, atol=0)
    plain = BatchNormAct1d(3)
    plain.momentum = "auto"
    with pytest.raises(ValueError, match="momentum must be a number or None unless"):
        plain(data[0])


@HOST_BACKENDS
def test_what_update_bn_collects_with_renorm(backend):
    """The first batch meets no running statistics, and is not corrected towards 0 and 1."""
    norms = [BatchNormAct1d(3, activation=None, renorm=True, warmup=None) for _ in range(2)]
    net = torch.nn.Sequential(*norms)
    batches = [random(64, 3, seed=0, scale=7.0) + 40.0] * 3
    torch.optim.swa_utils.update_bn(batches, net)
    torch.testing.assert_close(norms[1].running_mean, torch.zeros(3), rtol=0, atol=0.1)
    torch.testing.assert_close(norms[1].running_var, torch.ones(3), rtol=0, atol=0.1)


@pytest.mark.no_kernel
def test_conversions_keep_the_mode_or_refuse(backend):
    own = BatchNormAct2d(3, renorm=True, ghost_size=4, momentum="auto")
    assert BatchNormAct2d.from_batch_norm(own).mode == own.mode
    fused = gradfuse.fuse(
        torch.nn.Sequential(torch.nn.BatchNorm2d(3, momentum=0.25)), mode=own.mode
    )
    for words in ("momentum=auto", "renorm=True", "ghost_size=4"):
        assert words in repr(fused)
    plain = gradfuse.unfuse(fused)
    assert plain[0].momentum == 0.25
    with pytest.raises(TypeError, match="plain batch norm to convert, got one with a mode"):
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    with pytest.raises(TypeError, match="plain batch norm to script in training mode"):
        torch.jit.script(fused)
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(gradfuse.fuse(plain))


@HOST_BACKENDS
def test_a_users_own_attributes_named_like_ours(backend):
    bn = torch.nn.BatchNorm2d(3)
    bn.mode = "fan_in"
    bn.register_buffer("drift", torch.zeros(5))
    fused = gradfuse.fuse(torch.nn.Sequential(bn, torch.nn.ReLU()))
    fused(random(4, 3, 2, 2))
    plain = gradfuse.unfuse(fused)
    assert plain[0].mode == "fan_in"
    assert plain[0].drift.shape == (5,)


@HOST_BACKENDS
def test_state_dicts_that_lack_the_norm_leave_the_drift(backend):
    norm = BatchNormAct1d(3, momentum="auto")
    for seed in range(3):
        norm(random(8, 3, seed=seed))
    before = norm.drift.clone()
    norm.load_state_dict({}, strict=False)
    assert bits(norm.drift) == bits(before)
    plain = torch.nn.BatchNorm1d(3)
    with torch.device("meta"):
        empty = BatchNormAct1d(3, momentum="auto")
    empty.load_state_dict(plain.state_dict(), assign=True)
    empty(random(8, 3))


@pytest.mark.elsewhere
@HOST_BACKENDS
def test_what_transforms_take_is_checked_as_well(backend):
    mean, var = statistics(3)

    def call(samples, **modes):
        def norm(x):
            return gradfuse.batch_norm_act(x, mean, var, training=True, **modes)

        return torch.func.jvp(norm, (random(samples, 3),), (random(samples, 3),))

    for samples, modes, match in (
        (3, {"ghost_size": 2}, "more than 1 value per channel"),
        (4, {"drift": torch.zeros(2, 3)}, r"drift must be \[4, 3\]"),
        (4, {"ghost_size": 2, "momentum": torch.ones(3)}, "momentum must be one number or one"),
    ):
        with pytest.raises(ValueError, match=match):
            call(samples, **modes)
    assert not mean.any()
    drift = torch.zeros(4, 3)
    x = torch.empty(0, 3).as_subclass(type("Other", (torch.Tensor,), {}))
    gradfuse.batch_norm_act(x, mean, var, training=True, drift=drift)
    assert mean.isfinite().all()


def test_a_step_without_memory_is_refused(native):
    step = torch.zeros(1000, dtype=torch.int64)[-1:]
    step.untyped_storage().resize_(8)
    options = {"training": True, "renorm": (2.0, 1.0, 0, 4, 4)}
    with pytest.raises(RuntimeError, match="step must have storage of at least 8000 bytes, got 8"):
        gradfuse.batch_norm_act(random(4, 3), *statistics(3), step=step, **options)


@HOST_BACKENDS
def test_a_drift_without_memory_of_its_own_is_refused(backend):
    mean, var = statistics(3)
    with pytest.raises(RuntimeError, match="drift must have an element per memory location"):
        gradfuse.batch_norm_act(
            random(4, 3), mean, var, training=True, drift=torch.zeros(4, 1).expand(4, 3)
        )
    assert not mean.any()
