"""The bench of gradient clipping: python -m gradfuse bench clip."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_ as torch_clip

import gradfuse
from gradfuse.bench.floor import Pass, floor
from gradfuse.bench.gradients import Gradients, random_gradients
from gradfuse.bench.harness import Contender, Plan, Target, Workload
from gradfuse.bench.models import MODELS, Shape, dtype_name
from gradfuse.bench.peers import adaptive_clip_loop, apex, compile_clip, timm_agc
from gradfuse.bench.registry import Bench

__all__ = ["BENCH", "setup_adaptive", "setup_norm"]

FOREACH, FUNCTION, CLIPPER = "torch foreach", "gradfuse.clip_grad_norm_", "gradfuse.GradClipper"
EXACT = "gradfuse, exact=True"
AGC_LOOP, AGC_TIMM, AGC_FUSED = "torch agc (loop)", "timm agc", "gradfuse agc"

# The goals of the project for the time of a call, by workload and contender; the same for bfloat16.
TARGETS: dict[str, dict[str, Target]] = {
    "ResNet-50, quiet": {
        **dict.fromkeys((FUNCTION, CLIPPER), Target(0.0, 1.05)),
        EXACT: Target(1.0, 2.6),
    },
    "ResNet-50, clipping": dict.fromkeys((FUNCTION, CLIPPER), Target(1.35, 1.1)),
    "GPT-2 small, quiet": {
        **dict.fromkeys((FUNCTION, CLIPPER), Target(0.0, 1.05)),
        EXACT: Target(1.0, 2.6),
    },
    "2,000 small, quiet": {FUNCTION: Target(30.0), CLIPPER: Target(50.0)},
    "2,000 small, clipping": {FUNCTION: Target(30.0), CLIPPER: Target(50.0)},
    "ResNet-50, AGC quiet": {AGC_FUSED: Target(5.0)},
    "ResNet-50, AGC clipping": {AGC_FUSED: Target(5.0)},
}

MAX_NORM = 1.0
CLIP_FACTOR = 0.01


def least(flat: Tensor, clipping: bool) -> Contender:
    """What a clip cannot do without: it reads the gradients, then, if it clips, reads and writes
    them. That goes backwards as in the clip, to find their end in the caches."""
    passes = [Pass([flat])]
    if clipping:
        passes.append(Pass([flat], [flat], backwards=True))
    return floor(*passes)


@dataclass
class Setup:
    """The result of a setup function. The first contender is the baseline, the last the floor.
    bytes_moved is the fewest bytes that must move."""

    contenders: list[Contender]
    bytes_moved: int
    gradients: Gradients


def setup_norm(
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    clipping: bool,
    device: str = "cpu",
    compiled: Callable[..., object] | None = None,
) -> Setup:
    """Clipping by the global norm. The gradients have half or twice max_norm as their norm."""
    before = MAX_NORM * (2.0 if clipping else 0.5)
    gradients = random_gradients(shapes, dtype, device, before, min(before, MAX_NORM))
    ps = gradients.parameters
    clipper = gradfuse.GradClipper(ps, MAX_NORM)
    contenders = [
        Contender(FOREACH, partial(torch_clip, ps, MAX_NORM, foreach=True)),
        Contender("torch for-loop", partial(torch_clip, ps, MAX_NORM, foreach=False)),
        Contender(FUNCTION, partial(gradfuse.clip_grad_norm_, ps, MAX_NORM)),
        Contender(CLIPPER, clipper.clip_),
        Contender(EXACT, partial(gradfuse.clip_grad_norm_, ps, MAX_NORM, exact=True)),
        least(gradients.flat, clipping),
    ]
    if compiled is not None:
        contenders.insert(2, Contender("torch.compile", partial(compiled, ps, MAX_NORM)))
    if device == "cuda" and (function := apex("contrib.clip_grad.clip_grad_norm_")) is not None:
        contenders.insert(2, Contender("apex", partial(function, ps, MAX_NORM)))
    # Quiet: one read. Clipping: one more read, and a write.
    return Setup(contenders, gradients.nbytes * (3 if clipping else 1), gradients)


def setup_adaptive(
    shapes: Sequence[Shape], dtype: torch.dtype, clipping: bool, device: str = "cpu"
) -> Setup:
    """Adaptive clipping. The gradient of every unit has half or twice the norm that is allowed."""
    ratio = CLIP_FACTOR * (2.0 if clipping else 0.5)
    norm = math.sqrt(sum(math.prod(s) for s in shapes))
    weights = random_gradients(shapes, dtype, device, norm, norm)
    ps = [Parameter(g) for g in weights.grads]
    flat = weights.flat * ratio
    for p in ps:
        p.grad = p.detach() * ratio
    after = norm * min(ratio, CLIP_FACTOR)
    gradients = Gradients(ps, flat, clipping, after)
    contenders = [
        Contender(AGC_LOOP, partial(adaptive_clip_loop, ps, CLIP_FACTOR)),
        Contender(AGC_FUSED, partial(gradfuse.adaptive_clip_grad_, ps, CLIP_FACTOR)),
        # A unit is clipped while the caches hold it.
        floor(Pass([flat, weights.flat], [flat] if clipping else [])),
    ]
    if (timm := timm_agc()) is not None:
        contenders.insert(0, Contender(AGC_TIMM, partial(timm, ps, CLIP_FACTOR)))
    # One read of weights and gradients. Clipping: a write of gradients.
    return Setup(contenders, gradients.nbytes * (3 if clipping else 2), gradients)


def workload(name: str, setup: Setup, dtype: torch.dtype) -> Workload:
    """The setup as a Workload for the harness."""
    contenders = setup.contenders
    return Workload(
        name=name,
        dtype=dtype_name(dtype),
        contenders=contenders,
        bytes_moved=setup.bytes_moved,
        baseline=contenders[0].name,
        floor=contenders[-1].name,
        prepare=setup.gradients.preparation(),
        verify=setup.gradients.verify,
        targets=dict(TARGETS.get(name, {})),
    )


def workloads(arguments: argparse.Namespace, notes: list[str]) -> Iterator[Workload]:
    """All workloads, one at a time. Adds the outcome of torch.compile to the notes."""
    device = arguments.device
    if arguments.quick:
        notes.append("torch.compile: left out by --quick")
    for dtype in (torch.float32, torch.bfloat16):
        for model in arguments.models:
            shapes = MODELS[model]()
            compiled = None
            if model != "GPT-2 small" and arguments.compile_budget > 0:
                compiled, note = compile_clip(
                    model, shapes, dtype, device, arguments.compile_budget
                )
                notes.append(note)
            for kind, clipping in (("quiet", False), ("clipping", True)):
                setup = setup_norm(shapes, dtype, clipping, device, compiled)
                yield workload(f"{model}, {kind}", setup, dtype)
                del setup
            if model not in ("ResNet-50", "tiny"):
                continue
            for kind, clipping in (("quiet", False), ("clipping", True)):
                setup = setup_adaptive(shapes, dtype, clipping, device)
                yield workload(f"{model}, AGC {kind}", setup, dtype)
                del setup


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        choices=list(MODELS),
        default=[m for m in MODELS if m != "tiny"],
        metavar="MODEL",
        help="some of: " + "; ".join(MODELS),
    )


BENCH = Bench(
    op="clip",
    work="one gradient clip",
    workloads=workloads,
    plan=Plan(),
    quick_plan=Plan(min_rounds=5, max_rounds=30, seconds=1.0, repeats=0),
    compile_budget=90.0,
    add_options=add_options,
)
