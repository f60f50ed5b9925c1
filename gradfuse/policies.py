"""Policies: what a step does to its gradients, decided from their norms.

gradfuse.optim's optimizers take one as `clip=`, gradfuse.GradClipper as `max_norm=`. A policy has
state, so give each of them its own. To write one, override `decide`, which gets the norms of a
step, and `begin`, which makes the state before the first:

    class Follow(Policy):
        def begin(self, norms):
            return {"level": norms.new_full((), math.inf)}

        def decide(self, norm, norms, state):
            level = state["level"]
            new = torch.where(level.isinf(), norm, 0.9 * level + 0.1 * norm)
            return Decision(to_at_most(level, norm), state={"level": new})
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradfuse import _native
from gradfuse.clipping.policy import Decision, Policy, to_at_most
from gradfuse.distributed import has_dtensor
from gradfuse.distributed.units import adaptive_clip_over_ranks_
from gradfuse.ops.checks import check_max_norm, check_nonnegative

__all__ = [
    "AGC",
    "AdaGC",
    "AutoClip",
    "Decision",
    "Norm",
    "Policy",
    "SpikeSkip",
    "Value",
    "ZClip",
    "to_at_most",
]

_TINY = torch.finfo(torch.float64).tiny


def _recorded(history: Tensor, norm: Tensor) -> Tensor:
    """The history with one more norm, newest first; unused places are inf."""
    return torch.cat([norm.reshape(1), history[:-1]])


def _percentile(history: Tensor, percent: float) -> Tensor:
    """numpy.percentile of the finite norms; NaN if there is none."""
    ordered = history.sort().values
    last = history.isfinite().sum().to(history) - 1.0
    place = last * (percent / 100.0)
    low = place.floor().long().clamp(min=0)
    high = place.ceil().long().clamp(min=0)
    a, b = ordered[low.reshape(1)].squeeze(0), ordered[high.reshape(1)].squeeze(0)
    value = torch.where(low == high, a, a + (b - a) * (place - low))
    return torch.where(last < 0, math.nan, value)


def _check_count(op: str, name: str, value: int, least: int) -> int:
    if int(value) != value or value < least:
        raise ValueError(f"{op}: {name} must be a whole number >= {least}, got {value}")
    return int(value)


def _check_within(op: str, name: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be in [{low:g}, {high:g}], got {value}")
    return float(value)


class Norm(Policy):
    """Global norm clipping, as a number given for `clip` does.

    Args:
        max_norm: upper bound of the global norm, >= 0.
        exact: by the correctly rounded square root of the exact sum of squares: the same bits for
            any order, split and number of ranks. Slower.

    Source: Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural
    networks", Algorithm 1.
    """

    def __init__(self, max_norm: float, *, exact: bool = False) -> None:
        super().__init__()
        self.max_norm = check_max_norm("Norm", "max_norm", max_norm)
        self.exact = bool(exact)


class Value(Policy):
    """Clamps each element, as torch.nn.utils.clip_grad_value_.

    The report's clipped_norm is NaN for a step that clamped, because nothing measures it.

    Args:
        clip_value: largest magnitude of an element, >= 0.
    """

    def __init__(self, clip_value: float) -> None:
        super().__init__()
        self.clip_value = check_nonnegative("Value", "clip_value", clip_value)
        self.bound = self.clip_value


class AGC(Policy):
    """Bounds each unit's gradient by its weights, as gradfuse.adaptive_clip_grad_.

    The gradients of clipped units are written, by the optimizers too. Reads weights and gradients
    once and the gradients once more, for the report. Over ranks each of the three reads ends in an
    all-reduce.

    Args:
        clip_factor: largest ratio of gradient norm to weight norm, >= 0.
        eps: least weight norm, >= 0.

    Source: Brock, De, Smith, Simonyan 2021, "High-Performance Large-Scale Image Recognition
    Without Normalization", equation 3.
    """

    def __init__(self, clip_factor: float = 0.01, eps: float = 1e-3) -> None:
        super().__init__()
        self.clip_factor = check_nonnegative("AGC", "clip_factor", clip_factor)
        self.eps = check_nonnegative("AGC", "eps", eps)

    def rewrite(self, parameters: Sequence[Tensor], scale: Tensor | None) -> None:
        if has_dtensor(parameters):
            adaptive_clip_over_ranks_("AGC", parameters, self.clip_factor, self.eps, 2.0, scale)
            return
        _native.backend.adaptive_clip_(parameters, None, self.clip_factor, self.eps, 2.0, scale)


class ZClip(Policy):
    """Clips norms that are many standard deviations above their moving average.

    Mean and variance are those of the first norms, then exponential averages of the norms after
    clipping. A norm of score s > z is clipped to mean + z^2 / s * deviation.

    Args:
        alpha: weight of the past in the averages, in [0, 1].
        z: score from which a norm is clipped, >= 0.
        warmup: steps that only collect norms, >= 1.
        max_norm: bound of the norm that holds always, >= 0.

    Source: Kumar, Owen, Chowdhury, Guera 2025, "ZClip: Adaptive Spike Mitigation for LLM
    Pre-Training", Algorithm 1, with the authors' constants.
    """

    EPS = 1e-6
    by_parameter = False

    def __init__(
        self, alpha: float = 0.97, z: float = 2.5, warmup: int = 25, max_norm: float = math.inf
    ) -> None:
        super().__init__()
        self.alpha = _check_within("ZClip", "alpha", alpha, 0.0, 1.0)
        self.z = check_nonnegative("ZClip", "z", z)
        self.warmup = _check_count("ZClip", "warmup", warmup, 1)
        self.max_norm = check_nonnegative("ZClip", "max_norm", max_norm)

    def begin(self, norms: Tensor) -> dict[str, Tensor]:
        return {name: norms.new_zeros(()) for name in ("steps", "mean", "var")}

    def decide(self, norm: Tensor, norms: Tensor, state: dict[str, Tensor]) -> Decision:
        steps, mean, var = state["steps"], state["mean"], state["var"]
        warm = steps >= self.warmup
        deviation = var.sqrt()
        score = (norm - mean) / (deviation + self.EPS)
        is_spike = warm & (score > self.z)
        # Without a spike the score may be 0, and the division inf or NaN.
        limit = torch.where(is_spike, mean + self.z * deviation * (self.z / score), norm)
        ahead = limit - mean
        first = mean + ahead / (steps + 1.0)  # Welford's mean and variance
        first_var = var + (ahead * (limit - first) - var) / (steps + 1.0)
        moved = mean + (1.0 - self.alpha) * ahead
        moved_var = self.alpha * var + (1.0 - self.alpha) * (limit - moved) ** 2
        return Decision(
            to_at_most(limit.clamp(max=self.max_norm), norm),
            state={
                "steps": steps + 1.0,
                "mean": torch.where(warm, moved, first),
                "var": torch.where(warm, moved_var, first_var),
            },
        )


class AutoClip(Policy):
    """Clips to a percentile of the norms so far, this step's included.

    Args:
        percentile: in [0, 100].
        history: norms that are remembered, >= 1. The paper remembers all.

    Source: Seetharaman, Wichern, Pardo, Le Roux 2020, "AutoClip: Adaptive Gradient Clipping for
    Source Separation Networks", Algorithm 1.
    """

    by_parameter = False

    def __init__(self, percentile: float = 10.0, history: int = 1000) -> None:
        super().__init__()
        self.percentile = _check_within("AutoClip", "percentile", percentile, 0.0, 100.0)
        self.history = _check_count("AutoClip", "history", history, 1)

    def begin(self, norms: Tensor) -> dict[str, Tensor]:
        return {"norms": norms.new_full((self.history,), math.inf)}

    def decide(self, norm: Tensor, norms: Tensor, state: dict[str, Tensor]) -> Decision:
        recent = _recorded(state["norms"], norm)
        limit = _percentile(recent, self.percentile)
        return Decision(to_at_most(limit, norm), state={"norms": recent})


class AdaGC(Policy):
    """Clips each gradient to a little above the moving average of its own clipped norms.

    During warmup the global norm is clipped, and each average is the least norm seen. A gradient of
    zeros, or none, leaves its average alone: the published rule would clip all later ones to 0.

    Args:
        relative: a norm may be this much of its average, > 0; the paper's lambda_rel.
        beta: weight of the past in the averages, in [0, 1].
        max_norm: bound of the global norm at first, >= 0; the paper's lambda_abs.
        warmup: steps at first, >= 0. With none, each average begins with the first norm.

    Source: Wang et al. 2025, "AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient
    Clipping", Algorithm 1.
    """

    def __init__(
        self, relative: float = 1.05, beta: float = 0.98, max_norm: float = 1.0, warmup: int = 100
    ) -> None:
        super().__init__()
        if not relative > 0.0:
            raise ValueError(f"AdaGC: relative must be > 0, got {relative}")
        self.relative = float(relative)
        self.beta = _check_within("AdaGC", "beta", beta, 0.0, 1.0)
        self.max_norm = check_nonnegative("AdaGC", "max_norm", max_norm)
        self.warmup = _check_count("AdaGC", "warmup", warmup, 0)

    def begin(self, norms: Tensor) -> dict[str, Tensor]:
        return {"steps": norms.new_zeros(()), "averages": torch.full_like(norms, math.inf)}

    def decide(self, norm: Tensor, norms: Tensor, state: dict[str, Tensor]) -> Decision:
        steps, averages = state["steps"], state["averages"]
        warm = steps >= self.warmup
        local = (self.relative * averages / norms.clamp(min=_TINY)).clamp(max=1.0)
        together = (self.max_norm / norm.clamp(min=_TINY)).clamp(max=1.0)
        coefficient = torch.where(warm, local, together)
        clipped = coefficient * norms
        known = torch.where(averages.isinf(), clipped, averages)
        moved = self.beta * known + (1.0 - self.beta) * clipped
        new = torch.where(warm, moved, averages.minimum(clipped))
        return Decision(
            coefficient,
            state={
                "steps": steps + 1.0,
                "averages": torch.where(clipped > 0.0, new, averages),
            },
        )


class SpikeSkip(Policy):
    """Skips a step whose norm is far above the recent ones.

    Norms of skipped steps are not remembered. After `patience` of them in a row the norms have
    moved for good: the step is taken, and the memory starts anew with its norm.

    Args:
        factor: a norm may be this much of the recent ones' median, >= 1.
        history: norms that are remembered, >= 1.
        warmup: norms from which on steps are left out, in [1, history].
        patience: steps in a row that may be left out, >= 1.
    """

    by_parameter = False

    def __init__(
        self, factor: float = 10.0, history: int = 100, warmup: int = 10, patience: int = 10
    ) -> None:
        super().__init__()
        self.factor = _check_within("SpikeSkip", "factor", factor, 1.0, math.inf)
        self.history = _check_count("SpikeSkip", "history", history, 1)
        self.warmup = _check_count("SpikeSkip", "warmup", warmup, 1)
        if self.warmup > self.history:
            raise ValueError(f"SpikeSkip: warmup must be <= history, {history}, got {warmup}")
        self.patience = _check_count("SpikeSkip", "patience", patience, 1)

    def begin(self, norms: Tensor) -> dict[str, Tensor]:
        return {
            "norms": norms.new_full((self.history,), math.inf),
            "left_out": norms.new_zeros(()),
        }

    def decide(self, norm: Tensor, norms: Tensor, state: dict[str, Tensor]) -> Decision:
        recent, left_out = state["norms"], state["left_out"]
        warm = recent[self.warmup - 1].isfinite()
        is_spike = warm & (norm > self.factor * _percentile(recent, 50.0))
        skip = is_spike & (left_out < self.patience)
        forgotten = torch.where(is_spike, math.inf, recent)
        return Decision(
            torch.ones_like(norm),
            skip,
            {
                "norms": torch.where(skip, recent, _recorded(forgotten, norm)),
                "left_out": torch.where(skip, left_out + 1.0, 0.0),
            },
        )
