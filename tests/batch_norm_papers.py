"""Modes of batch norm in plain torch, as their papers have them: what the op is tested against."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["by_mode", "tracked_momentum"]


def by_mode(leaf: dict[str, Tensor], t: dict[str, Tensor], **o: Any) -> Tensor:
    """The norm of each ghost batch in turn, which updates the running statistics; ghost batches of
    one size or of two that differ by one (Hoffer, Hubara, Soudry 2017, algorithm 1)."""
    x, size = leaf["x"], o.get("ghost_size") or len(leaf["x"])
    parts = x.tensor_split(math.ceil(len(x) / size))
    return torch.cat([_one(part, leaf, t, o, k) for k, part in enumerate(parts)])


def _one(x: Tensor, leaf: dict[str, Tensor], t: dict[str, Tensor], o: dict, k: int) -> Tensor:
    dims, eps = [d for d in range(x.ndim) if d != 1], o["eps"]
    shape = (-1, *[1] * (x.ndim - 2))
    parameter = t["mean"].dtype
    var, mean = torch.var_mean(x.detach().to(parameter), dims, correction=0)
    z = F.batch_norm(x, None, None, None, None, True, 0.0, eps).to(parameter)
    if "renorm" in o:  # Ioffe 2017, algorithm 1
        r_max, d_max, *warmup = o["renorm"]
        if "step" in t:
            begin, r_end, d_end = warmup
            rise = [
                min(max((float(t["step"]) - begin) / (e - begin), 0), 1) for e in (r_end, d_end)
            ]
            r_max, d_max = 1 + rise[0] * (r_max - 1), rise[1] * d_max
        old = (t["var"] + eps).sqrt()
        r = ((var + eps).sqrt() / old).clamp(1 / r_max, r_max)
        d = ((mean - t["mean"]) / old).clamp(-d_max, d_max)
        z = z * r.reshape(shape) + d.reshape(shape)
    z = z * leaf["w"].to(parameter).reshape(shape) + leaf["b"].to(parameter).reshape(shape)
    count = x.numel() / x.shape[1]
    unbiased = var * (count / (count - 1))
    momentum = o["momentum"]
    if isinstance(momentum, Tensor):
        momentum = float(momentum.flatten()[k])
    if "drift" in t:
        rows = [
            tracked_momentum(*c, eps)
            for c in zip(
                *(v.tolist() for v in (t["drift"].T, mean, unbiased, t["mean"], t["var"])),
                strict=True,
            )
        ]
        momentum = torch.tensor([m for m, _ in rows], dtype=parameter, device=x.device)
        states = [state for _, state in rows]
        t["drift"].copy_(torch.tensor(states, dtype=torch.float64).T)
    t["mean"].copy_((1 - momentum) * t["mean"] + momentum * mean)
    t["var"].copy_((1 - momentum) * t["var"] + momentum * unbiased)
    return z.to(x.dtype)


def tracked_momentum(
    state: list[float], mean: float, var: float, old_mean: float, old_var: float, eps: float
) -> tuple[float, list[float]]:
    """A channel's momentum and its new drift, as docs/batch_norm.md has the rule."""
    a, b, square, batches = state
    if batches == 0:
        return 1.0, [a, b, square, 1.0]
    u = (mean - old_mean) / math.sqrt(old_var + eps)
    v = (var - old_var) / (old_var + eps) / math.sqrt(2)
    u, v = (max(-4.0, min(4.0, z)) for z in (u, v))
    a, b = 0.9 * a + 0.1 * u, 0.9 * b + 0.1 * v
    square = 0.9 * square + 0.1 * (u * u + v * v)
    noise = 0.1 / 1.9
    signal = max(0.0, min(1.0, ((a * a + b * b) / square - noise) / (1 - noise)))
    return max(0.02 + 0.48 * signal, 1 / (batches + 1)), [a, b, square, batches + 1]
