"""batch_norm_act for any shape, layout, dtype and flags. Every element must be within a bound that
follows from the roundings of one float32 computation (float64 if the input is float64). The tests
compare with no other implementation."""

from dataclasses import dataclass

import torch
from helpers import REAL
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor

import gradfuse
from gradfuse.reference import ACTIVATIONS, activate

KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}
SLOPE = 0.2
# Roundings a value may carry, with a margin: the sums, the coefficients, the product.
ROUNDINGS = 4.0

counts = st.one_of(st.integers(1, 6), st.integers(7, 40))
positions = st.one_of(
    st.just(()),
    st.tuples(st.integers(1, 300)),
    st.tuples(st.integers(1, 18), st.integers(1, 18)),
    st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 6)),
)
shapes = st.builds(lambda n, c, rest: (n, c, *rest), counts, counts, positions)


def stepped(t):
    return torch.stack([t, t], -1)[..., 0]


def shifted(t):
    """A view whose first element is not aligned like its allocation."""
    return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)


def channels_last(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def reversed_dimensions(t):
    order = tuple(range(t.ndim))[::-1]
    return t.permute(order).contiguous().permute(order)


layouts = st.sampled_from(
    [lambda t: t, channels_last, channels_last, stepped, shifted, reversed_dimensions]
)


@dataclass
class Call:
    """Tensors [N, C, ...] of one dtype, vectors [C], and the options of the op."""

    x: Tensor
    r: Tensor | None  # x itself, another tensor of x's shape, or one that broadcasts
    grad: Tensor
    w: Tensor | None
    b: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    options: dict


@st.composite
def calls(draw):
    shape, dtype = draw(shapes), draw(st.sampled_from(REAL))
    training = draw(st.booleans())
    if training and shape[0] * torch.Size(shape[2:]).numel() == 1:
        shape = (2, *shape[1:])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def tensor(of=shape, scale=1.0, offset=0.0, of_dtype=dtype):
        t = torch.randn(of, generator=generator, dtype=torch.float64) * scale + offset
        return t.to(of_dtype)

    scale = 10.0 ** draw(st.integers(-2, 2))
    offset = scale * draw(st.sampled_from([0.0, 0.0, 1.0, -30.0]))
    x = draw(layouts)(tensor(scale=scale, offset=offset))
    kind = draw(st.sampled_from(["none", "none", "twin", "twin", "twin", "input", "broadcast"]))
    r = x if kind == "input" else None
    if kind == "twin":
        r = draw(layouts)(tensor())
    elif kind == "broadcast":
        r = tensor(tuple(n if draw(st.booleans()) else 1 for n in shape))
    wider = torch.promote_types(dtype, torch.float32)
    parameter, statistic = draw(st.sampled_from([dtype, wider])), draw(st.sampled_from([wider]))

    def vector(of_dtype, offset=0.0):
        return tensor((shape[1],), offset=offset, of_dtype=of_dtype)

    tracked = not training or draw(st.booleans())
    return Call(
        x,
        r,
        draw(layouts)(tensor()),
        vector(parameter) if draw(st.booleans()) else None,
        vector(parameter) if draw(st.booleans()) else None,
        tensor((shape[1],), scale, offset, statistic) if tracked else None,
        (vector(statistic).abs() + 0.1) * scale**2 if tracked else None,
        {
            "activation": draw(st.sampled_from(ACTIVATIONS)),
            "training": training,
            "momentum": draw(st.sampled_from([0.0, 0.1, 1.0])),
            "eps": draw(st.sampled_from([1e-5, 1e-3, 0.1])),
            "save": draw(st.sampled_from(["bitmask", "output"])),
        },
    )


def reduced(t: Tensor, dims: tuple[int, ...]) -> Tensor:
    return t.mean(dims, keepdim=True)


def expected(call: Call) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """(value, bound on the error) in float64 by name, and the grad_output that they hold for.

    grad_output is 0 where z is so near a kink of the activation that either slope is right.
    """
    x = call.x.double()
    dims = (0, *range(2, x.ndim))
    info = torch.finfo(call.x.dtype)
    unit = ROUNDINGS * torch.finfo(torch.promote_types(call.x.dtype, torch.float32)).eps
    activation, training = call.options["activation"], call.options["training"]

    def shaped(v, otherwise):
        if v is None:
            return torch.full((), otherwise, dtype=torch.float64)
        return v.double().reshape(-1, *[1] * (x.ndim - 2))

    def rounded(t, dtype=call.x.dtype):
        """The bound on rounding to dtype, subnormal numbers included."""
        there = torch.finfo(dtype)
        return there.eps * (t.abs() + there.smallest_normal)

    w, b = shaped(call.w, 1.0), shaped(call.b, 0.0)
    mean, var = shaped(call.mean, 0.0), shaped(call.var, 1.0)
    # The kernels sum differences from the channel's first element.
    first = x.flatten(2)[:1, :, :1] if x.ndim > 2 else x[:1]
    first = first.reshape(1, -1, *[1] * (x.ndim - 2))
    if training:
        mean = first + reduced(x - first, dims)
        var = reduced((x - mean).square(), dims)
    invstd = (var + call.options["eps"]).rsqrt()
    n = (x - mean) * invstd
    spread = ((x - first).abs() * invstd).amax(dims, keepdim=True) if training else x.new_zeros(())
    # error_mean is in units of the deviation; the mean is a float64. error_invstd is relative.
    error_mean = unit * spread + 4.0 * torch.finfo(torch.float64).eps * mean.abs() * invstd
    error_invstd = unit * (1.0 + spread.square())
    error_n = error_mean + n.abs() * error_invstd

    r = x.new_zeros(()) if call.r is None else call.r.double()
    z = n * w + b + r
    error_z = w.abs() * error_n + unit * ((n * w).abs() + b.abs() + r.abs())
    y = activate(z, activation, SLOPE)
    found = {"y": (y, 1.2 * error_z + unit * (1.0 + z.abs()) + rounded(y))}
    if activation in (None, "relu", "relu6", "leaky_relu"):
        found["y"] = (y, error_z + rounded(y))

    ambiguous = torch.zeros_like(z, dtype=torch.bool)
    for kink in KINKS.get(activation, ()):
        ambiguous |= (z - kink).abs() <= error_z + rounded(z) + 4.0 * info.eps * abs(kink)
    grad = call.grad.masked_fill(ambiguous, 0.0)
    at = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(activate(at, activation, SLOPE).sum(), at)
    g = grad.double() * slope
    error_g = grad.double().abs() * (1.2 * error_z + unit)
    if activation in ("sigmoid", "tanh"):
        error_g += grad.double().abs() * 2.0 * info.eps  # the slope is that of the rounded output
    if activation in (None, "relu", "relu6", "leaky_relu"):
        error_g = unit * g.abs()

    factor = w * invstd
    sum_n, sum_g = reduced(g * n, dims), reduced(g, dims)
    error_sum_n = reduced(error_g * n.abs() + g.abs() * (error_n + unit * n.abs()), dims)
    error_sum_g = reduced(error_g + unit * g.abs(), dims)
    taken = g - sum_g - n * sum_n if training else g
    error_taken = error_g
    if training:
        error_taken = error_g + error_sum_g + n.abs() * error_sum_n + error_n * sum_n.abs()
        error_taken = error_taken + unit * (sum_g.abs() + (n * sum_n).abs())
    parts = g.abs() + sum_g.abs() + (n * sum_n).abs()
    grad_x = factor * taken
    error_x = factor.abs() * (error_taken + (error_invstd + unit) * parts)
    count = x.numel() / x.shape[1]
    vector = (x.shape[1],)

    def of_vector(name, like, value, error):
        if like is not None:
            value, error = value.reshape(vector), error.reshape(vector)
            found[name] = (value, error + rounded(value, like.dtype))

    of_vector("w", call.w, sum_n * count, error_sum_n * count)
    of_vector("b", call.b, sum_g * count, error_sum_g * count)
    if training and call.mean is not None:
        m, deviation = call.options["momentum"], 1.0 / invstd
        unbiased = var * count / (count - 1)
        of_vector(
            "mean",
            call.mean,
            (1 - m) * shaped(call.mean, 0.0) + m * mean,
            m * error_mean * deviation,
        )
        of_vector(
            "var",
            call.var,
            (1 - m) * shaped(call.var, 0.0) + m * unbiased,
            m * (error_mean**2 + error_invstd) * deviation.square() * count / (count - 1),
        )
    if call.r is call.x:
        found["x"] = (grad_x + g, error_x + error_g + rounded(grad_x) + rounded(g))
        found["x"] = (found["x"][0], found["x"][1] + rounded(found["x"][0]))
        return found, grad
    found["x"] = (grad_x, error_x + rounded(grad_x))
    if call.r is not None:
        # torch sums a broadcast residual's gradient from rounded elements.
        bound = (error_g + rounded(g) + unit * g.abs()).sum_to_size(call.r.shape)
        total = g.sum_to_size(call.r.shape)
        found["r"] = (total, bound + rounded(total))
    return found, grad


def run(call: Call, grad: Tensor) -> dict[str, Tensor]:
    x = call.x.detach().requires_grad_()
    r = x if call.r is call.x else None if call.r is None else call.r.detach().requires_grad_()
    w, b = (None if v is None else v.clone().requires_grad_() for v in (call.w, call.b))
    mean, var = (None if v is None else v.clone() for v in (call.mean, call.var))
    y = gradfuse.batch_norm_act(
        x, mean, var, w, b, residual=r, negative_slope=SLOPE, **call.options
    )
    y.backward(grad)
    found = {"y": y.detach(), "x": x.grad, "mean": mean, "var": var}
    found |= {k: v.grad for k, v in (("w", w), ("b", b), ("r", r)) if v is not None}
    return found


@given(call=calls())
def test_every_element_within_its_roundings(backend, device, call):
    event(f"{call.x.dtype}, {'training' if call.options['training'] else 'eval'}")
    truth, grad = expected(call)
    on = Call(
        *(None if t is None else t.to(device) for t in (call.x, call.r, grad, call.w, call.b)),
        *(None if t is None else t.to(device) for t in (call.mean, call.var)),
        call.options,
    )
    if call.r is call.x:
        on.r = on.x
    found = run(on, on.grad)
    assert found["y"].shape == call.x.shape
    for name, (value, bound) in truth.items():
        error = (found[name].cpu().double() - value).abs() - bound
        worst = error.argmax()
        assert error.flatten()[worst] <= 0.0, (
            f"{name}, element {worst}: expected {value.flatten()[worst]:.9g} within "
            f"{bound.expand_as(value).flatten()[worst]:.3g}, got {found[name].flatten()[worst]:.9g}"
        )
