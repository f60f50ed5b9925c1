"""The peers that gradfuse is measured against, in addition to torch.nn.utils."""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from gradfuse.bench.gradients import random_gradients
from gradfuse.bench.models import Shape, dtype_name

__all__ = [
    "adaptive_clip_loop",
    "apex",
    "compile_clip",
    "compiles_in_time",
    "timm_agc",
    "usual_optimizer",
]

# The usual implementations of optimizers that torch lacks, with the options of their fastest form.
USUAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LAMB": ("timm.optim", "Lamb", {"foreach": True, "max_grad_norm": None}),
    "Lion": ("timm.optim", "Lion", {"foreach": True}),
    "ScheduleFreeAdamW": ("schedulefree", "AdamWScheduleFree", {"foreach": True}),
}

COMPILE_COST = 0.3  # approximate seconds that torch.compile needs per tensor of a CPU clip


def compiles_in_time(call: Callable[[], object], notes: list[str], budget: float) -> bool:
    """Whether a first call of what torch.compile made takes at most `budget` seconds; a note says
    why not."""
    if budget <= 0:
        notes.append("torch.compile: left out")
        return False
    begin = time.perf_counter()
    try:
        call()
    except Exception as error:
        notes.append(f"torch.compile: left out, {type(error).__name__}")
        return False
    if (taken := time.perf_counter() - begin) > budget:
        notes.append(f"torch.compile: left out, compiled in {taken:.0f} s")
        return False
    return True


@torch.no_grad()
def adaptive_clip_loop(parameters: list[Parameter], clip_factor: float, eps: float = 1e-3) -> None:
    """AGC one parameter at a time, in plain torch: Brock et al. 2021, equation 3."""

    def unit_norm(x: Tensor) -> Tensor:
        unit = tuple(range(1, x.ndim)) or None  # a row; the whole of a vector
        norm: Tensor = torch.linalg.vector_norm(x, dim=unit, keepdim=x.ndim > 1)
        return norm

    for p in parameters:
        if p.grad is None:
            continue
        limit = unit_norm(p).clamp_(min=eps).mul_(clip_factor)
        norm = unit_norm(p.grad)
        scaled = p.grad * (limit / norm.clamp(min=1e-6))
        p.grad.copy_(torch.where(norm > limit, scaled, p.grad))


def timm_agc() -> Callable[..., object] | None:
    """timm's adaptive_clip_grad, if timm is installed."""
    try:
        module: Any = importlib.import_module("timm.utils.agc")
    except ImportError:
        return None
    function: Callable[..., object] = module.adaptive_clip_grad
    return function


def usual_optimizer(rule: str) -> tuple[str, Callable[..., torch.optim.Optimizer]] | None:
    """What a clip and an optimizer of gradfuse are measured against, and its name: torch's fused
    one, else that of a package, if it is installed."""
    if rule not in USUAL:
        return "torch clip + fused step", partial(getattr(torch.optim, rule), fused=True)
    package, name, options = USUAL[rule]
    try:
        made = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError):  # an old version may lack it
        return None
    return f"torch clip + {package.partition('.')[0]}'s foreach {name}", partial(made, **options)


def apex(name: str) -> Callable[..., Any] | None:
    """Something of NVIDIA's apex, if it is installed: "optimizers.FusedAdam"."""
    module, _, attribute = name.rpartition(".")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(f"apex.{module}"), attribute)
    except (ImportError, AttributeError):
        return None
    return found


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block after these seconds, and again if the block catches it."""

    def stop(signum: int, frame: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


def compile_clip(
    model: str, shapes: Sequence[Shape], dtype: torch.dtype, device: str, budget: float
) -> tuple[Callable[..., object] | None, str]:
    """torch.compile of torch's clip, compiled for these shapes; and a note for the reader."""
    name = f"torch.compile, {model}, {dtype_name(dtype)}"
    estimate = COMPILE_COST * len(shapes)
    if estimate > budget or not hasattr(signal, "SIGALRM"):
        return None, f"{name}: skipped, compiling takes about {estimate:.0f} s (--compile-budget)"
    # Compile in this process; otherwise the time limit would leave compiler processes behind.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    compiled: Callable[..., object] = torch.compile(clip_grad_norm_)
    parameters = random_gradients(shapes, dtype, device, 1.0, 1.0).parameters
    begin = time.perf_counter()
    try:
        with time_limit(budget):
            compiled(parameters, 1.0)
    except Exception as error:  # no compiler, or too slow: still measure the others
        torch.compiler.reset()
        return None, f"{name}: skipped after {time.perf_counter() - begin:.0f} s, {error!r:.200}"
    return compiled, f"{name}: compiled in {time.perf_counter() - begin:.0f} s"
