"""What a step over ranks is made of, without any: the norm from their sums, for which slots stand,
and the sums of a parameter's parts."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import random

import gradfuse.optim
from gradfuse import _native
from gradfuse._codes import Action, LrScale, NonFinite
from gradfuse._records import ClipPlan
from gradfuse.distributed.powers import norms_from, powers_of, slots_of
from gradfuse.optim.base import as_number
from gradfuse.optim.lr_scales import lr_scales_of

ORDERS = [1.0, 2.0, 3.0, math.inf]


def slots(parts, norm_type, found_inf=0.0, refused=0.0):
    """A row for each part, as each rank would fill in its own."""
    plans = [
        _native.backend.stats(part, False, norm_type, NonFinite.PROPAGATE)[1] for part in parts
    ]
    rest = torch.tensor([found_inf, refused], dtype=torch.float64)
    return torch.stack([torch.cat([torch.stack(ClipPlan.of(p)[4:6]).cpu(), rest]) for p in plans])


def plan_of(sums, max_norm=1.0, norm_type=2.0, nonfinite=NonFinite.PROPAGATE, scale=None):
    norm, plan = _native.backend.plan_of_sums(
        "op", sums, True, max_norm, norm_type, nonfinite, scale
    )
    return float(norm), ClipPlan.read(plan)


@pytest.mark.parametrize("norm_type", ORDERS)
@pytest.mark.parametrize("size", [1.0, 1e200, 1e-200])
def test_the_norm_of_the_parts_is_that_of_the_whole(norm_type, size, backend):
    parts = [[random(n, dtype=torch.float64, seed=n) * size] for n in (3, 40, 1)]
    whole = torch.cat([part[0] for part in parts]) / size
    norm, plan = plan_of(slots(parts, norm_type), max_norm=0.1 * size, norm_type=norm_type)
    truth = float(torch.linalg.vector_norm(whole, norm_type)) * size
    assert norm == pytest.approx(truth, rel=1e-13)
    assert plan.coefficient == pytest.approx(0.1 * size / (truth + 1e-6), rel=1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("nonfinite", "action"), [("PROPAGATE", "SCALE"), ("ZERO", "ZERO"), ("SKIP", "SKIP")]
)
def test_one_bad_part_decides(bad, nonfinite, action, backend):
    sums = slots([[torch.ones(3)], [torch.tensor([bad])], [torch.ones(2)]], 2.0)
    norm, plan = plan_of(sums, nonfinite=NonFinite[nonfinite])
    assert not math.isfinite(norm)
    assert plan.action == Action[action]
    with pytest.raises(RuntimeError, match="op: expected a finite total norm of order 2, got"):
        plan_of(sums, nonfinite=NonFinite.ERROR)


def test_found_inf_skips_and_a_refusal_refuses(backend):
    parts = [[torch.ones(3)], [torch.ones(1)]]
    assert plan_of(slots(parts, 2.0, found_inf=1.0))[1].action == Action.SKIP
    sums = slots(parts, 2.0, refused=1.0)
    norm, plan = plan_of(sums)
    assert norm == 2.0
    assert plan.action == Action.REFUSE
    g = torch.ones(2)
    _native.backend.apply_("op", [g], plan_tensor(sums))
    assert g.equal(torch.ones(2))


def plan_tensor(sums):
    return _native.backend.plan_of_sums("op", sums, False, 1.0, 2.0, NonFinite.PROPAGATE, None)[1]


def test_the_loss_scale_leaves_norm_and_factor(backend):
    norm, plan = plan_of(slots([[torch.full((4,), 8.0)]], 2.0), scale=torch.tensor(4.0))
    assert norm == 4.0
    assert plan.factor == pytest.approx(1.0 / (4.0 + 1e-6) / 4.0)


def test_apply_scales(backend):
    grads = [torch.full((3,), 2.0), torch.full((1,), 2.0, dtype=torch.bfloat16)]
    _native.backend.apply_("op", grads, plan_tensor(slots([grads], 2.0)))
    assert torch.cat([g.float() for g in grads]).norm() == pytest.approx(1.0, rel=1e-2)


def test_sums_of_another_shape_are_refused(native):
    with pytest.raises(ValueError, match="op: sums must be float64 \\[ranks, 4\\], got Float"):
        plan_of(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="op: sums must be float64"):
        plan_of(torch.zeros(4, dtype=torch.float64))


def test_apply_takes_a_coefficient_for_each(backend):
    grads = [torch.full((3,), 2.0), torch.full((1,), 2.0, dtype=torch.bfloat16)]
    each = torch.tensor([0.5, 1.0], dtype=torch.float64)
    _native.backend.apply_("op", grads, plan_tensor(slots([grads], 2.0)), each)
    assert float(grads[0][0]) == pytest.approx(0.5 * float(grads[1][0]), rel=1e-2)
    with pytest.raises(Exception, match=r"coefficients|index"):
        _native.backend.apply_("op", grads, plan_tensor(slots([grads], 2.0)), each[:1])


RULES = {
    "LAMB": (gradfuse.optim.LAMB, {"weight_decay": 0.1}),
    "LAMB, clipped": (gradfuse.optim.LAMB, {"weight_decay": 0.1, "trust_clip": True}),
    "LAMB, ratio 1": (gradfuse.optim.LAMB, {"weight_decay": 0.0}),
    "update_clip": (gradfuse.optim.AdamW, {"update_clip": True}),
}


class Stepped:
    """An optimizer whose last step is left to do, bound to gradients."""

    def __init__(self, name, dtype, cut=None):
        rule, options = RULES[name]
        whole = [random(9, 3, dtype=dtype, seed=1), random(5, dtype=dtype, seed=2) * 1e-3]
        part = slice(None) if cut is None else cut
        self.ps = [torch.nn.Parameter(t[part].clone()) for t in whole]
        self.optimizer = rule(self.ps, lr=0.1, nonfinite="propagate", **options)
        for seed in (3, 4):
            for p, t in zip(self.ps, whole, strict=True):
                p.grad = random(*t.shape, dtype=dtype, seed=seed)[part] * 1000.0 ** (seed - 3)
            if seed == 3:
                # The first step's own factor would be that of the part.
                self.stepper.update(self.groups(), None, None, self.options(lr_scale=0))
        self.groups()

    @property
    def stepper(self):
        return self.optimizer._whole.stepper

    def groups(self):
        self.optimizer._refresh(self.optimizer._parts())
        return [self.optimizer._group(g, as_number(g["lr"])) for g in self.optimizer.param_groups]

    def options(self, **changes):
        return self.optimizer._call().options()._replace(**changes)

    def sums(self):
        return self.stepper.lr_sums(self.groups(), None, None, self.options())


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_parts_give_the_step_of_the_whole(name, dtype, backend):
    whole, again = Stepped(name, dtype), Stepped(name, dtype)
    parts = [Stepped(name, dtype, cut) for cut in (slice(0, 2), slice(2, None))]
    sums = sum(part.sums() for part in parts)
    torch.testing.assert_close(sums, whole.sums(), rtol=1e-5, atol=0.0)
    before = [p.clone() for p in whole.ps]
    scales = lr_scales_of(
        again.sums(),
        LrScale(again.optimizer._lr_scale()),
        [p.numel() for p in again.ps],
        [bool(again.optimizer.param_groups[0].get("trust_clip"))] * 2,
    )
    again.stepper.update(again.groups(), None, None, again.options(), scales)
    whole.optimizer.step()
    for p, q, old in zip(whole.ps, again.ps, before, strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, old)
    if name != "LAMB, ratio 1":
        assert scales.ne(1.0).any()


@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, 10.0, math.inf])
def test_powers_add_up_over_the_whole_range(norm_type):
    """Of float64: the larger of two norms alone where the other is far smaller, and both if not."""
    exponents = torch.arange(-1020, 1020, 7, dtype=torch.float64)
    norms = 1.5 * (exponents / 2.0).exp2() * (exponents / 2.0).exp2()
    others = norms.flip(0)
    where = slots_of(norm_type, True)
    added = [powers_of(t, norm_type, where) for t in (norms, others, others)]
    both = added[0].maximum(added[1]) if math.isinf(norm_type) else added[0] + added[1]
    high, low = norms.maximum(others), norms.minimum(others)
    truth = (
        high
        if math.isinf(norm_type)
        else high * (1.0 + (low / high) ** norm_type) ** (1 / norm_type)
    )
    torch.testing.assert_close(norms_from(both, norm_type, where), truth, rtol=1e-12, atol=0.0)
    special = torch.tensor([math.nan, math.inf, 0.0], dtype=torch.float64)
    back = norms_from(powers_of(special, norm_type, where), norm_type, where)
    torch.testing.assert_close(back, special, equal_nan=True)
