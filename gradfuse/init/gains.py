"""Gains of activations, computed from what the function does to a Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Activation", "Moments", "gain", "moments", "working_rms"]

Activation = Callable[[Tensor], Tensor]

REACH = 12.0  # the Gaussian beyond holds 4e-33
POINTS = 48_001  # odd, so that 0, where relu bends, is one of them


class Moments(NamedTuple):
    """What f makes of z ~ N(0, 1)."""

    mean: float  # E f(z)
    square: float  # E f(z)^2
    slope: float  # E f'(z)^2
    linear: bool  # f(z) = a z + b

    @property
    def gain(self) -> float:
        """1 / sqrt(E f(z)^2), or 1 for a function that is 0."""
        return 1 / math.sqrt(self.square) if self.square > 0 else 1.0


def moments(f: Activation) -> Moments:
    """Moments of f(z) for z ~ N(0, 1), by Simpson's rule in float64.

    Args:
        f: an elementwise function of a float64 Tensor.

    Raises:
        ValueError: f is not finite or not elementwise.
    """
    z = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64)
    step = 2 * REACH / (POINTS - 1)
    weight = torch.full_like(z, 2 / 3)
    weight[1::2] = 4 / 3
    weight[0] = weight[-1] = 1 / 3
    weight = weight * (torch.exp(-z * z / 2) * (step / math.sqrt(2 * math.pi)))
    with torch.no_grad():
        y = f(z.clone())
    if y.shape != z.shape or not bool(torch.isfinite(y).all()):
        raise ValueError(
            "gain: activation must map finite numbers to finite numbers one by one, "
            f"got {tuple(y.shape)} for {tuple(z.shape)}"
        )
    y = y.double()
    # Central differences, one-sided at a kink's neighbours: both one-sided slopes count half.
    left, right = (y[1:-1] - y[:-2]) / step, (y[2:] - y[1:-1]) / step
    slope = float((weight[1:-1] * (left * left + right * right) / 2).sum())
    bend = float((right - left).abs().max())
    size = float(torch.maximum(left.abs(), right.abs()).max())
    return Moments(
        mean=float((weight * y).sum()),
        square=float((weight * y * y).sum()),
        slope=slope,
        linear=bend <= 1e-9 * max(size, 1e-30) or size == 0,
    )


WORKING = (1.0, 6.0, 8.0)
STABLE = 0.985  # a margin for what widths of some 100 units do to it


def working_rms(f: Activation) -> float:
    """The least of WORKING at which a deep net of f is stable in the length of its signal.

    Where weights keep a gradient's size, sigma_w^2 = 1 / E f'(z)^2, a small change of q = E z^2
    grows by chi_q = E f(z) f'(z) z / (q E f'(z)^2) a layer (Poole et al. 2016, eq. 5, at fixed
    weights and biases). For gelu, silu, hardswish and mish that is 1.02 to 1.13 at q = 1, and below
    1 where z is so large that they look like relu. Where it nowhere is, the largest is taken.
    """
    z = torch.linspace(-8, 8, 16_000, dtype=torch.float64)  # without 0, where relu bends
    weight = torch.exp(-z * z / 2)
    for size in WORKING:
        x = (size * z).requires_grad_()
        with torch.enable_grad():
            y = f(x)
            (slope,) = torch.autograd.grad(y.sum(), x)
        growth = float((weight * y.detach() * slope * z).sum() / (weight * slope**2).sum()) / size
        if growth < STABLE or abs(growth - 1) < 1e-5:  # 1 where f has no scale, as relu
            return size
    return WORKING[-1]


def gain(activation: str | nn.Module | Activation, *parameters: float) -> float:
    """The factor that keeps the second moment of a signal through an activation.

    It is 1 / sqrt(E f(z)^2) for z ~ N(0, 1), for any elementwise function; He et al. 2015 have it
    for relu, sqrt(2). torch.nn.init.calculate_gain raises for gelu, silu, mish, hardswish and elu,
    and returns 5/3 for tanh, which is 1.5925.

    Args:
        activation: a name in torch.nn.functional, a module, or an elementwise function.
        parameters: further arguments of a function or a name, as the slope of "leaky_relu".

    Returns:
        float > 0. 1 for "linear" and "identity".

    Raises:
        ValueError: there is no such function, or it is not elementwise.

    Source: He et al. 2015, "Delving deep into rectifiers", eq. 10, for any f.
    """
    if activation in ("linear", "identity"):
        return 1.0
    f = activation
    if isinstance(f, str):
        found = getattr(F, f, None) or getattr(torch, f, None)
        if not callable(found):
            raise ValueError(
                f"gain: activation must be a name in torch.nn.functional, got {activation!r}"
            )
        f = found
    if isinstance(f, nn.Module):
        copied = f
        return moments(lambda z: copied(z.to(_dtype(copied))).double()).gain
    call = f
    try:
        return moments(lambda z: call(z, *parameters)).gain
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"gain: activation must be elementwise, got {activation!r}: {error}"
        ) from error


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.float64)
