"""The bench of norms over ranks: python -m gradfuse bench distributed.

This process is rank 0 and starts rank 1, over gloo on the CPU. Each contender runs on both at once.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_ as torch_clip

import gradfuse
from gradfuse import _native
from gradfuse.bench.clip import MAX_NORM, least
from gradfuse.bench.distributed_norms import OVER_RANKS, NormTurns, site_of
from gradfuse.bench.gradients import Gradients, random_gradients
from gradfuse.bench.harness import Contender, Plan, Target, Workload
from gradfuse.bench.models import MODELS, Shape
from gradfuse.bench.registry import Bench

__all__ = ["BENCH"]

RANKS = 2
TORCH, TITAN = "torch, DTensor", "torchtitan's way"
FAST = "gradfuse.clip_grad_norm_"
EXACT = "gradfuse, exact=True"
FLOOR = "floor: the bytes alone"
# Inputs of both ranks together: of ResNet-50 at batch 32, and one so small that the collectives
# take most of the time.
NORMS: dict[str, Shape] = {
    f"batch norm {'x'.join(map(str, shape))}": shape
    for shape in ((32, 256, 56, 56), (32, 1024, 14, 14), (4, 32, 14, 14))
}


@dataclass
class Work:
    """A rank's part of a workload.

    Attributes:
        run: the contenders by name, the baseline first; each call is a collective one.
        prepare: runs untimed before every call.
        verify: raises unless the last call did the work.
    """

    run: dict[str, Callable[[], object]]
    bytes_moved: int
    targets: dict[str, Target]
    prepare: Callable[[], object] = lambda: None
    verify: Callable[[], object] = lambda: None


def shard_of(shape: Shape, rank: int) -> Shape:
    """What a rank holds of a tensor that fully_shard splits along its first dimension."""
    chunk = -(-shape[0] // RANKS)
    return (max(0, min(chunk, shape[0] - rank * chunk)), *shape[1:])


def as_dtensors(gradients: Gradients, shapes: Sequence[Shape]) -> list[Parameter]:
    """Parameters of these shapes, sharded; their gradients share the memory of the given ones."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (RANKS,))

    def whole(shard: Tensor, shape: Shape) -> DTensor:
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            shard, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
        )

    parameters = []
    for own, shape in zip(gradients.parameters, shapes, strict=True):
        assert own.grad is not None
        parameters.append(Parameter(whole(own.detach(), shape)))
        parameters[-1].grad = whole(own.grad, shape)
    return parameters


def whole_torch_clip(parameters: Sequence[Parameter]) -> Tensor:
    """torch's function, whose norm of DTensors is one that is still to be summed."""
    norm: Any = torch_clip(parameters, MAX_NORM)
    return cast(Tensor, norm.full_tensor())


def torchtitan_clip(parameters: Sequence[Parameter]) -> Tensor:
    """What torchtitan documents for FSDP: the norm by torch, made whole, then torch's scaling."""
    grads = [p.grad for p in parameters if p.grad is not None]
    of_shards: Any = torch.nn.utils.get_total_norm(grads, 2.0, False, True)
    norm = cast(Tensor, of_shards.full_tensor())
    torch.nn.utils.clip_grads_with_norm_(parameters, MAX_NORM, norm, True)
    return norm


def clip_work(name: str, rank: int) -> Work:
    """A rank's part of a workload by its name: a model that fully_shard has split, float32."""
    model, kind = name.removesuffix(", sharded").rsplit(", ", 1)
    clipping = kind == "clipping"
    shapes = MODELS[model]()
    before = MAX_NORM * (2.0 if clipping else 0.5) / math.sqrt(RANKS)
    after = min(before, MAX_NORM / math.sqrt(RANKS))
    shards = [shard_of(shape, rank) for shape in shapes]
    gradients = random_gradients(shards, torch.float32, "cpu", before, after)
    ps = as_dtensors(gradients, shapes)
    run: dict[str, Callable[[], object]] = {
        TORCH: partial(whole_torch_clip, ps),
        TITAN: partial(torchtitan_clip, ps),
        FAST: partial(gradfuse.clip_grad_norm_, ps, MAX_NORM),
        EXACT: partial(gradfuse.clip_grad_norm_, ps, MAX_NORM, exact=True),
        FLOOR: least(gradients.flat, clipping).run,
    }
    passes = 3 if clipping else 1
    moved = gradients.nbytes * passes
    return Work(
        run,
        moved,
        dict.fromkeys((FAST, EXACT), Target(1.0)),
        gradients.preparation(),
        gradients.verify,
    )


def norm_work(name: str) -> Work:
    """A rank's part of a batch norm + add + relu of half a batch, forward and backward."""
    turns = NormTurns(site_of(NORMS[name], RANKS))
    return Work({**turns.run, FLOOR: turns.least}, turns.bytes_moved, {OVER_RANKS: Target(1.0)})


def work_of(name: str, rank: int) -> Work:
    return norm_work(name) if name in NORMS else clip_work(name, rank)


class Partner:
    """The process of rank 1, which does what it is told."""

    def __init__(self, name: str, store: str) -> None:
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        if _native.available:
            environment["GRADFUSE_ISA"] = _native.backend.isa()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, name, store],
            stdin=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.pid = self._process.pid

    def tell(self, what: str) -> None:
        assert self._process.stdin is not None
        print(what, file=self._process.stdin, flush=True)

    def close(self) -> None:
        try:
            self.tell("end")
            self._process.wait(timeout=30)
        finally:
            self._process.kill()


def join(store: str, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)


@contextmanager
def workload(name: str) -> Iterator[Workload]:
    """A workload on both ranks, each with a thread of its own. The partner ends with the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        partner = Partner(name, f"{folder}/store")
        try:
            join(f"{folder}/store", 0)
            yield shared_workload(name, partner)
        finally:
            partner.close()
            dist.destroy_process_group()
            torch.set_num_threads(threads)


def shared_workload(name: str, partner: Partner) -> Workload:
    work = work_of(name, 0)

    def prepare() -> None:
        partner.tell("prepare")
        work.prepare()

    def seconds(contender: str) -> float:
        partner.tell(contender)
        dist.barrier()
        begin = time.perf_counter()
        work.run[contender]()
        return time.perf_counter() - begin

    contenders = [
        Contender(c, partial(seconds, c), memory=lambda: None, seconds=partial(seconds, c))
        for c in work.run
    ]
    base = next(iter(work.run))
    return Workload(
        name,
        "float32",
        contenders,
        work.bytes_moved,
        base,
        FLOOR,
        prepare,
        work.verify,
        work.targets,
        "cpu",
        (os.getpid(), partner.pid),
    )


def workloads(arguments: argparse.Namespace, notes: list[str]) -> Iterator[Workload]:
    models = ["ResNet-50"] if arguments.quick else ["ResNet-50", "GPT-2 small"]
    names = [f"{model}, {kind}, sharded" for model in models for kind in ("quiet", "clipping")]
    names += list(NORMS)[-1:] if arguments.quick else NORMS
    for name in names:
        with workload(name) as shared:
            yield shared
    notes.append(f"{RANKS} processes of one thread over gloo; the time is rank 0's")


BENCH = Bench(
    "distributed",
    "norms over ranks",
    workloads,
    Plan(),
    Plan(min_rounds=3, max_rounds=5, seconds=2.0, repeats=0),
    0.0,
)


def follow(name: str, store: str) -> None:
    """Rank 1: does what rank 0 writes to the standard input, until that ends."""
    torch.set_num_threads(1)
    join(store, 1)
    work = work_of(name, 1)
    for line in sys.stdin:
        what = line.rstrip("\n")
        if what == "end":
            break
        if what == "prepare":
            work.prepare()
        else:
            dist.barrier()
            work.run[what]()
    dist.destroy_process_group()


if __name__ == "__main__":
    follow(*sys.argv[1:])
