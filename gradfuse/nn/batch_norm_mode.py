"""How a batch norm's module takes its statistics in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradfuse.ops.batch_norm import recomputing
from gradfuse.ops.batch_norm_modes import Limits, check_ghost_size, check_renorm
from gradfuse.ops.checks import is_number
from gradfuse.reference import DRIFT_ROWS, ghost_batches

__all__ = ["DRIFT", "PAPERS_WARMUP", "BatchNormMode", "HasMode", "averaging", "is_auto"]

AUTO = "auto"  # a momentum
DRIFT = "drift"  # the buffer that it needs
PAPERS_WARMUP = (5000, 40000, 25000)


@dataclass(frozen=True)
class BatchNormMode:
    """Statistics of a batch norm in training other than those of the whole batch. In eval mode
    nothing differs.

    Args:
        renorm: batch renormalisation: correct the batch's statistics towards the running ones, as
            far as r_max and d_max allow. Within them, training computes what eval mode does.
        r_max: >= 1, how far the deviations' ratio may go, from 1 / r_max to r_max.
        d_max: >= 0, how far the means may differ, in running deviations.
        warmup: (begin, r_end, d_end), counts of num_batches_tracked, which the state_dict has.
            Until `begin` the norm is the plain one; the limits then rise to r_max and d_max. None:
            no warm-up, but the first batch is never corrected. Default: the paper's.
        ghost_size: normalise parts of the batch by their own statistics: as few as hold at most
            this many samples each. None: the whole batch.
        momentum: "auto" sets it from how the batches differ from the running statistics, from 0.02
            to 0.5, for each channel; None takes the module's number.

    Raises:
        TypeError, ValueError: an argument is none of these.

    Source: Ioffe 2017, "Batch Renormalization"; Hoffer, Hubara, Soudry 2017, "Train longer,
    generalize better", algorithm 1; Trigg, Leach 1967, "Exponential smoothing with an adaptive
    response rate".
    """

    renorm: bool = False
    r_max: float = 3.0
    d_max: float = 5.0
    warmup: Sequence[float] | None = PAPERS_WARMUP
    ghost_size: int | None = None
    momentum: str | None = None
    limits: Limits | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        op = "batch norm"
        if not isinstance(self.renorm, bool):
            raise TypeError(f"{op}: renorm must be True or False, got {self.renorm!r}")
        if self.momentum not in (None, AUTO):
            raise ValueError(
                f"{op}: momentum must be a number, None or 'auto', got {self.momentum!r}"
            )
        check_ghost_size(op, self.ghost_size)
        for name, limit in (("r_max", self.r_max), ("d_max", self.d_max)):
            if not is_number(limit):
                raise TypeError(f"{op}: {name} must be a number, got {limit!r}")
        warmup = self.warmup
        # Without a warm-up the first batch meets no running statistics all the same.
        steps: Sequence[float] = (0.0, 1.0, 1.0) if warmup is None else warmup
        if not isinstance(steps, Sequence) or len(steps) != 3 or not all(map(is_number, steps)):
            raise TypeError(f"{op}: warmup must be (begin, r_end, d_end) or None, got {warmup!r}")
        limits = check_renorm(op, (self.r_max, self.d_max, *steps))
        object.__setattr__(self, "warmup", None if warmup is None else tuple(steps))
        object.__setattr__(self, "limits", limits if self.renorm else None)

    @property
    def is_plain(self) -> bool:
        return not self.renorm and self.ghost_size is None and self.momentum is None

    def check(self, bn: _BatchNorm) -> None:
        """Raises ValueError if the module has no running statistics that the mode needs, or
        normalises by other ranks' samples."""
        name = "renorm" if self.renorm else "momentum='auto'" if self.momentum else ""
        if name and (not bn.track_running_stats or bn.running_mean is None):
            raise ValueError(
                f"batch norm: {name} must come with track_running_stats=True, got False"
            )
        if self.ghost_size is not None and hasattr(bn, "process_group"):
            raise ValueError(
                "batch norm: ghost_size must be None with the statistics of all ranks, because a "
                f"ghost batch is a part of one rank's batch, got {self.ghost_size}"
            )
        if self.momentum and DRIFT in bn._buffers and not is_auto(bn):
            raise ValueError(
                f"batch norm: momentum='auto' must come with a buffer {DRIFT!r} of its own, got a "
                "module that has another one"
            )

    def __str__(self) -> str:
        parts = []
        if self.renorm:
            parts.append(
                f"renorm=True, r_max={self.r_max}, d_max={self.d_max}, warmup={self.warmup}"
            )
        if self.ghost_size is not None:
            parts.append(f"ghost_size={self.ghost_size}")
        return ", ".join(parts)


def is_auto(bn: nn.Module) -> bool:
    """Whether a module's momentum follows drift."""
    return bn.momentum == AUTO


class HasMode(_BatchNorm):
    """A batch norm's module with a mode. Its momentum is a number, None, or "auto"."""

    momentum: Any
    _mode = BatchNormMode()
    _own_momentum: float | None = 0.1  # before it was "auto"

    def _set_mode(self, mode: BatchNormMode) -> None:
        """Sets the mode. momentum="auto" brings a buffer, `drift`; a module's own stays."""
        mode.check(self)
        if mode.momentum and not is_auto(self):
            self._own_momentum = self.momentum
            self.momentum = AUTO
        if is_auto(self) and DRIFT not in self._buffers and self.running_mean is not None:
            drift = self.running_mean.new_zeros(DRIFT_ROWS, self.num_features)
            self.register_buffer(DRIFT, drift)
            self._fill(drift)
        # The module says whether its momentum is "auto"; it may be set to a number and back.
        self._mode = replace(mode, momentum=None)

    @property
    def _is_plain(self) -> bool:
        """Whether training is that of torch's batch norm."""
        return self._mode.is_plain and not is_auto(self)

    def _modes(self) -> dict[str, Any]:
        """What batch_norm_act takes of the mode in training."""
        mode = self._mode
        drift = None
        if is_auto(self):
            drift = self._buffers.get(DRIFT)
            if drift is None:
                raise ValueError(
                    f"{type(self).__name__}: momentum must be a number or None unless the module "
                    "was made with 'auto', got 'auto'"
                )
        return {
            "ghost_size": mode.ghost_size,
            "renorm": mode.limits,
            "step": self.num_batches_tracked if mode.renorm else None,
            "drift": None if recomputing() else drift,
        }

    @torch.no_grad()
    def _fill(self, drift: Tensor) -> None:
        """Batches that were counted without a look at their drift."""
        drift.zero_()
        if self.num_batches_tracked is not None:
            drift[-1] = self.num_batches_tracked

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        drift = self._buffers.get(DRIFT) if is_auto(self) else None
        if drift is not None:
            self._fill(drift)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key, mean = prefix + DRIFT, self.running_mean
        drift = self._buffers.get(DRIFT) if is_auto(self) else None
        if drift is None or mean is None or key in state_dict:
            return
        if prefix + "running_mean" in state_dict:  # a state_dict of torch's
            missing_keys[:] = [name for name in missing_keys if name != key]
            if drift.is_meta:
                drift = self._buffers[DRIFT] = torch.empty_like(drift, device=mean.device)
            self._fill(drift)

    def extra_repr(self) -> str:
        mode = str(self._mode)
        return f"{super().extra_repr()}, {mode}" if mode else super().extra_repr()


def averaging(counted: Tensor, samples: int, ghost_size: int | None = None) -> Tensor:
    """The momentum of a plain average over all batches, [1]; of each of the ghost batches, [n]."""
    if ghost_size is None:
        return (counted + 1).double().reciprocal()
    count = ghost_batches(samples, ghost_size)
    number = torch.arange(1, count + 1, device=counted.device) + counted * count
    return number.double().reciprocal()
