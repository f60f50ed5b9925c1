"""make traffic: what each CUDA kernel moves and takes, as tables in Markdown.

Bytes, widths and launches are counted by the emulator; registers and spills are ptxas' own figures.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ptx import emulated
from ptx.counts import Launch, Traffic
from ptx.toolchain import demangled, ptxas, resources, setup_script

SIZES = (100_003, 4_097, 33)
ROWS, COLUMNS = 40, 2_500


class Case(NamedTuple):
    """A call, and the passes over gradients (and weights) that it cannot do without."""

    name: str
    call: Callable[[emulated.Emulated, list[Tensor]], object]
    least: float


def gradients(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator).to(dtype) for n in SIZES]


def clip(max_norm: float, nonfinite: int = 0) -> Callable:
    return lambda ptx, grads: ptx.clip_(grads, False, max_norm, 2.0, nonfinite)


def zero(ptx: emulated.Emulated, grads: list[Tensor]) -> None:
    grads[0][0] = float("nan")
    ptx.clip_(grads, False, 1.0, 2.0, 2)


def adaptive(scale: float) -> Callable:
    """Over a matrix whose every row is clipped, or none."""

    def call(ptx: emulated.Emulated, grads: list[Tensor]) -> None:
        weight = torch.ones(ROWS, COLUMNS, dtype=grads[0].dtype)
        ptx.adaptive_clip_([weight], [weight * scale], 0.01, 1e-3, 2.0)

    return call


CASES = [
    Case("clip by norm, quiet", clip(1e9), 1),
    Case("clip by norm, clipping", clip(0.1), 3),
    Case("clip by norm, zeroing", zero, 2),
    Case("clip by value, nothing changes", lambda ptx, g: ptx.clamp_(g, False, 1e9), 1),
    Case("clip by value, all changes", lambda ptx, g: ptx.clamp_(g, False, 1e-9), 2),
    Case("adaptive, quiet", adaptive(1e-6), 2),
    Case("adaptive, all rows clipped", adaptive(1.0), 4),
]


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def data_bytes(traffic: Traffic) -> int:
    """What was moved of the tensors given; the rest are slots, tables, totals."""
    return traffic.bytes_loaded("tensor") + traffic.bytes_stored("tensor")


def wide_share(traffic: Traffic) -> float:
    loads, stores = traffic.widths("tensor"), traffic.widths("tensor", stores=True)
    return (loads[16] + stores[16]) / max(1, sum(loads.values()) + sum(stores.values()))


def most_sectors(traffic: Traffic) -> int | str:
    full = [r.sectors for r in traffic.requests if r.width == 16 and r.lanes == 32]
    return max(full, default="-")


def traffic_rows(dtype: torch.dtype) -> list[list[object]]:
    ptx = emulated.backend()
    rows = []
    for case in CASES:
        grads = gradients(dtype)
        size = sum(g.nbytes for g in grads)
        if case.name.startswith("adaptive"):
            size = ROWS * COLUMNS * grads[0].element_size()
        case.call(ptx, grads)
        total = ptx.traffic
        moved = data_bytes(total)
        other = total.bytes_loaded() + total.bytes_stored() - moved
        rows.append(
            [
                case.name,
                str(dtype).removeprefix("torch."),
                f"{moved / (case.least * size):.3f}",
                f"{wide_share(total):.1%}",
                most_sectors(total),
                other,
                len(ptx.launches),
                ptx.runtime.waits,
            ]
        )
    return rows


def kernel_rows(launches: Sequence[Launch]) -> list[list[object]]:
    """By kernel, the launch of CASES that moves the most."""

    def moved(launch: Launch) -> int:
        return launch.traffic.bytes_loaded() + launch.traffic.bytes_stored()

    found: dict[str, Launch] = {}
    for launch in launches:
        found[launch.kernel] = max(launch, found.get(launch.kernel, launch), key=moved)
    return [
        [
            f"`{launch.kernel}`",
            f"{launch.grid[0]} x {launch.block[0]}",
            launch.traffic.bytes_loaded(),
            launch.traffic.bytes_stored(),
            f"{launch.instructions / (launch.grid[0] * launch.block[0]):.0f}",
            launch.barriers // launch.grid[0],
        ]
        for launch in found.values()
    ]


def resource_rows(archs: Sequence[str]) -> list[list[object]]:
    """Registers of each kernel by architecture, + the bytes it spills."""
    by_kernel: dict[str, dict[str, str]] = defaultdict(dict)
    for arch in archs:
        for source in emulated.kernel_sources():
            for name, used in resources(ptxas(source, arch)).items():
                spilled = f" + {used.spilled_bytes} B spilled" if used.spilled_bytes else ""
                by_kernel[demangled(name)][arch] = f"{used.registers}{spilled}"
    return [[f"`{k}`", *(v.get(a, "-") for a in archs)] for k, v in sorted(by_kernel.items())]


def main() -> int:
    header = [
        *(
            "step",
            "dtype",
            "bytes over least",
            "in 16-byte accesses",
            "most sectors of a warp's 512 B",
        ),
        *("other bytes", "launches", "waits"),
    ]
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in traffic_rows(dtype)]
    print(markdown(header, rows), end="\n\n", flush=True)

    launches: list[Launch] = []
    for case in CASES:
        case.call(emulated.backend(), gradients(torch.float32))
        launches += emulated.backend().launches
    header = [
        "kernel",
        "blocks x threads",
        "bytes loaded",
        "stored",
        "instructions a thread",
        "barriers",
    ]
    print(markdown(header, kernel_rows(launches)), end="\n\n", flush=True)

    archs = [
        "sm_" + a.partition("+")[0].replace(".", "")
        for a in setup_script().DEFAULT_ARCHS.split(";")
    ]
    print(markdown(["registers", *archs], resource_rows(archs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
