"""gradfuse's compiled module with its CUDA kernels and their launchers, run on CPU tensors.

The torch-facing sources of csrc/ are built against device.h and linked with the ordinary
nvcc objects and fake_cudart.cpp. `backend()` has the functions of gradfuse._C; a call registers the
memory of its tensors and raises what the emulator found.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

from ptx.emulator.counts import Launch, Traffic
from ptx.emulator.cudart import Runtime
from ptx.emulator.memory import Buffer
from ptx.emulator.toolchain import HERE, ROOT, Compiled, compile_all, cuda_library

NAME = "gradfuse_emulated"
HUGE, EDGE = 1 << 30, 1 << 20


def kernel_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def torch_sources() -> list[Path]:
    """All but the CPU kernels and their traversal."""
    folders = (ROOT / "csrc", ROOT / "csrc" / "ops", ROOT / "csrc" / "tensor")
    return sorted(p for folder in folders for p in folder.glob("*.cpp"))


def build() -> tuple[Path, list[Compiled]]:
    """The module's library, and its kernels."""
    compiled = compile_all(kernel_sources())
    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    libraries = cpp_extension.library_paths()
    library = cuda_library(
        f"{NAME}.so",
        [c.object for c in compiled],
        ["no_cpu.cpp"],
        unity=torch_sources(),
        flags=[
            *[f"-I{i}" for i in includes],
            f"-I{HERE}",  # for build_info.h
            f'-DGRADFUSE_DEVICE_HEADER="{HERE / "device.h"}"',
            f"-DTORCH_EXTENSION_NAME={NAME}",
        ],
        links=[
            *[f"-L{p}" for p in libraries],
            *["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"],
        ],
    )
    return library, compiled


def extent(t: Tensor) -> tuple[int, int]:
    """Address and bytes from a tensor's first element to its last."""
    if t.numel() == 0:
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), (last + 1) * t.element_size()


class Emulated:
    """The module's functions, and the record of the last call."""

    def __init__(self) -> None:
        library, compiled = build()
        loader = importlib.machinery.ExtensionFileLoader(NAME, str(library))
        spec = importlib.util.spec_from_file_location(NAME, library, loader=loader)
        assert spec
        self._module: ModuleType = importlib.util.module_from_spec(spec)
        loader.exec_module(self._module)
        self.runtime = Runtime(library, [c.ptx for c in compiled])
        self.buffers: list[Buffer] = []  # those of the tensors given to the last call
        self._lock = threading.RLock()

    def reset(self) -> None:
        """Forgets the last call and resets the machine's settings."""
        self.runtime.holds_freed = False
        self.runtime.reset()
        self.machine.order = "forward"
        self.machine.only_blocks = None

    @property
    def machine(self):
        return self.runtime.machine

    @property
    def launches(self) -> list[Launch]:
        """Of the last call."""
        return self.machine.launches

    @property
    def traffic(self) -> Traffic:
        """Of all launches of the last call."""
        total = Traffic()
        for launch in self.launches:
            total += launch.traffic
        return total

    def stored(self, t: Tensor) -> Tensor:
        """By element of a dense tensor, whether the last call stored to it."""
        buffer = next(b for b in self.buffers if b.start <= t.data_ptr() < b.end)
        offset = t.data_ptr() - buffer.start
        touched = buffer.stored()[offset : offset + t.nbytes]
        return torch.from_numpy(touched.reshape(-1, t.element_size()).any(axis=1)).view(t.shape)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name == "ParameterList":
            return functools.partial(_ParameterList, self, found)
        if name == "Stepper":
            return functools.partial(_Stepper, self, found)
        return self.watched(found) if callable(found) else found

    def watched(
        self, function: Callable, parameters: Callable[[], list[Tensor]] = list
    ) -> Callable:
        """The function, with its tensors' memory registered with the machine while it runs."""

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            with self._lock, self._registered([*arguments, parameters()]):
                self.runtime.reset()
                try:
                    result = function(*arguments)
                except RuntimeError:
                    self.runtime.raise_pending()
                    raise
                self.runtime.raise_pending()
                for i, t in enumerate(result if isinstance(result, tuple) else ()):
                    if isinstance(t, Tensor):
                        self.runtime.require_written(t.data_ptr(), t.nbytes, f"result {i}")
            return result

        return call

    @contextmanager
    def capturing(self) -> Iterator[list[Callable]]:
        """A graph of the launches and copies in the block, which run too. It can be replayed until
        reset(). torch's own operations are not in it."""
        self.runtime.holds_freed, self.runtime.graph = True, []
        try:
            yield self.runtime.graph
        finally:
            self.runtime.graph = None

    def replay(self, graph: list[Callable], tensors: list[Tensor]) -> None:
        """Does all of the graph again. `tensors`: those of the captured calls."""
        with self._lock, self._registered([tensors]):
            for step in graph:
                step()

    @contextmanager
    def _registered(self, arguments: list[Any]) -> Iterator[None]:
        memory = self.machine.memory
        spans: dict[int, tuple[int, str]] = {}
        for place, argument in enumerate(arguments):
            is_list = isinstance(argument, (list, tuple))
            fields = getattr(argument, "_fields", None)  # of a record
            for i, t in enumerate(argument if is_list else [argument]):
                if isinstance(t, Tensor):
                    name = f"tensor {i}" if is_list or not place else f"argument {place}"
                    self._note(spans, t, fields[i] if fields else name)
                    if t.is_leaf and t.grad is not None:
                        self._note(spans, t.grad, f"grad {i}")
        buffers = [Buffer(start, size, name, True) for start, (size, name) in merged(spans)]
        self.buffers = buffers
        memory.add_all(buffers)
        try:
            yield
        finally:
            memory.remove_all(buffers)

    @staticmethod
    def _note(spans: dict[int, tuple[int, str]], t: Tensor, name: str) -> None:
        plain = type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided
        if not plain or t.is_nested:
            return  # left for the module to refuse
        start, size = extent(t)
        if size > HUGE:  # too large to shadow: only its ends may be touched
            spans[start] = EDGE, f"{name}, beginning"
            spans[start + size - EDGE] = EDGE, f"{name}, end"
        elif size > spans.get(start, (0, ""))[0]:
            spans[start] = size, name


def merged(spans: dict[int, tuple[int, str]]) -> list[tuple[int, tuple[int, str]]]:
    """Merges overlapping spans: views of one storage become one."""
    found: list[tuple[int, tuple[int, str]]] = []
    for start, (size, name) in sorted(spans.items()):
        if found and start < found[-1][0] + found[-1][1][0]:
            before, (length, known) = found[-1]
            found[-1] = before, (max(length, start + size - before), known)
        else:
            found.append((start, (size, name)))
    return found


class _ParameterList:
    """The module's ParameterList, watched."""

    def __init__(self, emulated: Emulated, inner: type) -> None:
        self._inner = inner()
        self._parameters: list[Tensor] = []
        for name in ("clip_", "measure", "apply_", "clamp_"):
            call = getattr(self._inner, name)
            setattr(self, name, emulated.watched(call, lambda: self._parameters))

    def add(self, parameter: Tensor) -> None:
        self._inner.add(parameter)
        self._parameters.append(parameter)


class _Stepper:
    """The module's Stepper, with measure, update and step watched."""

    def __init__(self, emulated: Emulated, inner: type, rule: int) -> None:
        self._inner = inner(rule)
        self._tensors: list[Tensor] = []  # parameters, then their state
        self.is_current, self.parameters = self._inner.is_current, self._inner.parameters
        self.measure = emulated.watched(self._inner.measure, self._inner.parameters)
        self.update = emulated.watched(self._inner.update, lambda: self._tensors)
        self.step = emulated.watched(self._inner.step, lambda: self._tensors)
        self.lr_sums = emulated.watched(self._inner.lr_sums, lambda: self._tensors)
        self.check = self._inner.check

    def bind(self, groups: list[dict], state: dict, needs: list[int]) -> None:
        self._inner.bind(groups, state, needs)
        held = self._inner.parameters()
        values = [t for p in held for t in state.get(p, {}).values()]
        self._tensors = held + [t for t in values if isinstance(t, Tensor)]


@functools.cache
def backend() -> Emulated:
    """The emulated module, built at first use."""
    return Emulated()
