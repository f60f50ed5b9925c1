"""The registry of ops. test_ops.py tests every entry: numbers against torch's and the reference's,
threads, errors that write nothing, opcheck, gradcheck, torch.compile, and on the emulator traffic,
waits and the order of blocks.

Tests of a single op are in test_<stem>.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import batch_norm_papers
import numpy as np
import papers
import torch
import torch.nn.functional as F
from batch_norm_cases import FORMATS
from batch_norm_cases import assert_close as assert_mean_close
from helpers import (
    COMPLEX,
    NORM_TYPES,
    REAL,
    Norm,
    assert_as_close_as_torch,
    assert_values,
    norm_rtol,
    owner,
    owners,
    random,
    true_norm,
    truly_clipped,
    wide,
)
from registry import (
    Bad,
    Op,
    Outcome,
    Sample,
    Samples,
    Traffic,
    Wrap,
    as_it_is,
    bad_call,
    leaf_of,
)
from row_norm_ops import ROW_NORMS
from torch import Tensor

import gradfuse
from gradfuse._codes import Activation
from gradfuse.ops.drop_path import path_scale
from gradfuse.ops.row_norm import draw_seed
from gradfuse.reference import ACTIVATIONS, activate, addend

# Gradients, and the errors that they may have.

GRADS = [(40, 30), (7,), (), (129, 5)]


def gradients(dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    made = [random(*s, dtype=dtype, device=device, seed=i) for i, s in enumerate(GRADS)]
    return {f"grad {i}": g for i, g in enumerate(made)}


def of_many_sizes(dtype: torch.dtype) -> dict[str, Tensor]:
    """More than half a million elements: from there on threads share the work."""
    sizes = [1, 33, 4097, 16383, 16385, 32769, 100_003, 1_200_000, *[5] * 100]
    made = {f"grad {i}": random(n, dtype=dtype, seed=n) for i, n in enumerate(sizes)}
    return made | {"grad strided": random(400, 300, dtype=dtype).t()[::2]}


def of_dense(scale: float = 1.0, **options: Any) -> Callable[[torch.dtype], Sample]:
    """Gradients that begin at 16-byte boundaries and span a few blocks."""

    def make(dtype: torch.dtype) -> Sample:
        grads = [random(n, dtype=dtype, scale=scale, seed=n) for n in (32, 4096, 40_960)]
        return Sample({f"grad {i}": g for i, g in enumerate(grads)}, options)

    return make


def with_each(*options: dict[str, Any], make: Callable = gradients) -> Samples:
    """The usual gradients with each set of options."""
    return lambda dtype, device: [Sample(make(dtype, device), o) for o in options]


def large(
    *options: dict[str, Any], make: Callable = of_many_sizes
) -> Callable[[torch.dtype], Iterable[Sample]]:
    return lambda dtype: (Sample(make(dtype), o) for o in options)


def bad_gradient(what: str, make: Callable[[Tensor], Tensor], error: type, match: str) -> Bad:
    def change(sample: Sample) -> None:
        sample.tensors["grad 3"] = make(sample.tensors["grad 3"])

    return Bad(what, change, error, f"{match}.* for tensor 3")


def overlapping(what: str, part: Callable[[Tensor], Tensor]) -> Bad:
    def change(sample: Sample) -> None:
        first = random(8, 8, device=sample.tensors["grad 0"].device)
        sample.tensors |= {"grad 0": first, "grad 3": part(first)}

    words = "expected gradients that do not overlap in memory.* for tensor 3"
    return Bad(f"overlap: {what}", change, RuntimeError, words)


def bad_option(name: str, value: Any, match: str, error: type[Exception] = ValueError) -> Bad:
    def change(sample: Sample) -> None:
        sample.options = sample.options | {name: value}

    return Bad(f"{name}={value}", change, error, match, in_python=True)


def freed(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(4)
    return t


DENSE, FLOATS = "expected dense gradients, got layout .*[Ss]parse", "expected float16.* got .*"
MEASURED = [
    bad_gradient("int64", lambda t: t.to(torch.int64), TypeError, FLOATS + "(Long|int64)"),
    bad_gradient("int8", lambda t: t.to(torch.int8), TypeError, FLOATS + "(Char|int8)"),
    bad_gradient("bool", lambda t: t > 0, TypeError, FLOATS + "[Bb]ool"),
    bad_gradient("float8", lambda t: t.to(torch.float8_e4m3fn), TypeError, FLOATS + "[Ff]loat8"),
    bad_gradient(
        "complex32",
        lambda t: t.to(torch.complex32),
        TypeError,
        "expected (float16|real).* got .*[Cc]omplex",
    ),
    bad_gradient("csr", Tensor.to_sparse_csr, TypeError, DENSE),
    bad_gradient("meta", lambda t: t.to("meta"), TypeError, "expected gradients .* got meta"),
    bad_gradient("freed storage", freed, RuntimeError, "expected storage of at least 2580 bytes"),
]
WRITTEN = [
    *MEASURED,
    overlapping("the first rows", lambda t: t[:4]),
    overlapping("the first columns", lambda t: t[:, :4]),
    overlapping("another dtype", lambda t: t.view(torch.float64)),
    overlapping("one element", lambda t: t.view(-1)[:1]),
    overlapping("as many in another order", lambda t: t.t()[:4]),
    *(
        bad_gradient(
            f"expanded {n}",
            lambda t, s=s, n=n: random(*s, device=t.device).expand(n),
            RuntimeError,
            "expanded",
        )
        for s, n in (((1,), (5,)), ((3, 1), (3, 4)), ((1, 1, 2), (4, 4, 2)))
    ),
]


def negative(option: str, shown: str = "") -> list[Bad]:
    return [
        bad_option(option, bad, f"{shown or option} must be >= 0, got {bad}")
        for bad in (-1.0, -1e-30, -math.inf, math.nan)
    ]


NO_NORM = [
    bad_option("norm_type", bad, f"norm_type must be > 0 or inf, got {float(bad)}")
    for bad in (0, 0.0, -1, -2.0, -math.inf, math.nan, "-inf")
]


# Clipping by norm and by value.


def on_parameters(function: Callable[..., Any], *names: str) -> Callable[..., Outcome]:
    """Calls the function with parameters that own the sample's gradients, and with those of the
    named options that the sample sets."""

    def run(sample: Sample, wrap: Wrap = as_it_is) -> Outcome:
        options = {name: sample.options[name] for name in names if name in sample.options}
        params = owners(sample.grads())
        result = wrap(lambda: function(params, **options))()
        return sample.tensors | ({} if result is None else {"result": result})

    return run


def on_tensors(function: Callable[..., Any], *names: str) -> Callable[..., Outcome]:
    def run(sample: Sample, wrap: Wrap = as_it_is) -> Outcome:
        options = {name: sample.options[name] for name in names if name in sample.options}
        grads = sample.grads()
        return sample.tensors | {"result": wrap(lambda: function(grads, **options))()}

    return run


def scaled_by(norm_of: Callable[[Sample], Norm]) -> Callable[[Sample], dict]:
    """The exact result of clipping this norm to max_norm, in numpy's extended precision."""

    def truth(sample: Sample) -> dict:
        norm, bound = norm_of(sample), sample.options.get("max_norm", math.inf)
        found = {name: truly_clipped(t, norm, bound) for name, t in sample.tensors.items()}
        return found | {"result": float(norm)}

    return truth


def norm_of_sample(sample: Sample) -> Norm:
    return true_norm(sample.grads(), sample.options.get("norm_type", 2.0))


def of_library(*others: Any) -> Callable[[torch.dtype], Iterable[tuple]]:
    """(gradients, *others): gradients of all real dtypes for float32, else of one; then none."""

    def arguments(dtype: torch.dtype) -> Iterable[tuple]:
        dtypes = REAL if dtype == torch.float32 else (dtype,)
        grads = [random(4, 5, dtype=d) for d in dtypes]
        yield ([*grads, random(6, 8, dtype=dtypes[0]).t()[::2]], *others)
        yield ([], *others)

    return arguments


def clip_of(max_norm: float, norm_type: float = 2.0, **more: Any) -> dict[str, Any]:
    return {"max_norm": max_norm, "norm_type": norm_type, **more}


TORCH = torch.nn.utils
NORM_OPTIONS = ("max_norm", "norm_type", "error_if_nonfinite", "foreach")
ORDERS = [clip_of(0.5, p) for p in NORM_TYPES]

clip_grad_norm_ = Op(
    "clip_grad_norm_",
    on_parameters(gradfuse.clip_grad_norm_, *NORM_OPTIONS, "nonfinite", "exact"),
    on_parameters(TORCH.clip_grad_norm_, *NORM_OPTIONS),
    with_each(
        *ORDERS,
        *(clip_of(m) for m in (0.0, 1e-30, 0.1, 1e4, math.inf)),
        *(clip_of(1.0, foreach=f) for f in (None, True, False)),
        *(clip_of(m, exact=True) for m in (0.5, 1e4)),
    ),
    (*REAL, *COMPLEX),
    [
        *WRITTEN,
        *negative("max_norm"),
        *NO_NORM,
        bad_option("nonfinite", "no", "nonfinite must be 'propagate', 'error' or 'zero', got 'no'"),
    ],
    large=large(*(clip_of(0.5, p) for p in (2.0, 1.0, 3.0, math.inf)), clip_of(0.5, exact=True)),
    registered={
        "clip_grads_": lambda d: [
            *of_library(0.1, 2.0, 0)(d),
            *of_library(0.1, 2.0, 0, True)(d),
            *of_library(0.1, math.inf, 0)(d),
        ]
    },
    traffic=[
        Traffic("quiet", of_dense(max_norm=1e9), {"grad": 1}, {"grad": 0}),
        Traffic("clipping", of_dense(max_norm=0.1), {"grad": 2}, {"grad": 1}),
        Traffic("order 3", of_dense(max_norm=0.1, norm_type=3.0), {"grad": 2}, {"grad": 1}),
    ],
    truth=scaled_by(norm_of_sample),
)

get_total_norm = Op(
    "get_total_norm",
    on_tensors(gradfuse.get_total_norm, "norm_type", "error_if_nonfinite", "foreach", "exact"),
    on_tensors(TORCH.get_total_norm, "norm_type", "error_if_nonfinite", "foreach"),
    with_each(*({"norm_type": p} for p in NORM_TYPES), {"exact": True}),
    (*REAL, *COMPLEX),
    [*MEASURED, *NO_NORM],
    large=large({"norm_type": 2.0}, {"exact": True}),
    registered={
        "grad_stats": lambda d: [
            *of_library(2.0, 0)(d),
            *of_library(math.inf, 0)(d),
            *of_library(2.0, 0, True)(d),
        ]
    },
    traffic=[Traffic("all", of_dense(norm_type=2.0), {"tensor": 1}, {"tensor": 0})],
    truth=scaled_by(norm_of_sample),
)

clip_grads_with_norm_ = Op(
    "clip_grads_with_norm_",
    on_parameters(gradfuse.clip_grads_with_norm_, "max_norm", "total_norm", "foreach"),
    on_parameters(TORCH.clip_grads_with_norm_, "max_norm", "total_norm", "foreach"),
    with_each(
        {"max_norm": 1.0, "total_norm": torch.tensor(4.0)},
        {"max_norm": 8.0, "total_norm": torch.tensor(4.0), "foreach": True},
    ),
    (*REAL, *COMPLEX),
    [
        *WRITTEN,
        *negative("max_norm"),
        *(
            replace(
                bad_option("total_norm", total, "total_norm must be one real number, got"),
                what=what,
                in_python=False,
            )
            for what, total in {
                "two norms": torch.ones(2),
                "no norm": torch.ones(0),
                "a complex norm": torch.tensor(1j),
            }.items()
        ),
    ],
    large=large({"max_norm": 1.0, "total_norm": torch.tensor(3.0)}),
    registered={"scale_grads_": of_library(0.1, torch.tensor(5.0))},
    traffic=[
        Traffic(
            "clipping",
            of_dense(max_norm=0.1, total_norm=torch.tensor(9.0)),
            {"grad": 1},
            {"grad": 1},
        ),
        Traffic(
            "quiet", of_dense(max_norm=10.0, total_norm=torch.tensor(9.0)), {"grad": 0}, {"grad": 0}
        ),
    ],
    truth=scaled_by(lambda s: Norm(np.longdouble(float(s.options["total_norm"])), 0)),
)

clip_grad_value_ = Op(
    "clip_grad_value_",
    on_parameters(gradfuse.clip_grad_value_, "clip_value", "foreach"),
    on_parameters(TORCH.clip_grad_value_, "clip_value", "foreach"),
    with_each(
        *({"clip_value": v} for v in (0.25, 0.0, 1 / 3, 1e4, math.inf)),
        *({"clip_value": 0.5, "foreach": f} for f in (None, True, False)),
    ),
    REAL,
    [
        *WRITTEN,
        *negative("clip_value"),
        *(
            bad_gradient(f"{d}", lambda t, d=d: t.to(d), TypeError, "expected real gradients.* got")
            for d in COMPLEX
        ),
    ],
    large=large({"clip_value": 0.1}),
    registered={"clamp_grads_": of_library(0.1)},
    traffic=[
        Traffic("nothing changes", of_dense(clip_value=1e9), {"grad": 1}, {"grad": 0}),
        Traffic("all change", of_dense(clip_value=0.0), {"grad": 1}, {"grad": 1}),
    ],
)


# Adaptive clipping. torch has no such function.


def with_weights(make: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Gradients, and a weight for each."""

    def made(*arguments: Any) -> dict[str, Tensor]:
        grads = make(*arguments)
        weights = {}
        for i, (name, g) in enumerate(grads.items()):
            w = random(*g.shape, dtype=g.dtype, device=g.device, seed=20 + i)
            weights[name.replace("grad", "weight")] = w
        return grads | weights

    return made


def weights_of(sample: Sample) -> list[Tensor]:
    """The weights, with .grad set. A gradient that does not fit its weight gets a new owner."""
    weights = []
    for grad, w in zip(sample.grads(), sample.weights(), strict=True):
        if (grad.shape, grad.dtype, grad.layout, grad.device) == (
            *(w.shape, w.dtype, w.layout, w.device),
        ):
            w.grad = grad
            weights.append(w)
        else:
            weights.append(owner(grad))
    return weights


def adaptive(sample: Sample, wrap: Wrap = as_it_is) -> Outcome:
    weights = weights_of(sample)
    wrap(lambda: gradfuse.adaptive_clip_grad_(weights, **sample.options))()
    return {name: t for name, t in sample.tensors.items() if name.startswith("grad")}


def true_units(sample: Sample) -> dict[str, np.ndarray]:
    """The rule of Brock et al. 2021, unit by unit, in numpy's extended precision."""
    factor, eps = sample.options.get("clip_factor", 0.01), sample.options.get("eps", 1e-3)
    p = sample.options.get("norm_type", 2.0)
    found = {}
    for name, weight in zip(sample.tensors, weights_of(sample), strict=False):
        whole = weight.ndim < 2
        units = []
        for w, g in [(weight, weight.grad)] if whole else zip(weight, weight.grad, strict=True):
            limit, norm = factor * max(float(true_norm([w], p)), eps), true_norm([g], p)
            scale = 1.0 if float(norm) <= limit else limit / max(float(norm), 1e-6)
            units.append(wide(g) * scale)
        found[name] = units[0] if whole else np.stack(units)
    return found


def assert_units(ours: Outcome, truth: dict, theirs: Outcome) -> None:
    for name, value in ours.items():
        expected = truth[name]
        if value.is_complex():  # a real factor scales each part
            value, expected = (
                torch.view_as_real(value),
                np.stack([expected.real, expected.imag], -1),
            )
        assert_values(value, expected, 2 * norm_rtol([ours[name].dtype]))


def library_units(norm_type: float) -> Callable[[torch.dtype], Iterable[tuple]]:
    def arguments(dtype: torch.dtype) -> Iterable[tuple]:
        for grads, *rest in of_library(0.01, 1e-3, norm_type)(dtype):
            yield ([torch.ones_like(g) for g in grads], grads, *rest)

    return arguments


def matrix(scale: float) -> Callable[[torch.dtype], Sample]:
    """Rows of 2,048 elements: weights of about 1, and gradients of about `scale`."""
    grads = with_weights(lambda dtype: {"grad 0": random(13, 2048, dtype=dtype, scale=scale)})
    return lambda dtype: Sample(grads(dtype))


adaptive_clip_grad_ = Op(
    "adaptive_clip_grad_",
    adaptive,
    lambda sample: {},  # torch has none
    with_each(
        *({"norm_type": p} for p in NORM_TYPES),
        {},
        {"clip_factor": 1.0, "eps": 2.0},
        {"clip_factor": 100.0},
        make=with_weights(gradients),
    ),
    (*REAL, *COMPLEX),
    [
        *WRITTEN,
        Bad(
            "coo",
            lambda sample: sample.tensors.update({"grad 3": sample.tensors["grad 3"].to_sparse()}),
            TypeError,
            "expected dense weights and gradients, got a sparse one for parameter 3",
        ),
        *negative("clip_factor"),
        *negative("eps"),
        *NO_NORM,
    ],
    large=large({}, {"norm_type": 3.0}, make=with_weights(of_many_sizes)),
    registered={
        "adaptive_clip_grads_": lambda d: [*library_units(2.0)(d), *library_units(math.inf)(d)]
    },
    traffic=[
        Traffic("quiet", matrix(1e-6), {"tensor": 1, "grad": 1}, {"tensor": 0, "grad": 0}),
        Traffic("all rows", matrix(1.0), {"tensor": 1, "grad": 2}, {"tensor": 0, "grad": 1}),
    ],
    truth=true_units,
    compare=assert_units,
    tolerance=(2e-5, 1e-11),
)


# Batch norm.

LEAVES = ("x", "r", "w", "b")


def batch_norm_sample(
    shape: Sequence[int], channels_last: bool = False, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", residual: bool = True, **options: Any,
) -> Sample:  # fmt: skip
    """A sample of batch_norm_act, with the gradient of its output."""
    channels, parameter = shape[1], torch.promote_types(dtype, torch.float32)

    def map_of(seed: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        t = random(*shape, dtype=torch.float64, scale=scale, seed=seed) + offset
        t = t.to(dtype).to(device)
        return t.contiguous(memory_format=FORMATS[t.ndim]) if channels_last else t

    def vector(seed: int) -> Tensor:
        return random(channels, dtype=parameter, device=device, seed=seed)

    tensors = {"x": map_of(1, 2.0, 1.0), "grad of y": map_of(3), "w": vector(4), "b": vector(5)}
    tensors |= {"mean": vector(6), "var": vector(7).abs() + 0.5}
    if residual:
        tensors["r"] = map_of(2)
    usual = {"training": True, "activation": "relu", "momentum": 0.3, "eps": 1e-3}
    return Sample(tensors, usual | options)


def through_backward(
    function: Callable[[Sample, dict[str, Tensor]], Tensor],
) -> Callable[..., Outcome]:
    """The output, the gradients and the running statistics of a call of function."""

    def run(sample: Sample, wrap: Wrap = as_it_is) -> Outcome:
        t = sample.tensors
        leaves = {name: leaf_of(t[name]) for name in LEAVES if name in t}
        torch.manual_seed(5)
        y = wrap(lambda: function(sample, leaves))()
        y.backward(t["grad of y"])
        grads = {name: leaf.grad for name, leaf in leaves.items()}
        updated = {name: t[name] for name in ("mean", "var", "drift") if name in t}
        return {"y": y.detach(), **updated, **grads}

    return run


def ours_batch_norm(sample: Sample, leaf: dict[str, Tensor]) -> Tensor:
    t = sample.tensors
    return gradfuse.batch_norm_act(
        leaf["x"], t["mean"], t["var"], leaf["w"], leaf["b"], residual=leaf.get("r"),
        step=t.get("step"), drift=t.get("drift"), **sample.options,
    )  # fmt: skip


def stock_batch_norm(sample: Sample, leaf: dict[str, Tensor]) -> Tensor:
    t, o = sample.tensors, sample.options
    if o["training"] and ("ghost_size" in o or "renorm" in o or "drift" in t):
        z = batch_norm_papers.by_mode(leaf, t, **o)
    else:
        z = F.batch_norm(
            leaf["x"], t["mean"], t["var"], leaf["w"], leaf["b"], o["training"], o["momentum"],
            o["eps"],
        )  # fmt: skip
    z = dropped(z, o)
    z = z + leaf["r"] if "r" in leaf else z
    return activate(z, o["activation"], o.get("negative_slope", 0.01))


def dropped(z: Tensor, options: dict[str, Any]) -> Tensor:
    """With our masks, drawn in our order."""
    if not options["training"]:
        return z
    scale = None
    if options.get("drop_path"):
        scale = path_scale("stock", z, options["drop_path"], options.get("drop_mode", "row"))
    p = options.get("p", 0.0)
    seed = draw_seed(z.device, None) if p else None
    return addend(z, seed, p, scale)


DROPS = [
    {"drop_path": 0.5},
    {"drop_path": 0.5, "activation": None},
    {"drop_path": 0.4, "activation": "silu"},
    {"drop_path": 0.4, "activation": "tanh", "training": False},
    {"drop_path": 0.4, "drop_mode": "batch", "activation": "leaky_relu"},
    {"p": 0.4},
    {"p": 0.4, "drop_path": 0.4, "activation": "gelu"},
]
# Ghost batches of unequal size, corrections within their limits and beyond, in and after a warm-up.
MODES: list[dict[str, Any]] = [
    {"ghost_size": 2, "activation": "relu"},
    {"ghost_size": 2, "activation": "silu", "drop_path": 0.4, "shape": (5, 24, 5, 4)},
    {"renorm": (1.2, 0.1), "activation": "gelu"},
    {"renorm": (9.0, 9.0, 2.0, 7.0, 30.0), "step": 5, "activation": "hardswish"},
    {"drift": True, "activation": None, "shape": (5, 70)},
    {"ghost_size": 3, "renorm": (1.5, 0.4), "drift": True, "shape": (10, 8, 9, 8)},
    {"ghost_size": 2, "renorm": (1.5, 0.4), "activation": "tanh", "shape": (4, 1, 9, 9)},
    {"ghost_size": 4, "momentum": (0.5, 0.2), "activation": "leaky_relu", "shape": (7, 9)},
    {"ghost_size": 2, "renorm": (1.5, 0.4), "training": False},
    {"ghost_size": 2, "drift": True, "p": 0.3, "shape": (4, 3, 50, 60)},
]


def batch_norm_in_mode(
    shape: Sequence[int] = (5, 17, 4, 5), *like: Any, drift: bool = False,
    step: int | None = None, momentum: Any = 0.3, **options: Any,
) -> Sample:  # fmt: skip
    sample = batch_norm_sample(shape, *like, momentum=momentum, **options)
    t = sample.tensors
    if drift:
        t["drift"] = torch.cat([torch.stack([t["w"], t["b"]]) / 4, t["var"][None], t["var"][None]])
        t["drift"][3] = 7
    if step is not None:
        t["step"] = torch.tensor(step, device=t["x"].device)
    if isinstance(momentum, tuple):
        numbers = torch.tensor(momentum, dtype=torch.float64, device=t["x"].device)
        sample.options["momentum"] = numbers
    return sample


MAPS = [
    ((3, 17, 4, 5), False),
    ((3, 17, 4, 5), True),
    ((2, 70, 15, 9), False),
    ((2, 70, 15, 9), True),
    ((6, 5), False),
    ((3, 5, 7), False),
    ((2, 3, 2, 3, 5), True),
    ((4, 1, 9, 9), False),
    ((5, 40, 1, 1), False),
    ((2, 3, 70, 80), False),
]


def batch_norm_samples(dtype: torch.dtype, device: torch.device | str) -> Iterable[Sample]:
    """Every activation and every shape, training and not, with a residual and without."""
    for i, activation in enumerate(ACTIVATIONS):
        shape, last = MAPS[i % len(MAPS)]
        yield batch_norm_sample(
            shape, last, dtype, device, i % 3 != 0, activation=activation, training=i % 4 != 0
        )
    for i, drops in enumerate(DROPS):
        shape, last = MAPS[(3 * i + 1) % len(MAPS)]
        yield batch_norm_sample(shape, last, dtype, device, i != 3, **drops)
    for i, mode in enumerate(MODES):
        shape = mode.get("shape", (5, 17, 4, 5))
        last = i % 2 == 1 and len(shape) == 4
        options = {k: v for k, v in mode.items() if k != "shape"}
        yield batch_norm_in_mode(shape, last, dtype, device, i % 3 != 0, **options)
    # Channels that no block of CUDA threads holds.
    yield batch_norm_sample((4, 24, 28, 28), True, dtype, device, drop_path=0.5)
    yield batch_norm_sample((4, 2, 56, 56), False, dtype, device, drop_path=0.5)


def batch_norm_derivatives() -> dict[str, Callable[[], tuple[Callable, Sequence[Tensor]]]]:
    """Every activation, training and not, with a residual and without, from mask and output."""

    def make(
        activation: str | None, training: bool, save: str, residual: bool, **drops: float
    ) -> tuple[Callable, Sequence[Tensor]]:
        sample = batch_norm_sample((3, 2, 2), dtype=torch.float64, residual=residual)
        t = sample.tensors
        stats = (None, None) if training else (t["mean"], t["var"])

        def call(x: Tensor, w: Tensor, b: Tensor, r: Tensor | None = None) -> Tensor:
            return gradfuse.batch_norm_act(
                x, *stats, w, b, residual=r, activation=activation, training=training, save=save,
                generator=torch.Generator().manual_seed(4), **drops,
            )  # fmt: skip

        return call, [t[name].requires_grad_() for name in ("x", "w", "b", "r") if name in t]

    found = {}
    for i, activation in enumerate(ACTIVATIONS):
        for training in (True, False):
            save, residual = ("bitmask", "output")[(i + training) % 2], i % 4 < 2
            name = f"{activation}-{'training' if training else 'inference'}-{save}"
            found[name] = partial(make, activation, training, save, residual)
    for activation in (None, "relu", "silu"):
        found[f"{activation}-dropped path"] = partial(
            make, activation, True, "output", True, drop_path=0.4
        )
    found["dropout"] = partial(make, "relu", True, "output", True, p=0.4)

    def in_mode(activation: str, **modes: Any) -> tuple[Callable, Sequence[Tensor]]:
        """With r and d at their limits: r and d within them are no constants of differences."""
        t = batch_norm_sample((4, 2, 2), dtype=torch.float64).tensors

        def call(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
            return gradfuse.batch_norm_act(
                x, t["mean"] + 100.0, t["var"] * 1e-4, w, b, residual=r, activation=activation,
                training=True, **modes,
            )  # fmt: skip

        return call, [t[name].requires_grad_() for name in ("x", "w", "b", "r")]

    found["ghosts"] = partial(in_mode, "relu", ghost_size=2)
    found["renorm"] = partial(in_mode, "silu", renorm=(1.5, 0.4))
    found["renormalised ghosts"] = partial(in_mode, "tanh", renorm=(1.5, 0.4), ghost_size=2)
    return found


def library_forward(dtype: torch.dtype) -> Iterable[tuple]:
    """Arguments for each kind of activation, with a mask and without, training and not."""
    A = Activation
    for i, (code, masked) in enumerate(
        [(A.NONE, False), (A.RELU, True), (A.LEAKY_RELU, False), (A.SILU, False), (A.TANH, False)]
    ):
        t = batch_norm_sample((4, 3, 5, 6), i % 2 == 0, dtype).tensors
        stats = (None, None) if i == 1 else (t["mean"], t["var"])
        factor = torch.tensor(0.25, dtype=torch.float64) if i == 3 else None
        x = t["x"].requires_grad_()
        scale = torch.tensor([0.0, 1.5, 1.0, 2.0]) if i in (1, 3) else None
        rest = (bool(i % 2), 0.1, 1e-5, code, 0.01, masked, factor, scale)
        yield (x, t["r"], t["w"], t["b"], *stats, *rest)
    for code, masked in ((A.RELU, True), (A.SILU, False)):
        sample = batch_norm_in_mode((5, 3, 4, 2), code == A.RELU, dtype, drift=True, step=3)
        t = sample.tensors
        modes = (2, [1.5, 0.4, 1.0, 4.0, 9.0], t["step"], t["drift"])
        rest = (True, 0.1, 1e-5, code, 0.01, masked, None, None, *modes)
        yield (t["x"].requires_grad_(), t["r"], t["w"], t["b"], t["mean"], t["var"], *rest)
    t = batch_norm_sample((4, 3, 5, 6), False, dtype).tensors
    gathered = torch.stack([torch.ops.gradfuse.batch_norm_statistics(x) for x in (t["x"], t["r"])])
    rest = (True, 0.1, 1e-5, A.SILU, 0.01, False, None, None, 0, None, None, None, gathered)
    yield (t["x"].detach(), t["r"], t["w"], t["b"], t["mean"], t["var"], *rest)


def library_statistics(dtype: torch.dtype) -> Iterable[tuple]:
    for call in library_forward(dtype):
        yield (call[0].detach(),)


def library_sums(dtype: torch.dtype) -> Iterable[tuple]:
    for call in library_backward(dtype):
        *given, ghost_size, _ = call
        if not ghost_size and given[11]:  # training
            yield (*given, 0)


def library_backward(dtype: torch.dtype) -> Iterable[tuple]:
    for i, call in enumerate(library_forward(dtype)):
        x, r, w, b, _, _, training, _, eps, code, slope, masked, _, scale, *modes = call
        x = x.detach()
        means = random(2, x.shape[1], dtype=torch.float64) if len(modes) > 4 else None
        y, mask, stats, *_ = torch.ops.gradfuse.batch_norm_act(x, *call[1:])
        saved = (x, r, y, mask if masked else None, w, b, stats, scale, means)
        wanted = [i != 1, code != Activation.NONE and i != 2, True, i != 3]
        ghost_size = modes[0] if modes else 0
        last = not y.is_contiguous()
        yield (x.cos(), *saved, last, training, eps, code, slope, ghost_size, wanted)


def large_maps(dtype: torch.dtype) -> Iterable[Sample]:
    shapes = ((2, 3, 500, 500), (64, 5, 97, 61), (8, 2048, 7, 7))
    for shape in (*shapes, (700_000, 3), (5000, 3, 40)):
        for last in (False, True) if len(shape) == 4 else (False,):
            yield batch_norm_sample(shape, last, dtype)
    for last in (False, True):
        modes = {"ghost_size": 3, "renorm": (1.5, 0.4), "drift": True}
        yield batch_norm_in_mode((8, 96, 40, 50), last, dtype, **modes)


def of_maps(shape: tuple[int, ...], channels_last: bool) -> Callable[[torch.dtype], Sample]:
    return lambda dtype: batch_norm_sample(shape, channels_last, dtype)


ONES = torch.ones
BATCH_NORM_ERRORS = [
    bad_call("activation must be None, 'relu'.* got 'swish'", activation="swish"),
    bad_call("save must be 'bitmask' or 'output', got 'nothing'", save="nothing"),
    bad_call(
        "negative_slope must be >= 0 .* got -1.0",
        save="output", activation="leaky_relu", negative_slope=-1.0,
    ),
    bad_call("p must lie between 0 and 1, got 2.0", p=2.0),
    bad_call("drop_path must lie between 0 and 1, got -0.1", drop_path=-0.1),
    bad_call("drop_mode must be 'row' or 'batch', got 'col'", drop_path=0.5, drop_mode="col"),
    bad_call("eps must be >= 0, got -1", kernel=True, eps=-1.0),
    bad_call("eps must be >= 0, got nan", kernel=True, eps=math.nan),
    bad_call("eps must be > 0 when training, got 0", kernel=True, eps=0.0),
    bad_call("momentum must be a number .* got None", TypeError, momentum=None),
    bad_call("momentum must be one number", kernel=True, momentum=ONES(2)),
    bad_call(r"input must be \[N, C, ...\], got \[3\]", kernel=True, x=ONES(3), r=None),
    bad_call("input must be a Tensor, got list", TypeError, x=[1.0]),
    *(
        bad_call("input must be float16", TypeError, kernel=True, x=ONES(4, 3, dtype=d), r=None)
        for d in (torch.int32, torch.complex64)
    ),
    bad_call("input must be dense", TypeError, kernel=True, x=ONES(4, 3).to_sparse(), r=None),
    bad_call("weight must have one element per channel", kernel=True, w=ONES(4)),
    bad_call("weight must be float16", TypeError, kernel=True, w=ONES(3, dtype=torch.int64)),
    bad_call("bias must have one element per channel", kernel=True, b=ONES(3, 1)),
    bad_call("bias must have one element per channel", kernel=True, b=ONES(7)),
    bad_call("residual must be a Tensor, got float", TypeError, r=1.0),
    bad_call(r"residual must broadcast .*\[4, 3, 5\], got \[7\]", r=ONES(7)),
    bad_call("residual must be", TypeError, r=ONES(4, 3, 5, dtype=torch.complex64)),
    bad_call("residual must be", TypeError, r=ONES(4, 3, 5, dtype=torch.float64, device="meta")),
    bad_call("residual must be", TypeError, r=ONES(4, 3, 5, dtype=torch.float64).to_sparse()),
    bad_call(
        "running_mean and running_var must be given", kernel=True,
        training=False, mean=None, var=None,
    ),
    bad_call("must come together, got only running_mean", kernel=True, var=None),
    bad_call("running_var must have one element per channel", kernel=True, var=ONES(4)),
    bad_call("running_mean must have one element per channel", kernel=True, mean=ONES(1)),
    bad_call("expanded tensor", RuntimeError, kernel=True, mean=torch.zeros(1).expand(3)),
    bad_call("ghost_size must be >= 1 and below .*, got 0", ghost_size=0),
    bad_call("ghost_size must be an int or None, got 2.0", TypeError, ghost_size=2.0),
    bad_call("ghost_size must be an int or None, got True", TypeError, ghost_size=True),
    bad_call(
        "ghost_size must leave more than 1 value per channel", kernel=True,
        ghost_size=1, x=ONES(4, 3), r=None,
    ),
    bad_call("r_max must be finite and >= 1, got 0.5", renorm=(0.5, 1.0)),
    bad_call("d_max must be finite and >= 0, got nan", renorm=(2.0, math.nan)),
    bad_call("renorm must be two or five numbers, got 3", renorm=(2.0, 1.0, 1.0)),
    bad_call("renorm must be two or five numbers, got 'no'", TypeError, renorm="no"),
    bad_call("warm-up must have 0 <= begin <= r_end", renorm=(2.0, 1.0, 5, 4, 9)),
    bad_call("renorm must come with running statistics", renorm=(2.0, 1.0), mean=None, var=None),
    bad_call("drift must come with running statistics", drift=ONES(4, 3), mean=None, var=None),
    bad_call("drift must be a Tensor, got list", TypeError, drift=[1.0]),
    bad_call(r"drift must be \[4, 3\], got \[3, 3\]", kernel=True, drift=ONES(3, 3)),
    bad_call("drift must be float16", TypeError, kernel=True, drift=ONES(4, 3, dtype=torch.int64)),
    bad_call("step must be a Tensor, got int", TypeError, renorm=(2.0, 1.0), step=3),
    bad_call("step must be one int64", kernel=True, renorm=(2.0, 1.0), step=ONES(1)),
    bad_call("one for each ghost batch", kernel=True, ghost_size=2, momentum=ONES(3)),
]  # fmt: skip


batch_norm_act = Op(
    "batch_norm_act",
    through_backward(ours_batch_norm),
    through_backward(stock_batch_norm),
    batch_norm_samples,
    REAL,
    BATCH_NORM_ERRORS,
    lambda: batch_norm_sample((4, 3, 5)),
    large_maps,
    registered={
        "batch_norm_act": library_forward,
        "batch_norm_act_backward": library_backward,
        "batch_norm_statistics": library_statistics,
        "batch_norm_gradient_sums": library_sums,
    },
    derivatives=batch_norm_derivatives(),
    traffic=[
        # The backward is the last call, so it is counted. It reads grad_output ("tensor 0") and the
        # input twice, or once if a block holds a channel.
        Traffic("NCHW", of_maps((2, 2, 80, 64), False), {"tensor 0": 2}, {"tensor 0": 0}),
        Traffic("NHWC", of_maps((2, 24, 9, 8), True), {"tensor 0": 2}, {"tensor 0": 0}),
        Traffic(
            "a channel a block", of_maps((2, 3, 8, 8), False), {"tensor 0": 1}, {"tensor 0": 0}
        ),
    ],
    compiles="close",  # torch's ops then update the running statistics
    compare=assert_mean_close,
    tolerance=(5e-5, 1e-10),
)


# The optimizers' steps, with the clip inside.

ADAMW = [
    {},
    {"amsgrad": True},
    {"maximize": True, "weight_decay": 0.0},
    {"weight_decay": 0.3, "lr": torch.tensor(0.01)},
    {"betas": (0.5, 0.7), "eps": 1e-3},
    {"betas": (0.0, 0.9), "amsgrad": True, "maximize": True},
]
SGDS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"weight_decay": 0.1, "maximize": True},
    {"momentum": 0.5, "weight_decay": 0.1, "maximize": True, "lr": torch.tensor(0.02)},
]
# eps: torch in float16 is as far from the truth where a decayed gradient vanishes.
ADAMS = [*ADAMW[:3], {"weight_decay": 0.3, "amsgrad": True, "eps": 1e-3}]
LIONS = [{}, {"weight_decay": 0.3, "betas": (0.5, 0.7)}, {"maximize": True, "betas": (0.0, 0.9)}]
LAMBS = [
    {},
    {"weight_decay": 0.0, "maximize": True},
    {"weight_decay": 0.0, "always_adapt": True, "betas": (0.5, 0.7)},
    {"weight_decay": 0.3, "trust_clip": True, "eps": 1e-3},
]
SCHEDULE_FREES = [
    {},
    {"weight_decay": 0.3, "maximize": True, "betas": (0.6, 0.8)},
    {"warmup_steps": 2, "r": 0.5, "weight_lr_power": 1.0, "eps": 1e-3},
]
PARAMS = [(40, 30), (1,), (), (0,), (4099,), (7, 3, 2)]
STEPS = 3
NOT_COMPARED = ("step", "weight_sum", "lr_max")  # of the state: numbers


def stepped(optimizer: torch.optim.Optimizer, params: list[Tensor], grads: list[Tensor]) -> None:
    """Three steps, with the gradients times 1, -1/2 and 1/4."""
    for step in range(STEPS):
        for p, g in zip(params, grads, strict=True):
            p.grad = g * (-0.5) ** step
        optimizer.step()


def state_of(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> Outcome:
    found = {}
    for i, p in enumerate(params):
        found[f"param {i}"] = p.detach()
        for name, t in sorted(optimizer.state.get(p, {}).items()):
            if isinstance(t, Tensor) and name not in NOT_COMPARED:
                found[f"{name} {i}"] = t
    return found


def parameters_of(sample: Sample) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(t) for n, t in sample.tensors.items() if n.startswith("param")]


def clipped_step(rule: type) -> Callable[..., Outcome]:
    def run(sample: Sample, wrap: Wrap = as_it_is) -> Outcome:
        params = parameters_of(sample)
        optimizer = rule(params, **{"lr": 0.01, "clip": 2.0, **sample.options})
        wrap(lambda: stepped(optimizer, params, sample.grads()))()
        found = state_of(optimizer, params)
        return {k: torch.view_as_real(t) if t.is_complex() else t for k, t in found.items()}

    return run


def torchs_step(rule: type, **how: bool) -> Callable[[Sample], Outcome]:
    """torch's clip and optimizer, on the real and imaginary parts of complex numbers."""

    def run(sample: Sample) -> Outcome:
        def real(t: Tensor) -> Tensor:
            return torch.view_as_real(t.detach()) if t.is_complex() else t.detach()

        params = [torch.nn.Parameter(real(p)) for p in parameters_of(sample)]
        # A Python number: torch computes 1 - lr * weight_decay in float32 if lr is a Tensor.
        options = {"lr": 0.01, **sample.options}
        optimizer = rule(params, **options | {"lr": float(options["lr"])}, **how)

        def clip(*_: Any) -> None:
            TORCH.clip_grad_norm_(params, 2.0)

        optimizer.register_step_pre_hook(clip)
        stepped(optimizer, params, [real(g) for g in sample.grads()])
        return state_of(optimizer, params)

    return run


def assert_steps(ours: Outcome, truth: Outcome, theirs: Outcome) -> None:
    for name, value in ours.items():
        if name.startswith("param"):
            assert_as_close_as_torch(value, wide(truth[name]), theirs[name])
        else:  # one rounding per step: torch's error in a single element may be 0
            info = torch.finfo(value.dtype)
            size = truth[name].abs().max().item() if value.numel() else 0.0
            difference = (value.double() - truth[name].double()).abs()
            allowed = 2 * STEPS * info.eps * (size + info.smallest_normal)
            assert (difference <= allowed).all(), name


def step_samples(options: list[dict], shapes: Sequence = PARAMS) -> Samples:
    def samples(dtype: torch.dtype, device: torch.device | str) -> Iterable[Sample]:
        for o in options:
            tensors = {}
            for i, s in enumerate(shapes):
                tensors[f"param {i}"] = random(*s, dtype=dtype, device=device, seed=i)
                tensors[f"grad {i}"] = random(*s, dtype=dtype, device=device, seed=100 + i)
            yield Sample(tensors, o)

    return samples


def step_op(rule: type, options: list[dict], extra: list[dict]) -> Op:
    torchs: Any = getattr(torch.optim, rule.__name__, None)
    if torchs is None:
        fused = plain = torchs_step(getattr(papers, rule.__name__))
    else:
        fused, plain = torchs_step(torchs, fused=True), torchs_step(torchs, foreach=False)
    many = [(1_200_000,), (33, 7), *[(5,)] * 50, (100_003,)]
    return Op(
        f"{rule.__name__}.step",
        clipped_step(rule),
        fused,
        step_samples(options),
        (*REAL, *COMPLEX),
        large=lambda dtype: step_samples([*options[1:2], *extra], many)(dtype, "cpu"),
        compiles="",  # torch.compile leaves it out of its graphs
        truth=lambda sample: plain(sample.wide()),
        compare=assert_steps,
        tolerance=(2e-5, 1e-10),
    )


OPS = {
    op.name: op
    for op in (
        clip_grad_norm_,
        get_total_norm,
        clip_grads_with_norm_,
        clip_grad_value_,
        adaptive_clip_grad_,
        batch_norm_act,
        *ROW_NORMS,
        step_op(gradfuse.optim.AdamW, ADAMW, [{"update_clip": True}]),
        step_op(gradfuse.optim.Adam, ADAMS, []),
        step_op(gradfuse.optim.LAMB, LAMBS, []),
        step_op(gradfuse.optim.Lion, LIONS, []),
        step_op(gradfuse.optim.ScheduleFreeAdamW, SCHEDULE_FREES, []),
        step_op(gradfuse.optim.SGD, SGDS, [{"momentum": 0.9, "stochastic_rounding": True}]),
    )
}
