"""The compiled module gradfuse._C, or the reason why it is not there.

Eager calls go straight to `backend`: `_C`, or `gradfuse.reference` with the same functions. Under
torch.compile the same functions are reached as torch.library ops, which `define_op` registers.

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

__all__ = ["available", "backend", "define_op", "reason"]


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
