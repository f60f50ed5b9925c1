"""Policies choose the coefficients of a step from the norms of its gradients."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from helpers import HOST_BACKENDS, bits, random
from torch.nn import Parameter

import gradfuse
from gradfuse import optim
from gradfuse._records import ClipResult
from gradfuse.clipping.policy import plan_with_policy
from gradfuse.distributed.norm import Merged
from gradfuse.policies import (
    AGC,
    AdaGC,
    AutoClip,
    Decision,
    Norm,
    Policy,
    SpikeSkip,
    Value,
    ZClip,
    to_at_most,
)


class Follow(Policy):
    """The user's policy from the docstring of gradfuse.policies."""

    def begin(self, norms):
        return {"level": norms.new_full((), math.inf)}

    def decide(self, norm, norms, state):
        level = state["level"]
        new = torch.where(level.isinf(), norm, 0.9 * level + 0.1 * norm)
        return Decision(to_at_most(level, norm), state={"level": new})


class Each(Policy):
    """Clips every gradient to norm 1."""

    def decide(self, norm, norms, state):
        return Decision((1.0 / norms.clamp(min=1e-30)).clamp(max=1.0))


class Never(Policy):
    def decide(self, norm, norms, state):
        return Decision(torch.ones_like(norm), skip=norm > 0)


def parameters(*grads: list[float]) -> list[Parameter]:
    out = []
    for values in grads:
        p = Parameter(torch.zeros(len(values)))
        p.grad = torch.tensor(values)
        out.append(p)
    return out


def stepped(
    policy: Policy | float, *grads: list[float], scale: float | None = None
) -> list[torch.Tensor]:
    """The parameters after a step of plain SGD with lr 1 from zero: minus the gradients used."""
    ps = parameters(*grads)
    optimizer = optim.SGD(ps, lr=1.0, clip=policy)
    if scale is not None:
        for p in ps:
            p.grad *= scale
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
    optimizer.step()
    return [p.detach() for p in ps]


@pytest.mark.parametrize("scale", [None, 4096.0])
def test_norm_is_the_number(backend, scale):
    grads = [3.0, 0.0], [0.0, 4.0]
    for ours, number in zip(stepped(Norm(1.0), *grads, scale=scale), stepped(1.0, *grads)):  # noqa: B905
        torch.testing.assert_close(ours, number)


@pytest.mark.parametrize("scale", [None, 4096.0])
def test_value_clamps_elements(backend, scale):
    (moved,) = stepped(Value(0.5), [2.0, -3.0, 0.25], scale=scale)
    torch.testing.assert_close(moved, torch.tensor([-0.5, 0.5, -0.25]))


def test_value_is_materialized(backend):
    (p,) = parameters([2.0, -3.0, 0.25])
    optim.SGD([p], lr=1.0, clip=Value(0.5), materialize_clipped_grads=True).step()
    torch.testing.assert_close(p.grad, torch.tensor([0.5, -0.5, 0.25]))


@pytest.mark.parametrize("scale", [None, 4096.0])
def test_a_coefficient_for_each(backend, scale):
    moved = stepped(Each(), [3.0, 4.0], [0.5, 0.0], scale=scale)
    torch.testing.assert_close(moved[0], torch.tensor([-0.6, -0.8]))
    torch.testing.assert_close(moved[1], torch.tensor([-0.5, 0.0]))


def test_state_follows_the_norms_and_ignores_nan(backend):
    (p,) = parameters([1.0, 0.0])
    policy = Follow()
    optimizer = optim.SGD([p], lr=1.0, clip=policy)
    level, where = 1.0, 0.0
    for g in (1.0, 5.0, math.nan, 2.0, 0.5):
        p.grad = torch.tensor([g, 0.0])
        optimizer.step()
        if g == g:
            where -= g * min(1.0, level / g)
            level = 0.9 * level + 0.1 * g
        assert float(policy.state["level"]) == pytest.approx(level)
        assert float(p.detach()[0]) == pytest.approx(where)
    assert optimizer.skipped_steps == 1


def test_state_is_saved_and_found_inf_leaves_it(backend):
    (p,) = parameters([2.0])
    optimizer = optim.SGD([p], lr=1.0, clip=Follow())
    optimizer.step()
    saved = optimizer.state_dict()
    p.grad = torch.tensor([100.0])
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.clip.state["level"] == saved["param_groups"][0]["gradfuse"]["policy"]["level"]
    again = optim.SGD([p], lr=1.0, clip=Follow())
    again.load_state_dict(saved)
    assert again.clip.state["level"] == 2.0


def test_a_policy_skips(backend):
    (moved,) = stepped(Never(), [1.0, 2.0])
    assert (moved == 0).all()


def clipper_of(policy: Policy, *grads: list[float], **options) -> gradfuse.GradClipper:
    return gradfuse.GradClipper(parameters(*grads), policy, **options)


def clipped(policy: Policy, *grads: list[float], **options) -> list[torch.Tensor]:
    clipper = clipper_of(policy, *grads, **options)
    clipper.clip_()
    return [p.grad for p in clipper._parameters]


POLICIES = {
    "norm": lambda: Norm(1.0),
    "value": lambda: Value(0.5),
    "agc": lambda: AGC(0.1, 1.0),
    "zclip": lambda: ZClip(0.9, 2.0, warmup=3),
    "autoclip": lambda: AutoClip(30, 5),
    "adagc": lambda: AdaGC(1.1, 0.9, warmup=2),
    "spikeskip": lambda: SpikeSkip(3.0, 8, warmup=3, patience=2),
    "each": Each,
    "follow": Follow,
}
every_policy = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)


def norms_of_a_run(steps: int, seed: int = 0) -> list[list[float]]:
    """Norms of three gradients at each step: lognormal, with spikes and a level that moves."""
    rng = np.random.default_rng(seed)
    norms = np.exp(rng.normal(0.0, 0.3, (steps, 3))) * [1.0, 3.0, 0.2]
    norms[::13] *= rng.uniform(3.0, 1e4, (len(norms[::13]), 1))
    norms[steps // 2 :] *= 0.3
    return norms.tolist()


def coefficients_of(policy: Policy, run: list[list[float]], backend: str) -> list[list[float]]:
    """The coefficient by which a GradClipper multiplied each gradient, at each step."""
    ps = [Parameter(torch.zeros(2, dtype=torch.float64)) for _ in run[0]]
    clipper = gradfuse.GradClipper(ps, policy)
    out = []
    for norms in run:
        for p, norm in zip(ps, norms, strict=True):
            p.grad = torch.tensor([0.6 * norm, 0.8 * norm], dtype=torch.float64)
        clipper.clip_()
        out.append([float(p.grad.norm()) / n for p, n in zip(ps, norms, strict=True)])
    return out


def published_zclip(run, alpha, z, warmup, max_norm):
    """Algorithm 1 of arXiv:2504.02507, on plain numbers. It begins with the mean and variance of
    all norms of the warmup."""
    first, mean, var = [], None, None
    for norms in run:
        norm = math.hypot(*norms)
        limit = norm
        if mean is None:
            first.append(norm)
            if len(first) == warmup:
                mean, var = float(np.mean(first)), float(np.var(first))
        else:
            score = (norm - mean) / (var**0.5 + 1e-6)
            if score > z:
                limit = mean + z * var**0.5 / (score / z)
            mean = alpha * mean + (1 - alpha) * limit
            var = alpha * var + (1 - alpha) * (limit - mean) ** 2
        limit = min(limit, max_norm)
        yield [limit / (norm + 1e-6) if norm > limit else 1.0] * 3


def published_autoclip(run, percentile, history):
    """Algorithm 1 of arXiv:2007.14469."""
    seen = []
    for norms in run:
        norm = math.hypot(*norms)
        seen.append(norm)
        limit = np.percentile(seen[-history:], percentile)
        yield [limit / (norm + 1e-6) if norm > limit else 1.0] * 3


def published_adagc(run, relative, beta, max_norm, warmup):
    """Algorithm 1 of arXiv:2502.11034, tensor by tensor."""
    gamma = [math.inf] * 3
    for step, norms in enumerate(run):
        if step < warmup:
            h = [min(max_norm / math.hypot(*norms), 1.0)] * 3
            gamma = [min(g, c * n) for g, c, n in zip(gamma, h, norms, strict=True)]
        else:
            h = [min(relative * g / n, 1.0) for g, n in zip(gamma, norms, strict=True)]
            gamma = [beta * g + (1 - beta) * c * n for g, c, n in zip(gamma, h, norms, strict=True)]
        yield h


PUBLISHED = {
    "zclip": (ZClip(0.97, 2.5), published_zclip, (0.97, 2.5, 25, math.inf)),
    "zclip bounded": (ZClip(0.9, 1.5, 5, 2.0), published_zclip, (0.9, 1.5, 5, 2.0)),
    "autoclip": (AutoClip(10), published_autoclip, (10, 1000)),
    "autoclip, short": (AutoClip(62.5, 7), published_autoclip, (62.5, 7)),
    "adagc": (AdaGC(warmup=20), published_adagc, (1.05, 0.98, 1.0, 20)),
    "adagc, quick": (AdaGC(2.0, 0.5, 0.1, 1), published_adagc, (2.0, 0.5, 0.1, 1)),
}


@HOST_BACKENDS
@pytest.mark.parametrize("case", PUBLISHED.values(), ids=PUBLISHED)
def test_the_published_rule_step_by_step(backend, case):
    policy, published, arguments = case
    run = norms_of_a_run(120)
    got = coefficients_of(copy.deepcopy(policy), run, backend)
    truth = list(published(run, *arguments))
    assert any(c < 0.5 for step in truth for c in step)
    assert any(c == 1.0 for step in truth for c in step)
    np.testing.assert_allclose(got, truth, rtol=1e-9)


def test_agc_is_the_function(backend):
    weights = [random(3, 4, seed=1), random(5, seed=2)]
    grads = [random(3, 4, seed=3), random(5, seed=4) * 0.01]
    ps = [Parameter(w.clone()) for w in weights]
    for p, g in zip(ps, grads, strict=True):
        p.grad = g.clone()
    optimizer = optim.SGD(ps, lr=1.0, clip=AGC(0.1))
    optimizer.step()
    expected = [Parameter(w.clone()) for w in weights]
    for p, g in zip(expected, grads, strict=True):
        p.grad = g.clone()
    gradfuse.adaptive_clip_grad_(expected, 0.1)
    for p, e in zip(ps, expected, strict=True):
        torch.testing.assert_close(p, e - e.grad)
    before = math.hypot(*(float(g.norm()) for g in grads))
    after = math.hypot(*(float(e.grad.norm()) for e in expected))
    assert optimizer.report.clipped
    assert optimizer.report.total_norm == pytest.approx(before, rel=1e-5)
    assert optimizer.report.clipped_norm == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_agc_divides_by_no_less_than_1e_6_of_the_unscaled_gradient(backend, scale):
    (moved,) = stepped(AGC(1e-4, 1e-3), [2.5e-7] * 4, scale=scale)
    torch.testing.assert_close(moved, torch.full((4,), -2.5e-8))


@every_policy
def test_a_loss_scale_changes_nothing(backend, make):
    def run(scale):
        ps = [Parameter(torch.full((4,), 0.5)), Parameter(torch.full((2, 3), 0.25))]
        optimizer = optim.SGD(ps, lr=0.125, clip=make())
        for step in range(8):
            for i, p in enumerate(ps):
                p.grad = random(*p.shape, seed=10 * step + i) * (50.0 if step == 6 else 1.0) * scale
            optimizer.grad_scale = torch.tensor(scale)
            optimizer.found_inf = torch.tensor(0.0)
            optimizer.step()
        return ps, optimizer.skipped_steps

    plain, skipped = run(1.0)
    scaled, again = run(1024.0)
    assert skipped == again
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b)


@every_policy
def test_the_clipper_gives_what_the_optimizer_uses(backend, make):
    run = [[[3.0, 4.0], [0.3]], [[0.3, 0.4], [-0.1]], [[0.2, 0.1], [0.1]], [[30.0, 1.0], [2.0]]]
    ps = parameters(*run[0])
    optimizer = optim.SGD(ps, lr=1.0, clip=make())
    clipper = clipper_of(make(), *run[0])
    for grads in run:
        for p, q, g in zip(ps, clipper._parameters, grads, strict=True):
            p.data.fill_(0.0), q.data.fill_(0.0)
            p.grad, q.grad = torch.tensor(g), torch.tensor(g)
        optimizer.step()
        report = clipper.clip_()
        for p, q in zip(ps, clipper._parameters, strict=True):
            torch.testing.assert_close(-p.detach(), q.grad)
        assert report.clipped == optimizer.report.clipped or optimizer.report.skipped


@every_policy
def test_nan_leaves_the_state(backend, make):
    ps = parameters([1.0, 2.0], [0.5])
    optimizer = optim.SGD(ps, lr=0.125, clip=make())
    for step in range(6):
        for i, p in enumerate(ps):
            p.grad = random(len(p), seed=step + i)
        if step in (0, 4):  # also before there is a state
            ps[1].grad[0] = math.nan
        before = optimizer.clip.state_dict()
        optimizer.step()
        after = optimizer.clip.state_dict()
        if step == 4:
            assert before.keys() == after.keys()
            assert all(torch.equal(before[k], after[k]) for k in before)
        assert all(t.isfinite().all() for p in ps for t in (p.detach(),))
    assert optimizer.skipped_steps == 2


@every_policy
@pytest.mark.parametrize("idle", [[None, None], [[0.0], [0.0]], [[0.0], None]])
@pytest.mark.parametrize("by", ["optimizer", "clipper"])
def test_a_step_that_carries_nothing_teaches_nothing(backend, make, idle, by):
    def run(grads) -> tuple[list[float], list[bytes]]:
        ps, policy = parameters([0.0], [0.0]), make()
        optimizer = optim.SGD(ps, lr=1.0, clip=policy)
        clipper = gradfuse.GradClipper(ps, policy)
        used = []
        for values in grads:
            for p, value in zip(ps, values, strict=True):
                p.grad = None if value is None else torch.tensor(value)
            if by == "optimizer":
                optimizer.step()
            report = optimizer.report if by == "optimizer" else clipper.clip_()
            if values is not idle:
                used.append(report.coefficient)
        return used, bits([*policy.state.values()])

    real = [[[g], [2.0 * g]] for g in (1.0, 2.0, 0.5, 1.5, 9.0, 1.0)]
    assert run([idle, *(step for g in real for step in (g, idle, idle))]) == run(real)


@every_policy
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_a_resumed_run_goes_on(make, how):
    def grads(step):
        factor = 40.0 if step == 8 else 1.0
        return [random(2, seed=step) * factor, random(1, seed=step + 9) * factor]

    def steps(clipper, among):
        out = []
        for step in among:
            for p, g in zip(clipper._parameters, grads(step), strict=True):
                p.grad = g
            clipper.clip_()
            out += [p.grad for p in clipper._parameters]
        return out

    whole = steps(clipper_of(make(), [0.0, 0.0], [0.0]), range(12))
    first = clipper_of(make(), [0.0, 0.0], [0.0])
    steps(first, range(6))
    if how == "state_dict":
        second = clipper_of(make(), [0.0, 0.0], [0.0])
        second.load_state_dict(first.state_dict())
    else:
        second = copy.deepcopy(first) if how == "deepcopy" else pickle.loads(pickle.dumps(first))
    assert bits(steps(second, range(6, 12))) == bits(whole[12:])


def test_compiled_code_steps_with_a_policy():
    policy = AutoClip(0.0)
    clipper = clipper_of(policy, [3.0, 4.0])

    @torch.compile(backend="eager")
    def step(factor):
        for p in clipper._parameters:
            p.grad = factor * p.grad
        return clipper.clip_().norm_tensor

    assert [float(step(torch.tensor(2.0))) for _ in range(2)] == [10.0, 20.0]
    assert float(clipper._parameters[0].grad.norm()) == pytest.approx(10.0)


def test_adagc_keeps_averages_when_parameters_are_added(backend):
    ps = parameters([1.0], [2.0])
    optimizer = optim.SGD(ps, lr=1.0, clip=AdaGC(warmup=0))
    optimizer.step()
    assert optimizer.clip.state["averages"].tolist() == [1.0, 2.0]
    (added,) = parameters([8.0])
    optimizer.add_param_group({"params": [added]})
    ps[0].grad *= 0.5
    ps[1].grad *= 0.5
    optimizer.step()
    torch.testing.assert_close(
        optimizer.clip.state["averages"], torch.tensor([0.99, 1.98, 8.0]).double()
    )


def test_adagc_forgives_a_gradient_of_zeros(backend):
    (p,) = parameters([0.0])
    optimizer = optim.SGD([p], lr=1.0, clip=AdaGC(warmup=2))
    for g in (0.0, 0.5, 0.0, 0.5):
        p.grad = torch.tensor([g])
        optimizer.step()
    assert float(p.detach()) == -1.0


def test_spikeskip_leaves_spikes_out_and_follows_a_level(backend):
    (p,) = parameters([0.0])
    optimizer = optim.SGD([p], lr=1.0, clip=SpikeSkip(4.0, history=5, warmup=3, patience=2))
    norms = [1.0, 100.0, 1.0, 1.0, 4.0, 4.5, 1.0, 9.0, 9.0, 9.0, 9.0]
    taken = []
    for norm in norms:
        p.grad = torch.tensor([norm])
        optimizer.step()
        taken.append(not optimizer.report.skipped)
    #  spikes: 4.5 (median 1), then 9, 9; the third 9 is the new level
    assert taken == [True] * 5 + [False, True, False, False, True, True]
    assert optimizer.skipped_steps == 3


def test_a_clipper_sets_left_out_gradients_to_zero(backend):
    clipper = clipper_of(Never(), [1.0, 2.0])
    report = clipper.clip_()
    assert clipper._parameters[0].grad.tolist() == [0.0, 0.0]
    assert report.void


@HOST_BACKENDS
def test_a_norm_beyond_float64(backend):
    p = Parameter(torch.zeros(3, dtype=torch.float64))
    p.grad = torch.full((3,), 1.6e308, dtype=torch.float64)
    policy = AutoClip(50)
    optimizer = optim.SGD([p], lr=1.0, clip=policy)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert policy.state["norms"].isinf().all()
    assert p.detach().tolist() == [0.0] * 3
    optimizer.clip = Norm(1.0)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), -(3**-0.5), dtype=torch.float64))


def test_reports_say_what_was_done(backend):
    def report(policy, *grads):
        return clipper_of(policy, *grads).clip_()

    kept = report(Value(5.0), [3.0, 4.0])
    assert not kept.clipped
    assert "Value(clip_value=5.0): left alone" in str(kept)
    clamped = report(Value(3.5), [3.0, 4.0])
    assert clamped.clipped
    assert math.isnan(clamped.clipped_norm)
    assert "elements clamped" in str(clamped)
    scaled = report(Each(), [3.0, 4.0], [0.0, 12.0])
    assert scaled.clipped_norm == pytest.approx(2**0.5)
    assert scaled.coefficient == pytest.approx(2**0.5 / 13)
    assert scaled.to_dict()["policy"] == "Each()"


@every_policy
@pytest.mark.parametrize("skips", [True, False])
def test_no_decision_waits_for_the_device(make, skips):
    """A meta tensor has no values, so reading one would raise."""
    measured = [
        torch.empty(shape, dtype=torch.float64, device="meta") for shape in ([], [8], [2, 5])
    ]
    merged = Merged(ClipResult(*measured), None, None)
    policy = make()
    for _ in range(3):
        step = plan_with_policy(
            policy, lambda max_norm, error: merged, lambda: [], measured[0], skips
        )
        policy.keep(step.state)
    assert step.plan.is_meta
    assert step.reported.plan.is_meta


class Misshapen(Policy):
    def begin(self, norms):
        return {"level": norms.new_zeros(2)}

    def decide(self, norm, norms, state):
        return Decision(torch.ones_like(norm), state={"level": norm})


class Unnamed(Policy):
    def decide(self, norm, norms, state):
        return Decision(torch.ones_like(norm), state={"level": norm})


class TooMany(Policy):
    def decide(self, norm, norms, state):
        return Decision(torch.ones(7))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (Misshapen, r"Misshapen.decide: expected state 'level' .* \(2,\), got \(\)"),
        (Unnamed, r"Unnamed.decide: expected state that begin names, got 'level'"),
        (TooMany, r"TooMany.decide: expected a coefficient of shape \(\) or \(1,\), got \(7,\)"),
    ],
)
def test_a_wrong_decision_is_refused_before_anything_is_written(backend, make, match):
    (p,) = parameters([3.0, 4.0])
    optimizer = optim.SGD([p], lr=1.0, clip=make())
    with pytest.raises(ValueError, match=match):
        optimizer.step()
    assert p.detach().tolist() == [0.0, 0.0]
    assert p.grad.tolist() == [3.0, 4.0]


@every_policy
def test_a_step_that_raises_leaves_the_policy_alone(backend, make):
    (p,) = parameters([3.0, 4.0])
    optimizer = optim.SGD([p], lr=1.0, momentum=0.9, clip=make())
    optimizer.step()
    before = optimizer.clip.state_dict()
    p.grad = torch.tensor([0.3, 0.4])
    moment = optimizer.state[p]["momentum_buffer"]
    moment.data = moment.data.double()  # seen by the update, after the decision
    with pytest.raises(ValueError, match="expected state momentum_buffer"):
        optimizer.step()
    after = optimizer.clip.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_value_refuses_complex_gradients(backend):
    p = Parameter(torch.zeros(2, dtype=torch.complex64))
    p.grad = torch.full((2,), 3 + 4j)
    message = "Value: expected real gradients, which have an order, got torch.complex64"
    with pytest.raises(TypeError, match=message):
        optim.SGD([p], lr=1.0, clip=Value(0.5)).step()
    with pytest.raises(TypeError, match=message):
        gradfuse.GradClipper([p], Value(0.5)).clip_()
    assert p.grad.tolist() == [3 + 4j] * 2


def test_a_policy_takes_the_l2_norm_only():
    with pytest.raises(ValueError, match="GradClipper: norm_type must be 2 with a policy, got 1"):
        clipper_of(Norm(1.0), [1.0], norm_type=1.0)
    clipper = clipper_of(Norm(1.0), [1.0])
    assert repr(clipper).startswith("GradClipper(1 parameters, max_norm=Norm(max_norm=1.0), ")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AGC(-1.0), "AGC: clip_factor must be >= 0, got -1.0"),
        (lambda: AGC(eps=math.nan), "AGC: eps must be >= 0, got nan"),
        (lambda: ZClip(1.5), r"ZClip: alpha must be in \[0, 1\], got 1.5"),
        (lambda: ZClip(warmup=0), "ZClip: warmup must be a whole number >= 1, got 0"),
        (lambda: AutoClip(101), r"AutoClip: percentile must be in \[0, 100\], got 101"),
        (lambda: AutoClip(history=2.5), "AutoClip: history must be a whole number >= 1, got 2.5"),
        (lambda: AdaGC(0.0), "AdaGC: relative must be > 0, got 0.0"),
        (lambda: AdaGC(beta=math.nan), r"AdaGC: beta must be in \[0, 1\], got nan"),
        (lambda: SpikeSkip(0.5), r"SpikeSkip: factor must be in \[1, inf\], got 0.5"),
        (lambda: SpikeSkip(history=5), "SpikeSkip: warmup must be <= history, 5, got 10"),
    ],
)
def test_errors_of_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("make", [Norm, Value])
@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_errors(make, bad):
    with pytest.raises(ValueError, match=rf"{make.__name__}: .* must be >= 0, got"):
        make(bad)
