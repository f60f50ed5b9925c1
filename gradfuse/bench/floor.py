"""The floor of a bench's rows: the bytes that the work must move, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradfuse import _native
from gradfuse.bench.harness import Contender

__all__ = ["FLOOR", "FRESH_FLOOR", "Pass", "flat_bytes", "flat_view", "floor", "move"]

FLOOR = "floor: the bytes alone"
FRESH_FLOOR = "the bytes alone, fresh memory"  # which an op that returns tensors has to write to


class Pass(NamedTuple):
    """One pass over tensors of as many bytes. A tensor may be read and written: in place.

    A pass backwards begins with what the pass before it has left in the caches.
    """

    reads: Sequence[Tensor]
    writes: Sequence[Tensor] = ()
    backwards: bool = False


def move(*passes: Pass) -> None:
    """The passes, one after the other, by a kernel with the threads of the ops."""
    for p in passes:
        _native.backend.stream(list(p.reads), list(p.writes), p.backwards)


def floor(*passes: Pass) -> Contender:
    """The floor of a row that always works on the same memory."""
    return Contender(FLOOR, lambda: move(*passes))


def flat_bytes(nbytes: int) -> Tensor:
    """Memory for a floor. It is written once, for the system gives pages when they are written."""
    return torch.ones(nbytes, dtype=torch.uint8)


def flat_view(t: Tensor) -> Tensor:
    """The bytes of a dense tensor in the order of memory, whatever its layout."""
    return t.detach().as_strided((t.numel(),), (1,)).view(torch.uint8)
