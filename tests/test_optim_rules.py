"""Steps that a clip does not freeze: eps_follows_clip and atan2, and Adam, Lion, LAMB and
ScheduleFreeAdamW, against their papers and the usual implementations."""

import copy
import math
import pickle

import papers
import pytest
import torch
from helpers import bits, random

import gradfuse
from gradfuse.optim import LAMB, SGD, Adam, AdamW, Lion, ScheduleFreeAdamW

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = [(40, 30), (1,), (0,), (4099,), (7, 3, 2)]
NEW = pytest.mark.parametrize(
    "rule", [Adam, LAMB, Lion, ScheduleFreeAdamW], ids=lambda rule: rule.__name__
)
MAX_NORM = 1.0


def parameters(dtype=torch.float64, device="cpu", shapes=SHAPES):
    return [
        torch.nn.Parameter(random(*s, dtype=dtype, device=device, seed=i))
        for i, s in enumerate(shapes)
    ]


def fill(params, step, scale=1.0):
    for i, p in enumerate(params):
        p.grad = random(*p.shape, dtype=p.dtype, device=p.device, scale=scale, seed=50 * step + i)


def clip(params):
    """In float64, of a norm that is above MAX_NORM."""
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params))
    assert norm > MAX_NORM
    for p in params:
        p.grad *= MAX_NORM / (norm + 1e-6)


AGAINST_PAPERS = [
    (Adam, torch.optim.Adam, {"weight_decay": 0.1}, {}),
    (Adam, papers.AdamAtan2, {"weight_decay": 0.1}, {"atan2": True}),
    (AdamW, papers.AdamAtan2, {"weight_decay": 0.1, "betas": (0.5, 0.9)}, {"atan2": True}),
    (Lion, papers.Lion, {"weight_decay": 0.1}, {}),
    (LAMB, papers.LAMB, {"weight_decay": 0.1}, {}),
    (LAMB, papers.LAMB, {"weight_decay": 0.0, "always_adapt": True, "trust_clip": True}, {}),
    (ScheduleFreeAdamW, papers.ScheduleFreeAdamW, {"weight_decay": 0.1}, {}),
    (ScheduleFreeAdamW, papers.ScheduleFreeAdamW, {"warmup_steps": 10, "r": 0.5}, {}),
]


@pytest.mark.parametrize(
    ("rule", "paper", "options", "own"), AGAINST_PAPERS, ids=lambda v: getattr(v, "__name__", None)
)
def test_twenty_steps_are_those_of_the_paper(rule, paper, options, own, device):
    ours, theirs = parameters(device=device), parameters()
    if paper is papers.AdamAtan2 and rule is Adam:
        optimizer = paper(theirs, lr=0.01, coupled=True, **options)
    else:
        optimizer = paper(theirs, lr=0.01, **options)
    fused = rule(ours, lr=0.01, clip=MAX_NORM, **options, **own)
    for step in range(20):
        scale = 10.0 ** (step % 3)
        fill(ours, step, scale)
        fill(theirs, step, scale)
        clip(theirs)
        for each in (optimizer, fused):
            each.param_groups[0]["lr"] = 0.01 / (1 + step)
            each.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-11, atol=1e-12)


# The clip and the rules that it does not freeze.


def planted(ratio=1e10):
    """A layer that explodes and one that does not: their gradients' norms are `ratio` apart."""
    large, small = (torch.nn.Parameter(random(64, 8, seed=i)) for i in range(2))

    def fill(step):
        large.grad = ratio * random(64, 8, seed=10 + step)
        # Of one sign: the update of a healthy layer is then the learning rate.
        small.grad = random(64, 8, seed=50 + step).abs()

    return [large, small], fill


def moved(make, steps=20, ratio=1e10):
    """Root mean square of what the small layer moves in a step, in learning rates."""
    params, fill = planted(ratio)
    lr = 1e-4
    optimizer = make(params, lr=lr, clip=1.0, weight_decay=0.0)
    before = params[1].detach().clone()
    for step in range(steps):
        fill(step)
        optimizer.step()
    return float((params[1].detach() - before).square().mean().sqrt()) / (lr * steps)


UNFROZEN = {
    "eps_follows_clip": lambda ps, **o: AdamW(ps, eps_follows_clip=True, **o),
    "atan2": lambda ps, **o: AdamW(ps, atan2=True, **o),
    "Adam": lambda ps, **o: Adam(ps, eps_follows_clip=True, **o),
    "Lion": Lion,
    "LAMB": lambda ps, **o: LAMB(ps, always_adapt=True, **o),
    "ScheduleFreeAdamW": lambda ps, **o: ScheduleFreeAdamW(ps, eps_follows_clip=True, **o),
}


def test_a_clip_freezes_a_small_layer_under_adamw():
    assert moved(AdamW, ratio=1.0) > 0.8
    assert moved(AdamW) < 1e-3


@pytest.mark.parametrize("name", UNFROZEN)
def test_a_small_layer_keeps_a_fifth_of_the_learning_rate(name):
    assert moved(UNFROZEN[name]) >= 0.2


@pytest.mark.parametrize("ratio", [1e16, 1e24, 1e32, 1e37])
def test_an_eps_that_follows_never_lets_a_layer_jump(ratio):
    """Where the second moment underflows, the first does not yet."""
    assert moved(UNFROZEN["eps_follows_clip"], ratio=ratio) <= 1.2
    assert moved(UNFROZEN["atan2"], ratio=ratio) <= 1.6  # pi / 2


@pytest.mark.parametrize("materialize", [False, True])
@pytest.mark.parametrize("policy", [False, True])
def test_an_update_does_not_depend_on_the_clip(materialize, policy, device):
    """With eps_follows_clip it is AdamW's without a clip, whatever the coefficient. Also where the
    clip writes gradients, and where each parameter has a coefficient of its own."""
    free, clipped = (parameters(device=device, shapes=[(9, 4), (5,)]) for _ in range(2))
    bound = gradfuse.policies.AdaGC(max_norm=1e-7, warmup=1) if policy else 1e-7
    # Without memory, because coefficients differ from step to step.
    options = {"lr": 0.01, "eps": 1e-2, "betas": (0.0, 0.0), "nonfinite": "propagate"}
    a = AdamW(free, **options)
    b = AdamW(
        clipped,
        **options,
        clip=bound,
        eps_follows_clip=True,
        materialize_clipped_grads=materialize,
    )
    for params, optimizer in ((free, a), (clipped, b)):
        for step in range(3):
            fill(params, step, 1000.0**step)
            optimizer.step()
    for p, q in zip(free, clipped, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_eps_follows_the_clip_as_documented():
    """Against AdamW with the coefficient's eps, written out."""
    ours, theirs = parameters(), parameters()
    fused = AdamW(ours, lr=0.01, clip=MAX_NORM, eps=1e-3, eps_follows_clip=True)
    paper = papers.AdamWFollowing(theirs, MAX_NORM, lr=0.01, eps=1e-3)
    for step in range(10):
        fill(ours, step, 10.0 ** (step % 3))
        fill(theirs, step, 10.0 ** (step % 3))
        paper.clip()
        paper.step()
        fused.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_atan2_to_two_ulp(dtype, device):
    """A step with gradient zero and betas of a half moves by atan2 of the moments."""
    y = torch.cat([random(20_000, dtype=dtype), torch.tensor([0.0, 1.0, -1.0, 3.0], dtype=dtype)])
    x = torch.cat([random(20_000, dtype=dtype, seed=1).abs(), torch.zeros(4, dtype=dtype)])
    x[:5000] *= 1e-6
    x[5000:10_000] *= 1e6
    x[-2:] = torch.tensor([1.0, 3.0], dtype=dtype)
    y, x = y.to(device), x.to(device)
    p = torch.nn.Parameter(torch.zeros_like(y))
    optimizer = AdamW([p], lr=1.0, betas=(0.5, 0.5), weight_decay=0.0, atan2=True)
    p.grad = torch.zeros_like(p)
    optimizer.state[p] = {"exp_avg": y.clone(), "exp_avg_sq": x * x, "step": torch.tensor(0.0)}
    optimizer.step()
    root = (x.double() * x.double()).to(dtype).double().sqrt()
    truth = torch.atan2(y.double(), root)
    error = (-p.detach().double() - truth).abs() / truth.abs().clamp(min=1e-300)
    # The root has an ulp of its own, and so has the second moment.
    assert float(error.max()) < 4 * torch.finfo(dtype).eps


def test_a_trust_ratio_is_right_over_the_whole_range(device):
    """Squares of a parameter of 1e30 are beyond float32, those of 1e-30 below it."""
    for size in (1e30, 1e-30):
        p = torch.nn.Parameter(size * (1 + random(300, device=device).abs()))
        before = p.detach().double().clone()
        optimizer = LAMB([p], lr=0.1, weight_decay=0.0, always_adapt=True)
        p.grad = random(300, device=device, seed=1)
        optimizer.step()
        moved = (p.detach().double() - before).norm()
        assert float(moved / before.norm()) == pytest.approx(0.1, rel=1e-5)


# States.


def test_state_dicts_of_lion_go_to_timm_and_back():
    timm = pytest.importorskip("timm.optim")
    exchange(Lion, timm.Lion, {"weight_decay": 0.1})


def test_state_dicts_of_lamb_go_to_timm_and_back():
    timm = pytest.importorskip("timm.optim")
    exchange(LAMB, timm.Lamb, {"weight_decay": 0.1}, {"max_grad_norm": None})


def test_state_dicts_of_schedule_free_go_to_its_package_and_back():
    package = pytest.importorskip("schedulefree")
    exchange(ScheduleFreeAdamW, package.AdamWScheduleFree, {"warmup_steps": 3, "r": 0.5})


def exchange(rule, usual, options, only=None):
    """Twelve steps, handed over between this implementation and the usual one."""
    found = {}
    for hands in ("there", "here there", "there here", "here there here"):
        params = parameters(shapes=[(9, 4), (5,)])
        state, step = None, 0
        for name in hands.split():
            own = only or {} if name == "there" else {}
            optimizer = (rule if name == "here" else usual)(params, lr=0.01, **options, **own)
            if state is not None:
                optimizer.load_state_dict(state)
                optimizer.state_dict()  # may be saved again at once
            if hasattr(optimizer, "train"):
                optimizer.train()
            for _ in range(12 // len(hands.split())):
                fill(params, step)
                optimizer.step()
                step += 1
            state = copy.deepcopy(optimizer.state_dict())
        found[hands] = params
    for hands, params in found.items():
        for p, q in zip(params, found["there"], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13, msg=hands)


@NEW
def test_a_loaded_or_copied_optimizer_goes_on_with_the_same_bits(rule, device):
    def run(between):
        params = parameters(torch.bfloat16, device)
        optimizer = rule(params, lr=0.01, clip=1.0, stochastic_rounding=True)
        for step in range(4):
            if step == 2:
                params, optimizer = between(params, optimizer)
            fill(params, step)
            optimizer.step()
        return bits(params)

    def loaded(params, optimizer):
        fresh = rule(params, lr=0.5, clip=1.0, stochastic_rounding=True)
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return params, fresh

    def pickled(params, optimizer):
        return pickle.loads(pickle.dumps((params, optimizer)))

    plain = run(lambda *pair: pair)
    assert run(loaded) == plain
    assert run(pickled) == plain


@NEW
def test_a_skipped_step_changes_nothing(rule, device):
    params = parameters(torch.float32, device)
    optimizer = rule(params, lr=0.01, clip=1.0)
    fill(params, 0)
    optimizer.step()
    state = [t for p in params for _, t in sorted(optimizer.state[p].items())]
    before = bits([*params, *state])
    fill(params, 1)
    params[3].grad[7] = math.inf
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert bits([*params, *state]) == before
    assert optimizer.report.first_nonfinite().name == "3"


@NEW
def test_nan_propagates_where_asked(rule, device):
    p = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = rule([p], lr=0.01, nonfinite="propagate")
    p.grad = torch.tensor([1.0, math.nan, 1.0], device=device)
    optimizer.step()
    assert p.isfinite().tolist() == [True, False, True]


@NEW
def test_master_weights_follow_float32(rule, device):
    low = parameters(torch.bfloat16, device)
    high = [torch.nn.Parameter(p.detach().float()) for p in low]
    a = rule(low, lr=0.01, clip=1.0, master_weights=True)
    b = rule(high, lr=0.01, clip=1.0)
    for step in range(4):
        fill(low, step)
        for p, q in zip(high, low, strict=True):
            p.grad = q.grad.float()
        a.step()
        b.step()
    for p, q in zip(low, high, strict=True):
        torch.testing.assert_close(a.state[p]["master_param"], q.detach(), rtol=1e-6, atol=1e-7)
        assert bits(p) == bits(a.state[p]["master_param"].bfloat16())


# Schedule-free modes.


def test_eval_holds_the_mean_and_train_the_point_of_the_gradients(device):
    params, theirs = parameters(device=device), parameters()
    optimizer = ScheduleFreeAdamW(params, lr=0.01, betas=(0.8, 0.99))
    paper = papers.ScheduleFreeAdamW(theirs, lr=0.01, betas=(0.8, 0.99))
    optimizer.eval()
    optimizer.train()
    for step in range(4):
        fill(params, step)
        fill(theirs, step)
        optimizer.step()
        paper.step()
        optimizer.eval()
        optimizer.eval()  # once is enough
        for p, q in zip(params, theirs, strict=True):
            torch.testing.assert_close(p.cpu(), paper.state[q]["x"], rtol=1e-11, atol=1e-12)
        with pytest.raises(RuntimeError, match=r"^ScheduleFreeAdamW\.step: .*call train\(\)"):
            optimizer.step()
        optimizer.train()
        for p, q in zip(params, theirs, strict=True):
            torch.testing.assert_close(p.cpu(), q, rtol=1e-11, atol=1e-12)


def test_with_a_master_the_mode_loses_nothing(device):
    params = parameters(torch.bfloat16, device)
    optimizer = ScheduleFreeAdamW(params, lr=0.05, master_weights=True)
    for step in range(3):
        fill(params, step)
        optimizer.step()
    masters = [optimizer.state[p]["master_param"] for p in params]
    before = bits([*params, *masters])
    optimizer.eval()
    assert bits(params) != before[: len(params)]
    optimizer.train()
    assert bits([*params, *masters]) == before
    optimizer.eval()
    with torch.no_grad():
        params[0].fill_(100.0)  # as by loading weights: it counts
    optimizer.train()
    y = 0.9 * 100.0 + 0.1 * optimizer.state[params[0]]["z"]
    torch.testing.assert_close(optimizer.state[params[0]]["master_param"], y)


def test_a_parameter_written_before_eval_counts(device):
    params = parameters(torch.bfloat16, device, [(9, 4)])
    optimizer = ScheduleFreeAdamW(params, lr=0.05, master_weights=True)
    fill(params, 0)
    optimizer.step()
    with torch.no_grad():
        params[0].fill_(100.0)
    optimizer.eval()
    x = torch.lerp(torch.full_like(params[0], 100.0).float(), optimizer.state[params[0]]["z"],
                   1 - 1 / 0.9)  # fmt: skip
    torch.testing.assert_close(params[0].float(), x, rtol=1e-2, atol=0.0)
    optimizer.train()
    assert params[0].eq(100.0).all()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_modes_take_a_repeated_parameter_once_and_write_nothing_where_they_fail(device):
    once, twice = parameters(device=device, shapes=[(9,)]), parameters(device=device, shapes=[(9,)])
    a, b = ScheduleFreeAdamW(once), ScheduleFreeAdamW([*twice, *twice])
    for params, optimizer in ((once, a), (twice, b)):
        fill(params, 0)
        optimizer.step()
        optimizer.eval()
    assert bits(once) == bits(twice)

    params = parameters(device=device, shapes=[(9,), (4,)])
    optimizer = ScheduleFreeAdamW(params)
    fill(params, 0)
    optimizer.step()
    optimizer.state[params[1]]["z"] = torch.zeros(7, device=device)
    before = bits(params)
    with pytest.raises(ValueError, match=r"expected state z of \[4\] .*, got \[7\]$"):
        optimizer.eval()
    assert bits(params) == before
    assert optimizer.param_groups[0]["train_mode"]


# Errors.

BAD = [
    (Lion, {"lr": -1.0}, r"^Lion: lr must be a finite number >= 0, got -1\.0$"),
    (Lion, {"lr": torch.tensor(-1.0)}, r"^Lion: lr must be a finite number >= 0, got -1\.0$"),
    (Lion, {"betas": (0.9, 1.0)}, r"^Lion: betas must be two numbers in \[0, 1\), got"),
    (Lion, {"betas": 0.9}, r"^Lion: betas must be two numbers in \[0, 1\), got 0\.9$"),
    (LAMB, {"eps": math.nan}, r"^LAMB: eps must be a finite number >= 0, got nan$"),
    (LAMB, {"weight_decay": "x"}, r"^LAMB: weight_decay must be a finite number >= 0, got 'x'$"),
    (ScheduleFreeAdamW, {"warmup_steps": -1}, r"^ScheduleFreeAdamW: warmup_steps must be"),
    (ScheduleFreeAdamW, {"betas": (0.0, 0.9)}, r"^ScheduleFreeAdamW: betas\[0\] must be > 0"),
    (Lion, {"clip": -1.0}, r"^Lion: clip must be"),
    (LAMB, {"nonfinite": "hide"}, r"^LAMB: nonfinite must be"),
]


@pytest.mark.no_kernel
@pytest.mark.parametrize(("rule", "options", "words"), BAD)
def test_options_out_of_range_are_refused(rule, options, words):
    with pytest.raises(ValueError, match=words):
        rule(parameters(), **options)
    if "clip" not in options and "nonfinite" not in options:
        optimizer = rule(parameters())
        with pytest.raises(ValueError, match=words):
            optimizer.add_param_group({"params": parameters(), **options})
        assert len(optimizer.param_groups) == 1


@pytest.mark.no_kernel
@pytest.mark.parametrize(
    ("rule", "option", "words"),
    [
        (Lion, {"caution": True}, r"^Lion: caution must be False, got True$"),
        (LAMB, {"bias_correction": False}, r"^LAMB: bias_correction must be True, got False$"),
        (LAMB, {"max_grad_norm": 2.0}, r"^LAMB: clip must be the max_grad_norm .* 2\.0, got 1\.0$"),
    ],
)
def test_a_state_with_what_this_one_cannot_do_is_refused(rule, option, words):
    optimizer = rule(parameters(), clip=1.0)
    state = optimizer.state_dict()
    state["param_groups"][0].update(option)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(state)
    assert optimizer.state_dict() == before


@pytest.mark.no_kernel
def test_a_state_of_another_rule_or_shape_is_refused():
    p = parameters(shapes=[(9,)])
    fill(p, 0)
    other = torch.optim.AdamW(p)
    other.step()
    optimizer = ScheduleFreeAdamW(p)
    state = other.state_dict()
    state["param_groups"][0] |= {"warmup_steps": 0, "r": 0.0, "weight_lr_power": 2.0}
    with pytest.raises(ValueError, match="state_dict must be of a schedule-free AdamW"):
        optimizer.load_state_dict(state)
    assert optimizer.state_dict()["state"] == {}
    lion = Lion(p)
    lion.state[p[0]] = {"exp_avg": torch.zeros(1, dtype=torch.float64)}
    before = bits(p)
    words = r"^Lion\.step: expected state exp_avg of \[9\] for a parameter of \[9\], got \[1\]$"
    with pytest.raises(ValueError, match=words):
        lion.step()
    assert bits(p) == before


@NEW
def test_a_sparse_gradient_is_refused(rule, device):
    p = torch.nn.Parameter(torch.ones(4, 2, device=device))
    p.grad = torch.ones(4, 2, device=device).to_sparse(1)
    words = rf"^{rule.__name__}\.step: {rule.__name__} does not support sparse gradients"
    with pytest.raises(RuntimeError, match=words):
        rule([p]).step()
    assert p.eq(1.0).all()


@pytest.mark.no_kernel
def test_what_has_no_eps_takes_no_option_for_it():
    for rule in (Lion, SGD):
        with pytest.raises(TypeError, match="eps_follows_clip"):
            rule(parameters(), lr=0.1, eps_follows_clip=True)
