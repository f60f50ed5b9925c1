"""What one clipping step saw: the norm, the coefficient, and a row for every parameter."""

from __future__ import annotations

import math
from copy import copy
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from gradfuse._codes import Action
from gradfuse._records import ClipPlan, TensorStats
from gradfuse.distributed import Ranks

__all__ = ["GradReport", "ParameterGrad"]


class ParameterGrad(NamedTuple):
    """One parameter's gradient, before clipping."""

    name: str
    norm: float  # L2
    largest: float  # largest |g|; NaN if any is
    nonfinite: int  # count of NaN and inf
    zeros: int  # count of exact zeros
    numel: int
    rank: int | None = None  # in a gathered report, the first rank with a NaN or inf


def gathered(rows: list[ParameterGrad], ranks: Ranks) -> list[ParameterGrad]:
    """The rows of all ranks, those of a name as one. Collective.

    Args:
        rows: of this rank's shards.
        ranks: who takes part; `counted` tells of each row whether it counts or is a copy.
    """
    everywhere: list[Any] = [None] * ranks.size
    dist.all_gather_object(everywhere, (rows, ranks.counted, dist.get_rank()), group=ranks.group)
    whole: dict[str, ParameterGrad] = {}
    for mine, counted, rank in everywhere:
        for row, counts in zip(mine, counted, strict=True):
            known = whole.get(row.name, ParameterGrad(row.name, 0.0, 0.0, 0, 0, 0))
            if row.nonfinite and known.rank is None:
                known = known._replace(rank=rank)
            if counts:
                whole[row.name] = _joined(known, row)
            else:  # a copy that went bad is no other elements, but it is what acted on all ranks
                bad = max(known.nonfinite, row.nonfinite)
                whole[row.name] = known._replace(nonfinite=bad)
    return list(whole.values())


def _joined(a: ParameterGrad, b: ParameterGrad) -> ParameterGrad:
    """Two shards of a gradient as one."""
    return ParameterGrad(
        a.name,
        math.nan if math.isnan(a.norm + b.norm) else math.hypot(a.norm, b.norm),
        math.nan if math.isnan(a.largest + b.largest) else max(a.largest, b.largest),
        a.nonfinite + b.nonfinite,
        a.zeros + b.zeros,
        a.numel + b.numel,
        a.rank,
    )


class GradReport:
    """The outcome of one clipping step, from the same pass over the gradients as the norm.

    The figures stay on the gradients' device until one is read. On CUDA, that read waits. Over
    ranks, `parameters` are this rank's shards until the report is gathered; the rest is of all.

    Attributes:
        max_norm: upper bound of the norm in this step.
        norm_type: order of the norm.
        nonfinite: what a NaN or inf gradient did.
        policy: repr of the gradfuse.policies.Policy that decided, or None.
    """

    def __init__(
        self,
        names: list[str],
        result: tuple[Tensor, Tensor, Tensor],
        max_norm: float,
        norm_type: float,
        nonfinite: str,
        policy: str | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._names = names
        self._norm, self._plan, self._stats = result
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.nonfinite = nonfinite
        self.policy = policy
        self._ranks = ranks
        self._values: ClipPlan[float] | None = None
        self._rows: list[ParameterGrad] | None = None

    def _read(self) -> ClipPlan[float]:
        if self._values is None:
            self._values = ClipPlan.read(self._plan)
        return self._values

    @property
    def norm_tensor(self) -> Tensor:
        """The norm as clip_grad_norm_ returns it: 0-d, on the device, not waited for."""
        return self._norm

    @property
    def total_norm(self) -> float:
        """Norm of all gradients before clipping, in float64."""
        return self._read().norm

    @property
    def coefficient(self) -> float:
        """The factor of the gradients; 1.0 if they were left alone.

        The ratio of the norms where each gradient had its own factor; 1.0 where elements or units
        were clipped.
        """
        return self._read().coefficient

    @property
    def clipped_norm(self) -> float:
        """Norm of all gradients after clipping; NaN where elements were clamped."""
        return self._read().clipped_norm

    @property
    def clipped(self) -> bool:
        """Whether the gradients were changed, or read as if they were."""
        return self._read().action in (Action.SCALE, Action.ZERO)

    @property
    def void(self) -> bool:
        """Whether a non-finite gradient made nonfinite="zero" set all gradients to 0."""
        return self._read().action == Action.ZERO

    @property
    def skipped(self) -> bool:
        """Whether an optimizer left the step out, for a non-finite gradient or a policy."""
        return self._read().action == Action.SKIP

    @property
    def parameters(self) -> list[ParameterGrad]:
        """A row for every parameter that had a gradient, in the order they were given."""
        if self._rows is None:
            self._rows = [
                ParameterGrad(
                    name, row.norm, row.largest, int(row.nonfinite), int(row.zeros), int(row.numel)
                )
                for name, row in zip(self._names, TensorStats.read(self._stats), strict=True)
                if row.numel >= 0
            ]
        return self._rows

    def gather(self) -> GradReport:
        """The report with each parameter over all its shards, copies once. Collective: all ranks
        of the norm must call it. The figures of all ranks are exchanged on the host.

        Returns:
            A report whose `parameters` have the norm, the largest magnitude and the counts of the
            whole gradient, in the order of the lowest rank that has each, and the first rank that
            found a NaN or inf. This report itself where one process did it all.
        """
        if self._ranks is None or self._ranks.size == 1:
            return self
        report = copy(self)
        report._rows, report._ranks = gathered(self.parameters, self._ranks), None
        return report

    def worst(self, n: int = 5) -> list[ParameterGrad]:
        """The n parameters of largest gradient norm, non-finite ones first."""
        return sorted(self.parameters, key=lambda p: (-(p.nonfinite > 0), -p.norm))[:n]

    def first_nonfinite(self) -> ParameterGrad | None:
        """The first parameter with a NaN or inf gradient, or None. In a gathered report its `rank`
        is the first global rank that found one."""
        return next((p for p in self.parameters if p.nonfinite), None)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values, for logging or JSON."""
        return {
            "total_norm": self.total_norm,
            "coefficient": self.coefficient,
            "clipped_norm": self.clipped_norm,
            "clipped": self.clipped,
            "void": self.void,
            "skipped": self.skipped,
            "max_norm": self.max_norm,
            "norm_type": self.norm_type,
            "nonfinite": self.nonfinite,
            "policy": self.policy,
            "parameters": [p._asdict() for p in self.parameters],
        }

    def _verdict(self) -> str:
        if self.void:
            return "void: all gradients set to 0"
        if self.skipped:
            return "step skipped"
        if not self.clipped:
            return "left alone"
        if self.coefficient != 1.0:
            return f"scaled by {self.coefficient:.3g} to {self.clipped_norm:.4g}"
        if math.isnan(self.clipped_norm):
            return "elements clamped"
        return f"clipped to {self.clipped_norm:.4g}"

    def __str__(self) -> str:
        order = "inf" if math.isinf(self.norm_type) else f"{self.norm_type:g}"
        lines = [
            f"gradient norm (L{order}) {self.total_norm:.6g}, "
            f"{self.policy or f'max_norm {self.max_norm:g}'}: " + self._verdict()
        ]
        worst = self.worst(10)
        if worst:
            width = max(9, *(len(p.name) for p in worst))
            lines.append(
                f"{'parameter':<{width}}  {'L2 norm':>10}  {'largest':>10}  "
                f"{'nonfinite':>9}  {'zeros':>6}"
            )
            for p in worst:
                share = f"{100 * p.zeros / p.numel:.0f}%" if p.numel else "-"
                lines.append(
                    f"{p.name:<{width}}  {p.norm:>10.4g}  {p.largest:>10.4g}  "
                    f"{p.nonfinite:>9}  {share:>6}"
                )
        hidden = len(self.parameters) - len(worst)
        if hidden > 0:
            lines.append(f"... and {hidden} more of smaller norm")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"GradReport(total_norm={self.total_norm:.6g}, coefficient={self.coefficient:.6g}, "
            f"parameters={len(self.parameters)})"
        )
