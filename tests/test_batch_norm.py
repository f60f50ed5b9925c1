"""batch_norm_act against float64, over dtypes, layouts, activations and flags."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batch_norm_cases import ACTIVATIONS, LAYOUTS, Case, assert_close, run_ours, run_torch
from helpers import REAL, bits, random, short
from torch.testing._internal.common_methods_invocations import op_db

import gradfuse
from gradfuse import reference
from gradfuse.ops.drop_path import path_scale


@pytest.mark.parametrize("dtype", REAL, ids=short)
@pytest.mark.parametrize(("shape", "channels_last"), LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_relu_with_a_residual(backend, device, dtype, shape, channels_last, training):
    case = Case(shape, channels_last, dtype, device, training=training)
    assert_close(run_ours(case), run_torch(case, torch.float64), run_torch(case))


@pytest.mark.parametrize("dtype", REAL, ids=short)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_activations(backend, device, dtype, activation, residual, channels_last):
    for training in (True, False):
        case = Case(
            (2, 13, 5, 7), channels_last, dtype, device, residual, activation, training, scale=2.0
        )
        assert_close(run_ours(case), run_torch(case, torch.float64), run_torch(case))


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_mask_and_output_serve_alike(backend, device, activation, channels_last):
    for shape in ((2, 13, 5, 7), (2, 8, 16, 16)):
        case = Case(shape, channels_last, device=device, activation=activation, scale=9.0)
        masked, saved = run_ours(case), run_ours(case, save="output")
        assert bits([*masked.values()]) == bits([*saved.values()])


@pytest.mark.parametrize("slope", [0.2, -0.5, 0.0, 3.0])
def test_slopes_of_leaky_relu(backend, device, slope):
    case = Case((2, 13, 5, 7), device=device, activation="leaky_relu")
    truth = run_torch(case, torch.float64, negative_slope=slope)
    theirs = run_torch(case, negative_slope=slope)
    assert_close(run_ours(case, negative_slope=slope), truth, theirs)


def test_values_of_every_size_go_through_the_activations(backend, device):
    """With mean 0, variance 1 and eps 0, the input is the activation's argument."""
    z = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([-1e4, -88.8, 88.8, 1e4, 1e-30])])
    z = z.to(device).reshape(1, 1, -1)
    mean, var = torch.zeros(1, device=device), torch.ones(1, device=device)
    for name in ACTIVATIONS:
        x = z.clone().requires_grad_()
        y = gradfuse.batch_norm_act(x, mean, var, activation=name, eps=0.0)
        y.sum().backward()
        x64 = z.double().requires_grad_()
        truth = reference.activate(x64, name)
        truth.sum().backward()
        torch.testing.assert_close(y.double(), truth, rtol=2e-6, atol=3e-7)
        torch.testing.assert_close(x.grad.double(), x64.grad, rtol=2e-6, atol=6e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=short)
def test_parameters_wider_than_the_input_as_under_autocast(backend, device, dtype):
    case = Case((3, 6, 8, 8), dtype=dtype, device=device)
    assert case.w.dtype == torch.float32
    ours = run_ours(case)
    assert ours["y"].dtype == dtype
    assert ours["w"].dtype == ours["mean"].dtype == torch.float32
    case.w, case.b, case.mean, case.var = (
        t.to(dtype) for t in (case.w, case.b, case.mean, case.var)
    )
    assert run_ours(case)["w"].dtype == dtype


def test_momentum_as_a_tensor_is_that_number(backend, device):
    case = Case((3, 6, 8, 8), device=device)
    by_number = run_ours(case)
    case.options["momentum"] = torch.tensor(0.3, dtype=torch.float64, device=device)
    assert bits([*run_ours(case).values()]) == bits([*by_number.values()])


def test_the_statistics_of_a_mean_far_from_zero(backend, device):
    """E[x^2] - E[x]^2 would lose all digits here."""
    for dtype, offset in ((torch.float32, 1e5), (torch.float64, 1e8)):
        case = Case(
            (8, 3, 20, 20), dtype=dtype, device=device, activation=None, scale=1.0, offset=offset
        )
        x = case.x.double()
        var, mean = torch.var_mean(x, (0, 2, 3), correction=1)
        ours = run_ours(case)
        kept = 0.7 * case.var.double()
        assert torch.allclose(ours["var"].double() - kept, 0.3 * var, rtol=1e-6)
        shaped = (mean[:, None, None], var[:, None, None])
        n = x.numel() / 3
        z = (x - shaped[0]) * torch.rsqrt(shaped[1] * (n - 1) / n + 1e-3)
        z = z * case.w.double()[:, None, None] + case.b.double()[:, None, None]
        worst = (ours["y"].double() - z - case.r.double()).abs().max()
        assert worst < 4e-6 if dtype == torch.float32 else worst < 1e-6


def test_the_gradients_of_a_mean_far_from_zero(backend, device):
    """float32 differences are from a rounded mean; what the rounding lost comes back in float64."""
    case = Case((8, 3, 20, 20), device=device, activation=None, scale=1.0, offset=1e5)
    case.grad = case.grad + 1.0
    x, g = case.x.double(), case.grad.double()
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    expected = (g * (x - mean) * torch.rsqrt(var + 1e-3)).sum((0, 2, 3))
    torch.testing.assert_close(run_ours(case)["w"].double(), expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("channels_last", [True, False])
def test_gradients_whose_partial_sums_leave_float32(backend, device, channels_last):
    channels = 100 if channels_last else 3  # a thread adds several rows
    case = Case((2, channels, 8, 16), channels_last, device=device, activation=None)
    case.grad = torch.full_like(case.grad, 1e38)
    case.grad[1] = -1e38
    case.x[1] = case.x[0]
    ours = run_ours(case)
    assert not ours["b"].any()
    assert ours["w"].abs().max() < 1e28  # of products that reach 3e38 and cancel


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e18, 1e-22])
def test_huge_and_tiny_channels(backend, device, channels_last, scale):
    case = Case((4, 5, 6, 6), channels_last, device=device, scale=scale, offset=0.0)
    case.var = case.var.double()
    case.mean = case.mean.double()
    ours = run_ours(case)
    assert all(t.isfinite().all() for t in ours.values())
    mean, var = case.x.double().mean((0, 2, 3)), case.x.double().var((0, 2, 3))
    found = (ours["var"] - 0.7 * case.var).cpu()
    if scale > 1.0:
        torch.testing.assert_close(found, 0.3 * var.cpu(), rtol=1e-5, atol=0.0)
    z = (case.x.double() - mean[:, None, None]) * torch.rsqrt(
        var[:, None, None] * (143 / 144) + 1e-3
    )
    z = z * case.w.double()[:, None, None] + case.b.double()[:, None, None] + case.r.double()
    torch.testing.assert_close(ours["y"].double(), z.relu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e30, -1e-30])
def test_constant_channels(backend, device, value):
    for shape in ((4, 5, 6, 6), (64, 5)):
        case = Case(shape, device=device, residual=False, activation=None)
        case.x = torch.full(shape, value, device=device)
        ours = run_ours(case)
        expected = case.b.reshape(-1, *[1] * (len(shape) - 2)).expand(shape)
        torch.testing.assert_close(ours["y"], expected, rtol=1e-6, atol=1e-6)
        assert ours["x"].isfinite().all()


def test_a_huge_constant_channel_and_a_small_eps(backend, device):
    """(0 - mean) / deviation overflows, so the lanes past a run's end must not count."""
    for shape in ((4, 5, 3, 3), (4, 5, 6, 6), (64, 5)):
        case = Case(shape, device=device, residual=False, activation=None)
        case.x = torch.full(shape, 3e36, device=device)
        case.options["eps"] = 1e-12
        assert all(t.isfinite().all() for t in run_ours(case).values())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [
        ((4, 5, 6, 6), False),
        ((4, 5, 6, 6), True),
        ((70, 5), False),
        ((2, 2, 80, 80), False),
        ((2, 2, 80, 80), True),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float32, 3e38), (torch.bfloat16, 3e38), (torch.float64, 1e200)],
    ids=["float32", "bfloat16", "float64"],
)
def test_differences_or_squares_that_overflow(
    backend, device, dtype, value, shape, channels_last, training
):
    """Elements at both ends of the range. In float64 the variance is infinite, as in torch."""
    case = Case(shape, channels_last, dtype, device, activation="silu", training=training)
    large = torch.full_like(case.x, value)
    case.x = torch.where(case.x > 1.0, large, -large)
    if not training:
        case.mean = case.mean.double() * 0.0 + case.x.double().max()
        case.var = case.mean.square()
    case.mean, case.var = case.mean.double(), case.var.double()
    truth, ours = run_torch(case, torch.float64), run_ours(case)
    tolerance = max(4.0 * torch.finfo(dtype).eps, 1e-12)
    for name, t in truth.items():
        assert t.isfinite().all() or name == "var"
        size = {"var": 0.0, "mean": value}.get(name, t.abs().max().item())
        torch.testing.assert_close(ours[name].double(), t, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [
        ((8, 4, 60, 60), False),
        ((8, 4, 60, 60), True),
        ((30000, 4), False),
        ((8, 4, 9, 9), False),
    ],
)
def test_an_outlier_where_the_sums_begin(backend, device, shape, channels_last):
    """The kernels sum differences from a channel's first element. If it is far from all others,
    the squares cancel."""
    case = Case(shape, channels_last, device=device, residual=False, activation=None)
    case.x = case.x * 0.0 + 1.0 / 3.0
    case.x[(0, slice(None), *[0] * (len(shape) - 2))] = 1e4
    ours, truth = run_ours(case), run_torch(case, torch.float64)
    for name in ("y", "mean", "var"):
        torch.testing.assert_close(ours[name].double(), truth[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
def test_an_outlier_where_the_sums_of_float64_begin(backend, device, channels_last):
    """No wider type sums again. The variance is right to count * eps all the same."""
    case = Case((2, 2, 80, 56), channels_last, torch.float64, device=device, residual=False)
    case.options = {"momentum": 1.0}
    case.x[0, :, 0, 0] = 1e4
    values = case.x.movedim(1, 0).flatten(1).cpu().numpy().astype(np.longdouble)
    count = values.shape[1]
    unbiased = values.var(axis=1) * count / (count - 1)
    case.var.zero_()
    ours = run_ours(case)["var"].cpu().numpy()
    assert np.abs(ours / unbiased - 1).max() <= count * np.finfo(np.float64).eps


def test_odd_channel_counts_and_many_channels(backend, device):
    for channels in (1, 3, 31, 257) if backend == "ptx" else (1, 3, 31, 257, 4099, 65537):
        for shape in ((2, channels), (2, channels, 3)):
            case = Case(shape, device=device)
            assert_close(run_ours(case), run_torch(case, torch.float64), run_torch(case))


def test_the_mask_is_that_of_the_rounded_output(backend, device):
    """bfloat16 rounds 2^-134 to 0 and 6 - 2^-6 to 6, so no gradient passes. float16 does so too."""
    for dtype, tiny, gap in (
        (torch.bfloat16, 2.0**-134, 2.0**-6),
        (torch.float16, 2.0**-25, 2.0**-9),
    ):
        bias = torch.tensor([tiny, tiny * 1.5, 6.0 - gap, 6.0 - 2 * gap], device=device)
        x = torch.zeros(2, 4, dtype=dtype, device=device, requires_grad=True)
        mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
        y = gradfuse.batch_norm_act(x, mean, var, None, bias, activation="relu6", eps=0.0)
        y.sum().backward()
        assert (y > 0).tolist() == [[False, True, True, True]] * 2
        assert (y < 6).tolist() == [[True, True, False, True]] * 2
        assert (x.grad != 0).tolist() == [[False, True, False, True]] * 2


def test_no_gradient_where_the_activation_is_exactly_zero(backend, device):
    x = torch.zeros(4, 3, 5, device=device, requires_grad=True)
    r = torch.zeros(4, 3, 5, device=device, requires_grad=True)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    gradfuse.batch_norm_act(x, mean, var, residual=r).sum().backward()
    assert not x.grad.any()
    assert not r.grad.any()


def test_nan_and_inf_go_where_torch_lets_them(backend, device):
    for name in ACTIVATIONS:
        # silu and gelu compute inf * 0, for which torch's own kernels do not agree.
        piecewise = name in (None, "relu", "relu6", "leaky_relu", "sigmoid", "tanh")
        for bad in (math.nan, math.inf, -math.inf) if piecewise else (math.nan,):
            case = Case((2, 3, 4, 4), device=device, activation=name, training=False)
            case.x[0, 1, 2, 3] = bad
            ours, theirs = run_ours(case), run_torch(case)
            for key in ("y", "r", "x"):
                assert ours[key].isnan().tolist() == theirs[key].isnan().tolist(), (name, bad, key)


def test_layouts_of_every_tensor(backend, device):
    base = Case((4, 6, 8, 10), device=device)
    expected = run_ours(base)
    views = {
        "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
    }
    for of_x in (None, *views):
        for of_r in (None, *views):
            case = Case((4, 6, 8, 10), device=device)
            case.x = views[of_x](case.x) if of_x else case.x
            case.r = views[of_r](case.r) if of_r else case.r
            case.grad = views[of_r](case.grad) if of_r else case.grad
            ours = run_ours(case)
            assert ours["y"].is_contiguous(memory_format=torch.channels_last) == (
                of_x == "channels last"
            )
            for name, value in ours.items():
                torch.testing.assert_close(value, expected[name], rtol=2e-5, atol=2e-5)


def test_gaps_keep_the_memory_format(backend, device):
    """As in torch. A compiled graph gets the strides from output_like, which must agree."""
    dense = random(4, 8, 5, 6, device=device)
    last = dense.contiguous(memory_format=torch.channels_last)
    for x in (last[:, :4], last[..., ::2], dense[:, :4], dense.transpose(2, 3), last[..., :1, :1]):
        case = Case(tuple(x.shape), device=device)
        case.x, case.r = x, x.clone()
        stock = F.batch_norm(x, None, None, training=True)
        assert run_ours(case)["y"].stride() == stock.stride()
        assert reference.output_like(x).stride() == stock.stride()


def test_a_sequence_with_its_channels_last(backend, device):
    case = Case((4, 6, 8), device=device)
    expected = run_ours(case)
    case.x = case.x.transpose(1, 2).contiguous().transpose(1, 2)
    ours = run_ours(case)
    assert ours["y"].stride() == case.x.stride()
    torch.testing.assert_close(ours["y"], expected["y"])


def test_residuals_that_broadcast_or_are_the_input(backend, device):
    x = random(4, 6, 5, 5, device=device)
    w, b = random(6, device=device), random(6, device=device, seed=2)
    for shape in ((6, 1, 1), (4, 6, 1, 1), (1,), (5, 5), ()):
        ours, stock = (
            [t.clone().requires_grad_() for t in (x, random(*shape, device=device))]
            for _ in range(2)
        )
        y = gradfuse.batch_norm_act(ours[0], None, None, w, b, residual=ours[1], training=True)
        z = F.relu(F.batch_norm(stock[0], None, None, w, b, True) + stock[1])
        y.square().sum().backward()
        z.square().sum().backward()
        for p, q in zip(ours, stock, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-5, atol=2e-4)
    p, q = x.clone().requires_grad_(), x.clone().requires_grad_()
    gradfuse.batch_norm_act(
        p, None, None, w, b, residual=p, training=True
    ).square().sum().backward()
    F.relu(F.batch_norm(q, None, None, w, b, True) + q).square().sum().backward()
    torch.testing.assert_close(p.grad, q.grad, rtol=2e-5, atol=2e-4)


def test_residuals_of_other_dtypes_promote_as_an_add_does(backend, device):
    x = random(4, 6, 5, dtype=torch.bfloat16, device=device)
    r = random(4, 6, 5, device=device)
    wide = x.float().requires_grad_()
    leaf = x.clone().requires_grad_()
    y = gradfuse.batch_norm_act(leaf, None, None, residual=r, training=True)
    z = F.relu(F.batch_norm(wide, None, None, None, None, True) + r)
    torch.testing.assert_close(y, z)  # float32, without rounding in between
    y.square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close(leaf.grad, wide.grad.bfloat16())
    y = gradfuse.batch_norm_act(r, None, None, residual=x, training=True)
    z = F.relu(F.batch_norm(r, None, None, None, None, True) + x)
    torch.testing.assert_close(y, z)
    number = torch.tensor(0.5, dtype=torch.float64, device=device)  # 0-d: does not widen
    assert gradfuse.batch_norm_act(r, None, None, residual=number, training=True).dtype == r.dtype
    larger = random(2, 4, 6, 5, device=device)
    y = gradfuse.batch_norm_act(r, None, None, residual=larger, training=True)
    z = F.relu(F.batch_norm(r, None, None, None, None, True) + larger)
    torch.testing.assert_close(y, z)


def test_empty_batches(backend, device):
    for shape in ((0, 5), (0, 5, 3, 3), (2, 5, 0)):
        case = Case(shape, device=device)
        ours = run_ours(case)
        assert ours["y"].shape == shape
        assert not ours["w"].any()
        assert not ours["b"].any()
        assert torch.equal(ours["mean"], case.mean)
        assert torch.equal(ours["var"], case.var)


def test_without_running_statistics_or_parameters(backend, device):
    x = random(4, 6, 5, device=device)
    stock = F.relu(F.batch_norm(x, None, None, None, None, True))
    torch.testing.assert_close(gradfuse.batch_norm_act(x, None, None, training=True), stock)
    for w, b in ((random(6, device=device), None), (None, random(6, device=device))):
        stock = F.relu(F.batch_norm(x, None, None, w, b, True))
        torch.testing.assert_close(
            gradfuse.batch_norm_act(x, None, None, w, b, training=True), stock
        )


def test_torchs_own_samples(backend, device):
    """OpInfo's inputs of nn.functional.batch_norm."""
    (info,) = (
        op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name
    )
    count = 0
    for sample in info.sample_inputs(torch.device("cpu"), torch.float32, requires_grad=False):
        if sample.input.ndim < 2:
            continue
        x = sample.input.to(device)
        positional = [None if t is None else t.clone().to(device) for t in sample.args]
        cloned = [None if t is None else t.clone() for t in positional]
        kwargs = {
            k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in sample.kwargs.items()
        }
        expected = F.batch_norm(x, *cloned, **kwargs)
        got = gradfuse.batch_norm_act(x, *positional, activation=None, **kwargs)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        for a, b in zip(positional[:2], cloned[:2], strict=True):
            torch.testing.assert_close(a, b)
        count += 1
    assert count > 5


SPLIT = ((2, 3, 500, 500), (64, 5, 97, 61), (700000, 3), (8, 2048, 7, 7), (5000, 3, 40))


@pytest.mark.parametrize("shape", SPLIT)
def test_large_shapes(native, shape):
    case = Case(shape, dtype=torch.float32)
    assert_close(run_ours(case), run_torch(case, torch.float64), run_torch(case))


def test_autocast_is_that_of_batch_norm(backend, device):
    x = random(4, 6, 5, 5, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            stock = F.batch_norm(x.to(dtype), None, None, None, None, True)
            ours = gradfuse.batch_norm_act(x.to(dtype), None, None, activation=None, training=True)
            assert ours.dtype == stock.dtype


@pytest.mark.parametrize("dtype", REAL, ids=short)
@pytest.mark.parametrize("channels_last", [False, True])
def test_storing_past_the_caches_changes_no_bit(native, dtype, channels_last):
    """As results do that are larger than the last cache, here said to be one byte."""
    # Rows that begin with a cache line, and rows that do not; spans of channels and of positions.
    for shape in ((3, 64, 8, 8), (2, 5, 16, 16), (2, 3, 128, 128), (3, 33, 7, 7)):
        case = Case(shape, channels_last, dtype)
        expected = bits([*run_ours(case).values()])
        try:
            native.set_last_level_cache(1)
            streamed = run_ours(case)
        finally:
            native.set_last_level_cache(0)
        assert bits([*streamed.values()]) == expected


def test_a_dropped_path_is_selected(backend, device):
    """A sample of inf makes its channels NaN; where it is dropped the residual counts."""
    x = random(8, 3, 4, 4, device=device)
    x[2, 1] = math.inf
    r = random(8, 3, 4, 4, device=device, seed=2)
    dropped = path_scale("test", x, 0.5, generator=torch.Generator().manual_seed(6)) == 0
    assert 0 < int(dropped.sum()) < 8
    for channels_last in (False, True):
        form = torch.channels_last if channels_last else torch.contiguous_format
        y = gradfuse.batch_norm_act(
            x.contiguous(memory_format=form), None, None, residual=r, training=True,
            drop_path=0.5, generator=torch.Generator().manual_seed(6),
        )  # fmt: skip
        assert torch.equal(y[dropped], r[dropped].relu())
        assert y[~dropped][:, 1].isnan().all()
    assert torch.equal(
        gradfuse.batch_norm_act(x, None, None, residual=r, training=True, drop_path=1.0), r.relu()
    )


@pytest.mark.backends("cpu", "reference", arithmetic=False)
def test_a_dropout_depends_on_no_layout(backend):
    x = random(4, 6, 5, 5)
    found = [
        gradfuse.batch_norm_act(
            x.contiguous(memory_format=form), None, None, training=True, activation=None, p=0.5,
            generator=torch.Generator().manual_seed(6),
        )
        for form in (torch.contiguous_format, torch.channels_last)
    ]  # fmt: skip
    assert found[1].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found[0] == 0, found[1] == 0)
    evaluated = gradfuse.batch_norm_act(
        x, torch.zeros(6), torch.ones(6), activation=None, p=0.5, drop_path=0.5, eps=1e-5
    )
    torch.testing.assert_close(evaluated, x, rtol=1e-4, atol=1e-4)
