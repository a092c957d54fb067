"""Loads, stores, atomics and addresses in every state space, and accesses that a device would refuse."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cutlass_kernels.emulator import Device, MemoryFault, Options
from tests.cutlass_kernels.emulator.harness import HEADER, Array, compute, kernel, launch, samples

SHARED = ".shared .align 16 .b8 tile[4096];"
LANE = "mov.u32 %r0, %tid.x;"


def copied(body: str, source: Array, *, shared: str = "", bytes_out: int | None = None, threads: int = 32) -> Array:
    """The target of a kernel with parameters (source, target) after a run, which must be clean."""
    device = Device("sm_90a")
    given, out = device.array(source), device.empty(bytes_out or source.nbytes)
    report = launch(kernel(body, 2, shared=shared), [given.pointer, out.pointer], device=device, block=(threads, 1, 1))
    assert report.hazards == ()
    return out.numpy()


def test_vectors_keep_their_order() -> None:
    source = samples("u32", 128)
    body = f"""{LANE} ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1];
        mad.wide.u32 %d0, %r0, 16, %d0; mad.wide.u32 %d1, %r0, 16, %d1;
        ld.global.nc.v4.b32 {{%r1, %r2, %r3, %r4}}, [%d0]; st.global.v2.b32 [%d1+8], {{%r1, %r2}};
        st.global.v2.b32 [%d1], {{%r3, %r4}};"""
    found = copied(body, source).view(np.uint32).reshape(32, 4)
    np.testing.assert_array_equal(found, source.reshape(32, 4)[:, [2, 3, 0, 1]])


def test_narrow_loads_extend() -> None:
    source = samples("u8", 64)
    body = f"""{LANE} ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1]; cvt.u64.u32 %d2, %r0;
        add.s64 %d0, %d0, %d2; mad.wide.u32 %d1, %r0, 8, %d1;
        ld.global.s8 %r1, [%d0]; ld.global.u8 %r2, [%d0+32]; st.global.v2.u32 [%d1], {{%r1, %r2}};"""
    found = copied(body, source, bytes_out=256).view(np.uint32).reshape(32, 2)
    np.testing.assert_array_equal(found[:, 0].view(np.int32), source[:32].view(np.int8))
    np.testing.assert_array_equal(found[:, 1], source[32:])


def test_shared_local_and_generic_addresses() -> None:
    """Through shared memory by its window and by a generic address, then through a local array."""
    source = samples("u32", 32)
    body = f""".local .align 8 .b8 frame[16]; {LANE} ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1];
        mad.wide.u32 %d0, %r0, 4, %d0; mad.wide.u32 %d1, %r0, 4, %d1; shl.b32 %r1, %r0, 2;
        ld.global.u32 %r2, [%d0]; mov.u32 %r3, tile; add.u32 %r3, %r3, %r1; st.shared.u32 [%r3], %r2;
        mov.u64 %d2, tile; cvta.shared.u64 %d3, %d2; cvt.u64.u32 %d4, %r1; add.s64 %d3, %d3, %d4; ld.u32 %r4, [%d3];
        isspacep.shared %p1, %d3; isspacep.global %p2, %d3; @!%p1 trap; @%p2 trap;
        cvta.to.shared.u64 %d5, %d3; ld.shared.u32 %r5, [%d5]; setp.ne.u32 %p3, %r4, %r5; @%p3 trap;
        st.local.u32 [frame+4], %r4; mov.u64 %d6, frame; cvta.local.u64 %d7, %d6; ld.u32 %r6, [%d7+4];
        cvta.to.global.u64 %d1, %d1; st.global.u32 [%d1], %r6;"""
    np.testing.assert_array_equal(copied(body, source, shared=SHARED).view(np.uint32), source)


def test_parameters_of_every_size() -> None:
    text = f"""{HEADER}
.visible .entry k(.param .u8 a, .param .align 16 .b8 b[20], .param .u16 c, .param .f32 d, .param .u64 e)
{{ .reg .b32 %r<8>; .reg .b64 %d<4>; .reg .f32 %f<2>;
ld.param.u64 %d0, [e]; ld.param.u8 %r0, [a]; ld.param.v2.u32 {{%r1, %r2}}, [b+8]; ld.param.u16 %r3, [c];
ld.param.f32 %f0, [d]; st.global.v2.u32 [%d0], {{%r0, %r1}}; st.global.v2.u32 [%d0+8], {{%r2, %r3}};
mov.u64 %d1, b; cvta.param.u64 %d2, %d1; ld.u32 %r4, [%d2+16]; st.global.u32 [%d0+16], %r4;
st.global.f32 [%d0+20], %f0; ret; }}"""
    device = Device()
    out = device.zeros(6, np.uint32)
    block = bytearray(56)
    block[0], block[16:36] = 200, bytes(range(100, 120))
    block[36:38], block[40:44] = (513).to_bytes(2, "little"), np.float32(1.5).tobytes()
    block[48:56] = out.pointer.to_bytes(8, "little")
    device.load_ptx(text)
    device.launch("k", (1, 1, 1), (32, 1, 1), bytes(block))
    octets = np.frombuffer(bytes(range(100, 120)), np.uint32)
    assert out.numpy().tolist() == [200, octets[2], octets[3], 513, octets[4], np.float32(1.5).view(np.uint32)]


def test_global_variables_are_initialised() -> None:
    variable = ".global .align 4 .b32 table[4] = {1, -2, 0x30, 4};\n.const .align 4 .f32 half = 0f3F000000;"
    body = """ld.param.u64 %d0, [p0]; ld.global.v2.u32 {%r1, %r2}, [table+8]; ld.const.u32 %r3, [half];
        ldu.global.u32 %r4, [table+4]; st.global.v4.u32 [%d0], {%r1, %r2, %r3, %r4};"""
    device = Device()
    out = device.empty(4, np.uint32)
    launch(kernel(body, 1, shared=variable), [out.pointer], device=device)
    assert out.numpy().tolist() == [0x30, 4, 0x3F000000, 0xFFFFFFFE]


UPDATES: list[tuple[str, Callable[[int, int], int]]] = [
    ("atom.global.add.u32 %r3, [%d0], %r2;", lambda old, x: (old + x) % 2**32),
    ("atom.global.min.s32 %r3, [%d0], %r2;", lambda old, x: min(old, x, key=lambda v: v - (v >> 31 << 32))),
    ("atom.global.max.u32 %r3, [%d0], %r2;", max),
    ("atom.global.and.b32 %r3, [%d0], %r2;", lambda old, x: old & x),
    ("atom.global.or.b32 %r3, [%d0], %r2;", lambda old, x: old | x),
    ("atom.global.xor.b32 %r3, [%d0], %r2;", lambda old, x: old ^ x),
    ("atom.global.exch.b32 %r3, [%d0], %r2;", lambda old, x: x),
    ("atom.global.inc.u32 %r3, [%d0], %r2;", lambda old, x: 0 if old >= x else old + 1),
    ("atom.global.dec.u32 %r3, [%d0], %r2;", lambda old, x: x if old == 0 or old > x else old - 1),
    ("atom.acq_rel.gpu.global.cas.b32 %r3, [%d0], %r4, %r2;", lambda old, x: x if old == 7 else old),
]


@pytest.mark.parametrize(("snippet", "update"), UPDATES, ids=[case[0] for case in UPDATES])
def test_atomics_follow_the_order_of_lanes(snippet: str, update: Callable[[int, int], int]) -> None:
    device = Device()
    values = samples("u32", 64)
    target, given, old = device.array(np.array([7], np.uint32)), device.array(values), device.empty(64, np.uint32)
    body = f"""{LANE} ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1]; ld.param.u64 %d2, [p2];
        mad.wide.u32 %d1, %r0, 4, %d1; mad.wide.u32 %d2, %r0, 4, %d2; ld.global.u32 %r2, [%d1]; mov.u32 %r4, 7;
        {snippet} st.global.u32 [%d2], %r3;"""
    launch(kernel(body, 3), [target.pointer, given.pointer, old.pointer], device=device, block=(64, 1, 1))
    state, seen = 7, []
    for value in values.tolist():
        seen.append(state)
        state = update(state, value)
    assert target.numpy()[0] == state
    assert old.numpy().tolist() == seen


def test_reductions_in_floats_and_halves() -> None:
    device = Device()
    single, pair = device.array(np.zeros(1, np.float32)), device.array(np.zeros(1, np.uint32))
    body = """ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1]; mov.f32 %f0, 0f3FC00000; mov.u32 %r1, 0x40003C00;
        red.global.add.f32 [%d0], %f0; red.relaxed.gpu.global.add.noftz.f16x2 [%d1], %r1;"""
    launch(kernel(body, 2), [single.pointer, pair.pointer], device=device, block=(64, 1, 1))
    assert single.numpy()[0] == 96
    assert pair.numpy().view(np.float16).tolist() == [64, 128]


def test_atomics_in_shared_memory() -> None:
    body = f"""{LANE} setp.eq.u32 %p1, %r0, 0; mov.u32 %r5, 0; @%p1 st.shared.u32 [tile], %r5; bar.sync 0;
        atom.shared.add.u32 %r2, [tile], 1; bar.sync 0; ld.shared.u32 %r3, [tile];
        ld.param.u64 %d1, [p1]; mad.wide.u32 %d1, %r0, 4, %d1; st.global.u32 [%d1], %r3;"""
    found = copied(body, np.zeros(4, np.uint8), shared=SHARED, bytes_out=512, threads=128).view(np.uint32)
    assert (found == 128).all()


def test_hints_change_nothing() -> None:
    snippet = """ld.param.u64 %d5, [p0]; prefetch.global.L2 [%d5];
        createpolicy.fractional.L2::evict_first.b64 %d6, 0f3F800000;
        membar.gl; fence.acq_rel.gpu; nanosleep.u32 20; add.u32 %o0, %i0, 1;"""
    values = samples("u32", 32)
    (found,) = compute(snippet, [("u32", values)], ["u32"])
    np.testing.assert_array_equal(found, values + np.uint32(1))


def test_special_registers() -> None:
    body = """mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ctaid.y;
        mov.u32 %r4, %laneid;
        mov.u32 %r5, %ntid.x; mov.u32 %r6, %nctaid.y; mov.u32 %r7, %warpid; mov.u32 %r9, %lanemask_lt;
        mad.lo.u32 %r8, %r1, %r5, %r0; mad.lo.u32 %r8, %r3, 128, %r8; mad.lo.u32 %r8, %r2, 64, %r8;
        ld.param.u64 %d0, [p0]; mad.wide.u32 %d0, %r8, 32, %d0;
        st.global.v4.u32 [%d0], {%r0, %r1, %r2, %r3}; st.global.v4.u32 [%d0+16], {%r4, %r6, %r7, %r9};"""
    device = Device()
    out = device.empty((384, 8), np.uint32)
    launch(kernel(body, 1), [out.pointer], device=device, grid=(2, 3, 1), block=(16, 4, 1))
    for number, row in enumerate(out.numpy().tolist()):
        cta, thread = divmod(number, 64)
        lane = thread % 32
        place = [thread % 16, thread // 16, cta % 2, cta // 2]
        assert row == [*place, lane, 3, thread // 32, (1 << lane) - 1]


# Accesses that fail


FAULTS = [
    ("add.s64 %d0, %d0, 4096; ld.global.u32 %r1, [%d0];", "outside every allocation"),
    ("add.s64 %d0, %d0, -4; st.global.u32 [%d0], %r0;", "outside every allocation"),
    ("add.s64 %d0, %d0, 2; ld.global.u32 %r1, [%d0];", "alignment"),
    ("add.s64 %d0, %d0, 8; ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d0];", "alignment"),
    ("mov.u32 %r1, tile; ld.shared.u32 %r2, [%r1+4096];", "of which a CTA has 4096"),
    ("mov.u32 %r1, tile; st.shared.v4.u32 [%r1+4088], {%r0, %r0, %r0, %r0};", "of which a CTA has 4096|alignment"),
    ("mov.u64 %d5, 12345; ld.u32 %r2, [%d5];", "outside every allocation|alignment"),
    ("add.s64 %d0, %d0, 60; atom.global.add.u64 %d1, [%d0], 1;", "alignment"),
    ("mov.u32 %r1, tile; mov.u64 %d5, 0; cp.async.ca.shared.global [%r1], [%d5], 4;", "outside every allocation"),
]


@pytest.mark.parametrize(("snippet", "message"), FAULTS, ids=[case[0] for case in FAULTS])
def test_faults_name_the_access(snippet: str, message: str) -> None:
    device = Device()
    memory = device.zeros(64)
    with pytest.raises(MemoryFault, match=message) as caught:
        launch(kernel(f"{LANE} ld.param.u64 %d0, [p0]; {snippet}", 1, shared=SHARED), [memory.pointer], device=device)
    assert caught.value.line is not None
    assert any(word in caught.value.text for word in ("ld.", "st.", "atom.", "cp.async"))


def test_one_stray_thread_is_named() -> None:
    device = Device()
    memory = device.zeros(4 * 95)
    body = f"""{LANE} mov.u32 %r1, %ctaid.x; mad.lo.u32 %r2, %r1, 32, %r0; ld.param.u64 %d0, [p0];
        mad.wide.u32 %d0, %r2, 4, %d0; st.global.u32 [%d0], %r2;"""
    with pytest.raises(MemoryFault, match=r"thread \(31, 0, 0\) of CTA \(2, 0, 0\) and 0 other threads"):
        launch(kernel(body, 1), [memory.pointer], device=device, grid=(3, 1, 1))


UNWRITTEN = f"""{LANE} ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1]; mad.wide.u32 %d2, %r0, 4, %d0;
    mad.wide.u32 %d3, %r0, 4, %d1; mov.u32 %r9, tile; mad.lo.u32 %r8, %r0, 4, %r9; setp.lt.u32 %p1, %r0, 16;
    ld.global.u32 %r1, [%d2]; mul.lo.u32 %r2, %r1, 3; mov.u32 %r5, 31;"""
#: A use of %r2, whose lanes from 16 on nobody wrote, and how many lanes that concerns.
USES = [
    ("", 0),
    ("st.global.u32 [%d3], %r2;", 16),
    ("@%p1 st.global.u32 [%d3], %r2;", 0),
    ("selp.u32 %r3, %r2, 7, %p1; st.global.u32 [%d3], %r3;", 0),
    ("selp.u32 %r3, 7, %r2, %p1; st.global.u32 [%d3], %r3;", 16),
    ("mov.u32 %r2, 4; st.global.u32 [%d3], %r2;", 0),
    ("setp.eq.u32 %p2, %r2, 0; @%p2 st.global.u32 [%d3], %r0;", 16),
    ("and.b32 %r3, %r2, 0; add.u32 %r3, %r3, %r9; ld.shared.u32 %r4, [%r3];", 16),
    ("st.shared.u32 [%r8], %r2; ld.shared.u32 %r3, [%r8]; st.global.u32 [%d3], %r3;", 16),
    ("st.shared.u32 [%r8], %r2; @%p1 ld.shared.u32 %r3, [%r8]; @%p1 st.global.u32 [%d3], %r3;", 0),
    ("shfl.sync.bfly.b32 %r3, %r2, 16, 31, -1; @!%p1 st.global.u32 [%d3], %r3;", 0),
    ("shfl.sync.idx.b32 %r3, %r2, 20, 31, -1; st.global.u32 [%d3], %r3;", 32),
    ("redux.sync.add.u32 %r3, %r2, -1;", 16),
    ("red.global.add.u32 [%d1], %r2;", 16),
]


@pytest.mark.parametrize(("use", "lanes"), USES, ids=[use for use, _ in USES])
def test_what_nobody_wrote_is_a_hazard_where_it_matters(use: str, lanes: int) -> None:
    device = Device()
    source, target = device.empty(32, np.uint32), device.zeros(32, np.uint32)
    device.heap.memory.write_bytes(device.heap.offset(source.pointer), np.zeros(64, np.uint8))
    pointers = [source.pointer, target.pointer]
    found = launch(kernel(f"{UNWRITTEN} {use}", 2, shared=SHARED), pointers, device=device).hazards
    assert [(hazard.kind, hazard.count) for hazard in found] == ([("uninitialised", lanes)] if lanes else [])
    source.fill(0)
    assert launch(kernel(f"{UNWRITTEN} {use}", 2, shared=SHARED), pointers, device=device).hazards == ()


def test_counters_of_memory() -> None:
    """A warp reads 128 bytes in a row (4 sectors), then with a stride (32); shared memory with and without
    conflicts."""
    device = Device()
    memory = device.zeros(32 * 128)
    body = f"""{LANE} ld.param.u64 %d0, [p0]; mad.wide.u32 %d1, %r0, 4, %d0; mad.wide.u32 %d2, %r0, 128, %d0;
        ld.global.u32 %r1, [%d1]; st.global.u32 [%d2], %r1; mov.u32 %r4, tile;
        mad.lo.u32 %r5, %r0, 4, %r4; st.shared.u32 [%r5], %r0; mad.lo.u32 %r5, %r0, 128, %r4; st.shared.u32 [%r5], %r0;
        mad.lo.u32 %r5, %r0, 16, %r4; st.shared.v4.u32 [%r5], {{%r0, %r0, %r0, %r0}}; ld.shared.u32 %r6, [tile];"""
    counters = launch(kernel(body, 1, shared=SHARED), [memory.pointer], device=device).counters
    assert (counters.global_sectors_read, counters.global_bytes_read) == (4, 128)
    assert (counters.global_sectors_written, counters.global_bytes_written) == (32, 128)
    # In a row 1 pass; 128 bytes apart 32; 16 bytes a lane 4; one word for all 1.
    assert (counters.shared_wavefronts, counters.shared_ideal) == (1 + 32 + 4 + 1, 1 + 1 + 4 + 1)
    assert counters.bank_conflicts == 31
    assert counters.instructions["memory"] == 7
    quiet = Device(options=Options(counters=False))
    memory = quiet.zeros(32 * 128)
    assert launch(kernel(body, 1, shared=SHARED), [memory.pointer], device=quiet).counters.global_bytes_read == 0
