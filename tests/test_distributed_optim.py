"""gradfuse.optim on DTensors, and with torch's other parallelisms: two gloo processes run all
cases, one after another."""

from __future__ import annotations

import copy
import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import SANITIZED
from processes import on_ranks
from torch import Tensor, nn

from gradfuse.optim import LAMB, SGD, Adam, AdamW, GradScaler, Lion, ScheduleFreeAdamW
from gradfuse.policies import AGC, AdaGC, AutoClip, Decision, Norm, Policy, SpikeSkip, Value, ZClip

pytestmark = [
    pytest.mark.no_kernel,
    pytest.mark.skipif(SANITIZED, reason="torch's own processes are not sanitized"),
]
Case = Callable[[int, str], None]
CASES: dict[str, Case] = {}
RULES: dict[type[torch.optim.Optimizer], dict[str, Any]] = {
    AdamW: {"lr": 0.05, "amsgrad": True},
    Adam: {"lr": 0.05},
    SGD: {"lr": 0.1, "momentum": 0.9},
    Lion: {"lr": 0.01},
    ScheduleFreeAdamW: {"lr": 0.05, "warmup_steps": 2},
}
FREE = {"nonfinite": "propagate"}  # nothing has to be agreed on


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def run_all(rank: int, folder: str) -> dict[str, str]:
    outcomes = {}
    for name, function in CASES.items():
        try:
            function(rank, folder)
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
        dist.barrier()
    return outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> list[dict[str, str]]:
    return on_ranks(2, run_all, folder)


def net(width: int = 9) -> nn.Sequential:
    """Two do not divide its sizes, and the last bias leaves the second rank an empty shard."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, width), nn.Tanh(), nn.Linear(width, 1))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 7, generator=generator)
    return x, x[:, :1] * 3.0


def half(rank: int, step: int) -> tuple[Tensor, Tensor]:
    x, y = batch(step)
    return x[rank::2], y[rank::2]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Callable[[int], tuple[Tensor, Tensor]],
    steps: range = range(4),
) -> None:
    for step in steps:
        x, y = data(step)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(rule: Any, steps: int = 4, **options: Any) -> nn.Module:
    """A model that one process trained on whole batches."""
    model = net()
    train(model, rule(model.parameters(), **options), batch, range(steps))
    return model


def full(t: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def assert_as(model: nn.Module, expected: nn.Module, **close: float) -> None:
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(full(a), b.detach(), **(close or {"rtol": 1e-4, "atol": 1e-6}))


def sharded(mesh: Any = None, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = net()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh, **options)
    return model


def mesh_of(shape: tuple[int, ...]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


@case
def fsdp2(rank: int, folder: str) -> None:
    for rule, options in RULES.items():
        model = sharded()
        optimizer: Any = rule(model.parameters(), **options, **FREE)
        train(model, optimizer, lambda step: half(rank, step))
        assert_as(model, trained(rule, **options, **FREE))
        for p in model.parameters():
            assert p._local_tensor.grad is None
            for name, t in optimizer.state[p].items():
                if name in ("step", "weight_sum", "lr_max"):
                    assert type(t) is Tensor
                    assert t.shape == ()
                    continue
                assert (t.placements, t.device_mesh) == (p.placements, p.device_mesh)
                assert t.shape == p.shape


WHOLES: list[tuple[Any, dict[str, Any]]] = [
    (LAMB, {"lr": 0.05, "weight_decay": 0.1}),
    (LAMB, {"lr": 0.05, "weight_decay": 0.1, "trust_clip": True, "clip": 0.1, **FREE}),
    (LAMB, {"lr": 0.05, "always_adapt": True, "weight_decay": 0.0, **FREE}),
    (LAMB, {"lr": 0.05, "weight_decay": 0.0}),
    (AdamW, {"lr": 0.05, "betas": (0.9, 0.5), "update_clip": True, **FREE}),
    (AdamW, {"lr": 0.05, "betas": (0.9, 0.5), "update_clip": True, "atan2": True, "clip": 0.1}),
]


def jump(data: Callable[[int], tuple[Tensor, Tensor]]) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Data whose targets grow tenfold with each step, so that update_clip has to clip."""
    return lambda step: (data(step)[0], data(step)[1] * 10.0**step)


@case
def norms_of_whole_parameters(rank: int, folder: str) -> None:
    for rule, options in WHOLES:
        model, whole = sharded(), net()
        ours, other = rule(model.parameters(), **options), rule(whole.parameters(), **options)
        train(model, ours, jump(lambda step: half(rank, step)))
        train(whole, other, jump(batch))
        assert_as(model, whole)
        model(batch(0)[0]).sum().backward()
        calls = [2 + 2 * 4]  # a word for each rank, two sums for each parameter
        assert all_reduces(ours.step) == (
            calls if options.items() >= FREE.items() and ours.clip is None else [8, *calls]
        )


@case
def norms_of_wholes_where_one_rank_refuses(rank: int, folder: str) -> None:
    for spoil, message in BAD.items():
        if spoil is _expanded:  # may be read
            continue
        model = sharded()
        optimizer = LAMB(model.parameters(), **FREE)
        model(batch(0)[0]).sum().backward()
        if rank == 1:
            spoil(next(iter(model.parameters())))
        expected = message if rank == 1 else "got ones that rank 1 of 2 refused"
        with pytest.raises((RuntimeError, ValueError), match=expected):
            optimizer.step()
        assert_as(model, net())


@case
def clipped(rank: int, folder: str) -> None:
    """The step clips by the norm of all shards, and reports it."""
    for clip in (0.5, Norm(0.5), Value(0.01)):
        model = sharded()
        optimizer = AdamW(model.named_parameters(), lr=0.05, clip=clip)
        train(model, optimizer, lambda step: half(rank, step))
        whole = net()
        other = AdamW(whole.named_parameters(), lr=0.05, clip=copy.deepcopy(clip))
        train(whole, other, batch)
        assert_as(model, whole)
        assert optimizer.report.total_norm == pytest.approx(other.report.total_norm, rel=1e-4)
        everything = optimizer.report.gather()
        for a, b in zip(everything.parameters, other.report.parameters, strict=True):
            assert (a.name, a.numel) == (b.name, b.numel)
            assert a.norm == pytest.approx(b.norm, rel=1e-3)


def all_reduces(call: Callable[[], object]) -> list[int]:
    """The elements of each all-reduce of a call."""
    calls, real = [], dist.all_reduce
    dist.all_reduce = lambda t, **options: (calls.append(t.numel()), real(t, **options))
    try:
        call()
    finally:
        dist.all_reduce = real
    return calls


@case
def one_all_reduce_a_step(rank: int, folder: str) -> None:
    """Four numbers a rank; a policy that looks at parameters adds one for each of the four."""
    for clip, numbers in (
        (0.5, [8]),
        (AutoClip(), [8]),
        (ZClip(), [8]),
        (Value(0.1), [9]),
        (AdaGC(), [12]),
        (AGC(), [8, 2 + 2 * 2, 8]),  # the two biases are units on both ranks
        (Norm(0.5, exact=True), [19]),
        (exact(Value(0.1)), [20]),
        (exact(AdaGC()), [19, 4]),
    ):
        model = sharded()
        optimizer = AdamW(model.parameters(), clip=clip)
        model(batch(0)[0]).sum().backward()
        assert all_reduces(optimizer.step) == numbers


class Level(Policy):
    """Skips steps whose first parameter has more of the norm than before, and clips each by it."""

    def begin(self, norms: Tensor) -> dict[str, Tensor]:
        return {"level": norms.new_full((), float("inf")), "seen": torch.zeros_like(norms)}

    def decide(self, norm: Tensor, norms: Tensor, state: dict[str, Tensor]) -> Decision:
        share = norms[0] / norm
        return Decision(
            (0.3 / norms.clamp(min=0.3)),
            share > state["level"],
            {"level": torch.where(share < 1.0, share, 1.0), "seen": norms},
        )


POLICIES: dict[str, Callable[[], Policy]] = {
    "norm": lambda: Norm(0.5),
    "value": lambda: Value(0.05),
    "zclip": lambda: ZClip(warmup=2, z=0.1),
    "autoclip": lambda: AutoClip(30.0),
    "adagc": lambda: AdaGC(warmup=1),
    "spikeskip": lambda: SpikeSkip(factor=1.0, warmup=1),
    "level": Level,
    "agc": lambda: AGC(0.05),
    "exact norm": lambda: Norm(0.5, exact=True),
    "exact adagc": lambda: exact(AdaGC(warmup=1)),
    "exact value": lambda: exact(Value(0.05)),
}


def exact(policy: Policy) -> Policy:
    policy.exact = True
    return policy


@case
def policies_decide_as_one_process(rank: int, folder: str) -> None:
    for make in POLICIES.values():
        model, whole = sharded(), net()
        optimizer = AdamW(model.named_parameters(), lr=0.05, clip=make())
        other = AdamW(whole.named_parameters(), lr=0.05, clip=make())
        for step in range(5):
            train(model, optimizer, lambda step: half(rank, step), range(step, step + 1))
            train(whole, other, batch, range(step, step + 1))
            a, b = optimizer.report, other.report
            for name in ("total_norm", "coefficient", "clipped_norm", "clipped", "skipped"):
                ours, theirs = getattr(a, name), getattr(b, name)
                assert ours == pytest.approx(theirs, rel=1e-3, nan_ok=True), (make, step, name)
        assert_as(model, whole)
        assert optimizer.skipped_steps == other.skipped_steps
        for name, t in other.clip.state.items():
            torch.testing.assert_close(optimizer.clip.state[name], t, rtol=1e-3, atol=1e-6)
            held = [torch.empty_like(t) for _ in range(2)]
            dist.all_gather(held, optimizer.clip.state[name])
            assert torch.equal(*held)  # to the last bit


@case
def grad_scaler(rank: int, folder: str) -> None:
    """An inf on one rank skips the step and halves the scale on both, whoever's scaler it is."""
    for make in (torch.amp.GradScaler, GradScaler):
        for clip in (None, 0.5, AdaGC(warmup=1), Norm(0.5, exact=True), exact(AdaGC(warmup=1))):
            model, whole = sharded(), net()
            optimizer = AdamW(model.parameters(), lr=0.05, clip=copy.deepcopy(clip))
            other = AdamW(whole.parameters(), lr=0.05, clip=clip)
            scaler, alone = (make("cpu", init_scale=8.0, growth_interval=2) for _ in range(2))
            for step in range(4):
                for net_, own, s, (x, y) in (
                    (model, optimizer, scaler, half(rank, step)),
                    (whole, other, alone, batch(step)),
                ):
                    s.scale(nn.functional.mse_loss(net_(x), y)).backward()
                    if step == 1 and (net_ is whole or rank == 1):
                        p = next(iter(net_.parameters()))
                        (p.grad.to_local() if net_ is model else p.grad)[0, 0] = float("inf")
                    s.step(own)
                    s.update()
                    own.zero_grad()
                assert scaler.get_scale() == alone.get_scale()
                assert optimizer.skipped_steps == other.skipped_steps
                if step != 1:
                    ours, theirs = optimizer.report.total_norm, other.report.total_norm
                    assert ours == pytest.approx(theirs, rel=1e-3)
            assert (optimizer.skipped_steps, scaler.get_scale()) == (1, 8.0)
            assert_as(model, whole)


@case
def own_grad_scaler_sends_nothing_more(rank: int, folder: str) -> None:
    model = sharded()
    optimizer = AdamW(model.parameters(), clip=0.5)
    scaler = GradScaler("cpu")
    scaler.scale(model(batch(0)[0]).sum()).backward()
    assert all_reduces(lambda: scaler.step(optimizer)) == [8]


@case
def inf_that_a_scaler_found_on_one_rank(rank: int, folder: str) -> None:
    """Stops all, although no gradient shows it."""
    for clip in (0.5, Norm(0.5, exact=True)):
        model = sharded()
        optimizer = AdamW(model.parameters(), clip=clip, nonfinite="error")
        model(batch(0)[0]).sum().backward()
        optimizer.found_inf = torch.tensor(float(rank == 1)) if rank else 0  # as torch's may be
        optimizer.step()
        assert optimizer.skipped_steps == 1
        assert_as(model, net())


def _keep(*_: object) -> None:
    """A hook that makes a scaler look for inf by itself."""


def _repair(optimizer: torch.optim.Optimizer, *_: object) -> None:
    for p in optimizer.param_groups[0]["params"]:
        p.grad.nan_to_num_(posinf=0.0)


@case
def scale_of_a_group_stays_one(rank: int, folder: str) -> None:
    """An inf on rank 0 halves it on both, whoever finds it, and although a hook puts it right."""
    for exact_norm in (False, True):
        for way in ("itself", "hook", "repair", "unscale_", "cleared"):
            p = nn.Parameter(torch.ones(3))
            optimizer = SGD([p], lr=0.1, clip=Norm(1.0, exact=exact_norm), group=dist.group.WORLD)
            if way in ("hook", "repair"):
                optimizer.register_step_pre_hook(_repair if way == "repair" else _keep)
            scaler = GradScaler("cpu", init_scale=8.0)
            scales = []
            for step in range(3):
                optimizer.zero_grad()
                bad = rank == 0 and step == 1
                scaler.scale((p * (float("inf") if bad else 1.0)).sum()).backward()
                if way in ("unscale_", "cleared"):
                    scaler.unscale_(optimizer)
                if way == "cleared":
                    _repair(optimizer)
                scaler.step(optimizer)
                scaler.update()
                scales.append(scaler.get_scale())
            assert scales == [8.0, 4.0, 4.0], (way, scales)
            assert optimizer.skipped_steps == 1
            assert optimizer.report.total_norm == pytest.approx(6**0.5)
            torch.testing.assert_close(p.detach(), torch.full((3,), 1.0 - 0.2 / 6**0.5))


@case
def scaler_that_looks_where_there_is_no_gradient(rank: int, folder: str) -> None:
    for way in ("hook", "unscale_"):
        for inf in (False, True):
            p = nn.Parameter(torch.ones(3))
            optimizer = SGD([p], lr=0.1, clip=1.0, group=dist.group.WORLD)
            if way == "hook":
                optimizer.register_step_pre_hook(_keep)
            scaler = GradScaler("cpu", init_scale=8.0)
            scaler.scale(torch.zeros(()))
            p.grad = torch.full((3,), float("inf") if inf else 8.0) if rank else None
            if way == "unscale_":
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == (4.0 if inf else 8.0)
            assert optimizer.skipped_steps == inf


@case
def torchs_scaler_over_a_group(rank: int, folder: str) -> None:
    """Is refused on all ranks, and leaves nothing behind."""
    for who in ((0, 1), (1,)):
        p = nn.Parameter(torch.ones(3))
        optimizer = SGD([p], lr=0.1, clip=1.0, group=dist.group.WORLD)
        scaler = (torch.amp.GradScaler if rank in who else GradScaler)("cpu", init_scale=8.0)
        scaler.scale(p.sum()).backward()
        match = "expected gradfuse.optim.GradScaler" if rank in who else "rank 1 of 2 refused"
        with pytest.raises(RuntimeError, match=match):
            scaler.step(optimizer)
        assert torch.equal(p, torch.ones(3))
        assert rank not in who or not hasattr(optimizer, "grad_scale")
    scaler = GradScaler("cpu", init_scale=8.0, enabled=False)
    optimizer = SGD([p], lr=0.1, group=dist.group.WORLD)
    scaler.step(optimizer), scaler.update()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.2))


@case
def schedule_free_that_one_rank_evaluates(rank: int, folder: str) -> None:
    for make in (lambda: [nn.Parameter(torch.ones(3))], lambda: [*sharded().parameters()]):
        ps = make()
        group = None if len(ps) > 1 else dist.group.WORLD
        optimizer = ScheduleFreeAdamW(ps, lr=0.1, clip=1.0, group=group)
        for p in ps:
            p.grad = torch.ones_like(p)
        optimizer.step()
        before = [full(p).clone() for p in ps]
        if rank == 1:
            optimizer.eval()
        match = "call train" if rank == 1 else "rank 1 of 2 refused"
        with pytest.raises(RuntimeError, match=match):
            optimizer.step()
        if rank == 1:
            optimizer.train()
        for p, old in zip(ps, before, strict=True):
            torch.testing.assert_close(full(p), old)
        optimizer.step()


@case
def scaler_where_one_rank_refuses(rank: int, folder: str) -> None:
    """Backs off on both, as where NaN or inf was found, and does not grow."""
    model = sharded()
    optimizer = AdamW(model.parameters(), clip=0.5)
    scaler = GradScaler("cpu", init_scale=4.0, growth_interval=1)
    scaler.scale(model(batch(0)[0]).sum()).backward()
    if rank == 1:
        _wide(next(iter(model.parameters())))
    with pytest.raises((RuntimeError, ValueError), match=r"of its dtype or|rank 1 of 2 refused"):
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    model.zero_grad()
    scaler.scale(model(batch(0)[0]).sum()).backward()
    scaler.step(optimizer)
    assert optimizer.skipped_steps == 0
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    for way in ("itself", "hook", "unscale_"):
        p = nn.Parameter(torch.ones(3))
        optimizer = SGD([p], lr=0.1, clip=1.0, group=dist.group.WORLD)
        if way == "hook":
            optimizer.register_step_pre_hook(_keep)
        scaler = GradScaler("cpu", init_scale=8.0, growth_interval=1)
        scaler.scale(p.sum()).backward()
        if way == "unscale_":
            scaler.unscale_(optimizer)
        if rank == 0:
            p.grad = torch.ones(1).expand(3)
        with pytest.raises(RuntimeError, match=r"memory location|rank 0 of 2 refused"):
            scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 4.0, way


@case
def nan_on_one_rank(rank: int, folder: str) -> None:
    for nonfinite in ("skip", "error"):
        model = sharded()
        optimizer = AdamW(model.parameters(), clip=0.5, nonfinite=nonfinite)
        model(batch(0)[0]).sum().backward()
        if rank == 1:
            model[0].weight.grad.to_local()[0, 0] = float("nan")
        if nonfinite == "error":
            with pytest.raises(RuntimeError, match="expected a finite total norm"):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.skipped_steps == 1
            bad = optimizer.report.gather().first_nonfinite()
            assert (bad.name, bad.rank) == ("0", 1)
        assert_as(model, net())


def _partial(p: Any) -> None:
    from torch.distributed.tensor import DTensor, Partial

    p.grad = DTensor.from_local(torch.ones(p.shape), p.device_mesh, [Partial()])


def _wide(p: Any) -> None:
    p.grad._local_tensor = p.grad._local_tensor.double()


def _expanded(p: Any) -> None:
    p.grad._local_tensor = torch.zeros(1, 1).expand(p.grad._local_tensor.shape)


BAD = {
    _partial: "expected a gradient whose sum over the processes is taken",
    _wide: "expected a gradient of the parameter's shape and device, of its dtype",
    _expanded: "expected gradients with an element per memory location",
}


@case
def an_error_before_the_norm_is_one_on_all(rank: int, folder: str) -> None:
    for own_clips in (False, True):
        model = sharded()
        names = list(model.parameters())
        groups: Any = names
        if own_clips:  # the bad one is in the second
            groups = [{"params": names[1:]}, {"params": names[:1], "clip": 0.5}]
        optimizer = AdamW(groups, lr=0.05, clip=0.5)
        train(model, optimizer, lambda step: half(rank, step), range(1))
        before = [p.to_local().clone() for p in names]
        for spoil, message in BAD.items():
            model(batch(1)[0]).sum().backward()
            if rank == 1:
                spoil(names[0])
            expected = message if rank == 1 else "got ones that rank 1 of 2 refused"
            with pytest.raises((RuntimeError, ValueError), match=expected):
                optimizer.step()
            model.zero_grad()
            assert all(map(torch.equal, before, (p.to_local() for p in names)))
        held = optimizer.state[names[0]]["exp_avg"]
        model(batch(1)[0]).sum().backward()
        if rank == 1:
            optimizer.state[names[0]]["exp_avg"] = torch.zeros(2)
        with pytest.raises((RuntimeError, ValueError), match=r"expected state|rank 1 of 2 refused"):
            optimizer.step()
        optimizer.state[names[0]]["exp_avg"] = held
        optimizer.step()  # as if nothing had been
        pairs = zip(before, (p.to_local() for p in names), strict=True)
        assert not any(torch.equal(a, b) for a, b in pairs if a.numel())


@case
def schedule_free_mean(rank: int, folder: str) -> None:
    model, whole = sharded(), net()
    ours = ScheduleFreeAdamW(model.parameters(), lr=0.05, **FREE)
    other = ScheduleFreeAdamW(whole.parameters(), lr=0.05, **FREE)
    train(model, ours, lambda step: half(rank, step))
    train(whole, other, batch)
    ours.eval(), other.eval()
    assert_as(model, whole)
    ours.train(), other.train()
    assert_as(model, whole)


@case
def steady_steps_bind_nothing(rank: int, folder: str) -> None:
    model = sharded()
    optimizer = AdamW(model.parameters(), **FREE)
    train(model, optimizer, lambda step: half(rank, step), range(1))
    bound = []
    bind = optimizer._complete_any
    optimizer._complete_any = lambda *args: (bound.append(args), bind(*args))
    train(model, optimizer, lambda step: half(rank, step), range(2))
    assert not bound
    p = next(iter(model.parameters()))
    p._local_tensor = p._local_tensor.clone()  # as loading with assign=True does
    before = p.to_local().clone()
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.to_local().ne(before).all()


@case
def mixed_precision(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(mp_policy=policy)
    optimizer = AdamW(model.parameters(), lr=0.05, **FREE)
    train(model, optimizer, lambda step: half(rank, step))
    assert_as(model, trained(AdamW, lr=0.05, **FREE), rtol=0.05, atol=0.05)
    short = sharded().bfloat16()
    optimizer = AdamW(short.parameters(), lr=0.05, master_weights=True, **FREE)
    train(short, optimizer, lambda step: [t.bfloat16() for t in half(rank, step)])
    for p in short.parameters():
        master = optimizer.state[p]["master_param"]
        assert (master.dtype, master.placements) == (torch.float32, p.placements)
        assert torch.equal(full(master).bfloat16(), full(p))


@case
def hsdp(rank: int, folder: str) -> None:
    model = sharded(mesh_of((2, 1)))
    train(model, AdamW(model.parameters(), **FREE), lambda step: half(rank, step))
    assert_as(model, trained(AdamW, **FREE))


@case
def tensor_parallel(rank: int, folder: str) -> None:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    for rule, options in RULES.items():
        model, whole = parallelize_module(net(10), mesh_of((2,)), plan), net(10)
        for of_one in (model, whole):
            train(of_one, rule(of_one.parameters(), **options, **FREE), batch)
        assert_as(model, whole)
    for rule, options in WHOLES:
        model, whole = parallelize_module(net(10), mesh_of((2,)), plan), net(10)
        for of_one in (model, whole):
            train(of_one, rule(of_one.parameters(), **options), jump(batch))
        assert_as(model, whole)
    for clip in (0.1, AdaGC(warmup=1), AGC(0.05)):
        model, whole = parallelize_module(net(10), mesh_of((2,)), plan), net(10)
        ours = AdamW(model.parameters(), lr=0.05, clip=copy.deepcopy(clip))
        train(model, ours, batch)
        train(whole, AdamW(whole.parameters(), lr=0.05, clip=clip), batch)
        assert ours.report.clipped
        assert_as(model, whole)


@case
def data_parallel(rank: int, folder: str) -> None:
    model = nn.parallel.DistributedDataParallel(net(), gradient_as_bucket_view=True)
    optimizer = AdamW(model.parameters(), clip=0.5)
    for step in range(4):
        x, y = half(rank, step)
        with model.no_sync():
            (0.5 * nn.functional.mse_loss(model(x[:2]), y[:2])).backward()
        (0.5 * nn.functional.mse_loss(model(x[2:]), y[2:])).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_as(model.module, trained(AdamW, clip=0.5))


@case
def zero_redundancy(rank: int, folder: str) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(net())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=AdamW, lr=1e-3)
    train(model, optimizer, lambda step: half(rank, step))
    assert_as(model.module, trained(AdamW))


@case
def zero_redundancy_with_a_clip(rank: int, folder: str) -> None:
    """Each rank has some of the parameters; the norm is of all, and what one skips all skip."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for clip in (0.5, ZClip(warmup=1, z=0.1)):
        model = nn.parallel.DistributedDataParallel(net())
        own = functools.partial(AdamW, clip=copy.deepcopy(clip), group=dist.group.WORLD)
        optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=own, lr=1e-3)
        train(model, optimizer, lambda step: half(rank, step))
        assert_as(model.module, trained(AdamW, clip=clip))
        before = [p.detach().clone() for p in model.parameters()]
        model(batch(0)[0]).sum().backward()
        for p in model.parameters():
            p.grad[...] = 1.0
        next(iter(model.parameters())).grad[0, 0] = float("nan")
        calls = all_reduces(optimizer.step)
        assert calls == [8]
        assert optimizer.optim.skipped_steps == 1
        assert all(map(torch.equal, before, model.parameters()))


@case
def over_a_group(rank: int, folder: str) -> None:
    """Disjoint parameters, whose number differs; a rank may have none."""
    world = dist.group.WORLD
    whole = list(net().parameters())
    mine = [nn.Parameter(p.detach().clone()) for p in whole] if rank == 0 else []
    ours = AdamW([{"params": mine}], lr=0.05, clip=0.5, group=world)
    other = AdamW(whole, lr=0.05, clip=0.5)
    scaler, alone = (GradScaler("cpu", init_scale=4.0) for _ in range(2))
    for step in range(4):
        scale = scaler.get_scale()
        scaler.scale(torch.zeros(()))
        alone.scale(torch.zeros(()))
        for p in (*mine, *whole):
            p.grad = torch.full_like(p, scale * (step + 1.0))
        if step == 2:
            for ps in (mine, whole):
                for p in ps[:1]:
                    p.grad[0, 0] = float("inf")
        scaler.step(ours), scaler.update()
        alone.step(other), alone.update()
        assert scaler.get_scale() == alone.get_scale()
    assert ours.skipped_steps == other.skipped_steps == 1
    assert ours.report.total_norm == other.report.total_norm
    for p, q in zip(mine, whole, strict=False):
        assert torch.equal(p, q)
    ps = [nn.Parameter(torch.full((2,), rank + 1.0))]
    ps[0].grad = torch.full((2,), 3.0)
    copies = SGD(ps, lr=1.0, clip=1.0, replicated_over=world)
    copies.step()
    assert copies.report.total_norm == pytest.approx(18**0.5)
    for refused, match in (
        (lambda: AdamW(ps, clip=AdaGC(), group=world), "expected clip to decide by the global"),
        (lambda: setattr(AdamW(ps, group=world), "clip", AGC()), "expected clip to decide by the"),
        (lambda: LAMB(ps, group=world), "expected no group= with trust ratios"),
        (lambda: AdamW(ps, update_clip=True, group=world), "expected no group= with update_clip"),
    ):
        with pytest.raises(ValueError, match=match):
            refused()


@case
def optimizer_in_backward(rank: int, folder: str) -> None:
    for model, data in ((net(), batch), (sharded(), lambda step: half(rank, step))):
        own = {p: AdamW([p], **FREE) for p in model.parameters()}

        def update(p: Tensor, own: dict[Tensor, AdamW] = own) -> None:
            own[p].step()
            own[p].zero_grad()

        for p in own:
            p.register_post_accumulate_grad_hook(update)
        for step in range(4):
            x, y = data(step)
            nn.functional.mse_loss(model(x), y).backward()
        assert_as(model, trained(AdamW, **FREE))


@case
def refused(rank: int, folder: str) -> None:
    from torch.distributed.tensor import DTensor, Partial

    p = nn.Parameter(DTensor.from_local(torch.ones(3), mesh_of((2,))))
    p.grad = DTensor.from_local(torch.ones(3), mesh_of((2,)), [Partial()])
    optimizer = SGD([p], lr=1.0, **FREE)
    with pytest.raises(ValueError, match=r"Partial.*for parameter 0; set p.grad = "):
        optimizer.step()
    assert torch.equal(p.to_local(), torch.ones(3))
    p.grad = p.grad.redistribute(placements=p.placements)
    optimizer.step()
    assert torch.equal(p.to_local(), torch.full((3,), -1.0))
    LAMB([p], lr=0.1, clip=1.0).step()  # each process has all of it


@case
def whole_state_dicts(rank: int, folder: str) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    whole = StateDictOptions(full_state_dict=True)
    (model, ours), (other, again) = (
        (model, AdamW(model.parameters(), **FREE)) for model in (sharded(), sharded())
    )
    train(model, ours, lambda step: half(rank, step))
    saved = get_optimizer_state_dict(model, ours, options=whole)
    assert type(saved["state"]["0.weight"]["exp_avg"]) is Tensor
    set_optimizer_state_dict(other, again, saved, options=whole)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for name, t in ours.state[p].items():
            assert torch.equal(full(t), full(again.state[q][name]))
    own = AdamW(other.parameters(), **FREE)
    own.load_state_dict(ours.state_dict())
    train(other, own, lambda step: half(rank, step), range(1))
    first = next(iter(other.parameters()))
    own.state[first]["exp_avg"] = full(own.state[first]["exp_avg"])
    first.grad = torch.ones_like(first)
    with pytest.raises(ValueError, match=r"^AdamW.step: expected state exp_avg of"):
        own.step()


@case
def saves(rank: int, folder: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = sharded()
    optimizer = AdamW(model.parameters(), amsgrad=True, **FREE)
    train(model, optimizer, lambda step: half(rank, step), range(3))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/saved")


def loads(rank: int, folder: str) -> dict[str, str]:
    """Loads onto other processes what two saved, and goes on as one that never stopped."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    size = dist.get_world_size()
    model = sharded()
    optimizer = AdamW(model.parameters(), amsgrad=True, **FREE)
    weights, state = get_state_dict(model, optimizer)
    held = {"model": weights, "optimizer": state}
    came_from = {3: "saved", 1: "saved-3"}[size]
    dcp.load(held, checkpoint_id=f"{folder}/{came_from}")
    set_state_dict(
        model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"]
    )
    whole = net()
    other = AdamW(whole.parameters(), amsgrad=True, **FREE)
    first = {3: 3, 1: 4}[size]
    train(whole, other, batch, range(first))
    assert_as(model, whole)
    train(whole, other, batch, range(first, first + 1))
    train(model, optimizer, batch, range(first, first + 1))
    assert_as(model, whole)
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        for name, t in optimizer.state[p].items():
            torch.testing.assert_close(full(t), other.state[q][name], rtol=1e-4, atol=1e-7)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/saved-{size}")
    return {}


@pytest.mark.parametrize("name", CASES)
def test_two_processes(name: str, outcomes: list[dict[str, str]]) -> None:
    for rank, of_rank in enumerate(outcomes):
        assert not of_rank[name], f"rank {rank}:\n{of_rank[name]}"


def test_checkpoints_of_two_processes_go_to_three_and_one(
    folder: Path, outcomes: list[dict[str, str]]
) -> None:
    assert not outcomes[0]["saves"]
    on_ranks(3, loads, folder)
    on_ranks(1, loads, folder)
