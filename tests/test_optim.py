"""gradfuse.optim.AdamW and SGD: the numbers of a step against torch's clip and fused optimizers."""

import functools
import math

import numpy as np
import pytest
import torch
from helpers import (
    COMPLEX,
    HOST_BACKENDS,
    REAL,
    SANITIZED,
    assert_as_close_as_torch,
    bits,
    random,
    short,
    ulps_apart,
    wide,
)

import gradfuse
from gradfuse.optim import LAMB, SGD, Adam, AdamW, Lion, ScheduleFreeAdamW

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = [(40, 30), (1,), (), (0,), (4099,), (7, 3, 2)]
TORCHS = {AdamW: torch.optim.AdamW, SGD: torch.optim.SGD}
plain_code = pytest.mark.skipif(SANITIZED, reason="a sanitizer finds as much in a few steps")
BOTH = pytest.mark.parametrize("rule", [AdamW, SGD], ids=lambda r: r.__name__)
EVERY = pytest.mark.parametrize(
    "rule", [AdamW, SGD, Adam, LAMB, Lion, ScheduleFreeAdamW], ids=lambda r: r.__name__
)


def named(option):
    if isinstance(option, dict):
        return "-".join(f"{k}" for k in option) or "plain"
    return option.__name__


def fresh(dtype=torch.float32, device="cpu", shapes=SHAPES):
    """Parameters with the same values in every call."""
    return [
        torch.nn.Parameter(random(*s, dtype=dtype, device=device, seed=i))
        for i, s in enumerate(shapes)
    ]


@functools.cache
def gradient(shape, dtype, device, scale, seed):
    return random(*shape, dtype=dtype, device=device, scale=scale, seed=seed)


def fill(params, step, scale=1.0):
    for i, p in enumerate(params):
        seed = 100 * (step % 5) + i
        p.grad = gradient(p.shape, p.dtype, p.device, scale, seed).clone()


def made(rule, params, **options):
    options.setdefault("lr", 0.01)
    if issubclass(rule, torch.optim.SGD):
        options.setdefault("momentum", 0.9)
    return rule(params, **options)


def contents(optimizer):
    """Bits of parameters and state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [
        (name, bits(t))
        for p in params
        for name, t in sorted(optimizer.state.get(p, {}).items())
        if isinstance(t, torch.Tensor)
    ]
    return bits(params), state


def run_torch(rule, params, grads_like, steps, max_norm, options, **more):
    """Steps with torch's clip and optimizer, on the gradients of grads_like, converted."""
    optimizer = TORCHS[rule](params, **{"lr": 0.01, **options}, **more)
    for step in range(steps):
        fill(grads_like, step)
        for p, like in zip(params, grads_like, strict=True):
            p.grad = real(like.grad).to(p.dtype, copy=True)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()
    return optimizer


def compare(rule, options, dtype, device, steps, max_norm, shapes=SHAPES):
    ours = fresh(dtype, device, shapes)
    # torch's fused kernels take no complex numbers, so they get the real and imaginary parts.
    theirs = [torch.nn.Parameter(real(p).clone()) for p in ours]
    truth = [torch.nn.Parameter(real(p).double().clone()) for p in ours]
    optimizer = rule(ours, **{"lr": 0.01, **options}, clip=max_norm)
    for step in range(steps):
        fill(ours, step)
        optimizer.step()
    source = fresh(dtype, device, shapes)
    run_torch(rule, theirs, source, steps, max_norm, options, fused=True)
    # A Python number: torch computes 1 - lr * weight_decay in float32 if lr is a Tensor.
    exact = {**options, "lr": float(options.get("lr", 0.01))}
    run_torch(rule, truth, source, steps, max_norm, exact, foreach=False)
    for a, t, b in zip(ours, truth, theirs, strict=True):
        assert_as_close_as_torch(real(a), wide(t), b)


def real(t):
    return torch.view_as_real(t.detach()) if t.is_complex() else t.detach()


THOUSAND = [
    (AdamW, {"weight_decay": 0.0}),
    (AdamW, {"amsgrad": True, "weight_decay": 0.3}),
    (AdamW, {"maximize": True, "betas": (0.5, 0.7), "eps": 1e-3}),
    (SGD, {}),
    (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (SGD, {"momentum": 0.9, "dampening": 0.3, "maximize": True}),
]
THOUSAND_SHAPES = [(1,), (7,), (33, 5), (300,)]
BOUND = 10.0  # a third of the thousand steps' norms are smaller


def gradients(dtype, step):
    """The gradients of one of the thousand steps. There are 24 sets, of three scales."""
    scale = (0.1, 1.0, 10.0)[step % 3]
    seed = 100 * (step % 24)
    return [
        gradient(shape, dtype, torch.device("cpu"), scale, seed + i)
        for i, shape in enumerate(THOUSAND_SHAPES)
    ]


def flat(tensors):
    return np.concatenate([wide(t).ravel() for t in tensors])


def truly_stepped(rule, options, x, grads, steps):
    """x after torch's clip and optimizer, in numpy's widest type; grads are used in turn."""
    x = x.astype(np.longdouble)
    g_of = [g.astype(np.longdouble) for g in grads]
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    lr, eps, momentum = 0.01, options.get("eps", 1e-8), options.get("momentum", 0.0)
    decay = options.get("weight_decay", 0.01 if rule is AdamW else 0.0)
    m, v, top = (np.zeros_like(x) for _ in range(3))
    for step in range(1, steps + 1):
        g = g_of[(step - 1) % len(g_of)]
        g = g * min(1.0, BOUND / (np.sqrt((g * g).sum()) + 1e-6))
        g = -g if options.get("maximize") else g
        if rule is AdamW:
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            top = np.maximum(top, v)
            root = np.sqrt((top if options.get("amsgrad") else v) / (1 - beta2**step))
            x = x * (1 - lr * decay) - lr / (1 - beta1**step) * m / (root + eps)
        else:
            g = g + decay * x
            m = momentum * m + (1.0 if step == 1 else 1 - options.get("dampening", 0.0)) * g
            x = x - lr * (g + momentum * m if options.get("nesterov") else m)
    return x


@functools.cache
def thousand(index, dtype, steps=1000):
    """(truth, torch's) parameters after a thousand steps, as one vector each."""
    rule, options = THOUSAND[index]
    params = fresh(dtype, shapes=THOUSAND_SHAPES)
    grads = [flat(gradients(dtype, step)) for step in range(24)]
    truth = truly_stepped(rule, options, flat(params), grads, steps)
    optimizer = TORCHS[rule](params, lr=0.01, fused=True, **options)
    for step in range(steps):
        for p, g in zip(params, gradients(dtype, step), strict=True):
            p.grad = g.clone()
        torch.nn.utils.clip_grad_norm_(params, BOUND)
        optimizer.step()
    return truth, flat(params)


@plain_code
@HOST_BACKENDS
@pytest.mark.parametrize("dtype", REAL, ids=short)
@pytest.mark.parametrize("index", range(len(THOUSAND)), ids=lambda i: named(THOUSAND[i][1]))
def test_a_thousand_steps(index, dtype, backend):
    """Compares all parameters as one vector: after so many roundings torch's error in a single
    element is as good as random, and may be 0."""
    rule, options = THOUSAND[index]
    params = fresh(dtype, shapes=THOUSAND_SHAPES)
    optimizer = rule(params, lr=0.01, clip=BOUND, **options)
    for step in range(1000):
        for p, g in zip(params, gradients(dtype, step), strict=True):
            p.grad = g
        optimizer.step()
    truth, torchs = thousand(index, dtype)
    error, allowed = (np.abs(each - truth).max() for each in (flat(params), torchs))
    size = np.abs(truth).max()
    assert error <= 4.0 * allowed + 2.0 * torch.finfo(dtype).eps * size, (
        f"error {error:.3g}, torch's is {allowed:.3g}, values are up to {size:.3g}"
    )


@pytest.mark.no_kernel
@pytest.mark.parametrize("index", range(len(THOUSAND)), ids=lambda i: named(THOUSAND[i][1]))
def test_the_truth_of_a_thousand_steps_is_torchs(index):
    truth, torchs = thousand(index, torch.float64, 100)
    np.testing.assert_allclose(torchs, truth.astype(float), rtol=1e-12, atol=1e-14)


@plain_code
@BOTH
@pytest.mark.backends("cpu")
def test_a_thousand_steps_of_any_number_of_threads(rule, threads, backend):
    def outcome():
        params = fresh(shapes=[(520_000,), (33, 5)])
        optimizer = made(rule, params, clip=BOUND)
        for step in range(1000):
            for i, p in enumerate(params):
                p.grad = gradient(p.shape, p.dtype, p.device, (0.001, 1.0)[step % 2], i)
            optimizer.step()
        return contents(optimizer)

    threads(1)
    expected = outcome()
    threads(3)
    same = outcome() == expected  # a difference of megabytes takes pytest minutes to show
    assert same


@BOTH
def test_without_a_clip_it_is_torch(rule, device):
    compare(rule, {"momentum": 0.9} if rule is SGD else {}, torch.float32, device, 4, None)


@BOTH
def test_mixed_dtypes(rule, device):
    dtypes = (*REAL, *COMPLEX)
    params = [torch.nn.Parameter(random(50, dtype=d, device=device)) for d in dtypes]
    optimizer = made(rule, params, clip=1.0)
    fill(params, 0)
    grads = bits([p.grad for p in params])
    optimizer.step()
    assert bits([p.grad for p in params]) == grads
    clipper = gradfuse.GradClipper(params, 1.0)
    assert optimizer.report.total_norm == clipper.clip_().total_norm
    for p in params:
        alone = torch.nn.Parameter(random(50, dtype=p.dtype, device=device))
        alone.grad = p.grad.clone()
        made(rule, [alone]).step()
        tolerance = 4 * torch.finfo(p.dtype).eps
        torch.testing.assert_close(p.detach(), alone.detach(), rtol=tolerance, atol=tolerance)


@BOTH
def test_each_dtype_is_updated_as_if_alone(rule, device):
    """Bit for bit, in one step of one optimizer."""
    options = {"weight_decay": 0.1, **({"amsgrad": True} if rule is AdamW else {})}
    mixed = [fresh(dtype, device, [(33,)])[0] for dtype in (*REAL, *COMPLEX)]
    together = made(rule, mixed, **options)
    for step in range(2):
        fill(mixed, step)
        together.step()
    assert (
        len({s[name].dtype for s in together.state.values() for name in s if name != "step"}) == 6
    )
    for i, p in enumerate(mixed):
        alone = fresh(p.dtype, device, [(33,)])[0]
        one = made(rule, [alone], **options)
        for step in range(2):
            alone.grad = gradient(p.shape, p.dtype, p.device, 1.0, 100 * step + i).clone()
            one.step()
        assert bits(alone) == bits(p)
        assert [bits(t) for t in one.state[alone].values()] == [
            bits(t) for t in together.state[p].values()
        ]


@BOTH
@pytest.mark.parametrize("materialize", [False, True])
@pytest.mark.parametrize("dtype", REAL, ids=short)
def test_gradients_and_report_are_the_clippers(rule, materialize, dtype, device):
    params, others = fresh(dtype, device), fresh(dtype, device)
    fill(params, 0)
    fill(others, 0)
    before = bits([p.grad for p in params])
    optimizer = made(rule, params, clip=0.5, materialize_clipped_grads=materialize)
    optimizer.step()
    clipper = gradfuse.GradClipper(others, 0.5)
    report = clipper.clip_()
    after = bits([p.grad for p in params])
    assert after == (bits([p.grad for p in others]) if materialize else before)
    got, expected = optimizer.report.to_dict(), report.to_dict()
    for each in (got, expected):
        each.pop("nonfinite")
    assert got == expected
    assert optimizer.report.clipped


@BOTH
@pytest.mark.parametrize("scale", [1e20, 1e-30])
def test_gradients_whose_squares_do_not_fit(rule, scale, device):
    """torch's clip turns gradients of 1e20 into zeros."""
    params = [torch.nn.Parameter(torch.zeros(64, device=device)) for _ in range(2)]
    fill(params, 0, scale)
    true = [wide(p.grad) for p in params]
    norm = math.sqrt(sum((t**2).sum() for t in true))
    # torch adds 1e-6 to the norm, so clipping a far smaller norm would leave almost nothing.
    bound = norm / 10 if scale > 1 else 1.0
    optimizer = made(rule, params, lr=1.0 / scale if rule is SGD else 1.0, clip=bound)
    optimizer.step()
    assert optimizer.report.total_norm == pytest.approx(norm, rel=1.2e-6, abs=0.0)
    coefficient = min(1.0, bound / (norm + 1e-6))
    for p, t in zip(params, true, strict=True):
        if rule is SGD:
            expected = torch.from_numpy(-t * coefficient / scale).float()
            torch.testing.assert_close(p.detach().cpu(), expected, rtol=1e-5, atol=0.0)
        first = optimizer.state[p]["momentum_buffer" if rule is SGD else "exp_avg"]
        share = coefficient * (1.0 if rule is SGD else 0.1)
        torch.testing.assert_close(
            first.cpu(), torch.from_numpy(t * share).float(), rtol=1e-5, atol=0.0
        )


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_skip_changes_nothing(rule, bad, device):
    params = fresh(device=device)
    optimizer = made(rule, params, clip=1.0)
    fill(params, 0)
    optimizer.step()
    before = contents(optimizer)
    params[4].grad[4098] = bad
    grads = bits([p.grad for p in params])
    optimizer.step()
    assert contents(optimizer) == before
    assert bits([p.grad for p in params]) == grads
    assert optimizer.skipped_steps == 1
    assert optimizer.report.skipped
    fill(params, 1)
    optimizer.step()
    assert contents(optimizer) != before
    assert optimizer.skipped_steps == 1


@BOTH
def test_skip_in_the_first_step_and_without_a_clip(rule, device):
    params = fresh(device=device)
    optimizer = made(rule, params)
    fill(params, 0)
    params[1].grad.fill_(math.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for step in range(2):
        fill(params, step)
        optimizer.step()
    others = fresh(device=device)
    clean = made(rule, others)
    for step in range(2):
        fill(others, step)
        clean.step()
    assert contents(optimizer) == contents(clean)


@BOTH
def test_error_writes_nothing(rule, device):
    params = fresh(device=device)
    optimizer = made(rule, params, clip=1.0, nonfinite="error")
    fill(params, 0)
    optimizer.step()
    before = contents(optimizer)
    params[0].grad[3, 3] = math.nan
    with pytest.raises(RuntimeError, match="step"):
        optimizer.step()
    assert contents(optimizer) == before
    assert optimizer.skipped_steps == 0


@BOTH
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_propagate_is_torch(rule, clip, bad, device):
    ours, theirs = fresh(device=device), fresh(device=device)
    optimizer = made(rule, ours, clip=clip, nonfinite="propagate", weight_decay=0.1)
    other = TORCHS[rule](
        theirs, lr=0.01, weight_decay=0.1, fused=True, **({"momentum": 0.9} if rule is SGD else {})
    )
    for params in (ours, theirs):
        fill(params, 0)
        params[0].grad[3, 3] = bad
    optimizer.step()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(theirs, clip)
    other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), equal_nan=True)


@BOTH
def test_layouts(rule, device):
    """The numbers do not depend on the strides of parameter and gradient."""

    def laid_out():
        base = random(2, 4, 6, 5, device=device)
        wide_rows = torch.zeros(20, 16, device=device)[:, 3:9].copy_(random(20, 6, device=device))
        odd = torch.zeros(101, device=device)[1:].copy_(random(100, device=device))
        flipped = torch.zeros(6, 9, device=device).t().copy_(random(9, 6, device=device))
        return [
            torch.nn.Parameter(t)
            for t in (base.to(memory_format=torch.channels_last), wide_rows, odd, flipped)
        ]

    params = laid_out()
    plain = [torch.nn.Parameter(p.detach().clone().contiguous()) for p in laid_out()]
    a, b = made(rule, params, clip=1.0), made(rule, plain, clip=1.0)
    for step in range(3):
        fill(params, step)
        fill(plain, step)
        if step == 1:  # gradients with other strides than their parameters
            params[3].grad = params[3].grad.t().contiguous().t()
            params[2].grad = torch.stack([params[2].grad] * 2, 1)[:, 0]
            params[0].grad = params[0].grad.contiguous()
        a.step()
        b.step()
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-7)


@BOTH
def test_the_gap_of_a_view_is_not_written(rule, device):
    whole = random(20, 16, device=device)
    before = whole.clone()
    p = torch.nn.Parameter(whole[:, 3:9])
    p.data = whole[:, 3:9]
    optimizer = made(rule, [p], clip=1.0)
    fill([p], 0)
    optimizer.step()
    assert bits(whole[:, :3]) == bits(before[:, :3])
    assert bits(whole[:, 9:]) == bits(before[:, 9:])
    assert bits(whole[:, 3:9]) != bits(before[:, 3:9])


@BOTH
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_the_same_parameter_twice(rule, device):
    p, q = fresh(device=device, shapes=[(5, 3)]), fresh(device=device, shapes=[(5, 3)])
    twice, once = made(rule, [p[0], p[0]], clip=1.0), made(rule, q, clip=1.0)
    fill(p, 0)
    fill(q, 0)
    twice.step()
    once.step()
    assert bits(p) == bits(q)
    assert twice.report.total_norm == once.report.total_norm


@BOTH
def test_update_of_one_parameter_does_not_depend_on_others(rule, device):
    """The size of a chunk depends on the sizes of all parameters."""
    alone = fresh(device=device, shapes=[(4099,)])
    among = fresh(device=device, shapes=[(4099,), (300, 300), (3,)])
    one, many = made(rule, alone), made(rule, among)
    for step in range(2):
        fill(alone, step)
        fill(among, step)
        one.step()
        many.step()
    assert bits(alone[0]) == bits(among[0])


def test_update_clip_is_stable_adamw(device):
    beta1, beta2, eps, lr, decay = 0.9, 0.99, 1e-6, 0.05, 0.1
    params = fresh(device=device)
    optimizer = AdamW(
        params, lr, (beta1, beta2), eps, decay, update_clip=True, nonfinite="propagate"
    )
    x = [p.detach().double().clone() for p in params]
    m = [torch.zeros_like(t) for t in x]
    v = [torch.zeros_like(t) for t in x]
    slowed = 0
    for step in range(1, 7):
        fill(params, step, scale=30.0 if step == 4 else 0.1)
        for k, p in enumerate(params):
            g = p.grad.double()
            m[k] = beta1 * m[k] + (1 - beta1) * g
            v[k] = beta2 * v[k] + (1 - beta2) * g * g
            corrected_m, corrected_v = m[k] / (1 - beta1**step), v[k] / (1 - beta2**step)
            rms = 0.0
            if g.numel():
                rms = (g * g / corrected_v.clamp(min=eps**2)).mean().sqrt().item()
            slowed += rms > 1.0
            rate = lr / max(1.0, rms)
            x[k] = x[k] - rate * decay * x[k] - rate * corrected_m / (corrected_v.sqrt() + eps)
        optimizer.step()
    assert slowed > 3
    for p, t in zip(params, x, strict=True):
        torch.testing.assert_close(p.detach().double(), t, rtol=2e-5, atol=2e-6)


@BOTH
def test_master_weights_follow_float32(rule, device):
    low = fresh(torch.bfloat16, device)
    high = [torch.nn.Parameter(p.detach().float()) for p in low]
    a = made(rule, low, clip=1.0, master_weights=True)
    b = made(rule, high, clip=1.0)
    for step in range(5):
        fill(low, step)
        for p, q in zip(high, low, strict=True):
            p.grad = q.grad.float()
        a.step()
        b.step()
    for p, q in zip(low, high, strict=True):
        torch.testing.assert_close(a.state[p]["master_param"], q.detach(), rtol=1e-6, atol=1e-7)
        assert bits(p) == bits(a.state[p]["master_param"].bfloat16())


@BOTH
def test_stochastic_rounding_is_right_on_average(rule, device):
    """Each step is far below half a bfloat16's spacing: with rounding to nearest nothing moves."""
    p = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16, device=device))
    options = {"weight_decay": 0.0} if rule is AdamW else {"momentum": 0.0}
    optimizer = rule([p], lr=2.0**-11, stochastic_rounding=True, **options)
    p.grad = torch.ones_like(p)
    steps = 4
    for _ in range(steps):
        optimizer.step()
    moved = 1.0 - p.detach().double().mean().item()
    assert moved == pytest.approx(steps * 2.0**-11, rel=0.1)
    assert len(set(p.detach().float().tolist())) > 1


def with_the_reference(step):
    """What step() returns here and with the reference. Both use the same random bits."""
    here = step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradfuse._native.backend", gradfuse.reference)
        return here, step()


# All factors of one step are powers of two, or exact in the 8 bits of a bfloat16. So no product is
# rounded, and a fused multiply-add gives the same as a product and a sum. For AdamW this holds in
# the first step only, where 1 - beta**step is 1/4.
EXACT = [
    (AdamW, {"betas": (0.75, 0.75), "lr": 2.0**-4, "weight_decay": 8.0, "eps": 2.0**-10}),
    (AdamW, {"betas": (0.75, 0.75), "lr": 2.0**-6, "amsgrad": True, "weight_decay": 0.0}),
    (SGD, {"lr": 2.0**-5, "momentum": 0.0, "weight_decay": 0.25}),
    (SGD, {"lr": 2.0**-5, "momentum": 0.5, "nesterov": True, "maximize": True}),
    (SGD, {"lr": 2.0**-5, "momentum": 0.5, "dampening": 0.5}),
]


@pytest.mark.parametrize(("rule", "options"), EXACT, ids=named)
def test_stochastic_rounding_has_the_same_bits_everywhere(rule, options, backend, device):
    if backend == "reference":
        pytest.skip("the others are compared with the reference")

    def outcome():
        params = fresh(torch.bfloat16, device)
        optimizer = made(rule, params, stochastic_rounding=True, **options)
        for step in range(1 if rule is AdamW else 4):
            fill(params, step)
            if rule is AdamW:
                for i, p in enumerate(params):
                    second = random(*p.shape, dtype=p.dtype, device=device, seed=50 + i).abs()
                    optimizer.state[p] = {"exp_avg": -p.detach(), "exp_avg_sq": second}
            optimizer.step()
        return contents(optimizer)

    here, there = with_the_reference(outcome)
    assert here == there


@BOTH
def test_stochastic_rounding_of_other_numbers_differs_where_their_last_bit_does(
    rule, backend, device
):
    """Kernels that fuse a product with a sum, or order factors differently, change a float32's last
    bit. Once in 65,536 times that rounds to another bfloat16, the next one."""
    if backend == "reference":
        pytest.skip("the others are compared with the reference")

    def outcome():
        params = fresh(torch.bfloat16, device)
        optimizer = made(rule, params, stochastic_rounding=True)
        for step in range(2):
            fill(params, step)
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in params])

    here, there = with_the_reference(outcome)
    assert (here != there).sum() <= 3  # of 5,342
    assert ulps_apart(here, there) <= 1


ERRORS = [
    ({"clip": -1.0}, ValueError, "clip"),
    ({"clip": math.nan}, ValueError, "clip"),
    ({"nonfinite": "zero"}, ValueError, "nonfinite"),
    ({"master_weights": True, "stochastic_rounding": True}, ValueError, "master_weights"),
    ({"lr": -1.0}, ValueError, "learning rate"),
]


@BOTH
@pytest.mark.parametrize(("options", "kind", "word"), ERRORS)
@pytest.mark.no_kernel
def test_errors_of_the_constructor(rule, options, kind, word):
    with pytest.raises(kind, match=word) as caught:
        made(rule, fresh(), **options)
    assert "\n" not in str(caught.value)


def data(make):
    """Replaces the parameter's data and keeps its gradient, which torch would refuse as p.grad."""

    def breaks(optimizer, p):
        p.data = make(p.detach())

    return breaks


def an_integer(optimizer, p):
    p.requires_grad_(False)
    p.grad = None
    p.data = p.detach().long()
    p.grad = torch.ones_like(p)


def a_freed_gradient(optimizer, p):
    p.grad.untyped_storage().resize_(0)


def a_state_of_another_shape(optimizer, p):
    state = optimizer.state[p]
    name = next(k for k in state if k != "step")
    state[name] = torch.zeros(2, device=p.device)


def a_state_of_another_type(optimizer, p):
    state = optimizer.state[p]
    moment = state[next(k for k in state if k != "step")]
    moment.data = moment.data.half()  # the same tensor, with half the memory


def a_learning_rate_of_two(optimizer, p):
    optimizer.param_groups[0]["lr"] = torch.ones(2)


def a_nan(optimizer, p):
    p.grad.view(-1)[-1] = math.nan
    optimizer._nonfinite = "error"


BREAKS = {
    "another shape": (data(lambda t: t.flatten()[:-1].clone()), r"\[1199\].*got \[40, 30\]"),
    "a shape of as many": (data(lambda t: t.t().contiguous()), r"\[30, 40\].*got \[40, 30\]"),
    "another dtype": (data(lambda t: t.double()), "(?i)(double|float64).* got .*float"),
    "overlapping itself": (data(lambda t: t[:1, :1].expand(40, 30)), "element per memory location"),
    "an integer": (an_integer, "(?i)expected float16, .*got (torch.int64|long)"),
    "a freed gradient": (a_freed_gradient, "expected storage of at least 4800 bytes, got 0"),
    "a state's shape": (a_state_of_another_shape, "shape|size|expected state"),
    "a state's type": (a_state_of_another_type, "(?i)expected state .* got .*half|float16"),
    "two learning rates": (a_learning_rate_of_two, "scalar|one element|one number"),
    "a NaN": (a_nan, "expected a finite total norm"),
}


@BOTH
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("materialize", [False, True], ids=["", "materialize"])
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("what", BREAKS)
def test_errors_of_a_step_write_nothing(rule, what, nonfinite, materialize, last, device):
    params = fresh(device=device)
    options = {"clip": 1.0, "nonfinite": nonfinite, "materialize_clipped_grads": materialize}
    optimizer = made(rule, params[::-1] if last else params, **options)
    fill(params, 0)
    optimizer.step()
    fill(params, 1)
    breaks, message = BREAKS[what]
    breaks(optimizer, params[0])

    def everything():
        grads = [None if what == "a freed gradient" and p is params[0] else p.grad for p in params]
        held = [g.to_dense() for g in grads if g is not None]
        steps = [s["step"].item() for s in optimizer.state.values() if "step" in s]
        return contents(optimizer), bits(held), steps, optimizer.skipped_steps

    before = everything()
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message) as caught:
        optimizer.step()
    assert "\n" not in str(caught.value)
    assert everything() == before


@BOTH
@pytest.mark.parametrize("clip", [None, 1.0])
def test_integer_parameters_are_refused(rule, clip, device):
    """Also in the first step, which creates the state."""
    params = fresh(device=device)
    fill(params, 0)
    whole = torch.nn.Parameter(torch.arange(5, device=device), requires_grad=False)
    whole.grad = torch.ones_like(whole)
    optimizer = made(rule, [*params, whole], clip=clip)
    before = bits([*params, whole]), bits([p.grad for p in [*params, whole]])
    with pytest.raises(TypeError, match=r"(?i)expected float16, .*got (torch.int64|long)"):
        optimizer.step()
    assert (bits([*params, whole]), bits([p.grad for p in [*params, whole]])) == before
    assert not any(t.any() for s in optimizer.state.values() for t in s.values())
    whole.grad = None
    optimizer.step()
    others = fresh(device=device)
    fill(others, 0)
    made(rule, others, clip=clip).step()
    assert bits(params) == bits(others)
