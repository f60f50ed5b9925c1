"""Swaps gradfuse's batch norms into existing models, and out again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

from gradfuse import _graphs
from gradfuse.nn.batch_norm import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, _BatchNormAct

__all__ = ["FuseReport", "Site", "fuse", "unfuse"]


@dataclass(frozen=True)
class Site:
    """A batch norm of the model and what became of it.

    path: where it is; pattern: "bn", "bn+relu", "bn+add+relu", ...; fused: whether it was replaced;
    reason: why not, or why no more of its surroundings was.
    """

    path: str
    pattern: str
    fused: bool
    reason: str = ""


class FuseReport(list[Site]):
    """The sites in the order of the model's modules; a table when printed."""

    def __str__(self) -> str:
        rows = [("path", "pattern", "", "reason")]
        rows += [(s.path, s.pattern, "fused" if s.fused else "left", s.reason) for s in self]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows
        ]
        fused = sum(s.fused for s in self)
        return "\n".join([*lines, f"{fused} of {len(self)} batch norms fused"])


def _check_model(op: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}")
    wrapped = (
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        torch.jit.ScriptModule,
        torch._dynamo.OptimizedModule,
    )
    for path, module in model.named_modules():
        if isinstance(module, wrapped):
            raise ValueError(
                f"{op}: expected a model not yet wrapped, compiled or scripted, got "
                f"{type(module).__name__}{' at ' + path if path else ''}; {op} it before"
            )
        forward = module.__dict__.get("forward")
        if forward is not None and getattr(forward, "__self__", None) is not module:
            raise ValueError(
                f"{op}: expected forwards of their classes, or methods bound to their module, got "
                f"{type(forward).__name__} at {path + '.' if path else ''}forward, which may hold "
                f"on to the given model; set it after {op}"
            )


def _fused_class(bn: nn.Module) -> type[_BatchNormAct]:
    for plain, fused in (
        (nn.BatchNorm1d, BatchNormAct1d),
        (nn.BatchNorm2d, BatchNormAct2d),
    ):
        if isinstance(bn, plain):
            return fused
    return BatchNormAct3d


def _replace_module(root: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent)._modules[name] = new


class _Fuser:
    """Fuses a clone of the model, module by module from the top."""

    def __init__(self, root: nn.Module, wanted: type[nn.Module]) -> None:
        self.root = root
        self.sites: dict[str, Site] = {}
        paths = [p for p, _ in root.named_modules(remove_duplicate=False)]
        self.count = Counter(id(root.get_submodule(p)) for p in paths)
        self.holders = {
            id(m) for m in root.modules() if any(isinstance(c, wanted) for c in m.modules())
        }

    def refuse(self, path: str, reason: str) -> None:
        self.sites[path] = Site(path, "bn", False, reason)

    def visit(self, module: nn.Module, path: str, why: str = "") -> nn.Module:
        """What takes the module's place; `why` its caller was not traced."""
        if isinstance(module, _BatchNorm):
            return self.swap(module, path, why)
        if id(module) not in self.holders:
            return module
        # A module at two paths is two calls of one batch norm: its parts stay as they are.
        graph = None
        if self.count[id(module)] > 1:
            why = "they are shared by several paths"
        elif not (why and _graphs.is_chain_of_blocks(module)):  # which its caller may iterate
            graph, reason = _graphs.trace(module, self.holders)
            why = why if _graphs.is_container(module) else reason
        if graph is not None:
            return self.rewrite(module, graph, path)
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = self.visit(child, f"{path}.{name}" if path else name, why)
        return module

    def reason_against(self, bn: nn.Module) -> str:
        if isinstance(bn, _BatchNormAct):
            return "it is fused already"
        if self.count[id(bn)] > 1:
            return "it is shared by several paths"
        return _graphs.refusal(bn)

    def swap(self, bn: nn.Module, path: str, why: str) -> nn.Module:
        """A batch norm whose surroundings are not known: by itself."""
        reason = self.reason_against(bn)
        if reason:
            self.refuse(path, reason)
            return bn
        assert isinstance(bn, _BatchNorm)
        own = _graphs.timm_activation(bn)
        name = own[0] if own and own[0] else None
        slope = own[1] if own else 0.01
        pattern = f"bn+{name}" if name else "bn"
        reason = "its surroundings could not be traced" + (f": {why}" if why else "")
        self.sites[path] = Site(path, pattern, True, reason)
        return _fused_class(bn).from_batch_norm(bn, name, slope)

    def rewrite(self, module: nn.Module, graph: Graph, path: str) -> nn.Module:
        """The module with the batch norms of its graph fused."""
        self.drop_identities(module, graph)
        calls = [
            n
            for n in graph.nodes
            if n.op == "call_module" and isinstance(module.get_submodule(str(n.target)), _BatchNorm)
        ]
        times = Counter(str(n.target) for n in calls)
        changed = False
        for node in calls:
            target = str(node.target)
            full = f"{path}.{target}" if path else target
            bn = module.get_submodule(target)
            reason = self.reason_against(bn)
            if not reason and times[target] > 1:
                reason = "it is called more than once"
            arguments = [*node.args, *node.kwargs.values()]
            if not reason and len(arguments) != 1:
                reason = "it is called with more than an input"
            if not reason:
                node.args, node.kwargs = tuple(arguments), {}
            found = None if reason else _graphs.match(node, module)
            if found and len(node.users) > 1 and not found.activation:
                reason = found.reason
            if reason or found is None:
                self.refuse(full, reason)
                continue
            assert isinstance(bn, _BatchNorm)
            name, slope = found.activation or (None, 0.01)
            fused = _fused_class(bn).from_batch_norm(bn, name, slope)
            _replace_module(module, target, fused)
            if found.last is not node:
                parts = target.split(".")
                for i in range(1, len(parts)):
                    _graphs.merge(module.get_submodule(".".join(parts[:i])))
            pattern, why = found.pattern, found.reason
            _graphs.replace(graph, found, target)
            self.sites[full] = Site(full, pattern, True, why)
            changed = True
        if changed:
            module = _graphs.with_graph(module, graph)
        # Calls of blocks that stay modules, for their hooks or methods.
        for target in {str(n.target): None for n in graph.nodes if n.op == "call_module"}:
            called = module.get_submodule(target)
            if id(called) in self.holders and not isinstance(called, _BatchNorm):
                full = f"{path}.{target}" if path else target
                _replace_module(module, target, self.visit(called, full))
        for target, child in list(module.named_modules()):  # those the forward does not call
            full = f"{path}.{target}" if path else target
            if isinstance(child, _BatchNorm) and full not in self.sites:
                self.refuse(full, "the forward does not call it")
        return module

    def drop_identities(self, module: nn.Module, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.op != "call_module" or len(node.args) != 1:
                continue
            called = module.get_submodule(str(node.target))
            if type(called) is nn.Identity and not _graphs.hooked(called):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)


def fuse(model: nn.Module) -> nn.Module:
    """The model with batch norm, residual add and activation fused wherever that is right.

    Finds BN -> add -> act, BN -> act, BN -> add and bare BN with torch.fx, on the whole model or on
    those of its modules that can be traced. What is fused becomes a gradfuse.nn.BatchNormAct at the
    batch norm's path. The given model is left as it is; the new one has the very same parameters
    and buffers, so that an optimizer made before still works, and the same state_dict keys and
    module paths. A module whose forward was traced is a torch.fx.GraphModule in the new model; its
    parts with a fused add or activation raise RuntimeError where they are called by themselves.

    Left alone, each with its reason in the report: a batch norm that is shared or called twice, one
    whose output is used twice, with hooks, parametrizations or a forward of its own, of an unknown
    subclass (SyncBatchNorm, quantised ones); an add that writes to another tensor or is scaled. A
    forward is not traced if it asks for values, draws random numbers, checkpoints a part, changes
    the mode of autograd or autocast, differs in eval mode or without an optional argument, or was
    set on the instance: its children are fused each by itself.

    Args:
        model: an nn.Module, in training or eval mode, before DistributedDataParallel or
            torch.compile.

    Returns:
        nn.Module whose attribute `report` is a FuseReport, a list of Site that prints as a table.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: model is wrapped, compiled or scripted, or has a forward set on an instance that
            is no method bound to it.
    """
    _check_model("fuse", model)
    fuser = _Fuser(_graphs.clone(model, {}), _BatchNorm)
    paths = [p for p, m in fuser.root.named_modules() if isinstance(m, _BatchNorm)]
    result = fuser.visit(fuser.root, "")
    result.report = FuseReport(fuser.sites[p] for p in paths if p in fuser.sites)  # type: ignore[assignment]
    return result


def unfuse(model: nn.Module) -> nn.Module:
    """The model with plain torch modules: the inverse of `fuse`.

    Every gradfuse.nn.BatchNormAct becomes torch's batch norm at the same path, with the very same
    parameters and buffers, and an add and an activation after it in its caller's graph. The given
    model is left as it is.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: as of `fuse`; or a fused module with an activation is called by a forward that
            torch.fx cannot trace.
    """
    _check_model("unfuse", model)
    root = _graphs.clone(model, {})
    root.__dict__.pop("report", None)
    return _unfuse_module(root, "", _Fuser(root, _BatchNormAct).holders)


def _unfuse_module(module: nn.Module, path: str, holders: set[int]) -> nn.Module:
    if isinstance(module, _BatchNormAct):
        if module.activation is not None:
            raise ValueError(
                "unfuse: expected callers that torch.fx can trace, got one that it cannot around "
                f"{path or 'the model'}"
            )
        return module.to_batch_norm()
    if id(module) not in holders:
        return module
    graph = None
    if isinstance(module, GraphModule):
        graph = module.graph
    elif not _graphs.is_chain_of_blocks(module):
        graph, _ = _graphs.trace(module, holders)
    if graph is None:
        for name, child in module._modules.items():
            if child is not None:
                child_path = f"{path}.{name}" if path else name
                module._modules[name] = _unfuse_module(child, child_path, holders)
        return module
    graph = _graphs.copied(graph)
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        called = module.get_submodule(str(node.target))
        if isinstance(called, _BatchNormAct):
            _graphs.expand(graph, node, called)
        elif id(called) in holders:
            called_path = f"{path}.{node.target}" if path else str(node.target)
            _replace_module(module, str(node.target), _unfuse_module(called, called_path, holders))
    for target, child in list(module.named_modules()):
        _graphs.unmerge(child)
        if isinstance(child, _BatchNormAct):
            _replace_module(module, target, child.to_batch_norm())
    return _graphs.with_graph(module, graph)
