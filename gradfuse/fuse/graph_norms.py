"""Residual add, dropout and layer norm or RMS norm as one op in graphs of torch.compile and
torch.export.

An add that a norm takes becomes one call with it, in the norm's place, if nobody used the sum
before and nothing that the call reads was written in between. A dropout or a scale of each sample
goes with it if the add alone took it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from gradfuse._codes import RowNorm
from gradfuse._records import RowNormCall
from gradfuse.fuse.nodes import addends_of, arguments_of, storages, tensors_in, value_of, written_by

__all__ = ["fuse_norms"]

_aten = torch.ops.aten
_OPS = (torch.ops.gradfuse.row_norm, torch.ops.gradfuse.row_norm.default)
_OF_SUM = {
    RowNorm.LAYER_NORM: RowNorm.ADD_LAYER_NORM,
    RowNorm.RMS_NORM: RowNorm.ADD_RMS_NORM,
}
_NAMES = ("input", "normalized_shape", "weight", "bias", "eps")
_NAMES_OF_RMS = ("input", "normalized_shape", "weight", "eps")
_NORMS: dict[Any, tuple[RowNorm, tuple[str, ...]]] = {
    **dict.fromkeys((F.layer_norm, torch.layer_norm), (RowNorm.LAYER_NORM, _NAMES)),
    _aten.layer_norm.default: (RowNorm.LAYER_NORM, _NAMES),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), (RowNorm.RMS_NORM, _NAMES_OF_RMS)),
    _aten.rms_norm.default: (RowNorm.RMS_NORM, _NAMES_OF_RMS),
}
_DROPOUTS = {
    F.dropout: ("input", "p", "training", "inplace"),
    torch.dropout: ("input", "p", "train"),
    _aten.dropout.default: ("input", "p", "train"),
}
_PRODUCTS = (operator.mul, torch.mul, _aten.mul.Tensor)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_call_of: Any = RowNormCall  # whose fields are nodes here


def fuse_norms(graph: Graph) -> None:
    """Puts one call in the place of each add and norm, where the program's meaning allows it."""
    for node in list(graph.nodes):
        found = _norm(node)
        if found is not None:
            _fuse(graph, found)


class _Norm(NamedTuple):
    call: Any  # a RowNormCall of nodes and constants
    output: Node
    nodes: list[Node]  # what it consists of


def _norm(node: Node) -> _Norm | None:
    """A norm of one tensor, by gradfuse's op or torch's."""
    if node.op != "call_function":
        return None
    if node.target in _OPS:
        call = _call_of(**arguments_of(node, RowNormCall._fields))
        users = list(node.users)
        is_alone = call.residual is None and call.seed is None and call.sample_scale is None
        if call.op not in _OF_SUM or not is_alone or call.keeps_sum or len(users) != 1:
            return None
        if users[0].target is not operator.getitem or users[0].args[1] != 0:
            return None
        return _Norm(call, users[0], [node, users[0]])
    if node.target not in _NORMS:
        return None
    op, names = _NORMS[node.target]
    given = arguments_of(node, names)
    x = value_of(given.get("input"))
    if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
        return None
    eps = given.get("eps", 1e-5 if op == RowNorm.LAYER_NORM else None)
    call = _call_of(
        op, given["input"], None, given.get("weight"), given.get("bias"), None, None,
        given["normalized_shape"], 0.0, torch.finfo(x.dtype).eps if eps is None else eps, 0.0,
        x.dtype, False,
    )  # fmt: skip
    return _Norm(call, node, [node])


class _Addend(NamedTuple):
    """What is added to a residual: sample_scale * dropout(input)."""

    input: Node
    p: Any = 0.0
    draw: Node | None = None  # a dropout of torch's, in whose place the seed is drawn
    seed: Any = None
    sample_scale: Any = None
    nodes: tuple[Node, ...] = ()  # that are used by the add alone


def _fuse(graph: Graph, norm: _Norm) -> None:
    total = norm.call.input
    addends = addends_of(total) if isinstance(total, Node) else None
    if addends is None or written_by(total) != []:
        return
    for found, residual in _choices(*addends):
        if _try(graph, norm, total, found, residual):
            return


def _choices(a: Node, b: Node) -> Iterator[tuple[_Addend, Node]]:
    """The addends as dropout and residual; the plain sum last."""
    for x, residual in ((b, a), (a, b)):
        found = _addend(x)
        if found.nodes and residual is not x:
            yield found, residual
    yield _Addend(b), a


def _addend(node: Node) -> _Addend:
    """What the node is the dropout or dropped path of, as far as nobody else uses that."""
    found = _Addend(node)
    while len(found.input.users) == 1:
        taken = _dropped_path(found) or _dropout(found)
        if taken is None:
            break
        found = taken
    return found


def _dropped_path(found: _Addend) -> _Addend | None:
    node = found.input
    if node.target not in _PRODUCTS or found.nodes:
        return None
    for x, scale in (node.args[:2], node.args[1::-1]):
        of_x, of_scale = value_of(x), value_of(scale)
        if not isinstance(x, Node) or not isinstance(of_x, Tensor) or of_x.ndim < 2:
            continue
        shape = [*of_x.shape[:1], *[1] * (of_x.ndim - 1)]
        if (
            isinstance(of_scale, Tensor)
            and list(of_scale.shape) == shape
            and _is_drawn(scale, node)
        ):
            return _Addend(x, sample_scale=scale, nodes=(node,))
    return None


def _is_drawn(scale: Any, until: Node) -> bool:
    """Whether a tensor is random and nothing else, so that it has no gradient, which fake values do
    not always tell."""
    chain = []
    node = scale
    while isinstance(node, Node):
        chain.append(node)
        target = node.target
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        name = name.partition(".")[0].strip("_")
        rest = tensors_in((node.args[1:], node.kwargs))
        if rest or name not in ("bernoulli", "div", "truediv", "itruediv", "to", "reshape", "view"):
            return False
        if name == "bernoulli":
            return _is_written_by(chain, until)
        node = node.args[0] if node.args else None
    return False


def _is_written_by(chain: list[Node], until: Node) -> bool:
    """Whether nobody else writes to the nodes' memory before the last one is read."""
    own = storages(chain)
    node = chain[-1]
    while own is not None and node is not until:
        written = written_by(node)
        changed = None if written is None else storages(written)
        if node not in chain and (changed is None or changed & own):
            return False
        node = node.next
    return own is not None


def _dropout(found: _Addend) -> _Addend | None:
    node = found.input
    if found.seed is not None or found.draw is not None:
        return None
    op: Any = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(op, Node) and op.target in _OPS:
        call = _call_of(**arguments_of(op, RowNormCall._fields))
        is_dropout = call.op == RowNorm.DROPOUT_ADD and call.residual is None
        if not is_dropout or call.sample_scale is not None or len(op.users) != 1:
            return None
        return found._replace(
            input=call.input, p=call.p, seed=call.seed, nodes=(*found.nodes, node, op)
        )
    if node.target not in _DROPOUTS:
        return None
    given = arguments_of(node, _DROPOUTS[node.target])
    p, training = given.get("p", 0.5), given.get("training", given.get("train", True))
    if given.get("inplace") or training is not True or not isinstance(p, float):
        return None
    draw = node if p > 0.0 else None
    return found._replace(input=given["input"], p=p, draw=draw, nodes=(*found.nodes, node))


def _try(graph: Graph, norm: _Norm, total: Node, found: _Addend, residual: Node) -> bool:
    call = norm.call._replace(
        op=_OF_SUM[norm.call.op], input=found.input, residual=residual, p=found.p, seed=found.seed,
        sample_scale=found.sample_scale, keeps_sum=True,
    )  # fmt: skip
    values = _fake_values(call, norm, total, found)
    if values is None or not _may_move(norm, total, found, residual):
        return False
    _replace(graph, norm, total, found, call, values)
    return True


def _fake_values(call: Any, norm: _Norm, total: Node, found: _Addend) -> Any:
    """The fake results of the fused call; None where it would not give what the nodes give."""
    values = _call_of(*(value_of(v) for v in call[:7]), *call[7:])
    x, r = values.input, values.residual
    tensors = [t for t in values[1:6] if t is not None]
    if not all(isinstance(t, Tensor) and t.dtype in _DTYPES for t in tensors):
        return None
    if x.device.type not in ("cpu", "cuda") or any(t.device != x.device for t in tensors):
        return None
    if x.dtype != r.dtype or x.shape != r.shape:
        return None
    if found.draw is not None:
        values = values._replace(seed=x.new_empty(2, dtype=torch.int64))
    if values.sample_scale is not None:
        values = values._replace(sample_scale=values.sample_scale.reshape(-1))
    try:
        with torch.no_grad():
            results = torch.ops.gradfuse.row_norm(*values)
    except (RuntimeError, TypeError, ValueError):
        return None
    pairs = ((results[0], value_of(norm.output)), (results[1], value_of(total)))
    same = all(
        isinstance(old, Tensor)
        and new.dtype == old.dtype
        and new.shape == old.shape
        and new.stride() == old.stride()
        for new, old in pairs
    )
    return results if same else None


def _may_move(norm: _Norm, total: Node, found: _Addend, residual: Node) -> bool:
    """Whether all from the first node on may be computed where the norm is."""
    chain = (total, *found.nodes)
    read_by: dict[Node, list[Any]] = {node: [] for node in chain}
    read_by[total].append(residual)
    read_by[chain[-1]] += [found.input, found.seed]
    if found.sample_scale is not None:
        read_by[found.nodes[0]].append(found.sample_scale)
    read = storages([total])  # and of what was read so far
    node = chain[-1]
    while node is not norm.output:
        if total in node.all_input_nodes and node not in norm.nodes:
            return False
        if node in read_by:
            more = storages(tensors_in(read_by[node]))
            if read is None or more is None:
                return False
            read |= more
        elif node not in norm.nodes:
            written = written_by(node)
            changed = None if written is None else storages(written)
            if read is None or changed is None or changed & read:
                return False
        node = node.next
    return True


def _replace(
    graph: Graph, norm: _Norm, total: Node, found: _Addend, call: Any, values: Sequence[Any]
) -> None:
    end = norm.output
    key = "example_value" if "example_value" in end.meta else "val"

    def add(target: Callable[..., Any], args: tuple[Any, ...], fake: Any, **kwargs: Any) -> Node:
        node = graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in end.meta.items() if k != "tensor_meta"}
        node.meta[key] = fake
        return node

    if found.draw is not None:
        x = value_of(found.input)
        with graph.inserting_before(found.draw):
            drawn = add(
                _aten.randint.low, (0, 2**63 - 1, [2]), x.new_empty(2, dtype=torch.int64),
                device=x.device,
            )  # fmt: skip
        call = call._replace(seed=drawn)
    with graph.inserting_before(norm.nodes[0]):
        if found.sample_scale is not None:
            scale = value_of(found.sample_scale).reshape(-1)
            flat = add(_aten.reshape.default, (found.sample_scale, [-1]), scale)
            call = call._replace(sample_scale=flat)
        op = add(torch.ops.gradfuse.row_norm.default, tuple(call), values)
        output = add(operator.getitem, (op, 0), value_of(end))
        kept = add(operator.getitem, (op, 1), value_of(total))
    end.replace_all_uses_with(output)
    total.replace_all_uses_with(kept, delete_user_cb=lambda user: user not in norm.nodes)
    for node in (*reversed(norm.nodes), total, *found.nodes):
        graph.erase_node(node)
