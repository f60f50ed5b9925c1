"""Rows of all batch norms of a ResNet-50: by themselves, and within training steps."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence

import torch

from gradfuse.bench import norms
from gradfuse.bench.floor import FLOOR
from gradfuse.bench.harness import Contender, Workload
from gradfuse.bench.models import NormSite, dtype_name, resnet50_norms
from gradfuse.bench.norms import COLD, EAGER, FUSED, SAVES_OUTPUT, Floor, Norm, Tensors
from gradfuse.bench.step_process import FUSED as FUSED_STEP
from gradfuse.bench.step_process import STOCK, step_processes

__all__ = ["model_row", "model_steps", "setup_model"]

STEPS = (("NCHW", "float32"), ("NHWC", "float32"), ("NHWC", "bfloat16"))


def setup_model(
    sites: Sequence[NormSite], dtype: torch.dtype, channels_last: bool
) -> list[Contender]:
    """The contenders on all sites of a model: forward in order, then backward, as a step meets
    them. Between two calls on a site come all the others."""
    tensors = [Tensors(site, dtype, channels_last) for site in sites]
    floors = [Floor(t) for t in tensors]

    def step(norm: Norm) -> Callable[[], None]:
        def run() -> None:
            outputs = [norm(t) for t in tensors]
            for t in reversed(tensors):
                t.backward(outputs.pop())

        return run

    def least() -> None:
        for floor in floors:
            floor.forward()
        for floor in reversed(floors):
            floor.backward()

    # The modules save the output.
    ways = {EAGER: norms.eager, SAVES_OUTPUT: norms.fused("output"), FUSED: norms.fused("bitmask")}
    for t in tensors:
        norms.check(t, ways)
    contenders = [Contender(name, step(norm)) for name, norm in ways.items()]
    return [*contenders, Contender(FLOOR, least)]


def model_row(batch: int, pixels: int, dtype: torch.dtype, channels_last: bool) -> Workload:
    """All batch norms of a ResNet-50, without what is between them."""
    sites = resnet50_norms(batch, pixels)
    layout = "NHWC" if channels_last else "NCHW"
    return Workload(
        name=f"ResNet-50's {len(sites)} batch norms, batch {batch}, {pixels} px, {layout}{COLD}",
        dtype=dtype_name(dtype),
        contenders=setup_model(sites, dtype, channels_last),
        bytes_moved=sum(norms.bytes_moved(site, dtype, True) for site in sites),
        baseline=EAGER,
        floor=FLOOR,
    )


def model_steps(batch: int, pixels: int, notes: list[str]) -> Iterator[Workload]:
    """The same within training steps, each contender in a process of its own."""
    if torch.get_default_device().type == "cuda":
        notes.append("batch norms in a ResNet-50 step: left out, their times are of the CPU")
        return
    if importlib.util.find_spec("torchvision") is None:
        notes.append("batch norms in a ResNet-50 step: left out, no torchvision")
        return
    for layout, dtype in STEPS:
        kinds = (STOCK, FUSED_STEP)
        with step_processes(kinds, batch, pixels, layout, dtype) as processes:
            yield Workload(
                name=f"batch norms in a ResNet-50 step, batch {batch}, {pixels} px, {layout}",
                dtype=dtype,
                contenders=[
                    Contender(kind, p.step, p.memory, p.norms)
                    for kind, p in zip(kinds, processes, strict=True)
                ],
                bytes_moved=0,
                baseline=STOCK,
                floor=STOCK,
                pids=tuple(p.pid for p in processes),
            )
