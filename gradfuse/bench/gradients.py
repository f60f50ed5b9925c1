"""Gradients for a bench: made once, put back before every call, checked after the first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from gradfuse.bench.models import Shape

__all__ = ["Gradients", "random_gradients"]

CACHE = 64 << 20  # bytes: more than the caches of a desktop or a slice of a server hold


@dataclass
class Gradients:
    """Parameters with gradients, and a copy that restores the gradients before a call."""

    parameters: list[Parameter]
    flat: Tensor  # all gradients before a call, in one piece; the floor reads it
    restore: bool  # whether the calls change the gradients
    after: float  # norm that a call leaves

    @property
    def grads(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    @property
    def nbytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()

    def preparation(self) -> Callable[[], None]:
        """Restores the gradients, and drops large ones from the caches as a backward pass does."""
        grads = self.grads
        pieces = self.flat.split([g.numel() for g in grads])
        sources = [piece.view(g.shape) for piece, g in zip(pieces, grads, strict=True)]
        elsewhere = torch.zeros(2 * CACHE // 4, device=self.flat.device)

        def prepare() -> None:
            if self.restore:
                torch._foreach_copy_(grads, sources)
            if self.nbytes >= CACHE // 4:
                elsewhere.sum()
            synchronize(elsewhere.device)

        return prepare

    def verify(self) -> None:
        """Raises unless the gradients now have the norm that a call leaves them with."""
        norm = wide_norm(self.grads)
        if not math.isclose(norm, self.after, rel_tol=0.02):  # torch's bfloat16 norms are bfloat16
            raise RuntimeError(
                f"a contender left gradients of norm {norm:.6g}, expected {self.after:.6g}"
            )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wide_norm(tensors: Sequence[Tensor]) -> float:
    """L2 norm in float64."""
    blocks = (block for t in tensors for block in t.detach().reshape(-1).split(1 << 22))
    return math.sqrt(sum(float(block.double().square().sum()) for block in blocks))


def random_gradients(
    shapes: Sequence[Shape], dtype: torch.dtype, device: str, before: float, after: float
) -> Gradients:
    """Normally distributed gradients of norm `before`, to be clipped to norm `after`."""
    count = sum(math.prod(s) for s in shapes)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(min(count, 1 << 20), generator=generator)  # large enough to be repeated
    flat = block.repeat(-(-count // block.numel()))[:count]
    flat *= before / wide_norm([flat])
    flat = flat.to(device=device, dtype=dtype)
    # A clip never reads the parameters' values, so their memory is never touched.
    parameters = [Parameter(torch.empty(s, dtype=dtype, device=device)) for s in shapes]
    for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.view(p.shape).clone()
    return Gradients(parameters, flat, before > after, after)
