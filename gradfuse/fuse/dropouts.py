"""Dropouts and dropped paths that wait for the residual and the norm that follow.

A dropout's random numbers are gradfuse's, whether or not its output waits, so that the same seed
gives the same mask. A dropped path is drawn as its library draws it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gradfuse.fuse import swapped
from gradfuse.fuse.swapped import Swapped, is_large, is_plain, is_recorded, recorded
from gradfuse.ops.dropout_add import run_dropout
from gradfuse.ops.row_norm import draw_seed

__all__ = ["DROPOUTS", "SwappedDropPath", "SwappedDropout", "SwappedPath"]


class SwappedPath(Swapped):
    """What the classes share."""

    label = "drop_path"

    def _waits(
        self, input: Tensor, p: float, seed: Tensor | None, scale: Tensor | None
    ) -> Tensor | None:
        """An output that waits; None where it has to be computed at once."""
        ops = self._ops_that_wait()
        if ops is None:
            return None
        site = self._record(ops)
        if not is_large(input):
            site.computed_at_once("the input is small")
            return None
        output: Tensor | None = site.defer(input, p, seed, scale)
        if output is None:
            site.computed_at_once("a backward pass, dispatch mode or saved-tensor hook")
        return output

    def _identity(self, output: Tensor) -> Tensor:
        """The plain class's output where it drops nothing, whose sum with a residual may wait."""
        ops = self._ops_that_wait()
        if ops is not None:
            self._record(ops).computed_at_once("it drops nothing")
            if is_plain(output):
                ops.expect_sum(output, swapped.LEAST_BYTES)
        return output

    def _record(self, ops: Any) -> Any:
        if self._site is None:
            self.__dict__["_site"] = ops.DropoutSite()
        return self._site


class SwappedDropout(SwappedPath, nn.Dropout):
    """torch.nn.Dropout whose output waits for a residual and a norm."""

    plain = nn.Dropout
    label = "dropout"

    def forward(self, input: Any) -> Any:
        if not isinstance(input, Tensor):
            found = recorded(self, input)
            if found is not None:
                return found
        if not self.training or not self.p:
            return self._identity(super().forward(input))
        if self.inplace or is_recorded() or not is_plain(input):
            return super().forward(input)
        seed = draw_seed(input.device, None)
        output = self._waits(input, self.p, seed, None)
        return run_dropout(input, None, self.p, seed, None) if output is None else output


class SwappedDropPath(SwappedPath):
    """A module of another library that drops paths, and the numbers that it multiplies by."""

    def _probability(self) -> float:
        raise NotImplementedError

    def _draw(self, input: Tensor) -> Tensor:
        """[N, 1, ...] or [1, 1, ...] Tensor of input's dtype."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Any:
        if not self.training or not self._probability():
            return self._identity(super().forward(input))
        if self._ops_that_wait() is None or is_recorded() or not is_plain(input) or input.ndim < 2:
            return super().forward(input)
        scale = self._draw(input)
        output = self._waits(input, 0.0, None, scale.reshape(-1).expand(input.shape[0]))
        return input * scale if output is None else output


DROPOUTS: dict[type[nn.Module], type[SwappedPath]] = {nn.Dropout: SwappedDropout}
