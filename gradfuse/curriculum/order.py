"""The order of samples by their difficulty."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import torch

__all__ = ["classes_of", "easiest_first", "numbers"]


def numbers(op: str, name: str, values: Any) -> np.ndarray:
    """A copy of values in float64; ValueError unless they are real numbers in one dimension."""
    got = type(values).__name__
    with suppress(TypeError, ValueError, RuntimeError, OverflowError):
        tensor = torch.as_tensor(values).detach()
        if tensor.dim() == 1 and not tensor.is_complex():
            array: np.ndarray = tensor.double().numpy(force=True).copy()
            return array
        got = f"shape {tuple(tensor.shape)} of {tensor.dtype}"
    raise ValueError(f"{op}: {name} must be real numbers in one dimension, got {got}")


def classes_of(op: str, labels: Any, samples: int) -> np.ndarray:
    """The labels as whole numbers from 0."""
    array = np.asarray(labels.numpy(force=True) if isinstance(labels, torch.Tensor) else labels)
    if array.shape != (samples,) or array.dtype.kind not in "biuUS":
        raise ValueError(
            f"{op}: labels must be {samples} integers or strings, got shape {array.shape} of "
            f"{array.dtype}"
        )
    classes: np.ndarray = np.unique(array, return_inverse=True)[1]
    return classes


def easiest_first(
    difficulty: np.ndarray,  # [N]
    classes: np.ndarray | None,  # [N], whole numbers from 0
    shuffled: np.ndarray,  # [N], a permutation
) -> np.ndarray:
    """All samples, easiest first; equal ones in the order of `shuffled`.

    With classes each beginning of the order has the same share of every class, up to a sample.
    """
    order: np.ndarray = shuffled[np.argsort(difficulty[shuffled], kind="stable")]
    if classes is None:
        return order
    # The k-th easiest of a class of n is at (k + 1/2) / n, whatever its difficulty.
    ordered = classes[order]
    counts = np.bincount(ordered)
    place = np.empty(len(order))
    place[np.argsort(ordered, kind="stable")] = np.concatenate([np.arange(n) for n in counts])
    return order[np.argsort((place + 0.5) / counts[ordered], kind="stable")]
