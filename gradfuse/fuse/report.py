"""What a fused model's batch norms did in their last calls."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradfuse import reference
from gradfuse.fuse.modules import _Deferred
from gradfuse.fuse.swap import reason_against

__all__ = ["FuseReport", "Site", "fuse_report"]


@dataclass(frozen=True)
class Site:
    """A batch norm of a model, and what its last call became.

    Attributes:
        path: where it is in the model.
        pattern: "bn", "bn+relu", "bn+add+relu", ...
        fused: whether gradfuse's op computes it.
        reason: why it was not swapped, or why its output was computed before an activation: the
            operator that took it, or what did not let it wait.
    """

    path: str
    pattern: str
    fused: bool
    reason: str = ""


class FuseReport(list[Site]):
    """The sites in the order of the model's modules; a table when printed."""

    def __str__(self) -> str:
        rows = [("path", "pattern", "", "reason")]
        rows += [(s.path, s.pattern, "fused" if s.fused else "left", s.reason) for s in self]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows
        ]
        fused = sum(s.fused for s in self)
        return "\n".join([*lines, f"{fused} of {len(self)} batch norms fused"])


def fuse_report(model: nn.Module) -> FuseReport:
    """What each batch norm of a fused model did in its last call.

    Args:
        model: what `fuse` returned, also within other modules.

    Returns:
        FuseReport, a list of Site that prints as a table.
    """
    return FuseReport(
        _site(path, module)
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm)
    )


def _site(path: str, module: _BatchNorm) -> Site:
    if not isinstance(module, _Deferred):
        return Site(path, "bn", False, reason_against(module))
    last = None if module._site is None else module._site.last
    if last is None:
        return Site(path, "bn", True, "it was not called yet")
    activation, has_residual, reason = last
    name = reference.ACTIVATIONS[activation]
    pattern = "+".join(["bn", *(["add"] if has_residual else []), *([name] if name else [])])
    return Site(path, pattern, True, reason)
