"""The pass over memory that the benches take for their floor."""

import pytest
import torch
from helpers import bits

from gradfuse import _native

LENGTHS = (0, 1, 15, 63, 64, 1000, 70_001, 3 << 20)


def ones(length: int, value: int = 1) -> torch.Tensor:
    return torch.full((length,), value, dtype=torch.uint8)


@pytest.mark.parametrize("backwards", [False, True])
def test_it_copies_all_bytes(backend, backwards):
    for length in LENGTHS:
        reads = [torch.arange(length).to(torch.uint8) + k for k in range(4)]
        writes = [ones(length, 99) for _ in range(3)]
        _native.backend.stream(reads, writes, backwards)
        assert bits(writes) == bits(reads[:3])


def test_without_reads_it_writes_zeros(backend):
    for length in LENGTHS:
        source, targets = ones(length), [ones(length), ones(length)]
        _native.backend.stream([source], targets)
        assert bits(targets) == bits([source, ones(length, 0)])
        _native.backend.stream([], targets)
        assert bits(targets) == bits([ones(length, 0)] * 2)


def test_in_place_nothing_changes(backend):
    x = torch.arange(70_001)
    _native.backend.stream([x, x], [x])
    assert x.equal(torch.arange(70_001))
    _native.backend.stream([x], [])
    _native.backend.stream([], [])


def test_past_the_caches_too(native):
    try:
        native.set_last_level_cache(1)
        for length in LENGTHS:
            for shift in (0, 1):  # of an aligned and an unaligned target
                source, target = torch.arange(length).to(torch.uint8), ones(length + shift)[shift:]
                native.stream([source], [target])
                assert target.equal(source)
    finally:
        native.set_last_level_cache(0)


@pytest.mark.parametrize(
    ("reads", "writes", "words"),
    [
        ([ones(3)] * 5, [], "at most 4 tensors in reads, got 5"),
        ([], [ones(3)] * 4, "at most 3 tensors in writes, got 4"),
        ([ones(3)], [ones(4)], "tensors of 3 bytes, as the first, got 4"),
        (
            [ones(6)[::2]],
            [],
            r"in reads, got \[3\] of layout Strided on cpu with gaps for tensor 0",
        ),
        (
            [],
            [torch.empty(3, device="meta")],
            r"on the CPU in writes, got \[3\] of layout Strided on meta for tensor 0",
        ),
        (
            [torch.eye(2).to_sparse()],
            [],
            r"on the CPU in reads, got \[2, 2\] of layout Sparse on cpu for tensor 0",
        ),
    ],
)
def test_errors(native, reads, writes, words):
    with pytest.raises(ValueError, match=words):
        native.stream(reads, writes)


def test_what_is_no_tensor_is_an_error(native):
    with pytest.raises(TypeError, match="stream"):
        native.stream([1], [])
