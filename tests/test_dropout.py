"""The random numbers of a dropout, and which elements they drop."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import bits, random
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gradfuse
from gradfuse import reference

SHAPE = (6, 40)


def dropped(
    p: float, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", **options,
) -> Tensor:  # fmt: skip
    """The dropout of ones, as the sum of a norm shows it."""
    x = torch.ones(shape, dtype=dtype, device=device)
    _, s = gradfuse.add_rms_norm(x, None, shape[-1:], p=p, training=True, **options)
    return s


def seeds(seed: int) -> Tensor:
    """What a call draws from a generator with this seed."""
    return torch.randint(0, 2**63 - 1, (2,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_published_vectors(counter, key, expected):
    """Philox4x32-10 of Random123, kat_vectors."""
    found = reference.philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert [int(w) for w in found] == expected


@pytest.mark.parametrize("width", [40, 33, 8, 7, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_implementations_drop_the_same(width, dtype, backend, device):
    """The bits of a mask depend on seed and index alone."""
    shape = (5, width)
    s = dropped(0.4, shape, dtype, device, generator=torch.Generator().manual_seed(3))
    assert torch.equal(s.cpu() != 0, reference.stays(seeds(3), shape, 0.4))


def test_every_bit_of_p_counts(backend, device):
    """An element stays if its number is at least p * 2^32, whose lower half decides once in 65,536
    elements."""
    words = reference.random_words(seeds(3), 64).tolist()
    for i in (0, 7, 8, 21, 63):
        for p, stays in ((words[i] / 2**32, True), ((words[i] + 1) / 2**32, False)):
            s = dropped(p, (2, 32), device=device, generator=torch.Generator().manual_seed(3))
            assert (s.flatten()[i].item() != 0) == stays


def test_the_upper_block_numbers_count(backend, device):
    """Rows of samples that are left out take their numbers along."""
    x = torch.ones(3, 8, device=device)
    scale = torch.tensor([0.0, 1.0, 1.0], device=device)
    options = {"p": 0.5, "training": True, "sample_scale": scale}
    _, s = gradfuse.add_rms_norm(
        x, None, (8,), generator=torch.Generator().manual_seed(3), **options
    )
    expected = reference.stays(seeds(3), (3, 8), 0.5)
    expected[0] = False
    assert torch.equal(s.cpu() != 0, expected)


def test_no_dropout_and_all(backend, device):
    x, r = random(4, 20, device=device), random(4, 20, seed=2, device=device)
    x[1, 3] = math.inf
    for norm in (gradfuse.add_layer_norm, gradfuse.add_rms_norm):
        assert torch.equal(norm(x, r, (20,), p=0.0, training=True)[1], r + x)
        assert torch.equal(norm(x, r, (20,), p=0.7, training=False)[1], r + x)
        leaf = x.clone().requires_grad_()
        _, s = norm(leaf, r, (20,), p=1.0, training=True)
        assert torch.equal(s, r)
        s.sum().backward()
        assert not leaf.grad.any()


def test_all_may_be_dropped_without_samples(backend, device):
    x = torch.full((16,), math.inf, device=device, requires_grad=True)
    r = random(16, device=device)
    _, s = gradfuse.add_layer_norm(x, r, (16,), p=1.0, training=True)
    both = s + gradfuse.dropout_add(x, r, 1.0)
    assert torch.equal(both, r + r)
    both.sum().backward()
    assert not x.grad.any()


@pytest.mark.elsewhere
def test_a_compiled_scale_keeps_its_gradient():
    x, r = random(4, 8), random(4, 8, seed=2)
    scale = random(4, seed=3).requires_grad_()

    def call(scale: Tensor) -> Tensor:
        return gradfuse.dropout_add(x, r, 0.0, sample_scale=scale).square().sum()

    (expected,) = torch.autograd.grad(call(scale), scale)
    (got,) = torch.autograd.grad(torch.compile(call, backend="aot_eager")(scale), scale)
    torch.testing.assert_close(got, expected)
    assert expected.any()


def test_what_is_left_out_may_be_infinite(backend, device):
    """It is selected, not multiplied: inf * 0 would be NaN."""
    x = torch.full((4, 16), math.inf, device=device, requires_grad=True)
    r = random(4, 16, device=device)
    scale = torch.tensor([0.0, 2.0, 0.0, 0.0], device=device).reshape(4, 1)
    y, s = gradfuse.add_layer_norm(x, r, (16,), sample_scale=scale)
    assert torch.equal(s[[0, 2, 3]], r[[0, 2, 3]])
    torch.testing.assert_close(y[0], torch.nn.functional.layer_norm(r[0], (16,)))
    keep = reference.stays(seeds(3), (4, 16), 0.5)
    _, s = gradfuse.add_layer_norm(
        x, r, (16,), p=0.5, training=True, generator=torch.Generator().manual_seed(3)
    )
    assert torch.equal(s.cpu().isinf(), keep)
    assert torch.equal(s[~keep.to(device)], r[~keep.to(device)])


def test_the_generator_decides(backend, device):
    torch.manual_seed(5)
    first = dropped(0.5)
    assert not torch.equal(first, dropped(0.5))
    torch.manual_seed(5)
    assert torch.equal(first, dropped(0.5))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        assert torch.equal(first, dropped(0.5))
    state = torch.get_rng_state()
    one = dropped(0.5)
    torch.set_rng_state(state)
    assert torch.equal(one, dropped(0.5))


def test_the_backward_drops_the_same(backend, device):
    x = random(5, 24, device=device).requires_grad_()
    for prenorm in (True, False):
        torch.manual_seed(7)
        found = gradfuse.add_rms_norm(
            x, None, (24,), p=0.5, training=True, prenorm=prenorm, eps=1.0
        )
        y = found[0] if prenorm else found
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(y != 0, grad != 0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_drops_the_same(reentrant, backend, device):
    x = random(5, 24, device=device).requires_grad_()

    def block(t: Tensor) -> Tensor:
        return gradfuse.add_rms_norm(t, None, (24,), p=0.5, training=True, prenorm=False, eps=1.0)

    torch.manual_seed(7)
    y = checkpoint(block, x, use_reentrant=reentrant)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y)) if not reentrant else (None,)
    if reentrant:
        y.sum().backward()
        grad = x.grad
    assert torch.equal(y != 0, grad != 0)


@pytest.mark.backends("cpu", "reference", arithmetic=False)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_call_drops_the_same(compiler, backend):
    torch._dynamo.reset()

    @torch.compile(backend=compiler, fullgraph=True)
    def block(t: Tensor) -> Tensor:
        return gradfuse.add_rms_norm(t, None, (24,), p=0.5, training=True, prenorm=False, eps=1.0)

    x = random(5, 24).requires_grad_()
    seen = []
    for _ in range(2):
        y = block(x)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(y != 0, grad != 0)
        seen.append(y.detach())
    assert not torch.equal(*seen)


@pytest.mark.backends("cpu", arithmetic=False)
def test_means_and_correlations(backend):
    """Over 10^8 elements, within five standard deviations."""
    p, n, columns = 0.1, 10_000_000, 1000
    lags = (1, 2, 4, 8, 64, 128, columns)
    total, products = 0, dict.fromkeys(lags, 0)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        kept = dropped(p, (n // columns, columns), torch.bfloat16, generator=generator)
        zeros = (kept == 0).flatten()
        total += int(zeros.sum())
        for lag in lags:
            products[lag] += int((zeros[lag:] & zeros[:-lag]).sum())
    draws = 10 * n
    assert abs(total - p * draws) < 5 * math.sqrt(p * (1 - p) * draws)
    for lag, both in products.items():
        pairs, q = draws - 10 * lag, p * p
        # Neighbouring pairs share an element, which adds covariance.
        variance = pairs * (q * (1 - q) + 2 * (p**3 - q * q))
        assert abs(both - pairs * q) < 5 * math.sqrt(variance), lag


@pytest.mark.backends("cpu", arithmetic=False)
def test_two_calls_share_no_numbers(backend):
    masks = [dropped(0.5, generator=torch.Generator().manual_seed(s)) for s in range(20)]
    assert len({bits(m)[0] for m in masks}) == 20
