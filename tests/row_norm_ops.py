"""The registry's entries of layer norm and RMS norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from helpers import REAL, random
from registry import Bad, Op, Outcome, Sample, Traffic, Wrap, as_it_is, bad_call, leaf_of
from torch import Tensor

import gradfuse
from gradfuse import reference
from gradfuse._codes import RowNorm
from gradfuse.ops.row_norm import draw_seed

LEAVES = ("x", "r", "w", "b")
SEED = 11
ONES = torch.ones


def row_norm_sample(
    shape: Sequence[int], width: int = 1, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", *, residual: torch.dtype | None = None,
    parameter: torch.dtype | None = None, bias: bool = True, scale: bool = False,
    offset: float = 1.0, **options: Any,
) -> Sample:  # fmt: skip
    """A call over the last `width` dimensions, with the gradients of its results."""

    def map_of(seed: int, of: torch.dtype = dtype, offset: float = 0.0) -> Tensor:
        return (random(*shape, dtype=torch.float64, seed=seed) + offset).to(of).to(device)

    def vector(seed: int) -> Tensor:
        of = torch.promote_types(dtype, torch.float32) if parameter is None else parameter
        return random(*shape[-width:], dtype=torch.float64, seed=seed).to(of).to(device)

    sum_dtype = options.get("residual_dtype") or dtype
    if residual is not None and "residual_dtype" not in options:
        sum_dtype = torch.promote_types(dtype, residual)
    tensors = {"x": map_of(1, offset=offset), "grad of y": map_of(3), "w": vector(4)}
    if bias:
        tensors["b"] = vector(5)
    if residual is not None:
        tensors["r"] = map_of(2, residual)
    if options.get("prenorm", False):
        tensors["grad of s"] = map_of(6, sum_dtype)
    if scale:
        tensors["scale"] = torch.tensor([0.0, 1.25, 1.0, 2.0] * shape[0])[: shape[0]].to(device)
    return Sample(tensors, {"normalized_shape": tuple(shape[-width:])} | options)


def through_backward(
    function: Callable[[Sample, dict[str, Tensor]], Any],
) -> Callable[..., Outcome]:
    """The results and the gradients of a call of function, with the same random numbers."""

    def run(sample: Sample, wrap: Wrap = as_it_is) -> Outcome:
        t = sample.tensors
        leaves = {name: leaf_of(t[name]) for name in LEAVES if name in t}
        torch.manual_seed(SEED)
        results = wrap(lambda: function(sample, leaves))()
        results = results if isinstance(results, tuple) else (results,)
        torch.autograd.backward(results, [t["grad of y"], t.get("grad of s")][: len(results)])
        grads = {name: leaf.grad for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
        return dict(zip("ys", (r.detach() for r in results), strict=False)) | grads

    return run


def ours_alone(op: Callable[..., Tensor]) -> Callable[[Sample, dict[str, Tensor]], Tensor]:
    def run(sample: Sample, leaf: dict[str, Tensor]) -> Tensor:
        shape, *rest = sample.options.values()
        bias = (leaf["b"],) if "b" in leaf else ()
        return op(leaf["x"], shape, leaf["w"], *bias, *rest)

    return run


def ours_of_sum(op: Callable[..., Any]) -> Callable[[Sample, dict[str, Tensor]], Any]:
    def run(sample: Sample, leaf: dict[str, Tensor]) -> Any:
        options = dict(sample.options)
        shape, bias = options.pop("normalized_shape"), (leaf["b"],) if "b" in leaf else ()
        scale = sample.tensors.get("scale")
        return op(leaf["x"], leaf.get("r"), shape, leaf["w"], *bias, sample_scale=scale, **options)

    return run


def stock(is_layer_norm: bool) -> Callable[[Sample, dict[str, Tensor]], Any]:
    """The same by torch's ops, with our mask."""

    def run(sample: Sample, leaf: dict[str, Tensor]) -> Any:
        x, o = leaf["x"], sample.options
        dtype, p, scale = x.dtype, o.get("p", 0.0), sample.tensors.get("scale")
        s = x
        if p:
            keep = reference.stays(draw_seed(x.device, None), x.shape, p)
            s = torch.where(keep, s / (1 - p), 0.0)
        if scale is not None:
            s = s * scale.to(s.dtype).reshape(-1, *[1] * (s.ndim - 1))
        s = s + leaf["r"] if "r" in leaf else s
        if o.get("residual_dtype") is not None and dtype != torch.float64:
            s = s.to(o["residual_dtype"])
        weight = leaf["w"].to(s.dtype) + o.get("weight_offset", 0.0)
        if is_layer_norm:
            y = F.layer_norm(
                s, o["normalized_shape"], weight, leaf["b"].to(s.dtype), o.get("eps", 1e-5)
            )
        else:
            y = F.rms_norm(s, o["normalized_shape"], weight, o.get("eps"))
        y = y.to(dtype)
        return (y, s) if o.get("prenorm", False) else y

    return run


def samples_alone(dtype: torch.dtype, device: torch.device | str, bias: bool) -> Iterable[Sample]:
    eps = {} if bias else {"eps": 1e-3}
    for shape, width in (((5, 7), 1), ((2, 3, 64), 1), ((3, 100), 1), ((2, 4, 33), 2)):
        yield row_norm_sample(shape, width, dtype, device, bias=bias, **eps)
    yield row_norm_sample((3, 520), 1, dtype, device, parameter=dtype, bias=bias, eps=0.5)


def samples_of_sum(dtype: torch.dtype, device: torch.device | str, bias: bool) -> Iterable[Sample]:
    """With residual, dropout and scale, and without; all dtypes of the sum."""
    wide = torch.promote_types(dtype, torch.float32)
    make = partial(row_norm_sample, dtype=dtype, device=device, bias=bias, eps=1e-3)
    drops = {"p": 0.3, "training": True}
    yield make((4, 3, 40), residual=dtype, prenorm=True)
    yield make((4, 3, 33), residual=dtype, prenorm=True, **drops)
    yield make((4, 3, 64), residual=wide, prenorm=True, scale=True, **drops)
    yield make((4, 40), residual=dtype, prenorm=False)
    yield make((4, 2, 50), 2, residual=wide, prenorm=False, scale=True, weight_offset=1.0)
    yield make((6, 100), prenorm=True, residual_dtype=wide, **drops)
    yield make((6, 100), prenorm=True)


def large_rows(dtype: torch.dtype, bias: bool, **options: Any) -> Iterable[Sample]:
    for shape in ((700, 768), (3, 200_000), (70_000, 8)):
        yield row_norm_sample(shape, 1, dtype, bias=bias, **options)


def derivatives_of_sum(
    op: Callable[..., Any], bias: bool
) -> dict[str, Callable[[], tuple[Callable, Sequence[Tensor]]]]:
    def make(
        residual: bool, p: float, prenorm: bool, scale: bool
    ) -> tuple[Callable, Sequence[Tensor]]:
        given = torch.float64 if residual else None
        sample = row_norm_sample((3, 5), 1, torch.float64, residual=given, bias=bias, scale=scale)
        t = sample.tensors

        def call(x: Tensor, w: Tensor, *more: Tensor) -> Any:
            rest = list(more)
            r = rest.pop(0) if residual else None
            generator = torch.Generator().manual_seed(3)
            return op(
                x, r, (5,), w, *rest, p=p, training=True, prenorm=prenorm, eps=0.1,
                sample_scale=t.get("scale"), weight_offset=0.5, generator=generator,
            )  # fmt: skip

        names = [n for n in ("x", "w", "r", "b") if n in t]
        return call, [t[n].requires_grad_() for n in names]

    return {
        "prenorm": partial(make, True, 0.0, True, False),
        "dropout": partial(make, True, 0.4, True, True),
        "postnorm": partial(make, True, 0.4, False, False),
        "first block": partial(make, False, 0.0, True, False),
    }


def derivatives_alone(
    op: Callable[..., Tensor], bias: bool
) -> dict[str, Callable[[], tuple[Callable, Sequence[Tensor]]]]:
    def make() -> tuple[Callable, Sequence[Tensor]]:
        t = row_norm_sample((3, 2, 3), 2, torch.float64, bias=bias).tensors
        names = [n for n in ("x", "w", "b") if n in t]

        def call(x: Tensor, *parameters: Tensor) -> Tensor:
            return op(x, (2, 3), *parameters, eps=0.1)

        return call, [t[n].requires_grad_() for n in names]

    return {"all": make}


def library_forward(dtype: torch.dtype) -> Iterable[tuple]:
    """Arguments of each kind of call."""
    seed = torch.tensor([5, 2**40 + 7])
    t = row_norm_sample((4, 3, 8), 1, dtype, residual=dtype, scale=True).tensors
    x, r, w, b, scale = (t[n] for n in ("x", "r", "w", "b", "scale"))
    x.requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    op = RowNorm
    yield (op.LAYER_NORM, x, None, w, b, None, None, (8,), 0.0, 1e-5, 0.0, dtype, False)
    yield (op.ADD_LAYER_NORM, x, r, w, b, None, seed, (8,), 0.3, 1e-5, 0.0, dtype, True)
    yield (op.ADD_RMS_NORM, x, r, w, None, scale, None, (8,), 0.0, 1e-5, 1.0, wide, True)
    yield (op.ADD_RMS_NORM, x, r, None, None, None, seed, (3, 8), 0.3, 1e-5, 0.0, dtype, False)
    yield (op.DROPOUT_ADD, x, r, None, None, scale, seed, (8,), 0.3, 0.0, 0.0, dtype, True)


def library_backward(dtype: torch.dtype) -> Iterable[tuple]:
    for call in library_forward(dtype):
        op, x, r, w, b, scale, seed, shape, p, eps, offset, sum_dtype, keeps = call
        x = x.detach()
        y, s, stats = torch.ops.gradfuse.row_norm(op, x, *call[2:])
        is_norm = op != RowNorm.DROPOUT_ADD
        kept = s if keeps else x if r is None else None
        again = (None, None) if kept is not None else (x, r)
        kept, stats = (kept, stats) if is_norm else (None, None)
        saved = (kept, *again, w, b, scale, seed, stats)
        residual_dtype = None if r is None else r.dtype
        options = (op, p, eps, offset, len(shape), dtype, residual_dtype, sum_dtype)
        grads = (y.cos() if is_norm else None, s.sin() if keeps else None)
        yield (*grads, *saved, *options, [True] * 4)


ALONE: list[Bad] = [
    bad_call("input must be a Tensor, got list", TypeError, x=[1.0]),
    *(
        bad_call("input must be float16", TypeError, kernel=True, x=ONES(4, 6, dtype=d))
        for d in (torch.int32, torch.complex64)
    ),
    bad_call("input must be dense", TypeError, kernel=True, x=ONES(4, 6).to_sparse()),
    bad_call(r"input must end in normalized_shape \[6\], got \[4, 5\]", kernel=True, x=ONES(4, 5)),
    bad_call(r"input must end in normalized_shape \[6\], got \[\]", kernel=True, x=ONES(())),
    bad_call("normalized_shape must have one dimension", kernel=True, normalized_shape=()),
    bad_call("normalized_shape must be an int or", TypeError, normalized_shape=6.0),
    bad_call(r"weight must have shape \[6\], got \[5\]", kernel=True, w=ONES(5)),
    bad_call("weight must be float16", TypeError, kernel=True, w=ONES(6, dtype=torch.int64)),
    bad_call("eps must be >= 0, got -1", kernel=True, eps=-1.0),
]
WITH_BIAS = [
    bad_call(r"bias must have shape \[6\], got \[1, 6\]", kernel=True, b=ONES(1, 6)),
]
OF_SUM = [
    bad_call(r"residual must have shape \[4, 6\], got \[6\]", kernel=True, r=ONES(6)),
    bad_call("residual must be a Tensor, got float", TypeError, r=1.0),
    bad_call("residual must be real", TypeError, r=ONES(4, 6, dtype=torch.complex64)),
    bad_call("residual must be dense", TypeError, kernel=True, r=ONES(4, 6).to_sparse()),
    bad_call("p must lie between 0 and 1, got 1.5", p=1.5),
    bad_call("p must lie between 0 and 1, got nan", p=float("nan")),
    bad_call("residual_dtype must be input's dtype", TypeError, kernel=True,
             residual_dtype=torch.bfloat16),
    bad_call("sample_scale must have a number for each", scale=ONES(3)),
    bad_call("sample_scale must have a number for each", scale=ONES(4, 6)),
]  # fmt: skip


def of_rows(**options: Any) -> Callable[[torch.dtype], Sample]:
    return lambda dtype: row_norm_sample((48, 64), 1, dtype, **options)


def entry(name: str, op: Callable[..., Any], is_layer_norm: bool) -> list[Op]:
    """The norm alone, and of a sum."""
    add = getattr(gradfuse, f"add_{name}")
    bias = is_layer_norm
    errors = [*ALONE, *(WITH_BIAS if bias else [])]
    # The backward is the last call, so it is counted: grad_output is "tensor 0".
    alone = Op(
        name,
        through_backward(ours_alone(op)),
        through_backward(stock(is_layer_norm)),
        partial(samples_alone, bias=bias),
        REAL,
        errors,
        lambda: row_norm_sample((4, 6), bias=bias, eps=1e-5),
        partial(large_rows, bias=bias),
        derivatives=derivatives_alone(op, bias),
        traffic=[
            Traffic("backward", of_rows(bias=bias), {"tensor 0": 1, "sum": 1}, {"tensor 0": 0}),
        ],
        compiles="close",
        tolerance=(5e-5, 1e-10),
    )
    of_sum = Op(
        f"add_{name}",
        through_backward(ours_of_sum(add)),
        through_backward(stock(is_layer_norm)),
        partial(samples_of_sum, bias=bias),
        REAL,
        [*errors, *OF_SUM],
        lambda: row_norm_sample(
            (4, 6), bias=bias, residual=torch.float32, scale=True, p=0.0, eps=1e-5, training=True,
            prenorm=False,
        ),
        partial(
            large_rows, bias=bias, residual=torch.float32, p=0.1, training=True, prenorm=True
        ),
        registered={"row_norm": library_forward, "row_norm_backward": library_backward}
        if bias
        else {},
        derivatives=derivatives_of_sum(add, bias),
        traffic=[
            Traffic(
                "backward of both",
                lambda dtype: row_norm_sample(
                    (48, 64), 1, dtype, residual=dtype, bias=bias, prenorm=True
                ),
                {"tensor 0": 1, "argument 1": 1, "sum": 1},
                {"tensor 0": 0},
            ),
            Traffic(
                "backward of the norm of a sum",
                lambda dtype: row_norm_sample(
                    (48, 64), 1, dtype, residual=dtype, bias=bias, prenorm=False
                ),
                {"tensor 0": 1, "input": 1, "residual": 1},
                {"tensor 0": 0},
            ),
        ],
        compiles="close",
        tolerance=(5e-5, 1e-10),
    )  # fmt: skip
    return [alone, of_sum]


# The sum alone.


def ours_dropout(sample: Sample, leaf: dict[str, Tensor]) -> Tensor:
    scale = sample.tensors.get("scale")
    return gradfuse.dropout_add(leaf["x"], leaf["r"], sample_scale=scale, **sample.options)


def stock_dropout(sample: Sample, leaf: dict[str, Tensor]) -> Tensor:
    """With our mask."""
    x, o, scale = leaf["x"], sample.options, sample.tensors.get("scale")
    if o["training"]:
        keep = reference.stays(draw_seed(x.device, None), x.shape, o["p"])
        x = torch.where(keep, x / (1 - o["p"]), 0.0)
    if scale is not None:
        x = x * scale.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    s = x + leaf["r"]
    narrow = o.get("residual_dtype") is None or s.dtype == torch.float64
    return s if narrow else s.to(o["residual_dtype"])


def dropout_sample(shape: Sequence[int], dtype: torch.dtype = torch.float32, **more: Any) -> Sample:
    options = {"p": 0.3, "training": True} | more
    sample = row_norm_sample(shape, 1, dtype, **options)
    kept = {n: t for n, t in sample.tensors.items() if n in ("x", "r", "grad of y", "scale")}
    wanted = options.get("residual_dtype") or torch.promote_types(dtype, kept["r"].dtype)
    kept["grad of y"] = kept["grad of y"].to(wanted)
    del sample.options["normalized_shape"]
    return Sample(kept, sample.options)


def dropout_samples(dtype: torch.dtype, device: torch.device | str) -> Iterable[Sample]:
    wide = torch.promote_types(dtype, torch.float32)
    make = partial(dropout_sample, dtype=dtype, device=device)
    yield make((4, 3, 40), residual=dtype)
    yield make((4, 33), residual=wide, scale=True)
    yield make((4, 40), residual=dtype, scale=True, training=False)
    yield make((4, 40), residual=dtype, residual_dtype=wide)
    yield make((70,), residual=dtype)


def dropout_derivatives() -> tuple[Callable, Sequence[Tensor]]:
    t = dropout_sample((3, 5), torch.float64, residual=torch.float64, scale=True).tensors

    def call(x: Tensor, r: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return gradfuse.dropout_add(x, r, 0.4, sample_scale=t["scale"], generator=generator)

    return call, [t[n].requires_grad_() for n in ("x", "r")]


dropout_add = Op(
    "dropout_add",
    through_backward(ours_dropout),
    through_backward(stock_dropout),
    dropout_samples,
    REAL,
    [
        bad_call("input must be a Tensor, got list", TypeError, x=[1.0]),
        bad_call("input must be float16", TypeError, kernel=True, x=ONES(4, 6, dtype=torch.int32)),
        bad_call(r"residual must have shape \[4, 6\], got \[6\]", kernel=True, r=ONES(6)),
        bad_call("residual must be a Tensor, got NoneType", TypeError, r=None),
        bad_call("p must lie between 0 and 1, got -0.5", p=-0.5),
        bad_call("sample_scale must have a number for each", scale=ONES(3)),
    ],
    lambda: dropout_sample((4, 6), residual=torch.float32, scale=True),
    lambda dtype: [dropout_sample((700, 768), dtype, residual=torch.float32)],
    derivatives={"all": dropout_derivatives},
    traffic=[
        # grad_output is the gradient of the sum.
        Traffic(
            "backward",
            lambda dtype: dropout_sample((48, 64), dtype, residual=dtype),
            {"argument 1": 1},
            {"argument 1": 0},
        ),
    ],
    compiles="close",
    tolerance=(5e-5, 1e-10),
)

ROW_NORMS = [
    *entry("layer_norm", gradfuse.layer_norm, True),
    *entry("rms_norm", gradfuse.rms_norm, False),
    dropout_add,
]
