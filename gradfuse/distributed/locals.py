"""What a rank holds of a tensor."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["has_dtensor", "is_dtensor", "local_of"]

_PLAIN = {Tensor, Parameter}


def _class() -> Any:
    """DTensor; None before anything has imported its module, which takes two seconds."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def is_dtensor(t: object) -> TypeGuard[DTensor]:
    """Whether t is a DTensor."""
    if type(t) in _PLAIN:
        return False
    dtensor = _class()
    return dtensor is not None and isinstance(t, dtensor)


def has_dtensor(tensors: Iterable[object]) -> bool:
    """Whether any of them is a DTensor."""
    dtensor = _class()
    if dtensor is None:
        return False
    return any(issubclass(kind, dtensor) for kind in set(map(type, tensors)) - _PLAIN)


def local_of(t: Tensor) -> Tensor:
    """This rank's shard of a DTensor, which shares its memory; a plain tensor itself."""
    if not is_dtensor(t):
        return t
    with torch.no_grad():
        shard: Tensor = t.to_local()
    wait = getattr(shard, "wait", None)  # of a collective that is still on its way
    return shard if wait is None else wait()
