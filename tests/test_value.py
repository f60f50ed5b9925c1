"""clip_grad_value_ against torch's, bit for bit where torch takes the bound."""

import math

import pytest
import torch
from helpers import REAL, bits, owner, owners, random, short

import gradfuse

pytestmark = pytest.mark.usefixtures("backend")

SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e-7, 0.1, -0.1, 6e4, 5e-324]


def assert_clamped_as_torch(grads, clip_value):
    """Values equal torch's; NaN stays NaN, and what is within the bound keeps its bits."""
    before = [g.clone() for g in grads]
    stock = [g.clone() for g in grads]
    torch.nn.utils.clip_grad_value_(owners(stock), clip_value)
    assert gradfuse.clip_grad_value_(owners(grads), clip_value) is None
    for old, ours, theirs in zip(before, grads, stock, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.isnan(), old.isnan())
        finite = ~ours.isnan()
        assert torch.equal(ours[finite], theirs[finite])
        within = old.abs() < torch.tensor(clip_value, dtype=torch.float64).to(old.device)
        assert bits(ours[within]) == bits(old[within])


@pytest.mark.parametrize("clip_value", [0.0, 1e-30, 0.1, 1 / 3, 0.7, 1.0, 300.0, math.inf])
@pytest.mark.parametrize("dtype", REAL, ids=short)
def test_equals_torch(dtype, clip_value, device):
    special = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype).to(device)
    grads = [random(n, dtype=dtype, device=device) for n in (1, 33, 4097, 40000)]
    strided = random(60, 50, dtype=dtype, device=device).t()[::2, 1:]
    assert_clamped_as_torch([special, *grads, strided], clip_value)


@pytest.mark.parametrize("clip_value", [0.1, 1 / 3, 0.7, 1.001, 2.9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=short)
def test_the_bound_is_rounded_to_the_gradients_dtype(dtype, clip_value, device):
    """So a value just above the rounded bound changes, and the bound itself does not."""
    bound = torch.tensor(clip_value, dtype=dtype, device=device)
    grad = torch.stack([bound, -bound, bound.nextafter(2 * bound), -bound.nextafter(2 * bound)])
    gradfuse.clip_grad_value_(owner(grad), clip_value)
    assert grad.tolist() == [bound.item(), -bound.item(), bound.item(), -bound.item()]


@pytest.mark.parametrize("dtype", REAL, ids=short)
def test_a_bound_beyond_the_dtype_clips_nothing(dtype, device):
    """It rounds to inf. torch raises "cannot be converted to type c10::Half without overflow"."""
    top = torch.finfo(dtype).max
    grad = torch.tensor([top, -top, 1.0, math.nan], dtype=dtype, device=device)
    before = bits(grad)
    gradfuse.clip_grad_value_(owner(grad), torch.finfo(torch.float64).max)
    assert bits(grad) == before


@pytest.mark.parametrize("dtype", REAL, ids=short)
def test_a_lone_value_outside_is_found_anywhere(dtype, device):
    for n in (1, 17, 129, 513, 40000):
        for where in {0, n // 3, n - 1}:
            grad = torch.full((n,), 0.5, dtype=dtype, device=device)
            grad[where] = -2.0
            gradfuse.clip_grad_value_(owner(grad), 1.0)
            assert grad[where].item() == -1.0
            grad[where] = 0.5
            assert (grad == 0.5).all()


def test_mixed_dtypes_in_one_call(device):
    assert_clamped_as_torch([random(100, dtype=d, device=device) for d in REAL], 0.25)


def test_zero_bound_zeroes(device):
    grad = random(1000, device=device)
    gradfuse.clip_grad_value_(owner(grad), 0)
    assert not grad.any()


def test_single_tensor_and_missing_gradients(device):
    without = torch.zeros(3, device=device)
    grad = random(30, device=device)
    gradfuse.clip_grad_value_([without, owner(grad)], 0.01)
    gradfuse.clip_grad_value_(without, 0.01)
    assert without.grad is None
    assert grad.abs().max().item() == pytest.approx(0.01)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_foreach_is_accepted(foreach, device):
    grad = random(30, device=device)
    gradfuse.clip_grad_value_(owner(grad), 0.01, foreach=foreach)
    assert grad.abs().max().item() == pytest.approx(0.01)


def test_autograd_sees_the_write(device):
    grad = random(30, device=device)
    version = grad._version
    gradfuse.clip_grad_value_(owner(grad), 0.01)
    assert grad._version > version
