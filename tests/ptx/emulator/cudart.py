"""The Python side of fake_cudart.cpp: runs what a library's host code asks for on a Machine."""

from __future__ import annotations

import atexit
import ctypes
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ptx.emulator.checks import Violation
from ptx.emulator.machine import Machine
from ptx.emulator.parser import Module

LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
    ctypes.c_void_p,
)
EVENT = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure
INVALID_VALUE = 1  # cudaErrorInvalidValue
DRIVER = 13000  # CUDA 13.0
LARGE_PARAMETERS = 12010  # the first driver that takes more than 4 KB
# Calls that make the host wait for the device.
WAITS = ("cudaMemcpy", "cudaStreamSynchronize", "cudaDeviceSynchronize")


class Runtime:
    """A library built with fake_cudart.cpp, and the machine its launches run on.

    A violation cannot pass through the host code as a Python exception: the launch returns an
    error there, and `raise_pending` raises it once the host code has returned.
    """

    def __init__(self, library: Path, ptx: Sequence[Path]) -> None:
        self.library = ctypes.CDLL(str(library))
        self.machine = Machine()
        self.events: Counter[str] = Counter()
        self._modules = [Module(p.read_text()) for p in ptx]
        self._by_kernel = {name: m for m in self._modules for name in m.kernel_names}
        self._pending: BaseException | None = None
        self._allocated = 0
        self._driver = DRIVER
        self.graph: list[Callable] | None = None  # takes launches and copies, to be replayed
        self.holds_freed = False  # what a graph's launches use outlives the call that freed it
        self._hooks = LAUNCH(self._launch), EVENT(self._event)  # kept alive
        self.library.ptx_release_freed.restype = ctypes.c_void_p
        self.library.ptx_set_hooks(*self._hooks)
        atexit.register(self.library.ptx_set_hooks, LAUNCH(), EVENT())

    def _launch(self, name, sizes, arguments, shared_bytes, stream) -> int:
        try:
            kernel = name.decode()
            self.forget_freed()
            module = self._by_kernel[kernel]
            params = b""
            for i, p in enumerate(module.kernel(kernel).params):
                params = params.ljust(-(-len(params) // p.align) * p.align, b"\0")
                params += ctypes.string_at(arguments[i], p.size)
            if len(params) > 4096 and self._driver < LARGE_PARAMETERS:
                return INVALID_VALUE
            grid, block = tuple(sizes[0:3]), tuple(sizes[3:6])
            self.events["launch"] += 1
            launch = partial(
                self.machine.launch,
                *(module, kernel, grid, block, params, shared_bytes, int(stream or 0)),
            )
            if self.graph is not None:
                self.graph.append(launch)
            launch()
            return 0
        except BaseException as error:
            self._pending = self._pending or error
            return LAUNCH_FAILURE

    def set_driver(self, version: int) -> None:
        """Behaves as a driver of this version: 12000 for CUDA 12.0."""
        self._driver = version
        self.library.ptx_set_driver(version)

    def _event(self, name, to, source, size) -> None:
        try:
            what = name.decode()
            self.events[what] += 1
            self.forget_freed()
            memory = self.machine.memory
            if what == "cudaMalloc":
                self._allocated += 1
                memory.add(to, size, f"allocation {self._allocated}", written=False)
            elif what.startswith(("cudaMemcpy", "cudaMemset")):
                if source:
                    self.require_written(source, size, what)
                    if self.graph is not None:
                        self.graph.append(partial(ctypes.memmove, to, source, size))
                found = memory.at(to)
                if found:
                    found.shadow.mark_written(to, size)
            elif what == "cudaFuncSetAttribute":
                self.machine.shared_bytes_allowed[ctypes.string_at(source).decode()] = size
        except BaseException as error:
            self._pending = self._pending or error

    def forget_freed(self) -> None:
        """Removes what the library has freed from the machine's memory."""
        if self.holds_freed:
            return
        while address := self.library.ptx_release_freed():
            self.machine.memory.remove(address)

    def require_written(self, start: int, size: int, reader: str) -> None:
        """Violation if the host reads device memory that was never written."""
        found = self.machine.memory.at(start)
        if found and not found.shadow.is_written(start, size):
            text = f"{reader}: reads {size} bytes of {found}, not all of which were ever written"
            raise Violation("uninitialised", text)

    def raise_pending(self) -> None:
        """Raises the first error of the launches since the last call."""
        error, self._pending = self._pending, None
        if error is not None:
            raise error

    def reset(self) -> None:
        """Forgets the launches and events so far."""
        self.forget_freed()
        self.machine.launches.clear()
        self.events.clear()
        self._pending = None

    @property
    def waits(self) -> int:
        """How often the host waited for the device."""
        return sum(self.events[name] for name in WAITS)
