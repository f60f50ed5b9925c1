"""Layer norms and RMS norms that take up the sum they normalise.

A sum waits if one of its addends is expected to be normalised next: the input of such a norm, to
which its block's output is added, or the output of a dropout (dropouts.py). csrc/ops/deferred_sum.h
says how.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradfuse._codes import RowNorm
from gradfuse.fuse import swapped
from gradfuse.fuse.swapped import LastCall, Swapped, is_parameter, is_plain, is_recorded, recorded
from gradfuse.ops.row_norm import forward_of_sum, run, with_gradient

__all__ = ["NORMS", "SwappedLayerNorm", "SwappedNorm"]


_PARTS = ("drop_path", "dropout", "add")  # that normalise_sum tells of


@functools.cache
def _taken_up(label: str, *was_there: bool) -> LastCall:
    parts = [part for part, was in zip(_PARTS, was_there, strict=False) if was]
    return LastCall("+".join([*parts, label]), True)


class SwappedNorm(Swapped):
    """What the classes share: the op, and where a module keeps its arguments."""

    op = RowNorm.RMS_NORM
    op_of_sum = RowNorm.ADD_RMS_NORM
    label = "rms"
    name_of_eps = "eps"
    weight_offset = 0.0
    # Whether the output has the input's dtype whatever the weight's is.
    mixes_dtypes = False
    has_bias = False

    def _shape(self) -> Sequence[int]:
        return cast(Tensor, self.weight).shape

    def forward(self, *given: Any, **named: Any) -> Any:
        if named or len(given) != 1 or not isinstance(given[0], Tensor):
            return self._aside(given, named)
        input = given[0]
        if is_recorded():
            return super().forward(input)
        weight = cast(Tensor | None, self.weight)
        bias = cast(Tensor | None, self.bias) if self.has_bias else None
        reason = self._reason_against(input, weight)
        if reason:
            self._note(LastCall(self.label, False, reason))
            return super().forward(input)
        ops = self._ops_that_wait()
        taken = None if ops is None else ops.normalise_sum(input, self._of_sum)
        if taken is None:
            was_there = []
            output = self._run(run, self.op, input, None, 0.0, None, None, False)[0]
        else:
            output, stats, *was_there = taken
            output = with_gradient(
                self.op, output, stats, input, weight, bias, self._eps(input), self.weight_offset,
                len(self._shape()),
            )  # fmt: skip
        if ops is not None:
            ops.expect_sum(input, swapped.LEAST_BYTES_OF_SUM)
        self._note(_taken_up(self.label, *was_there))
        return output

    def _aside(self, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A call by keywords, or one that torch.fx records: as the plain class has it."""
        if given and not named and self.plain.__module__.startswith("torch.nn."):
            found = recorded(self, given[0])
            if found is not None:
                return found
        self._note(LastCall(self.label, False, "called by keyword or without a tensor"))
        return super().forward(*given, **named)

    def _reason_against(self, input: Tensor, weight: Tensor | None) -> str:
        """Why the op does not compute what the class does; "" if it does, but for rounding."""
        if not is_plain(input) or not (weight is None or is_parameter(weight)):
            return "a tensor of another kind or dtype"
        if not self.mixes_dtypes and weight is not None and weight.dtype != input.dtype:
            return "weight has another dtype than the input"
        if input.is_cuda and input.dtype != torch.float32 and torch.is_autocast_enabled("cuda"):
            return "autocast"
        return ""

    def _of_sum(
        self,
        input: Tensor,
        residual: Tensor | None,
        p: float,
        seed: Tensor | None,
        sample_scale: Tensor | None,
    ) -> Any:
        """(norm, sum, statistics) of a sum that waited."""
        op = self.op_of_sum
        return self._run(forward_of_sum, op, input, residual, p, seed, sample_scale, True)

    def _run(
        self,
        function: Callable[..., Any],
        op: RowNorm,
        input: Tensor,
        residual: Tensor | None,
        p: float,
        seed: Tensor | None,
        sample_scale: Tensor | None,
        keeps_sum: bool,
    ) -> Any:
        return function(
            op, input, residual, self.weight, self.bias if self.has_bias else None, sample_scale,
            seed, self._shape(), p, self._eps(input), self.weight_offset, input.dtype, keeps_sum,
        )  # fmt: skip

    def _eps(self, input: Tensor) -> float:
        eps: float | None = getattr(self, self.name_of_eps)
        return torch.finfo(input.dtype).eps if eps is None else eps


class SwappedLayerNorm(SwappedNorm, nn.LayerNorm):
    """torch.nn.LayerNorm by gradfuse's op."""

    plain: Any = nn.LayerNorm
    op = RowNorm.LAYER_NORM
    op_of_sum = RowNorm.ADD_LAYER_NORM
    label = "ln"
    mixes_dtypes = True
    has_bias = True

    def _shape(self) -> Sequence[int]:
        return self.normalized_shape


class SwappedRMSNorm(SwappedNorm, nn.RMSNorm):
    """torch.nn.RMSNorm by gradfuse's op."""

    plain = nn.RMSNorm

    def _shape(self) -> Sequence[int]:
        return self.normalized_shape


NORMS: dict[type[nn.Module], type[SwappedNorm]] = {
    c.plain: c for c in (SwappedLayerNorm, SwappedRMSNorm)
}
