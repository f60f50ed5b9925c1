"""What reads what in one forward pass, recorded below autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from gradfuse.init.compound import PARTS_OF
from gradfuse.init.fans import Fans, conv_fans, matrix_fans
from gradfuse.init.watch import Figures, measured

__all__ = ["Node", "Recorder", "Use"]

# Ops with a weight: the places of its data and its weight, and of its bias or None.
MATRIX = {"mm": (0, 1, None), "addmm": (1, 2, 0), "bmm": (0, 1, None), "baddbmm": (1, 2, 0)}
CONVOLUTIONS = {"convolution", "convolution_overrideable"}
EMBEDDINGS = {"embedding", "_embedding_bag", "_embedding_bag_forward_only"}
NORMS = {
    "native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training", "_batch_norm_with_update", "batch_norm",
    "cudnn_batch_norm", "miopen_batch_norm", "_fused_rms_norm", "layer_norm", "rms_norm",
}  # fmt: skip
REDUCTIONS = {"mean", "sum", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm"}
POINTWISE = {"hardswish", "hardswish_", "log_sigmoid_forward"}  # these lack torch's tag
PARTS = {"split", "split_with_sizes", "chunk", "select", "slice", "unbind", "narrow"}
PASSING = {
    "_unsafe_view", "clone", "_to_copy", "native_dropout", "contiguous", "constant_pad_nd",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
    "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "roll",
    "upsample_nearest2d", "upsample_bilinear2d", "reflection_pad2d", "replication_pad2d", "copy_",
    "pixel_shuffle", "channel_shuffle", "index", "im2col", "col2im",
}  # fmt: skip
RANDOM = {"bernoulli", "bernoulli_", "rand", "randn", "rand_like", "randn_like"}


@dataclass
class Use:
    """One op that takes a weight."""

    slot: str  # path of the weight
    kind: str  # "matrix", "convolution" or "embedding"
    fans: Fans
    bias: str | None = None
    groups: int = 1


@dataclass(eq=False)
class Node:
    """One op's result.

    kind is "input" (a tensor from outside), "constant", "param" (made of parameters alone), or, for
    what depends on the input: "weight" (an op with a weight), "pointwise" (of one root), "pass"
    (the same values in another place), "part", "reduce", "norm", "join" (of several) or "other".
    """

    index: int
    kind: str
    name: str
    parents: list[Node] = field(default_factory=list)  # those that depend on the input
    children: list[Node] = field(default_factory=list)
    slot: str | None = None  # of kind "param"
    use: Use | None = None
    params: list[str] = field(default_factory=list)  # paths of a pointwise op's parameters
    root: Node | None = None  # what a pointwise result is a function of
    replay: Callable[[Mapping[Node, Tensor]], Tensor] | None = None
    figures: Figures | None = None
    floating: bool = True  # whether its values are floating-point numbers

    @property
    def base(self) -> Node:
        """The root, or the node itself."""
        return self.root or self

    def __hash__(self) -> int:
        return self.index


class Recorder(TorchDispatchMode):
    """Records the ops of the block as Nodes.

    Args:
        slots: path of each weight, by the tensor that the model's ops see.
        buffers: tensors of the model that are no parameters.
        measure: whether to keep rms and the like of each result.
    """

    def __init__(
        self, slots: Mapping[str, Tensor], buffers: Iterable[Tensor], measure: bool = False
    ) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.roles: dict[str, set[str]] = {}  # of each slot: "weight", "bias", "add", "mul", "norm"
        self.measure = measure
        self._of: Any = WeakTensorKeyDictionary()
        for path, tensor in slots.items():
            self._of[tensor] = self._new("param", "parameter", slot=path)
        for tensor in buffers:
            self._of[tensor] = self._new("constant", "buffer")

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        places: list[Node | None] = [self._seen(a) if isinstance(a, Tensor) else None for a in args]
        given = self._given(args, kwargs)
        recipe = tree_map(lambda a: self._of[a] if isinstance(a, Tensor) else a, (args, kwargs))
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in PARTS_OF:
            with self:
                parts = PARTS_OF[name](args)
            for whole, part in zip([out] if isinstance(out, Tensor) else out, parts, strict=False):
                self._of[whole] = self._of[part]
            return out
        self._record(func, name, places, given, recipe, args, out)
        return out

    def _new(self, kind: str, name: str, **fields: Any) -> Node:
        node = Node(len(self.nodes), kind, name, **fields)
        self.nodes.append(node)
        return node

    def _seen(self, tensor: Tensor) -> Node:
        found = self._of.get(tensor)
        if found is None:
            found = self._of[tensor] = self._new("input", "input")
            found.floating = tensor.is_floating_point() or tensor.is_complex()
        node: Node = found
        return node

    def _given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Node]:
        found: list[Node] = []

        def add(a: Any) -> None:
            if isinstance(a, Tensor):
                found.append(self._seen(a))

        tree_map(add, (args, dict(kwargs)))
        return found

    def _record(
        self,
        func: Any,
        name: str,
        places: list[Node | None],
        given: list[Node],
        recipe: Any,
        args: tuple[Any, ...],
        out: Any,
    ) -> None:
        outputs = out if isinstance(out, (tuple, list)) else [out]
        tensors = [o for o in outputs if isinstance(o, Tensor)]
        if not tensors:
            return
        data = [n for n in given if n.kind not in ("param", "constant")]
        params = [n for n in given if n.kind == "param"]
        if name in RANDOM or not given or (not data and not params):
            node = self._new("constant", name)
        elif not data and name not in EMBEDDINGS:
            node = self._new("param", name, slot=params[0].slot)
        else:
            node = self._result(func, name, places, data, params, recipe, args)
        if name in PARTS and len(tensors) > 1:
            for tensor in tensors:
                part = self._new("part", name, parents=data)
                self._link(part)
                self._of[tensor] = part
            return
        self._link(node)
        node.floating = tensors[0].is_floating_point() or tensors[0].is_complex()
        if self.measure and node.kind not in ("constant", "param", "input"):
            node.figures = measured(tensors[0], name)
        for tensor in tensors:
            self._of[tensor] = node

    def _link(self, node: Node) -> None:
        for parent in node.parents:
            parent.children.append(node)

    def _result(
        self,
        func: Any,
        name: str,
        places: list[Node | None],
        data: list[Node],
        params: list[Node],
        recipe: Any,
        args: tuple[Any, ...],
    ) -> Node:
        use = self._use(name, places, args)
        if use is not None:
            self._role(use.slot, "weight")
            if use.bias is not None:
                self._role(use.bias, "bias")
            return self._new("weight", name, parents=data, use=use)
        if name in NORMS:
            for param in params:
                self._role(param.slot, "norm")
            scale = [p.slot for p in params if p.slot is not None]
            return self._new("norm", name, parents=data[:1], params=scale)
        if name == "_prelu_kernel" and params:
            self._role(params[0].slot, "slope")
            slope = args[1].detach().mean()
            recipe = (recipe[0][0], 0.0 if slope.is_meta else float(slope)), {}
            return self._pointwise(torch.ops.aten.leaky_relu.default, "prelu", data, recipe)
        if torch.Tag.pointwise in func.tags or name in POINTWISE:
            for param in params:
                self._role(param.slot, "add" if name.startswith(("add", "sub")) else "mul")
            node = self._pointwise(func, name, data, recipe)
            node.params = [p.slot for p in params if p.slot is not None]
            return node
        same = data[0].base
        if name in PARTS:
            return self._new("part", name, parents=data)
        if name in REDUCTIONS:
            return self._new("reduce", name, parents=data[:1])
        if func.is_view or name in PASSING:
            passed = data[0]

            def replay(values: Mapping[Node, Tensor]) -> Tensor:
                return values[passed]

            return self._new("pass", name, parents=data[:1], root=same, replay=replay)
        if name in ("cat", "stack"):
            return self._new("join", name, parents=data)
        return self._new("other", name, parents=data)

    def _pointwise(self, func: Any, name: str, data: list[Node], recipe: Any) -> Node:
        roots = list(dict.fromkeys(n.base for n in data))
        if len(roots) == 1:
            return self._new(
                "pointwise", name, parents=data, root=roots[0], replay=_replay(func, data, recipe)
            )
        # x times a statistic of x is a norm, written by hand.
        for statistic in roots:
            if statistic.kind != "reduce":
                continue
            of = statistic.parents[0].base
            others = [r for r in roots if r is not statistic]
            if all(r is of or r is of.base for r in others):
                if name.startswith(("mul", "div")):
                    return self._new("norm", name, parents=data)
                return self._new("pass", name, parents=data, root=of, replay=itemgetter(of))
        return self._new("join", name, parents=data)

    def _use(self, name: str, places: list[Node | None], args: tuple[Any, ...]) -> Use | None:
        def param(i: int | None) -> str | None:
            node = places[i] if i is not None and i < len(places) else None
            return node.slot if node is not None and node.kind == "param" else None

        if name in MATRIX:
            left, right, bias = MATRIX[name]
            inputs, outputs = args[right].shape[-2], args[right].shape[-1]
            slot = param(right)
            if slot is None:
                outputs, inputs = args[left].shape[-2], args[left].shape[-1]
                slot = param(left)
            if slot is None:
                return None
            return Use(slot, "matrix", matrix_fans(inputs, outputs), param(bias))
        slot = param(1)
        if name == "linear" and slot is not None:
            outputs, inputs = args[1].shape
            return Use(slot, "matrix", matrix_fans(inputs, outputs), param(2))
        if name in CONVOLUTIONS and slot is not None:
            stride, transposed, groups = args[3], args[6], args[8]
            fans = conv_fans(args[1].shape, groups, transposed, stride)
            return Use(slot, "convolution", fans, param(2), groups)
        slot = param(0)
        if name in EMBEDDINGS and slot is not None:
            return Use(slot, "embedding", matrix_fans(1, args[0].shape[-1]))
        return None

    def _role(self, slot: str | None, role: str) -> None:
        if slot is not None:
            self.roles.setdefault(slot, set()).add(role)


def _replay(func: Any, data: list[Node], recipe: Any) -> Callable[[Mapping[Node, Tensor]], Tensor]:
    """The op again, on other values of the nodes it read. What a parameter or a constant of more
    than one element does to its first operand is left out: it differs from element to element."""
    args, kwargs = recipe
    nodes: list[Node] = []
    tree_map(lambda a: nodes.append(a) if isinstance(a, Node) else None, recipe)
    first = data[0]
    if any(n.kind == "param" or (n.kind == "constant" and n.figures is None) for n in nodes):
        return lambda values: values[first]

    def replay(values: Mapping[Node, Tensor]) -> Tensor:
        def value(a: Any) -> Any:
            return values[a].clone() if isinstance(a, Node) else a

        result: Any = func(*tree_map(value, args), **tree_map(value, kwargs))
        values_of: Tensor = result[0] if isinstance(result, tuple) else result
        return values_of

    return replay
