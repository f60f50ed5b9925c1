"""What torch's profiler tells of one call: its memory, and the time of its batch norms."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

__all__ = ["extra_memory", "norm_events", "norm_seconds"]

# A batch norm, what it adds and its activation. As calls of the model, with all that they call in
# turn; in a fused model the op runs in the call of the add or activation that it has waited for.
CALLS = {"aten::batch_norm", "aten::add_", "aten::relu_"}
# The same wherever they run: the fused op, and the backwards.
NODES = {
    "_BatchNormAct",
    "_BatchNormActBackward",
    "NativeBatchNormBackward0",
    "AddBackward0",
    "ReluBackward0",
}


def profiled(run: Callable[[], object], profile_memory: bool = False) -> torch.profiler.profile:
    """The profile of one call, on the CPU."""
    profile: torch.profiler.profile
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler prints two lines per call
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=profile_memory) as profile:
        run()
    return profile


def extra_memory(run: Callable[[], object], device: str = "cpu") -> int | None:
    """The most bytes that torch's allocator held during one call, beyond what it held before.

    None if this torch's profiler does not report them. On the CPU, plain C++ buffers do not count.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    profile = profiled(run, profile_memory=True)
    try:
        trace: Any = profile.profiler
        events = [e for e in trace.kineto_results.events() if e.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
    except AttributeError:
        return None
    return peak


def norm_events(events: Iterable[Any]) -> list[Any]:
    """The events of batch norms with their adds and activations, none within another.

    Calls of the model alone have no parent. So the sums of gradients, which autograd makes, are
    left out, and the optimizer's.
    """
    found: list[Any] = []
    for event in events:
        outermost = event
        while outermost.cpu_parent is not None:
            outermost = outermost.cpu_parent
        is_call = event is outermost and event.name in CALLS
        if is_call or (event.name in NODES and outermost.name not in CALLS):
            found.append(event)
    return found


def norm_seconds(step: Callable[[], object]) -> float:
    """Seconds that a ResNet's batch norms, adds and activations take in a step, forward and
    backward. Python's share is not in it."""
    events = norm_events(profiled(step).events() or ())
    microseconds: float = sum(event.cpu_time_total for event in events)
    return 1e-6 * microseconds
