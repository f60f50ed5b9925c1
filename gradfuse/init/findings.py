"""All that is known of a model before it is initialised."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from gradfuse.init.gains import Moments
from gradfuse.init.graph import Node, Recorder, Use
from gradfuse.init.reads import IDENTITY, After, after
from gradfuse.init.residual import Residual, residual_sums
from gradfuse.init.slots import Slot
from gradfuse.init.structure import activation_after, use_of

__all__ = ["Findings", "Weight"]


@dataclass
class Weight:
    """How the model uses one weight."""

    use: Use
    activation: str = "linear"
    moments: Moments = IDENTITY
    source: str = ""  # how the activation was found
    norm: bool = False  # a norm follows
    node: Node | None = None
    after: After | None = None
    sums: list[Residual] = field(default_factory=list)  # those whose branch it ends
    kinds: set[str] = field(default_factory=set)  # of all ops that take it


class Findings:
    """Weights, by path, from a recorded pass where there was one and from the modules elsewhere."""

    def __init__(self, model: nn.Module, slots: dict[str, Slot], recorder: Recorder | None) -> None:
        self.weights: dict[str, Weight] = {}
        self.roles: dict[str, set[str]] = {}
        self.sums: list[Residual] = []
        self.nodes: Sequence[Node] = ()
        if recorder is not None:
            self._read_graph(recorder)
        self._read_modules(model, slots)

    def _read_graph(self, recorder: Recorder) -> None:
        self.nodes = recorder.nodes
        self.roles = recorder.roles
        self.sums = residual_sums(self.nodes)
        members: dict[Node, list[Node]] = defaultdict(list)
        for node in self.nodes:
            if node.root is not None:
                members[node.root].append(node)
        sums = {s.node for s in self.sums}
        for node in self.nodes:
            if node.use is None:
                continue
            known = self.weights.get(node.use.slot)
            if known is not None:
                known.kinds.add(node.use.kind)
                continue
            read = after(node, lambda n: members.get(n, []), sums)
            weight = Weight(node.use, read.name, read.moments, "run", read.norm, node, read)
            weight.kinds = {node.use.kind}
            self.weights[node.use.slot] = weight
        for residual in self.sums:
            for end in residual.ends:
                assert end.use is not None
                self.weights[end.use.slot].sums.append(residual)

    def _read_modules(self, model: nn.Module, slots: dict[str, Slot]) -> None:
        following = activation_after(model)
        for path, slot in slots.items():
            if path in self.weights:
                continue
            use = use_of(slot.owner, slot.name, path)
            if use is None:
                continue
            weight = Weight(use, source="modules", kinds={use.kind})
            if slot.owner in following:
                weight.activation, weight.moments, weight.norm = following[slot.owner]
            for alias, owner in slot.aliases.items():  # such as a tied head
                other = use_of(owner, alias.rpartition(".")[2], alias)
                if other is not None:
                    weight.kinds.add(other.kind)
            self.weights[path] = weight

    def scales_of(self, residual: Residual) -> list[str]:
        """Paths of the parameters that the branch is multiplied with after its last weight."""
        found: list[str] = []
        node = residual.branch
        while node.kind in ("pointwise", "pass") and node.parents:
            found += [p for p in node.params if "mul" in self.roles.get(p, ())]
            node = node.parents[0]
        return found

    @property
    def biases(self) -> set[str]:
        """Paths of the biases of all weights."""
        return {w.use.bias for w in self.weights.values() if w.use.bias is not None}
