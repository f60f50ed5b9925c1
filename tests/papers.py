"""The optimizers' papers in plain torch, as their algorithms are written: what steps are tested
against. Complex parameters are taken as their real and imaginary parts beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Paper(torch.optim.Optimizer):
    """An optimizer that updates a parameter at a time."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"lr": 0.01, "maximize": False, **self.defaults_of(), **options})

    def defaults_of(self) -> dict[str, Any]:
        raise NotImplementedError

    def update(self, p: Tensor, g: Tensor, s: dict[str, Any], o: dict[str, Any]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, -p.grad if group["maximize"] else p.grad, group)

    def _update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        """In float32 at least; a 16-bit parameter and its state are rounded after it."""
        wide = torch.promote_types(p.dtype, torch.float32)
        s = {k: v.to(wide) if isinstance(v, Tensor) else v for k, v in self.state[p].items()}
        s["step"] = s.get("step", 0) + 1
        x = p.to(wide, copy=True)
        self.update(x, g.to(wide), s, group)
        p.copy_(x)
        self.state[p] = {k: v.to(p.dtype) if isinstance(v, Tensor) else v for k, v in s.items()}


def moments(g: Tensor, s: dict[str, Any], o: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Adam's first and second moment, corrected for their bias."""
    beta1, beta2 = o["betas"]
    s["exp_avg"] = beta1 * s.get("exp_avg", torch.zeros_like(g)) + (1 - beta1) * g
    s["exp_avg_sq"] = beta2 * s.get("exp_avg_sq", torch.zeros_like(g)) + (1 - beta2) * g * g
    t = s["step"]
    return s["exp_avg"] / (1 - beta1**t), s["exp_avg_sq"] / (1 - beta2**t)


class AdamAtan2(Paper):
    """Everett et al. 2024, section 4, with AdamW's decay; or Adam's, coupled."""

    def defaults_of(self) -> dict[str, Any]:
        return {"betas": (0.9, 0.999), "weight_decay": 0.01, "coupled": False}

    def update(self, p: Tensor, g: Tensor, s: dict[str, Any], o: dict[str, Any]) -> None:
        decay = o["weight_decay"]
        m, v = moments(g + decay * p if o["coupled"] else g, s, o)
        if not o["coupled"]:
            p.mul_(1 - o["lr"] * decay)
        p.sub_(o["lr"] * torch.atan2(m, v.sqrt()))


class Lion(Paper):
    """Chen et al. 2023, algorithm 2."""

    def defaults_of(self) -> dict[str, Any]:
        return {"betas": (0.9, 0.99), "weight_decay": 0.0}

    def update(self, p: Tensor, g: Tensor, s: dict[str, Any], o: dict[str, Any]) -> None:
        beta1, beta2 = o["betas"]
        m = s.get("exp_avg", torch.zeros_like(p))
        c = beta1 * m + (1 - beta1) * g
        p.sub_(o["lr"] * (c.sign() + o["weight_decay"] * p))
        s["exp_avg"] = beta2 * m + (1 - beta2) * g


class LAMB(Paper):
    """You et al. 2020, algorithm 2. Without weight decay the ratio is 1, but for always_adapt."""

    def defaults_of(self) -> dict[str, Any]:
        return {
            "betas": (0.9, 0.999),
            "eps": 1e-6,
            "weight_decay": 0.01,
            "trust_clip": False,
            "always_adapt": False,
        }

    def update(self, p: Tensor, g: Tensor, s: dict[str, Any], o: dict[str, Any]) -> None:
        m, v = moments(g, s, o)
        r = m / (v.sqrt() + o["eps"]) + o["weight_decay"] * p
        ratio = 1.0
        if p.numel() and (o["weight_decay"] or o["always_adapt"]) and p.norm() and r.norm():
            ratio = float(p.double().norm() / r.double().norm())
        p.sub_(o["lr"] * (min(ratio, 1.0) if o["trust_clip"] else ratio) * r)


class ScheduleFreeAdamW(Paper):
    """Defazio et al. 2024, algorithm 1 with weights: keeps the mean x itself. A parameter is y."""

    def defaults_of(self) -> dict[str, Any]:
        return {
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 0.0,
            "warmup_steps": 0,
            "r": 0.0,
            "weight_lr_power": 2.0,
        }

    def update(self, p: Tensor, g: Tensor, s: dict[str, Any], o: dict[str, Any]) -> None:
        (beta1, beta2), t = o["betas"], s["step"]
        if t == 1:
            s["x"], s["z"] = p.clone(), p.clone()
            s["weights"], s["fastest"], s["exp_avg_sq"] = 0.0, 0.0, torch.zeros_like(p)
        rate = o["lr"] * min(1.0, t / o["warmup_steps"]) if o["warmup_steps"] else o["lr"]
        s["fastest"] = max(rate, s["fastest"])
        weight = t ** o["r"] * s["fastest"] ** o["weight_lr_power"]
        s["weights"] += weight
        c = weight / s["weights"] if s["weights"] else 0.0
        s["exp_avg_sq"] = beta2 * s["exp_avg_sq"] + (1 - beta2) * g * g
        root = (s["exp_avg_sq"] / (1 - beta2**t)).sqrt()
        # y is a mean of z and x, so its decay is the gradient's.
        s["z"] = s["z"] - rate * (g / (root + o["eps"]) + o["weight_decay"] * p)
        s["x"] = (1 - c) * s["x"] + c * s["z"]
        p.copy_((1 - beta1) * s["z"] + beta1 * s["x"])


class AdamWFollowing(Paper):
    """AdamW with eps times the clip's coefficient, which `clip` finds before a step."""

    def __init__(self, params: Any, max_norm: float, **options: Any) -> None:
        super().__init__(params, **options)
        self._max_norm, self._coefficient = max_norm, 1.0

    def defaults_of(self) -> dict[str, Any]:
        return {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}

    def clip(self) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        self._coefficient = min(1.0, self._max_norm / (norm + 1e-6))
        for g in grads:
            g.mul_(self._coefficient)

    def update(self, p: Tensor, g: Tensor, s: dict[str, Any], o: dict[str, Any]) -> None:
        m, v = moments(g, s, o)
        p.mul_(1 - o["lr"] * o["weight_decay"])
        p.sub_(o["lr"] * m / (v.sqrt() + o["eps"] * self._coefficient))
