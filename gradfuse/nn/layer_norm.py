"""Layer norm and RMS norm, alone, of a sum, and of a sum with dropout, as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradfuse.ops.drop_path import check_drop_mode, path_scale
from gradfuse.ops.layer_norm import add_layer_norm, layer_norm
from gradfuse.ops.rms_norm import add_rms_norm, rms_norm
from gradfuse.ops.row_norm import check_probability

__all__ = ["AddLayerNorm", "AddRMSNorm", "DropPath", "LayerNorm", "RMSNorm"]


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm by `layer_norm`; with a residual, (y, sum) by `add_layer_norm`.

    Arguments, parameters and state_dict are those of torch.nn.LayerNorm. Errors are those of the
    functions.

    Source: Ba, Kiros, Hinton 2016, "Layer Normalization", equation 4.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        shape, weight, bias = self.normalized_shape, self.weight, self.bias
        if residual is None:
            return layer_norm(input, shape, weight, bias, self.eps)
        return add_layer_norm(input, residual, shape, weight, bias, eps=self.eps)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm by `rms_norm`; with a residual, (y, sum) by `add_rms_norm`.

    Arguments, parameters and state_dict are those of torch.nn.RMSNorm. Errors are those of the
    functions.

    Source: Zhang, Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        shape, weight = self.normalized_shape, self.weight
        if residual is None:
            return rms_norm(input, shape, weight, self.eps)
        return add_rms_norm(input, residual, shape, weight, eps=self.eps)


class _Sum(nn.Module):
    """What the norms of a sum have beside torch's."""

    p: float
    drop_prob: float
    drop_mode: str
    prenorm: bool
    residual_dtype: torch.dtype | None

    def _set_options(
        self,
        p: float,
        drop_prob: float,
        drop_mode: str,
        prenorm: bool,
        residual_dtype: torch.dtype | None,
    ) -> None:
        name = type(self).__name__
        self.p = check_probability(name, "p", p)
        self.drop_prob = check_probability(name, "drop_prob", drop_prob)
        self.drop_mode = check_drop_mode(name, drop_mode)
        self.prenorm = prenorm
        self.residual_dtype = residual_dtype

    def _options(self, input: Tensor) -> dict[str, Any]:
        scale = None
        if self.training and self.drop_prob:
            scale = path_scale(type(self).__name__, input, self.drop_prob, self.drop_mode)
        return {
            "p": self.p,
            "training": self.training,
            "prenorm": self.prenorm,
            "residual_dtype": self.residual_dtype,
            "sample_scale": scale,
        }

    def extra_repr(self) -> str:
        more = f", p={self.p}, drop_prob={self.drop_prob}"
        return super().extra_repr() + more + ("" if self.prenorm else ", prenorm=False")


class AddLayerNorm(_Sum, nn.LayerNorm):
    """(layer_norm(s), s) of s = residual + drop_path(dropout(x)), by `add_layer_norm`.

    Parameters and state_dict are those of torch.nn.LayerNorm.

    Args:
        normalized_shape: int or ints, the last dimensions of the input.
        eps: added to the variance.
        p: probability of the dropout, in training. Settable.
        drop_prob: probability that a sample's branch is dropped, in training. Settable.
        drop_mode: "row" draws for each sample, "batch" once for all.
        prenorm: return the sum as well; else the norm alone.
        residual_dtype: dtype of the sum, as in `add_layer_norm`.
        elementwise_affine, bias, device, dtype: as in torch.nn.LayerNorm.

    Raises:
        ValueError: p or drop_prob is not in [0, 1], or the mode is unknown.

    Source: Ba, Kiros, Hinton 2016, "Layer Normalization", equation 4; Huang et al. 2016, "Deep
    Networks with Stochastic Depth", equation 2.
    """

    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        p: float = 0.0,
        *,
        drop_prob: float = 0.0,
        drop_mode: str = "row",
        prenorm: bool = True,
        residual_dtype: torch.dtype | None = None,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._set_options(p, drop_prob, drop_mode, prenorm, residual_dtype)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        shape, weight, bias = self.normalized_shape, self.weight, self.bias
        options = self._options(input)
        return add_layer_norm(input, residual, shape, weight, bias, eps=self.eps, **options)


class AddRMSNorm(_Sum, nn.RMSNorm):
    """(rms_norm(s), s) of s = residual + drop_path(dropout(x)), by `add_rms_norm`.

    Parameters and state_dict are those of torch.nn.RMSNorm; eps=None is its default. The other
    arguments and the errors are those of AddLayerNorm, less the bias.

    Source: Zhang, Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """

    def __init__(
        self,
        normalized_shape: Any,
        eps: float | None = None,
        p: float = 0.0,
        *,
        drop_prob: float = 0.0,
        drop_mode: str = "row",
        prenorm: bool = True,
        residual_dtype: torch.dtype | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self._set_options(p, drop_prob, drop_mode, prenorm, residual_dtype)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        shape, weight = self.normalized_shape, self.weight
        options = self._options(input)
        return add_rms_norm(input, residual, shape, weight, eps=self.eps, **options)


class DropPath(nn.Module):
    """Drops whole samples of a residual branch in training, and scales the others.

    What is dropped becomes 0 whatever it holds: timm's and torchvision's modules multiply, which
    makes NaN of an inf.

    Args:
        drop_prob: probability that a sample is dropped. Settable.
        drop_mode: "row" draws for each sample, "batch" once for all.
        scale_by_keep: divide those that stay by 1 - drop_prob.

    Raises:
        ValueError: drop_prob is not in [0, 1], the mode is unknown, or the input has no samples.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth", equation 2.
    """

    def __init__(
        self, drop_prob: float = 0.0, drop_mode: str = "row", scale_by_keep: bool = True
    ) -> None:
        super().__init__()
        self.drop_prob = check_probability("DropPath", "drop_prob", drop_prob)
        self.drop_mode = check_drop_mode("DropPath", drop_mode)
        self.scale_by_keep = scale_by_keep

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return input
        scale = path_scale(
            "DropPath", input, self.drop_prob, self.drop_mode, scale_by_keep=self.scale_by_keep
        )
        scale = scale.to(input.dtype).reshape(-1, *[1] * (input.ndim - 1))
        return torch.where(scale == 0, 0.0, input * scale)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}, drop_mode={self.drop_mode!r}"
