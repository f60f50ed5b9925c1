"""How far the statistics of batch norms moved, a row for each."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["AdaptReport", "AdaptRow"]


class AdaptRow(NamedTuple):
    """One batch norm."""

    path: str
    samples: int  # values a channel that were seen; 0 where the model did not call it
    mean_shift: float  # rms over channels of (new mean - old) / sqrt(old variance + eps)
    largest_shift: float  # that of the channel that moved most
    log_ratio: float  # mean over channels of log((new variance + eps) / (old variance + eps))


class AdaptReport:
    """The outcome of `gradfuse.adapt_statistics`.

    Attributes:
        rows: an AdaptRow for every batch norm with running statistics, in the model's order.
        batches: how many batches the loader gave.
    """

    def __init__(self, rows: list[AdaptRow], batches: int) -> None:
        self.rows = rows
        self.batches = batches

    @property
    def left(self) -> list[AdaptRow]:
        """The batch norms that the model did not call, which were left as they were."""
        return [row for row in self.rows if not row.samples]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values, for logging or JSON."""
        return {"batches": self.batches, "rows": [row._asdict() for row in self.rows]}

    def __str__(self) -> str:
        width = max([10, *(len(row.path) for row in self.rows)])
        lines = [
            f"{len(self.rows)} batch norms, {len(self.left)} left as they were, "
            f"{self.batches} batches",
            f"{'batch norm':<{width}}  {'samples':>9}  {'mean shift':>10}  {'largest':>8}  "
            f"{'log ratio of variances':>22}",
        ]
        lines += [
            f"{row.path:<{width}}  {row.samples:>9}  {row.mean_shift:>10.3g}  "
            f"{row.largest_shift:>8.3g}  {row.log_ratio:>22.3g}"
            for row in self.rows
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"AdaptReport(batch_norms={len(self.rows)}, left={len(self.left)}, "
            f"batches={self.batches})"
        )
