"""fuse and unfuse: another class for each batch norm of a model."""

from __future__ import annotations

from collections import OrderedDict
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradfuse.fuse.modules import DEFERRED, _Deferred, become_deferred, become_plain

__all__ = ["deferred_class", "fuse", "reason_against", "unfuse"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN_DICTS = ("_parameters", "_buffers", "_modules", *_HOOKS)


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Lets batch norm, residual add and activation run as one op wherever a model has them in turn.

    Each torch.nn.BatchNorm1d, 2d, 3d and timm BatchNormAct2d of the model gets a class of gradfuse;
    nothing else changes. Parameters, buffers, paths, state_dict and isinstance stay. The output of
    such a batch norm waits: a residual that is added to it is taken up, an activation runs the
    fused op, and whatever else uses it computes it first. So the model means what it meant.

    A batch norm computes its output at once if it has hooks, under torch.compile, tracers, dispatch
    modes, torch.func and saved-tensor hooks, in a checkpoint's recomputation, for a tensor
    subclass, or with GRADFUSE_DEFER=0 in the environment.

    Args:
        model: an nn.Module, in training or eval mode.
        inplace: change the given model, else leave it as it is and make another one with the very
            same parameters and buffers.

    Returns:
        nn.Module; the given one if inplace. `fuse_report` says what its batch norms did.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: model is wrapped, compiled or scripted, and not inplace.
    """
    root = _taken("fuse", model, inplace)
    for module in list(root.modules()):
        if isinstance(module, _BatchNorm) and not reason_against(module):
            cls = deferred_class(module)
            assert cls is not None
            become_deferred(module, cls)
    return root


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The inverse of `fuse`: each batch norm gets its own class back.

    Args:
        model: what `fuse` returned, also within other modules.
        inplace: as of `fuse`.

    Raises:
        TypeError, ValueError: as of `fuse`.
    """
    root = _taken("unfuse", model, inplace)
    for module in list(root.modules()):
        if isinstance(module, _Deferred):
            become_plain(module)
    return root


def deferred_class(bn: nn.Module) -> type[_Deferred] | None:
    """The class that takes the place of a module's own; None if there is none."""
    if isinstance(bn, _Deferred):
        return type(bn)
    cls = type(bn)
    if cls.__module__ == "timm.layers.norm_act" and cls.__name__ == "BatchNormAct2d":
        from gradfuse.fuse.timm import DeferredBatchNormAct2d  # which imports timm

        return DeferredBatchNormAct2d
    return DEFERRED.get(cls)


def reason_against(bn: nn.Module) -> str:
    """Why a batch norm keeps its class; "" if `fuse` swaps it."""
    if deferred_class(bn) is None:
        return f"{type(bn).__module__}.{type(bn).__name__} is not a batch norm known here"
    if "forward" in bn.__dict__:
        return "its forward was set on the instance"
    return ""


def _taken(op: str, model: nn.Module, inplace: bool) -> nn.Module:
    """The model to change: the given one, or another with the same parameters and buffers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}")
    if inplace:
        return model
    wrappers = (
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        torch.jit.ScriptModule,
        torch._dynamo.OptimizedModule,
    )
    for path, module in model.named_modules():
        if isinstance(module, wrappers):
            raise ValueError(
                f"{op}: expected a model not yet wrapped, compiled or scripted, got "
                f"{type(module).__name__}{' at ' + path if path else ''}; {op} it before, or with "
                "inplace=True"
            )
    return _Twins(model).root


class _Twins:
    """Another tree of modules, with the very same parameters and buffers.

    What refers to a module of the old tree, in attributes and in lists, tuples, dicts and bound
    methods there, refers to its twin in the new one. All other attributes are shared.
    """

    def __init__(self, model: nn.Module) -> None:
        self._twins: dict[int, nn.Module] = {}
        self._within: set[int] = set()  # containers that may hold themselves
        for module in model.modules():
            self._twins[id(module)] = type(module).__new__(type(module))
        for module in model.modules():
            self._fill(module, self._twins[id(module)])
        self.root = self._twins[id(model)]

    def _fill(self, module: nn.Module, twin: nn.Module) -> None:
        state = module.__getstate__() if isinstance(module, _Deferred) else module.__dict__
        for name, value in state.items():
            if name in _OWN_DICTS:
                value = type(value)(value)
            twin.__dict__[name] = self._of(value)

    def _of(self, value: Any) -> Any:
        """The value, with twins in the place of modules."""
        if isinstance(value, nn.Module):
            return self._twins.get(id(value), value)
        if isinstance(value, MethodType) and id(value.__self__) in self._twins:
            return MethodType(value.__func__, self._twins[id(value.__self__)])
        if type(value) not in (dict, OrderedDict, list, tuple) or id(value) in self._within:
            return value
        self._within.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        made = {k: self._of(v) for k, v in items}
        self._within.remove(id(value))
        old = value.values() if isinstance(value, dict) else value
        if all(a is b for a, b in zip(made.values(), old, strict=True)):
            return value
        return type(value)(made if isinstance(value, dict) else made.values())
