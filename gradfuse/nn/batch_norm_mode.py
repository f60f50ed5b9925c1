"""How a batch norm's module takes its statistics in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from gradfuse.ops.batch_norm import recomputing
from gradfuse.ops.batch_norm_modes import check_ghost_size, check_renorm
from gradfuse.reference import DRIFT_ROWS, ghost_sizes

__all__ = ["DRIFT", "PAPERS_WARMUP", "BatchNormMode", "HasMode", "averaging"]

DRIFT = "drift"  # the buffer that momentum="auto" needs
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
            no warm-up. Default: the paper's.
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
    limits: tuple[float, ...] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        op = "batch norm"
        if not isinstance(self.renorm, bool):
            raise TypeError(f"{op}: renorm must be True or False, got {self.renorm!r}")
        if self.momentum not in (None, "auto"):
            raise ValueError(
                f"{op}: momentum must be a number, None or 'auto', got {self.momentum!r}"
            )
        check_ghost_size(op, self.ghost_size)
        steps = () if self.warmup is None else self.warmup
        if not isinstance(steps, Sequence) or len(steps) not in (0, 3):
            raise TypeError(
                f"{op}: warmup must be (begin, r_end, d_end) or None, got {self.warmup!r}"
            )
        limits = check_renorm(op, (self.r_max, self.d_max, *steps))
        object.__setattr__(self, "limits", limits if self.renorm else None)

    @property
    def is_plain(self) -> bool:
        return not self.renorm and self.ghost_size is None and self.momentum is None

    def check(self, bn: _BatchNorm) -> None:
        """Raises ValueError if the module has no running statistics that the mode needs."""
        name = "renorm" if self.renorm else "momentum='auto'" if self.momentum else ""
        if name and (not bn.track_running_stats or bn.running_mean is None):
            raise ValueError(
                f"batch norm: {name} must come with track_running_stats=True, got False"
            )

    def arguments(self, bn: _BatchNorm) -> dict[str, Any]:
        """What batch_norm_act takes of a module's mode in training."""
        return {
            "ghost_size": self.ghost_size,
            "renorm": self.limits,
            "step": bn.num_batches_tracked if self.renorm and self.warmup is not None else None,
            "drift": getattr(bn, DRIFT) if self.momentum and not recomputing() else None,
        }

    def __str__(self) -> str:
        parts = []
        if self.renorm:
            parts.append(
                f"renorm=True, r_max={self.r_max}, d_max={self.d_max}, warmup={self.warmup}"
            )
        if self.ghost_size is not None:
            parts.append(f"ghost_size={self.ghost_size}")
        return ", ".join(parts)


class HasMode(_BatchNorm):
    """A batch norm's module with a mode."""

    mode = BatchNormMode()

    def set_mode(self, mode: BatchNormMode) -> None:
        """Sets the mode. momentum="auto" brings a buffer, `drift`; a module's own stays."""
        own: object = self.momentum
        if own == "auto" and mode.momentum is None:
            mode = replace(mode, momentum="auto")
        mode.check(self)
        self.mode = mode
        if mode.momentum is None:
            self._buffers.pop(DRIFT, None)
        elif DRIFT not in self._buffers and self.running_mean is not None:
            drift = self.running_mean.new_zeros(DRIFT_ROWS, self.num_features)
            self.register_buffer(DRIFT, drift)
            self._fill(drift)

    @torch.no_grad()
    def _fill(self, drift: Tensor) -> None:
        """Batches that were counted without a look at their drift."""
        drift.zero_()
        if self.num_batches_tracked is not None:
            drift[-1] = self.num_batches_tracked

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        drift = self._buffers.get(DRIFT)
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
        drift, key = self._buffers.get(DRIFT), prefix + DRIFT
        if drift is not None and key not in state_dict:  # a state_dict of torch's
            missing_keys[:] = [name for name in missing_keys if name != key]
            self._fill(drift)


def averaging(counted: Tensor, samples: int, ghost_size: int | None = None) -> Tensor:
    """The momentum of a plain average over all batches, [1]; of each of the ghost batches, [n]."""
    if ghost_size is None:
        return (counted + 1).double().reciprocal()
    count = len(ghost_sizes(samples, ghost_size))
    number = torch.arange(1, count + 1, device=counted.device) + counted * count
    return number.double().reciprocal()
