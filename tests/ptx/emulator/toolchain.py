"""nvcc and the host compiler: PTX and objects of a .cu file, libraries of objects, ptxas' figures.

Results lie under build/ptx, in folders named after a hash of all their inputs.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build" / "ptx"
TARGET = "compute_90"  # below it, bfloat16 atomics are loops of compare-and-swap
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DGRADFUSE_CUDA"]  # as setup.py's
CXX_FLAGS = ["-std=c++20", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]


@functools.cache
def setup_script():
    """setup.py as a module: it knows where a toolkit is, and the default architectures."""
    spec = importlib.util.spec_from_file_location("gradfuse_setup", ROOT / "setup.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def toolkit() -> Path | None:
    """The CUDA toolkit that setup.py would use, or None."""
    root, _ = setup_script().find_toolkit(os.environ.get("CUDA_HOME"))
    return Path(root) if root else None


def run(command: Sequence[str | Path]) -> str:
    """Standard output and error of a command; RuntimeError with them if it fails."""
    done = subprocess.run(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def nvcc() -> Path:
    root = toolkit()
    assert root, "nvcc was not found"
    return root / "bin" / "nvcc"


def compiler() -> list[str]:
    return os.environ.get("CXX", "c++").split()


def _digest(files: Sequence[Path], *extra: object) -> str:
    digest = hashlib.sha256(repr(extra).encode())
    for file in sorted(files):
        digest.update(str(file.relative_to(ROOT)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def sources_of(folder: Path) -> list[Path]:
    kinds = {".h", ".cuh", ".cu", ".cpp"}
    return [p for p in folder.rglob("*") if p.suffix in kinds]


def _built(name: str, digest: str, build) -> Path:
    """The folder that build(folder) fills. If it is missing, one process makes it while others
    wait."""
    folder = BUILD / f"{name}-{digest}"
    if folder.exists():
        return folder
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            fresh = BUILD / f"{name}-{digest}.{os.getpid()}"
            fresh.mkdir()
            try:
                build(fresh)
                fresh.rename(folder)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    return folder


class Compiled(NamedTuple):
    """An nvcc object that holds no machine code, and its PTX."""

    object: Path
    ptx: Path


def compile_cuda(source: Path) -> Compiled:
    """Compiles a .cu file for TARGET. It may include what lies beside it and in csrc."""
    headers = {p for p in sources_of(ROOT / "csrc") if p.suffix in (".h", ".cuh")}
    inputs = {*headers, *source.parent.glob("*.cuh"), source}

    def build(folder: Path) -> None:
        run(
            [
                *[nvcc(), *NVCC_FLAGS, f"-arch={TARGET}", "-lineinfo", "-Xcompiler=-fPIC"],
                *["--keep", f"--keep-dir={folder}", f"-I{ROOT / 'csrc'}"],
                *["-c", source, "-o", folder / f"{source.stem}.o"],
            ]
        )
        for kept in folder.iterdir():
            if kept.suffix not in (".o", ".ptx"):
                kept.unlink()

    digest = _digest(list(inputs), NVCC_FLAGS, TARGET, str(nvcc()), run([nvcc(), "--version"]))
    folder = _built(source.stem, digest, build)
    return Compiled(folder / f"{source.stem}.o", folder / f"{source.stem}.ptx")


def compile_all(sources: Sequence[Path]) -> list[Compiled]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_cuda, sources))


def shared_library(
    name: str,
    sources: Sequence[str] = (),
    objects: Sequence[Path] = (),
    flags: Sequence[str] = (),
    links: Sequence[str] = (),
    unity: Sequence[Path] = (),
) -> Path:
    """A library of C++ sources of this folder, of others that are compiled as one file, because
    they include the same large headers, and of objects."""
    paths = [HERE / s for s in sources or [name]]
    flags = [*CXX_FLAGS, *flags]

    def build(folder: Path) -> None:
        def compile_one(source: Path) -> Path:
            out = folder / f"{source.parent.name}-{source.stem}.o"
            run([*compiler(), *flags, "-c", source, "-o", out])
            return out

        files = list(paths)
        if unity:
            files.append(folder / "unity.cpp")
            files[-1].write_text("".join(f'#include "{source}"\n' for source in unity))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(compile_one, files))
        library = folder / f"{Path(name).stem}.so"
        run([*compiler(), "-shared", "-Wl,-Bsymbolic", *made, *objects, *links, "-o", library])
        missing = re.findall(r" U (\w*cuda\w+)", run(["nm", "-uD", library]))
        if any(m.startswith(("cuda", "__cuda")) for m in missing):
            raise RuntimeError(f"fake_cudart.cpp has no {', '.join(missing)}")

    inputs = {*paths, *sources_of(HERE), *sources_of(ROOT / "csrc")} if objects else set(paths)
    version = run([*compiler(), "--version"])
    digest = _digest(list(inputs), flags, links, [str(o) for o in objects], version, sys.version)
    return _built(Path(name).stem, digest, build) / f"{Path(name).stem}.so"


def cuda_library(
    name: str, objects: Sequence[Path], sources: Sequence[str] = (), **options
) -> Path:
    """A library in which fake_cudart.cpp stands in for libcudart."""
    root = toolkit()
    assert root
    include = next(root.rglob("cuda_runtime_api.h")).parent
    flags = [*options.pop("flags", []), f"-I{include}", f"-I{ROOT / 'csrc'}", "-DGRADFUSE_CUDA"]
    return shared_library(name, ["fake_cudart.cpp", *sources], objects, flags=flags, **options)


class Resources(NamedTuple):
    """What ptxas reports for a kernel and one architecture."""

    registers: int
    spilled_bytes: int  # stores and loads
    shared_bytes: int


def resources(said: str) -> dict[str, Resources]:
    """Registers, spills and shared memory by kernel, from the output of ptxas -v."""
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        said,
        re.S,
    )
    return {
        name: Resources(int(used), int(stores) + int(loads), _shared_bytes(rest))
        for name, stores, loads, used, rest in found
    }


def _shared_bytes(said: str) -> int:
    found = re.search(r"(\d+) bytes smem", said)
    return int(found[1]) if found else 0


def ptxas(source: Path, arch: str) -> str:
    """Output of ptxas -v for a .cu or .ptx file and an architecture."""
    command = [nvcc(), *NVCC_FLAGS, f"-arch={arch}", "-Xptxas=-v", "-cubin", f"-I{ROOT / 'csrc'}"]
    return run([*command, source, "-o", os.devnull])


@functools.cache
def demangled(name: str) -> str:
    """A kernel's name as it is written, without namespaces and parameters."""
    tool = shutil.which("c++filt")
    if not tool:
        return name
    text = run([tool, name]).strip().replace("(anonymous namespace)::", "")
    text = re.sub(r"\(bool\)([01])", lambda m: ("false", "true")[int(m[1])], text)
    text = re.sub(r"\((?:int|unsigned int|long)\)", "", text)
    depth, end = 0, len(text)
    for i, c in enumerate(text):  # the parameter list, past the template's
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            end = i
            break
    return re.sub(r"(?:\b\w+::)+", "", text[:end]).removeprefix("void ").strip()
