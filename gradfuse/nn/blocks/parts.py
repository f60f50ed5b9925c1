"""What the blocks share: checks of arguments, a branch's sum with its stream, first weights."""

from __future__ import annotations

import functools
import math
import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from gradfuse.init.fans import conv_fans
from gradfuse.init.gains import gain
from gradfuse.ops.drop_path import path_scale
from gradfuse.ops.dropout_add import dropout_add
from gradfuse.ops.row_norm import check_probability
from gradfuse.reference import activate

__all__ = ["add_branch", "begin_", "check_count", "check_number", "check_share", "draw_"]


def check_count(block: str, name: str, value: Any) -> int:
    """value as an int; TypeError if it is none, ValueError if it is below 1."""
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{block}: {name} must be an int, got {value!r}")
    if operator.index(value) < 1:
        raise ValueError(f"{block}: {name} must be >= 1, got {value}")
    return operator.index(value)


def check_number(block: str, name: str, value: Any) -> float:
    """value as a float; TypeError if it is no number, ValueError if it is not finite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{block}: {name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{block}: {name} must be finite, got {value}")
    return float(value)


def check_share(block: str, name: str, value: Any) -> float:
    """value as a probability; TypeError if it is no number, ValueError if not in [0, 1]."""
    return check_probability(block, name, check_number(block, name, value))


def add_branch(
    block: str,
    input: Tensor,
    branch: Tensor,
    *,
    p: float = 0.0,
    drop_path: float = 0.0,
    scale: float | Tensor | None = None,
) -> Tensor:
    """input + scale * drop_path(dropout(branch, p)) in one pass, two if a learned scale meets a
    dropped path.

    Args:
        block: the name in errors.
        input: [N, ...] Tensor, the stream.
        branch: Tensor of input's shape.
        p, drop_path: probabilities, 0 in eval mode.
        scale: a number, or a Tensor of one element that learns.

    Raises:
        TypeError, ValueError: branch is no Tensor of input's shape.
    """
    if not isinstance(branch, Tensor):
        raise TypeError(f"{block}: branch must return a Tensor, got {type(branch).__name__}")
    if branch.shape != input.shape:
        raise ValueError(
            f"{block}: branch must return its input's shape {list(input.shape)}, got "
            f"{list(branch.shape)}"
        )
    if not p and not drop_path:
        if isinstance(scale, Tensor):
            return torch.addcmul(input, branch, scale)
        return input + branch if scale is None else torch.add(input, branch, alpha=scale)
    path = path_scale(block, branch, drop_path) if drop_path else None
    if isinstance(scale, Tensor):
        branch = branch * scale
    elif scale is not None:
        dtype = torch.promote_types(branch.dtype, torch.float32)
        of_samples = torch.full(branch.shape[:1], scale, dtype=dtype, device=branch.device)
        path = of_samples if path is None else path * of_samples
    if branch.is_contiguous() or branch.ndim < 3:
        return dropout_add(branch, input, p, sample_scale=path)
    # Rows along the channels, which come first in memory, so that the sum keeps the format.
    branch, input = branch.movedim(1, -1), input.movedim(1, -1)
    return dropout_add(branch, input, p, sample_scale=path).movedim(-1, 1)


@functools.cache
def _gain(activation: str | None) -> float:
    # A block may be made on the meta device, or of fake tensors.
    with _disable_current_modes(), torch.device("cpu"):
        return gain(lambda z: activate(z, activation))


def begin_(block: nn.Module, activation: str | None, *ends: nn.Module | None) -> None:
    """Draws the convolutions of a block, and lets its batch norms begin as the identity.

    No activation follows the ends.
    """
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            draw_(module, None if module in ends else activation)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()


@torch.no_grad()
def draw_(layer: nn.Linear | nn.Conv2d, activation: str | None = None) -> None:
    """Draws a weight by the gain of the activation that follows it, and sets a bias to 0.

    Source: He et al. 2015, "Delving deep into rectifiers", eq. 10, for any activation.
    """
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    fan_in = conv_fans(layer.weight.shape, groups).fan_in
    nn.init.normal_(layer.weight, std=_gain(activation) / fan_in**0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
