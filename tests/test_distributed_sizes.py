"""The main cases over ranks with one, two, three and four processes, one start for each number."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch.distributed as dist
from helpers import SANITIZED
from processes import on_ranks
from test_distributed_norm import (
    Counted,
    clipped,
    full,
    of_mesh,
    plain,
    replicate_placement,
    sharded,
    true_norm,
)

import gradfuse
from gradfuse.policies import AGC, AdaGC, ZClip

pytestmark = [
    pytest.mark.no_kernel,
    pytest.mark.skipif(SANITIZED, reason="torch's own processes are not sanitized"),
]


def norms(rank: int, size: int) -> dict[str, Any]:
    """What clipping did, by how the gradients lie."""
    from torch.distributed.tensor import Shard

    copy, world = replicate_placement(), dist.group.WORLD
    line = of_mesh((size,), ("dp",))
    whole, mine = true_norm(full()), full(rank)
    ranks = [full(r) for r in range(size)]
    there = plain(mine) if rank < size - 1 or size == 1 else []
    found = {
        "shards": clipped(sharded(full(), line, [Shard(0)]), whole),
        "copies": clipped(sharded(full(), line, [copy]), whole),
        "plain beside shards": clipped(
            [*sharded(full(), line, [Shard(0)]), *plain(full(1))], true_norm(full(), full(1))
        ),
        "a group": clipped(plain(mine), true_norm(*ranks), group=world),
        "a rank without": clipped(there, true_norm(*ranks[: max(size - 1, 1)]), group=world),
        "copies by hand": clipped(plain(full()), whole, replicated_over=world),
    }
    if size % 2 == 0:
        grid = of_mesh((2, size // 2), ("a", "b"))
        matrices = [g for g in full() if g.ndim == 2]
        found["copies of shards"] = clipped(sharded(full(), grid, [copy, Shard(0)]), whole)
        found["both dimensions"] = clipped(
            sharded(matrices, grid, [Shard(0), Shard(1)]), true_norm(matrices)
        )
    return found


def bad_on_the_last(rank: int, size: int) -> list[Any]:
    """A NaN on the last rank: whether all raise, whether a step writes, and the steps skipped."""
    ps = plain(full(rank))
    if rank == size - 1:
        ps[0].grad[0, 0] = math.nan
    world = dist.group.WORLD
    try:
        gradfuse.clip_grad_norm_(ps, 1.0, nonfinite="error", group=world)
        raised = False
    except RuntimeError:
        raised = True
    optimizer = gradfuse.optim.AdamW(ps, clip=1.0, group=world)
    optimizer.step()
    return [raised, any(bool(p.any()) for p in ps), optimizer.skipped_steps]


def steps(rank: int, size: int) -> dict[str, tuple[float, int]]:
    """The largest difference from one process after three steps, and the last one's all-reduces."""
    from torch.distributed.tensor import Shard

    line = of_mesh((size,), ("dp",))
    found = {}
    for name, rule, options in (
        ("number", gradfuse.optim.AdamW, {"clip": 1.0}),
        ("ZClip", gradfuse.optim.AdamW, {"clip": ZClip(warmup=1, z=0.1)}),
        ("AdaGC", gradfuse.optim.AdamW, {"clip": AdaGC(warmup=1)}),
        ("AGC", gradfuse.optim.AdamW, {"clip": AGC(0.1)}),
        ("LAMB", gradfuse.optim.LAMB, {"clip": 1.0, "weight_decay": 0.1}),
    ):
        ours, whole = sharded(full(), line, [Shard(0)]), plain(full())
        for p, q, t in zip(ours, whole, full(2), strict=True):
            q.data.copy_(t)
            p.data.copy_(sharded([t], line, p.placements)[0].grad)
        for ps in (whole, ours):
            optimizer = rule(ps, lr=0.1, **copy.deepcopy(options))
            for step in range(3):
                for p, g in zip(ps, full(step + 3, 10.0**step), strict=True):
                    p.grad = sharded([g], line, p.placements)[0].grad if ps is ours else g.clone()
                with Counted() as counted:
                    optimizer.step()
        pairs = zip(ours, whole, strict=True)
        error = max(float((p.full_tensor() - q).detach().abs().max()) for p, q in pairs)
        found[name] = error, counted.calls
    return found


def all_cases(rank: int, folder: str) -> tuple[Any, Any, Any]:
    size = dist.get_world_size()
    return norms(rank, size), bad_on_the_last(rank, size), steps(rank, size)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_number_of_ranks(size, tmp_path_factory):
    ranks = on_ranks(size, all_cases, tmp_path_factory.mktemp("sizes"))
    collectives = int(size > 1)
    for of_rank, (clips, bad, stepped) in enumerate(ranks):
        for name, found in clips.items():
            assert found["error"] < 1e-6, name
            assert found["scaled"], name
            assert found["norm"] == ranks[0][0][name]["norm"], name  # to the last bit
            assert (found["calls"], found["bytes"]) == (collectives, 32 * size * collectives), name
        assert bad == [True, False, 1], of_rank
        expected = {"number": 1, "ZClip": 1, "AdaGC": 1, "AGC": 3, "LAMB": 2}
        for name, (error, calls) in stepped.items():
            assert error < 1e-5, name
            assert calls == expected[name] * collectives, name
