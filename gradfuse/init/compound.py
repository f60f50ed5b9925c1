"""Ops that do several things at once, as the ops of torch that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gradfuse import reference
from gradfuse._codes import RowNorm
from gradfuse._records import RowNormCall
from gradfuse.ops.batch_norm import call_of

__all__ = ["PARTS_OF"]


def _batch_norm_act(args: Sequence[Any]) -> list[Tensor]:
    call = call_of(args)
    running = (None, None) if call.training else (call.running_mean, call.running_var)
    out = F.batch_norm(call.input, *running, call.weight, call.bias, call.training, eps=call.eps)
    if call.residual is not None:
        out = out + call.residual
    return [reference.activate(out, reference.ACTIVATIONS[call.activation], call.negative_slope)]


def _row_norm(args: Sequence[Any]) -> list[Tensor]:
    call = RowNormCall(*args)
    total = call.input if call.residual is None else call.residual + call.input
    if call.op == RowNorm.DROPOUT_ADD:
        return [total, total]
    weight = call.weight
    if weight is not None and call.weight_offset:
        weight = weight + call.weight_offset
    shape = list(call.normalized_shape)
    if RowNorm(call.op).is_centred:
        return [F.layer_norm(total, shape, weight, call.bias, call.eps), total]
    return [F.rms_norm(total, shape, weight, call.eps), total]


def _addcmul(args: Sequence[Any]) -> list[Tensor]:
    input, first, second = args
    return [input + first * second]


# By name, the first results of an op as ops whose part in the model can be told. What a dropout
# or a dropped path leaves out does not matter: models are recorded in eval mode.
PARTS_OF: dict[str, Callable[[Sequence[Any]], list[Tensor]]] = {
    "addcmul": _addcmul,
    "batch_norm_act": _batch_norm_act,
    "row_norm": _row_norm,
}
