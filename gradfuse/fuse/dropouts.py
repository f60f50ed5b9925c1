"""Dropouts and dropped paths that wait for the residual and the norm that follow.

A dropout's random numbers are gradfuse's, whether or not its output waits, so that the same seed
gives the same mask. A dropped path is drawn as its library draws it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradfuse.fuse import swapped
from gradfuse.fuse.swapped import LastCall, Swapped, is_large, is_plain, is_recorded, recorded
from gradfuse.ops.dropout_add import run_dropout
from gradfuse.ops.row_norm import draw_seed

__all__ = ["DROPOUTS", "SwappedDropPath", "SwappedDropout", "SwappedPath"]


_ASIDE = "called by keyword or without a tensor"


class SwappedPath(Swapped):
    """What the classes share."""

    label = "drop_path"

    def _dropped(
        self, input: Tensor, p: float, seed: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        """An output that waits, if it may, else one computed at once."""
        ops = self._ops_that_wait()
        output: Tensor | None = None
        if ops is not None and is_large(input):
            if self._site is None or isinstance(self._site, LastCall):
                self.__dict__["_site"] = ops.DropoutSite()
            output = self._site.defer(input, p, seed, scale)
        if output is not None:
            return output
        if ops is None:
            self._note(LastCall(self.label, True, "nothing waits here"))
        elif is_large(input):
            self._note(
                LastCall(
                    self.label,
                    True,
                    "a backward pass, dispatch mode, saved-tensor hook or inference mode",
                )
            )
        else:
            self._note(LastCall(self.label, True, "the input is small"))
        return run_dropout(input, None, p, seed, scale)

    def _plainly(self, reason: str, *given: Any, **named: Any) -> Any:
        """The plain class's output."""
        self._note(LastCall(self.label, False, reason))
        return super().forward(*given, **named)

    def _identity(self, input: Tensor) -> Any:
        """The plain class's output where it drops nothing, whose sum with a residual may wait."""
        output = self._plainly("it drops nothing", input)
        ops = self._ops_that_wait()
        if ops is not None and is_plain(output):
            ops.expect_sum(output, swapped.LEAST_BYTES_OF_SUM)
        return output


class SwappedDropout(SwappedPath, nn.Dropout):
    """torch.nn.Dropout whose output waits for a residual and a norm."""

    plain = nn.Dropout
    label = "dropout"

    def forward(self, *given: Any, **named: Any) -> Any:
        if named or len(given) != 1 or not isinstance(given[0], Tensor):
            found = recorded(self, given[0]) if given and not named else None
            return self._plainly(_ASIDE, *given, **named) if found is None else found
        input = given[0]
        if not self.training or not self.p:
            return self._identity(input)
        if self.inplace or is_recorded() or not is_plain(input):
            return self._plainly("it is in place or of another kind of tensor", input)
        return self._dropped(input, self.p, draw_seed(input.device, None), None)


class SwappedDropPath(SwappedPath):
    """A module of another library that drops paths, and the numbers that it multiplies by."""

    def _probability(self) -> float:
        raise NotImplementedError

    def _draw(self, input: Tensor) -> Tensor:
        """[N, 1, ...] or [1, 1, ...] Tensor of input's dtype."""
        raise NotImplementedError

    def forward(self, *given: Any, **named: Any) -> Any:
        if named or len(given) != 1 or not isinstance(given[0], Tensor):
            return self._plainly(_ASIDE, *given, **named)
        input = given[0]
        if not self.training or not self._probability():
            return self._identity(input)
        if torch.compiler.is_compiling() or is_recorded():
            return super().forward(input)
        if not is_plain(input) or input.ndim < 2:
            return self._plainly("another kind of tensor", input)
        scale = self._draw(input).reshape(-1).expand(input.shape[0])
        return self._dropped(input, 0.0, None, scale)


DROPOUTS: dict[type[nn.Module], type[SwappedPath]] = {nn.Dropout: SwappedDropout}
