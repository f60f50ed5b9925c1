"""A residual connection around any branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d

from gradfuse.nn.batch_norm import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from gradfuse.nn.blocks.parts import add_branch, check_number, check_share
from gradfuse.ops.batch_norm import check_activation
from gradfuse.reference import activate

__all__ = ["Residual"]

_FUSED: dict[type, Any] = {
    BatchNorm1d: BatchNormAct1d,
    BatchNorm2d: BatchNormAct2d,
    BatchNorm3d: BatchNormAct3d,
}


class Residual(nn.Module):
    """x + scale * drop_path(branch(activation(norm(x)))): a pre-activation residual unit.

    The shortcut is the identity: norm and activation are of the branch's input, so that forward and
    backward a signal passes any number of blocks unchanged (He et al. 2016b, equations 4 and 5). A
    norm or an activation of the sum is a module behind the block, as `AddLayerNorm`.

    Norm and activation run as one op where the norm is torch.nn.BatchNorm1d, 2d or 3d: the block
    holds a BatchNormAct in its place, with the same parameters and buffers. The sum, its scale and
    the dropped path are one pass.

    state_dict: branch.*; norm.* with a norm; scale, [1], where it learns.

    Args:
        branch: nn.Module that maps a Tensor to one of the same shape and does not write to it.
        norm: nn.Module of the branch's input, or None.
        activation: what follows the norm: None, "relu", "relu6", "leaky_relu", "silu", "gelu",
            "gelu_tanh", "hardswish", "sigmoid" or "tanh".
        drop_path: probability that a sample's branch is dropped, in training. Settable.
        scale: factor of the branch: None for 1; a number, which does not learn; or "zero" for a
            scalar that learns from 0, with which a new net of any depth is the identity.

    Raises:
        TypeError: branch or norm is no nn.Module, a number is none, or branch returns no Tensor.
        ValueError: the activation is unknown, or stands beside a norm that has its own; drop_path
            is not in [0, 1]; scale is another word; branch returns another shape than its input's.

    Source: He et al. 2016b, "Identity Mappings in Deep Residual Networks", equation 9; drop_path:
    Huang et al. 2016, "Deep Networks with Stochastic Depth", equation 2; scale="zero": Bachlechner
    et al. 2020, "ReZero is All You Need", equation 1, and De, Smith 2020, whose SkipInit is the
    same; a number: Szegedy et al. 2016, "Inception-v4", section 3.3.
    """

    scale: float | Tensor | None

    def __init__(
        self,
        branch: nn.Module,
        *,
        norm: nn.Module | None = None,
        activation: str | None = None,
        drop_path: float = 0.0,
        scale: float | str | None = None,
    ) -> None:
        super().__init__()
        for name, module in (("branch", branch), ("norm", norm)):
            if not isinstance(module, nn.Module) and (module is not None or name == "branch"):
                raise TypeError(f"Residual: {name} must be an nn.Module, got {module!r}")
        check_activation("Residual", activation)
        if activation is not None and getattr(norm, "activation", None) is not None:
            raise ValueError(
                "Residual: activation must be None beside a norm that has its own, got "
                f"{activation!r}"
            )
        self.drop_path = check_share("Residual", "drop_path", drop_path)
        self.branch = branch
        fused = _FUSED.get(type(norm))
        if fused is not None:
            norm, activation = fused.from_batch_norm(norm, activation), None
        self.norm = norm
        self.activation = activation
        if isinstance(scale, str):
            if scale != "zero":
                raise ValueError(f"Residual: scale must be None, a number or 'zero', got {scale!r}")
            self.scale = nn.Parameter(torch.empty(1))
            self.reset_parameters()
        else:
            self.scale = None if scale is None else check_number("Residual", "scale", scale)

    def reset_parameters(self) -> None:
        """Sets a scale that learns to 0. Branch and norm are left as they are."""
        if isinstance(self.scale, Tensor):
            nn.init.zeros_(self.scale)

    def forward(self, input: Tensor) -> Tensor:
        h = input if self.norm is None else self.norm(input)
        drop_path = self.drop_path if self.training else 0.0
        branch = self.branch(activate(h, self.activation))
        return add_branch("Residual", input, branch, drop_path=drop_path, scale=self.scale)

    def extra_repr(self) -> str:
        scale = "zero" if isinstance(self.scale, Tensor) else self.scale
        return f"activation={self.activation!r}, drop_path={self.drop_path}, scale={scale!r}"
