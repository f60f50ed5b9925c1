"""Who takes part in a norm over ranks, and which rank counts which gradient.

A gradient is counted once, however many ranks hold a copy of it. What is split and what is copied
follows from meshes and placements, and for plain tensors from the groups that the caller names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch.distributed as dist
from torch import Tensor

from gradfuse.distributed.locals import is_dtensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Group", "Ranks", "ReplicatedOver", "kept", "ranks_of"]

Group: TypeAlias = "ProcessGroup | DeviceMesh"
ReplicatedOver: TypeAlias = "Group | Mapping[Group, Iterable[Tensor]]"


def kept(replicated_over: ReplicatedOver | None) -> ReplicatedOver | None:
    """replicated_over for more than one call: an iterator in it could be walked only once."""
    if not isinstance(replicated_over, Mapping):
        return replicated_over
    return {group: list(tensors) for group, tensors in replicated_over.items()}


@dataclass(frozen=True)
class Ranks:
    """Who takes part in a norm.

    Attributes:
        group: the ranks of the collective; None for this process alone.
        size: their number.
        position: of this rank among them.
        counted: for each gradient, whether this rank counts it; else another rank does.
    """

    group: ProcessGroup | None
    size: int
    position: int
    counted: list[bool]


def ranks_of(
    op: str,
    tensors: Sequence[Tensor | None],
    group: Group | None = None,
    replicated_over: ReplicatedOver | None = None,
    owners: Sequence[Tensor] | None = None,
    beside: Sequence[Tensor] = (),
) -> Ranks:
    """Who takes part in the norm of these gradients.

    Without `group` the ranks are those of the DTensors' meshes, the base. A gradient whose mesh is
    smaller than the base is a copy in the base's other parts, and a plain one is a copy on every
    rank of it. Over `group` gradients are disjoint, apart from what a mesh says.

    Args:
        op: the caller's name, for errors.
        tensors: the gradients, the same number on each rank of a mesh; None for a missing one.
        group: a ProcessGroup or a DeviceMesh of one dimension.
        replicated_over: a group over which all gradients are copies, or a mapping from such groups
            to the owners for which that holds.
        owners: what the caller was given, the parameters of these gradients; the gradients
            themselves if None.
        beside: more tensors whose meshes tell who takes part.

    Raises:
        ValueError: the meshes have no common one, or the groups do not fit them.
    """
    owners = [t for t in tensors if t is not None] if owners is None else owners
    # A parameter without gradient still tells who takes part: another rank may have one.
    meshes = _meshes(op, [*tensors, *owners, *beside])
    base = _base(op, list(meshes.values()))
    everyone, copies = _copies_of(op, replicated_over)
    members = [ranks for ranks in (_members(op, group), everyone) if ranks is not None]
    here = _joined(op, base, [*members, *(ranks for ranks, _ in copies)])
    if here is None:
        return Ranks(None, 1, 0, [True] * len(tensors))
    rank = dist.get_rank()
    base_ranks = [rank] if base is None else _ranks_in(base)
    disjoint = [rank] if group is None else members[0]
    counts_plain = base_ranks[0] in disjoint
    is_first = everyone is None or everyone[0] == rank
    by_layout: dict[Any, bool] = {}
    counted = []
    for t in tensors:
        if not is_dtensor(t):
            counted.append(is_first and counts_plain)
            continue
        layout = (id(t.device_mesh), t.placements)
        if layout not in by_layout:
            by_layout[layout] = _counts(t, base_ranks[0])
        counted.append(is_first and by_layout[layout])
    for ranks, ids in copies:
        if ranks[0] != rank:
            counted = [c and id(p) not in ids for c, p in zip(counted, owners, strict=True)]
    process_group = _process_group(here, base, [group, replicated_over])
    return Ranks(process_group, len(here), dist.get_rank(process_group), counted)


def _meshes(op: str, tensors: Sequence[Tensor | None]) -> dict[int, DeviceMesh]:
    """The meshes of the DTensors among them, by identity."""
    meshes: dict[int, DeviceMesh] = {}
    for i, t in enumerate(tensors):
        if not is_dtensor(t):
            continue
        if t.device_mesh.get_coordinate() is None:
            raise ValueError(f"{op}: expected a mesh that this rank is in, got one for tensor {i}")
        meshes[id(t.device_mesh)] = t.device_mesh
    return meshes


def _counts(t: Any, first: int) -> bool:
    """Whether this rank counts a DTensor: its part of the base holds the base's first rank, and it
    is the first along each dimension over which the tensor is copied."""
    mesh = t.device_mesh
    if first not in _ranks_in(mesh):
        return False
    return all(
        where == 0
        for where, placement in zip(mesh.get_coordinate(), t.placements, strict=True)
        if placement.is_replicate()
    )


def _ranks_in(mesh: DeviceMesh) -> list[int]:
    ranks: list[int] = mesh.mesh.flatten().tolist()
    return ranks


def _root(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that this one was sliced from."""
    own = getattr(mesh, "_get_root_mesh", None)
    if own is not None:
        root: DeviceMesh = own()
        return root
    from torch.distributed.device_mesh import _mesh_resources

    of_older_torch: DeviceMesh = _mesh_resources.get_root_mesh(mesh)
    return of_older_torch


def _base(op: str, meshes: list[DeviceMesh]) -> DeviceMesh | None:
    """The mesh that holds all others, or what they were sliced from; None without any."""
    if not meshes:
        return None
    largest = max(meshes, key=lambda m: m.size())
    inside = set(_ranks_in(largest))
    if all(inside.issuperset(_ranks_in(m)) for m in meshes):
        return largest
    roots = [_root(m) for m in meshes]
    # By their ranks: torch caches the meshes of DTensors, whatever the names of the root are.
    if all(root.mesh.equal(roots[0].mesh) for root in roots):
        return roots[0]
    raise ValueError(
        f"{op}: expected meshes of which one holds all others, or slices of one mesh, got "
        f"{', '.join(str(_ranks_in(m)) for m in meshes)}; pass group="
    )


def _members(op: str, group: Group | None, name: str = "group") -> list[int] | None:
    """The global ranks of a group, in its order."""
    if group is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(f"{op}: {name} needs torch.distributed.init_process_group first")
    dimensions = getattr(group, "ndim", 1)
    if dimensions != 1:
        raise ValueError(
            f"{op}: {name} must have one dimension, got a mesh of {dimensions}; pass mesh[name] or "
            "mesh._flatten()"
        )
    process_group = _unwrapped(group)
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"{op}: {name} must be a ProcessGroup or a DeviceMesh, got {type(group).__name__}"
        )
    ranks: list[int] = dist.get_process_group_ranks(process_group)
    if dist.get_rank() not in ranks:
        raise ValueError(f"{op}: {name} must hold this rank, got {ranks} on {dist.get_rank()}")
    return ranks


def _copies_of(
    op: str, replicated_over: ReplicatedOver | None
) -> tuple[list[int] | None, list[tuple[list[int], set[int]]]]:
    """The ranks over which all gradients are copies, and (ranks, ids) for those of a mapping."""
    name = "replicated_over"
    if not isinstance(replicated_over, Mapping):
        return _members(op, replicated_over, name), []
    copies = []
    for group, given in replicated_over.items():
        ranks = _members(op, group, name)
        assert ranks is not None
        copies.append((ranks, set(map(id, given))))
    return None, copies


def _joined(op: str, base: DeviceMesh | None, groups: Sequence[list[int]]) -> list[int] | None:
    """The ranks of the collective: those of the base and of every group."""
    here = None if base is None else _ranks_in(base)
    for ranks in groups:
        if here is None or set(here) <= set(ranks):
            here = sorted(ranks)
        elif not set(ranks) <= set(here):
            here = _product(op, base, here, ranks)
    return here


def _product(op: str, base: DeviceMesh | None, here: list[int], ranks: list[int]) -> list[int]:
    """The ranks of a slice of the root mesh along all dimensions in which either varies."""
    root = None if base is None else _root(base).mesh
    if root is not None and set(ranks) <= set(root.flatten().tolist()):
        rank = dist.get_rank()
        places = {int(root[tuple(i)]): i for i in _places(root)}
        mine = places[rank]
        varying = {
            d
            for other in (*here, *ranks)
            for d, (a, b) in enumerate(zip(places[other], mine, strict=True))
            if a != b
        }
        slices = tuple(slice(None) if d in varying else i for d, i in enumerate(mine))
        joined: list[int] = sorted(root[slices].flatten().tolist())
        if len(joined) == len(here) * len(ranks):
            return joined
    raise ValueError(
        f"{op}: expected a group that holds all ranks of the gradients' mesh {here}, or is a "
        f"dimension of the mesh that theirs was sliced from, got ranks {ranks}"
    )


def _places(root: Tensor) -> list[list[int]]:
    places: list[list[int]] = (root >= 0).nonzero().tolist()
    return places


_groups: dict[tuple[int, ...], ProcessGroup] = {}  # those made here, by their ranks


def _process_group(ranks: list[int], base: DeviceMesh | None, given: Sequence[Any]) -> ProcessGroup:
    """A ProcessGroup of these ranks. One that nobody has yet is made once, by these ranks alone."""
    if len(ranks) == dist.get_world_size():
        world: Any = dist.group.WORLD
        return cast("ProcessGroup", world)
    for group in (*given, base):
        if group is None or isinstance(group, Mapping) or getattr(group, "ndim", 1) != 1:
            continue
        process_group = _unwrapped(group)
        if sorted(dist.get_process_group_ranks(process_group)) == ranks:
            return process_group
    key = tuple(ranks)
    if _groups.get(key) not in dist.distributed_c10d._world.pg_map:
        made = dist.new_group(ranks, use_local_synchronization=True)
        _groups[key] = cast("ProcessGroup", made)
    return _groups[key]


def _unwrapped(group: Any) -> ProcessGroup:
    process_group: ProcessGroup = group.get_group() if hasattr(group, "get_group") else group
    return process_group
