"""What the ops ask of the tensors that they are given, as csrc does."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
}


class Access(Enum):
    """What a caller does with a list of gradients, as in csrc/tensor/grad_list.h."""

    READ = auto()
    READ_ONCE = auto()
    WRITE = auto()


class GradList(NamedTuple):
    """Checked gradients."""

    each: list[tuple[int, Tensor]]  # (row, gradient; of a sparse one, its values)
    repeats: list[tuple[int, int]]  # (row, that of the same gradient)


def magnitudes(x: Tensor) -> Tensor:
    """|x| as float64, of the same shape."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64).abs()


def read_tensors(op: str, tensors: Tensor | Iterable[Tensor], of_grad: bool) -> list[Tensor | None]:
    """The tensors, or their gradients, None where there is none."""
    items = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for i, t in enumerate(items):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: expected tensors, got {type(t).__name__} for tensor {i}")
    return [t.grad if of_grad else t for t in items]


def layout_of(x: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions in order of stride, adjoining ones as one."""
    dims: list[tuple[int, int]] = []
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if dims and dims[-1][0] * dims[-1][1] == stride:
            dims[-1] = (dims[-1][0], dims[-1][1] * size)
        else:
            dims.append((stride, size))
    return dims


def coalesced_values(t: Tensor) -> Tensor:
    """The values of a sparse tensor, one for each index, which share its memory."""
    if not t.is_coalesced():
        t.data = t.coalesce()
    return t._values()


def check_gradients(op: str, tensors: list[Tensor | None], access: Access) -> GradList:
    """Every gradient, a repeated one once unless access is READ."""
    writes = access is Access.WRITE
    found = GradList([], [])
    seen: dict[int, tuple[int, object]] = {}
    for i, t in enumerate(tensors):
        if t is None:
            continue
        if not t.is_nested and t.layout == torch.sparse_coo:
            t = coalesced_values(t)
        if t.dtype not in _DTYPES:
            raise TypeError(
                f"{op}: expected float16, bfloat16, float32, float64, complex64 or complex128, "
                f"got {t.dtype} for tensor {i}"
            )
        if t.is_nested or t.layout != torch.strided:
            raise TypeError(
                f"{op}: expected dense gradients, got layout {t.layout} for tensor {i}; "
                "convert it with .to_dense() or clip it apart"
            )
        if t.device.type == "meta":
            raise TypeError(f"{op}: expected gradients with memory, got meta for tensor {i}")
        if t.numel() == 0:
            found.each.append((i, t))
            continue
        if type(t) in (Tensor, torch.nn.Parameter):
            last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            needed = (t.storage_offset() + last + 1) * t.element_size()
            if t.untyped_storage().nbytes() < needed:
                raise RuntimeError(
                    f"{op}: expected storage of at least {needed} bytes, got "
                    f"{t.untyped_storage().nbytes()} for tensor {i}; was it resized or freed?"
                )
        if writes and any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True)):
            raise RuntimeError(
                f"{op}: expected gradients with an element per memory location, got an expanded "
                f"one for tensor {i}; .clone() it first"
            )
        if access is not Access.READ:
            address = t.data_ptr() if type(t) in (Tensor, torch.nn.Parameter) else id(t)
            extent = (t.dtype, t.numel(), layout_of(t))
            first, known = seen.setdefault(address, (i, extent))
            if first != i and known == extent:
                found.repeats.append((i, first))
                continue
            if first != i and writes:
                raise RuntimeError(
                    f"{op}: expected gradients that do not overlap in memory, got one that begins "
                    f"where another does for tensor {i}; .clone() it first"
                )
        found.each.append((i, t))
    return found
