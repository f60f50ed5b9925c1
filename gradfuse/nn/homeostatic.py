"""Synaptic scaling and intrinsic plasticity: channels held within a range of activity."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from gradfuse.ops.batch_norm import batch_norm_act, check_activation, recomputing

__all__ = ["HomeostaticGain"]

Range = tuple[float, float]


class HomeostaticGain(nn.Module):
    """act(gain * (x - threshold)), with a gain and a threshold that hold each channel's activity.

    Every training step moves both a little, outside autograd, wherever a channel's pre-activations
    z = gain * (x - threshold) have left their range:

    - the gain, multiplied by 1 / (1 + limit) to 1 + limit, towards an rms of z within `rms`. It
      scales all inputs of a channel alike, as synaptic scaling does.
    - the threshold, by `limit` times the size of x at most, towards a share of positive z within
      `rate`. A gain cannot change the sign of z, so this is what revives a dead ReLU. It shifts a
      cell's excitability, as intrinsic plasticity does.

    Within both ranges nothing moves and the module is its activation. In eval mode it is fixed.
    The share of positive z is that of a normal distribution with the running mean and variance of
    x, so that one read of x is enough. For z of any other distribution some are positive for sure
    where the lower end of `rate` is 0.5. If x keeps its distribution, a channel is within `rate`
    after 1.5 / limit steps at most, and 1 / momentum more for the running statistics to settle.

    Buffers, all in the state_dict: gain and threshold [C], running_mean and running_var [C] of x,
    num_batches_tracked. DistributedDataParallel broadcasts those of rank 0, which alone decides. A
    checkpoint's recomputation moves nothing, unless the module is compiled and the checkpoint is
    not. The running statistics of a channel leave out batches in which it holds NaN or inf.

    Layers in a row move at the same time: L gains that grow by `limit` multiply the last signal by
    (1 + limit)^L a step. The running statistics follow where limit * L is well below momentum.

    Args:
        num_features: channels C of the input [N, C] or [N, C, ...]; float16, bfloat16, float32 or
            float64.
        activation: None, "relu", "relu6", "leaky_relu", "silu", "gelu", "gelu_tanh", "hardswish",
            "sigmoid" or "tanh"; computed in the same pass.
        rms: least and largest root mean square of z, > 0; None: the gain stays. Unit: that of z.
        rate: least and largest share of z above 0, both in (0, 1); None: the threshold stays.
            Equal ends are a set point.
        limit: largest relative change a step, in [0, 1).
        momentum: weight of a batch in the running statistics, in (0, 1].
        max_gain: the gain stays within 1 / max_gain and max_gain, > 1.
        negative_slope: of "leaky_relu".
        device, dtype: of the buffers.

    Raises:
        TypeError: an argument is not of its type, or the input is no Tensor of a real dtype.
        ValueError: an argument is out of its range, or the input has another number of channels.

    Source: Turrigiano et al. 1998, "Activity-dependent scaling of quantal amplitude in neocortical
    neurons"; Turrigiano 2008, "The self-tuning neuron"; Triesch 2005, "A gradient rule for the
    plasticity of a neuron's intrinsic excitability", whose gain and threshold these are. The rule
    by mean and variance, its ranges and its limit are ours.
    """

    gain: Tensor
    threshold: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        activation: str | None = "relu",
        rms: Range | None = (0.25, 4.0),
        rate: Range | None = (0.05, 0.95),
        limit: float = 0.01,
        momentum: float = 0.1,
        max_gain: float = 100.0,
        negative_slope: float = 0.01,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = _whole("num_features", num_features)
        check_activation("HomeostaticGain", activation)
        self.activation = activation
        self.negative_slope = _within("negative_slope", negative_slope, 0.0, math.inf, "[)")
        self.rms = None if rms is None else _range("rms", rms, math.inf)
        self.rate = None if rate is None else _range("rate", rate, 1.0)
        # In standard deviations above the threshold: where a normal mean has these shares positive.
        self._edges = [NormalDist().inv_cdf(end) for end in self.rate or ()]
        self.limit = _within("limit", limit, 0.0, 1.0, "[)")
        self.momentum = _within("momentum", momentum, 0.0, 1.0, "(]")
        self.max_gain = _within("max_gain", max_gain, 1.0, math.inf, "()")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"HomeostaticGain: dtype must be a real dtype, got {dtype}")
        for name, value in (("gain", 1.0), ("threshold", 0.0), ("running_mean", 0.0),
                            ("running_var", 1.0)):  # fmt: skip
            full = torch.full((self.num_features,), value, device=device, dtype=dtype)
            self.register_buffer(name, full)
        count = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("num_batches_tracked", count)

    def forward(self, input: Tensor) -> Tensor:
        _check_input(input, self.num_features)
        if self.training and input.numel() and not recomputing():
            self._adapt(input)
        # Clones: a second forward before the backward, or DDP's broadcast, writes to the buffers.
        gain, threshold = self.gain.clone(), self.threshold.clone()
        return batch_norm_act(
            input,
            threshold,
            torch.ones_like(gain),
            gain,
            activation=self.activation,
            eps=0.0,
            negative_slope=self.negative_slope,
            save="output" if self.activation == "relu" else "bitmask",
        )

    @torch.no_grad()
    def _adapt(self, input: Tensor) -> None:
        """Before the output, so that a checkpoint's recomputation sees the gain that it used."""
        var, mean = torch.var_mean(input.detach(), [0, *range(2, input.ndim)], correction=0)
        wide = torch.promote_types(torch.float32, torch.promote_types(input.dtype, self.gain.dtype))
        self._track(mean.to(wide), var.to(wide))
        mean, var = self.running_mean.to(wide), self.running_var.to(wide)
        gain, threshold = self.gain.to(wide), self.threshold.to(wide)
        if self.rate is not None:
            step = self.limit * torch.hypot(torch.hypot(mean, threshold), var.sqrt())
            low, high = (edge * var.sqrt() for edge in self._edges)
            above = mean - threshold
            threshold = threshold + (above - torch.clamp(above, low, high)).clamp(-step, step)
            self.threshold.copy_(threshold)
        if self.rms is not None:
            rms = gain * torch.hypot(mean - threshold, var.sqrt())
            factor = (rms.clamp(*self.rms) / rms).clamp(1.0 / (1.0 + self.limit), 1.0 + self.limit)
            factor = torch.where(rms > 0, factor, 1.0)  # silence has no size to scale
            self.gain.copy_((gain * factor).clamp(1.0 / self.max_gain, self.max_gain))

    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Counts a batch in the running statistics: the first as a whole, others by momentum."""
        kept_mean, kept_var = self.running_mean.to(mean.dtype), self.running_var.to(mean.dtype)
        weight = (self.num_batches_tracked + 1).to(mean.dtype).reciprocal().clamp(min=self.momentum)
        shift = mean - kept_mean
        # Within the batches and between them, each factor before its square, which may overflow.
        between = (((1 - weight) * weight).sqrt() * shift).square()
        spread = (1 - weight) * kept_var + weight * var + between
        # A variance that overflows is large, not unknown; a mean that does is of NaN or inf.
        largest = torch.finfo(self.running_var.dtype).max
        known = mean.isfinite() & ~spread.isnan()
        self.running_mean.copy_(torch.where(known, kept_mean + weight * shift, kept_mean))
        self.running_var.copy_(torch.where(known, spread.clamp(max=largest), kept_var))
        self.num_batches_tracked.add_(1)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, activation={self.activation!r}, rms={self.rms}, "
            f"rate={self.rate}, limit={self.limit}"
        )


def _check_input(input: object, num_features: int) -> None:
    if not isinstance(input, Tensor) or not input.is_floating_point():
        got = input.dtype if isinstance(input, Tensor) else type(input).__name__
        raise TypeError(f"HomeostaticGain: input must be a Tensor of a real dtype, got {got}")
    if input.ndim < 2 or input.shape[1] != num_features:
        raise ValueError(
            f"HomeostaticGain: input must be [N, {num_features}, ...], got {list(input.shape)}"
        )


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        got = type(value).__name__
        raise TypeError(f"HomeostaticGain: {name} must be an int, got {got}")
    if value < 1:
        raise ValueError(f"HomeostaticGain: {name} must be >= 1, got {value}")
    return value


def _within(name: str, value: object, low: float, high: float, ends: str) -> float:
    """value as a float; ends tells which of the two belong to the interval."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        got = type(value).__name__
        raise TypeError(f"HomeostaticGain: {name} must be a number, got {got}")
    above = value >= low if ends[0] == "[" else value > low
    below = value <= high if ends[1] == "]" else value < high
    if not (above and below):
        interval = f"{ends[0]}{low:g}, {high:g}{ends[1]}"
        raise ValueError(f"HomeostaticGain: {name} must be in {interval}, got {value}")
    return float(value)


def _range(name: str, value: object, top: float) -> Range:
    """Two numbers within (0, top) that do not fall."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"HomeostaticGain: {name} must be None or two numbers, got {value!r}")
    low, high = (_within(name, end, 0.0, top, "()") for end in value)
    if low > high:
        raise ValueError(f"HomeostaticGain: {name} must not fall, got {value!r}")
    return low, high
