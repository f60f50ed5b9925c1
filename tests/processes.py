"""Ranks for tests: processes that talk over gloo, each with one thread, ended after a time-out."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 120


def _rank(rank: int, size: int, store: str, cases: list[Callable[..., Any]], results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=SECONDS // 2),
    )
    found = {}
    for case in cases:
        try:
            found[case.__name__] = case(rank)
        except Exception:
            found[case.__name__] = traceback.format_exc()
            results.put((rank, found))
            return
    results.put((rank, found))
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(size: int, folder: Path, cases: list[Callable[..., Any]]) -> dict[str, list[Any]]:
    """What each case returned on each rank; the traceback, a string, where it raised.

    A rank stops at its first error. The others then wait in vain, and are ended.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    arguments = (size, f"{folder}/store", cases, results)
    processes = [
        context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=SECONDS) for _ in processes)
        for process in processes:
            process.join(timeout=10)
    finally:
        for process in processes:
            process.kill()
    return {case.__name__: [found[r].get(case.__name__) for r in range(size)] for case in cases}
