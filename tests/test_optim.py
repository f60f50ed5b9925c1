"""gradfuse.optim.AdamW and SGD: the numbers of a step, beside torch's clip and fused optimizers."""

import functools
import math

import pytest
import torch
from helpers import (
    COMPLEX,
    REAL,
    assert_as_close_as_torch,
    bits,
    random,
    short,
    wide,
)

import gradfuse
from gradfuse.optim import SGD, AdamW

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = [(40, 30), (1,), (), (0,), (4099,), (7, 3, 2)]
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
RULES = [(AdamW, o) for o in ADAMW] + [(SGD, o) for o in SGDS]
TORCHS = {AdamW: torch.optim.AdamW, SGD: torch.optim.SGD}
BOTH = pytest.mark.parametrize("rule", [AdamW, SGD], ids=lambda r: r.__name__)


def named(option):
    if isinstance(option, dict):
        return "-".join(f"{k}" for k in option) or "plain"
    return option.__name__


def fresh(dtype=torch.float32, device="cpu", shapes=SHAPES):
    """Parameters, always the same."""
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
    """torch's clip and optimizer; gradients are those of grads_like, converted."""
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
    # torch's fused kernels take no complex numbers, but the parts of them.
    theirs = [torch.nn.Parameter(real(p).clone()) for p in ours]
    truth = [torch.nn.Parameter(real(p).double().clone()) for p in ours]
    optimizer = rule(ours, **{"lr": 0.01, **options}, clip=max_norm)
    for step in range(steps):
        fill(ours, step)
        optimizer.step()
    source = fresh(dtype, device, shapes)
    run_torch(rule, theirs, source, steps, max_norm, options, fused=True)
    # A Python number: torch's own 1 - lr * weight_decay of a Tensor is a float32.
    exact = {**options, "lr": float(options.get("lr", 0.01))}
    run_torch(rule, truth, source, steps, max_norm, exact, foreach=False)
    for a, t, b in zip(ours, truth, theirs, strict=True):
        assert_as_close_as_torch(real(a), wide(t), b)


def real(t):
    return torch.view_as_real(t.detach()) if t.is_complex() else t.detach()


@pytest.mark.parametrize("dtype", REAL + COMPLEX, ids=short)
@pytest.mark.parametrize(("rule", "options"), RULES, ids=named)
def test_numbers_of_torch(rule, options, dtype, device):
    compare(rule, options, dtype, device, 3, 2.0)


@pytest.mark.parametrize("backend", ["cpu", "reference"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("index", [0, 1, 6, 9], ids=lambda i: named(RULES[i][0]) + str(i))
@pytest.mark.slow
def test_a_thousand_steps(index, dtype, device, backend):
    compare(*RULES[index], dtype, device, 1000, 10.0, [(40, 5), ()])


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
    """torch's clip makes zeros of 1e20."""
    params = [torch.nn.Parameter(torch.zeros(64, device=device)) for _ in range(2)]
    fill(params, 0, scale)
    true = [wide(p.grad) for p in params]
    norm = math.sqrt(sum((t**2).sum() for t in true))
    # Below 1e-6, which torch adds to the norm, nothing is left to clip to.
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
    """Whatever the strides of parameter and gradient, the numbers are those of dense ones."""

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
        if step == 1:  # of other strides than the parameter
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
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_any_number_of_threads(rule, threads, backend):
    def outcome():
        params = fresh(shapes=[(1_200_000,), (33, 7), *[(5,)] * 50, (100_003,)])
        low = fresh(torch.bfloat16, shapes=[(300_001,)])
        one = made(rule, params, clip=1.0, **({"update_clip": True} if rule is AdamW else {}))
        two = made(rule, low, clip=1.0, stochastic_rounding=True)
        for step in range(2):
            fill(params, step)
            fill(low, step)
            one.step()
            two.step()
        return contents(one), contents(two)

    threads(1)
    expected = outcome()
    for n in (2, 8):
        threads(n)
        same = outcome() == expected  # a difference of megabytes takes pytest minutes to show
        assert same


@BOTH
def test_update_of_one_parameter_does_not_depend_on_others(rule, device):
    """Chunks are cut by what all parameters hold together."""
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
    """Each step is far below half a bfloat16's spacing: rounding to nearest would stand still."""
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


@BOTH
def test_stochastic_rounding_has_the_same_bits_everywhere(rule, backend, device):
    """Against the reference, the random bits of which are those of the kernels."""
    if backend == "reference":
        pytest.skip("it is what the others are compared with")
    outcomes = []
    for use_reference in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if use_reference:
                patch.setattr("gradfuse.optim.backend", gradfuse.reference)
            params = fresh(torch.bfloat16, device)
            optimizer = made(rule, params, stochastic_rounding=True)
            for step in range(2):
                fill(params, step)
                optimizer.step()
            outcomes.append(torch.cat([p.detach().flatten().float() for p in params]))
    same = outcomes[0] == outcomes[1]
    assert same.double().mean() > 0.995  # but where sums differ in their last bit


ERRORS = [
    ({"clip": -1.0}, ValueError, "clip"),
    ({"clip": math.nan}, ValueError, "clip"),
    ({"nonfinite": "zero"}, ValueError, "nonfinite"),
    ({"master_weights": True, "stochastic_rounding": True}, ValueError, "master_weights"),
    ({"lr": -1.0}, ValueError, "learning rate"),
]


@BOTH
@pytest.mark.parametrize(("options", "kind", "word"), ERRORS)
def test_errors_of_the_constructor(rule, options, kind, word):
    with pytest.raises(kind, match=word) as caught:
        made(rule, fresh(), **options)
    assert "\n" not in str(caught.value)


@BOTH
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_errors_of_a_step_write_nothing(rule, nonfinite, device):
    def sparse(p):
        return torch.zeros_like(p).to_sparse()

    bad_gradients = {
        "shape": lambda p: p.detach().clone().flatten()[:-1],
        "dtype": lambda p: p.detach().double(),
        "sparse": sparse,
        "shape, of as many": lambda p: p.detach().t().contiguous(),
    }
    for bad in bad_gradients.values():
        params = fresh(device=device)
        optimizer = made(rule, params, nonfinite=nonfinite)
        fill(params, 0)
        optimizer.step()
        before = contents(optimizer)
        fill(params, 1)
        impl = params[0]
        impl.grad = None
        holder = torch.nn.Parameter(impl.detach().clone())
        made_grad = bad(holder)
        with torch.no_grad():
            try:
                impl.grad = made_grad
            except RuntimeError:  # torch refuses it already: a replaced .data makes it possible
                impl.data = made_grad.detach().to_dense().clone()
                impl.grad = impl.detach().clone()
                impl.data = holder.detach().clone() if impl.is_sparse else holder.detach()
        before = contents(optimizer)
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            optimizer.step()
        assert "\n" not in str(caught.value)
        assert contents(optimizer) == before
