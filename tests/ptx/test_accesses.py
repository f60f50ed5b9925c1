"""Loads, stores, atomics and special registers, on every memory space."""

import numpy as np
import pytest

from ptx.emulator.machine import Machine
from ptx.emulator.parser import Module
from ptx.snippets import aligned, evaluate, same


def test_special_registers():
    text = """.version 8.0
.target sm_90
.address_size 64
.visible .entry test(.param .u64 p0)
{
.reg .b32 %r<20>; .reg .b64 %rd<4>;
mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mov.u32 %r2, %ntid.x; mov.u32 %r3, %ntid.y;
mov.u32 %r4, %laneid; mov.u32 %r5, %lanemask_lt; mov.u32 %r6, %warpid; mov.u32 %r7, %nctaid.x;
mad.lo.s32 %r8, %r1, %r2, %r0; mul.lo.s32 %r9, %r8, 16;
ld.param.u64 %rd0, [p0]; cvt.u64.u32 %rd1, %r9; add.s64 %rd2, %rd0, %rd1;
st.global.v4.u32 [%rd2], {%r3, %r4, %r5, %r6};
ret;
}"""
    machine = Machine()
    out = aligned(np.zeros(4 * 48, np.uint32))
    machine.memory.add(out.ctypes.data, out.nbytes, "out", written=False)
    params = int(out.ctypes.data).to_bytes(8, "little")
    machine.launch(Module(text), "test", (1, 1, 1), (8, 6, 1), params)
    threads = np.arange(48)
    assert out.reshape(48, 4).tolist() == [
        [6, t % 32, (1 << t % 32) - 1, t // 32] for t in threads.tolist()
    ]


def test_loads_and_stores_of_every_width():
    x = np.arange(16, dtype=np.uint32)
    body = """.reg .b32 w<4>; cvta.to.global.u64 %rd20, %rd0; shl.b64 %rd21, %rd1, 1;
        setp.lt.u32 %p1, %t0, 8; @!%p1 mov.u64 %rd21, 0; add.s64 %rd22, %rd20, %rd21;
        and.b64 %rd22, %rd22, -16; ld.global.nc.v4.u32 {w0, w1, w2, w3}, [%rd22+0];
        add.s32 w0, w0, w3; ld.global.v2.u32 {w1, w2}, [%rd22+8]; mad.lo.s32 d, w1, w2, w0;"""
    first = [i // 2 * 4 if i < 8 else 0 for i in range(16)]
    same(evaluate(body, ["u32"], "u32", x), [a + a + 3 + (a + 2) * (a + 3) for a in first])
    body = ".reg .b16 h; ld.global.u8 h, [%rd2+1]; cvt.u32.u16 d, h;"
    same(evaluate(body, ["u32"], "u32", [0x11223344]), [0x33])
    body = ".reg .b16 h; ld.global.s8 h, [%rd2]; cvt.s32.s16 d, h;"
    same(evaluate(body, ["s32"], "s32", [0x112233F4]), [0xF4 - 256])
    body = "st.global.u8 [%rd2], 7; ld.volatile.global.u32 d, [%rd2];"
    same(evaluate(body, ["u32"], "u32", [0x11223344]), [0x11223307])


SHARED = """.shared .align 16 .b8 box[256]; .reg .b32 at; shl.b32 at, %t0, 2;
    .reg .b64 where, generic; mov.u64 where, box; cvt.u64.u32 generic, at;
    add.s64 where, where, generic;
    st.shared.u32 [where], a0; bar.sync 0;"""


def test_shared_memory_and_its_generic_addresses():
    body = """cvta.shared.u64 generic, where; ld.u32 d, [generic]; add.s32 d, d, 1;
        st.u32 [generic], d;"""
    same(evaluate(SHARED + body, ["u32"], "u32", np.arange(40)), np.arange(1, 41))


def test_local_memory_is_each_lanes_own():
    body = """.local .align 8 .b8 own[16]; .reg .b64 here, generic; mov.u64 here, own;
        cvta.local.u64 generic, here; st.local.u32 [here+4], a0; ld.u32 d, [generic+4];"""
    same(evaluate(body, ["u32"], "u32", np.arange(40)), np.arange(40))


def test_a_store_reaches_a_mixture_of_spaces():
    """Even lanes store to shared memory, odd ones to global, through generic addresses."""
    body = (
        SHARED
        + """cvta.shared.u64 generic, where; and.b32 %t1, %t0, 1; setp.eq.s32 %p1, %t1, 0;
        selp.b64 generic, generic, %rd2, %p1; add.s32 %t2, a0, 100; st.u32 [generic], %t2;
        ld.shared.u32 %t3, [where]; ld.global.u32 d, [%rd2]; mad.lo.s32 d, %t3, 1000, d;"""
    )
    i = np.arange(8)
    expected = np.where(i % 2 == 0, (i + 100) * 1000 + i, i * 1000 + i + 100)
    same(evaluate(body, ["u32"], "u32", i), expected)


@pytest.mark.parametrize(
    ("name", "given", "after"),
    [
        ("add.u32", [1, 2, 3], 10 + 6), ("min.s32", [7, -2, 12], -2), ("max.u32", [7, 20, 12], 20),
        ("and.b32", [6, 14, 15], 2), ("or.b32", [1, 4, 0], 15), ("xor.b32", [1, 2, 8], 1),
        ("exch.b32", [5, 6, 7], 7), ("inc.u32", [20, 11, 0], 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("space", ["global", "shared", ""])
def test_atomics_take_turns(name, given, after, space):
    """Three lanes change a word that holds 10; all of them load the result."""
    where = {"global": "%rd0", "shared": "where", "": "%rd0"}[space]
    dot = f".{space}" if space else ""
    body = """.shared .align 4 .b8 word[4]; .reg .b64 where; mov.u64 where, word;
        setp.eq.s32 %p1, %t0, 0; @%p1 st.shared.u32 [where], 10; bar.sync 0;"""
    body += f"atom{dot}.{name} d, [{where}], a1; bar.sync 0; ld{dot}.u32 d, [{where}];"
    got = evaluate(body, ["u32", "u32"], "u32", [10, 10, 10], given)
    same(got, [after] * 3)


def test_compare_and_swap_and_reductions():
    body = """membar.gl; bar.sync 0; fence.acq_rel.gpu; prefetch.global.L2 [%rd0];
        .reg .b32 next; add.s32 next, %t0, 1; atom.global.cas.b32 d, [%rd0], %t0, next;"""
    same(evaluate(body, ["u32"], "u32", [0, 0, 0, 0]), [0, 1, 2, 3])
    body = "bar.sync 0; red.global.add.f32 [%rd0], 0f3F800000; bar.sync 0; ld.global.f32 d, [%rd0];"
    same(evaluate(body, ["f32"], "f32", [2.0, 0, 0]), [5.0, 5.0, 5.0])
    body = (
        "bar.sync 0; red.relaxed.gpu.global.add.u64 [%rd0], 3; bar.sync 0; ld.global.u64 d, [%rd0];"
    )
    same(evaluate(body, ["u64"], "u64", [2, 0, 0]), [11, 11, 11])
