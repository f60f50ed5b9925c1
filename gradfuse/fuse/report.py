"""What a fused model's norms and dropouts did in their last calls."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gradfuse import reference
from gradfuse.fuse.dropouts import SwappedPath
from gradfuse.fuse.norms import SwappedNorm
from gradfuse.fuse.swap import is_site, reason_against
from gradfuse.fuse.swapped import LastCall, Swapped

__all__ = ["FuseReport", "Site", "fuse_report"]


@dataclass(frozen=True)
class Site:
    """A norm or dropout of a model, and what its last call became.

    Attributes:
        path: where it is in the model.
        pattern: "bn", "bn+relu", "bn+add+relu", "ln", "dropout+add+ln", "add+rms", "dropout", ...
        fused: whether gradfuse's op computes it.
        reason: why it was not swapped, or why its output was computed before an activation or a
            norm: the operator that took it, or what did not let it wait.
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
        return "\n".join([*lines, f"{fused} of {len(self)} fused"])


def fuse_report(model: nn.Module) -> FuseReport:
    """What each norm and dropout of a fused model did in its last call.

    Args:
        model: what `fuse` returned, also within other modules.

    Returns:
        FuseReport, a list of Site that prints as a table.
    """
    return FuseReport(
        _site(path, module) for path, module in model.named_modules() if is_site(module)
    )


def _site(path: str, module: nn.Module) -> Site:
    kind = _kind(module)
    if not isinstance(module, Swapped):
        return Site(path, kind, False, reason_against(module))
    last = module._site
    if isinstance(last, LastCall):
        return Site(path, *last)
    last = None if last is None else last.last
    if last is None:
        return Site(path, kind, True, "it was not called yet")
    if isinstance(module, SwappedPath):
        was_added, was_normalised, reason = last
        parts = [kind, *(["add"] if was_added else []), *(["norm"] if was_normalised else [])]
        return Site(path, "+".join(parts), True, reason)
    activation, has_residual, reason = last
    name = reference.ACTIVATIONS[activation]
    pattern = "+".join([kind, *(["add"] if has_residual else []), *([name] if name else [])])
    return Site(path, pattern, True, reason)


def _kind(module: nn.Module) -> str:
    if isinstance(module, SwappedNorm | SwappedPath):
        return module.label
    names = {nn.LayerNorm: "ln", nn.RMSNorm: "rms", nn.Dropout: "dropout"}
    return next((name for cls, name in names.items() if isinstance(module, cls)), "bn")
