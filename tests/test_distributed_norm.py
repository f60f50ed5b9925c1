"""Norms over ranks: each element counts once, all ranks act alike, one collective a norm.

One run of four processes does all cases; the tests look at what the ranks returned. A case is a
function of the rank and returns plain Python values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import SANITIZED
from processes import by_case, on_ranks, outcomes
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import Parameter

import gradfuse

pytestmark = [
    pytest.mark.no_kernel,  # other processes run them
    pytest.mark.skipif(SANITIZED, reason="torch's own processes are not sanitized"),
]

SIZE = 4
CASES: list[Callable[..., Any]] = []
SHAPES = ((6, 5), (8, 3), (5,), (1, 7), ())


def case(function: Callable[..., Any]) -> Callable[..., Any]:
    CASES.append(function)
    return function


def full(seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Whole gradients, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(s, generator=generator) * scale).to(dtype) for s in SHAPES]


def true_norm(*parts: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for part in parts for t in part))


def sharded(grads: Sequence[Tensor], mesh: Any, placements: Sequence[Any]) -> list[Parameter]:
    """Parameters whose gradients are spread over a mesh."""
    from torch.distributed.tensor import distribute_tensor

    out = []
    for g in grads:
        own = placements if g.ndim else [replicate_placement()] * mesh.ndim
        p = Parameter(distribute_tensor(torch.zeros_like(g), mesh, own))
        p.grad = distribute_tensor(g, mesh, own)
        out.append(p)
    return out


def replicate_placement() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


def plain(grads: Sequence[Tensor]) -> list[Parameter]:
    out = [Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(out, grads, strict=True):
        p.grad = g.clone()
    return out


class Counted:
    """Counts all-reduces and their bytes, in the block."""

    def __enter__(self) -> Counted:
        self.calls, self.bytes, self._real = 0, 0, dist.all_reduce

        def counting(t: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.bytes += t.numel() * t.element_size()
            return self._real(t, *args, **kwargs)

        dist.all_reduce = counting
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._real


def clipped(ps: Sequence[Parameter], truth: float, **options: Any) -> dict[str, Any]:
    """Clips to a tenth of the norm. The norm, its error, what came of the gradients."""
    before = [gradfuse.distributed.local_of(p.grad).clone() for p in ps]
    with Counted() as counted:
        norm = gradfuse.clip_grad_norm_(ps, truth / 10, **options)
    after = [gradfuse.distributed.local_of(p.grad) for p in ps]
    factor = truth / 10 / (truth + 1e-6)
    return {
        "norm": float(norm),
        "plain": type(norm) is Tensor,
        "error": abs(float(norm) / truth - 1.0),
        "scaled": all(
            torch.allclose(a, b * factor, rtol=1e-5) for a, b in zip(after, before, strict=True)
        ),
        "calls": counted.calls,
        "bytes": counted.bytes,
    }


def of_mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> Any:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


@case
def shard_0(rank: int) -> Any:
    from torch.distributed.tensor import Shard

    return clipped(sharded(full(), of_mesh((4,), ("dp",)), [Shard(0)]), true_norm(full()))


@case
def large(rank: int) -> Any:
    from torch.distributed.tensor import Shard

    ps = sharded(full(scale=1e17), of_mesh((4,), ("dp",)), [Shard(0)])
    return clipped(ps, true_norm(full(scale=1e17)))


@case
def small_and_wide(rank: int) -> Any:
    from torch.distributed.tensor import Shard

    grads = [*full(scale=1e-30), *(g * 1e-200 for g in full(1, 1.0, torch.float64))]
    ps = sharded(grads, of_mesh((4,), ("dp",)), [Shard(0)])
    return clipped(ps, true_norm(grads))


@case
def overflowing_squares(rank: int) -> Any:
    from torch.distributed.tensor import Shard

    grads = [g * 1e200 for g in full(1, 1.0, torch.float64)]
    ps = sharded(grads, of_mesh((4,), ("dp",)), [Shard(0)])
    return clipped(ps, 1e200 * true_norm(full(1, 1.0, torch.float64)))


@case
def replicate(rank: int) -> Any:
    ps = sharded(full(), of_mesh((4,), ("dp",)), [replicate_placement()])
    return clipped(ps, true_norm(full()))


@case
def hybrid(rank: int) -> Any:
    from torch.distributed.tensor import Shard

    ps = sharded(full(), of_mesh((2, 2), ("replica", "shard")), [replicate_placement(), Shard(0)])
    return clipped(ps, true_norm(full()))


@case
def fsdp_beside_fsdp_and_tp(rank: int) -> Any:
    from torch.distributed.tensor import Shard

    mesh = of_mesh((2, 2), ("dp", "tp"))
    matrices = [g for g in full() if g.ndim == 2]
    ps = sharded(matrices, mesh, [Shard(0), Shard(1)])
    ps += sharded(full(1), mesh["dp"], [Shard(0)])
    return clipped(ps, true_norm(matrices, full(1)))


@case
def crossing_meshes(rank: int) -> Any:
    from torch.distributed.tensor import Shard

    mesh = of_mesh((2, 2), ("dp", "ep"))
    ps = sharded(full(), mesh["dp"], [Shard(0)]) + sharded(full(1), mesh["ep"], [Shard(0)])
    return clipped(ps, true_norm(full(), full(1)))


@case
def plain_beside_dtensors(rank: int) -> Any:
    from torch.distributed.tensor import Shard

    ps = sharded(full(), of_mesh((4,), ("dp",)), [Shard(0)]) + plain(full(1))
    return clipped(ps, true_norm(full(), full(1)))


@case
def pipeline_of_meshes(rank: int) -> Any:
    from torch.distributed.tensor import Shard

    mesh = of_mesh((2, 2), ("pp", "dp"))
    stage = rank // 2
    ps = sharded(full(stage)[: 4 - stage], mesh["dp"], [Shard(0)])
    truth = true_norm(full(0)[:4], full(1)[:3])
    return [
        clipped(ps, truth, group=mesh["pp"]),
        clipped(ps, truth / 10, group=mesh["pp"].get_group()),
    ]


@case
def zero(rank: int) -> Any:
    truth = true_norm(*(full(r) for r in range(SIZE)))
    return clipped(plain(full(rank)), truth, group=dist.group.WORLD)


@case
def one_rank_without_gradients(rank: int) -> Any:
    truth = true_norm(*(full(r) for r in range(SIZE - 1)))
    ps = plain(full(rank)) if rank < SIZE - 1 else []
    return clipped(ps, truth, group=dist.group.WORLD)


@case
def zero_by_copies(rank: int) -> Any:
    mesh = of_mesh((2, 2), ("replica", "shard"))
    truth = true_norm(full(0), full(1))
    ps = plain(full(rank % 2))
    return clipped(ps, truth, group=dist.group.WORLD, replicated_over=mesh["replica"])


@case
def tensor_parallel_by_hand(rank: int) -> Any:
    mine, copies = plain(full(rank)), plain(full(9))
    truth = true_norm(*(full(r) for r in range(SIZE)), full(9))
    world = dist.group.WORLD
    return clipped([*mine, *copies], truth, group=world, replicated_over={world: copies})


@case
def orders(rank: int) -> Any:
    """Other norms, of tensors."""
    from torch.distributed.tensor import Shard

    ps = sharded(full(), of_mesh((4,), ("dp",)), [Shard(0)])
    flat = torch.cat([g.double().flatten() for g in full()])
    return [
        abs(float(gradfuse.get_total_norm([p.grad for p in ps], p)) / float(flat.norm(p)) - 1.0)
        for p in (1.0, 2.0, 3.0, math.inf)
    ]


def with_nan(rank: int, in_copy: bool) -> list[Parameter]:
    from torch.distributed.tensor import Shard

    ps = sharded(full(), of_mesh((4,), ("dp",)), [Shard(0)]) + plain(full(1))
    grad = ps[-1].grad if in_copy else gradfuse.distributed.local_of(ps[0].grad)
    if rank == 2:  # which counts no plain gradient
        grad.flatten()[0] = math.nan
    return ps


@case
def nan_on_one_rank(rank: int) -> Any:
    found = {}
    for in_copy in (False, True):
        for nonfinite in ("propagate", "error", "zero"):
            ps = with_nan(rank, in_copy)
            before = [gradfuse.distributed.local_of(p.grad).clone() for p in ps]
            try:
                norm = float(gradfuse.clip_grad_norm_(ps, 1.0, nonfinite=nonfinite))
            except RuntimeError as error:
                norm = str(error)
            after = [gradfuse.distributed.local_of(p.grad) for p in ps]
            same = all(
                a.equal(b) or bool(b.isnan().any()) for a, b in zip(after, before, strict=True)
            )
            flat = torch.cat([a.flatten() for a in after])
            found[nonfinite, in_copy] = (
                norm,
                same,
                bool(flat.isnan().all()),
                bool((flat == 0).all()),
            )
    return found


@case
def error_on_one_rank(rank: int) -> Any:
    ps = plain(full(rank))
    if rank == 1:
        ps[0].grad = torch.zeros(1, 5).expand(6, 5)
    before = [p.grad.clone() for p in ps]
    try:
        gradfuse.clip_grad_norm_(ps, 0.1, group=dist.group.WORLD)
    except RuntimeError as error:
        return str(error), all(p.grad.equal(b) for p, b in zip(ps, before, strict=True))


@case
def partial_on_one_rank(rank: int) -> Any:
    """And a parameter that has a gradient on one rank alone."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh = of_mesh((4,), ("dp",))
    ps = sharded(full(), mesh, [Shard(0)])
    if rank == 1:
        ps[0].grad = DTensor.from_local(torch.ones(6, 5), mesh, [Partial()])
    partial = _error(lambda: gradfuse.clip_grad_norm_(ps, 1.0))
    for p in ps[1 if rank == 0 else 0 :]:
        p.grad = None
    return partial, float(gradfuse.clip_grad_norm_(ps, 1.0)), true_norm([full()[0][:2]])


@case
def quiet(rank: int) -> Any:
    from torch.distributed.tensor import Shard

    ps = sharded(full(), of_mesh((4,), ("dp",)), [Shard(0)]) + plain(full(1))
    versions = [gradfuse.distributed.local_of(p.grad)._version for p in ps]
    gradfuse.clip_grad_norm_(ps, 1e6)
    quiet = [gradfuse.distributed.local_of(p.grad)._version for p in ps]
    gradfuse.clip_grad_norm_(ps, 1e-6)
    clipped = [gradfuse.distributed.local_of(p.grad)._version for p in ps]
    return versions == quiet and all(a > b for a, b in zip(clipped, quiet, strict=True))


@case
def clipper(rank: int) -> Any:
    """Three steps of a GradClipper: the figures of its report, here and gathered."""
    from torch.distributed.tensor import Shard

    ps = sharded(full(), of_mesh((4,), ("dp",)), [Shard(0)]) + plain(full(1))
    ps[1].grad = None
    own = gradfuse.GradClipper({f"p{i}": p for i, p in enumerate(ps)}.items(), 1.0)
    own.clip_()
    gradfuse.distributed.local_of(ps[0].grad).mul_(2.0)
    if rank == 2:
        gradfuse.distributed.local_of(ps[0].grad).flatten()[0] = math.inf
    own.max_norm = math.inf
    report = own.clip_()
    whole = report.gather()
    return {
        "norm": report.total_norm,
        "names": [row.name for row in report.parameters],
        "sizes": [row.numel for row in whole.parameters],
        "norms": [row.norm for row in whole.parameters[1:]],
        "bad": whole.first_nonfinite(),
        "bad copy": _bad_copy(rank),
        "here": report.first_nonfinite(),
    }


@case
def clipper_with_a_policy(rank: int) -> Any:
    """Steps of GradClippers with a policy beside those of one process that has all gradients."""
    from torch.distributed.tensor import Shard

    found = {}
    makes = {
        "agc by norm": lambda: gradfuse.policies.AutoClip(10.0),
        "adagc": lambda: gradfuse.policies.AdaGC(warmup=1),
        "value": lambda: gradfuse.policies.Value(0.5),
    }
    for name, make in makes.items():
        mesh = of_mesh((2, 2), ("replica", "shard"))
        errors, calls = [], []
        clipper, alone = gradfuse.GradClipper([], make()), gradfuse.GradClipper([], make())
        for step in range(3):
            grads = [*full(step, 1.0 + step), *full(step + 9)]
            ps = sharded(grads[: len(SHAPES)], mesh, [replicate_placement(), Shard(0)])
            ps += plain(grads[len(SHAPES) :])
            whole = plain(grads)
            if step == 0:
                held, single = ps, whole
                for p, q in zip(held, single, strict=True):
                    clipper.add(p)
                    alone.add(q)
            for p, new in zip((*held, *single), (*ps, *whole), strict=True):
                p.grad = new.grad
            with Counted() as counted:
                report = clipper.clip_()
            other = alone.clip_()
            calls.append((counted.calls, counted.bytes))
            for p, q in zip(held, single, strict=True):
                g = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                errors.append(float((g - q.grad).abs().max()))
            errors.append(abs(report.total_norm - other.total_norm))
            for key, t in clipper.state_dict().items():
                theirs = alone.state_dict()[key]
                errors.append(float((t - theirs).nan_to_num(0.0, 0.0, 0.0).abs().max()))
            assert report.clipped == other.clipped
        found[name] = max(errors), calls
    return found


@case
def adaptive(rank: int) -> Any:
    """adaptive_clip_grad_ beside one process with whole tensors, by placements and order."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = of_mesh((2, 2), ("a", "b"))
    strided = _StridedShard(0, split_factor=2)
    placed = {
        "rows": [replicate_placement(), Shard(0)],
        "rows twice": [Shard(0), Shard(0)],
        "strided rows": [strided, Shard(0)],
        "columns": [replicate_placement(), Shard(1)],
        "rows and columns": [Shard(0), Shard(1)],
        "columns twice": [Shard(1), Shard(1)],
        "copies": [replicate_placement(), replicate_placement()],
    }
    found = {}
    for name, placements in placed.items():
        for norm_type in (2.0, 1.0, 3.0, math.inf):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                scale = 1e200 if dtype is torch.float64 else 1.0
                whole, ours = [], []
                for i, (w, g) in enumerate(zip(full(0, scale, dtype), full(1), strict=True)):
                    fits = (
                        w.ndim > 1 and len(w) == 8
                        if name == "strided rows"
                        else w.ndim > 1
                        if "col" in name
                        else w.ndim
                    )
                    by = placements if fits else [replicate_placement()] * 2
                    w, g = w * 10.0 ** -(i % 2), (g.to(dtype) * scale)
                    whole.append(Parameter(w.clone()))
                    whole[-1].grad = g.clone()
                    ours.append(Parameter(distribute_tensor(w, mesh, by)))
                    ours[-1].grad = distribute_tensor(g, mesh, by)
                plain_one = Parameter(whole[0].detach().clone())
                plain_one.grad = whole[0].grad.clone()
                with Counted() as counted:
                    gradfuse.adaptive_clip_grad_([*ours, plain_one], 0.7, 1.0, norm_type)
                gradfuse.adaptive_clip_grad_(whole, 0.7, 1.0, norm_type)
                tolerance = {"rtol": 1e-2 if dtype is torch.bfloat16 else 1e-5, "atol": 0.0}
                pairs = [(p.grad.full_tensor(), q.grad) for p, q in zip(ours, whole, strict=True)]
                pairs.append((plain_one.grad, whole[0].grad))
                same = all(torch.allclose(a, b, **tolerance) for a, b in pairs)
                found[name, norm_type, dtype] = same, counted.calls
    uneven = Parameter(distribute_tensor(torch.ones(8, 8), mesh, [strided, Shard(1)]))
    uneven.grad = distribute_tensor(torch.ones(8, 8), mesh, [strided, Shard(1)])
    bad = sharded(full(), mesh, [replicate_placement(), Shard(0)])
    before = [p.grad.to_local().clone() for p in bad]
    if rank == 2:
        bad[2].grad = DTensor.from_local(
            torch.ones(5), mesh, [replicate_placement(), replicate_placement()]
        )
    refused = [_error(lambda ps=ps: gradfuse.adaptive_clip_grad_(ps)) for ps in ([uneven], bad)]
    same = all(
        a.equal(p.grad.to_local())
        for i, (a, p) in enumerate(zip(before, bad, strict=True))
        if i != 2
    )
    missing = sharded(full(), mesh, [replicate_placement(), Shard(0)])
    for p in missing[rank % 2 :: 2]:
        p.grad = None
    gradfuse.adaptive_clip_grad_(missing)
    return found, refused, same


@case
def norms_of_whole_parameters(rank: int) -> Any:
    """LAMB and update_clip with copies of shards, beside one process."""
    from torch.distributed.tensor import Shard

    mesh = of_mesh((2, 2), ("replica", "shard"))
    found = []
    for rule, options in (
        (gradfuse.optim.LAMB, {"lr": 0.1, "weight_decay": 0.1, "clip": 1.0}),
        (gradfuse.optim.AdamW, {"lr": 0.1, "betas": (0.9, 0.5), "update_clip": True}),
    ):
        ours, whole = sharded(full(), mesh, [replicate_placement(), Shard(0)]), plain(full())
        other = sharded(full(1), mesh["shard"], [Shard(0)])  # a copy on the other replica
        ours, whole = [*ours, *other], [*whole, *plain(full(1))]
        start = [*full(2), *full(3)]
        for p, q, t in zip(ours, whole, start, strict=True):
            q.data.copy_(t)
            p.data.copy_(sharded([t], p.device_mesh, p.placements)[0].grad)
        for ps in (ours, whole):
            optimizer = rule(ps, **options)
            for _ in range(3):
                optimizer.step()
                for p in ps:
                    p.grad *= 10.0
        found.append(
            max(
                float((p.full_tensor() - q).detach().abs().max())
                for p, q in zip(ours, whole, strict=True)
            )
        )
    return found


@case
def policies_over_a_group(rank: int) -> Any:
    """Of disjoint gradients, whose number differs from rank to rank."""
    ps = plain(full(rank)[: rank + 1])
    world = dist.group.WORLD
    own = gradfuse.GradClipper(ps, gradfuse.policies.AutoClip(50.0), group=world)
    for _ in range(2):
        own.clip_()
        for p in ps:
            p.grad *= 2.0
    refused = _error(lambda: setattr(own, "max_norm", gradfuse.policies.AdaGC()))
    return own.clip_().total_norm, refused


class Rewriting(gradfuse.policies.Policy):
    """Raises between two norms on one rank."""

    def rewrite(self, parameters: Sequence[Tensor], scale: Tensor | None) -> None:
        if dist.get_rank() == 1:
            raise ValueError("no such gradient")


@case
def rewrites_that_raise_on_one_rank(rank: int) -> Any:
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    clipper = gradfuse.GradClipper([p], Rewriting(), replicated_over=dist.group.WORLD)
    optimizer = gradfuse.optim.SGD([p], lr=0.1, clip=Rewriting(), replicated_over=dist.group.WORLD)
    before = p.detach().clone()
    errors = [_error(clipper.clip_), _error(optimizer.step)]
    return errors, torch.equal(p.detach(), before)


def _bad_copy(rank: int) -> Any:
    """A NaN on a rank that counts no plain gradient, as the gathered report has it."""
    own = gradfuse.GradClipper(with_nan(rank, in_copy=True), math.inf)
    return own.clip_().gather().first_nonfinite()


def _error(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@case
def without_a_collective(rank: int) -> Any:
    """Scaling by a given norm, and clamping."""
    from torch.distributed.tensor import Shard

    ps = sharded(full(), of_mesh((4,), ("dp",)), [Shard(0)])
    stock = sharded(full(), of_mesh((4,), ("dp",)), [Shard(0)])
    with Counted() as counted:
        gradfuse.clip_grads_with_norm_(ps, 1.0, torch.tensor(4.0))
        gradfuse.clip_grad_value_(ps, 0.1)
    torch.nn.utils.clip_grads_with_norm_(stock, 1.0, torch.tensor(4.0))
    torch.nn.utils.clip_grad_value_(stock, 0.1)
    pairs = zip(ps, stock, strict=True)
    return counted.calls, all(
        torch.allclose(a.grad.to_local(), b.grad.to_local()) for a, b in pairs
    )


def _traced(call: Callable[[], object]) -> object:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        return call()


def _compiled(rank: int) -> object:
    """On one rank alone: nothing is sent, and Dynamo takes seconds to import."""
    if rank:
        return None
    norm = torch.compile(gradfuse.get_total_norm, backend="eager", fullgraph=True)
    return norm([torch.ones(2)], group=dist.group.WORLD)


@case
def refused(rank: int) -> Any:
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh = of_mesh((2, 2), ("a", "b"))
    partial = Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial(), replicate_placement()]))
    partial.grad = DTensor.from_local(torch.ones(3), mesh, [Partial(), replicate_placement()])
    shard = sharded(full(), mesh["a"], [Shard(0)])
    calls: dict[str, Callable[[], object]] = {
        "partial": lambda: gradfuse.clip_grad_norm_(partial, 1.0),
        "two dimensions": lambda: gradfuse.clip_grad_norm_(plain(full()), 1.0, group=mesh),
        "no group": lambda: gradfuse.clip_grad_norm_(plain(full()), 1.0, group="world"),
        "traced": lambda: _traced(lambda: gradfuse.get_total_norm([p.grad for p in shard])),
        "compiled": lambda: _compiled(rank),
    }
    return {name: _error(call) for name, call in calls.items()}


def run_all(rank: int, folder: str) -> dict[str, Any]:
    return outcomes(rank, CASES)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return by_case(on_ranks(SIZE, run_all, tmp_path_factory.mktemp("ranks")))


def on_all_ranks(found: dict[str, list[Any]], name: str) -> list[Any]:
    for value in found[name]:
        assert not isinstance(value, str), value
    return found[name]


NORMS = [
    "shard_0",
    "large",
    "small_and_wide",
    "overflowing_squares",
    "replicate",
    "hybrid",
    "fsdp_beside_fsdp_and_tp",
    "crossing_meshes",
    "plain_beside_dtensors",
    "pipeline_of_meshes",
    "zero",
    "one_rank_without_gradients",
    "zero_by_copies",
    "tensor_parallel_by_hand",
]


@pytest.mark.parametrize("name", NORMS)
def test_every_element_counts_once(name, found):
    """The norm is right and has the same bits on all ranks; one all-reduce; all shards scale."""
    results = on_all_ranks(found, name)
    calls = list(zip(*results, strict=True)) if isinstance(results[0], list) else [results]
    for ranks in calls:
        assert len({r["norm"] for r in ranks}) == 1
        for r in ranks:
            assert r["error"] < 1e-6
            assert r["scaled"]
            assert r["plain"]
            assert r["calls"] == 1
            assert r["bytes"] == 32 * SIZE


def test_orders(found):
    for errors in on_all_ranks(found, "orders"):
        assert max(errors) < 1e-6


def test_nan_on_one_rank_acts_on_all(found):
    results = on_all_ranks(found, "nan_on_one_rank")
    for in_copy in (False, True):
        for norm, _, all_nan, _ in (r["propagate", in_copy] for r in results):
            assert math.isnan(norm)
            assert all_nan
        for norm, same, _, _ in (r["error", in_copy] for r in results):
            assert norm.startswith("clip_grad_norm_: expected a finite total norm")
            assert same
        for norm, _, _, all_zero in (r["zero", in_copy] for r in results):
            assert math.isnan(norm)
            assert all_zero


def test_an_error_on_one_rank_is_one_on_all(found):
    for rank, (message, same) in enumerate(on_all_ranks(found, "error_on_one_rank")):
        assert same
        assert ("element per memory location" if rank == 1 else "rank 1 of 4 refused") in message


def test_a_partial_gradient_or_a_missing_one_on_one_rank(found):
    for rank, (partial, norm, truth) in enumerate(on_all_ranks(found, "partial_on_one_rank")):
        assert ("whose sum over ranks" if rank == 1 else "rank 1 of 4 refused") in partial
        assert norm == pytest.approx(truth)


def test_a_clipper_and_its_reports(found):
    names = [f"p{i}" for i in range(2 * len(SHAPES)) if i != 1]
    for rank, r in enumerate(on_all_ranks(found, "clipper")):
        assert math.isinf(r["norm"])
        assert r["names"] == names
        assert r["sizes"] == [30, 5, 7, 1, 30, 24, 5, 7, 1]  # each element once
        before = [*full()[2:], *full(1)]
        scale = 1 / true_norm([full()[0]], before)
        expected = [true_norm([g]) * scale for g in before]
        assert r["norms"] == pytest.approx(expected, rel=1e-5)
        assert (r["bad"].name, r["bad"].rank, r["bad"].nonfinite) == ("p0", 2, 1)
        assert (r["here"] is not None) == (rank == 2)
        assert (r["bad copy"].name, r["bad copy"].rank) == ("9", 2)


def test_a_clipper_with_a_policy(found):
    for of_rank in on_all_ranks(found, "clipper_with_a_policy"):
        for name, (error, calls) in of_rank.items():
            assert error < 1e-5
            extra = {"adagc": 8 * 2 * len(SHAPES), "value": 8}.get(name, 0)
            assert calls == [(1, 32 * SIZE + extra)] * 3


def test_adaptive_clipping_by_whole_units(found):
    for rank, (clipped, refused, same) in enumerate(on_all_ranks(found, "adaptive")):
        assert [key for key, value in clipped.items() if value != (True, 1)] == []
        assert refused[0].startswith("ValueError: adaptive_clip_grad_: expected rows that lie one")
        expected = "expected a gradient of the shape and" if rank == 2 else "rank 2 of 4 refused"
        assert expected in refused[1]
        assert same


def test_norms_of_whole_parameters_beside_copies(found):
    for errors in on_all_ranks(found, "norms_of_whole_parameters"):
        assert max(errors) < 1e-5


def test_policies_over_a_group(found):
    ranks = on_all_ranks(found, "policies_over_a_group")
    assert len({norm for norm, _ in ranks}) == 1
    for _, refused in ranks:
        assert refused.startswith("ValueError: GradClipper: expected max_norm to decide by the glo")


def test_nothing_is_written_below_the_bound(found):
    assert all(on_all_ranks(found, "quiet"))


def test_scaling_and_clamping_need_no_collective(found):
    assert on_all_ranks(found, "without_a_collective") == [(0, True)] * SIZE


def test_a_rewrite_that_raises_on_one_rank_raises_on_all(found):
    for rank, (errors, same) in enumerate(on_all_ranks(found, "rewrites_that_raise_on_one_rank")):
        for error in errors:
            assert ("no such gradient" if rank == 1 else "rank 1 of 4 refused") in error
        assert same


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("partial", "ValueError: clip_grad_norm_: expected gradients whose sum over ranks is done"),
        (
            "two dimensions",
            "ValueError: clip_grad_norm_: group must have one dimension, got a mesh of 2",
        ),
        (
            "no group",
            "TypeError: clip_grad_norm_: group must be a ProcessGroup or a DeviceMesh, got str",
        ),
        ("traced", "get_total_norm: expected a call that is not traced"),
        ("compiled", "expected no group within torch.compile"),
    ],
)
def test_refused(name, message, found):
    ranks = on_all_ranks(found, "refused")
    for messages in ranks[:1] if name == "compiled" else ranks:
        assert message in messages[name]


def test_a_group_needs_torch_distributed():
    with pytest.raises((ValueError, TypeError), match="get_total_norm: group"):
        gradfuse.get_total_norm([torch.ones(2)], group="world")
