"""make traffic: traffic, launches and registers of the CUDA kernels, as Markdown tables.

Bytes, sectors, launches and instructions of PTX are counted by the emulator; registers and spills
are ptxas' own figures, from which the occupancy follows.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from gradfuse._codes import Activation, NonFinite, RowNorm
from gradfuse._records import (
    BatchNormCall,
    BatchNormOptions,
    BatchNormSaved,
    RowNormCall,
    RowNormOptions,
    RowNormSaved,
)
from gradfuse.optim import LAMB, SGD, Adam, AdamW, Lion, ScheduleFreeAdamW
from ptx.emulator import emulated
from ptx.emulator.counts import Launch, Traffic
from ptx.emulator.parser import Module
from ptx.emulator.toolchain import Resources, demangled, ptxas, resources, setup_script

SIZES = (100_003, 4_097, 33)
ROWS, COLUMNS = 40, 2_500
ROW_SHAPE = (256, 768)
# Name, shape, whether channels are contiguous.
MAPS = (
    ("NCHW", (4, 8, 56, 56), False),
    ("NCHW 14 x 14", (48, 4, 14, 14), False),
    ("NCHW 7 x 7", (160, 4, 7, 7), False),
    ("NHWC", (4, 128, 14, 14), True),
    ("NHWC 24 channels", (4, 24, 28, 28), True),
    ("small maps", (8, 24, 16, 16), False),
    ("small maps 7 x 7", (32, 8, 7, 7), False),
)


class Case(NamedTuple):
    """A call and the fewest bytes that it must move: `least` passes over `elements`, and
    `mask_bits` bits of a mask for each. `by_size`: what counts are all buffers with at least one
    bit per element, results among them; else the tensors given."""

    name: str
    call: Callable[[emulated.Emulated, list[Tensor]], object]
    least: float
    elements: int = sum(SIZES)
    mask_bits: int = 0
    by_size: bool = False

    def least_bytes(self, itemsize: int) -> float:
        return self.elements * (self.least * itemsize + self.mask_bits / 8)


def gradients(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator).to(dtype) for n in SIZES]


def clip(max_norm: float) -> Callable:
    return lambda ptx, grads: ptx.clip_(grads, False, max_norm, 2.0, NonFinite.PROPAGATE)


def exact(ptx: emulated.Emulated, grads: list[Tensor]) -> None:
    ptx.exact_limbs("norm", grads, False)


def zero(ptx: emulated.Emulated, grads: list[Tensor]) -> None:
    grads[0][0] = float("nan")
    ptx.clip_(grads, False, 1.0, 2.0, NonFinite.ZERO)


def adaptive(scale: float) -> Callable:
    """Adaptive clipping of a matrix: all rows are clipped, or none."""

    def call(ptx: emulated.Emulated, grads: list[Tensor]) -> None:
        weight = torch.ones(ROWS, COLUMNS, dtype=grads[0].dtype)
        ptx.adaptive_clip_([weight], [weight * scale], 0.01, 1e-3, 2.0)

    return call


def step(rule: type, nan: bool = False, **options: float) -> Callable:
    """The second step of an optimizer that clips. With `nan` the step is skipped."""

    def call(ptx: emulated.Emulated, grads: list[Tensor]) -> None:
        params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
        with mock.patch("gradfuse._native.backend", ptx):
            optimizer = rule(params, lr=0.1, clip=0.1, **options)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        if nan:
            grads[0][0] = float("nan")
        optimizer.step()

    return call


def batch_norm(shape: tuple[int, ...], channels_last: bool, backward: bool) -> Callable:
    """Training with a residual and relu. Only the traffic of the last call counts."""

    def call(ptx: emulated.Emulated, grads: list[Tensor]) -> None:
        form = torch.channels_last if channels_last else torch.contiguous_format
        x, r, g = (
            torch.randn(shape, generator=torch.Generator().manual_seed(i))
            .to(grads[0].dtype)
            .contiguous(memory_format=form)
            for i in range(3)
        )
        nothing = (None, None, None, None)  # weight, bias, running statistics
        relu = Activation.RELU
        forward = BatchNormCall(x, r, *nothing, True, 0.1, 1e-5, relu, 0.0, wants_mask=True)
        _, mask, stats = ptx.batch_norm_forward(forward)
        if backward:
            saved = BatchNormSaved(x, None, None, mask, None, None, stats)
            options = BatchNormOptions(channels_last, True, 1e-5, relu, 0.0)
            ptx.batch_norm_backward(g, saved, options, (True, True, True, True))

    return call


def batch_norm_cases() -> Iterator[Case]:
    """Forward: the sums read the input; the sweep reads input and residual and writes output and
    mask. Backward: the sums read grad_output, input and mask; the sweep reads the same and writes
    two gradients. Maps that fit a block are read once."""
    for name, shape, channels_last in MAPS:
        once = name.startswith("small maps")
        for backward in (False, True):
            yield Case(
                f"batch norm {'backward' if backward else 'forward'}, {name}",
                batch_norm(shape, channels_last, backward),
                (4 if once else 6) if backward else (3 if once else 4),
                torch.Size(shape).numel(),
                2 if backward and not once else 1,
                by_size=True,
            )


def row_norm(backward: bool, prenorm: bool, p: float) -> Callable:
    """Layer norm of a sum. Only the traffic of the last call counts."""

    def call(ptx: emulated.Emulated, grads: list[Tensor]) -> None:
        dtype = grads[0].dtype
        x, r, g, more = (
            torch.randn(ROW_SHAPE, generator=torch.Generator().manual_seed(i)).to(dtype)
            for i in range(4)
        )
        weight, bias = torch.ones(2, ROW_SHAPE[1]).unbind()
        seed = torch.tensor([1, 2]) if p else None
        given = (weight, bias, None, seed)
        op, width = RowNorm.ADD_LAYER_NORM, ROW_SHAPE[1:]
        forward = RowNormCall(op, x, r, *given, width, p, 1e-5, 0.0, dtype, prenorm)
        _, total, stats = ptx.row_norm_forward(forward)
        if backward:
            saved = RowNormSaved(total, *((None, None) if prenorm else (x, r)), *given, stats)
            options = RowNormOptions(op, p, 1e-5, 0.0, 1, dtype, dtype, dtype)
            ptx.row_norm_backward(g, more if prenorm else None, saved, options, (True,) * 4)

    return call


def row_norm_cases() -> Iterator[Case]:
    """Forward: reads the addends and writes sum and norm. Backward: reads the sum and both
    gradients and writes that of the addends; two with a dropout."""
    for name, prenorm, p, forward, backward in (
        ("and sum", True, 0.0, 4, 4),
        ("and sum, dropout", True, 0.1, 4, 5),
        ("of a sum", False, 0.0, 3, 4),
    ):
        for is_backward, least in ((False, forward), (True, backward)):
            yield Case(
                f"layer norm {name}, {'backward' if is_backward else 'forward'}",
                row_norm(is_backward, prenorm, p),
                least,
                torch.Size(ROW_SHAPE).numel(),
                by_size=True,
            )


CASES = [
    Case("clip by norm, quiet", clip(1e9), 1),
    Case("clip by norm, clipping", clip(0.1), 3),
    Case("clip by norm, zeroing", zero, 2),
    Case("sum of an exact norm", exact, 1),
    Case("clip by value, nothing changes", lambda ptx, g: ptx.clamp_(g, False, 1e9), 1),
    Case("clip by value, all changes", lambda ptx, g: ptx.clamp_(g, False, 1e-9), 2),
    Case("adaptive, quiet", adaptive(1e-6), 2, ROWS * COLUMNS),
    Case("adaptive, all rows clipped", adaptive(1.0), 4, ROWS * COLUMNS),
    Case("clip and AdamW", step(AdamW), 8),
    Case("clip and AdamW, amsgrad", step(AdamW, amsgrad=True), 10),
    Case("clip and AdamW, skipped", step(AdamW, nan=True), 1),
    Case("clip and Adam, weight decay", step(Adam, weight_decay=0.1), 8),
    Case("clip and LAMB", step(LAMB), 12),
    Case("clip and Lion", step(Lion), 6),
    Case("clip and ScheduleFreeAdamW", step(ScheduleFreeAdamW), 8),
    Case("clip and SGD, momentum", step(SGD, momentum=0.9), 6),
    *batch_norm_cases(),
    *row_norm_cases(),
]


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


class Data(NamedTuple):
    """What a call moved of its tensors, without slots, tables and totals."""

    by_width: Counter[int]  # bytes by width of access
    sectors: dict[bool, float]  # of loads and of stores: bytes of the sectors over bytes


def data_moved(traffic: Traffic, case: Case) -> Data:
    """The callers pass all tensors of clipping and optimizers. Norms allocate their results."""
    by_width: Counter[int] = Counter()
    sectors = {}
    for stores, moved, distinct in (
        (False, traffic.loaded, traffic.distinct_loaded),
        (True, traffic.stored, traffic.distinct_stored),
    ):
        buffers = {
            name
            for name, _ in moved
            if name.startswith(("tensor", "grad"))
            or (case.by_size and distinct[name] >= case.elements // 8)
        }
        here: Counter[int] = Counter()
        for (name, width), n in moved.items():
            if name in buffers:
                here[width] += n
        by_width += here
        if here:
            sectors[stores] = traffic.sector_bytes(buffers, stores) / here.total()
    return Data(by_width, sectors)


def traffic_rows(dtype: torch.dtype) -> list[list[object]]:
    ptx = emulated.backend()
    rows = []
    for case in CASES:
        case.call(ptx, gradients(dtype))
        total = ptx.traffic
        by_width, sectors = data_moved(total, case)
        moved = by_width.total()
        other = total.bytes_loaded() + total.bytes_stored() - moved
        rows.append(
            [
                case.name,
                str(dtype).removeprefix("torch."),
                f"{moved / case.least_bytes(dtype.itemsize):.3f}",
                f"{by_width[16] / moved:.1%}",
                *(f"{sectors[s]:.2f}" if s in sectors else "-" for s in (False, True)),
                other,
                len(ptx.launches),
                ptx.runtime.waits,
            ]
        )
    return rows


def kernel_rows(launches: Sequence[tuple[Case, Launch]]) -> list[list[object]]:
    """A row for each kernel, of its launch in CASES that moves the most bytes."""

    def moved(launch: Launch) -> int:
        return launch.traffic.bytes_loaded() + launch.traffic.bytes_stored()

    found: dict[str, tuple[Case, Launch]] = {}
    for case, launch in launches:
        known = found.get(launch.kernel)
        if not known or moved(launch) > moved(known[1]):
            found[launch.kernel] = case, launch
    return [
        [
            f"`{launch.kernel}`",
            f"{launch.grid[0]} x {launch.block[0]}",
            launch.traffic.bytes_loaded(),
            launch.traffic.bytes_stored(),
            f"{launch.instructions / (launch.grid[0] * launch.block[0]):.0f}",
            f"{launch.instructions / case.elements:.2f}",
            f"{launch.float64 / case.elements:.2f}",
            launch.barriers // launch.grid[0],
            launch.parameter_bytes,
        ]
        for case, launch in found.values()
    ]


class Multiprocessor(NamedTuple):
    """What the blocks of a multiprocessor share (CUDA C++ programming guide, compute
    capabilities)."""

    threads: int
    blocks: int
    shared_bytes: int


MULTIPROCESSORS = {
    "sm_75": Multiprocessor(1024, 16, 64 << 10),
    "sm_80": Multiprocessor(2048, 32, 164 << 10),
    "sm_86": Multiprocessor(1536, 16, 100 << 10),
    "sm_90": Multiprocessor(2048, 32, 228 << 10),
    "sm_100": Multiprocessor(2048, 32, 228 << 10),
    "sm_120": Multiprocessor(1536, 24, 100 << 10),
}


def occupancy(used: Resources, threads: int, arch: str) -> float:
    """Share of a multiprocessor's threads that blocks of this size fill. A warp takes its registers
    in pieces of 256, of 65,536; a block takes 1 KB of shared memory besides its own, but on
    sm_75."""
    most = MULTIPROCESSORS[arch]
    of_warp = -(-used.registers * 32 // 256) * 256
    shared = used.shared_bytes + (0 if arch == "sm_75" else 1024)
    blocks = min(
        most.blocks,
        most.threads // threads,
        (1 << 16) // of_warp // (threads // 32),
        most.shared_bytes // shared if shared else most.blocks,
    )
    return blocks * threads / most.threads


def block_sizes() -> dict[str, int]:
    """Threads of a block of each kernel that has launch bounds, by its demangled name."""
    _, compiled = emulated.build()
    modules = [Module(c.ptx.read_text()) for c in compiled]
    kernels = [m.kernel(name) for m in modules for name in m.kernel_names]
    return {demangled(k.name): math.prod(k.max_threads) for k in kernels if k.max_threads}


def architectures() -> list[str]:
    """The architectures that setup.py builds for: sm_75 and so on."""
    return ["sm_" + name.replace(".", "") for name in setup_script().ARCHS]


def resource_rows(archs: Sequence[str]) -> list[list[object]]:
    """Registers of each kernel by architecture, its occupancy, + the bytes it spills."""
    by_kernel: dict[str, dict[str, str]] = defaultdict(dict)
    threads = block_sizes()
    for arch in archs:
        for source in emulated.kernel_sources():
            for name, used in resources(ptxas(source, arch)).items():
                name = demangled(name)
                spilled = f" + {used.spilled_bytes} B spilled" if used.spilled_bytes else ""
                full = f" ({occupancy(used, threads[name], arch):.0%})" if name in threads else ""
                by_kernel[name][arch] = f"{used.registers}{full}{spilled}"
    return [[f"`{k}`", *(v.get(a, "-") for a in archs)] for k, v in sorted(by_kernel.items())]


def step_table() -> str:
    header = [
        *("step", "dtype", "bytes over least", "in 16-byte accesses"),
        *("sectors loaded", "stored", "other bytes", "launches", "waits"),
    ]
    dtypes = (torch.float32, torch.bfloat16)
    return markdown(header, [row for dtype in dtypes for row in traffic_rows(dtype)])


def launch_table() -> str:
    launches: list[tuple[Case, Launch]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for case in CASES:
            case.call(emulated.backend(), gradients(dtype))
            launches += [(case, launch) for launch in emulated.backend().launches]
    header = [
        "kernel",
        "blocks x threads",
        "bytes loaded",
        "stored",
        "instructions a thread",
        "an element",
        "in float64",
        "barriers",
        "parameters",
    ]
    return markdown(header, kernel_rows(launches))


def register_table() -> str:
    archs = architectures()
    return markdown(["registers", *archs], resource_rows(archs))


TABLES = {"steps": step_table, "launches": launch_table, "registers": register_table}


def with_table(page: str, name: str, table: str) -> str:
    """The page with the text between the table's two markers replaced."""
    begin, end = f"<!-- {name}: written by make traffic -->", f"<!-- end of {name} -->"
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"with_table: expected {begin!r} and then {end!r}, found not both")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ptx.traffic", description=__doc__)
    parser.add_argument("--into", type=Path, help="page whose tables to replace; else print them")
    into = parser.parse_args(argv).into
    page = into.read_text() if into else ""
    for name, table in TABLES.items():
        if into:
            page = with_table(page, name, table())
        else:
            print(table(), end="\n\n", flush=True)
    if into:
        into.write_text(page)  # after all are counted, so that an error leaves the page unchanged
    return 0


if __name__ == "__main__":
    sys.exit(main())
