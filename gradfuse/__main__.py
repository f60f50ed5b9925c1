"""The command line: python -m gradfuse bench | demo | guide | info."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

import torch

import gradfuse
from gradfuse import _native

EXTRAS = ("matplotlib", "rich", "sklearn")  # what pip install gradfuse[demo] brings


def info() -> list[tuple[str, str]]:
    """Versions, how the compiled module was built, and what it runs on."""
    rows = [
        ("gradfuse", gradfuse.__version__),
        ("torch", torch.__version__),
        ("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
    ]
    if _native.available:
        module = _native.backend
        rows += [
            ("compiled module", module.__file__),
            ("  built for torch", module.torch_version),
            ("  compiler", module.compiler),
            ("  CUDA", module.cuda_version or "none: built for the CPU"),
            ("  CUDA archs", module.cuda_archs or "none"),
            ("  ISA", module.isa()),
            ("  threads", str(module.num_threads())),
        ]
    else:
        rows.append(("compiled module", f"none: {_native.reason}"))
        rows.append(("threads", str(torch.get_num_threads())))
    found = torch.cuda.is_available()
    rows.append(("GPU", torch.cuda.get_device_name() if found else "none that torch can use"))
    return rows


def run(command: str, rest: Sequence[str]) -> int:
    """These commands parse their own options, and need more packages than a training loop."""
    try:
        if command == "bench":
            from gradfuse.bench.command import main as bench

            return bench(rest)
        if command == "guide":
            from gradfuse.guide.command import main as guide

            return guide(rest)
        from gradfuse.demo.command import main as demo

        return demo(rest)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        print(
            f"gradfuse {command} needs {error.name}, which is not installed: "
            "pip install gradfuse[demo]",
            file=sys.stderr,
        )
        return 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gradfuse", description=gradfuse.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("bench", help="time an op, or all, against its peers", add_help=False)
    commands.add_parser("demo", help="train nets with and without gradfuse", add_help=False)
    commands.add_parser("guide", help="measure remedies for exploding gradients", add_help=False)
    commands.add_parser("info", help="versions, build, instruction set, threads")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command != "info":
        return run(arguments.command, rest)
    if rest:
        parser.error(f"info takes no options, got {' '.join(rest)}")
    rows = info()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
