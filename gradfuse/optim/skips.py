"""The count of steps that an optimizer left out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from gradfuse._codes import Action
from gradfuse._records import ClipPlan
from gradfuse.clipping.report import GradReport

__all__ = ["SkipCounter"]

_MANY = 100  # skipped steps in a row that deserve a warning


class SkipCounter:
    """Counts skipped steps, on a device without waiting for it, and warns once of many in a row.

    Args:
        op: the optimizer's name, for the warning.
    """

    def __init__(self, op: str) -> None:
        self._op = op
        self._on_host = 0
        self._in_a_row = 0
        self._on_device: Tensor | None = None
        self._has_warned = False
        # On CUDA: steps so far, and a copy of _on_device that was begun _MANY steps ago.
        self._steps = 0
        self._copy: tuple[Tensor, torch.cuda.Event] | None = None
        self._last = 0

    @property
    def total(self) -> int:
        """Skipped steps so far. On CUDA this waits."""
        return self._on_host + (0 if self._on_device is None else int(self._on_device))

    def reset(self, total: int) -> None:
        """Counts on from another total."""
        if self._on_device is not None:
            self._on_device.zero_()
        self._on_host, self._in_a_row, self._copy, self._last = total, 0, None, 0

    @property
    def is_on_gpu(self) -> bool:
        """Whether the optimizer has parameters on one."""
        return self._on_device is not None

    def put_on(self, device: torch.device) -> None:
        """Counts on this device from now on, unless it is the CPU or another device has begun."""
        if self._on_device is None and device.type != "cpu":
            self._on_device = torch.zeros((), dtype=torch.int64, device=device)

    def count(self, plan: Tensor, reports: Sequence[GradReport]) -> None:
        """Counts a step.

        Args:
            plan: [8], the ClipPlan that decided on it.
            reports: what the step saw.
        """
        if self._on_device is None:
            if not reports[0].skipped:  # a step is left out as a whole
                self._in_a_row = 0
                return
            self._on_host += 1
            self._in_a_row += 1
            if self._in_a_row == _MANY:
                self._warn(reports)
            return
        self._on_device += ClipPlan.of(plan).action.eq(Action.SKIP).to(self._on_device)
        self._steps += 1
        if self._steps % _MANY == 0 and not self._has_warned and self._on_device.is_cuda:
            self._look(reports)

    def _look(self, reports: Sequence[GradReport]) -> None:
        """Compares copies of the device's count, which arrive without being waited for."""
        if torch.cuda.is_current_stream_capturing():
            return
        assert self._on_device is not None
        if self._copy is not None and self._copy[1].query():
            count = int(self._copy[0])
            if count - self._last >= _MANY:
                self._warn(reports)
            self._last = count
        event = torch.cuda.Event()
        self._copy = self._on_device.to("cpu", non_blocking=True), event
        event.record()

    def _warn(self, reports: Sequence[GradReport]) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        bad = next(filter(None, (report.first_nonfinite() for report in reports)), None)
        why = "no gradient is NaN or inf, so a policy or the loss scaler skips"
        if bad is not None:
            why = f"the gradient of {bad.name} has {bad.nonfinite} NaN or inf of {bad.numel}"
        warnings.warn(f"{self._op}: the last {_MANY} steps changed nothing; {why}", stacklevel=8)
