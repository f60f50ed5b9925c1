"""Training steps of models, each kind in a process of its own.

Two models in one process disturb each other: they share caches of memory and threads, and what one
frees the other gets.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

import gradfuse
from gradfuse import _native
from gradfuse.bench.profiled import extra_memory, norm_seconds
from gradfuse.bench.step_models import MODELS

__all__ = ["KINDS", "StepProcess", "step_processes"]

STOCK, FUSED = "stock", "gradfuse"
COMPILED, FUSED_COMPILED = "torch.compile", "gradfuse, compiled"
KINDS = (STOCK, FUSED, COMPILED, FUSED_COMPILED)


class StepProcess:
    """A process that does a step when it is told to.

    Attributes:
        pid: of the process.
        first: seconds of its first step, which compiles what is to be compiled.
    """

    def __init__(
        self, kind: str, batch: int, size: int, layout: str, dtype: str, model: str = "resnet50"
    ) -> None:
        numbers = [str(n) for n in (batch, size, torch.get_num_threads())]
        device = torch.get_default_device().type
        environment = dict(os.environ)
        if _native.available:
            environment["GRADFUSE_ISA"] = _native.backend.isa()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, model, kind, *numbers, layout, dtype, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.pid = self._process.pid
        self.first = float(self._ask("step"))

    def step(self) -> None:
        self._ask("step")

    def memory(self) -> int | None:
        """The most bytes that torch held during one step, beyond what it held before."""
        answer = self._ask("memory")
        return None if answer == "None" else int(answer)

    def norms(self) -> float:
        """Does a step, and tells the seconds of its batch norms, adds and activations."""
        return float(self._ask("norms"))

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, what: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise RuntimeError(f"the process of a step ended with {self._process.wait()}")
        return answer


@contextmanager
def step_processes(
    kinds: Sequence[str], batch: int, size: int, layout: str, dtype: str, model: str = "resnet50"
) -> Iterator[list[StepProcess]]:
    """A process of each kind, until the end of the block."""
    with ExitStack() as stack:
        processes = []
        for kind in kinds:
            processes.append(StepProcess(kind, batch, size, layout, dtype, model))
            stack.callback(processes[-1].close)
        yield processes


def make_step(
    model: str,
    kind: str,
    batch: int,
    size: int,
    channels_last: bool,
    dtype: torch.dtype,
    device: str,
) -> Callable[[], object]:
    """Forward, backward, clip and AdamW: with torch's parts, or gradfuse's."""
    torch.manual_seed(0)
    form = torch.channels_last if channels_last else torch.contiguous_format
    module, given, loss_of = MODELS[model].make(batch, size, form)
    is_ours = kind in (FUSED, FUSED_COMPILED)
    if is_ours:
        gradfuse.fuse(module, inplace=True)
    parameters = list(module.parameters())
    optimizer: torch.optim.Optimizer
    if is_ours:
        optimizer = gradfuse.optim.AdamW(parameters, lr=1e-4, clip=1.0)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    forward: Callable[[torch.Tensor], torch.Tensor] = module
    if kind in (COMPILED, FUSED_COMPILED):
        backend = gradfuse.compile_backend() if is_ours else "inductor"
        forward = torch.compile(module, fullgraph=True, backend=backend)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = loss_of(forward(given))
        loss.backward()
        if not is_ours:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def serve(arguments: argparse.Namespace) -> None:
    """Does what the lines of stdin say, and answers each with a line."""
    torch.set_num_threads(arguments.threads)
    with torch.device(arguments.device):
        step = make_step(
            arguments.model,
            arguments.kind,
            arguments.batch,
            arguments.size,
            arguments.layout == "NHWC",
            getattr(torch, arguments.dtype),
            arguments.device,
        )

    def seconds() -> float:
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin

    answers: dict[str, Callable[[], object]] = {
        "step": seconds,
        "memory": lambda: extra_memory(step, arguments.device),
        "norms": lambda: norm_seconds(step),
    }
    for line in sys.stdin:
        print(answers[line.strip()](), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("kind", choices=KINDS)
    for name in ("batch", "size", "threads"):
        parser.add_argument(name, type=int)
    parser.add_argument("layout", choices=("NCHW", "NHWC"))
    parser.add_argument("dtype", choices=("float32", "bfloat16"))
    parser.add_argument("device", choices=("cpu", "cuda"))
    serve(parser.parse_args())
