"""act(batch_norm(input) + residual) as one op, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from gradfuse import _native, reference
from gradfuse._codes import Activation, RowNorm
from gradfuse._native import define_op
from gradfuse._records import BatchNormCall, BatchNormOptions, BatchNormSaved
from gradfuse.ops.batch_norm_gradient import differentiable_backward
from gradfuse.ops.batch_norm_modes import NO_MODES, Modes, check_recomputed, checked_modes
from gradfuse.ops.batch_norm_ranks import Ranks, backward_over_ranks, library_gradients, together
from gradfuse.ops.checks import is_batched, is_transformed
from gradfuse.ops.drop_path import check_drop_mode, path_scale
from gradfuse.ops.row_norm import check_probability, dropout, run
from gradfuse.reference import MASKED, OUTPUT_SAVED

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "ACTIVATIONS",
    "LIBRARY_NAMES",
    "UPDATED",
    "batch_norm_act",
    "call_of",
    "check_activation",
    "library_arguments",
    "recomputing",
]

ACTIVATIONS = tuple(name for name in reference.ACTIVATIONS if name is not None)
_CODES = dict(zip(reference.ACTIVATIONS, Activation, strict=True))
_OP = "batch_norm_act"
_PLAIN = (Tensor, torch.nn.Parameter)
_NUMBERS = (Real, Tensor, torch.SymInt, torch.SymFloat)
_NO_MOMENTUM: tuple[type, ...] = (type(None), str)  # which modules have
_MASK = BatchNormCall._fields.index("wants_mask")
# The last inputs of the registered op, which torch leaves out where they are the default.
_DEFAULTS = (None, 0, None, None, None, None, None)
UPDATED = ("running_mean", "running_var", "drift")
_FIELDS = BatchNormCall._fields
LIBRARY_NAMES = (*_FIELDS[: _MASK + 1], "factor", *_FIELDS[_MASK + 1 :])  # of its inputs
_REQUIRED = len(LIBRARY_NAMES) - len(_DEFAULTS)
# torch's relu6 and leaky_relu keep their input, so that a later op may write to their output.
_WITH_MASK = (Activation.RELU6, Activation.LEAKY_RELU)

# The records from plain tuples, without a Python frame: eager calls take microseconds.
_call_from: Callable[[tuple[Any, ...]], BatchNormCall] = partial(tuple.__new__, BatchNormCall)
_saved_from: Callable[[tuple[Any, ...]], BatchNormSaved] = partial(tuple.__new__, BatchNormSaved)


def check_activation(op: str, activation: str | None) -> Activation:
    """The activation's code; ValueError if there is no such activation."""
    try:
        return _CODES[activation]
    except (KeyError, TypeError):
        names = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(f"{op}: activation must be None, {names}, got {activation!r}") from None


def recomputing() -> bool:
    """Whether a backward pass is running: a forward call is then a checkpoint's recomputation.

    False while torch.compile traces, which cannot know. Its own checkpointing runs no mutation
    twice; a compiled module inside an eager checkpoint counts its batch twice, as torch's do.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
    save: str = "bitmask",
    p: float = 0.0,
    drop_path: float = 0.0,
    drop_mode: str = "row",
    generator: torch.Generator | None = None,
    ghost_size: int | None = None,
    renorm: Sequence[float] | None = None,
    step: Tensor | None = None,
    drift: Tensor | None = None,
    process_group: ProcessGroup | Ranks | None = None,
) -> Tensor:
    """act(dropout(F.batch_norm(input, ...)) + residual).

    The batch's mean and variance come from float64 sums of differences from one element, so that a
    mean far from zero costs no digits. Elements are computed in float32 (float64 if input is) and
    rounded once. A checkpoint's recomputation, which runs inside a backward pass, leaves the
    running statistics alone because the first forward has counted the batch. A compiled function
    that an eager checkpoint calls cannot tell, and counts it twice.

    Args:
        input: [N, C, ...] Tensor of two or more dimensions; float16, bfloat16, float32 or float64.
            Contiguous and channels-last inputs are taken as they are, others through a copy.
        running_mean: [C] Tensor of any of these dtypes, or None when training.
        running_var: the same; the unbiased variance.
        weight: [C] Tensor or None for ones.
        bias: [C] Tensor or None for zeros.
        residual: Tensor of any strides and real dtype whose shape broadcasts with input's; may be
            input itself. The dtype of input + residual is that of the whole call: an input that is
            narrower is widened first, and the sum is of unrounded elements; gradients come back in
            each one's own dtype.
        activation: None, "relu", "relu6", "leaky_relu", "silu", "gelu", "gelu_tanh", "hardswish",
            "sigmoid" or "tanh".
        training: normalise with the batch's statistics and update the running ones, if given; else
            normalise with the running ones.
        momentum: weight of this batch in the running statistics; a float or a Tensor of one
            element, which is not waited for. Each ghost batch updates them in turn, by this number
            or by its own element of a Tensor.
        eps: added to the variance, > 0 when training.
        negative_slope: of "leaky_relu".
        save: what the backward of relu, relu6 and leaky_relu reads: "bitmask", one bit per element,
            or "output", which costs no memory where the output is kept anyway.
        p: probability that an element of the normalised input is dropped when training; those that
            stay are divided by 1 - p. The elements drop by their index as in `dropout_add`, which
            runs after the norm then.
        drop_path: probability that a sample of the normalised input is dropped when training; the
            others are divided by 1 - drop_path. What is dropped is selected, not multiplied.
        drop_mode: "row" draws for each sample, "batch" once for all.
        generator: of both. Default: that of input's device.
        ghost_size: normalise parts of the batch by their own statistics when training: as few as
            hold at most this many samples each, of sizes that differ by at most one.
        renorm: (r_max, d_max), >= 1 and >= 0, or (r_max, d_max, begin, r_end, d_end): correct the
            batch's statistics towards the running ones when training, z = h * r + d, within
            1 / r_max to r_max and -d_max to d_max. r and d are constants of the gradient. From step
            `begin` to r_end and d_end the limits rise from 1 and 0.
        step: int64 Tensor of one element, on input's device, for renorm's warm-up: the batches
            counted before. Default: the warm-up is over.
        drift: [4, C] Tensor, at first of zeros, that sets momentum from how the batches differ from
            the running statistics, and is updated with them (docs/batch_norm.md has the rule).
        process_group: ranks that train with the statistics of all their samples: each gives its own
            part, of any size, also 0, and of as many channels as the others'. All of them call
            this, and the backward where input needs a gradient. Gradients of weight and bias are
            this rank's. Only a first derivative.

    Returns:
        Tensor of input's shape and memory format, of input's dtype or the wider one of
        input + residual. A residual of a larger shape enlarges it: the add and the activation are
        then torch's own ops.

    Raises:
        ValueError: a shape, activation, save or eps is wrong; residual does not broadcast with
            input; running statistics are missing; there is one value per channel when training, on
            all ranks together; ghost_size comes with a process_group.
        TypeError: an argument is no tensor, sparse, of another dtype or on another device; residual
            is complex, sparse or on another device, unless it is a number without dimensions;
            process_group is no ProcessGroup.
        RuntimeError: running statistics are expanded, or a tensor's storage was freed; renorm in a
            checkpoint's recomputation, which comes after the update of what it corrects towards;
            another rank of the process_group refused its arguments, which on CUDA the others do
            not wait to hear: their results are NaN, their running statistics stay.

    Source: Ioffe, Szegedy 2015, "Batch Normalization", algorithms 1 and 2; He, Zhang, Ren, Sun
    2016, "Identity Mappings in Deep Residual Networks", figure 4(a); Ioffe 2017, "Batch
    Renormalization", algorithm 1; Hoffer, Hubara, Soudry 2017, "Train longer, generalize better",
    algorithm 1, for ghost batches; Chan, Golub, LeVeque 1983, equation 1.5, over ranks.
    """
    if process_group is not None and not isinstance(process_group, Ranks):
        ranks = Ranks.of(_OP, process_group, training)

        def on_this_rank() -> Tensor:
            if ghost_size is not None:
                raise ValueError(
                    f"{_OP}: ghost_size must be None with a process_group, because a ghost batch "
                    f"is a part of one rank's batch, got {ghost_size}"
                )
            return batch_norm_act(
                input, running_mean, running_var, weight, bias, residual=residual,
                activation=activation, training=training, momentum=momentum, eps=eps,
                negative_slope=negative_slope, save=save, p=p, drop_path=drop_path,
                drop_mode=drop_mode, generator=generator, renorm=renorm, step=step, drift=drift,
                process_group=ranks,
            )  # fmt: skip

        return together(ranks, (running_mean, running_var, input, weight, bias), on_this_rank)
    code = check_activation(_OP, activation)
    if save != "bitmask":
        _check_save(save, activation, negative_slope)
    if isinstance(momentum, _NO_MOMENTUM):
        raise TypeError(f"{_OP}: momentum must be a number or a Tensor of one, got {momentum!r}")
    modes: Modes = NO_MODES
    if training and (ghost_size is not None or renorm is not None or drift is not None):
        modes = checked_modes(input, running_mean, ghost_size, renorm, step, drift)
    scale = None
    if drop_path or p:
        _check_tensor("input", input)
        check_probability(_OP, "p", p)
        check_probability(_OP, "drop_path", drop_path)
        check_drop_mode(_OP, drop_mode)
        if drop_path and training:
            scale = path_scale(_OP, input, drop_path, drop_mode, generator)
        if training and (p or input.shape[1:2] == (1,)):
            # The mask of a single channel has a form that knows no samples.
            return _in_turn(
                input, running_mean, running_var, weight, bias, residual, activation, momentum,
                eps, negative_slope, p, scale, generator, modes, process_group,
            )  # fmt: skip
    if training and running_mean is not None and recomputing():
        running_mean = running_var = None
        modes = modes.recomputed()
    if residual is not None and residual is not input:
        _check_tensor("residual", residual)
        _check_tensor("input", input)
        if residual.dtype != input.dtype or residual.shape != input.shape:
            dtype, shape = _sum_of(residual, input)
            if shape != input.shape:
                _check_slope(activation, negative_slope)
                normalised = batch_norm_act(
                    input.to(dtype), running_mean, running_var, weight, bias, activation=None,
                    training=training, momentum=momentum, eps=eps, **modes.arguments(),
                    process_group=process_group,
                )  # fmt: skip
                normalised = reference.addend(normalised, None, 0.0, scale)
                return reference.activate(normalised + residual, activation, negative_slope)
            input = input.to(dtype)
            residual = residual.to(dtype).expand(shape)
    wants_mask = save == "bitmask" and activation in MASKED
    arguments = (
        input, residual, weight, bias, running_mean, running_var, training, momentum, eps, code,
        negative_slope,
    )  # fmt: skip
    if process_group is not None:
        call = process_group.gathered(BatchNormCall(*arguments, wants_mask, scale, *modes))
        return _through_library(call) if _native.is_traced() else _run(*call)
    if _native.is_traced():
        return _through_library(BatchNormCall(*arguments, wants_mask, scale, *modes))
    if is_transformed() or type(input) not in _PLAIN or not (input.is_cpu or input.is_cuda):
        _check_transformed(input, running_mean, training, eps)
        return reference.batch_norm_act(
            input, running_mean, running_var, weight, bias, residual=residual,
            activation=activation, training=training, momentum=momentum, eps=eps,
            negative_slope=negative_slope, sample_scale=scale, ghost_size=modes.ghost_size,
            renorm=modes.renorm, step=modes.step, drift=modes.drift,
        )  # fmt: skip
    return _run(*arguments, wants_mask, scale, *modes, None, None)


def _in_turn(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    momentum: float | Tensor,
    eps: float,
    negative_slope: float,
    p: float,
    scale: Tensor | None,
    generator: torch.Generator | None,
    modes: Modes,
    ranks: Ranks | None,
) -> Tensor:
    """Norm, dropout, add and activation one after the other, when training. Rounds once."""
    dtype = input.dtype
    _check_slope(activation, negative_slope)
    if residual is not None:
        _check_tensor("residual", residual)
        dtype = _sum_of(residual, input)[0]
    if dtype.is_floating_point:  # else batch_norm_act refuses it
        input = input.to(torch.promote_types(dtype, torch.float32))
    seed = None
    if p:  # before the norm, so that a generator's error leaves running statistics as they are
        scale, seed = dropout(_OP, input, p, True, scale, generator)
    normalised = batch_norm_act(
        input, running_mean, running_var, weight, bias, activation=None, training=True,
        momentum=momentum, eps=eps, **modes.arguments(), process_group=ranks,
    )  # fmt: skip
    if p:
        _, dropped = run(
            RowNorm.DROPOUT_ADD, normalised, None, None, None, scale, seed, normalised.shape[-1:],
            p, 0.0, 0.0, normalised.dtype, True,
        )  # fmt: skip
        if not normalised.is_contiguous():
            dropped = dropped.contiguous(memory_format=suggest_memory_format(normalised))
    else:
        dropped = reference.addend(normalised, None, 0.0, scale)
    total = dropped if residual is None else dropped + residual
    return reference.activate(total, activation, negative_slope).to(dtype)


def _run(*arguments: Any) -> Tensor:
    """Runs the call of these fields, with a gradient where one is wanted."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:4]):
        result: Tensor = _BatchNormAct.apply(*arguments)
        return result
    call = _call_from((*arguments[:_MASK], False, *arguments[_MASK + 1 :]))
    return _native.backend.batch_norm_forward(call)[0]


def _run_deferred(*arguments: Any) -> Tensor:
    """The same for an output that waited, whose activation came later and decides on the mask."""
    return _run(*arguments[:_MASK], arguments[9] in _WITH_MASK, *arguments[_MASK + 1 :])


def _check_save(save: str, activation: str | None, negative_slope: float) -> None:
    if save != "output":
        raise ValueError(f"{_OP}: save must be 'bitmask' or 'output', got {save!r}")
    if activation == "leaky_relu" and negative_slope < 0.0:
        raise ValueError(
            f"{_OP}: negative_slope must be >= 0 with save='output', which tells the sign of the "
            f"input no more, got {negative_slope}"
        )


def _check_slope(activation: str | None, negative_slope: object) -> None:
    """Where torch's own activation comes after the norm, too late for an error."""
    if activation == "leaky_relu" and not isinstance(negative_slope, _NUMBERS):
        raise TypeError(f"{_OP}: negative_slope must be a number, got {negative_slope!r}")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{_OP}: {name} must be a Tensor, got {type(value).__name__}")


def _sum_of(residual: Tensor, input: Tensor) -> tuple[torch.dtype, torch.Size]:
    """The dtype and shape of input + residual; an error if there is none, nothing being written."""
    dtype = torch.result_type(input, residual)
    if dtype.is_complex or residual.layout != torch.strided:
        raise TypeError(
            f"{_OP}: residual must be dense and real, got {residual.dtype} of {residual.layout}"
        )
    if residual.device != input.device and residual.ndim:
        raise TypeError(
            f"{_OP}: residual must be on input's device {input.device}, got {residual.device}"
        )
    sizes = zip(reversed(residual.shape), reversed(input.shape), strict=False)
    if any(r != i and r != 1 and i != 1 for r, i in sizes):
        raise ValueError(
            f"{_OP}: residual must broadcast to input's shape {list(input.shape)}, got "
            f"{list(residual.shape)}"
        )
    return dtype, torch.broadcast_shapes(residual.shape, input.shape)


def _check_transformed(
    input: Tensor, running_mean: Tensor | None, training: bool, eps: float
) -> None:
    _check_tensor("input", input)
    _check_statistics(running_mean, training)
    if not eps >= 0.0:
        raise ValueError(f"{_OP}: eps must be >= 0, got {eps}")


def _check_statistics(running_mean: Tensor | None, training: bool) -> None:
    if running_mean is None and not training:
        raise ValueError(
            f"{_OP}: running_mean and running_var must be given when not training, got None"
        )


def _save_for_backward(
    ctx: Any, call: BatchNormCall, output: Tensor, mask: Tensor, stats: Tensor
) -> None:
    """Keeps what the backward reads, of the Function's call and of the registered op's alike."""
    name = reference.ACTIVATIONS[call.activation]
    from_output = name in OUTPUT_SAVED or (name in MASKED and not call.wants_mask)
    from_input = name is not None and name not in MASKED and not from_output  # computes it again
    wants_weight = ctx.needs_input_grad[2]
    ctx.set_materialize_grads(False)
    ctx.group = call.group
    ctx.options = BatchNormOptions(
        not output.is_contiguous(), call.training, call.eps, call.activation, call.negative_slope,
        call.ghost_size,
    )  # fmt: skip
    ctx.save_for_backward(  # the fields of a BatchNormSaved
        call.input if call.training or wants_weight or from_input else None,
        call.residual if from_input else None,
        output if from_output else None,
        mask if call.wants_mask else None,
        call.weight,
        call.bias,
        stats,
        call.sample_scale,
        # Until the backward finds the means over ranks: what they are divided by.
        None if call.gathered is None else call.gathered[:, 0].sum(),
    )


class _BatchNormAct(torch.autograd.Function):
    """The eager call. Its arguments are the fields of a BatchNormCall: autograd sees no tensors
    inside one. setup_context would do, but torch binds defaults by `inspect` at each call then."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        call = _call_from(arguments)
        output, mask, stats = _native.backend.batch_norm_forward(call)
        _save_for_backward(ctx, call, output, mask, stats)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * len(BatchNormCall._fields)
        wanted = ctx.needs_input_grad[:4]
        saved = _saved_from(ctx.saved_tensors)
        if ctx.group is not None:
            grads = _over_ranks(ctx, grad_output, saved, by_library=False)
        elif torch.is_grad_enabled() or type(grad_output) not in _PLAIN or is_batched(grad_output):
            grads = differentiable_backward(grad_output, saved, ctx.options, wanted)
        else:
            grads = _native.backend.batch_norm_backward(grad_output, saved, ctx.options, wanted)
        return (*grads, *(None,) * (len(BatchNormCall._fields) - 4))


def _over_ranks(ctx: Any, grad_output: Tensor, saved: BatchNormSaved, by_library: bool) -> Any:
    count, saved = saved.means, saved._replace(means=None)
    assert count is not None
    return backward_over_ranks(
        grad_output, saved, ctx.options, ctx.needs_input_grad[:4], ctx.group, count, by_library
    )


def library_arguments(call: BatchNormCall) -> tuple[Any, ...]:
    """The arguments of the registered op, which takes a momentum of a tensor by itself."""
    call = call._replace(activation=int(call.activation))  # graphs hold no enums
    factor = None
    if isinstance(call.momentum, Tensor):
        call, factor = call._replace(momentum=0.0), call.momentum
    if call.renorm is not None:
        call = call._replace(renorm=[*call.renorm])
    return (*call[: _MASK + 1], factor, *call[_MASK + 1 :])


def _through_library(call: BatchNormCall) -> Tensor:
    """The call as an op without side effects, whose new running statistics torch writes."""
    results = torch.ops.gradfuse.batch_norm_act(*library_arguments(call))
    if call.training:
        updated = (call.running_mean, call.running_var, call.drift)
        for old, new in zip(updated, results[3:], strict=True):
            if old is not None:
                old.copy_(new)
    output: Tensor = results[0]
    return output


def call_of(inputs: Sequence[Any]) -> BatchNormCall:
    """The call that the registered op's inputs stand for."""
    given = (*inputs, *_DEFAULTS[len(inputs) - _REQUIRED :])
    call = _call_from((*given[: _MASK + 1], *given[_MASK + 2 :]))
    factor = given[_MASK + 1]
    return call if factor is None else call._replace(momentum=factor)


def _check_updated(call: BatchNormCall) -> None:
    """Checks the running statistics as the kernels do."""
    input, means, variances = call.input, call.running_mean, call.running_var
    if (means is None) != (variances is None):
        raise ValueError(
            f"{_OP}: running_mean and running_var must come together, got only "
            f"{'running_var' if means is None else 'running_mean'}"
        )
    for name, t in (("running_mean", means), ("running_var", variances)):
        if t is not None and t.shape != (input.shape[1],):
            raise ValueError(
                f"{_OP}: {name} must have one element per channel, [{input.shape[1]}], got "
                f"{list(t.shape)}"
            )


def _fake_forward(*inputs: Any) -> tuple[Tensor, ...]:
    call = call_of(inputs)
    input = call.input
    _check_statistics(call.running_mean, call.training)
    _check_updated(call)
    n, c = input.shape[:2]
    positions = input.shape[2:].numel()
    output = reference.output_like(input)
    mask_shape = [0]
    if call.wants_mask and input.numel():
        if c == 1 and not call.ghost_size:
            mask_shape = [1, (n * positions + 7) // 8]
        elif positions == 1 or not output.is_contiguous():
            mask_shape = [n * positions, (c + 7) // 8]
        else:
            mask_shape = [n * c, (positions + 7) // 8]
    return (
        output,
        input.new_empty(mask_shape, dtype=torch.uint8),
        input.new_empty(
            _stats_rows(call), c, dtype=torch.promote_types(input.dtype, torch.float32)
        ),
        *_updatable(call),
    )


def _stats_rows(call: BatchNormCall) -> int:
    rows = 3 if call.renorm is None else 5
    if not call.training or not call.ghost_size:
        return rows
    return rows * reference.ghost_batches(call.input.shape[0], call.ghost_size)


def _library_forward(*inputs: Any) -> tuple[Tensor, ...]:
    call = call_of(inputs)
    if call.renorm is not None and recomputing():
        check_recomputed(
            call.renorm
        )  # of a compiled function, which did not know when it was traced
    new = dict(zip(UPDATED, _updatable(call), strict=True))
    if call.training:
        given: dict[str, Any] = {n: t for n, t in new.items() if getattr(call, n) is not None}
        call = call._replace(**given)
    return (*_native.backend.batch_norm_forward(call), *new.values())


def _updatable(call: BatchNormCall) -> Iterator[Tensor]:
    """Copies of what the call updates; empty where it updates none."""
    for t in (getattr(call, name) for name in UPDATED):
        yield call.input.new_empty(0) if t is None or not call.training else t.clone()


def _backward_of(inputs: Sequence[Any]) -> tuple[Tensor, BatchNormSaved, BatchNormOptions]:
    """The registered backward's inputs, less the last."""
    grad_output, *rest = inputs
    tensors = len(BatchNormSaved._fields)
    return grad_output, BatchNormSaved(*rest[:tensors]), BatchNormOptions(*rest[tensors:])


def _library_backward(*inputs: Any) -> tuple[Tensor, ...]:
    *given, wanted = inputs
    grad_output, saved, options = _backward_of(given)
    grads = _native.backend.batch_norm_backward(grad_output, saved, options, wanted)
    return tuple(grad_output.new_empty(0) if g is None else g for g in grads)


def _fake_backward(*inputs: Any) -> tuple[Tensor, ...]:
    *given, wanted = inputs
    grad_output, saved, options = _backward_of(given)
    like = (
        grad_output.movedim(1, -1).contiguous().movedim(-1, 1)
        if options.channels_last
        else grad_output.contiguous()
    )
    c = grad_output.shape[1]
    shapes = (
        torch.empty_like(like),
        torch.empty_like(like),
        (grad_output if saved.weight is None else saved.weight).new_empty(c),
        (grad_output if saved.bias is None else saved.bias).new_empty(c),
    )
    return tuple(s if w else grad_output.new_empty(0) for s, w in zip(shapes, wanted, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _save_for_backward(ctx, call_of(inputs), *output[:3])


def _library_gradient(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * len(ctx.needs_input_grad)
    wanted, saved = ctx.needs_input_grad[:4], _saved_from(ctx.saved_tensors)
    grads: tuple[Tensor | None, ...]
    if ctx.group is not None:
        grads = _over_ranks(ctx, grad_output, saved, by_library=True)
    elif torch.is_grad_enabled():
        grads = differentiable_backward(grad_output, saved, ctx.options, wanted)
    else:
        grads = library_gradients(grad_output, saved, ctx.options, wanted)
    return (*grads, *(None,) * (len(ctx.needs_input_grad) - 4))


if _native.available:
    _native.backend.run_deferred_with(_run_deferred)

define_op(
    "batch_norm_act(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias,"
    " Tensor? running_mean, Tensor? running_var, bool training, float momentum, float eps,"
    " int activation, float negative_slope, bool wants_mask, Tensor? factor,"
    " Tensor? sample_scale=None, int ghost_size=0, float[]? renorm=None, Tensor? step=None,"
    " Tensor? drift=None, Tensor? gathered=None, str? group=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _library_forward,
    _fake_forward,
    backward=_library_gradient,
    setup_context=_setup_context,
)
define_op(
    "batch_norm_act_backward(Tensor grad_output, Tensor? input, Tensor? residual, Tensor? output,"
    " Tensor? mask, Tensor? weight, Tensor? bias, Tensor stats, Tensor? sample_scale,"
    " Tensor? means, bool channels_last, bool training,"
    " float eps, int activation, float negative_slope, int ghost_size, bool[4] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _library_backward,
    _fake_backward,
)
