"""Batch norms with residual and activation: their tensors, ways to compute them, their floor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gradfuse
from gradfuse.bench.floor import Pass, flat_bytes, flat_view, move
from gradfuse.bench.models import NormSite
from gradfuse.ops.batch_norm_modes import check_renorm
from gradfuse.reference import DRIFT_ROWS

__all__ = [
    "Floor",
    "Norm",
    "Tensors",
    "bytes_moved",
    "check",
    "compiled",
    "eager",
    "fused",
    "in_mode",
    "native",
]

Norm = Callable[["Tensors"], Tensor]
EAGER, FUSED, SAVES_OUTPUT = "torch eager", "gradfuse", "gradfuse, save=output"
DROPS = "gradfuse, drop_path=0.1"
MODES: dict[str, dict[str, Any]] = {
    "renorm": {"renorm": (3.0, 5.0)},
    "ghost_size of a quarter": {"ghost_size": 4},  # quarters, see `fused`
    "momentum=auto": {"drift": True},
}
COLD = ", cold"  # ends the names of rows whose tensors are in no cache


class Tensors:
    """The tensors that a site reads. The leaves require gradients; x and residual are two of them.

    Attributes:
        grad: the gradient of the output.
    """

    def __init__(self, site: NormSite, dtype: torch.dtype, channels_last: bool) -> None:
        shape = site.shape
        generator = torch.Generator(torch.get_default_device()).manual_seed(sum(shape))
        form = torch.channels_last if channels_last else torch.contiguous_format

        def make() -> Tensor:
            t = torch.randn(*shape, generator=generator).to(dtype)
            return t.contiguous(memory_format=form)

        self.site = site
        self.x, self.grad = make().requires_grad_(), make()
        self.residual = make().requires_grad_() if site.has_residual else None
        self.weight = torch.ones(shape[1], requires_grad=True)
        self.bias = torch.zeros(shape[1], requires_grad=True)
        self.mean, self.var = torch.zeros(shape[1]), torch.ones(shape[1])

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        leaves = (self.x, self.residual, self.weight, self.bias)
        return tuple(t for t in leaves if t is not None)

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the leaves."""
        return torch.autograd.grad(y, self.leaves, self.grad)


def formula(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    has_activation: bool,
) -> Tensor:
    """What a site computes, in torch's ops."""
    y = F.batch_norm(x, mean, var, weight, bias, True)
    if residual is not None:
        y = y + residual
    return F.relu(y) if has_activation else y


def eager(t: Tensors) -> Tensor:
    return formula(t.x, t.mean, t.var, t.weight, t.bias, t.residual, t.site.has_activation)


def compiled() -> Norm:
    """torch.compile of the formula, which compiles for each shape."""
    torch._dynamo.config.cache_size_limit = 64
    f = torch.compile(formula, dynamic=False)

    def call(t: Tensors) -> Tensor:
        return f(t.x, t.mean, t.var, t.weight, t.bias, t.residual, t.site.has_activation)

    return call


def native(t: Tensors) -> Tensor:
    with torch.backends.cudnn.flags(enabled=False):
        return eager(t)


def in_mode(mode: str) -> Norm:
    """The same in a mode of MODES, with what its call needs."""
    ways: dict[int, Norm] = {}

    def call(t: Tensors) -> Tensor:
        if id(t) not in ways:
            options = dict(MODES[mode])
            if "ghost_size" in options:
                options["ghost_size"] = max(t.x.shape[0] // options["ghost_size"], 1)
            if "renorm" in options:  # checked once, as a module does
                options["renorm"] = check_renorm("bench", options["renorm"])
            if "drift" in options:
                options["drift"] = t.mean.new_zeros(DRIFT_ROWS, t.mean.numel())
            ways[id(t)] = fused("output", **options)
        return ways[id(t)](t)

    return call


def fused(save: str, drop_path: float = 0.0, **options: Any) -> Norm:
    """gradfuse's op, which saves this for the backward."""

    def call(t: Tensors) -> Tensor:
        return gradfuse.batch_norm_act(
            t.x,
            t.mean,
            t.var,
            t.weight,
            t.bias,
            residual=t.residual,
            activation="relu" if t.site.has_activation else None,
            training=True,
            save=save,
            drop_path=drop_path,
            **options,
        )

    return call


def check(t: Tensors, ways: dict[str, Norm]) -> None:
    """Raises unless all ways have eager's results, forward and backward."""
    # Near 0, another rounding than torch's makes relu pass or stop a gradient.
    tolerance = 1e-2 if t.x.dtype == torch.float32 else 0.1
    y = eager(t)
    expected = (y, *t.backward(y))
    for name, norm in ways.items():
        y = norm(t)
        for ours, theirs in zip((y, *t.backward(y)), expected, strict=True):
            difference = (ours.double() - theirs.double()).norm()
            if not difference <= tolerance * theirs.double().norm():
                raise RuntimeError(f"{name}: another result than {EAGER} on {tuple(t.x.shape)}")


class Floor:
    """The bytes of a site alone: each input is read once, each output written once.

    No implementation can do with less. One that goes over x twice, for its statistics and for its
    output, may find a part of x in the caches the second time, so the floor reads it once. The mask
    of relu, a bit per element, is left out.
    """

    def __init__(self, t: Tensors) -> None:
        given = (t.x,) if t.residual is None else (t.x, t.residual)
        self._given = [flat_view(leaf) for leaf in given]
        self._of_backward = [flat_view(t.grad), self._given[0]]
        self._y = flat_bytes(t.x.nbytes)
        self._grads = [flat_bytes(t.x.nbytes) for _ in given]

    def copy(self) -> None:
        """Copies x."""
        move(Pass(self._given[:1], [self._y]))

    def forward(self) -> None:
        move(Pass(self._given, [self._y]))

    def backward(self) -> None:
        move(Pass(self._of_backward, self._grads))

    def with_fresh_memory(self, backward: bool) -> list[Tensor]:
        """The same into memory that is allocated in the call, as an op that returns tensors has to.
        Returns what was written."""
        y = torch.empty_like(self._given[0])
        move(Pass(self._given, [y]))
        grads = [torch.empty_like(y) for _ in self._given] if backward else []
        if backward:
            move(Pass(self._of_backward, grads))
        return [y, *grads]


def bytes_moved(site: NormSite, dtype: torch.dtype, backward: bool) -> int:
    """The fewest bytes that must move: those of the floor, and of the mask."""
    numel = torch.Size(site.shape).numel()
    inputs = 2 if site.has_residual else 1
    tensors = inputs + 1 + (2 + inputs if backward else 0)
    mask = numel // 8 * (2 if backward else 1) if site.has_activation else 0
    return tensors * numel * dtype.itemsize + mask
