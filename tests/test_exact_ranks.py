"""The exact norm over ranks: the bits of one process, by one all-reduce of integers.

One run of four processes does all cases, as in test_distributed_norm.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import SANITIZED
from processes import by_case, on_ranks, outcomes
from test_distributed_norm import Counted, full, of_mesh, plain, sharded
from torch import Tensor
from torch.nn import Parameter

import gradfuse
from gradfuse.optim import SGD
from gradfuse.policies import Norm

pytestmark = [
    pytest.mark.no_kernel,  # other processes run them
    pytest.mark.skipif(SANITIZED, reason="torch's own processes are not sanitized"),
]

SIZE = 4


def singles() -> list[Tensor]:
    """Whole gradients, new ones each time: a DTensor may share their memory."""
    return [torch.randn(101, 7, generator=torch.Generator().manual_seed(5)), *full(1)]


def doubles() -> list[Tensor]:
    return [g * 1e-160 for g in full(2, 1.0, torch.float64)]


def alone(grads: list[Tensor]) -> tuple[float, float]:
    """Norm and total_norm of these gradients in one process."""
    report = gradfuse.GradClipper(plain(grads), 0.5, exact=True).clip_()
    return float(report.norm_tensor), report.total_norm


def together(ps: list[Parameter], **options: Any) -> tuple[float, float, int, int]:
    """The same over ranks, and the all-reduces and their bytes."""
    with Counted() as counted:
        report = gradfuse.GradClipper(ps, 0.5, exact=True, **options).clip_()
    grads = [p.grad for p in ps]
    with Counted() as more:
        norm = gradfuse.get_total_norm(grads, exact=True, **options)
    # Clipped to half, whatever it was before.
    assert abs(float(norm) - min(0.5, report.total_norm)) < 1e-6
    assert more.calls == counted.calls
    return float(report.norm_tensor), report.total_norm, counted.calls, counted.bytes


def by_meshes(rank: int) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard

    line, square = of_mesh((4,), ("dp",)), of_mesh((2, 2), ("a", "b"))
    return {
        "shard": together(sharded(singles(), line, [Shard(0)])),
        "replicate": together(sharded(singles(), line, [Replicate()])),
        "hybrid": together(sharded(singles(), square, [Replicate(), Shard(0)])),
        "plain beside": together(sharded(singles()[:3], line, [Shard(0)]) + plain(singles()[3:])),
        "float64": together(sharded([*singles(), *doubles()], line, [Shard(0)])),
    }


def by_hand(rank: int) -> dict[str, Any]:
    """Groups of one to four ranks, each gradient dealt out by elements. The last rank alone has
    the float64 gradient."""
    found = {}
    for size in range(1, SIZE + 1):
        group = dist.new_group(list(range(size)))
        if rank < size:
            shards = [g.flatten()[rank::size] for g in singles()]
            if rank == size - 1:
                shards.append(doubles()[0])
            found[f"{size} ranks"] = together(plain(shards), group=group)
    return found


def of_a_step(rank: int) -> Any:
    from torch.distributed.tensor import Shard

    ps = sharded(singles(), of_mesh((4,), ("dp",)), [Shard(0)])
    optimizer = SGD(ps, lr=1.0, clip=Norm(0.5, exact=True))
    with Counted() as counted:
        optimizer.step()
    assert optimizer.report is not None
    return optimizer.report.total_norm, counted.calls, [p.full_tensor().detach() for p in ps]


def _error(call: Callable[[], object]) -> str:
    try:
        return f"no error: {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def errors(rank: int) -> dict[str, str]:
    from torch.distributed.tensor import Shard

    mesh = of_mesh((4,), ("dp",))
    expanded = plain(singles())
    if rank == 2:
        expanded[0].grad = torch.ones(1).expand(101, 7)
    bad = sharded(singles(), mesh, [Shard(0)]) + plain([torch.ones(3)])
    if rank == 3:
        bad[-1].grad.fill_(torch.nan)  # in a copy that rank 0 counts
    unexpected = sharded(singles(), mesh, [Shard(0)]) + plain([torch.ones(3)])
    if rank == 1:
        unexpected[-1].grad_dtype = None
        unexpected[-1].grad = torch.ones(3, dtype=torch.float64)
    world = dist.group.WORLD
    return {
        "refused": _error(lambda: gradfuse.clip_grad_norm_(expanded, 1.0, exact=True, group=world)),
        "nan": _error(lambda: gradfuse.clip_grad_norm_(bad, 1.0, nonfinite="error", exact=True)),
        "unexpected": _error(lambda: gradfuse.clip_grad_norm_(unexpected, 1.0, exact=True)),
    }


def run_all(rank: int, folder: str) -> dict[str, Any]:
    return outcomes(rank, (by_meshes, by_hand, of_a_step, errors))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    ranks = on_ranks(SIZE, run_all, tmp_path_factory.mktemp("ranks"))
    for rank in ranks:
        for value in rank.values():
            assert not isinstance(value, str), value
    return by_case(ranks)


@pytest.mark.parametrize("name", ["shard", "replicate", "hybrid", "plain beside", "float64"])
def test_any_sharding_gives_the_bits_of_one_process(name, found):
    grads = [*singles(), *doubles()] if name == "float64" else singles()
    for rank in found["by_meshes"]:
        norm, total, calls, size = rank[name]
        assert (norm, total) == alone(grads)
        assert calls == 1
        assert size == 8 * ((109 if name == "float64" else 18) + 1)


@pytest.mark.parametrize("size", range(1, SIZE + 1))
def test_any_number_of_ranks_gives_the_bits_of_one_process(size, found):
    for rank in found["by_hand"][:size]:
        norm, total, calls, bytes_ = rank[f"{size} ranks"]
        of_one, expected = alone([*singles(), doubles()[0]])
        assert total == expected
        assert norm == pytest.approx(of_one, rel=1e-7)  # float32 where no gradient is wider
        assert (calls, bytes_) == ((1, 8 * 110) if size > 1 else (0, 0))


def test_a_step_over_ranks(found):
    ps = plain(singles())
    optimizer = SGD(ps, lr=1.0, clip=Norm(0.5, exact=True))
    optimizer.step()
    for total, calls, after in found["of_a_step"]:
        assert total == optimizer.report.total_norm
        assert calls == 1
        assert all(torch.equal(a, p) for a, p in zip(after, ps, strict=True))


def test_what_one_rank_has_acts_on_all(found):
    for rank, messages in enumerate(found["errors"]):
        own = "element per memory location" if rank == 2 else "rank 2 of 4 refused"
        assert own in messages["refused"]
        assert "expected a finite total norm of order 2, got nan" in messages["nan"]
        own = "gradients of their parameters' dtypes" if rank == 1 else "rank 1 of 4 refused"
        assert own in messages["unexpected"]
