"""What one rank adds to an exact norm: an integer in limbs, which an all-reduce adds to the others.

Integer sums are associative, so the order in which a backend adds does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradfuse import _native
from gradfuse.distributed.ranks import Ranks

__all__ = ["RankLimbs", "limbs_of", "refused_ranks", "split_words", "words_of"]

# Words of a sum: its limbs, then the counts of inf and of NaN; csrc/math/limbs.h has the same.
_NARROW, _WIDE = 18, 109
_FIRST = 46  # the wide form's limb that is the narrow form's first
_BITS = 62  # ranks whose refusals share a word


class RankLimbs(NamedTuple):
    """The exact sum of some gradients of this rank."""

    limbs: Tensor  # int64 [18], or [109] if one is float64
    stats: Tensor  # [n, 5], see TensorStats


def limbs_of(op: str, tensors: list[Tensor], written: bool, wide: bool) -> RankLimbs:
    """The sum of a list; nothing is written.

    Raises:
        ValueError: a gradient is float64 and the ranks, who know only the parameters, did not
            expect any.
    """
    result = RankLimbs(*_native.backend.exact_limbs(op, tensors, written))
    if not wide and len(result.limbs) == _WIDE:
        raise ValueError(
            f"{op}: expected gradients of their parameters' dtypes with exact=True over ranks, got "
            "float64 ones where no parameter is"
        )
    return result


def words_of(
    results: Sequence[RankLimbs], ranks: Ranks, wide: bool, device: torch.device
) -> Tensor:
    """This rank's words and a bit for its refusal, for an all-reduce.

    Args:
        results: of the gradients that this rank counts and of its copies, which add only their
            counts of inf and NaN; nothing if the rank refused its gradients.
    """
    size = _WIDE if wide else _NARROW
    words = torch.zeros(size + -(-ranks.size // _BITS), dtype=torch.int64, device=device)
    if not results:
        words[size + ranks.position // _BITS] = 1 << ranks.position % _BITS
        return words
    counted, copies = (result.limbs.to(device) for result in results)
    first = _FIRST if len(counted) < size else 0
    words[first : first + len(counted) - 2] = counted[:-2]
    words[size - 2 : size] = counted[-2:] + copies[-2:]
    return words


def split_words(words: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    """The words of the sum over all ranks, and those of the refusals."""
    size = _WIDE if wide else _NARROW
    return words[:size], words[size:]


def refused_ranks(refusals: Tensor) -> list[int]:
    """The positions of the ranks that refused. On CUDA this waits."""
    return [
        _BITS * i + bit
        for i, word in enumerate(refusals.tolist())
        for bit in range(_BITS)
        if word >> bit & 1
    ]
