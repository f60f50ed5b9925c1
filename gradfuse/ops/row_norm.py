"""Layer norm and RMS norm of residual + dropout(input) as one op, forward and backward.

The public functions are in layer_norm.py and rms_norm.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradfuse import _native, reference
from gradfuse._codes import RowNorm
from gradfuse._native import define_op
from gradfuse._records import RowNormCall, RowNormOptions, RowNormSaved
from gradfuse.ops.checks import is_batched, is_transformed

__all__ = [
    "add_norm", "addends", "check_probability", "draw_seed", "dropout", "forward_of_sum", "norm",
    "run", "with_gradient",
]  # fmt: skip

_PLAIN = (Tensor, torch.nn.Parameter)
_NARROW = (torch.float16, torch.bfloat16)
_NAMES = {int(op): op.name.lower() for op in RowNorm}  # Dynamo of torch 2.13 takes no enum

# The records from plain tuples, without a Python frame: eager calls take microseconds.
_call_from: Callable[[tuple[Any, ...]], RowNormCall] = partial(tuple.__new__, RowNormCall)
_options_from: Callable[[tuple[Any, ...]], RowNormOptions] = partial(tuple.__new__, RowNormOptions)
_saved_from: Callable[[tuple[Any, ...]], RowNormSaved] = partial(tuple.__new__, RowNormSaved)


def draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Key and offset of a dropout, int64 [2], from the generator or the device's default one.

    One op of torch, so that checkpoints, fork_rng, CUDA graphs and torch.compile replay it.
    """
    return torch.randint(0, 2**63 - 1, (2,), device=device, generator=generator)


def norm(
    op: RowNorm,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """The norm alone. Under CUDA's autocast it runs in float32, as torch's."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{_NAMES[int(op)]}: input must be a Tensor, got {type(input).__name__}")
    if input.is_cuda and input.dtype in _NARROW and torch.is_autocast_enabled("cuda"):
        input = input.float()
    output: Tensor = run(
        op, input, None, weight, bias, None, None, _shape(op, normalized_shape), 0.0, eps, 0.0,
        input.dtype, False,
    )[0]  # fmt: skip
    return output


def add_norm(
    op: RowNorm,
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    p: float,
    training: bool,
    prenorm: bool,
    residual_dtype: torch.dtype | None,
    sample_scale: Tensor | None,
    weight_offset: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor] | Tensor:
    """norm(residual + sample_scale * dropout(input)), and the sum itself if prenorm."""
    name = _NAMES[int(op)]
    input, sum_dtype = addends(name, input, residual, residual_dtype)
    sample_scale, seed = dropout(name, input, p, training, sample_scale, generator)
    results: tuple[Tensor, Tensor] = run(
        op, input, residual, weight, bias, sample_scale, seed, _shape(op, normalized_shape), p,
        eps, weight_offset, sum_dtype, prenorm,
    )  # fmt: skip
    return results if prenorm else results[0]


def _shape(op: RowNorm, normalized_shape: Sequence[int]) -> Sequence[int]:
    if isinstance(normalized_shape, int):
        return (normalized_shape,)
    if not isinstance(normalized_shape, Sequence):
        raise TypeError(
            f"{_NAMES[int(op)]}: normalized_shape must be an int or a sequence of ints, got "
            f"{type(normalized_shape).__name__}"
        )
    return normalized_shape


def addends(
    name: str, input: Tensor, residual: Tensor | None, sum_dtype: torch.dtype | None
) -> tuple[Tensor, torch.dtype]:
    """The input, widened if the sum is in float64, and the dtype of the sum."""
    for argument, value in (("input", input), ("residual", residual)):
        if not isinstance(value, Tensor) and (value is not None or argument == "input"):
            raise TypeError(f"{name}: {argument} must be a Tensor, got {type(value).__name__}")
    if residual is not None and residual.dtype.is_complex:
        raise TypeError(f"{name}: residual must be real, got {residual.dtype}")
    if sum_dtype is None:
        sum_dtype = input.dtype
        if residual is not None:
            sum_dtype = torch.promote_types(sum_dtype, residual.dtype)
    if torch.promote_types(input.dtype, sum_dtype) == torch.float64:
        input = input.double()
    return input, sum_dtype


def check_probability(op: str, name: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{op}: {name} must lie between 0 and 1, got {value}")
    return value


def dropout(
    name: str,
    input: Tensor,
    p: float,
    training: bool,
    sample_scale: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The scale of each sample and the seed of the dropout; None where there is none."""
    check_probability(name, "p", p)
    if sample_scale is not None:
        sample_scale = _of_samples(name, sample_scale, input)
    if p == 0.0 or not training:
        return sample_scale, None
    return sample_scale, draw_seed(input.device, generator)


def _of_samples(name: str, sample_scale: Tensor, input: Tensor) -> Tensor:
    """A scale of [N] or [N, 1, ...] as [N]."""
    if not isinstance(sample_scale, Tensor):
        raise TypeError(f"{name}: sample_scale must be a Tensor, got {type(sample_scale).__name__}")
    n = input.shape[:1]
    if not n:
        return sample_scale  # the input will be refused
    if sample_scale.shape[:1] != n or sample_scale.numel() != n.numel():
        raise ValueError(
            f"{name}: sample_scale must have a number for each of input's samples, "
            f"{list(n)} or [N, 1, ...], got {list(sample_scale.shape)}"
        )
    return sample_scale.reshape(-1)


def run(*arguments: Any) -> tuple[Any, Any]:
    """(output, sum) of the call of these fields; None for a sum that is not kept, or without a
    norm."""
    call = _call_from(arguments)
    input, scale = call.input, call.sample_scale
    has_own_gradient = scale is not None and scale.requires_grad  # which the kernels lack
    if _native.is_traced() and not has_own_gradient:
        return _through_library(call)
    if (
        is_transformed()
        or type(input) not in _PLAIN
        or not (input.is_cpu or input.is_cuda)
        or has_own_gradient
    ):
        reference.check_row_norm(call)
        found = reference.row_norm(call)
        return found if call.keeps_sum else (found[0], None)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[1:5]):
        result: tuple[Tensor, Tensor | None] = _RowNorm.apply(call, *arguments[1:5])
        return result
    output, kept, _ = _native.backend.row_norm_forward(call)
    return output, input if kept is None and call.keeps_sum else kept


def _save_for_backward(
    ctx: Any, call: RowNormCall, total: Tensor | None, stats: Tensor | None
) -> None:
    """Keeps what the backward reads, of the Function's call and of the registered op's alike."""
    is_norm = call.op != RowNorm.DROPOUT_ADD
    is_input = total is None and _is_input(call)
    again = total is None and not is_input  # the backward adds input and residual again
    ctx.set_materialize_grads(False)
    residual_dtype = None if call.residual is None else call.residual.dtype
    ctx.options = _options_from((
        call.op, call.p, call.eps, call.weight_offset, len(call.normalized_shape),
        call.input.dtype, residual_dtype, call.sum_dtype,
    ))  # fmt: skip
    ctx.save_for_backward(  # the fields of a RowNormSaved
        (call.input if is_input else total) if is_norm else None,
        call.input if again else None,
        call.residual if again else None,
        call.weight,
        call.bias,
        call.sample_scale,
        call.seed,
        stats if is_norm else None,
    )


def _is_input(call: RowNormCall) -> bool:
    """Whether the sum is the input itself."""
    nothing = call.residual is None and call.sample_scale is None and call.seed is None
    return nothing and call.sum_dtype == call.input.dtype


class _RowNorm(torch.autograd.Function):
    """The eager call. Autograd sees no tensors inside a record, so those that may have a gradient
    come beside it."""

    @staticmethod
    def forward(
        ctx: Any, call: RowNormCall, *_: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        output, total, stats = _native.backend.row_norm_forward(call)
        _save_for_backward(ctx, call, total, stats)
        return output, call.input if total is None and call.keeps_sum else total

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grads = _gradients(
            grad_output, grad_sum, _saved_from(ctx.saved_tensors), ctx.options,
            ctx.needs_input_grad[1:5],
        )  # fmt: skip
        return (None, *grads)


def forward_of_sum(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(output, sum, stats) of a norm of a sum, without a gradient, which `with_gradient` adds."""
    output, total, stats = _native.backend.row_norm_forward(_call_from(arguments))
    assert output is not None
    assert total is not None
    assert stats is not None
    return output, total, stats


def with_gradient(
    op: RowNorm,
    output: Tensor,
    stats: Tensor,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    dims: int,
) -> Tensor:
    """The output of a norm of the sum, computed already, as a function of sum, weight and bias."""
    if not torch.is_grad_enabled():
        return output
    dtype = total.dtype
    options = _options_from((op, 0.0, eps, weight_offset, dims, dtype, None, dtype))
    result: Tensor = _Computed.apply((output, stats, options), total, weight, bias)
    return result


class _Computed(torch.autograd.Function):
    """A norm whose output came with that of the sum before it."""

    @staticmethod
    def forward(ctx: Any, computed: Any, *tensors: Tensor | None) -> Tensor:
        output, stats, ctx.options = computed
        total, weight, bias = tensors
        ctx.save_for_backward(total, None, None, weight, bias, None, None, stats)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        of_sum, *of_parameters = ctx.needs_input_grad[1:]
        grads = _gradients(
            grad_output, None, _saved_from(ctx.saved_tensors), ctx.options,
            (of_sum, False, *of_parameters),
        )  # fmt: skip
        return (None, grads[0], *grads[2:])


def _gradients(
    grad_output: Tensor | None,
    grad_sum: Tensor | None,
    saved: RowNormSaved,
    options: RowNormOptions,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    if grad_output is None and grad_sum is None:
        return None, None, None, None
    if torch.is_grad_enabled() or not (_is_plain(grad_output) and _is_plain(grad_sum)):
        return _differentiable_backward(grad_output, grad_sum, saved, options, wanted)
    grads: tuple[Tensor | None, ...] = _native.backend.row_norm_backward(
        grad_output, grad_sum, saved, options, wanted
    )
    return grads


def _is_plain(grad: Tensor | None) -> bool:
    return grad is None or (type(grad) in _PLAIN and not is_batched(grad))


def _differentiable_backward(
    grad_output: Tensor | None,
    grad_sum: Tensor | None,
    saved: RowNormSaved,
    options: RowNormOptions,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients by torch's own ops, so that they can be differentiated again."""
    wide = torch.promote_types(options.dtype, torch.float32)
    grad = None if grad_sum is None else grad_sum.to(wide)
    of_weight = of_bias = None
    if grad_output is not None:
        through_norm, of_weight, of_bias = _norm_backward(
            grad_output.to(wide), _sum_of(saved, options).to(wide), saved, options
        )
        grad = through_norm if grad is None else grad + through_norm
    assert grad is not None
    of_input = reference.addend(grad, saved.seed, options.p, saved.sample_scale)
    of_residual = None
    if options.residual_dtype is not None:
        of_residual = grad.to(options.residual_dtype)
    grads = (of_input.to(options.dtype), of_residual, of_weight, of_bias)
    return tuple(g if asked else None for g, asked in zip(grads, wanted, strict=True))


def _sum_of(saved: RowNormSaved, options: RowNormOptions) -> Tensor:
    """The sum that the forward kept, or computed again as a function of the addends."""
    if saved.sum is not None:
        return saved.sum
    assert saved.input is not None
    wide = torch.promote_types(options.dtype, torch.float32)
    total = reference.addend(saved.input.to(wide), saved.seed, options.p, saved.sample_scale)
    if saved.residual is not None:
        total = total + saved.residual.to(wide)
    return total.to(options.sum_dtype)


def _norm_backward(
    g_out: Tensor, s: Tensor, saved: RowNormSaved, options: RowNormOptions
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of the sum, weight and bias, whose statistics are functions of the sum."""
    dims = list(range(-options.dims, 0))
    rows = list(range(s.ndim - options.dims))
    assert saved.stats is not None
    scale = saved.stats[:, 3].to(s.dtype).reshape([*s.shape[: len(rows)], *[1] * len(dims)])
    s = s * scale
    is_centred = RowNorm(options.op).is_centred
    if is_centred:
        s = s - s.mean(dims, keepdim=True)
    deviation = (s.square().mean(dims, keepdim=True) + options.eps * scale * scale).sqrt()
    h = s / deviation
    g = g_out
    if saved.weight is not None:
        g = g * (saved.weight.to(g.dtype) + options.weight_offset)
    grad = g - h * (g * h).mean(dims, keepdim=True)
    if is_centred:
        grad = grad - g.mean(dims, keepdim=True)

    def parameter(t: Tensor | None, grads: Tensor) -> Tensor | None:
        return None if t is None else (grads.sum(rows) if rows else grads).to(t.dtype)

    return (
        grad / deviation * scale,
        parameter(saved.weight, g_out * h),
        parameter(saved.bias, g_out),
    )


def _through_library(call: RowNormCall) -> tuple[Tensor | None, Tensor | None]:
    """The registered op. An op's results must not be its arguments, as a sum that is the input."""
    if call.op == RowNorm.DROPOUT_ADD:
        return None, torch.ops.gradfuse.row_norm(*call)[1]
    is_input = _is_input(call)
    kept = call._replace(keeps_sum=call.keeps_sum and not is_input)
    output, total, _ = torch.ops.gradfuse.row_norm(*kept)
    if not call.keeps_sum:
        return output, None
    return output, call.input if is_input else total


def _library_forward(*inputs: Any) -> tuple[Tensor, ...]:
    call = RowNormCall(*inputs)
    results = _native.backend.row_norm_forward(call)
    return tuple(call.input.new_empty(0) if t is None else t for t in results)


def _fake_forward(*inputs: Any) -> tuple[Tensor, ...]:
    call = RowNormCall(*inputs)
    input, width = call.input, 1
    reference.check_row_norm(call)
    for size in call.normalized_shape:
        width = width * size
    like = torch.empty_like(input, memory_format=torch.contiguous_format)
    total = torch.empty_like(like, dtype=call.sum_dtype) if call.keeps_sum else like.new_empty(0)
    if call.op == RowNorm.DROPOUT_ADD:
        return like.new_empty(0), total, like.new_empty(0)
    rows = 0 if isinstance(width, int) and width == 0 else input.numel() // width
    stats = input.new_empty(rows, 4, dtype=torch.promote_types(input.dtype, torch.float32))
    return like, total, stats


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = RowNormCall(*inputs)
    ctx.mark_non_differentiable(output[2])
    ctx.returned = call.op != RowNorm.DROPOUT_ADD, call.keeps_sum
    _save_for_backward(ctx, call, output[1] if call.keeps_sum else None, output[2])


def _library_gradient(
    ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    wanted, saved = ctx.needs_input_grad[1:5], _saved_from(ctx.saved_tensors)
    grad_output, grad_sum = (
        g if is_returned else None
        for g, is_returned in zip((grad_output, grad_sum), ctx.returned, strict=True)
    )
    grads: tuple[Tensor | None, ...] = (None,) * 4
    if torch.is_grad_enabled():
        grads = _gradients(grad_output, grad_sum, saved, ctx.options, wanted)
    elif grad_output is not None or grad_sum is not None:
        found = torch.ops.gradfuse.row_norm_backward(
            grad_output, grad_sum, *saved, *ctx.options, list(wanted)
        )
        grads = tuple(g if asked else None for g, asked in zip(found, wanted, strict=True))
        if wanted[0] and wanted[1] and _is_shared(saved, ctx.options):
            grads = (grads[0], grads[0], *grads[2:])
    return (None, *grads, *(None,) * (len(RowNormCall._fields) - 5))


def _is_shared(saved: RowNormSaved, options: RowNormOptions) -> bool:
    """Whether input and residual have one gradient, which an op must not return twice."""
    plain = saved.seed is None and saved.sample_scale is None
    return plain and options.residual_dtype == options.dtype


def _backward_of(
    inputs: Sequence[Any],
) -> tuple[Tensor | None, Tensor | None, RowNormSaved, RowNormOptions, list[bool]]:
    """The registered backward's inputs."""
    grad_output, grad_sum, *rest, wanted = inputs
    n = len(RowNormSaved._fields)
    return grad_output, grad_sum, RowNormSaved(*rest[:n]), RowNormOptions(*rest[n:]), wanted


def _library_backward(*inputs: Any) -> tuple[Tensor, ...]:
    grad_output, grad_sum, saved, options, wanted = _backward_of(inputs)
    if wanted[0] and _is_shared(saved, options):
        wanted = [True, False, *wanted[2:]]
    grads = _native.backend.row_norm_backward(grad_output, grad_sum, saved, options, wanted)
    like = _either(grad_output, grad_sum)
    return tuple(like.new_empty(0, dtype=options.dtype) if g is None else g for g in grads)


def _either(a: Tensor | None, b: Tensor | None) -> Tensor:
    given = a if a is not None else b
    assert given is not None
    return given


def _fake_backward(*inputs: Any) -> tuple[Tensor, ...]:
    grad_output, grad_sum, saved, options, wanted = _backward_of(inputs)
    like = torch.empty_like(
        _either(grad_output, grad_sum), dtype=options.dtype, memory_format=torch.contiguous_format
    )
    weight, bias = saved.weight, saved.bias
    has_residual = options.residual_dtype is not None and wanted[1]
    if wanted[0] and _is_shared(saved, options):
        has_residual = False
    through_norm = grad_output is not None
    return tuple(
        like.new_empty(0) if of is None else torch.empty_like(of, dtype=dtype)
        for of, dtype in (
            (like if wanted[0] else None, options.dtype),
            (like if has_residual else None, options.residual_dtype),
            (weight if wanted[2] and through_norm else None, None),
            (bias if wanted[3] and through_norm else None, None),
        )
    )


define_op(
    "row_norm(int op, Tensor input, Tensor? residual, Tensor? weight, Tensor? bias,"
    " Tensor? sample_scale, Tensor? seed, SymInt[] normalized_shape, float p, float eps,"
    " float weight_offset, ScalarType sum_dtype, bool keeps_sum) -> (Tensor, Tensor, Tensor)",
    _library_forward,
    _fake_forward,
    backward=_library_gradient,
    setup_context=_setup_context,
)
define_op(
    "row_norm_backward(Tensor? grad_output, Tensor? grad_sum, Tensor? sum, Tensor? input,"
    " Tensor? residual, Tensor? weight, Tensor? bias, Tensor? sample_scale, Tensor? seed,"
    " Tensor? stats, int op, float p, float eps, float weight_offset, int dims, ScalarType dtype,"
    " ScalarType? residual_dtype, ScalarType sum_dtype, bool[4] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _library_backward,
    _fake_backward,
)
