"""What the classes share that `fuse` gives a model's modules in the place of their own."""

from __future__ import annotations

import os
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from gradfuse import _native
from gradfuse.ops.checks import is_transformed

__all__ = [
    "PLAIN", "LastCall", "Swapped", "become_plain", "is_large", "is_parameter", "is_plain",
    "is_recorded", "recorded",
]  # fmt: skip

PLAIN = (Tensor, nn.Parameter, type(None))
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OWN = ("_site", "_ops", "_same_buffers")  # attributes that the plain class lacks

# Below these many bytes a dropout, or the sum of two ordinary tensors, that waits spares no more
# than it costs (docs/performance.md).
LEAST_BYTES = 1 << 16
LEAST_BYTES_OF_SUM = 1 << 20


class LastCall(NamedTuple):
    """What a module did last, where no record of the compiled module tells."""

    pattern: str
    fused: bool
    reason: str = ""


class Swapped(nn.Module):
    """A module whose class was changed, so that it stays the very same object.

    `_site` is the record of what its last call became, or None. `_ops` is the compiled module if
    tensors may wait there, False if not, and None before the first call.
    """

    plain: Any  # the class that it had
    _site: Any = None
    _ops: Any = None

    def _ops_that_wait(self) -> Any:
        """The compiled module, if a tensor may wait in this call; else None."""
        if torch.compiler.is_compiling() or is_transformed():
            return None
        ops = self._ops
        if ops is None:
            backend = _native.backend
            waits = hasattr(backend, "normalise_sum") and os.environ.get("GRADFUSE_DEFER") != "0"
            ops = self.__dict__["_ops"] = backend if waits else False
        return ops or None

    def _note(self, call: LastCall) -> None:
        if not torch.compiler.is_compiling():
            self.__dict__["_site"] = call

    def _state(self) -> dict[str, Any]:
        """The attributes that a copy has."""
        return {name: value for name, value in self.__dict__.items() if name not in _OWN}

    def _plain_state(self) -> dict[str, Any]:
        """The attributes of the plain class."""
        return self._state()

    def _refuse_mode(self, to: str) -> None:
        """Raises where the plain class would not mean the same."""

    def __getstate__(self) -> dict[str, Any]:
        return self._state()

    def __prepare_scriptable__(self) -> nn.Module:
        return to_plain(self)


def become_plain(module: Swapped) -> None:
    """Gives a module its own class back."""
    state, plain = module._plain_state(), cast(nn.Module, module)
    plain.__class__ = module.plain
    plain.__dict__.clear()
    plain.__dict__.update(state)


def to_plain(module: Swapped) -> nn.Module:
    """A module of the plain class with the very same parameters, buffers and hooks."""
    made: nn.Module = module.plain.__new__(module.plain)
    made.__dict__.update(module._plain_state())
    return made


def recorded(module: Swapped, input: Any) -> Any:
    """A call of the module in the graph of torch.fx, as of torch.nn's own; None of a tensor."""
    if not isinstance(input, Proxy):
        return None
    tracer: Any = input.tracer
    if any(cls.__name__ == "QuantizationTracer" for cls in type(tracer).__mro__):
        # prepare_fx and prepare_qat_fx go by classes, not by isinstance, as they fold a batch norm
        # into the convolution before it.
        module._refuse_mode("convert")
        become_plain(module)
        return module(input)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input,), {})


def is_plain(t: Tensor) -> bool:
    """Whether gradfuse's ops take such a tensor, of the eager program or of torch.compile."""
    if t.dtype not in _DTYPES:
        return False
    if torch.compiler.is_compiling():  # whose graphs would hold each question
        return t.device.type in ("cpu", "cuda")
    return (
        type(t) in PLAIN
        and (t.is_cpu or t.is_cuda)
        and t.layout is torch.strided
        and not t.is_nested
    )


def is_parameter(t: Tensor) -> bool:
    """The same of a parameter, which is on the input's device."""
    return t.dtype in _DTYPES and (type(t) in PLAIN or torch.compiler.is_compiling())


def is_recorded() -> bool:
    """Whether torch.export or torch.jit records the call, who get what the plain module does."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._is_tracing()


def is_large(t: Tensor) -> bool:
    return t.numel() * t.element_size() >= LEAST_BYTES
