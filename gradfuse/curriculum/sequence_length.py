"""Sequences that grow with the steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gradfuse.ops.checks import check_whole

__all__ = ["SequenceLengthWarmup"]


class SequenceLengthWarmup:
    """Cuts batches of sequences to a length that grows with the steps.

    Step t has the length start + (end - start) * t / steps, rounded down to a multiple. Call it in
    the training loop, not in a collate_fn, whose workers are ahead of the steps.

    Args:
        steps: steps until sequences are whole, >= 1.
        end: the whole length, >= start.
        start: the length of step 0, >= multiple.
        multiple: >= 1; 8 for tensor cores. The last length is `end`, whatever its remainder.
        dim: the dimension of positions, >= 0.

    Raises:
        ValueError: an argument has no such value.

    Source: Li, Zhang, He 2022, "The Stability-Efficiency Dilemma: Investigating Sequence Length
    Warmup for Training GPT Models".
    """

    def __init__(self, steps: int, end: int, start: int = 8, multiple: int = 8, dim: int = 1):
        op = "SequenceLengthWarmup"
        self.total = check_whole(op, "steps", steps, 1)
        self.multiple = check_whole(op, "multiple", multiple, 1)
        self.start = check_whole(op, "start", start, multiple)
        self.end = check_whole(op, "end", end, start)
        self.dim = check_whole(op, "dim", dim, 0)
        self.steps = 0

    @property
    def length(self) -> int:
        """The length of this step."""
        if self.steps >= self.total:
            return self.end
        length = self.start + (self.end - self.start) * self.steps // self.total
        return length - length % self.multiple

    def __call__(self, batch: Any) -> Any:
        """The batch with each Tensor in it, of more than `dim` dimensions, cut to `length` there.

        Tuples, lists and mappings are walked through; a mapping becomes a dict. Views, no copies.
        """
        if isinstance(batch, Tensor):
            size = min(self.length, batch.shape[self.dim]) if batch.dim() > self.dim else None
            return batch if size is None else batch.narrow(self.dim, 0, size)
        if isinstance(batch, Mapping):
            return {k: self(v) for k, v in batch.items()}
        if isinstance(batch, (tuple, list)):
            parts = [self(v) for v in batch]
            return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
        return batch

    def step(self) -> None:
        """Counts a step."""
        self.steps += 1

    def state_dict(self) -> dict[str, int]:
        """The steps that were counted."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues from the steps of the state.

        Raises:
            ValueError: the state is not of a SequenceLengthWarmup.
        """
        op = "SequenceLengthWarmup.load_state_dict"
        if not isinstance(state, Mapping) or state.keys() != {"steps"}:
            raise ValueError(f"{op}: state must be what state_dict returned, got {state!r}")
        self.steps = check_whole(op, "steps", state["steps"], 0)
