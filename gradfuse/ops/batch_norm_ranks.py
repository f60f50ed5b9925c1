"""batch_norm_act over the ranks of a process group: one all-gather of every rank's count, means and
squared deviations in the forward, one all-reduce of two sums a channel in the backward.

Collectives are torch's functional ones, which graphs record. They are called by their ops: each
wrapper of these in torch.distributed has another name in another torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradfuse import _native
from gradfuse._codes import Activation
from gradfuse._native import define_op
from gradfuse._records import BatchNormCall, BatchNormOptions, BatchNormSaved
from gradfuse.ops.checks import is_batched, is_transformed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Ranks", "backward_over_ranks", "check_group", "library_gradients", "together"]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_PLAIN = (Tensor, torch.nn.Parameter)


def check_group(op: str, process_group: Any) -> None:
    """TypeError if it is no ProcessGroup."""
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"{op}: process_group must be a ProcessGroup or None, got "
            f"{type(process_group).__name__}"
        )


class Ranks:
    """The ranks of one call, and whether this one has told the others of its batch."""

    def __init__(self, op: str, process_group: ProcessGroup) -> None:
        self.op = op
        self.group = process_group
        self.name = process_group.group_name
        self.size = dist.get_world_size(process_group)
        self.has_told = False

    @staticmethod
    def of(op: str, process_group: Any, training: bool) -> Ranks | None:
        """None where a call needs no other rank: in eval mode, or in a group of one.

        Raises:
            TypeError: process_group is no ProcessGroup.
        """
        check_group(op, process_group)
        if not training or not dist.is_initialized() or dist.get_world_size(process_group) == 1:
            return None
        return Ranks(op, process_group)

    def gathered(self, call: BatchNormCall) -> BatchNormCall:
        """The call with what all ranks told. Collective."""
        if _native.is_traced():
            row = torch.ops.gradfuse.batch_norm_statistics(call.input.detach())
        else:
            self._check(call)
            row = _native.backend.batch_norm_statistics(call)
        self.has_told = True
        return call._replace(gathered=self._gather(row), group=self.name)

    def refuse(self, channels: int, device: torch.device | None) -> None:
        """Tells the others, unless this rank has told them of its batch, that it takes no part. By
        default on the device where the group works."""
        if self.has_told:
            return
        self.has_told = True
        if device is None:
            device = dist.distributed_c10d._get_pg_default_device(self.group)
        self._gather(torch.full((1 + 2 * channels,), torch.nan, dtype=torch.float64, device=device))

    def _gather(self, row: Tensor) -> Tensor:
        ops = torch.ops._c10d_functional
        rows = ops.wait_tensor(ops.all_gather_into_tensor(row, self.size, self.name))
        gathered: Tensor = rows.view(self.size, -1)
        return gathered

    def _check(self, call: BatchNormCall) -> None:
        """Refuses what has no derivative here, and what the kernels do not take."""
        op, input = self.op, call.input
        if not isinstance(input, Tensor):
            raise TypeError(f"{op}: input must be a Tensor, got {type(input).__name__}")
        if is_transformed() or type(input) not in _PLAIN:
            raise TypeError(
                f"{op}: input must be a plain Tensor with a process_group, outside of torch.func, "
                f"got {type(input).__name__}"
            )
        if not (input.is_cpu or input.is_cuda):
            raise TypeError(f"{op}: input must be on the CPU or CUDA, got {input.device}")


def together(
    ranks: Ranks | None,
    given: Iterable[Tensor | None],
    call: Callable[[], Tensor],
    channels: int | None = None,
) -> Tensor:
    """call(), whose error is raised on the other ranks as well if they would wait for this one.

    Args:
        given: the call's input [N, C, ...] and vectors [C], one of which may be what is wrong.
        channels: of the other ranks. Default: what most of `given` have, the first of as many.
    """
    if ranks is None or torch.compiler.is_compiling():  # shapes are checked as a graph is made
        return call()
    try:
        return call()
    except Exception:
        there = [t for t in given if isinstance(t, Tensor) and t.ndim and (t.is_cpu or t.is_cuda)]
        if channels is None and there:
            found = Counter(t.shape[0 if t.ndim == 1 else 1] for t in there)
            channels = found.most_common(1)[0][0]
        if channels is not None:
            ranks.refuse(channels, there[0].device if there else None)
        raise


def _all_reduce(t: Tensor, group: str) -> Tensor:
    ops = torch.ops._c10d_functional
    total: Tensor = ops.wait_tensor(ops.all_reduce(t, "sum", group))
    return total


def backward_over_ranks(
    grad_output: Tensor,
    saved: BatchNormSaved,
    options: BatchNormOptions,
    wanted: Sequence[bool],
    group: str,
    count: Tensor,
    by_library: bool,
) -> Gradients:
    """The gradients of input, residual, weight and bias; None for those not wanted. Collective if
    that of the input is. Those of weight and bias are this rank's part.

    Args:
        count: [] float64, of a channel's values on all ranks.
        by_library: through the registered ops.

    Raises:
        RuntimeError: the gradients are to be differentiated again, or are batched by vmap.
    """
    if torch.is_grad_enabled() or is_batched(grad_output):
        raise RuntimeError(
            "batch_norm_act: expected a first derivative with a process_group, got create_graph or "
            "is_grads_batched"
        )
    ops = torch.ops.gradfuse
    grad_weight = grad_bias = None
    if wanted[0] or wanted[2] or wanted[3]:
        if by_library:
            sums = ops.batch_norm_gradient_sums(grad_output, *saved, *options)
        else:
            sums = _native.backend.batch_norm_gradient_sums(grad_output, saved, options)
        total, dot = sums
        if wanted[2] and saved.weight is not None:
            if saved.stats.shape[0] == 5:  # renormalisation's r and d
                r, d = saved.stats[3:].double()
                dot = r * dot + d * total
            grad_weight = dot.to(saved.weight.dtype)
        if wanted[3] and saved.bias is not None:
            grad_bias = total.to(saved.bias.dtype, copy=True)
        if wanted[0]:
            saved = saved._replace(means=_all_reduce(sums, group) / count)
    asked = [wanted[0], wanted[1], False, False]
    grads: Sequence[Tensor | None]
    if by_library:
        grads = library_gradients(grad_output, saved, options, asked)
    else:
        grads = _native.backend.batch_norm_backward(grad_output, saved, options, asked)
    return grads[0], grads[1], grad_weight, grad_bias


def library_gradients(
    grad_output: Tensor, saved: BatchNormSaved, options: BatchNormOptions, wanted: Sequence[bool]
) -> Gradients:
    """The gradients by the registered op."""
    # An op's results must not be its arguments, as an identity's residual gradient would be.
    is_identity = options.activation == Activation.NONE
    asked = [wanted[0], wanted[1] and not is_identity, wanted[2], wanted[3]]
    found = torch.ops.gradfuse.batch_norm_act_backward(grad_output, *saved, *options, asked)
    of_input, of_residual, of_weight, of_bias = (
        g if a else None for g, a in zip(found, asked, strict=True)
    )
    if wanted[1] and is_identity:
        of_residual = grad_output
    return of_input, of_residual, of_weight, of_bias


def _library_statistics(input: Tensor) -> Tensor:
    nothing = (None, None, None, None, None)
    call = BatchNormCall(input, *nothing, True, 0.0, 1.0, Activation.NONE, 0.0, False)
    row: Tensor = _native.backend.batch_norm_statistics(call)
    return row


def _fake_statistics(input: Tensor) -> Tensor:
    return input.new_empty(1 + 2 * input.shape[1], dtype=torch.float64)


def _library_sums(grad_output: Tensor, *rest: Any) -> Tensor:
    tensors = len(BatchNormSaved._fields)
    saved, options = BatchNormSaved(*rest[:tensors]), BatchNormOptions(*rest[tensors:])
    sums: Tensor = _native.backend.batch_norm_gradient_sums(grad_output, saved, options)
    return sums


def _fake_sums(grad_output: Tensor, *_: Any) -> Tensor:
    return grad_output.new_empty(2, grad_output.shape[1], dtype=torch.float64)


define_op("batch_norm_statistics(Tensor input) -> Tensor", _library_statistics, _fake_statistics)
define_op(
    "batch_norm_gradient_sums(Tensor grad_output, Tensor? input, Tensor? residual, Tensor? output,"
    " Tensor? mask, Tensor? weight, Tensor? bias, Tensor stats, Tensor? sample_scale,"
    " Tensor? means, bool channels_last, bool training,"
    " float eps, int activation, float negative_slope, int ghost_size) -> Tensor",
    _library_sums,
    _fake_sums,
)
