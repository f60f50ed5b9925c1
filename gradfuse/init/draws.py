"""What an initialisation fills a tensor with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Draw", "constant"]


@dataclass(frozen=True)
class Draw:
    """Values for one tensor.

    Attributes:
        kind: "normal", "uniform", "orthogonal" or "constant".
        size: standard deviation; for "orthogonal" the singular values; or the constant.
        parts: factors of the size for equal parts along the first dimension, each drawn by itself.
        groups: for "orthogonal": groups of a convolution, each orthogonal by itself.
    """

    kind: str
    size: float
    parts: tuple[float, ...] = (1.0,)
    groups: int = 1

    def times(self, factor: float) -> Draw:
        """The same with another size."""
        return replace(self, size=self.size * factor)

    def values(
        self, shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator | None
    ) -> Tensor:
        """A tensor of the shape, drawn in float32, or in float64 for float64, on the generator's
        device. Complex numbers have independent parts of half the variance each."""
        if dtype.is_complex and self.kind != "constant":
            real = torch.float64 if dtype == torch.complex128 else torch.float32
            half = self.times(math.sqrt(0.5))
            pair = [half.values(shape, real, generator) for _ in range(2)]
            return torch.complex(*pair)
        own = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
        if len(self.parts) == 1 or not shape or shape[0] % len(self.parts):
            return self._one(shape, own, generator)
        part = (shape[0] // len(self.parts), *shape[1:])
        return torch.cat(
            [replace(self, size=self.size * f)._one(part, own, generator) for f in self.parts]
        )

    def _one(
        self, shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator | None
    ) -> Tensor:
        device = generator.device if generator is not None else torch.device("cpu")
        if self.kind == "constant" or self.size == 0:
            return torch.full(tuple(shape), self.size, dtype=dtype, device=device)
        if self.kind == "orthogonal" and len(shape) > 1:
            return self._orthogonal(shape, dtype, generator, device)
        out = torch.empty(tuple(shape), dtype=dtype, device=device)
        if self.kind == "uniform":
            bound = self.size * math.sqrt(3)
            return out.uniform_(-bound, bound, generator=generator)
        return out.normal_(0.0, self.size, generator=generator)

    def _orthogonal(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        generator: torch.Generator | None,
        device: torch.device,
    ) -> Tensor:
        """Orthonormal rows or columns, whichever are fewer, times the size: Saxe et al. 2014."""
        groups = self.groups if shape[0] % self.groups == 0 else 1
        rows, columns = shape[0] // groups, math.prod(shape[1:])
        blocks = []
        for _ in range(groups):
            flat = torch.empty((max(rows, columns), min(rows, columns)), dtype=dtype, device=device)
            flat.normal_(generator=generator)
            q, r = torch.linalg.qr(flat)
            q = q * torch.sign(torch.diagonal(r))  # uniform over all orthogonal matrices
            blocks.append(q if rows >= columns else q.T)
        return (self.size * torch.cat(blocks)).reshape(tuple(shape))


def constant(value: float) -> Draw:
    return Draw("constant", value)
