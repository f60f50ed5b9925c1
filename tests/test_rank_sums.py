"""The norm from the sums of several ranks, without any: slots stand for them."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import random

from gradfuse import _native
from gradfuse._codes import Action, NonFinite
from gradfuse._records import ClipPlan

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
