"""Runs a function on several gloo processes, with a time-out, and leaves none behind."""

from __future__ import annotations

import datetime
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

LIMIT = 60.0  # seconds
# A process that has imported these starts the others, which thus have them from the beginning.
PRELOAD = [
    "pytest",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch._dynamo",
]


def on_ranks(size: int, function: Callable[[int, str], Any], folder: Path) -> list[Any]:
    """What function(rank, folder) returned on each rank of a default group of this size.

    Raises:
        TimeoutError: a process has not ended in time; all were killed.
    """
    folder.mkdir(exist_ok=True)
    multiprocessing.set_forkserver_preload(PRELOAD)
    context = mp.start_processes(
        _run, (size, function, str(folder)), nprocs=size, join=False, start_method="forkserver"
    )
    end = time.monotonic() + LIMIT
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > end:
                raise TimeoutError(f"{function.__name__}: not done in {LIMIT:g} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [torch.load(folder / f"{size}-{rank}", weights_only=False) for rank in range(size)]


def outcomes(rank: int, cases: Iterable[Callable[[int], Any]]) -> dict[str, Any]:
    """What each case returns on this rank, by its name; the traceback where it raises."""
    results = {}
    for function in cases:
        try:
            results[function.__name__] = function(rank)
        except Exception:
            results[function.__name__] = traceback.format_exc()
        torch.distributed.barrier()
    return results


def by_case(ranks: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The outcomes of all ranks: a list for each case."""
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def _run(rank: int, size: int, function: Callable[[int, str], Any], folder: str) -> None:
    torch.set_num_threads(1)
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{size}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=40),
    )
    try:
        torch.save(function(rank, folder), f"{folder}/{size}-{rank}")
    finally:
        dist.destroy_process_group()
