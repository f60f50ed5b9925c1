"""Helpers of the batch norm tests: inputs, the op in float64, comparisons with torch's error."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from helpers import random
from torch import Tensor

import gradfuse
from gradfuse.reference import ACTIVATIONS, activate

__all__ = ["ACTIVATIONS", "LAYOUTS", "Case", "assert_close", "run_ours", "run_torch"]

# (shape, channels last)
LAYOUTS = (
    ((6, 5), False),
    ((3, 5, 7), False),
    ((3, 17, 4, 5), False),
    ((3, 17, 4, 5), True),
    ((2, 3, 2, 3, 5), True),
    ((4, 1, 9, 9), False),
    ((4, 1, 9, 9), True),
    ((5, 40, 1, 1), False),
    ((2, 70, 15, 9), False),
    ((2, 70, 15, 9), True),
    ((2, 3, 70, 80), False),
)
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass
class Case:
    """A call of the op: its tensors, by name, and its options."""

    shape: tuple[int, ...]
    channels_last: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    residual: bool = True
    activation: str | None = "relu"
    training: bool = True
    options: dict = field(default_factory=lambda: {"momentum": 0.3, "eps": 1e-3})
    scale: float = 3.0
    offset: float = 1.0

    def __post_init__(self):
        channels = self.shape[1]
        wide = torch.promote_types(self.dtype, torch.float32)

        def like_input(seed, scale=1.0, offset=0.0):
            t = random(*self.shape, dtype=torch.float64, scale=scale, seed=seed) + offset
            t = t.to(self.dtype).to(self.device)
            return t.contiguous(memory_format=FORMATS[t.ndim]) if self.channels_last else t

        def vector(seed):
            return random(channels, dtype=wide, device=self.device, seed=seed)

        self.x = like_input(1, self.scale, self.offset)
        self.r = like_input(2) if self.residual else None
        self.grad = like_input(3)
        self.w, self.b, self.mean = vector(4), vector(5), vector(6)
        self.var = vector(7).abs() + 0.5


def _run(function, case: Case, dtype=None) -> dict[str, Tensor]:
    def leaf(t):
        if t is None:
            return None
        t = t.detach().clone(memory_format=torch.preserve_format)
        return t.to(dtype or t.dtype)

    x, r, w, b = (leaf(t) for t in (case.x, case.r, case.w, case.b))
    mean, var = leaf(case.mean), leaf(case.var)
    for t in (x, r, w, b):
        if t is not None:
            t.requires_grad_()
    y = function(x, r, w, b, mean, var)
    y.backward(leaf(case.grad))
    found = {"y": y.detach(), "x": x.grad, "w": w.grad, "b": b.grad, "mean": mean, "var": var}
    return found | ({} if r is None else {"r": r.grad})


def run_ours(case: Case, **options) -> dict[str, Tensor]:
    """The output, the gradients and the running statistics."""
    return _run(
        lambda x, r, w, b, mean, var: gradfuse.batch_norm_act(
            x, mean, var, w, b, residual=r, activation=case.activation, training=case.training,
            **case.options, **options,
        ),
        case,
    )  # fmt: skip


def run_torch(case: Case, dtype=None, negative_slope=0.01) -> dict[str, Tensor]:
    """The same results from torch's ops, computed in `dtype` if given."""

    def stock(x, r, w, b, mean, var):
        z = F.batch_norm(x, mean, var, w, b, case.training, **case.options)
        return activate(z if r is None else z + r, case.activation, negative_slope)

    return _run(stock, case, dtype)


def assert_close(ours: dict, truth: dict, theirs: dict, exact: float = 1e-12) -> None:
    """Each result's root mean square error is at most 4x torch's plus a few roundings.

    The gradients of weight and bias are sums over elements: the allowed rounding error grows with
    the square root of the number of elements.
    """
    elements = truth["y"].numel() / truth["y"].shape[1]
    for name, value in ours.items():
        t = truth[name].double()
        size = t.square().mean().sqrt().item()

        def error(v, t=t):
            return (v.double() - t).square().mean().sqrt().item()

        assert value.shape == t.shape
        assert value.isfinite().all() or not t.isfinite().all(), name
        eps = torch.finfo(ours["y"].dtype).eps
        rounding = exact if eps < 1e-12 else eps
        if name in ("w", "b"):
            rounding *= elements**0.5
        allowed = 4.0 * error(theirs[name]) + 2.0 * rounding * (size + 1e-30)
        if name in ("w", "b"):
            allowed += rounding * ours["x"].new_ones(()).item()
        assert error(value) <= allowed, f"{name}: error {error(value):.3g}, allowed {allowed:.3g}"
