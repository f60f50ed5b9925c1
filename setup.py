"""Builds gradfuse._C: the CPU kernels always, the CUDA kernels where torch and nvcc allow.

Environment:
    GRADFUSE_CUDA         auto (default) | 0 | 1. auto: CUDA if torch has it and nvcc is found.
    GRADFUSE_NATIVE       0 installs the pure-torch package, without the compiled module.
    GRADFUSE_SANITIZE     1 builds with AddressSanitizer and UndefinedBehaviorSanitizer.
    GRADFUSE_UNITY        1 compiles all files that include torch's headers as one: a third of the
                          time, but every change compiles all of them again.
    TORCH_CUDA_ARCH_LIST  architectures, by default those of ARCHS that nvcc knows.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# The first nvcc that knows an architecture.
ARCHS = {
    "7.5": (10, 0), "8.0": (11, 0), "8.6": (11, 1), "9.0": (11, 8), "10.0": (12, 8), "12.0": (12, 8)
}  # fmt: skip
ISAS = {"baseline": 16, "avx2": 32, "avx512": 64}  # bytes of a vector


def find_toolkit(guess):
    """(root, (major, minor)) of the CUDA toolkit, or (None, None).

    Asks nvcc for its root, because the nvcc on PATH may be a wrapper far from its headers.
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


def default_archs(nvcc):
    """The architectures that an nvcc of this version compiles for. Newer GPUs get PTX."""
    return ";".join(arch for arch, since in ARCHS.items() if since <= nvcc) + "+PTX"


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


def jobs():
    return ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []


class Kernels:
    """The kernels. They do not depend on torch, so their objects serve every version of it.

    csrc/cpu/simd/unit.cpp is compiled for each op and instruction set, csrc/cuda/*.cu by nvcc.
    """

    def __init__(self, cxx, nvcc=None, arch_flags=()):
        self.cxx = cxx  # flags
        self.nvcc = nvcc  # path, or None for a CPU build
        self.arch_flags = arch_flags
        self.folder = ROOT / "build" / f"kernels{flavour()}"

    def edges(self):
        """(object, rule, source, further flags) of each object."""
        unit = ROOT / "csrc" / "cpu" / "simd" / "unit.cpp"
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        for header in sorted((ROOT / "csrc" / "cpu").glob("*_kernels.h")):
            for isa in ISAS if x86 else ["baseline"]:
                name = f"{header.stem.removesuffix('_kernels')}_{isa}.o"
                flags = [f'-DGRADFUSE_KERNELS="{header}"', f"-DGRADFUSE_ISA={isa}"]
                yield name, "cxx", unit, [*flags, f"-DGRADFUSE_VEC_BYTES={ISAS[isa]}"]
        if self.nvcc:
            for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
                yield f"{source.stem}.cuda.o", "nvcc", source, []

    def build(self):
        """Compiles what has changed, and returns the objects."""
        # -fwrapv, because Python builds extensions with it: it decides which product of a sum GCC
        # fuses with the addition, and so the last bit of the result.
        host = ["-std=c++17", "-fPIC", "-fwrapv", *self.cxx]
        device = ["-std=c++17", "-O3", "--threads=2", "--expt-relaxed-constexpr"]
        device += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-DGRADFUSE_CUDA", *self.arch_flags]
        compile_cxx = f"{os.environ.get('CXX', 'c++')} -MMD -MF $out.d {shell(host)}"
        compile_cuda = f"{self.nvcc} -MD -MF $out.d {shell(device)}"
        lines = []
        for rule, command in (("cxx", compile_cxx), ("nvcc", compile_cuda)):
            lines += [f"rule {rule}", f"  command = {command} $flags -c $in -o $out"]
            lines += ["  depfile = $out.d", "  deps = gcc", ""]
        objects = []
        for name, rule, source, flags in self.edges():
            lines += [f"build {name}: {rule} {escaped(source)}", f"  flags = {shell(flags)}"]
            objects.append(str(self.folder / name))
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join([*lines, ""]))
        subprocess.run(
            [sys.executable, "-m", "ninja", "-C", str(self.folder), "--quiet", *jobs()], check=True
        )
        return objects


def shell(flags):
    """Flags as a line of a ninja file."""
    return shlex.join(flags).replace("$", "$$")


def escaped(path):
    """A path as ninja reads it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def flavour():
    return "-sanitize" if os.environ.get("GRADFUSE_SANITIZE") == "1" else ""


def unity():
    return os.environ.get("GRADFUSE_UNITY") == "1"


def write_changed(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def write_build_info(torch_version, cuda_version, archs):
    """Writes a header that only bindings.cpp includes, and returns its folder. Macros instead would
    be arguments of every file, and other architectures would compile all of them again."""
    text = f"""#define GRADFUSE_TORCH_VERSION "{torch_version}"
#define GRADFUSE_CUDA_VERSION "{cuda_version}"
#define GRADFUSE_CUDA_ARCHS "{archs}"
"""
    folder = ROOT / "build" / f"objects-{torch_version}{flavour()}"
    write_changed(folder / "build_info.h", text)
    return folder


def sources(folder):
    """The files that include torch's headers, relative to ROOT. With GRADFUSE_UNITY=1, one file in
    `folder` that includes all of them."""
    found = [p for p in sorted((ROOT / "csrc").rglob("*.cpp")) if p.name != "unit.cpp"]
    if unity():
        whole = folder / "unity.cpp"
        write_changed(whole, "".join(f'#include "{p}"\n' for p in found))
        found = [whole]
    return [str(p.relative_to(ROOT)) for p in found]


def extension():
    """The extension without its kernels, and the kernels."""
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
    archs = ""
    if cuda:
        archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_archs(nvcc_version))
    cxx = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    link = []
    if flavour():
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        cxx += [*sanitize, "-g1", "-O1", "-fno-omit-frame-pointer"]
        link += sanitize
    nvcc = os.path.join(toolkit, "bin", "nvcc") if cuda else None
    kernels = Kernels(cxx, nvcc, cpp_extension._get_cuda_arch_flags() if cuda else [])
    # OpenMP is compiled in but not linked: its symbols then resolve to the runtime that torch
    # loaded, so that both share one thread pool. That runtime is GCC's; code from other
    # compilers cannot call it and runs on one thread.
    if "Free Software Foundation" in compiler_version():
        cxx = [*cxx, "-fopenmp"]
    about = write_build_info(torch.__version__, torch.version.cuda if cuda else "", archs)
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return (
        make(
            "gradfuse._C",
            sources(about),
            include_dirs=[str(about)],
            define_macros=[("GRADFUSE_CUDA", "1")] if cuda else [],
            extra_compile_args={"cxx": cxx},
            extra_link_args=link,
        ),
        kernels,
    )


def build_command(kernels):
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class BuildInTree(BuildExtension):
        """Keeps objects in build/, by torch version, so that a change recompiles one file."""

        def finalize_options(self):
            super().finalize_options()
            self.build_temp = str(ROOT / "build" / f"objects-{torch.__version__}{flavour()}")

        def build_extensions(self):
            if not unity():
                self.extensions[0].extra_objects = kernels.build()
                return super().build_extensions()
            # One file leaves the other cores to the kernels.
            link = self.compiler.link_shared_object
            with ThreadPoolExecutor(1) as pool:
                objects = pool.submit(kernels.build)
                self.compiler.link_shared_object = lambda made, *args, **options: link(
                    [*made, *objects.result()], *args, **options
                )
                super().build_extensions()

    return BuildInTree


if __name__ == "__main__":
    if os.environ.get("GRADFUSE_NATIVE") == "0":
        setup()
    else:
        module, kernels = extension()
        setup(ext_modules=[module], cmdclass={"build_ext": build_command(kernels)})
