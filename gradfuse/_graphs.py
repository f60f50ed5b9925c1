"""Graphs of modules, and the batch norms in them: what `fuse` and `unfuse` are made of.

A module that holds a batch norm is traced with torch.fx down to the modules that hold none, so that
these keep their classes, their training flags and their randomness. A forward that a graph cannot
stand for is not traced: one that asks for the type or the truth of a value, draws random numbers,
checkpoints a part, or comes out otherwise in eval mode or without an optional argument. Where a
block fails so, it stays a module in its caller's graph.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import math
import operator
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Proxy, Tracer
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from gradfuse.nn.batch_norm import _BatchNormAct

__all__ = ["Match", "activation_of", "clone", "copied", "match", "refusal", "trace", "with_graph"]

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_KEPT = (
    "train",
    "state_dict",
    "load_state_dict",
    "_load_from_state_dict",
    "_save_to_state_dict",
    "get_extra_state",
    "set_extra_state",
    "_apply",
    "__call__",
)
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ACT_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}
_ACT_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.silu: "silu",
    F.gelu: "gelu",
    F.hardswish: "hardswish",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    torch.tanh_: "tanh",
}
_ACT_METHODS = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "sigmoid_": "sigmoid"} | {
    "tanh": "tanh",
    "tanh_": "tanh",
}
_ADDS = (operator.add, operator.iadd, torch.add)
_NO_TENSOR = ("size", "dim", "numel", "stride", "item", "type")

Activation = tuple[str, float]  # name, negative slope


def clone(model: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    """The module tree anew, with the very same parameters and buffers."""
    if id(model) in memo:
        return memo[id(model)]
    new = type(model).__new__(type(model))
    new.__dict__.update(model.__dict__)
    for name in ("_parameters", "_buffers", "_modules", *_HOOKS):
        new.__dict__[name] = type(model.__dict__[name])(model.__dict__[name])
    for name, value in model.__dict__.items():
        if isinstance(value, MethodType) and value.__self__ is model:
            new.__dict__[name] = MethodType(value.__func__, new)
    memo[id(model)] = new
    for name, child in model._modules.items():
        new._modules[name] = None if child is None else clone(child, memo)
    return new


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module is more than its class's forward."""
    own = any(getattr(module, name) for name in _HOOKS) or "forward" in module.__dict__
    return own or parametrize.is_parametrized(module)


def is_container(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward


def is_chain_of_blocks(module: nn.Module) -> bool:
    """Whether it is a sequence with no batch norm or activation of its own to fuse."""
    return type(module) is nn.Sequential and not any(
        isinstance(m, _BatchNorm) or activation_of_module(m) for m in module
    )


def own_methods(module: nn.Module) -> str:
    """The first of nn.Module's methods that the class overrides and a graph would lose, or ""."""
    for name in _KEPT:
        if getattr(type(module), name) is not getattr(nn.Module, name):
            return name
    return ""


def timm_activation(bn: nn.Module) -> Activation | None:
    """The activation of timm's BatchNormAct2d, which is a batch norm with one; else None."""
    if type(bn).__name__ != "BatchNormAct2d" or type(bn).__module__ != "timm.layers.norm_act":
        return None
    drop, act = getattr(bn, "drop", None), getattr(bn, "act", None)
    if type(drop) is not nn.Identity or act is None or hooked(act) or hooked(drop):
        return None
    return ("", 0.0) if type(act) is nn.Identity else activation_of_module(act)


def refusal(bn: nn.Module) -> str:
    """Why a batch norm cannot be replaced, whatever is around it; "" if it can."""
    if type(bn) not in _PLAIN and timm_activation(bn) is None:
        return f"{type(bn).__module__}.{type(bn).__name__} is not a batch norm known here"
    if "forward" in bn.__dict__:
        return "its forward was set on the instance"
    if hooked(bn):
        return "it has hooks or parametrizations"
    return ""


def activation_of_module(module: nn.Module) -> Activation | None:
    name = _ACT_MODULES.get(type(module))
    if name is None or hooked(module):
        return None
    if isinstance(module, nn.LeakyReLU):
        return name, float(module.negative_slope)
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        return "gelu_tanh", 0.0
    return name, 0.0


def activation_of(node: Node, root: nn.Module) -> Activation | None:
    """The activation that a node applies to its first argument, if it is one."""
    if node.op == "call_module":
        if len(node.args) != 1 or node.kwargs:
            return None
        return activation_of_module(root.get_submodule(str(node.target)))
    if node.op == "call_method":
        name = _ACT_METHODS.get(str(node.target))
        return (name, 0.0) if name and len(node.args) == 1 and not node.kwargs else None
    name = _ACT_FUNCTIONS.get(node.target) if node.op == "call_function" else None
    if name is None or not node.args:
        return None
    rest = dict(node.kwargs)
    rest.pop("inplace", None)
    arguments = list(node.args[1:])
    if name == "leaky_relu":
        slope = arguments.pop(0) if arguments else rest.pop("negative_slope", 0.01)
        if not isinstance(slope, (int, float)):
            return None
        if len(arguments) == 1 and isinstance(arguments[0], bool):
            arguments.pop()  # inplace
        return None if arguments or rest else (name, float(slope))
    if name == "gelu":
        form = rest.pop("approximate", "none")
        if form not in ("none", "tanh") or arguments or rest:
            return None
        return ("gelu_tanh" if form == "tanh" else "gelu"), 0.0
    if len(arguments) == 1 and isinstance(arguments[0], bool):
        arguments.pop()
    return None if arguments or rest else (name, 0.0)


class _Untraceable(Exception):
    pass


class _MoreLeaves(Exception):
    """A trace added to its leaves: those before it are out of date, and it is of no use."""


_DRAWS = "the forward draws random numbers, which a graph would keep"
_VARIANTS = 16


class _WatchfulProxy(Proxy):
    """A proxy whose type nobody but torch may ask for: the answer would be baked in."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == "torch" or caller == __name__:
            return _WatchfulProxy
        raise _Untraceable("the forward asks for the type of a value")


def _in_place(target: Callable[..., Any]) -> Callable[[Proxy, Any], Proxy]:
    def method(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


# torch.fx records `a += b` as `a = a + b`, which is not the same to other names of a.
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
    setattr(_WatchfulProxy, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))
for _name in ("and", "or", "xor", "lshift", "rshift"):
    setattr(_WatchfulProxy, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


def _modes() -> tuple[bool, ...]:
    """What a `with` sets for the ops in it; a graph does not record it."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def _generators() -> list[Any]:
    """The states of the global random generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [random.getstate(), np.random.get_state(), torch.get_rng_state(), *cuda]


def _set_generators(states: list[Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3:]:
        torch.cuda.set_rng_state_all(states[3:])


def _drawn(before: list[Any]) -> bool:
    def raw(states: list[Any]) -> list[Any]:
        numpy = [part.tobytes() if isinstance(part, np.ndarray) else part for part in states[1]]
        return [states[0], numpy, *(s.numpy().tobytes() for s in states[2:])]

    return raw(_generators()) != raw(before)


def _checkpoints() -> bool:
    """Whether the code that runs is within torch.utils.checkpoint."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not trace.__code__:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class _BlockTracer(Tracer):
    """Traces down to modules without a batch norm and to `leaves`.

    `given` are values for placeholders, by name. A block that cannot be traced is added to
    `leaves`, for a new trace.
    """

    def __init__(self, holders: set[int], leaves: set[int], given: dict[str, Any]) -> None:
        super().__init__()
        self._holders = holders
        self._leaves = leaves
        self._given = given
        self._modes = _modes()

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        function, values = super().create_args_for_root(*args, **kwargs)
        for i, value in enumerate(values):
            if isinstance(value, Proxy) and value.node.target in self._given:
                values[i] = self._given[str(value.node.target)]
        return function, values

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        if _checkpoints():
            raise _Untraceable("the forward checkpoints a part, which a graph would lose")
        if _modes() != self._modes:
            raise _Untraceable("the forward changes the mode of autograd or autocast")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        is_block = id(m) in self._holders and not isinstance(m, _BatchNorm)
        stays = hooked(m) or own_methods(m) != "" or id(m) in self._leaves
        return not is_block or stays

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        states, depth = _generators(), len(self.module_stack)
        try:
            result = super().call_module(m, forward, args, kwargs)
            if _drawn(states):
                raise _Untraceable(_DRAWS)
            return result
        except Exception:
            path = self.path_of_module(m)
            if self.is_leaf_module(m, path):
                raise
            _set_generators(states)
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            self._leaves.add(id(m))
            return self.create_proxy("call_module", path, args, kwargs)

    def proxy(self, node: Node) -> Proxy:
        return _WatchfulProxy(node, self)


class _CodeTracer(Tracer):
    def proxy(self, node: Node) -> Proxy:
        return _WatchfulProxy(node, self)


def _flags(module: nn.Module) -> dict[nn.Module, bool]:
    return {m: m.training for m in module.modules()}


def _alternatives(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What arguments of the forward may be that a proxy is not, by placeholder.

    A proxy `is not None`, whatever it stands for; it is neither `True` nor `False`, and as
    `**kwargs` it is never empty.
    """
    found: dict[str, tuple[Any, ...]] = {}
    signature = inspect.signature(inspect.unwrap(type(module).forward))
    for i, parameter in enumerate(list(signature.parameters.values())[1:]):
        if parameter.kind is parameter.VAR_POSITIONAL:
            found[f"*{parameter.name}"] = ((),)
        elif parameter.kind is parameter.VAR_KEYWORD:
            found[f"**{parameter.name}"] = ({},)
        elif isinstance(parameter.default, bool):
            found[parameter.name] = (True, False)
        elif i > 0 or parameter.default is not parameter.empty:
            found[parameter.name] = (None,)
    return found


def _of_none(error: Exception) -> bool:
    """Whether a value was None where it must not be, in the module's own code too."""
    if isinstance(error, AttributeError):
        return error.obj is None
    return isinstance(error, TypeError) and "NoneType" in str(error)


def _with_values(graph: Graph, given: dict[str, Any]) -> str:
    """The graph as text, with these values in place of its placeholders."""

    def value(node: Node) -> Any:
        is_given = node.op == "placeholder" and node.target in given
        return given[str(node.target)] if is_given else node

    graph = copied(graph)
    for node in graph.nodes:
        node.args = map_arg(node.args, value)
        node.kwargs = map_arg(node.kwargs, value)
    return str(graph)


def _agreed_graph(module: nn.Module, holders: set[int], leaves: set[int]) -> Graph:
    """The graph, if it holds in both modes and for all arguments."""
    states, modules, known = _generators(), list(module.modules()), len(leaves)

    def traced(training: bool, given: dict[str, Any]) -> Graph:
        for m in modules:
            m.training = training
        try:
            with warnings.catch_warnings():  # of torch.utils.checkpoint, about proxies
                warnings.simplefilter("ignore")
                graph = _BlockTracer(holders, leaves, given).trace(module)
            if _drawn(states):
                raise _Untraceable(_DRAWS)
            if len(leaves) > known:
                raise _MoreLeaves
            return graph
        finally:
            _set_generators(states)

    graphs = {mode: traced(mode, {}) for mode in (True, False)}
    if str(graphs[True]) != str(graphs[False]):
        raise _Untraceable("its forward differs between training and eval mode")
    choices = [[(name, v) for v in (..., *vs)] for name, vs in _alternatives(module).items()]
    if math.prod(map(len, choices)) > _VARIANTS:
        raise _Untraceable("its forward has too many arguments that may be None")
    for chosen in itertools.product(*choices):
        given = {name: value for name, value in chosen if value is not ...}
        for mode, graph in graphs.items() if given else ():
            try:
                other = traced(mode, given)
            except Exception as error:
                if _of_none(error):
                    continue
                raise
            if str(other) != _with_values(graph, given):
                names = " and ".join(name.lstrip("*") for name in given)
                raise _Untraceable(f"its forward depends on whether {names} is given")
    return graphs[True]


def trace(module: nn.Module, holders: set[int]) -> tuple[Graph | None, str]:
    """(graph, "") of the forward down to the modules not in `holders`, or (None, why not).

    `holders` are the ids of the modules that hold a batch norm.
    """
    own = "" if isinstance(module, GraphModule) else own_methods(module)
    if own:
        return None, f"its class overrides nn.Module.{own}"
    if "forward" in module.__dict__:
        return None, "its forward was set on the instance"
    before = _flags(module)
    leaves: set[int] = set()
    try:
        while True:
            with contextlib.suppress(_MoreLeaves):
                return _agreed_graph(module, holders, leaves), ""
    except _Untraceable as error:
        return None, str(error)
    except Exception as error:  # whatever a forward does with a value that is none
        return (
            None,
            f"torch.fx cannot trace it ({str(error).splitlines()[0] if str(error) else ''})",
        )
    finally:
        for m, mode in before.items():
            m.training = mode


def _refuse_call(module: nn.Module, args: Any) -> None:
    raise RuntimeError(
        f"{type(module).__name__}: expected a call of the fused model as a whole, got one of this "
        "part, whose forward is now in the model's graph; fuse the part by itself, or unfuse"
    )


def merge(module: nn.Module) -> None:
    """Marks a module whose forward has become a part of its caller's: by itself it is wrong."""
    if not is_merged(module):
        module.register_forward_pre_hook(_refuse_call)


def is_merged(module: nn.Module) -> bool:
    return _refuse_call in module._forward_pre_hooks.values()


def unmerge(module: nn.Module) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _refuse_call:
            del module._forward_pre_hooks[key]


class FusedGraph(GraphModule):
    """A GraphModule that keeps all its attributes and children when it is copied or pickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedGraph:
        graph = copied(self.graph)
        new = _assemble(copy.deepcopy(_state(self), memo), graph, type(self).__name__)
        memo[id(self)] = new
        return new

    def __reduce__(self) -> Any:
        return _rebuild, (super().__reduce__(), _state(self), type(self).__name__)


def copied(graph: Graph) -> Graph:
    new = Graph()
    new.output(new.graph_copy(graph, {}))
    return new


def _state(module: nn.Module) -> dict[str, Any]:
    """All that a module holds but what makes it a GraphModule."""
    graph = GraphModule(nn.Module(), Graph()).__dict__.keys() - nn.Module().__dict__.keys()
    return {k: v for k, v in module.__dict__.items() if k not in graph}


def _assemble(state: dict[str, Any], graph: Graph, name: str) -> FusedGraph:
    holder = nn.Module()
    holder.__dict__.update(state)
    graph.lint()
    graph._tracer_cls = _CodeTracer  # for pickling, which traces the generated code again
    result = FusedGraph(holder, graph, name)
    result.__dict__.update(state)
    return result


def _rebuild(reduced: tuple[Callable[..., GraphModule], Any], state: Any, name: str) -> FusedGraph:
    function, arguments = reduced[:2]
    return _assemble(state, function(*arguments).graph, name)


def with_graph(module: nn.Module, graph: Graph) -> FusedGraph:
    """The module with the graph as its forward; its children, parameters and attributes stay."""
    return _assemble(_state(module), graph, type(module).__name__)


class Match:
    """A batch norm call in a graph, and what of its surroundings goes into it."""

    def __init__(self, bn: Node) -> None:
        self.bn = bn
        self.add: Node | None = None
        self.residual: Node | None = None
        self.act: Node | None = None
        self.activation: Activation | None = None
        self.reason = ""  # why no more of the surroundings

    @property
    def last(self) -> Node:
        return self.act or self.add or self.bn

    @property
    def pattern(self) -> str:
        act = self.activation[0] if self.activation else None
        return "+".join(["bn", *(["add"] if self.add else []), *([act] if act else [])])


_IN_PLACE = {getattr(operator, name) for name in dir(operator) if name[:1] == "i"} - {
    operator.index,
    operator.inv,
    operator.invert,
    operator.is_,
    operator.is_not,
    operator.indexOf,
    operator.itemgetter,
}


def _written(node: Node, root: nn.Module) -> Node | None:
    """The node whose value a node overwrites, if any."""
    first = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if node.op == "call_module":
        inplace = getattr(root.get_submodule(str(node.target)), "inplace", False)
        return first if inplace else None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    writes = (
        (name.endswith("_") and not name.endswith("__"))
        or node.target in _IN_PLACE
        or node.target is operator.setitem
        or bool(node.kwargs.get("inplace"))
        or "out" in node.kwargs
        or any(a is True for a in node.args[1:])  # F.relu(x, True)
    )
    return first if writes else None


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _is_tensor(node: Any) -> bool:
    """Whether an operand may be a tensor, as far as the graph tells."""
    if not isinstance(node, Node):
        return False
    if node.op == "call_method" and node.target in _NO_TENSOR:
        return False
    if node.op == "call_function" and node.target in (getattr, len):
        return False
    if node.op == "call_function" and node.target is operator.getitem:
        return _is_tensor(node.args[0])
    if node.op == "call_function" and node.target in vars(operator).values():
        return any(_is_tensor(a) for a in node.args)
    return True


def _between(first: Node, last: Node) -> Iterator[Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _overwritten(first: Node, last: Node, root: nn.Module) -> bool:
    """Whether a value that is older than `first` may be written to between the two."""
    made: set[Node] = set()
    for node in _between(first, last):
        written = _written(node, root)
        if written is not None and written not in made:
            return True
        if written is None and node.op != "call_method":  # a method's result may be a view
            made.add(node)
    return False


def _match_add(found: Match, root: nn.Module) -> None:
    node = _only_user(found.bn)
    if node is None:
        return
    is_method = node.op == "call_method" and node.target in ("add", "add_")
    if not is_method and not (node.op == "call_function" and node.target in _ADDS):
        return
    operands = list(node.args)
    if len(operands) != 2 or any(k != "alpha" or v != 1 for k, v in node.kwargs.items()):
        found.reason = "the add is scaled or has other arguments"
        return
    others = [a for a in operands if a is not found.bn]
    if len(others) != 1 or not _is_tensor(others[0]):
        found.reason = "what is added is no other tensor"
        return
    in_place = node.target in ("add_", operator.iadd)
    if in_place and operands[0] is not found.bn:
        found.reason = "the add writes to the tensor that the batch norm is added to"
        return
    if _overwritten(found.bn, node, root):
        found.reason = "values are overwritten between the batch norm and the add"
        return
    assert isinstance(others[0], Node)
    found.add, found.residual = node, others[0]


def match(bn: Node, root: nn.Module) -> Match:
    """What can be fused into the call of a batch norm."""
    found = Match(bn)
    own = timm_activation(root.get_submodule(str(bn.target)))
    if own is not None:
        found.activation = own if own[0] else None
        return found
    if len(bn.users) > 1:
        found.reason = "its output is used more than once"
        return found
    _match_add(found, root)
    act = _only_user(found.last)
    activation = None
    if act is not None and act.args and act.args[0] is found.last:
        activation = activation_of(act, root)
    if act is not None and activation is not None:
        if _overwritten(found.last, act, root):
            found.reason = "values are overwritten before the activation"
        else:
            found.act, found.activation = act, activation
    return found


def replace(graph: Graph, found: Match, target: str) -> None:
    """The matched nodes as one call of the module at `target`."""
    with graph.inserting_before(found.last):
        arguments = (found.bn.args[0], *([found.residual] if found.residual is not None else []))
        fused = graph.call_module(target, arguments)
    last = found.last
    last.replace_all_uses_with(fused)
    for node in (found.act, found.add, found.bn):
        if node is not None:
            graph.erase_node(node)


def add_if_given(value: Tensor, residual: Tensor | None) -> Tensor:
    return value if residual is None else value + residual


def expand(graph: Graph, node: Node, module: _BatchNormAct) -> None:
    """A call of a fused module as batch norm, add and activation."""
    arguments = dict(zip(("input", "residual"), node.args, strict=False)) | node.kwargs
    residual = arguments.get("residual")
    with graph.inserting_after(node):
        last = graph.call_module(str(node.target), (arguments["input"],))
    if residual is not None:
        optional = isinstance(residual, Node) and residual.op == "placeholder"
        with graph.inserting_after(last):
            function = add_if_given if optional else operator.add
            last = graph.call_function(function, (last, residual))
    if module.activation is not None:
        with graph.inserting_after(last):
            function, kwargs = plain_activation(module)
            last = graph.call_function(function, (last,), kwargs)
    node.replace_all_uses_with(last)
    graph.erase_node(node)


def plain_activation(module: _BatchNormAct) -> tuple[Callable[..., Any], dict[str, Any]]:
    if module.activation == "leaky_relu":
        return F.leaky_relu, {"negative_slope": module.negative_slope}
    if module.activation == "gelu_tanh":
        return F.gelu, {"approximate": "tanh"}
    if module.activation in ("sigmoid", "tanh"):
        return getattr(torch, module.activation), {}
    return getattr(F, str(module.activation)), {}
