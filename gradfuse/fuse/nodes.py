"""What the nodes of a torch.fx graph compute and write, as far as `graph` has to know.

torch.compile's graphs call functions and methods of torch, torch.export's the operators of aten.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

from gradfuse._codes import Activation

__all__ = [
    "Applied",
    "activation_of",
    "addends_of",
    "arguments_of",
    "storages",
    "tensors_in",
    "value_of",
    "written_by",
]

_aten = torch.ops.aten
_NAMESPACES: tuple[Any, ...] = (F, torch, torch._C._nn)
# Builtins of these modules do what their names say. torch._C's own switch modes.
_OF_TORCH = (
    "torch", "torch.functional", "torch.nn.functional",
    *(f"torch._C.{name}" for name in ("_nn", "_special", "_linalg", "_fft")),
)  # fmt: skip


def value_of(given: Any) -> Any:
    """A node's fake value, where torch.compile or torch.export left one; a constant is its own."""
    if not isinstance(given, Node):
        return given
    return given.meta.get("example_value", given.meta.get("val"))


def arguments_of(node: Node, names: tuple[str, ...]) -> dict[str, Any]:
    """A call's arguments by name."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def tensors_in(given: Any) -> list[Node]:
    """The nodes within arguments."""
    found: list[Node] = []

    def add(node: Node) -> Node:
        found.append(node)
        return node

    torch.fx.map_arg(given, add)
    return found


# ---- additions and activations ----


def _targets(name: str) -> Iterator[Any]:
    """The functions, methods and operators of that name, in place and not."""
    for spelled in (name, f"{name}_"):
        for namespace in _NAMESPACES:
            if hasattr(namespace, spelled):
                yield getattr(namespace, spelled)
        if hasattr(Tensor, spelled):
            yield spelled
        if hasattr(_aten, spelled):
            yield getattr(_aten, spelled).default


_NAMES = ("relu", "relu6", "hardtanh", "leaky_relu", "silu", "gelu", "hardswish", "sigmoid", "tanh")
_ACTIVATIONS = {target: name for name in _NAMES for target in _targets(name)}
_PARAMETERS = {
    "hardtanh": ("input", "min_val", "max_val", "inplace"),
    "leaky_relu": ("input", "negative_slope", "inplace"),
    "gelu": ("input", "approximate"),
}
_ADDS = {
    operator.add, operator.iadd, torch.add, _aten.add.Tensor, _aten.add_.Tensor,
    "add", "add_", "__add__", "__iadd__", "__radd__",
}  # fmt: skip


class Applied(NamedTuple):
    """An activation of a node."""

    input: Node
    activation: Activation
    negative_slope: Any = 0.01  # a float, or a node of one


def _is_call(node: Node, targets: Any) -> bool:
    if node.op != ("call_method" if isinstance(node.target, str) else "call_function"):
        return False
    return node.target in targets


def activation_of(node: Node) -> Applied | None:
    """The activation that a node applies, of those that the op has."""
    if not _is_call(node, _ACTIVATIONS):
        return None
    name = _ACTIVATIONS[node.target]
    given = arguments_of(node, _PARAMETERS.get(name, ("input", "inplace")))
    input = given.get("input")
    if not isinstance(input, Node) or "out" in given:
        return None
    if name == "hardtanh":
        if (given.get("min_val", -1.0), given.get("max_val", 1.0)) != (0.0, 6.0):
            return None
        name = "relu6"
    elif name == "gelu" and given.get("approximate", "none") != "none":
        name = "gelu_tanh"
    return Applied(input, Activation[name.upper()], given.get("negative_slope", 0.01))


def addends_of(node: Node) -> tuple[Node, Node] | None:
    """The two tensors that a node adds; the first is the one written, if any."""
    if not _is_call(node, _ADDS):
        return None
    given = arguments_of(node, ("input", "other", "alpha"))
    a, b = given.get("input"), given.get("other")
    if given.get("alpha", 1) != 1 or "out" in given:
        return None
    if not isinstance(a, Node) or not isinstance(b, Node):
        return None
    return (a, b) if all(isinstance(value_of(n), Tensor) for n in (a, b)) else None


# ---- writes ----


def written_by(node: Node) -> list[Node] | None:
    """The tensors that a node writes; None where that is not known, or it changes a mode."""
    if node.op in ("placeholder", "get_attr", "output"):
        return []
    name = node.target
    if node.op == "call_method":
        assert isinstance(name, str)
        return tensors_in([*(node.args[:1] if _is_in_place(name) else ()), node.kwargs.get("out")])
    if node.op != "call_function":
        return None
    if isinstance(name, OpOverloadPacket):
        overloads = [getattr(name, overload) for overload in name.overloads()]
        unknown = any(o._schema.is_mutable or _hides_writes(o) for o in overloads)
        return None if unknown else []
    if isinstance(name, OpOverload):
        return _written_by_operator(node, name)
    return _written_by_function(node, name)


def _written_by_operator(node: Node, op: OpOverload) -> list[Node] | None:
    if op is _aten.batch_norm.default:
        return tensors_in(node.args[3:5])
    if _hides_writes(op):
        return None
    return tensors_in(
        [
            node.kwargs.get(a.name, node.args[i] if i < len(node.args) else None)
            for i, a in enumerate(op._schema.arguments)
            if a.is_write
        ]
    )


def _hides_writes(op: OpOverload) -> bool:
    """Whether an operator of aten writes running statistics of which its schema says nothing."""
    return op.namespace == "aten" and _has_state(op._schema.name)


def _written_by_function(node: Node, function: Any) -> list[Node] | None:
    module, name = getattr(function, "__module__", None), getattr(function, "__name__", "")
    if module in ("math", "builtins"):
        return []
    if module == "_operator":
        return tensors_in(node.args[:1]) if _is_in_place(f"__{name}__") else []
    if function is F.batch_norm:
        given = arguments_of(node, ("input", "running_mean", "running_var"))
        return tensors_in([given.get("running_mean"), given.get("running_var")])
    if module not in _OF_TORCH or _has_state(name):
        return None
    writes = [node.kwargs.get("out")]
    if _is_in_place(name) or node.kwargs.get("inplace") or _inplace_argument(node, function):
        writes += node.args[:1] or [node.kwargs.get("input")]
    return tensors_in(writes)


def _is_in_place(name: str) -> bool:
    """Whether a method, or an operator of Python as a method, writes its first argument."""
    if name.startswith("__"):
        return name in ("__setitem__", "__delitem__") or name in _IN_PLACE_OPERATORS
    return name.endswith("_")


_IN_PLACE_OPERATORS = {
    f"__i{name}__"
    for name in (
        "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift",
        "and", "or", "xor", "concat",
    )
}  # fmt: skip


def _has_state(name: str) -> bool:
    """Whether a function of torch writes more than its name says."""
    return (
        "batch_norm" in name
        or "instance_norm" in name
        or name in ("embedding", "embedding_bag")  # with max_norm
        or name.startswith(("_foreach", "_fused"))
        or name in ("manual_seed", "set_rng_state")
    )


def _inplace_argument(node: Node, function: Any) -> bool:
    at = _place_of_inplace(function)
    return at is not None and len(node.args) > at and bool(node.args[at])


@functools.cache
def _place_of_inplace(function: Any) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # builtins
        return None
    return names.index("inplace") if "inplace" in names else None


def storages(nodes: list[Node]) -> set[int] | None:
    """The memory of nodes' fake values, which views share; None where that is not known."""
    found: set[int] = set()
    for node in nodes:
        value = value_of(node)
        if value is None:
            return None
        for leaf in torch.utils._pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                try:
                    found.add(leaf.untyped_storage()._cdata)
                except RuntimeError:  # sparse ones have none
                    return None
    return found
