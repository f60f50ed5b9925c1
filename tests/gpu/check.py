"""make gpu-check: builds, tests and measures on a machine with a GPU, in stages.

    python -m tests.gpu.check --out FOLDER [A] [B] [C]

A  environment, ceilings of memory, build for this GPU alone, every kernel, the CUDA tests
B  compute-sanitizer's four tools on the kernels
C  benches, Nsight Compute's figures by kernel, torch.profiler's table

No step stops another. Each appends its outcome to FOLDER/gpu.json, and a summary comes last. A
stage takes less than nine minutes. A machine without pytest and network gets the wheels that
`make gpu-wheels` has left in results/wheels.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TAIL = 6000  # characters of a step's output that are kept
STAGE_SECONDS = 530.0  # the steps of a stage end by then, whatever their own limits
WHEELS = ROOT / "results" / "wheels"
SITE = ROOT / "results" / "gpu-site"  # where they are installed
KERNELS = [sys.executable, "-m", "tests.gpu.kernels"]


@dataclass(frozen=True)
class Outcome:
    stage: str
    step: str
    command: str
    status: int | None  # None: it ran out of time
    seconds: float
    output: str  # its end

    @property
    def verdict(self) -> str:
        if self.status is None:
            return "timed out"
        return "passed" if self.status == 0 else f"failed ({self.status})"


@dataclass(frozen=True)
class Step:
    """A command with a limit in seconds."""

    name: str
    command: list[str]
    limit: float
    environment: tuple[tuple[str, str], ...] = ()

    def run(self, stage: str, left: float) -> Outcome:
        paths = [str(ROOT), str(SITE), os.environ.get("PYTHONPATH", "")]
        own = {"PYTHONPATH": os.pathsep.join(paths), "GRADFUSE_PTX": "0", "CI": "1"}
        environment = {**os.environ, **own, **dict(self.environment)}
        begin, status = time.monotonic(), None
        try:
            process = subprocess.Popen(
                self.command, cwd=ROOT, env=environment, start_new_session=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except OSError as error:  # the program is not there
            status, output = 127, str(error).encode()
        else:
            try:
                output, _ = process.communicate(timeout=min(self.limit, left))
                status = process.returncode
            except subprocess.TimeoutExpired:
                # With all that it has started, which would go on beside the next step.
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
        seconds = time.monotonic() - begin
        text = output.decode(errors="replace")[-TAIL:]
        return Outcome(stage, self.name, " ".join(self.command), status, round(seconds, 1), text)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


ENVIRONMENT = """
import platform, subprocess, torch
print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
p = torch.cuda.get_device_properties(0)
print(p.name, "sm", f"{p.major}.{p.minor}", p.multi_processor_count, "SMs", p.total_memory, "bytes")
for command in (["nvcc", "--version"], ["nvidia-smi"], ["ninja", "--version"], ["ncu", "--version"],
                ["compute-sanitizer", "--version"]):
    try:
        print(subprocess.run(command, capture_output=True, text=True).stdout)
    except OSError as error:
        print(error)
"""

CEILINGS = """
import statistics, torch
n = 1 << 30
a, b = torch.ones(n // 4, device="cuda"), torch.empty(n // 4, device="cuda")
def gb_per_s(work, bytes_moved):
    times = []
    for _ in range(30):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(); work(); end.record(); torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return bytes_moved / statistics.median(times[5:]) / 1e9
print("copy", round(gb_per_s(lambda: b.copy_(a), 2 * n)), "GB/s")
print("read", round(gb_per_s(lambda: torch.linalg.vector_norm(a), n)), "GB/s")
print("write", round(gb_per_s(lambda: b.zero_(), n)), "GB/s")
"""

BUILD = """
import os, subprocess, sys, torch
arch = "%d.%d" % torch.cuda.get_device_capability()
os.environ.update(TORCH_CUDA_ARCH_LIST=arch, GRADFUSE_CUDA="1", GRADFUSE_UNITY="1")
sys.exit(subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"]).returncode)
"""

PROFILE = """
import torch, gradfuse
from torch.profiler import ProfilerActivity, profile
ps = [torch.nn.Parameter(torch.randn(1 << 20, device="cuda")) for _ in range(64)]
for p in ps: p.grad = torch.randn_like(p)
optimizer = gradfuse.optim.AdamW(ps, clip=1.0)
bn = gradfuse.nn.BatchNormAct2d(64).cuda()
x = torch.randn(32, 64, 56, 56, device="cuda", requires_grad=True)
def work():
    optimizer.step(); bn(x, x).sum().backward()
work(); torch.cuda.synchronize()
with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
    for _ in range(10): work()
    torch.cuda.synchronize()
print(found.key_averages().table(sort_by="cuda_time_total", row_limit=30))
"""


def stage_a(folder: Path) -> Iterable[Step]:
    yield Step("environment", python(ENVIRONMENT), 60)
    yield Step("ceilings", python(CEILINGS), 60)
    files = sorted(str(file) for file in WHEELS.glob("*.whl"))
    if files:
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
        yield Step("wheels", [*install, "--target", str(SITE), *files], 60)
    yield Step("build", python(BUILD), 240)
    yield Step("kernels", [*KERNELS, "--device", "cuda"], 120)
    tests = [sys.executable, "-m", "pytest", "-q", "-n", "8", "-k", "cuda", "tests"]
    yield Step("tests", [*tests, f"--junitxml={folder / 'tests.xml'}"], 240)


def stage_b(folder: Path) -> Iterable[Step]:
    # A cache would hide reads beyond a tensor that lie within its block.
    plain = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    small = [*KERNELS, "--device", "cuda", "--small"]
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *small]
        yield Step(tool, command, 130, plain)


def stage_c(folder: Path) -> Iterable[Step]:
    options = ["--device", "cuda", "--quick", "--out", str(folder)]
    for op in ("clip", "batch_norm", "optim"):
        yield Step(f"bench {op}", [sys.executable, "-m", "gradfuse", "bench", op, *options], 90)
    sections = ["--section", "SpeedOfLight", "--section", "Occupancy", "--launch-count", "60"]
    for only in ("clip large float32", "batch_norm 14x14 bfloat16", "step AdamW large bfloat16"):
        command = ["ncu", *sections, *KERNELS, "--device", "cuda", "--only", only]
        yield Step(f"ncu {only}", command, 60)
    yield Step("profiler", python(PROFILE), 60)


STAGES: dict[str, Callable[[Path], Iterable[Step]]] = {"A": stage_a, "B": stage_b, "C": stage_c}


def append(file: Path, outcome: Outcome) -> None:
    """Adds an outcome to the JSON list, which is whole after each step."""
    found = json.loads(file.read_text()) if file.exists() else []
    file.write_text(json.dumps([*found, asdict(outcome)], indent=1) + "\n")


def summary(outcomes: list[Outcome]) -> str:
    lines = [f"{o.stage} {o.step:32} {o.verdict:12} {o.seconds:6.1f} s" for o in outcomes]
    for o in outcomes:
        if o.status != 0:
            lines += [f"--- {o.stage} {o.step}", *o.output.strip().splitlines()[-6:]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("stages", nargs="*", help="A, B, C; all by default")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    arguments = parser.parse_args(argv)
    unknown = set(arguments.stages) - set(STAGES)
    if unknown:
        parser.error(f"stages: expected some of {', '.join(STAGES)}, got {', '.join(unknown)}")
    folder = arguments.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(SITE, ignore_errors=True)
    outcomes = []
    for stage in arguments.stages or STAGES:
        end = time.monotonic() + STAGE_SECONDS
        for step in STAGES[stage](folder):
            outcome = step.run(stage, max(end - time.monotonic(), 1.0))
            print(f"{stage} {step.name}: {outcome.verdict}", flush=True)
            append(folder / "gpu.json", outcome)
            outcomes.append(outcome)
    print(summary(outcomes))
    return int(any(o.status != 0 for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
