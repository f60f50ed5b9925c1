"""Norms over ranks: which rank counts which gradient, and the one collective of a norm."""

from gradfuse.distributed.locals import has_dtensor, is_dtensor, local_of
from gradfuse.distributed.ranks import Group, Ranks, ReplicatedOver, kept, ranks_of

__all__ = [
    "Group",
    "Ranks",
    "ReplicatedOver",
    "has_dtensor",
    "is_dtensor",
    "kept",
    "local_of",
    "ranks_of",
]
