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

__all__ = ["has_dtensor", "is_dtensor", "local_of"]


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
