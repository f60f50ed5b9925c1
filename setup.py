"""Builds gradfuse._C: the CPU kernels always, the CUDA kernels where torch and nvcc allow.

Environment:
    GRADFUSE_CUDA         auto (default) | 0 | 1. auto: CUDA if torch has it and nvcc is found.
    GRADFUSE_NATIVE       0 installs the pure-torch package, without the compiled module.
    GRADFUSE_SANITIZE     1 builds with AddressSanitizer and UndefinedBehaviorSanitizer.
    TORCH_CUDA_ARCH_LIST  architectures, by default those of DEFAULT_ARCHS.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
DEFAULT_ARCHS = "7.5;8.0;8.6;9.0;10.0;12.0+PTX"


def find_toolkit(guess):
    """(root, (major, minor)) of the CUDA toolkit, or (None, None).

    nvcc itself says where it lives: the one on PATH may be a wrapper far from its headers.
    """
    nvcc = os.path.join(guess, "bin", "nvcc") if guess else "nvcc"
    nvcc = shutil.which(nvcc) or shutil.which("nvcc")
    if not nvcc:
        return None, None
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", version)
    dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
    root = Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent
    if not found or not any(root.rglob("cuda_runtime_api.h")):
        return None, None
    return str(root), (int(found[1]), int(found[2]))


def wants_cuda(torch, nvcc):
    """Whether to build the CUDA kernels. Never asks for a GPU: builders have none."""
    choice = os.environ.get("GRADFUSE_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"gradfuse: GRADFUSE_CUDA: expected auto, 0 or 1, got {choice!r}")
    if choice == "0" or (choice == "auto" and (torch.version.cuda is None or nvcc is None)):
        return False
    if torch.version.cuda is None:
        sys.exit("gradfuse: GRADFUSE_CUDA=1 needs a CUDA build of torch, got " + torch.__version__)
    if nvcc is None:
        sys.exit(
            "gradfuse: GRADFUSE_CUDA=1 needs nvcc and its headers, found none on PATH or CUDA_HOME"
        )
    if nvcc[0] != int(torch.version.cuda.split(".")[0]):
        sys.exit(
            f"gradfuse: expected nvcc of torch's CUDA {torch.version.cuda}, got "
            f"{nvcc[0]}.{nvcc[1]}; install that toolkit, or set GRADFUSE_CUDA=0"
        )
    return True


def compiler_version():
    compiler = os.environ.get("CXX", "c++").split()
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout


def extension():
    import torch
    from torch.utils import cpp_extension

    if not shutil.which(os.environ.get("CXX", "c++").split()[0]):
        sys.exit(
            "gradfuse: expected a C++ compiler (c++ on PATH, or CXX), found none; install one, or "
            "set GRADFUSE_NATIVE=0 for the pure-torch package"
        )
    toolkit, nvcc_version = find_toolkit(cpp_extension.CUDA_HOME)
    cuda = wants_cuda(torch, nvcc_version)
    if cuda:
        cpp_extension.CUDA_HOME = toolkit
    archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS) if cuda else ""
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
    macros = [
        ("GRADFUSE_TORCH_VERSION", f'"{torch.__version__}"'),
        ("GRADFUSE_CUDA_VERSION", f'"{torch.version.cuda if cuda else ""}"'),
        ("GRADFUSE_CUDA_ARCHS", f'"{archs}"'),
    ]
    cxx = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    # OpenMP is compiled in but not linked: its symbols then resolve to the runtime that torch
    # loaded, so that both share one thread pool. That runtime is of GCC; code of others cannot
    # call it, and runs on one thread.
    if "Free Software Foundation" in compiler_version():
        cxx.append("-fopenmp")
    link = []
    if os.environ.get("GRADFUSE_SANITIZE") == "1":
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        cxx += [*sanitize, "-g", "-O1", "-fno-omit-frame-pointer"]
        link += sanitize
    if cuda:
        sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cu"))
        macros.append(("GRADFUSE_CUDA", "1"))
        nvcc = ["-O3", "--threads=2", "--expt-relaxed-constexpr"]
        return cpp_extension.CUDAExtension(
            "gradfuse._C",
            sources,
            define_macros=macros,
            extra_compile_args={"cxx": cxx, "nvcc": nvcc},
            extra_link_args=link,
        )
    return cpp_extension.CppExtension(
        "gradfuse._C",
        sources,
        define_macros=macros,
        extra_compile_args={"cxx": cxx},
        extra_link_args=link,
    )


def build_command():
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class BuildInTree(BuildExtension):
        """Keeps objects in build/, apart for each torch, so that a rebuild is one file."""

        def finalize_options(self):
            super().finalize_options()
            flavour = "-sanitize" if os.environ.get("GRADFUSE_SANITIZE") == "1" else ""
            self.build_temp = str(ROOT / "build" / f"objects-{torch.__version__}{flavour}")

    return BuildInTree


if __name__ == "__main__":
    if os.environ.get("GRADFUSE_NATIVE") == "0":
        setup()
    else:
        setup(ext_modules=[extension()], cmdclass={"build_ext": build_command()})
