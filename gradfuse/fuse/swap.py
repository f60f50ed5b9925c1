"""fuse and unfuse: another class for each norm and dropout of a model."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from gradfuse.fuse.dropouts import DROPOUTS
from gradfuse.fuse.modules import DEFERRED, _Deferred, become_deferred
from gradfuse.fuse.norms import NORMS
from gradfuse.fuse.swapped import Swapped, become_plain
from gradfuse.nn.batch_norm_mode import BatchNormMode, HasMode

__all__ = ["fuse", "is_site", "reason_against", "swapped_class", "unfuse"]

_TORCH = {**DEFERRED, **NORMS, **DROPOUTS}
# Base classes of what `fuse_report` lists, swapped or not.
_SITES = (_BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.Dropout, Swapped)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN_DICTS = ("_parameters", "_buffers", "_modules", *_HOOKS)


def fuse(
    model: nn.Module, *, inplace: bool = False, mode: BatchNormMode | None = None
) -> nn.Module:
    """Lets a norm run as one op with what surrounds it, wherever a model has that in turn.

    Each torch.nn.BatchNorm1d, 2d, 3d, LayerNorm, RMSNorm and Dropout of the model, and what timm,
    torchvision and transformers have in their place (docs/fuse.md), gets a class of gradfuse;
    nothing else changes. Parameters, buffers, paths, state_dict and isinstance stay. The output of
    a batch norm waits: a residual that is added to it is taken up, an activation runs the fused op.
    A dropout's output, a dropped path and the sum of a residual wait for a layer norm or RMS norm
    in the same way. Whatever else uses such a tensor computes it first. So the model means what it
    meant; a dropout has gradfuse's random numbers.

    A batch norm computes its output at once if it has hooks. Nothing waits under torch.compile,
    tracers, dispatch modes, torch.func and saved-tensor hooks, in a checkpoint's recomputation, for
    a tensor subclass, with GRADFUSE_DEFER=0 in the environment, or, before layer norms and RMS
    norms, below 64 KiB with a dropout and 1 MiB without.

    Args:
        model: an nn.Module, in training or eval mode.
        inplace: change the given model, else leave it as it is and make another one with the very
            same parameters and buffers.

    Returns:
        nn.Module; the given one if inplace. `fuse_report` says what its modules did.

    Raises:
        TypeError: model is no nn.Module, or mode no BatchNormMode.
        ValueError: model is wrapped, compiled or scripted, and not inplace; a batch norm lacks the
            running statistics that the mode needs.
    """
    root = _taken("fuse", model, inplace)
    if mode is not None:
        _check_mode(root, mode)
    for module in list(root.modules()):
        if is_site(module) and not reason_against(module):
            cls = swapped_class(module)
            assert cls is not None
            if issubclass(cls, _Deferred):
                become_deferred(module, cls)
            else:
                module.__class__ = cls
        if mode is not None and isinstance(module, HasMode):
            module._set_mode(mode)
    return root


def _check_mode(model: nn.Module, mode: Any) -> None:
    """Raises where a batch norm of the model cannot have the mode; warns of those left out."""
    if not isinstance(mode, BatchNormMode):
        raise TypeError(f"fuse: mode must be a BatchNormMode, got {type(mode).__name__}")
    left = []
    for path, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if not isinstance(module, HasMode) and reason_against(module):
            left.append(f"{path or 'the model'} ({type(module).__name__})")
            continue
        try:
            mode.check(module)
        except ValueError as error:
            raise ValueError(f"fuse: {error} at {path or 'the model'}") from None
    if left:
        warnings.warn(
            f"fuse: expected batch norms that take a mode, left as they are: {', '.join(left)}",
            stacklevel=3,
        )


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The inverse of `fuse`: each module gets its own class back, unless it was parametrized since.

    Args:
        model: what `fuse` returned, also within other modules.
        inplace: as of `fuse`.

    Raises:
        TypeError, ValueError: as of `fuse`.
    """
    root = _taken("unfuse", model, inplace)
    for module in list(root.modules()):
        # torch.nn.utils.parametrize made a class of its own of the module's.
        if isinstance(module, Swapped) and not is_parametrized(module):
            become_plain(module)
    return root


def swapped_class(module: nn.Module) -> type[Swapped] | None:
    """The class that takes the place of a module's own; None if there is none."""
    if isinstance(module, Swapped):
        return type(module)
    cls = type(module)
    # A library is imported only if a module of it is there.
    library = cls.__module__.split(".")[0]
    if library == "timm":
        from gradfuse.fuse.timm import SWAPPED

        return SWAPPED.get(cls)
    if library == "transformers":
        from gradfuse.fuse.transformers import swapped_norm

        return swapped_norm(cls)
    if library == "torchvision" and cls.__name__ == "StochasticDepth":
        from gradfuse.fuse.torchvision import SwappedStochasticDepth

        return SwappedStochasticDepth
    return _TORCH.get(cls)


def is_site(module: nn.Module) -> bool:
    """Whether `fuse` has to do with a module: a norm, a dropout or a dropped path."""
    return isinstance(module, _SITES) or swapped_class(module) is not None


def reason_against(module: nn.Module) -> str:
    """Why a module keeps its class; "" if `fuse` swaps it."""
    if swapped_class(module) is None:
        return f"{type(module).__module__}.{type(module).__name__} is not known here"
    if "forward" in module.__dict__:
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
        state = module._state() if isinstance(module, Swapped) else module.__dict__
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
