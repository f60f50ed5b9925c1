"""Policies for NaN and inf: propagate as in torch (the default), raise, or zero all gradients."""

import math

import pytest
import torch
from helpers import COMPLEX, NORM_TYPES, REAL, bits, owner, owners, random, short

import gradfuse

pytestmark = pytest.mark.usefixtures("backend")

POISONS = {
    "nan": [math.nan],
    "inf": [math.inf],
    "-inf": [-math.inf],
    "both": [math.inf, math.nan],
}
each_poison = pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS.keys())
each_dtype = pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=short)
each_order = pytest.mark.parametrize("norm_type", NORM_TYPES)


def poisoned(poison, dtype, device):
    """A list of gradients with these values in the second one."""
    grads = [random(5, 7, dtype=dtype, device=device), random(9000, dtype=dtype, device=device)]
    for i, value in enumerate(poison):
        grads[1][8500 * i + 3] = value
    return [*grads, random(3, dtype=dtype, device=device)]


def assert_same_outcome(ours, theirs):
    """NaN is at the same places, and all other values are equal."""
    assert torch.equal(ours.isnan(), theirs.isnan())
    kept = ~ours.isnan()
    assert torch.equal(ours[kept], theirs[kept].to(ours.dtype))


@pytest.mark.parametrize("max_norm", [1.0, 0.0, math.inf])
@each_poison
@each_order
@each_dtype
def test_propagate_does_what_torch_does(dtype, norm_type, poison, max_norm, device):
    ours, theirs = (poisoned(poison, dtype, device) for _ in range(2))
    expected = torch.nn.utils.clip_grad_norm_(owners(theirs), max_norm, norm_type)
    assert_same_outcome(gradfuse.get_total_norm(ours, norm_type), expected)
    got = gradfuse.clip_grad_norm_(owners(ours), max_norm, norm_type)
    assert_same_outcome(got, expected)
    for mine, stock in zip(ours, theirs, strict=True):
        assert_same_outcome(mine, stock)


@pytest.mark.parametrize("total", [math.nan, math.inf])
def test_a_nonfinite_total_norm_does_what_torch_does(total, device):
    ours, theirs = (random(50, device=device) for _ in range(2))
    torch.nn.utils.clip_grads_with_norm_(owner(theirs), 1.0, torch.tensor(total, device=device))
    gradfuse.clip_grads_with_norm_(owner(ours), 1.0, torch.tensor(total, device=device))
    assert_same_outcome(ours, theirs)


@each_order
def test_inf_beside_values_that_need_rescaling(norm_type, device):
    """Merging partial sums of different scales must not compute inf * 0."""
    for huge in (1e300, 1e-300):
        grads = [
            torch.tensor([math.inf], dtype=torch.float64, device=device),
            torch.full((9000,), huge, dtype=torch.float64, device=device),
        ]
        for listed in (grads, grads[::-1], [torch.cat(grads)], [torch.cat(grads[::-1])]):
            assert gradfuse.get_total_norm(listed, norm_type).item() == math.inf


@each_poison
@each_order
@each_dtype
def test_error_leaves_everything_untouched(dtype, norm_type, poison, device):
    grads = poisoned(poison, dtype, device)
    params = owners(grads)
    before, versions = bits(grads), [g._version for g in grads]
    clipper = gradfuse.GradClipper(params, 1.0, norm_type, nonfinite="error")
    for call in (
        lambda: gradfuse.clip_grad_norm_(params, 1.0, norm_type, nonfinite="error"),
        lambda: gradfuse.clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True),
        lambda: gradfuse.get_total_norm(grads, norm_type, error_if_nonfinite=True),
        clipper.clip_,
    ):
        with pytest.raises(RuntimeError, match=r"expected a finite .*norm.* got (nan|inf)"):
            call()
        assert bits(grads) == before
        assert [g._version for g in grads] == versions


def test_error_says_which_function_refused():
    grad = torch.tensor([math.nan])
    with pytest.raises(RuntimeError, match=r"^clip_grad_norm_: "):
        gradfuse.clip_grad_norm_(owner(grad), 1.0, nonfinite="error")
    with pytest.raises(RuntimeError, match=r"^get_total_norm: "):
        gradfuse.get_total_norm(grad, error_if_nonfinite=True)


@pytest.mark.parametrize("policy", ["error", "zero"])
@pytest.mark.parametrize(
    "grad",
    [
        torch.full((100,), 3e38),
        torch.full((100,), 1.5e308, dtype=torch.float64),
        torch.full((100,), 6e4, dtype=torch.float16),
    ],
    ids=["float32", "float64", "float16"],
)
def test_a_finite_gradient_whose_norm_overflows_is_clipped(grad, policy, device):
    grad = grad.clone().to(device)
    gradfuse.clip_grad_norm_(owner(grad), 1.0, nonfinite=policy)
    assert torch.allclose(grad, torch.full_like(grad, 0.1), rtol=1e-3, atol=0.0)


@each_poison
@each_order
@each_dtype
def test_zero_makes_the_step_void(dtype, norm_type, poison, device):
    grads = poisoned(poison, dtype, device)
    norm = gradfuse.clip_grad_norm_(owners(grads), 1.0, norm_type, nonfinite="zero")
    assert not norm.isfinite()
    assert all(set(b) <= {0} for b in bits(grads))

    grads = poisoned(poison, dtype, device)
    report = gradfuse.GradClipper(owners(grads), 1.0, norm_type, nonfinite="zero").clip_()
    assert all(set(b) <= {0} for b in bits(grads))
    assert report.void
    assert report.clipped
    assert report.coefficient == 0.0
    assert report.clipped_norm == 0.0
    assert not math.isfinite(report.total_norm)
    assert report.first_nonfinite().name == "1"
    assert report.first_nonfinite().nonfinite == len(poison)


def test_zero_reaches_strided_gradients_and_nothing_else(device):
    base = random(60, 50, device=device)
    before = base.clone()
    grad = base.t()[::2, 3:40]
    gradfuse.clip_grad_norm_(
        owners([grad, torch.tensor([math.nan], device=device)]), 1.0, nonfinite="zero"
    )
    assert not grad.any()
    before.t()[::2, 3:40] = 0.0
    assert bits(base) == bits(before)


def test_zero_is_the_usual_clip_while_all_is_finite(device):
    grad, usual = random(500, device=device), random(500, device=device)
    clipper = gradfuse.GradClipper(owner(grad), 1.0, nonfinite="zero")
    gradfuse.clip_grad_norm_(owner(usual), 1.0)
    report = clipper.clip_()
    assert not report.void
    assert bits(grad) == bits(usual)


def test_a_void_step_is_followed_by_a_good_one(device):
    grad = torch.tensor([math.inf, 1.0, 2.0], device=device)
    clipper = gradfuse.GradClipper(owner(grad), 1.0, nonfinite="zero")
    assert clipper.clip_().void
    grad.copy_(torch.tensor([0.0, 3.0, 4.0], device=device))
    report = clipper.clip_()
    assert (report.void, report.total_norm) == (False, 5.0)
    assert torch.allclose(grad.cpu(), torch.tensor([0.0, 0.6, 0.8]))
