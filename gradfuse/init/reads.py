"""What follows a weight's op: the activation that reads it, a norm, a residual sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfuse.init.gains import Activation, Moments, moments
from gradfuse.init.graph import Node

__all__ = ["IDENTITY", "After", "after", "function_of", "previous"]

IDENTITY = Moments(0.0, 1.0, 1.0, True)


@dataclass
class After:
    """What reads a weight's output.

    Attributes:
        name: the activation's ops in their order, or "linear".
        moments: of the activation.
        norm: whether a norm comes before the next weight or residual sum.
        readers: the ops at which the search ended: weights, residual sums, and others.
    """

    name: str
    moments: Moments
    norm: bool
    readers: list[Node]
    residual: bool = False  # whether a residual sum comes before the next weight
    function: Activation | None = None  # the activation itself


def function_of(node: Node) -> Activation | None:
    """The node's values as a function of its root's, by running its ops again; None if none lie
    between the two."""
    root = node.root
    if root is None:
        return None
    order: list[Node] = []
    seen = {root}
    stack = [node]
    while stack:  # the nodes between, parents first
        top = stack[-1]
        missing = [p for p in top.parents if p not in seen and p.root is root]
        if missing:
            stack += missing
            continue
        stack.pop()
        if top not in seen:
            seen.add(top)
            order.append(top)
    if all(n.kind == "pass" for n in order):
        return None

    def f(z: Tensor) -> Tensor:
        values = {root: z}
        for n in order:
            assert n.replay is not None
            values[n] = n.replay(values)
        return values[node]

    return f


def moments_of(node: Node) -> Moments:
    """Moments of the node's values for a Gaussian root; those of the identity if they are none."""
    f = function_of(node)
    if f is None:
        return IDENTITY
    try:
        return moments(f)
    except (ValueError, RuntimeError, TypeError, IndexError):
        return IDENTITY  # not elementwise after all, such as a matrix times a vector of its own


def after(node: Node, members: Callable[[Node], Sequence[Node]], sums: set[Node]) -> After:
    """What reads the output of a weight's op.

    Args:
        node: the op.
        members: the nodes that are a function of a root.
        sums: the residual sums.
    """
    norm, root = False, node
    for _ in range(64):
        inside = {root, *members(root)}
        exits = [
            n
            for n in (root, *members(root))
            if not n.children or any(c not in inside for c in n.children)
        ]
        active: tuple[Node, Moments] | None = None
        for n in exits:
            found = moments_of(n) if n is not root else IDENTITY
            if not found.linear:
                active = n, found
                break
        readers = [c for n in exits for c in n.children if c not in inside]
        norm = norm or any(c.kind == "norm" for c in readers)
        residual = any(c in sums for c in readers)
        if active is not None:
            function = function_of(active[0])
            return After(name_of(active[0]), active[1], norm, readers, residual, function)
        onward = [
            c
            for c in readers
            if c.kind in ("norm", "reduce", "part")
            or (c.kind == "join" and c not in sums and not c.name.startswith(("mul", "div")))
        ]
        if not onward or residual:
            return After("linear", IDENTITY, norm, readers, residual)
        root = onward[0]
    return After("linear", IDENTITY, norm, [], False)


def name_of(node: Node) -> str:
    """The activation's name: that of its op, that of a known function of the same values where it
    is written by hand, or the names of its ops."""
    names: dict[str, None] = {}
    stack, seen = [node], set()
    while stack:
        n = stack.pop()
        if n in seen or n is node.root:
            continue
        seen.add(n)
        if n.kind == "pointwise" and n.name not in ("clone", "_to_copy", "copy_"):
            names[n.name.rstrip("_")] = None
        stack += [p for p in n.parents if p is node.root or p.root is node.root]
    if len(names) == 1:
        return next(iter(names))
    f = function_of(node)
    z = torch.linspace(-6, 6, 97, dtype=torch.float64)
    if f is not None:
        for name in ("gelu", "silu", "mish", "hardswish", "elu", "softplus"):
            if torch.allclose(f(z), getattr(F, name)(z), rtol=0, atol=1e-3):
                return name
    return " ".join(reversed(names))


def previous(node: Node) -> Node | None:
    """The weight's op whose output this one reads, through activations and pooling alone."""
    if not node.parents or node.use is None or node.use.kind == "embedding":
        return None
    source = node.parents[0].base
    while source.kind == "reduce" or source.kind == "part":
        source = source.parents[0].base
    return source if source.kind == "weight" else None
