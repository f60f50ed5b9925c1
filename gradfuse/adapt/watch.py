"""Hooks that see what each batch norm of a running model gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradfuse.adapt.moments import Moments, moments, over_ranks
from gradfuse.adapt.report import AdaptRow

__all__ = ["Watch"]

_OP = "adapt_statistics"


class Watch:
    """In its block the inputs of batch norms are measured; nothing is written.

    Attributes:
        batch: the number of the batch that runs, from 1, for messages.
    """

    def __init__(self, norms: dict[str, Any], momentum: float | None, reset: bool) -> None:
        self.batch = 0
        self._norms, self._momentum, self._reset = norms, momentum, reset
        # What each norm knew before. At two samples m2 is the variance.
        self._old = {
            path: Moments(2.0, bn.running_mean.double(), bn.running_var.double())
            for path, bn in norms.items()
        }
        self._seen: dict[str, Moments] = {}
        self._handles: list[Any] = []
        self._inside = ""  # what runs

    def __enter__(self) -> None:
        for path, bn in self._norms.items():
            self._handles.append(bn.register_forward_pre_hook(self._before(path), with_kwargs=True))
            self._handles.append(bn.register_forward_hook(self._after))

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        for handle in self._handles:
            handle.remove()
        if self._inside and isinstance(error, Exception):
            raise RuntimeError(
                f"{_OP}: expected {self._inside} to take batch {self.batch}, got "
                f"{type(error).__name__}: {error}"
            ) from error

    def _after(self, *arguments: Any) -> None:
        self._inside = ""

    def _before(self, path: str) -> Callable[..., None]:
        name = path or type(self._norms[path]).__name__

        def hook(bn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inside = name
            input = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(input, Tensor) or input.dim() < 2 or not input.numel():
                return  # of which the norm itself will tell
            new = over_ranks(bn, moments(input.detach()))
            if not (new.mean.isfinite() & new.m2.isfinite()).all():
                self._inside = ""
                raise RuntimeError(
                    f"{_OP}: the inputs of {name} must be finite, got NaN or inf in batch "
                    f"{self.batch}"
                )
            self._add(path, new)

        return hook

    def _add(self, path: str, new: Moments) -> None:
        old = self._seen.get(path)
        if self._momentum is None:
            self._seen[path] = new if old is None else old.merged(new)
            return
        if old is None and not self._reset:
            old = Moments(0.0, *self._old[path][1:])
        self._seen[path] = new if old is None else old.faded(new, self._momentum)

    def results(self, batches: int) -> dict[str, Moments]:
        """The new statistics of each norm that was called."""
        return {path: self._result(path, batches) for path in self._seen}

    def _result(self, path: str, batches: int) -> Moments:
        seen, bn = self._seen[path], self._norms[path]
        if self._momentum is None and not self._reset:
            momentum = bn.momentum
            weight = (
                float(bn.num_batches_tracked or 0.0)
                if momentum is None
                else (2.0 - momentum) / max(momentum, 1e-12)
            )
            samples = weight * seen.samples / batches
            if samples > 0.0:
                old = self._old[path]
                seen = Moments(samples, old.mean, old.m2 * max(samples - 1.0, 0.0)).merged(seen)
        for kept, buffer in ((seen.mean, bn.running_mean), (seen.var, bn.running_var)):
            if not kept.to(buffer.dtype).isfinite().all():
                raise RuntimeError(
                    f"{_OP}: the statistics of {path or type(bn).__name__} must be finite in "
                    f"{buffer.dtype}, got NaN or inf"
                )
        return seen

    def row(self, path: str, new: Moments | None) -> AdaptRow:
        """What the report says of a norm; None: it was not called."""
        if new is None:
            return AdaptRow(path, 0, 0.0, 0.0, 0.0)
        old, eps = self._old[path], self._norms[path].eps
        shift = (new.mean - old.mean) / (old.var + eps).sqrt()
        ratio = torch.log((new.var + eps) / (old.var + eps))
        return AdaptRow(
            path,
            int(self._seen[path].samples),
            float(shift.square().mean().sqrt()),
            float(shift.abs().max()),
            float(ratio.mean()),
        )
