"""Runs a model once, or more often, and leaves everything but its parameters as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradfuse.init.graph import Recorder
from gradfuse.init.slots import Slot, seen_tensors
from gradfuse.init.watch import restore

__all__ = ["call", "one_thread", "recorded", "undisturbed"]


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's output: a tuple or list holds positional arguments, a mapping keywords."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """In the block the model runs in eval mode, its batch norms on the batch's own statistics.

    Afterwards its buffers, the mode of each module and torch's random number generators are as
    before. Attention runs op by op: its fused path hides the weights.
    """
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.clone()) for b in model.buffers() if b.device.type != "meta"]
    fast = torch.backends.mha.get_fastpath_enabled()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.training = True
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, mode in modes:
                module.training = mode
            restore(buffers)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch, so that sums have the same order whatever the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def recorded(
    model: nn.Module, slots: dict[str, Slot], inputs: Any, measure: bool = False
) -> Recorder:
    """The ops of one forward pass without gradients."""
    with undisturbed(model), torch.no_grad(), seen_tensors(slots) as tensors:
        recorder = Recorder(tensors, model.buffers(), measure)
        with recorder:
            call(model, inputs)
    return recorder


def floats(value: Any) -> list[Tensor]:
    """The floating-point tensors within an output."""
    leaves = torch.utils._pytree.tree_leaves(value)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
