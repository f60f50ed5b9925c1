"""The checks on a line or two of PTX: bugs that they must find, and code that they must accept."""

import numpy as np
import pytest

from ptx.emulator.checks import Violation
from ptx.emulator.machine import Machine
from ptx.emulator.parser import Module, ParseError
from ptx.snippets import aligned, evaluate, program, same

LANES = np.arange(64)
BOX = """.shared .align 4 .b8 box[256]; .reg .b32 at; .reg .b64 here, next, wide;
    shl.b32 at, %t0, 2;
    mov.u64 here, box; cvt.u64.u32 wide, at; add.s64 here, here, wide; mov.u64 next, box;
    xor.b64 wide, wide, 4; add.s64 next, next, wide; st.shared.u32 [here], a0;"""


def run(body, lanes=LANES):
    return evaluate(body, ["u32"], "u32", lanes)


def run_blocks(body, blocks, threads, order="forward"):
    """Runs a body over blocks that all read a0 from one array, an element per thread."""
    machine = Machine(order)
    given, out = aligned(np.zeros(threads, np.uint32)), aligned(np.zeros(threads, np.uint32))
    for name, a in (("in", given), ("out", out)):
        machine.memory.add(a.ctypes.data, a.nbytes, name, written=True)
    text = program(body, ["u32", "u32"], threads).replace("st.global.u32 [%rd5], d;", "")
    params = b"".join(int(a.ctypes.data).to_bytes(8, "little") for a in (given, out))
    machine.launch(Module(text), "test", (blocks, 1, 1), (threads, 1, 1), params)


def test_a_lane_may_reload_what_it_will_change():
    """__syncwarp orders a neighbour's load before the store. The lane's own reload is no race."""
    body = (
        BOX
        + """bar.warp.sync -1; ld.shared.u32 d, [next]; bar.warp.sync -1;
        ld.shared.u32 a0, [here]; add.s32 a0, a0, d; st.shared.u32 [here], a0;"""
    )
    same(run(body), LANES ^ 1)
    with pytest.raises(Violation, match="what block 0 thread 1 loaded"):
        run(body.replace("[next]; bar.warp.sync -1;", "[next];"))


@pytest.mark.parametrize("reader", [0, 1, 31, 63])
def test_atomics_of_many_race_with_any_plain_load(reader):
    body = f"""{BOX} .reg .b64 word; mov.u64 word, box; bar.sync 0;
        atom.shared.add.u32 d, [word], 1; @ORDER; setp.eq.u32 %p1, %t0, {reader};
        @%p1 ld.shared.u32 d, [word]; mov.u32 d, 1;"""
    run(body.replace("@ORDER;", "bar.sync 0;"))
    with pytest.raises(Violation, match="several threads changed atomically"):
        run(body.replace("@ORDER;", ""))


@pytest.mark.parametrize("order", ["forward", "backward"])
@pytest.mark.parametrize("block", [0, 1])
def test_a_barrier_orders_no_other_block(block, order):
    """All lanes of both blocks load one word, or change it atomically, before one stores to it."""
    store = f"""bar.sync 0; mov.u32 %t1, %ctaid.x; setp.eq.u32 %p1, %t1, {block};
        setp.eq.u32 %p2, %t0, 0; and.pred %p1, %p1, %p2;
        @%p1 st.global.u32 [%rd3], 7;"""
    for first in ("ld.global.u32 d, [%rd3];", "red.global.add.u32 [%rd3], 1;"):
        run_blocks(first + store, 1, 64, order)
        with pytest.raises(Violation, match="race in global memory"):
            run_blocks(first + store, 2, 64, order)


def test_ordered_accesses_are_atomic():
    body = """mov.u32 %t1, %ctaid.x; setp.eq.u32 %p1, %t1, 0;
        @%p1 red.relaxed.gpu.global.add.u32 [%rd3], 1;
        @!%p1 ld.relaxed.gpu.global.u32 d, [%rd3];"""
    run_blocks(body, 2, 32)
    with pytest.raises(Violation, match="race in global memory"):
        run_blocks(body.replace("ld.relaxed.gpu", "ld"), 2, 32)


def test_registers_are_watched_where_they_are_read():
    first = ".reg .b32 t, u; setp.lt.u32 %p1, a0, 5; mov.u32 d, 0; @%p1 mov.u32 t, a0; "
    five = [*range(1, 6), *[0] * 59]
    same(run(first + "@%p1 add.u32 d, t, 1;"), five)
    same(run(first + "selp.b32 u, t, 7, %p1; add.u32 d, u, 1;"), [*range(1, 6), *[8] * 59])
    for bad in ("add.u32 d, t, 1;", "mov.u32 u, t; add.u32 d, u, 1;",
                "selp.b32 u, 7, t, %p1; add.u32 d, u, 1;", "st.global.u32 [%rd2], t;"):  # fmt: skip
        with pytest.raises(Violation, match="a register that was never set"):
            run(first + bad)


def test_a_trap_is_for_the_lanes_that_reach_it():
    run("mov.u32 d, 1; setp.eq.u32 %p1, a0, 99; @%p1 trap;")
    with pytest.raises(Violation, match="thread 9: trap"):
        run("mov.u32 d, 1; setp.eq.u32 %p1, a0, 9; @%p1 trap;")


@pytest.mark.parametrize("space", ["shared", "local"])
def test_alignment_is_what_was_declared(space):
    body = f""".{space} .align 8 .b8 words[16]; .reg .b64 at; mov.u64 at, words;
        setp.eq.u32 %p1, %t0, 0; @%p1 st.{space}.v2.u32 [at], {{a0, a0}}; mov.u32 d, 1;"""
    run(body)
    with pytest.raises(Violation, match=f"misaligned {space} store of 16 bytes"):
        run(body.replace("v2.u32", "v4.u32").replace("{a0, a0}", "{a0, a0, a0, a0}"))


@pytest.mark.parametrize(
    ("load", "text"),
    [
        ("ld.param.u32 d, [p0+2];", "misaligned parameter load"),
        ("ld.param.u32 d, [p0+16];", "out-of-bounds load of a parameter"),
        ("ld.param.v4.u32 {d, d, d, d}, [p0+8];", "misaligned parameter load"),
    ],
)
def test_parameters_have_bounds(load, text):
    run("ld.param.u32 d, [p0+12];")
    with pytest.raises(Violation, match=text):
        run(load)


def test_extern_arrays_are_one():
    arrays = "".join(f".extern .shared .align 4 .b8 {name}[];\n" for name in ("one", "two"))
    text = program("", ["u32", "u32"], 32).replace(".visible", arrays + ".visible")
    text = text.replace(
        "st.global.u32 [%rd5], d;",
        """.reg .b64 a, b; mov.u64 a, one; mov.u64 b, two;
        setp.eq.u32 %p1, %t0, 0; @%p1 st.shared.u32 [a], a0; @%p1 ld.shared.u32 d, [b];""",
    )
    machine = Machine()
    given = aligned(np.zeros(32, np.uint32))
    machine.memory.add(given.ctypes.data, given.nbytes, "in", written=True)
    params = 2 * int(given.ctypes.data).to_bytes(8, "little")
    machine.launch(Module(text), "test", (1, 1, 1), (32, 1, 1), params, dynamic_bytes=128)


def test_braces_may_stand_anywhere():
    same(run("\n{\n.reg .b32 x;\nmov.u32 x, 5;\nmov.u32 d, x;\n}\nadd.u32 d, d, 7;"), [12] * 64)
    with pytest.raises(ParseError, match="each label once"):
        run("{ bra $on; $on: mov.u32 d, 1; } { bra $on; $on: mov.u32 d, 2; }")
