"""Steps on DTensors: each process updates its shards, in place, by the shards of the gradients.

The kernels see plain tensors: in place of a DTensor the tensor that holds its shard, whose .grad is
the gradient's shard during a step, and in place of the state its shards. The state itself consists
of DTensors, so that torch.distributed.checkpoint can save it and load it onto other processes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor
from typing_extensions import TypeIs

from gradfuse.distributed.locals import (
    described,
    goes_with,
    is_dtensor,
    local_gradient,
    local_of,
)
from gradfuse.distributed.ranks import Group, Ranks, ReplicatedOver
from gradfuse.distributed.shares import Shares, shares_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["Shards", "is_divided", "local_state"]

State: TypeAlias = dict[str, Any]


class Shards:
    """Plain tensors in place of the DTensors among an optimizer's parameters and their state.

    Plain parameters, and their state, stand for themselves.

    Args:
        op: begins error messages.
        group, replicated_over: as in clip_grad_norm_.
    """

    def __init__(
        self, op: str, group: Group | None = None, replicated_over: ReplicatedOver | None = None
    ) -> None:
        self.op = op
        self._given = group, replicated_over
        self.owners: list[Tensor] = []  # the parameters, as the optimizer has them
        self.groups: list[int] = []  # the group of each
        self._ranks: Ranks | None = None  # who takes part in this step
        self._states: dict[Tensor, State] = {}  # by the tensors that the kernels see
        self._lent: list[Tensor] = []  # whose .grad is set
        self.divided: DTensor | None = None  # a parameter of which others hold a part
        self.refusal: Exception | None = None  # of this step's gradients
        self.beside: Sequence[Tensor] = ()  # the optimizer's other parameters

    def lend_gradients(self, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Gives the shards of parameters the shards of gradients, until they are taken back.

        Returns:
            The parameter groups as the kernels see them.

        Raises:
            ValueError: a gradient is distributed in another way than its parameter.
        """
        self.owners = [p for group in groups for p in group["params"]]
        self.divided = next(filter(is_divided, self.owners), None)
        self.groups = [i for i, group in enumerate(groups) for _ in group["params"]]
        for index, p in enumerate(self.owners):
            if is_dtensor(p) and (grad := local_gradient(self.op, p, index)) is not None:
                self._lend(local_of(p), grad)
        return [{"params": [local_of(p) for p in group["params"]]} for group in groups]

    def _lend(self, local: Tensor, grad: Tensor) -> None:
        self._lent.append(local)
        if grad.dtype != local.dtype:  # float32 for a 16-bit parameter
            local.grad_dtype = None
        local.grad = grad

    def take_gradients_back(self) -> None:
        """Ends what lend_gradients began."""
        for local in self._lent:
            local.grad = None
        self._lent, self.refusal, self._ranks = [], None, None

    def shares(self, refusal: Exception | None = None) -> Shares:
        """The shards of gradients that this rank holds; none where it refuses them."""
        shares = shares_of(self.op, self.owners, True, *self._given, self.beside, refusal)
        self._ranks = shares.ranks
        return shares

    def ranks(self) -> Ranks:
        """Who takes part in the step."""
        return self._ranks or self.shares(self.refusal).ranks

    def states(
        self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, State]
    ) -> dict[Tensor, State]:
        """The optimizer's state as the kernels see it: the same dicts while nothing changed.

        Raises:
            ValueError: a tensor of the state is distributed in another way than its parameter.
        """
        old = self._states
        made: dict[Tensor, State] = {}
        for p in (p for group in groups for p in group["params"]):
            if p not in state:
                continue
            if not is_dtensor(p):
                made[p] = state[p]
                continue
            local, now = local_of(p), local_state(self.op, p, state[p])
            before = old.get(local)
            made[local] = before if before is not None and _same(before, now) else now
        if not _same(old, made):
            self._states = made
        return self._states

    def complete(
        self,
        p: Tensor,
        state: State,
        complete: Callable[[Tensor, State], None],
        numbers: Container[str],
    ) -> None:
        """Completes the state of a parameter, by a function that does so for a plain one.

        Args:
            numbers: names in the state of tensors that are not of the parameter's shape.
        """
        if not is_dtensor(p):
            complete(p, state)
            return
        local, now = local_of(p), local_state(self.op, p, state)
        before = dict(now)
        complete(local, now)
        for name, t in now.items():
            if t is not before.get(name) or (name not in numbers and not is_dtensor(state[name])):
                state[name] = t if name in numbers else _like(t, p)


def is_divided(p: Tensor) -> TypeIs[DTensor]:
    """Whether other processes hold other elements of a parameter."""
    # Not is_shard(), which a _StridedShard denies.
    return is_dtensor(p) and any(
        size > 1 and not placement.is_replicate() and not placement.is_partial()
        for placement, size in zip(p.placements, p.device_mesh.shape, strict=True)
    )


def local_state(op: str, p: Tensor, state: Mapping[str, Any]) -> State:
    """The state of a parameter with shards in place of DTensors.

    Raises:
        ValueError: a tensor of the state is distributed in another way than the parameter.
    """
    made = {}
    for name, t in state.items():
        if is_dtensor(t) and (not is_dtensor(p) or not goes_with(t, p)):
            raise ValueError(
                f"{op}: expected state {name} of the shape and distributed as its parameter, "
                f"{described(p)}, got {described(t)}"
            )
        made[name] = local_of(t) if is_dtensor(t) else t
    return made


def _like(local: Tensor, p: DTensor) -> DTensor:
    """The DTensor with this shard, distributed as p."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def _same(a: Mapping[Any, Any], b: Mapping[Any, Any]) -> bool:
    """Whether two dicts have the same objects under the same keys, in the same order."""
    return len(a) == len(b) and all(
        i is j and x is y for (i, x), (j, y) in zip(a.items(), b.items(), strict=True)
    )
