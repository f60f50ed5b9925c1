"""The bench of clip and update: python -m gradfuse bench optim."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from gradfuse import optim
from gradfuse.bench.floor import FLOOR, Pass, flat_bytes, floor
from gradfuse.bench.gradients import CACHE, random_gradients
from gradfuse.bench.harness import Contender, Plan, Target, Workload
from gradfuse.bench.models import MODELS, dtype_name
from gradfuse.bench.peers import USUAL, apex, usual_optimizer
from gradfuse.bench.registry import Bench
from gradfuse.bench.training import CharLstm, CharTransformer, Maker, setup_training

__all__ = ["BENCH", "setup"]

TORCH, FUSED = "torch clip + fused step", "gradfuse"
COMPILED = "torch.compile'd clip + step"
APEX = "apex clip + FusedAdam"
FUSED_STOCK_SCALER = "gradfuse, torch's GradScaler"

# The goals of the project, by workload.
TARGETS = {
    "ResNet-50, AdamW": Target(1.6),
    "GPT-2 small, AdamW": Target(1.5),
    "2,000 small, AdamW": Target(20.0),
    "ResNet-50, AdamW, GradScaler": Target(1.7),
    "ResNet-50, SGD": Target(1.6),
    "ResNet-50, update alone": Target(0.0, 1.1),
    "ResNet-50, Lion": Target(2.0),
}
LR = 1e-4
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}, "LAMB": {"weight_decay": 0.01}}
STREAMS = {"SGD": (3, 2), "Lion": (3, 2)}  # (read, written) by an update
MOMENTS = (4, 3)  # the same with two moments
MAX_NORM = 1.0


def options(rule: str) -> dict[str, Any]:
    """On a GPU those of a step that can be captured: its learning rate is a tensor."""
    if device() == "cpu":
        return {"lr": LR, **OPTIONS.get(rule, {})}
    captured = {"capturable": True} if rule == "AdamW" else {}
    return {"lr": torch.tensor(LR), **OPTIONS.get(rule, {}), **captured}


def usual_step(
    rule: str,
    make: Callable[..., torch.optim.Optimizer],
    parameters: list[Parameter],
    clips: bool = True,
) -> Callable[[], object]:
    optimizer = make(parameters, **options(rule))
    if hasattr(optimizer, "train"):  # of schedulefree
        optimizer.train()

    def run() -> None:
        if clips:
            clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()

    return run


def fused_step(rule: str, parameters: list[Parameter], clips: bool = True) -> Callable[[], object]:
    clip: dict[str, Any] = {"clip": MAX_NORM} if clips else {"nonfinite": "propagate"}
    optimizer = getattr(optim, rule)(parameters, **options(rule), **clip)
    run: Callable[[], object] = optimizer.step
    return run


def apex_step(parameters: list[Parameter]) -> Callable[[], object]:
    """Clip and AdamW of apex, which takes a number as learning rate."""
    clip, adamw = apex("contrib.clip_grad.clip_grad_norm_"), apex("optimizers.FusedAdam")
    assert clip
    assert adamw
    optimizer = adamw(parameters, lr=LR, weight_decay=1e-2)  # adam_w_mode is its default

    def run() -> None:
        clip(parameters, MAX_NORM)
        optimizer.step()

    return run


def has_apex() -> bool:
    names = ("contrib.clip_grad.clip_grad_norm_", "optimizers.FusedAdam")
    return device() == "cuda" and all(apex(name) is not None for name in names)


def compiled_step(rule: str, parameters: list[Parameter]) -> Callable[[], object]:
    optimizer = getattr(torch.optim, rule)(parameters, **options(rule))

    def run() -> None:
        clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()

    compiled: Callable[[], object] = torch.compile(run)
    return compiled


def scaled_steps(parameters: list[Parameter]) -> dict[str, Callable[[], object]]:
    """Steps of AdamW under a GradScaler. The stock step unscales and clips first. The fused step
    does both by itself; torch's scaler still runs its own check before it."""

    def scaler(cls: type[torch.amp.GradScaler]) -> torch.amp.GradScaler:
        made = cls(device(), init_scale=1.0, growth_interval=1 << 30)
        made.scale(torch.zeros(()))  # creates the scaler's tensors
        return made

    plain = torch.optim.AdamW(parameters, fused=True, **options("AdamW"))
    of_plain = scaler(torch.amp.GradScaler)

    def stock() -> None:
        of_plain.unscale_(plain)
        clip_grad_norm_(parameters, MAX_NORM)
        of_plain.step(plain)
        of_plain.update()

    def fused(cls: type[torch.amp.GradScaler]) -> Callable[[], object]:
        ours = optim.AdamW(parameters, clip=MAX_NORM, **options("AdamW"))
        of_ours = scaler(cls)

        def run() -> None:
            of_ours.step(ours)
            of_ours.update()

        return run

    return {
        TORCH: stock,
        FUSED: fused(optim.GradScaler),
        FUSED_STOCK_SCALER: fused(torch.amp.GradScaler),
    }


def device() -> str:
    """ "cpu" or "cuda": the bench's device is torch's default one."""
    return torch.get_default_device().type


def least(nbytes: int, rule: str, clips: bool) -> Contender:
    """What a step cannot do without: the update reads the gradients, and reads and writes
    parameters and state, which have the dtype of the parameters and so as many bytes. A clip reads
    the gradients before; then the update goes backwards, to find their end in the caches."""
    reads, writes = STREAMS.get(rule, MOMENTS)
    streams = [flat_bytes(nbytes) for _ in range(reads)]
    passes = [Pass(streams, streams[:writes], backwards=clips)]
    if rule == "LAMB":  # the norms of parameters and updates
        passes.insert(0, Pass(streams))
    if clips:
        passes.insert(0, Pass(streams[-1:]))
    return floor(*passes)


def setup(
    model: str, rule: str, dtype: torch.dtype, clips: bool = True, compiled: bool = False
) -> Workload:
    """Clip and update with random gradients; with clips=False the update alone."""
    gradients = random_gradients(MODELS[model](), dtype, device(), 2.0, 1.0)
    sources, ps = gradients.grads, gradients.parameters
    for p in ps:
        nn.init.ones_(p)
    contenders = []
    usual = usual_optimizer(rule)
    assert usual
    baseline, make = usual
    makers: dict[str, Maker] = {
        baseline: partial(usual_step, rule, make, clips=clips),
        FUSED: partial(fused_step, rule, clips=clips),
    }
    if compiled:
        makers[COMPILED] = partial(compiled_step, rule)
    if rule == "AdamW" and clips and has_apex():
        makers[APEX] = apex_step
    own = []
    for name, maker in makers.items():  # each gets its own parameters and gradients
        mine = [Parameter(p.detach().clone()) for p in ps]
        for p, g in zip(mine, sources, strict=True):
            p.grad = g.clone()
        own.append([p.grad for p in mine])
        contenders.append(Contender(name, maker(mine)))
    reads, writes = STREAMS.get(rule, MOMENTS)
    twice = reads if rule == "LAMB" else 0
    contenders.append(least(gradients.nbytes, rule, clips))
    name = f"{model}, {rule}" if clips else f"{model}, update alone"
    return Workload(
        name=name,
        dtype=dtype_name(dtype),
        contenders=contenders,
        bytes_moved=gradients.nbytes * (reads + writes + clips + twice),
        baseline=baseline,
        floor=FLOOR,
        prepare=preparation(own, sources),
        targets={FUSED: TARGETS[name]} if name in TARGETS else {},
    )


def setup_scaled(model: str) -> Workload:
    """The step under a GradScaler."""
    gradients = random_gradients(MODELS[model](), torch.float32, device(), 2.0, 1.0)
    ps = gradients.parameters
    for p in ps:
        nn.init.ones_(p)
    contenders = [Contender(name, run) for name, run in scaled_steps(ps).items()]
    contenders.append(least(gradients.nbytes, "AdamW", True))
    name = f"{model}, AdamW, GradScaler"
    sources = [g.clone() for g in gradients.grads]
    return Workload(
        name=name,
        dtype="float32",
        contenders=contenders,
        bytes_moved=gradients.nbytes * 8,
        baseline=TORCH,
        floor=FLOOR,
        prepare=preparation([gradients.grads], sources),
        targets={FUSED: TARGETS[name]} if name in TARGETS else {},
    )


def preparation(own: list[list[Any]], sources: list[Tensor]) -> Callable[[], None]:
    """Restores the gradients, and evicts what was written from the caches."""
    elsewhere = torch.zeros(2 * CACHE // 4)
    small = sum(g.nbytes for g in sources) < CACHE // 4

    def prepare() -> None:
        for grads in own:
            torch._foreach_copy_(grads, sources)
        if not small:
            elsewhere.sum()

    return prepare


def compiles(budget: float, notes: list[str]) -> bool:
    """Whether torch.compile of a step of ResNet-50 would take no longer than the budget."""
    if budget <= 0:
        notes.append(f"{COMPILED}: left out")
        return False
    begin = time.perf_counter()
    ps = [Parameter(torch.ones(8, 8)) for _ in range(8)]
    for p in ps:
        p.grad = torch.ones_like(p)
    try:
        compiled_step("AdamW", ps)()
    except Exception as error:
        notes.append(f"{COMPILED}: left out, {type(error).__name__}")
        return False
    estimate = (time.perf_counter() - begin) / 8 * 161
    if estimate > budget:
        notes.append(f"{COMPILED}: left out, compiling 161 tensors takes about {estimate:.0f} s")
        return False
    return True


def workloads(arguments: argparse.Namespace, notes: list[str]) -> Iterator[Workload]:
    compiled = compiles(arguments.compile_budget, notes)
    large = "tiny" if arguments.quick else "ResNet-50"
    yield setup(large, "AdamW", torch.float32, compiled=compiled)
    yield setup(large, "AdamW", torch.bfloat16)
    yield setup_scaled(large)
    yield setup(large, "SGD", torch.float32)
    yield setup(large, "AdamW", torch.float32, clips=False)
    yield setup(large, "Adam", torch.float32)
    for rule in USUAL:
        if usual_optimizer(rule):
            yield setup(large, rule, torch.float32)
        else:
            notes.append(f"{rule}: left out, {USUAL[rule][0]} is not installed")
    yield setup("2,000 small", "AdamW", torch.float32)
    if not arguments.quick:
        yield setup("GPT-2 small", "AdamW", torch.float32)
    steps: dict[str, Maker] = {
        TORCH: partial(usual_step, "AdamW", partial(torch.optim.AdamW, fused=True)),
        FUSED: partial(fused_step, "AdamW"),
    }
    yield setup_training(CharLstm, "LSTM", steps, TORCH)
    yield setup_training(CharTransformer, "transformer", steps, TORCH)


BENCH = Bench(
    op="optim",
    work="clip and update",
    workloads=workloads,
    plan=Plan(9, 100, 6.0),
    quick_plan=Plan(5, 20, 0.5, repeats=0),
    compile_budget=120.0,
)
