"""Each instruction against results worked out by hand, or by numpy in a wider type."""

import ast
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from ptx.cases import CASES
from ptx.emulator import accesses, collectives
from ptx.emulator.instructions import TABLE, UnknownInstruction, numpy_type
from ptx.snippets import evaluate, instruction, same

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("name", "sources", "result", "given", "expected"),
    CASES,
    ids=[c[0] for c in CASES],
)
def test_instruction(name, sources, result, given, expected):
    same(instruction(name, sources, result, *given), expected)


def exact_fma(a, b, c, dtype):
    """a * b + c in rational arithmetic, rounded once."""
    value = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    # float() of a Fraction rounds once to float64; float32 needs its own single rounding.
    near = dtype(float(value)) if dtype is np.float64 else np.float32(float(value))
    candidates = [near, np.nextafter(near, dtype(-INF)), np.nextafter(near, dtype(INF))]
    errors = [abs(Fraction(float(x)) - value) for x in candidates]
    best = min(errors)
    tied = [x for x, e in zip(candidates, errors, strict=True) if e == best]
    return min(tied, key=lambda x: int(x.view(f"u{x.itemsize}")) & 1)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_fma_rounds_once(kind):
    dtype = numpy_type(kind)
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(500).astype(dtype) for _ in range(2))
    c = (-a * b * (1 + generator.integers(-2, 3, 500) * np.finfo(dtype).eps)).astype(dtype)
    # A product and an addend whose sum is a tie except for a bit far below.
    a[0], b[0], c[0] = 1 + np.finfo(dtype).eps, 1 - np.finfo(dtype).eps, np.finfo(dtype).eps ** 2
    got = instruction(f"fma.rn.{kind}", [kind] * 3, kind, a, b, c)
    same(got, np.array([exact_fma(*abc, dtype) for abc in zip(a, b, c, strict=True)], dtype))
    same(
        instruction(f"fma.rn.{kind}", [kind] * 3, kind, [INF, 0.0, 2], [0, -1, 3], [1, 0.0, -INF]),
        [NAN, 0.0, -INF],
    )


def test_approximations_of_float64_keep_the_upper_word():
    x = np.array([3.0, 1e-300, -7.0])
    got = instruction("rcp.approx.ftz.f64", ["f64"], "f64", x)
    assert np.all(got.view(np.uint64) & np.uint64(0xFFFFFFFF) == 0)
    assert np.all(np.abs(got * x - 1) < 2.0**-19)
    got = instruction("rsqrt.approx.ftz.f64", ["f64"], "f64", np.abs(x))
    assert np.all(np.abs(got * np.sqrt(np.abs(x)) - 1) < 2.0**-19)


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [  # over (1, 2), (2, 1), (1, 1), (nan, 1)
        ("eq", "f32", [0, 0, 1, 0]), ("ne", "f32", [1, 1, 0, 0]), ("lt", "f64", [1, 0, 0, 0]),
        ("le", "f64", [1, 0, 1, 0]), ("gt", "f32", [0, 1, 0, 0]), ("ge", "f32", [0, 1, 1, 0]),
        ("equ", "f32", [0, 0, 1, 1]), ("neu", "f64", [1, 1, 0, 1]), ("ltu", "f32", [1, 0, 0, 1]),
        ("leu", "f64", [1, 0, 1, 1]), ("gtu", "f32", [0, 1, 0, 1]), ("geu", "f64", [0, 1, 1, 1]),
        ("num", "f32", [1, 1, 1, 0]), ("nan", "f64", [0, 0, 0, 1]),
    ],
)  # fmt: skip
def test_comparison_of_floats(name, kind, expected):
    body = f"setp.{name}.{kind} %p1, a0, a1; selp.u32 d, 1, 0, %p1;"
    same(evaluate(body, [kind, kind], "u32", [1, 2, 1, NAN], [2, 1, 1, 1]), expected)


def test_comparison_of_integers():
    high = [2**31, 1]
    for name, kind, expected in [
        ("lt", "s32", [1, 0]), ("lt", "u32", [0, 0]), ("lo", "u32", [0, 0]), ("hi", "u32", [1, 0]),
        ("ls", "u32", [0, 1]), ("hs", "u32", [1, 1]), ("ge", "s32", [0, 1]), ("eq", "b32", [0, 1]),
        ("ne", "s32", [1, 0]),
    ]:  # fmt: skip
        body = f"setp.{name}.{kind} %p1, a0, a1; selp.u32 d, 1, 0, %p1;"
        same(evaluate(body, [kind, kind], "u32", high, [1, 1]), expected)


def test_selection_and_predicates():
    body = """setp.gt.f64 %p1, a0, a1; setp.gt.f64 %p2, a0, 0d0000000000000000;
        and.pred %p3, %p1, %p2; not.pred %p4, %p3; xor.pred %p4, %p4, %p1; or.pred %p4, %p4, %p2;
        mov.pred %p5, -1; and.pred %p4, %p4, %p5; selp.f64 d, a0, a1, %p4;"""
    a, b = np.array([1.0, 5.0, -3.0, -1.0]), np.array([2.0, 4.0, -4.0, 0.0])
    p1, p2 = a > b, a > 0
    same(evaluate(body, ["f64", "f64"], "f64", a, b), np.where((~(p1 & p2) ^ p1) | p2, a, b))


def test_any_function_of_three_bits():
    a, b, c = [0xF0F0F0F0], [0xCCCCCCCC], [0xAAAAAAAA]
    for table, expected in [
        (0x80, 0x80808080),
        (0xFE, 0xFEFEFEFE),
        (0x96, 0x96969696),
        (0xCA, 0xCACACACA),
    ]:
        got = evaluate(f"lop3.b32 d, a0, a1, a2, {table};", ["b32"] * 3, "b32", a, b, c)
        same(got, expected=[expected])


def test_words_are_taken_apart_and_put_together():
    body = ".reg .b32 low, high; mov.b64 {low, high}, a0; mov.b64 d, {high, low};"
    same(evaluate(body, ["b64"], "b64", [0x1122334455667788]), [0x5566778811223344])
    body = ".reg .b32 high; mov.b64 {_, high}, a0; cvt.u64.u32 d, high;"
    same(evaluate(body, ["f64"], "u64", [1.0]), [0x3FF00000])
    body = ".reg .b16 l, h; mov.b32 {l, h}, a0; mov.b32 d, {h, l};"
    same(evaluate(body, ["f32"], "b32", [1.0]), [0x00003F80])
    same(evaluate("mov.b32 d, a0;", ["f32"], "b32", [-1.0]), [0xBF800000])


def test_a_moved_register_keeps_its_value():
    """The source changes afterwards, in some lanes only."""
    body = "mov.f32 d, a0; setp.gt.f32 %p1, a0, 0f40000000; @%p1 mov.f32 a0, 0f00000000;"
    same(evaluate(body, ["f32"], "f32", [1, 2, 3, 4]), [1, 2, 3, 4])


def test_immediates():
    same(evaluate("add.f64 d, a0, 0dBFF8000000000000;", ["f64"], "f64", [1.0]), [-0.5])
    same(evaluate("add.f32 d, a0, 0f3F000000;", ["f32"], "f32", [1.0]), [1.5])
    same(evaluate("add.s32 d, a0, -7;", ["s32"], "s32", [3]), [-4])
    same(evaluate("and.b32 d, a0, 0xFF00;", ["b32"], "b32", [0x1234]), [0x1200])
    same(evaluate("mul.lo.s64 d, a0, -4294967296;", ["s64"], "s64", [2]), [-(2**33)])


def test_branches_and_loops():
    """Collatz: every lane has its own number of rounds."""
    body = """mov.u32 d, 0;
    $loop: setp.eq.u32 %p1, a0, 1; @%p1 bra $done;
    and.b32 %t1, a0, 1; setp.eq.s32 %p2, %t1, 0; @%p2 bra $even;
    mad.lo.s32 a0, a0, 3, 1; bra.uni $next;
    $even: shr.u32 a0, a0, 1;
    $next: add.s32 d, d, 1; bra $loop;
    $done:"""

    def rounds(n):
        return 0 if n == 1 else 1 + rounds(n // 2 if n % 2 == 0 else 3 * n + 1)

    starts = np.arange(1, 98)
    same(evaluate(body, ["u32"], "u32", starts), [rounds(int(n)) for n in starts])


def test_guards():
    body = """setp.gt.f32 %p1, a0, 0f40000000; mov.f32 d, 0f3F800000; @%p1 mov.f32 d, a0;
        @!%p1 neg.f32 d, d;"""
    same(evaluate(body, ["f32"], "f32", [1, 2, 3]), [-1, -1, 3])


@pytest.mark.parametrize(
    "body",
    [
        "sad.u32 d, a0, a0, a0;", "add.rz.f32 d, a0, a0;", "add.sat.s32 d, a0, a0;",
        "cvt.rna.f32.f32 d, a0;", "ld.global.b128 d, [%rd2];", "bar.sync 1;", "bar.sync 0, 64;",
        "shfl.down.b32 d, a0, 1, 31;", "atom.global.add.noftz.f16x2 d, [%rd0], a0;",
        "dp4a.u32.u32 d, a0, a0, a0;",
        "cvt.f32.f64 d, a0;", "setp.eq.and.s32 %p1, a0, a0, %p1;", "mov.u32 d, %clock;",
        "ld.shared::cluster.u32 d, [%rd2];", "add.cc.u32 d, a0, a0;", "fma.f32 d, a0, a0;",
    ],
)  # fmt: skip
def test_what_is_not_known_is_named(body):
    """The error comes before anything runs, even if no lane would reach the instruction."""
    name = body.split()[0]
    with pytest.raises(Exception, match=name.replace(".", r"\.") + r"|symbol %clock") as found:
        evaluate(body, ["u32"], "u32", [1])
    assert isinstance(found.value, UnknownInstruction)


def test_every_instruction_is_tested():
    """The strings of these files name every instruction that is known."""
    strings = [
        node.value
        for name in ("cases.py", "test_instructions.py", "test_accesses.py", "test_collectives.py")
        for node in ast.walk(ast.parse(Path(__file__).with_name(name).read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    tested = set(re.findall(r"\b([a-z]\w*)\.[a-z]", "\n".join(strings)))
    known = {*TABLE, *accesses.BUILDERS, *collectives.BUILDERS, "mov", "bra"}
    assert known <= tested, f"no test of {sorted(known - tested)}"
