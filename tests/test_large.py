"""More than 2^31 elements in one tensor: counts and offsets must not wrap."""

import math

import pytest
import torch
from helpers import owner

import gradfuse

N = 2**31 + 5


@pytest.fixture
def large(native, device):
    """4.3 GB of bfloat16 zeros, with values at both ends and around 2^31."""
    if device.type == "cpu":
        with open("/proc/meminfo") as meminfo:
            free = next(int(row.split()[1]) for row in meminfo if row.startswith("MemAvailable"))
        if free < 10 << 20:
            pytest.skip("needs 10 GB of free memory")
    grad = torch.zeros(N, dtype=torch.bfloat16, device=device)
    for where in (0, 2**31 - 1, 2**31, -1):
        grad[where] = 2.0
    return grad


@pytest.mark.slow
def test_norm_counts_and_clip(large):
    report = gradfuse.GradClipper(owner(large), 1.0).clip_()
    (row,) = report.parameters
    assert report.total_norm == 4.0
    assert (row.largest, row.zeros, row.numel) == (2.0, N - 4, N)
    for where in (0, 2**31 - 1, 2**31, -1):
        assert large[where].item() == 0.5
    large[-1] = math.nan
    assert gradfuse.clip_grad_norm_(owner(large), 1.0, nonfinite="zero").isnan()
    assert large[-1].item() == 0.0
    assert large[0].item() == 0.0


@pytest.mark.slow
def test_every_element_counts(large):
    """2^31 + 5 ones: a float32 sum would stop at 2^24."""
    large.fill_(1.0)
    assert gradfuse.get_total_norm(large).item() == pytest.approx(math.sqrt(N), rel=1e-6)
    assert gradfuse.get_total_norm(large, 1.0).item() == pytest.approx(N, rel=1e-6)
    gradfuse.clip_grad_value_(owner(large), 0.5)
    assert large[-1].item() == 0.5
    assert large.min().item() == large.max().item() == 0.5


@pytest.mark.slow
def test_strided_views_and_rows(large):
    every_other = large[1::2]
    every_other[-1] = 3.0
    assert gradfuse.get_total_norm(every_other).item() == pytest.approx(math.sqrt(13.0))
    gradfuse.clip_grad_norm_(owner(every_other), 1.0)
    assert large[2**31 - 1].item() == pytest.approx(2 / math.sqrt(13.0), rel=2**-8)
    assert large[-1].item() == 2.0

    large[:4] = 2.0
    matrix = large[: 2**31].view(2, 2**30)
    matrix[1, -1] = 2.0
    weight = torch.zeros(1, dtype=torch.bfloat16, device=large.device).expand(matrix.shape)
    weight.grad = matrix
    gradfuse.adaptive_clip_grad_(weight, 1.0, eps=1.0)
    assert matrix[0, :5].tolist() == [0.5, 0.5, 0.5, 0.5, 0.0]
    assert matrix[1, -1].item() == 1.0
