"""One pass over memory, which the benches take for their floor, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["stream"]


def stream(reads: Sequence[Tensor], writes: Sequence[Tensor], backwards: bool = False) -> None:
    """Copies the bytes of reads[k] to writes[k], or zeros where there are fewer reads."""
    for source, target in zip(reads, writes, strict=False):
        if source is not target:
            target.copy_(source)
    for target in writes[len(reads) :]:
        target.zero_()
