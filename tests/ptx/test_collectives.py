"""Shuffles, votes, matches, reductions and barriers."""

import numpy as np
import pytest

from ptx.emulator.checks import Violation
from ptx.snippets import evaluate, same


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "source"),
    [
        ("down", 1, 31, lambda i: i + 1 if i % 32 < 31 else i),
        ("up", 3, 0, lambda i: i - 3 if i % 32 >= 3 else i),
        ("bfly", 5, 31, lambda i: i ^ 5),
        ("idx", 7, 31, lambda i: i // 32 * 32 + 7),
        ("down", 2, 0x181F, lambda i: i + 2 if i % 8 < 6 else i),  # segments of 8
        ("idx", 3, 0x181F, lambda i: i // 8 * 8 + 3),
        ("up", 1, 0x1800, lambda i: i - 1 if i % 8 else i),
    ],
)
def test_shuffles(mode, by, clamp, source):
    lanes = np.arange(64)
    expected = np.array([source(i) for i in lanes.tolist()])
    body = f"shfl.sync.{mode}.b32 d|%p1, a0, {by}, {clamp}, -1;"
    same(evaluate(body, ["u32"], "u32", lanes + 100), expected + 100)
    body += " selp.u32 d, 1, 0, %p1;"
    inside = evaluate(body, ["u32"], "u32", lanes).astype(bool)
    assert np.array_equal(inside, expected != lanes) or mode in ("idx", "bfly")
    assert inside.all() or mode not in ("idx", "bfly")


def test_a_part_of_a_warp_shuffles_by_itself():
    body = """setp.lt.u32 %p1, %t0, 16; mov.u32 d, 0; @%p1 bra $low; bra $end;
        $low: shfl.sync.down.b32 d, a0, 1, 31, 0xffff; $end:"""
    with pytest.raises(Violation, match="reads lane 16, which its mask does not name"):
        evaluate(body, ["u32"], "u32", np.arange(32))
    got = evaluate(body.replace(", 31, 0xffff", ", 15, 0xffff"), ["u32"], "u32", np.arange(32))
    same(got, [*range(1, 16), 15, *[0] * 16])


def test_votes():
    x = np.arange(64)
    test = "setp.eq.u32 %p1, a0, 5; "
    same(
        evaluate(test + "vote.sync.ballot.b32 d, %p1, -1;", ["u32"], "u32", x), [32] * 32 + [0] * 32
    )
    for name, expected in [("any", [1, 0]), ("all", [0, 0]), ("uni", [0, 1])]:
        body = f"{test} vote.sync.{name}.pred %p2, %p1, -1; selp.u32 d, 1, 0, %p2;"
        same(evaluate(body, ["u32"], "u32", x), np.repeat(expected, 32))
    same(evaluate("activemask.b32 d;", ["u32"], "u32", np.arange(40)), [2**32 - 1] * 32 + [255] * 8)


def test_matches():
    got = evaluate("match.any.sync.b32 d, a0, -1;", ["u32"], "u32", np.arange(32) % 2)
    same(got, [0x55555555, 0xAAAAAAAA] * 16)
    body = "match.all.sync.b64 d|%p1, a0, -1; selp.u32 d, d, 7, %p1;"
    same(evaluate(body, ["u64"], "u32", [2**40] * 32), [2**32 - 1] * 32)
    same(evaluate(body, ["u64"], "u32", [2**40] * 31 + [1]), [7] * 32)


def test_reductions_over_a_warp():
    x = np.arange(32) * 3 - 40
    for name, expected in [
        ("add.s32", x.sum()), ("min.s32", -40), ("max.s32", 53), ("max.u32", 2**32 - 1),
        ("and.b32", np.bitwise_and.reduce(x)), ("or.b32", np.bitwise_or.reduce(x)),
        ("xor.b32", np.bitwise_xor.reduce(x)),
    ]:  # fmt: skip
        got = evaluate(f"redux.sync.{name} d, a0, -1;", ["s32"], "s32", x)
        same(got, [int(expected)] * 32)


def test_barriers():
    counted = "setp.lt.u32 %p1, %t0, 40; bar.red.popc.u32 d, 0, %p1;"
    same(evaluate(counted, ["u32"], "u32", np.arange(64)), [40] * 64)
    for name, expected in [("and", 0), ("or", 1)]:
        body = f"setp.lt.u32 %p1, %t0, 40; bar.red.{name}.pred %p2, 0, %p1; selp.u32 d, 1, 0, %p2;"
        same(evaluate(body, ["u32"], "u32", np.arange(64)), [expected] * 64)
    body = "barrier.sync.aligned 0; bar.warp.sync -1; mov.u32 d, a0;"
    same(evaluate(body, ["u32"], "u32", [1, 2] * 16), [1, 2] * 16)
