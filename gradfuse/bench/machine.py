"""What affects the figures of a bench: the machine, and how much other processes use it."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from gradfuse import __version__, _native

__all__ = ["Neighbours", "is_disturbed", "machine"]

DISTURBED = 0.03  # share of the processors that makes figures worthless when others take it


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    return {
        "cpu": cpu_model(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gradfuse": __version__,
        "isa": _native.backend.isa() if _native.available else f"none: {_native.reason}",
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class Neighbours:
    """The share of processor time that other processes have taken since this was created.

    If another process takes a core, threads that wait for each other become many times slower, and
    not all contenders alike. Such figures are worthless.
    """

    def __init__(self, pids: Sequence[int] = ()) -> None:
        self._pids = pids  # of the bench's own other processes
        self._begin = processor_seconds(pids)

    def share(self) -> float | None:
        """0.0 to 1.0; None if the system does not report it."""
        end = processor_seconds(self._pids)
        if self._begin is None or end is None:
            return None
        everybody, own, idle = (b - a for a, b in zip(self._begin, end, strict=True))
        return max(0.0, (everybody - own) / max(everybody + idle, 1e-9))


def is_disturbed(others: float | None) -> bool:
    """Whether other processes took so much of the processors that it affects the figures."""
    return others is not None and others >= DISTURBED


def processor_seconds(pids: Sequence[int] = ()) -> tuple[float, float, float] | None:
    """Seconds so far, over all processors: of all processes, of this one and `pids`, and idle."""
    try:
        with open("/proc/stat") as stat:
            ticks = [int(word) for word in stat.readline().split()[1:9]]
        # The name of a process, in brackets, may contain spaces. User and system time are the 14th
        # and 15th field.
        lines = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2] for pid in pids]
        tick = 1 / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
    times = os.times()
    own = times.user + times.system
    own += tick * sum(int(word) for line in lines for word in line.split()[11:13])
    idle = ticks[3] + ticks[4]  # idle, and waiting for a disk
    return (sum(ticks) - idle) * tick, own, idle * tick
