"""Residual sums: which additions take a branch and the stream that the branch began in."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from gradfuse.init.graph import Node

__all__ = ["Residual", "residual_sums"]

GATES = ("sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_")


@dataclass(eq=False)
class Residual:
    """One addition of a branch to its stream.

    Attributes:
        node: the addition.
        shortcut, branch: its operands.
        source: where the branch leaves the stream.
        ends: the weights' ops that the branch ends in.
        inner: the other weights' ops of the branch, in order.
        normalised: whether a norm comes last in the branch.
        post_norm: whether a norm reads the sum before the stream goes on.
        stream: the sums of the same stream, in order, this one among them.
    """

    node: Node
    shortcut: Node
    branch: Node
    source: Node
    ends: list[Node] = field(default_factory=list)
    inner: list[Node] = field(default_factory=list)
    normalised: bool = False
    post_norm: bool = False
    stream: list[Residual] = field(default_factory=list)
    normed: bool = False  # whether the branch has a norm anywhere
    norm: Node | None = None  # the norm that comes last in the branch

    @property
    def depth(self) -> int:
        """How many branches add up in the stream."""
        return len(self.stream)


def residual_sums(nodes: Sequence[Node]) -> list[Residual]:
    """The residual sums of a recorded pass, in order."""
    found: list[Residual] = []
    by_node: dict[Node, Residual] = {}
    for node in nodes:
        if node.kind != "join" or not node.name.startswith(("add", "sub")):
            continue
        if len(node.parents) != 2:
            continue
        residual = _residual(node)
        if residual is not None:
            by_node[node] = residual
            _walk_branch(residual, by_node)
            found.append(residual)
    for residual in found:
        earlier = _earlier(residual.shortcut, by_node)
        residual.stream = earlier.stream if earlier is not None else []
        residual.stream.append(residual)
    for residual in found:
        readers = _readers(residual.node)
        residual.post_norm = (
            residual.depth == 1 and bool(readers) and all(c.kind == "norm" for c in readers)
        )
    return found


def _residual(node: Node) -> Residual | None:
    left, right = node.parents
    source = _meeting(left, right)
    if source is None or not source.floating:
        return None  # a sum of two tensors, or of a mask that was made of token numbers
    costs = [_weights_between(side, source) for side in (left, right)]
    if costs[0] == costs[1] or min(costs) > 1:
        return None  # two branches side by side
    shortcut, branch = (left, right) if costs[0] < costs[1] else (right, left)
    return Residual(node, shortcut, branch, source)


def _meeting(left: Node, right: Node) -> Node | None:
    """The latest node that both depend on."""
    marks: dict[Node, int] = {left: 1}
    marks[right] = marks.get(right, 0) | 2
    heap = [(-n.index, n) for n in marks]
    heapq.heapify(heap)
    while heap:
        _, top = heapq.heappop(heap)
        if marks[top] == 3:
            return top
        for parent in top.parents:
            if parent not in marks:
                heapq.heappush(heap, (-parent.index, parent))
            marks[parent] = marks.get(parent, 0) | marks[top]
    return None


def _weights_between(node: Node, source: Node) -> int:
    """The fewest weights on a way back to the source, or to before it."""
    best: dict[Node, int] = {node: 0}
    heap = [(-node.index, node)]
    fewest = 1 << 30
    while heap:
        _, top = heapq.heappop(heap)
        if top.index <= source.index:
            fewest = min(fewest, best[top])
            continue
        cost = best[top] + (top.kind == "weight")
        for parent in top.parents:
            if parent not in best:
                heapq.heappush(heap, (-parent.index, parent))
            best[parent] = min(cost, best.get(parent, cost))
    return fewest


def _walk_branch(residual: Residual, sums: dict[Node, Residual]) -> None:
    """Finds the branch's weights: those it ends in, and the others."""
    seen: set[Node] = set()
    stack = [(residual.branch, True)]
    first = True
    while stack:
        node, at_end = stack.pop()
        if node in seen or node.index <= residual.source.index:
            continue
        seen.add(node)
        if at_end and node.kind == "norm" and first:
            residual.normalised, residual.norm = True, node
        if node.kind == "weight":
            (residual.ends if at_end else residual.inner).append(node)
            first = first and not at_end
            at_end = False
        elif node.kind in ("other", "part"):
            at_end = at_end and node.kind == "part"
        elif node in sums:
            at_end = False
        if node.kind == "norm":
            residual.normed = True
            at_end = at_end and residual.normalised
        parents = node.parents
        if node.kind == "join" and node.name.startswith("mul"):  # a gate is not the branch's end
            parents = [p for p in parents if p.name not in GATES] or parents
        stack += [(p, at_end) for p in parents]
    residual.ends.sort(key=lambda n: n.index)
    residual.inner = sorted(set(residual.inner) - set(residual.ends), key=lambda n: n.index)


def _earlier(shortcut: Node, sums: dict[Node, Residual]) -> Residual | None:
    """The sum before this one in its stream, through activations; None behind a norm."""
    node = shortcut
    while node not in sums:
        if node.kind not in ("pointwise", "pass") or not node.parents:
            return None
        node = node.parents[0]
    return sums[node]


def _readers(node: Node) -> list[Node]:
    """What reads a result, through pointwise ops and views."""
    found: list[Node] = []
    stack = [node]
    while stack:
        for child in stack.pop().children:
            if child.base is node and child.kind in ("pointwise", "pass"):
                stack.append(child)
            else:
                found.append(child)
    return found
