"""Batch norm, add and activation as one op in graphs of torch.compile and torch.export.

A batch norm, the add and the activation that take its output on, and nobody else, become one call
in the activation's place. So what the call reads must not be written in between, and its running
statistics must be neither read nor written. Whatever is not known to be harmless speaks against it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from gradfuse._codes import Activation
from gradfuse._records import BatchNormCall
from gradfuse.fuse.graph_norms import fuse_norms
from gradfuse.fuse.nodes import (
    activation_of,
    addends_of,
    arguments_of,
    storages,
    tensors_in,
    value_of,
    written_by,
)
from gradfuse.ops.batch_norm import LIBRARY_NAMES, UPDATED, library_arguments

__all__ = ["fuse_graph", "rewrite"]

_OP = torch.ops.gradfuse.batch_norm_act.default
_FUNCTION = (
    "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
)  # fmt: skip
_OPERATOR = ("input", "weight", "bias", "running_mean", "running_var", *_FUNCTION[5:])
_BATCH_NORMS = {
    F.batch_norm: _FUNCTION,
    torch.batch_norm: _OPERATOR,
    torch.ops.aten.batch_norm.default: _OPERATOR,
}
_call_of: Any = BatchNormCall  # whose fields are nodes here
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fuse_graph(graph_module: GraphModule) -> GraphModule:
    """Turns a norm and what surrounds it into one op, in the graph of torch.export.

    Takes what `fuse` takes: of a batch norm the add, in place or not, and the activations of
    `batch_norm_act` that follow it; of a layer norm or RMS norm the add before it, and a dropout
    or dropped path before that, which then has gradfuse's random numbers. A batch norm whose output
    is used twice, or whose operands are written before its activation, keeps its place and becomes
    the op alone. A layer norm or RMS norm of anything but a sum stays.

    Args:
        graph_module: torch.export.export(...).module(), or another graph whose nodes hold fake
            values in meta["val"] or meta["example_value"].

    Returns:
        GraphModule; the given one, changed. Parameters, buffers and signature stay.

    Raises:
        TypeError: graph_module is no torch.fx.GraphModule.
        ValueError: its nodes hold no fake values.
    """
    if not isinstance(graph_module, GraphModule):
        raise TypeError(
            "fuse_graph: graph_module must be a torch.fx.GraphModule, got "
            f"{type(graph_module).__name__}"
        )
    calls = [n for n in graph_module.graph.nodes if n.op.startswith("call_")]
    if calls and all(value_of(node) is None for node in calls):
        raise ValueError(
            "fuse_graph: graph_module must hold fake values in its nodes' meta, as torch.export's "
            "does, got a graph without"
        )
    rewrite(graph_module, eval_too=True)
    return graph_module


def rewrite(graph_module: GraphModule, *, eval_too: bool) -> None:
    """fuse_graph, also of the graphs within; without eval_too, of batch norms only those that
    train."""
    for module in graph_module.modules():
        if isinstance(module, GraphModule):
            for node in list(module.graph.nodes):
                found = _batch_norm(node)
                if found is not None and (eval_too or found.call.training):
                    _fuse(module.graph, found)
            fuse_norms(module.graph)
            module.recompile()


@dataclass
class _Found:
    """A batch norm in a graph, and what follows it."""

    call: Any  # a BatchNormCall of nodes and constants
    output: Node
    nodes: list[Node]  # what it consists of
    links: list[Node] = field(default_factory=list)  # an add, an activation, or both

    @property
    def end(self) -> Node:
        """Whose place and users the fused call takes."""
        return self.links[-1] if self.links else self.output


def _batch_norm(node: Node) -> _Found | None:
    if node.op != "call_function":
        return None
    if node.target in (_OP, torch.ops.gradfuse.batch_norm_act):
        return _own_op(node)
    names = _BATCH_NORMS.get(node.target)
    if names is None:
        return None
    given = arguments_of(node, names)
    call = _call_of(
        given["input"], None, given.get("weight"), given.get("bias"),
        given["running_mean"], given["running_var"], given.get("training", False),
        given.get("momentum", 0.1), given.get("eps", 1e-5), Activation.NONE, 0.01, False,
    )  # fmt: skip
    return _Found(call, node, [node])


def _own_op(node: Node) -> _Found | None:
    """A batch norm of gradfuse's modules: the op, its results, and the writes of the statistics."""
    given = arguments_of(node, LIBRARY_NAMES)
    factor = given.pop("factor")
    call = _call_of(**given)
    if call.activation != Activation.NONE or factor is not None:
        return None
    output, rest = None, []
    for item in node.users:
        if item.target is not operator.getitem:
            return None
        if item.args[1] == 0:
            output = item
            continue
        if any(not _writes_from(user, item) for user in item.users):
            return None
        rest += [item, *item.users]
    return None if output is None else _Found(call, output, [node, output, *rest])


def _writes_from(node: Node, source: Node) -> bool:
    targets = ("copy_", torch.ops.aten.copy_.default)
    return node.target in targets and not node.users and node.args[1:] == (source,)


def _fuse(graph: Graph, found: _Found) -> None:
    """Puts one call in the place of as many nodes as the program's meaning allows."""
    candidates = list(_extended(graph, found))
    for candidate in reversed(candidates):
        if candidate.output.target is operator.getitem and not candidate.links:
            return  # it is a call of the op already
        value = _fake_value(candidate)
        if value is not None and _may_move(graph, candidate):
            _replace(graph, candidate, value)
            return


def _extended(graph: Graph, found: _Found) -> Iterator[_Found]:
    """The batch norm alone, with an add, and with an activation after that."""
    yield found
    order = {node: i for i, node in enumerate(graph.nodes)}
    while found.end.users and found.call.activation == Activation.NONE:
        value = found.end
        user = min(value.users, key=lambda n: order[n])
        call = _taken_on(found.call, value, user)
        if call is None:
            return
        found = _Found(call, found.output, found.nodes, [*found.links, user])
        if _others_see_the_end(found):
            yield found


def _taken_on(call: Any, value: Node, user: Node) -> Any:
    """The call that computes what the user makes of the value; None if there is none."""
    addends = addends_of(user)
    if addends is not None and call.residual is None:
        a, b = addends
        if a is b or (value is b and a in (written_by(user) or ())):
            return None
        return call._replace(residual=b if value is a else a)
    applied = activation_of(user)
    if applied is None:
        return None
    code = applied.activation
    return call._replace(
        activation=code,
        negative_slope=applied.negative_slope,
        # torch's keep their input, so that a later op may write to their output.
        wants_mask=code in (Activation.RELU6, Activation.LEAKY_RELU),
    )


def _others_see_the_end(found: _Found) -> bool:
    """Whether all other users of what is replaced come after writes that leave the end there."""
    values = [found.output, *found.links[:-1]]
    in_place = [v in (written_by(link) or ()) for v, link in zip(values, found.links, strict=True)]
    return all(len(v.users) == 1 or all(in_place[i:]) for i, v in enumerate(values))


def _may_move(graph: Graph, found: _Found) -> bool:
    """Whether the batch norm may be computed where its last link is."""
    call = found.call
    statistics = [n for n in (getattr(call, name) for name in UPDATED) if n is not None]
    updated = storages(statistics) if call.training else set()
    read = storages(tensors_in(call))
    if updated is None or read is None:
        return False
    own = {*found.nodes, *found.links}
    node = found.nodes[0]
    while node is not found.end:
        node = node.next
        if node in own:
            continue
        written = written_by(node)
        if written is None:
            return False
        changed, used = storages(written), storages(node.all_input_nodes)
        if changed is None or used is None or changed & read or used & updated:
            return False
    return True


def _fake_value(found: _Found) -> Any:
    """The fake results of the fused call; None where it would not give what the nodes give."""
    call, end = found.call, value_of(found.end)
    x, r = value_of(call.input), value_of(call.residual)
    tensors = [t for t in map(value_of, call[:6]) if t is not None]
    if not isinstance(end, Tensor) or not all(_is_supported(t, x) for t in tensors):
        return None
    if r is not None and (r.dtype != x.dtype or r.ndim > x.ndim):
        return None
    values = _call_of(*map(value_of, call))
    try:
        if r is not None:
            values = values._replace(residual=r.expand(x.shape))
        if not values.eps > 0.0 or isinstance(values.momentum, Tensor):
            return None
        with torch.no_grad():
            results = _OP(*library_arguments(values))
    except (RuntimeError, TypeError, ValueError):
        return None
    output = results[0]
    same = output.shape == end.shape and output.stride() == end.stride()
    return results if same and output.dtype == end.dtype else None


def _is_supported(value: Any, x: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype in _DTYPES
        and value.layout == torch.strided
        and value.device == x.device
        and value.device.type in ("cpu", "cuda")
    )


def _replace(graph: Graph, found: _Found, value: Any) -> None:
    call, end = found.call, found.end
    key = "example_value" if "example_value" in end.meta else "val"

    def add(target: Any, args: tuple[Any, ...], fake: Any) -> Node:
        node = graph.call_function(target, args)
        node.meta = {k: v for k, v in end.meta.items() if k != "tensor_meta"}
        node.meta[key] = fake
        return node

    with graph.inserting_before(end):
        shape = value[0].shape
        if call.residual is not None and value_of(call.residual).shape != shape:
            wide = add(torch.ops.aten.expand_as.default, (call.residual, call.input), value[0])
            call = call._replace(residual=wide)
        op = add(_OP, library_arguments(call), value)
        output = add(operator.getitem, (op, 0), value_of(end))
        if call.training:
            for at, name in enumerate(UPDATED, 3):
                statistics = getattr(call, name)
                if statistics is not None:
                    new = add(operator.getitem, (op, at), value[at])
                    fake = value_of(statistics)
                    add(torch.ops.aten.copy_.default, (statistics, new), fake)
    for node in (*reversed(found.links), *reversed(found.nodes)):
        if node.users:
            node.replace_all_uses_with(output)
        graph.erase_node(node)
