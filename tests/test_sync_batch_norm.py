"""Batch norm over ranks is batch norm of all their samples: four ranks of 5, 3, 0 and 8 against one
process with sixteen.

One run of four processes does all cases; the tests look at what the ranks returned. A case is a
function of the rank.
"""

from __future__ import annotations

import copy
import pickle
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import SANITIZED, bits, random
from processes import by_case, on_ranks, outcomes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gradfuse
from gradfuse import _native, reference
from gradfuse.nn import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    SyncBatchNormAct1d,
    SyncBatchNormAct2d,
    SyncBatchNormAct3d,
    convert_sync_batchnorm,
)
from gradfuse.ops import batch_norm_ranks
from gradfuse.ops.drop_path import path_scale


def over_ranks(test: Callable[..., Any]) -> Callable[..., Any]:
    """Of a test whose kernels other processes run."""
    skip = pytest.mark.skipif(SANITIZED, reason="torch's own processes are not sanitized")
    return pytest.mark.no_kernel(skip(test))


SIZES = (5, 3, 0, 8)
WORLD = len(SIZES)
CASES: list[Callable[..., Any]] = []


def case(function: Callable[..., Any]) -> Callable[..., Any]:
    CASES.append(function)
    return function


def part(t: Tensor, rank: int) -> Tensor:
    return t.split(SIZES)[rank]


# What a rank does with its part of the batch, and one process with all of it.

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
CALLS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "relu, residual": ((16, 6, 5, 7), {"residual": True}),
    "large": ((16, 3, 40, 50), {"residual": True}),
    "silu, residual": ((16, 6, 5, 7), {"residual": True, "activation": "silu"}),
    "tanh": ((16, 6, 5, 7), {"activation": "tanh"}),
    "none, residual": ((16, 6, 5, 7), {"residual": True, "activation": None}),
    "relu6, bits": ((16, 6, 5, 7), {"save": "bitmask", "activation": "relu6"}),
    "drop_path": ((16, 6, 5, 7), {"residual": True, "drop_path": 0.5}),
    "drop_path, one channel": ((16, 1, 5, 7), {"residual": True, "drop_path": 0.5}),
    "rows": ((16, 9), {}),
    "volumes": ((16, 2, 3, 4, 5), {"residual": True}),
    "renorm": ((16, 6, 5, 7), {"residual": True, "renorm": (1.5, 0.4), "activation": "silu"}),
    "auto": ((16, 6, 5, 7), {"drift": True}),
    "no weight": ((16, 6, 5, 7), {"affine": False}),
}
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = (False, True)  # channels last


def outcome(
    name: str,
    dtype: torch.dtype,
    channels_last: bool,
    rank: int | None,
    group: Any = None,
) -> dict[str, Tensor]:
    """Output, gradients and running statistics of a call; of all ranks' samples if rank is None."""
    shape, options = CALLS[name]
    options = {"momentum": 0.3, "save": "output", **options}
    x, r, g = (random(*shape, seed=i, scale=3.0).to(dtype) + i for i in range(3))
    if channels_last and len(shape) in FORMATS:
        x, r, g = (t.contiguous(memory_format=FORMATS[len(shape)]) for t in (x, r, g))
    if rank is not None:
        x, r, g = (part(t, rank) for t in (x, r, g))
    x, r = (t.clone().requires_grad_() for t in (x, r))
    c = shape[1]
    w, b = random(c, seed=4).add(1.0).requires_grad_(), random(c, seed=5).requires_grad_()
    mean, var = random(c, seed=6), random(c, seed=7).exp()
    residual = r if options.pop("residual", False) else None
    if options.pop("drift", False):
        options["drift"] = torch.cat([random(2, c, seed=8), torch.full((2, c), 3.0)])
    weight, bias = (w, b) if options.pop("affine", True) else (None, None)
    if "drop_path" in options and rank is not None:
        options["generator"] = torch.Generator().manual_seed(rank)
    y = gradfuse.batch_norm_act(
        x, mean, var, weight, bias, residual=residual, training=True, process_group=group, **options
    )
    y.backward(g)
    given = {"y": y.detach(), "dx": x.grad, "dr": r.grad, "dw": w.grad, "db": b.grad}
    given |= {"mean": mean, "var": var, "drift": options.get("drift")}
    return {key: t for key, t in given.items() if t is not None}


OF_RANK = ("y", "dx", "dr")  # a part of the batch; "dw" and "db" are summed; the others are equal


@case
def calls(rank: int) -> Any:
    world = dist.group.WORLD
    return {
        (name, dtype, last): outcome(name, dtype, last, rank, world)
        for name in CALLS
        for dtype in DTYPES
        for last in LAYOUTS
    }


@case
def by_the_reference(rank: int) -> Any:
    backend, _native.backend = _native.backend, reference
    try:
        return {name: outcome(name, torch.float32, False, rank, dist.group.WORLD) for name in CALLS}
    finally:
        _native.backend = backend


@case
def same_bits(rank: int) -> Any:
    """Of any number of threads, and in any order of arrival."""
    found = []
    for threads, late in ((1, 0), (3, rank), (2, WORLD - rank)):
        torch.set_num_threads(threads)
        time.sleep(0.05 * late)
        found.append(outcome("large", torch.float32, False, rank, dist.group.WORLD))
    torch.set_num_threads(1)
    return [bits(list(o.values())) for o in found]


def module_outcome(bn: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = bn(x, **options)
    (y * y.detach().cos()).sum().backward()
    return [y.detach(), x.grad, bn.running_mean.clone(), bn.running_var.clone()]


class Sent:
    """The collectives of the block, as (name, elements), by the backend's own records."""

    def __enter__(self) -> list[tuple[str, int]]:
        self.found: list[tuple[str, int]] = []
        self.profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
        )
        self.profile.__enter__()
        return self.found

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        for event in self.profile.events():
            if event.name.startswith("gloo:"):
                elements = sum(torch.Size(s).numel() for s in event.input_shapes)
                self.found.append((event.name, elements))


@case
def collectives(rank: int) -> Any:
    bn = SyncBatchNormAct2d(6)
    x = part(random(16, 6, 5, 7), rank)
    alone = dist.new_group([rank], use_local_synchronization=True)
    found = {}
    with Sent() as found["first"]:  # of a profiler, which may lose events
        bn(x)
    with Sent() as found["forward"]:
        y = bn(x.clone().requires_grad_(), x)
    with Sent() as found["backward"]:
        y.sum().backward()
    with Sent() as found["a frozen input"]:
        bn(x).sum().backward()
    with Sent() as found["a group of one"]:
        if len(x):
            SyncBatchNormAct2d(6, process_group=alone)(x.clone().requires_grad_()).sum().backward()
    bn.eval()
    with Sent() as found["eval"]:
        bn(x.clone().requires_grad_(), x).sum().backward()
        SyncBatchNormAct2d(6, track_running_stats=False).eval()(part(random(16, 6, 5, 7), 0))
    found["bytes"] = bytes_of(lambda: bn.train()(x.clone().requires_grad_()).sum().backward())
    return found


def bytes_of(call: Callable[[], Any]) -> list[int]:
    """What this rank gives to each collective."""
    given = []
    gather, reduce = batch_norm_ranks.Ranks._gather, batch_norm_ranks._all_reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            batch_norm_ranks.Ranks,
            "_gather",
            lambda self, row: given.append(row.nbytes) or gather(self, row),
        )
        patch.setattr(
            batch_norm_ranks, "_all_reduce", lambda t, g: given.append(t.nbytes) or reduce(t, g)
        )
        call()
    return given


@case
def group_of_two(rank: int) -> Any:
    """Ranks 0 and 1 share statistics, so do 2 and 3."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    bn = SyncBatchNormAct2d(6, process_group=pairs[rank // 2])
    return module_outcome(bn, part(random(16, 6, 5, 7), rank))


@case
def copies(rank: int) -> Any:
    """A module with a group, what copy.deepcopy and AveragedModel make of it, and their pickle."""
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    bn = SyncBatchNormAct2d(6, momentum="auto", process_group=pair)
    bn.register_forward_hook(noop)
    twice = copy.deepcopy(nn.ModuleList([bn, nn.Sequential(bn, bn)]))
    averaged = torch.optim.swa_utils.AveragedModel(nn.Sequential(bn))
    found: dict[str, Any] = {
        "shared": twice[0] is twice[1][0] is twice[1][1],
        "groups": [m.process_group is pair for m in (twice[0], averaged.module[0])],
        "attributes": bn.__dict__.keys() == twice[0].__dict__.keys(),
        "pickled": message_of(lambda: pickle.dumps(bn)),
    }
    own = {t.data_ptr() for t in bn.state_dict().values()}
    found["tensors"] = [t.data_ptr() in own for t in twice.state_dict().values()]
    x = part(random(16, 6, 5, 7), rank)
    found["outcomes"] = [bits(module_outcome(m, x)) for m in (bn, twice[0], averaged.module[0])]
    return found


def noop(*_: Any) -> None: ...


@case
def modules(rank: int) -> Any:
    found = {}
    for name, (make, shape) in MODULES.items():
        bn = make(True)
        for step in range(3):
            found[name, step] = module_outcome(bn, part(random(*shape, seed=step), rank))
        found[name, "count"] = int(bn.num_batches_tracked)
    return found


MODULES: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda s: (SyncBatchNormAct1d if s else BatchNormAct1d)(4), (16, 4)),
    "1d, length": (
        lambda s: (SyncBatchNormAct1d if s else BatchNormAct1d)(4, activation="gelu"),
        (16, 4, 3),
    ),
    "2d, average": (
        lambda s: (SyncBatchNormAct2d if s else BatchNormAct2d)(4, momentum=None),
        (16, 4, 3, 5),
    ),
    "2d, auto": (
        lambda s: (SyncBatchNormAct2d if s else BatchNormAct2d)(4, momentum="auto"),
        (16, 4, 3, 5),
    ),
    "2d, renorm": (
        lambda s: (SyncBatchNormAct2d if s else BatchNormAct2d)(4, renorm=True, warmup=(1, 3, 3)),
        (16, 4, 3, 5),
    ),
    "3d": (lambda s: (SyncBatchNormAct3d if s else BatchNormAct3d)(4), (16, 4, 3, 5, 2)),
}


@case
def wider_and_larger_residuals(rank: int) -> Any:
    x = part(random(16, 3, 4, 4), rank)
    bn = SyncBatchNormAct2d(3)
    return [
        bn(x, part(random(16, 3, 4, 4, dtype=torch.float64), rank)).detach(),
        bn(x, random(3, 1, 1)).detach(),
        SyncBatchNormAct1d(3)(part(random(16, 3, 1), rank), random(1, 3, 6)).detach(),
    ]


@case
def checkpoints(rank: int) -> Any:
    x = part(random(16, 6, 5, 7), rank)
    found = []
    for how in ("plain", True, False):
        bn = SyncBatchNormAct2d(6)
        leaf = x.clone().requires_grad_()
        y = bn(leaf, x) if how == "plain" else checkpoint(bn, leaf, x, use_reentrant=how)
        y.cos().sum().backward()
        found.append(
            (bits([y, leaf.grad, bn.running_mean, bn.running_var]), int(bn.num_batches_tracked))
        )
    return found


class Waiting(nn.Module):
    """Hands a norm over ranks what waits in a fused model: a norm's output, with and without a
    residual, and a dropped path."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.bn2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.0)
        self.sync, self.sync2 = SyncBatchNormAct2d(6), SyncBatchNormAct2d(6, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        z = self.sync(self.bn(x) + x, self.bn2(x))
        return self.sync2(self.drop(z), self.bn(z))


@case
def inputs_that_wait(rank: int) -> Any:
    x = part(random(16, 6, 5, 7), rank)
    x = x if len(x) else random(2, 6, 5, 7)  # torch's own norm takes no empty batch
    found = []
    for fused in (False, True):
        model = gradfuse.fuse(Waiting()) if fused else Waiting()
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.cos().sum().backward()
        assert not fused or all(type(m) is not nn.BatchNorm2d for m in model.modules())
        found.append([y.detach(), leaf.grad, *(b.clone() for b in model.buffers())])
        found[-1] += [p.grad for p in model.parameters()]
    return found


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1),
        BatchNormAct2d(4), nn.Flatten(), nn.Linear(4 * 36, 2),
    )  # fmt: skip


def trained(model: nn.Module, rank: int | None, ranks: int) -> dict[str, Tensor]:
    """The state after three steps of SGD on the sum of the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01 * ranks)
    for step in range(3):
        x = random(16, 3, 6, 6, seed=step)
        optimizer.zero_grad()
        model(x if rank is None else part(x, rank)).square().sum().div(16).backward()
        optimizer.step()
    module = model.module if ranks > 1 else model
    return {name: t.detach() for name, t in module.state_dict().items()}


@case
def data_parallel(rank: int) -> Any:
    return trained(DistributedDataParallel(convert_sync_batchnorm(net())), rank, WORLD)


@case
def compiled(rank: int) -> Any:
    """On two ranks, of which one is empty: importing the compiler takes long."""
    pair = dist.new_group([1, 2])
    if rank not in (1, 2):
        return None
    x = part(random(16, 6, 5, 7), rank)
    found: dict[str, Any] = {}

    def by(how: str, call: Callable[..., Tensor], *updated: Tensor) -> list[bytes]:
        compiled = call if how == "eager" else torch.compile(call, backend=how, fullgraph=True)
        leaf, other = (x.clone().requires_grad_() for _ in range(2))
        y = compiled(leaf, other)
        y.cos().sum().backward()
        return bits([y, leaf.grad, other.grad, *updated])

    for how in ("eager", "aot_eager"):
        torch._dynamo.reset()
        bn = SyncBatchNormAct2d(6, activation="silu", process_group=pair)
        mean, var, drift = torch.zeros(6), torch.ones(6), torch.full((4, 6), 2.0)

        def function(x: Tensor, r: Tensor, mean=mean, var=var, drift=drift) -> Tensor:
            return gradfuse.batch_norm_act(
                x, mean, var, residual=r, activation=None, training=True, renorm=(1.5, 0.4),
                drift=drift, process_group=pair,
            )  # fmt: skip

        with warnings.catch_warnings(record=True) as given:
            found[how] = [
                by(how, bn, bn.running_mean, bn.running_var, bn.num_batches_tracked),
                bits([bn.weight.grad, bn.bias.grad]),
                by(how, function, mean, var, drift),
            ]
        found["warnings"] = [str(w.message) for w in given if "gradfuse" in str(w.message)]
    return found


@case
def adapted(rank: int) -> Any:
    model = nn.Sequential(SyncBatchNormAct2d(6))
    own, other = part(random(16, 6, 5, 7), rank), random(1, 6, 5, 7, seed=9)
    gradfuse.adapt_statistics(model, [own if len(own) else other])  # which takes no empty batch
    return [model[0].running_mean.clone(), model[0].running_var.clone()]


# Errors.


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


BAD: dict[str, tuple[int, dict[str, Any], str]] = {
    "dtype": (1, {"input": torch.ones(2, 3, dtype=torch.int64)}, "TypeError.*input must be float"),
    "no tensor": (0, {"input": [1.0]}, "TypeError.*input must be a Tensor, got list"),
    "weight": (3, {"weight": torch.ones(4)}, "ValueError.*weight must have one element per"),
    "alone": (3, {"weight": torch.ones(4)}, "ValueError.*weight must have one element per"),
    "residual": (2, {"residual": torch.ones(7, 7)}, "ValueError.*residual must broadcast"),
    "activation": (0, {"activation": "swish"}, "ValueError.*activation must be None, 'relu'"),
    "transformed": (1, {"func": True}, "TypeError.*outside of torch.func"),
    "generator": (0, {"p": 0.5, "generator": "x"}, "TypeError.*generator"),
    "slope": (1, {"p": 0.5, "activation": "leaky_relu", "negative_slope": None}, "TypeError.*slo"),
    "ghost_size": (2, {"ghost_size": 2}, "ValueError.*ghost_size must be None with a process_gr"),
}

# Of a module without parameters and buffers: the input alone has a number of channels.
BAD_OF_BARE: dict[str, tuple[int, Any, str]] = {
    "bare, dimensions": (0, torch.ones(4, 5, 3), r"ValueError.*expected 4D input \(got 3D input\)"),
    "bare, channels": (2, torch.ones(2, 5, 3, 3), "ValueError: Sync.*must have num_features=3 ch"),
    "bare, no tensor": (3, None, "AttributeError: 'NoneType' object has no attribute 'dim'"),
    "bare, meta": (1, torch.ones(2, 3, 4, 4, device="meta"), "TypeError.*on the CPU or CUDA"),
}


@case
def errors_on_one_rank(rank: int) -> Any:
    found = {}
    for name, (where, change, _) in BAD.items():
        given: dict[str, Any] = {"input": part(random(16, 3), rank), "weight": None}
        mean, var = torch.zeros(3), torch.ones(3)
        if name == "alone":
            mean = var = None
        if rank == where:
            given |= change
        func = given.pop("func", False)

        def call(given=given, func=func, mean=mean, var=var) -> Any:
            x, w = given.pop("input"), given.pop("weight")

            def norm(x: Tensor) -> Tensor:
                return gradfuse.batch_norm_act(
                    x, mean, var, w, training=True, process_group=dist.group.WORLD, **given
                )

            return torch.func.vjp(norm, x) if func else norm(x)

        message = message_of(call)
        found[name] = message, mean is None or bool((mean == 0).all() and (var == 1).all())
    bn = SyncBatchNormAct2d(3)
    shape = (2, 3) if rank == 1 else (2, 3, 4, 4)
    found["dimensions"] = (
        message_of(lambda: bn(torch.ones(shape))),
        int(bn.num_batches_tracked) == 0,
    )
    channels = 5 if rank == 3 else 3
    wrong = message_of(lambda: bn(torch.ones(2, channels, 4, 4)))
    found["channels"] = wrong, int(bn.num_batches_tracked) == 0
    bare = SyncBatchNormAct2d(3, affine=False, track_running_stats=False)
    for name, (where, input, _) in BAD_OF_BARE.items():
        x = input if rank == where else torch.ones(2, 3, 4, 4)
        found[name] = message_of(lambda x=x: bare(x)), True
    bn(part(random(16, 3, 4, 4), rank))  # all are still in step
    found["after"] = bn.running_mean.clone()
    return found


@case
def few_values(rank: int) -> Any:
    def call(n: int) -> Any:
        bn = SyncBatchNormAct1d(3, activation=None)
        leaf = random(4, 3)[rank : rank + n].clone().requires_grad_()
        message = message_of(lambda: bn(leaf).cos().sum().backward())
        return message, bits([bn.running_mean, bn.running_var]), leaf.grad

    return {
        "one in all": call(int(rank == 1)),
        "none": call(0),
        "one on each": call(1),
    }


@case
def second_derivatives(rank: int) -> str:
    x = part(random(16, 3), rank).clone().requires_grad_()
    y = SyncBatchNormAct1d(3)(x)
    return message_of(lambda: torch.autograd.grad(y.square().sum(), x, create_graph=True))


def run_all(rank: int, folder: str) -> dict[str, Any]:
    return outcomes(rank, CASES)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return by_case(on_ranks(WORLD, run_all, tmp_path_factory.mktemp("ranks")))


def on_all_ranks(found: dict[str, list[Any]], name: str) -> list[Any]:
    for value in found[name]:
        assert not isinstance(value, str), value
    return found[name]


def assert_near(found: Tensor, expected: Tensor, name: str = "", scale: float = 1.0) -> None:
    eps = torch.finfo(expected.dtype).eps
    size = float(expected.abs().max()) if expected.numel() else 0.0
    bound = {"rtol": 4 * scale * eps, "atol": 4 * scale * eps * size}
    torch.testing.assert_close(found, expected, **bound, msg=lambda m: f"{name}: {m}")


def assert_as_one_process(ranks: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    for name, whole in expected.items():
        parts = [rank[name] for rank in ranks]
        if name in OF_RANK:
            assert_near(torch.cat(parts), whole, name)
            assert all(p.stride() == whole.stride() for p in parts if len(p) > 1), name
        elif name in ("dw", "db"):
            assert_near(torch.stack(parts).sum(0), whole, name, scale=4.0)
        else:
            assert_near(parts[0], whole, name)
            assert all(bits(p) == bits(parts[0]) for p in parts), name


def of_one_process(name: str, dtype: torch.dtype, last: bool, monkeypatch: Any) -> dict:
    def scales_of_ranks(op, input, p, mode, generator):
        parts = [
            path_scale(op, part(input, rank), p, mode, torch.Generator().manual_seed(rank))
            for rank in range(WORLD)
        ]
        return torch.cat(parts)

    monkeypatch.setattr("gradfuse.ops.batch_norm.path_scale", scales_of_ranks)
    return outcome(name, dtype, last, None)


@over_ranks
@pytest.mark.parametrize("name", CALLS)
def test_ranks_are_one_process(name, found, monkeypatch):
    for dtype in DTYPES:
        for last in LAYOUTS:
            ranks = [rank[name, dtype, last] for rank in on_all_ranks(found, "calls")]
            assert_as_one_process(ranks, of_one_process(name, dtype, last, monkeypatch))


@over_ranks
@pytest.mark.parametrize("name", CALLS)
def test_the_reference_is_one_process(name, found, monkeypatch):
    ranks = [rank[name] for rank in on_all_ranks(found, "by_the_reference")]
    assert_as_one_process(ranks, of_one_process(name, torch.float32, False, monkeypatch))


@over_ranks
def test_bits_depend_on_no_thread_and_no_arrival(found):
    for first, *others in on_all_ranks(found, "same_bits"):
        assert all(o == first for o in others)


@over_ranks
def test_collectives(found):
    for sent in on_all_ranks(found, "collectives"):
        assert sent["forward"] == [("gloo:all_gather", 2 * 6 + 1)]
        assert sent["backward"] == [("gloo:all_reduce", 2 * 6)]
        assert sent["a frozen input"] == [("gloo:all_gather", 2 * 6 + 1)]
        assert sent["eval"] == sent["a group of one"] == []
        assert sent["bytes"] == [(2 * 6 + 1) * 8, 2 * 6 * 8]


@over_ranks
def test_a_group_of_some_ranks(found):
    ranks = on_all_ranks(found, "group_of_two")
    whole = random(16, 6, 5, 7)
    for pair, x in ((ranks[:2], whole[:8]), (ranks[2:], whole[8:])):
        y, dx, mean, var = module_outcome(BatchNormAct2d(6), x)
        assert_near(torch.cat([rank[0] for rank in pair]), y)
        assert_near(torch.cat([rank[1] for rank in pair]), dx)
        for rank in pair:
            assert_near(rank[2], mean)
            assert_near(rank[3], var)


@over_ranks
def test_a_copy_shares_the_group_and_nothing_else(found):
    for rank in on_all_ranks(found, "copies"):
        assert rank["shared"]
        assert rank["groups"] == [True, True]
        assert rank["attributes"]
        assert not any(rank["tensors"])
        assert rank["outcomes"][1:] == rank["outcomes"][:1] * 2
        assert rank["pickled"].startswith("TypeError")


@over_ranks
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, found):
    ranks = on_all_ranks(found, "modules")
    make, shape = MODULES[name]
    bn = make(False)
    for step in range(3):
        y, dx, mean, var = module_outcome(bn, random(*shape, seed=step))
        of_step = [rank[name, step] for rank in ranks]
        assert_near(torch.cat([rank[0] for rank in of_step]), y)
        assert_near(torch.cat([rank[1] for rank in of_step]), dx, scale=4.0)
        for rank in of_step:
            assert_near(rank[2], mean)
            assert_near(rank[3], var)
    assert {rank[name, "count"] for rank in ranks} == {3}


@over_ranks
def test_residuals_of_another_dtype_or_shape(found):
    x, bn = random(16, 3, 4, 4), BatchNormAct2d(3)
    expected = [
        bn(x, random(16, 3, 4, 4, dtype=torch.float64)),
        bn(x, random(3, 1, 1)),
        BatchNormAct1d(3)(random(16, 3, 1), random(1, 3, 6)),
    ]
    ranks = on_all_ranks(found, "wider_and_larger_residuals")
    for i, whole in enumerate(expected):
        assert_near(torch.cat([rank[i] for rank in ranks]), whole.detach(), scale=4.0)


@over_ranks
def test_a_checkpoint_counts_once(found):
    for plain, *others in on_all_ranks(found, "checkpoints"):
        assert plain[1] == 1
        assert others == [plain, plain]


@over_ranks
def test_inputs_that_wait_in_a_fused_model(found):
    for plain, fused in on_all_ranks(found, "inputs_that_wait"):
        for expected, got in zip(plain, fused, strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


@over_ranks
def test_data_parallel_training(found):
    expected = trained(net(), None, 1)
    for state in on_all_ranks(found, "data_parallel"):
        assert list(state) == list(expected)
        for name, t in expected.items():
            torch.testing.assert_close(state[name], t, rtol=1e-4, atol=1e-5, msg=name)


@over_ranks
def test_compiles_to_one_graph(found):
    ranks = on_all_ranks(found, "compiled")[1:3]
    for rank in ranks:
        assert rank["eager"] == rank["aot_eager"]
        assert not rank["warnings"]
    first, second = (rank["eager"] for rank in ranks)
    for i, untouched in ((0, [torch.zeros(6), torch.ones(6), torch.tensor(0)]), (2, [])):
        assert first[i][-3:] == second[i][-3:] != bits(untouched)  # running statistics


@over_ranks
def test_adapted_to_the_data_of_all_ranks(found):
    x = torch.cat([random(16, 6, 5, 7), random(1, 6, 5, 7, seed=9)])
    model = nn.Sequential(BatchNormAct2d(6))
    gradfuse.adapt_statistics(model, [x])
    for mean, var in on_all_ranks(found, "adapted"):
        assert_near(mean, model[0].running_mean)
        assert_near(var, model[0].running_var)


@over_ranks
@pytest.mark.parametrize("name", [*BAD, *BAD_OF_BARE, "dimensions", "channels"])
def test_an_error_on_one_rank_is_one_on_all(name, found):
    where, _, match = (BAD | BAD_OF_BARE).get(name, (None, None, None))
    if name == "dimensions":
        where, match = 1, r"ValueError.*expected 4D input \(got 2D input\)"
    elif name == "channels":
        where, match = 3, r"ValueError.*must have num_features=3 channels, got \[2, 5, 4, 4\]"
    for rank, results in enumerate(on_all_ranks(found, "errors_on_one_rank")):
        message, untouched = results[name]
        expected = match if rank == where else f"RuntimeError.*that rank {where} of 4 refused"
        assert re.match(expected, message), f"rank {rank}: {message}"
        assert untouched


@over_ranks
def test_ranks_are_in_step_after_an_error(found):
    ranks = [rank["after"] for rank in on_all_ranks(found, "errors_on_one_rank")]
    assert all(bits(rank) == bits(ranks[0]) for rank in ranks)
    bn = BatchNormAct2d(3)
    bn(random(16, 3, 4, 4))
    assert_near(ranks[0], bn.running_mean)


@over_ranks
def test_one_value_in_all_is_an_error_on_all(found):
    untouched = bits([torch.zeros(3), torch.ones(3)])
    bn, x = BatchNormAct1d(3, activation=None), random(4, 3).requires_grad_()
    bn(x).cos().sum().backward()
    for rank, results in enumerate(on_all_ranks(found, "few_values")):
        message, statistics, _ = results["one in all"]
        assert "Expected more than 1 value per channel when training" in message
        assert message.startswith("ValueError")
        assert statistics == untouched
        assert results["none"][:2] == ("none", untouched)
        message, statistics, grad = results["one on each"]
        assert message == "none"
        assert statistics != untouched
        assert_near(grad[0], x.grad[rank], scale=16.0)


@over_ranks
def test_a_second_derivative_is_refused(found):
    for message in found["second_derivatives"]:
        assert message.startswith("RuntimeError: batch_norm_act: expected a first derivative")


# Without other ranks.


def test_alone_it_is_the_local_op(backend, device):
    x = random(6, 3, 4, 5, device=device)
    plain, sync = (cls(3, device=device) for cls in (BatchNormAct2d, SyncBatchNormAct2d))
    assert bits(module_outcome(sync, x, residual=x)) == bits(module_outcome(plain, x, residual=x))


@pytest.mark.parametrize("group", ["world", 0, object()], ids=["str", "int", "object"])
def test_what_is_no_process_group(group):
    got = f"process_group must be a ProcessGroup or None, got {type(group).__name__}"
    with pytest.raises(TypeError, match=f"batch_norm_act: {got}"):
        gradfuse.batch_norm_act(random(4, 3), None, None, training=True, process_group=group)
    with pytest.raises(TypeError, match=f"SyncBatchNormAct1d: {got}"):
        SyncBatchNormAct1d(3, process_group=group)
    with pytest.raises(TypeError, match=f"convert_sync_batchnorm: {got}"):
        convert_sync_batchnorm(nn.BatchNorm1d(3), group)


def test_ghost_batches_are_refused():
    with pytest.raises(ValueError, match="ghost_size must be None with a process_group"):
        gradfuse.batch_norm_act(
            random(4, 3), None, None, training=True, ghost_size=2,
            process_group=dist.ProcessGroup(0, 1),
        )  # fmt: skip
    with pytest.raises(TypeError, match="ghost_size"):
        SyncBatchNormAct1d(3, ghost_size=2)
    model = nn.Sequential(BatchNormAct1d(3), nn.Sequential(BatchNormAct1d(3, ghost_size=2)))
    with pytest.raises(ValueError, match=r"without ghost_size.*got 2 at 1\.0"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is BatchNormAct1d
    sync = nn.Sequential(nn.BatchNorm1d(3), SyncBatchNormAct1d(3))
    with pytest.raises(ValueError, match=r"ghost_size must be None with the .*got 2 at 1"):
        gradfuse.fuse(sync, inplace=True, mode=gradfuse.nn.BatchNormMode(ghost_size=2))
    assert type(sync[0]) is nn.BatchNorm1d
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        convert_sync_batchnorm([nn.BatchNorm1d(3)])


# Conversion.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv(torch.relu(self.bn(x)))) + x)


def zoo() -> dict[str, nn.Module]:
    made = {
        "torch": nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), Block()),
        "fused": gradfuse.fuse(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), Block())),
        "torch's sync": nn.Sequential(nn.Conv2d(3, 3, 1), nn.SyncBatchNorm(3)),
        "gradfuse": nn.Sequential(
            BatchNormAct2d(3, activation="leaky_relu", negative_slope=0.2),
            BatchNormAct2d(3, activation=None, momentum=None),
        ),
        "auto": nn.Sequential(BatchNormAct2d(3, momentum="auto", activation="gelu")),
        "renorm": gradfuse.fuse(
            nn.Sequential(nn.BatchNorm2d(3)), mode=gradfuse.nn.BatchNormMode(renorm=True)
        ),
        "no statistics": nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False, affine=False)),
        "block": nn.Sequential(gradfuse.nn.BasicBlock(3, 3)),
    }
    return made


@pytest.mark.parametrize("name", zoo())
def test_conversion_keeps_the_program(name):
    model = zoo()[name]
    plain = copy.deepcopy(model)
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    names = list(model.state_dict())
    assert convert_sync_batchnorm(model) is model
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert list(model.state_dict()) == names
    assert all(after[key] is t for key, t in before.items())
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all("Sync" in type(m).__name__ for m in norms)
    for step in range(2):
        x = random(4, 3, 5, 5, seed=step)
        expected, got = plain(x), model(x)
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))
    plain.load_state_dict(model.state_dict())


def test_conversion_of_a_norm_itself_and_of_a_shared_one():
    bn = nn.BatchNorm1d(3)
    made = convert_sync_batchnorm(bn)
    assert type(made) is SyncBatchNormAct1d
    assert made.weight is bn.weight
    assert made.activation is None
    model = nn.ModuleList([bn, nn.Sequential(bn)])
    convert_sync_batchnorm(model)
    assert model[0] is model[1][0]
    again = convert_sync_batchnorm(model[0])
    assert type(again) is SyncBatchNormAct1d
    assert type(made.to_batch_norm()) is nn.BatchNorm1d
    back = convert_sync_batchnorm(nn.SyncBatchNorm(3)).to_batch_norm()
    assert type(back) is nn.SyncBatchNorm
    assert back.process_group is None


def test_conversion_keeps_hooks_and_mode_of_training():
    bn, called = nn.BatchNorm1d(3).eval(), []
    bn.register_forward_hook(lambda *_: called.append(1))
    model = convert_sync_batchnorm(nn.Sequential(bn).eval())
    model(random(2, 3))
    assert called == [1]
    assert not model[0].training


def test_torchs_conversion_refuses_the_modules():
    with pytest.raises(TypeError, match="convert_sync_batchnorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(SyncBatchNormAct2d(3)))


def test_what_is_not_known_stays_and_is_named():
    class Own(nn.BatchNorm1d):
        pass

    model = nn.Sequential(Own(3), nn.BatchNorm1d(3))
    with pytest.warns(UserWarning, match=r"left as they are: 0 \(Own\)"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is Own
    assert type(model[1]) is SyncBatchNormAct1d


def test_conversion_of_timms_norms():
    layers = pytest.importorskip("timm.layers")
    for fused in (False, True):
        model = nn.Sequential(
            layers.BatchNormAct2d(3, act_layer=nn.PReLU), layers.BatchNormAct2d(3, apply_act=False)
        )
        plain = copy.deepcopy(model)
        if fused:
            gradfuse.fuse(model, inplace=True)
        names = list(model.state_dict())
        with warnings.catch_warnings(action="error"):
            convert_sync_batchnorm(model)
        assert list(model.state_dict()) == names
        x = random(4, 3, 5, 5)
        torch.testing.assert_close(model(x), plain(x))
        torch.testing.assert_close(model.state_dict(), plain.state_dict())
        made = layers.convert_sync_batchnorm(plain)
        torch.testing.assert_close(convert_sync_batchnorm(made)(x), model(x))


def test_a_state_dict_goes_both_ways():
    sync, plain = SyncBatchNormAct2d(3), nn.BatchNorm2d(3)
    sync(random(4, 3, 2, 2))
    plain.load_state_dict(sync.state_dict())
    SyncBatchNormAct2d(3).load_state_dict(plain.state_dict())
    assert bits(list(plain.state_dict().values())) == bits(list(sync.state_dict().values()))
