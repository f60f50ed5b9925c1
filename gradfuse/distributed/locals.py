"""The part of a DTensor that lies on this process.

torch.distributed.tensor takes seconds to import, and nobody has a DTensor before it is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import TypeIs

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["described", "goes_with", "has_dtensor", "is_dtensor", "local_gradient", "local_of"]


def _class() -> Any:
    """DTensor, or None as long as nobody can have one."""
    module = sys.modules.get("torch.distributed.tensor")
    # A module that another thread is still importing may lack the class.
    return getattr(module, "DTensor", None)


def is_dtensor(t: object) -> TypeIs[DTensor]:
    """Whether t is a torch.distributed.tensor.DTensor."""
    kind = _class()
    return kind is not None and isinstance(t, kind)


def has_dtensor(tensors: Iterable[object]) -> bool:
    """Whether any of them is a DTensor."""
    kind = _class()
    return kind is not None and any(issubclass(t, kind) for t in set(map(type, tensors)))


def local_of(t: Tensor) -> Tensor:
    """The shard of a DTensor on this process, without a copy; a plain tensor itself.

    An asynchronous collective that still computes the shard is waited for. The same DTensor gives
    the same object until its shard is replaced.
    """
    if not is_dtensor(t):
        return t
    # Not to_local(), which returns a view with a place in the graph where gradients are enabled.
    local = t._local_tensor
    wait = getattr(local, "wait", None)  # of an AsyncCollectiveTensor
    return local if wait is None else wait()


def local_gradient(op: str, p: Tensor, index: int) -> Tensor | None:
    """The shard of a parameter's gradient, distributed as the parameter; a plain one itself.

    Raises:
        ValueError: the gradient is distributed in another way than its parameter.
    """
    grad = p.grad
    if grad is None or not (is_dtensor(p) or is_dtensor(grad)):
        return grad
    if is_dtensor(grad) and is_dtensor(p):
        if goes_with(grad, p):
            return local_of(grad)
        if any(placement.is_partial() for placement in grad.placements):
            raise ValueError(
                f"{op}: expected a gradient whose sum over the processes is taken, got placements "
                f"{grad.placements} for parameter {index}; set p.grad = "
                "p.grad.redistribute(placements=p.placements) first"
            )
    raise ValueError(
        f"{op}: expected a gradient of the shape and distributed as its parameter, "
        f"{described(p)}, got {described(grad)} for parameter {index}"
    )


def goes_with(t: DTensor, p: DTensor) -> bool:
    """Whether the shards of one are those of the other."""
    if t.placements != p.placements or t.shape != p.shape:
        return False
    return t.device_mesh is p.device_mesh or t.device_mesh == p.device_mesh


def described(t: Tensor) -> str:
    """A tensor's shape and where it lies, for errors."""
    if not is_dtensor(t):
        return f"a plain tensor of {list(t.shape)}"
    return f"{list(t.shape)} by {t.placements} on {t.device_mesh}"
