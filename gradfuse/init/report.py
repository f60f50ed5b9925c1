"""What an initialisation did, a row for every parameter."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["InitReport", "InitRow"]


class InitRow(NamedTuple):
    """One parameter."""

    path: str
    rule: str  # such as "he normal, fan_in 512", "0", "left"
    gain: float  # standard deviation times the root of the fan; NaN where there is no fan
    why: str
    rms_before: float  # of the values, in float64; NaN on the meta device
    rms_after: float


class InitReport:
    """The outcome of `gradfuse.init.initialize_`.

    Attributes:
        scheme: the scheme that was asked for.
        rows: an InitRow for every parameter, in the order of named_parameters.
        forward: rms of each corrected layer's output, by path, in the order they run; empty where
            nothing was corrected by data.
        backward: rms of the gradient there, over that at the last hidden layer.
    """

    def __init__(self, scheme: str, rows: list[InitRow]) -> None:
        self.scheme = scheme
        self.rows = rows
        self.forward: dict[str, float] = {}
        self.backward: dict[str, float] = {}

    def __getitem__(self, path: str) -> InitRow:
        """The row of a path.

        Raises:
            KeyError: no parameter has this path, or it is another name of a tied one.
        """
        for row in self.rows:
            if row.path == path:
                return row
        raise KeyError(path)

    @property
    def left(self) -> list[InitRow]:
        """The parameters that were left as they were."""
        return [row for row in self.rows if row.rule == "left"]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values, for logging or JSON."""
        return {
            "scheme": self.scheme,
            "rows": [row._asdict() for row in self.rows],
            "forward": dict(self.forward),
            "backward": dict(self.backward),
        }

    def __str__(self) -> str:
        width = max([9, *(len(row.path) for row in self.rows)])
        rules = max([4, *(len(row.rule) for row in self.rows)])
        lines = [
            f"{self.scheme}: {len(self.rows)} parameters, {len(self.left)} left as they were",
            f"{'parameter':<{width}}  {'rule':<{rules}}  {'gain':>6}  "
            f"{'rms before':>10}  {'after':>10}  why",
        ]
        for row in self.rows:
            gain = f"{row.gain:.4g}" if row.gain == row.gain else "-"
            lines.append(
                f"{row.path:<{width}}  {row.rule:<{rules}}  {gain:>6}  "
                f"{row.rms_before:>10.4g}  {row.rms_after:>10.4g}  {row.why}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"InitReport(scheme={self.scheme!r}, parameters={len(self.rows)}, "
            f"left={len(self.left)})"
        )
