"""The compiled module gradfuse._C, or the reason why it is not there.

Eager calls go straight to `backend`: `_C`, or `gradfuse.reference` with the same functions. Under
torch.compile, tracers and dispatch modes the same functions are reached as torch.library ops, which
`define_op` registers: these record calls of ops, and nothing else.

Modules look `_native.backend` up at each call and never bind it: tests put another implementation
in its place here, for all modules at once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from gradfuse import reference

__all__ = [
    "available",
    "backend",
    "define_op",
    "is_traced",
    "is_traced_in_place",
    "reason",
    "refuse_tracing",
]


def _load() -> tuple[ModuleType | None, str]:
    """(_C, "") or (None, why not)."""
    if os.environ.get("GRADFUSE_NATIVE") == "0":
        return None, "GRADFUSE_NATIVE=0"
    try:
        from gradfuse import _C
    except ImportError as error:
        return None, f"the compiled module could not be loaded ({error})"
    if _C.torch_version != torch.__version__:
        return None, f"it was built for torch {_C.torch_version}, this is torch {torch.__version__}"
    _C.isa()  # raises on a wrong GRADFUSE_ISA now, not in the middle of training
    return _C, ""


_module, reason = _load()
available = _module is not None
if TYPE_CHECKING:
    from gradfuse import _C as backend
else:
    backend = _module if available else reference

if not available and reason != "GRADFUSE_NATIVE=0":
    warnings.warn(
        f"gradfuse runs its pure-torch path: {reason}. To cure it, reinstall where there is a C++ "
        "compiler: pip install --no-build-isolation --force-reinstall --no-deps gradfuse",
        stacklevel=2,
    )


# As names of this module, because each call of an op asks them.
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_jit_tracing = torch._C._is_tracing


def is_traced() -> bool:
    """Whether a call must go through torch.ops: torch.compile, a tracer or a dispatch mode has to
    see it."""
    return _is_compiling() or _dispatch_modes() > 0 or _is_jit_tracing()


def is_traced_in_place(op: str) -> bool:
    """is_traced, for an op that writes a list of tensors. torch.jit.trace would leave it out of the
    graph without a word, so that raises."""
    if not is_traced():
        return False
    if not _is_compiling() and _is_jit_tracing():
        raise RuntimeError(
            f"{op}: expected a tracer that records writes to lists of tensors, got torch.jit.trace;"
            " use torch.compile or torch.export, or clip outside of the traced function"
        )
    return True


def refuse_tracing(op: str) -> None:
    """Raises where a tracer records what must run: make_fx, FakeTensorMode, torch.export or
    torch.jit.trace. Other dispatch modes only look on."""
    if not _is_jit_tracing() and not _dispatch_modes():
        return
    key = torch._C._TorchDispatchModeKey
    recording = (torch._C._get_dispatch_mode(k) for k in (key.PROXY, key.FAKE, key.FUNCTIONAL))
    if _is_jit_tracing() or any(mode is not None for mode in recording):
        raise RuntimeError(
            f"{op}: expected a call that is not traced, because its effects on state would not be "
            "recorded; trace forward and backward, and call it on their outcome"
        )


_library = torch.library.Library("gradfuse", "DEF")


def define_op(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """Registers gradfuse::<schema> for every device, with its shape function and derivative."""
    name = _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gradfuse::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"gradfuse::{name}", backward, setup_context=setup_context, lib=_library
        )
