"""cp.async, bulk and tensor copies, mbarriers: what arrives where, under every landing."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from cutlass_kernels.emulator import BarrierFault, Device, Landing, LaunchError, MemoryFault, Options
from cutlass_kernels.emulator.machine.tensormap import TensorMap
from tests.cutlass_kernels.emulator.harness import Array, kernel, launch, samples

LANDINGS: tuple[Landing, ...] = get_args(Landing)
every_landing = pytest.mark.parametrize("landing", LANDINGS)
SHARED = ".shared .align 1024 .b8 tile[16384];\n.shared .align 8 .b64 full[4];"
START = """mov.u32 %r0, %tid.x; mov.u32 %r1, tile; mov.u32 %r2, full; setp.eq.u32 %p1, %r0, 0;
    ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1];"""
WAIT = "{ .reg .pred done; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%r2], 0; @!done bra AGAIN; }"
BF16_KIND, F32_KIND = 9, 7


@every_landing
@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_copies_and_fills(size: int, landing: Landing) -> None:
    """Lane n copies n % (size + 1) bytes and fills the rest with zeros."""
    source = samples("u8", 32 * size)
    form = "cg" if size == 16 else "ca"
    body = f"""{START} mad.wide.u32 %d2, %r0, {size}, %d0; mad.lo.u32 %r3, %r0, {size}, %r1;
        rem.u32 %r4, %r0, {size + 1};
        cp.async.{form}.shared.global [%r3], [%d2], {size}, %r4; cp.async.commit_group; cp.async.wait_group 0;
        mad.wide.u32 %d3, %r0, {size}, %d1;
        {" ".join(f"ld.shared.u32 %r5, [%r3+{n}]; st.global.u32 [%d3+{n}], %r5;" for n in range(0, size, 4))}"""
    device = Device(options=Options(landing=landing))
    given, out = device.array(source), device.empty((32, size))
    report = launch(kernel(body, 2, shared=SHARED), [given.pointer, out.pointer], device=device)
    wanted = source.reshape(32, size).copy()
    wanted[np.arange(size) >= (np.arange(32) % (size + 1))[:, None]] = 0
    np.testing.assert_array_equal(out.numpy(), wanted)
    assert report.hazards == ()


def test_cp_async_ignores_its_source_by_predicate() -> None:
    body = f"""{START} mad.lo.u32 %r3, %r0, 4, %r1; and.b32 %r4, %r0, 1; setp.eq.u32 %p2, %r4, 1;
        cp.async.ca.shared.global [%r3], [%d0], 4, %p2; cp.async.wait_all;
        ld.shared.u32 %r5, [%r3]; mad.wide.u32 %d3, %r0, 4, %d1; st.global.u32 [%d3], %r5;"""
    device = Device()
    given, out = device.array(np.array([9], np.uint32)), device.empty(32, np.uint32)
    launch(kernel(body, 2, shared=SHARED), [given.pointer, out.pointer], device=device)
    np.testing.assert_array_equal(out.numpy(), np.where(np.arange(32) % 2, 0, 9))


def test_late_copies_read_their_source_at_the_wait() -> None:
    """The source changes between issue and wait: "early" sees the old value, "late" the new one."""
    body = f"""{START} cp.async.ca.shared.global [%r1], [%d0], 4; cp.async.commit_group;
        mov.u32 %r4, 77; st.global.u32 [%d0], %r4; cp.async.wait_group 0;
        ld.shared.u32 %r5, [%r1]; st.global.u32 [%d1], %r5;"""
    seen = {}
    for landing in ("early", "late"):
        device = Device(options=Options(landing=landing))
        given, out = device.array(np.array([5], np.uint32)), device.empty(1, np.uint32)
        launch(
            kernel(body.replace("cp.async.ca", "@%p1 cp.async.ca"), 2, shared=SHARED),
            [given.pointer, out.pointer],
            device=device,
        )
        seen[landing] = int(out.numpy()[0])
    assert seen == {"early": 5, "late": 77}


def test_wait_group_leaves_the_youngest_groups_in_flight() -> None:
    body = f"""{START} mad.lo.u32 %r3, %r0, 4, %r1; mad.wide.u32 %d2, %r0, 4, %d0;
        cp.async.ca.shared.global [%r3], [%d2], 4; cp.async.commit_group;
        cp.async.ca.shared.global [%r3+128], [%d2+128], 4; cp.async.commit_group;
        cp.async.wait_group 1; ld.shared.u32 %r5, [%r3]; mad.wide.u32 %d3, %r0, 4, %d1; st.global.u32 [%d3], %r5;
        cp.async.wait_group 0; ld.shared.u32 %r5, [%r3+128]; st.global.u32 [%d3+128], %r5;"""
    source = samples("u32", 64)
    device = Device()
    given, out = device.array(source), device.empty(64, np.uint32)
    text = kernel(body, 2, shared=SHARED)
    assert launch(text, [given.pointer, out.pointer], device=device).hazards == ()
    np.testing.assert_array_equal(out.numpy(), source)
    premature = text.replace("ld.shared.u32 %r5, [%r3];", "ld.shared.u32 %r5, [%r3+128];", 1)
    kinds = {hazard.kind for hazard in launch(premature, [given.pointer, out.pointer], device=device).hazards}
    assert kinds == {"in flight", "uninitialised"}


@every_landing
@pytest.mark.parametrize("form", ["cp.async.mbarrier.arrive.noinc.shared.b64", "cp.async.mbarrier.arrive.shared.b64"])
def test_copies_that_arrive_on_an_mbarrier(form: str, landing: Landing) -> None:
    """64 threads copy and arrive; a last arrival of every thread completes the phase of the form without .noinc."""
    noinc = "noinc" in form
    body = f"""{START} @%p1 mbarrier.init.shared::cta.b64 [%r2], 64; bar.sync 0;
        mad.lo.u32 %r3, %r0, 4, %r1; mad.wide.u32 %d2, %r0, 4, %d0; cp.async.ca.shared.global [%r3], [%d2], 4;
        {form} [%r2]; {"" if noinc else "mbarrier.arrive.shared::cta.b64 _, [%r2];"} {WAIT}
        xor.b32 %r4, %r0, 33; mad.lo.u32 %r4, %r4, 4, %r1; ld.shared.u32 %r5, [%r4];
        mad.wide.u32 %d3, %r0, 4, %d1; st.global.u32 [%d3], %r5;"""
    source = samples("u32", 64)
    device = Device(options=Options(landing=landing))
    given, out = device.array(source), device.empty(64, np.uint32)
    text = kernel(body, 2, shared=SHARED)
    report = launch(text, [given.pointer, out.pointer], device=device, block=(64, 1, 1))
    np.testing.assert_array_equal(out.numpy(), source[np.arange(64) ^ 33])
    assert report.hazards == ()


@every_landing
@pytest.mark.parametrize(("fence", "kinds"), [("fence.proxy.async.shared::cta;", set()), ("", {"proxy"})])
@pytest.mark.parametrize("wait", ["cp.async.wait_all;", "mbarrier"])
def test_cp_async_writes_through_the_generic_proxy(fence: str, kinds: set[str], wait: str, landing: Landing) -> None:
    """The asynchronous one reads what was copied only behind a fence, also one of who waits on an mbarrier for it."""
    wait = f"cp.async.mbarrier.arrive.noinc.shared.b64 [%r2]; {WAIT}" if wait == "mbarrier" else wait
    body = f"""{START} @%p1 mbarrier.init.shared::cta.b64 [%r2], 64; bar.sync 0;
        mad.lo.u32 %r3, %r0, 4, %r1; mad.wide.u32 %d2, %r0, 4, %d0; cp.async.ca.shared.global [%r3], [%d2], 4;
        {wait} {fence} bar.sync 0; @%p1 cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r1], 256;
        cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;"""
    source = samples("u32", 64)
    device = Device("sm_90a", Options(landing=landing))
    given, out = device.array(source), device.empty(64, np.uint32)
    report = launch(kernel(body, 2, shared=SHARED), [given.pointer, out.pointer], device=device, block=(64, 1, 1))
    np.testing.assert_array_equal(out.numpy(), source)
    assert {hazard.kind for hazard in report.hazards} == kinds


@every_landing
def test_bulk_copies(landing: Landing) -> None:
    """In by cp.async.bulk on an mbarrier, changed, out by a bulk group."""
    source = samples("u32", 256)
    body = f"""{START} @%p1 mbarrier.init.shared::cta.b64 [%r2], 1; bar.sync 0;
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 1024;
        @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d0], 1024, [%r2];
        {WAIT} mad.lo.u32 %r3, %r0, 4, %r1; ld.shared.u32 %r4, [%r3]; add.u32 %r4, %r4, 1; st.shared.u32 [%r3], %r4;
        fence.proxy.async.shared::cta; bar.sync 0;
        @%p1 cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r1], 1024; cp.async.bulk.commit_group;
        cp.async.bulk.wait_group.read 0;"""
    device = Device("sm_90a", Options(landing=landing))
    given, out = device.array(source), device.empty(256, np.uint32)
    text = kernel(body, 2, shared=SHARED)
    report = launch(text, [given.pointer, out.pointer], device=device, block=(256, 1, 1))
    np.testing.assert_array_equal(out.numpy(), source + np.uint32(1))
    assert report.hazards == ()
    assert report.counters.async_bytes == 2048


def tensor_map(device: Device, values: Array, pointer: int, box: tuple[int, ...], swizzle: int, kind: int) -> int:
    """The address of a tensor map over a C-contiguous array in device memory."""
    sizes, strides = tuple(reversed(values.shape)), tuple(reversed(values.strides[:-1]))
    made = TensorMap(kind, pointer, sizes, strides, box, (1,) * len(box), swizzle)
    made.check()
    return device.array(np.frombuffer(made.encode(), np.uint8)).pointer


def swizzled_rows(tile: Array, swizzle: int) -> Array:
    """Rows of bytes as TMA lays them out: chunk c of row r lies at c ^ (r * row bytes / 128 % 2^swizzle)."""
    rows = np.ascontiguousarray(tile).view(np.uint8)
    out = np.empty_like(rows)
    for row in range(rows.shape[0]):
        for chunk in range(rows.shape[1] // 16):
            moved = chunk ^ (row * rows.shape[1] // 128 % (1 << swizzle)) if swizzle else chunk
            out[row, 16 * moved : 16 * moved + 16] = rows[row, 16 * chunk : 16 * chunk + 16]
    return out


@every_landing
@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("corner", [(0, 0), (-3, 5), (70, 28)])
def test_tensor_copies(corner: tuple[int, int], swizzle: int, landing: Landing) -> None:
    """A box of a matrix comes in swizzled, zero outside; it goes out again to the same place of another matrix."""
    width = 16 << swizzle if swizzle else 128
    columns, rows = width // 2, 16
    source = samples("bf16", 40 * 96).reshape(40, 96)
    body = f"""{START} ld.param.u64 %d2, [p2]; @%p1 mbarrier.init.shared::cta.b64 [%r2], 1; bar.sync 0;
        mov.b32 %r10, {corner[0]}; mov.b32 %r11, {corner[1]};
        @%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r2], {width * rows};
        @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
            [%r1], [%d0, {{%r10, %r11}}], [%r2];
        @%p1 mbarrier.arrive.shared::cta.b64 _, [%r2]; {WAIT}
        setp.lt.u32 %p2, %r0, {width * rows // 16}; mad.lo.u32 %r3, %r0, 16, %r1; mad.wide.u32 %d3, %r0, 16, %d2;
        @%p2 ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r3]; @%p2 st.global.v4.u32 [%d3], {{%r4, %r5, %r6, %r7}};
        bar.sync 0; @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d1, {{%r10, %r11}}], [%r1];
        @%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 0;"""
    device = Device("sm_90a", Options(landing=landing))
    given, out = device.array(source), device.zeros(source.shape, np.uint16)
    raw = device.empty((rows, width))
    maps = [tensor_map(device, source, array.pointer, (columns, rows), swizzle, BF16_KIND) for array in (given, out)]
    text = kernel(body, 3, shared=SHARED)
    report = launch(text, [*maps, raw.pointer], device=device, block=(256, 1, 1))
    assert report.hazards == ()
    x, y = corner
    padded = np.zeros((200, 200), np.uint16)
    padded[50:90, 50:146] = source
    tile = padded[50 + y : 50 + y + rows, 50 + x : 50 + x + columns]
    np.testing.assert_array_equal(raw.numpy(), swizzled_rows(tile, swizzle))
    inside = np.zeros((200, 200), np.bool_)
    inside[50 + y : 50 + y + rows, 50 + x : 50 + x + columns] = True
    np.testing.assert_array_equal(out.numpy(), np.where(inside[50:90, 50:146], source, 0))


def test_a_third_dimension_selects_a_matrix() -> None:
    source = samples("f32", 3 * 8 * 32).reshape(3, 8, 32)
    body = f"""{START} @%p1 mbarrier.init.shared::cta.b64 [%r2], 1; bar.sync 0; mov.u32 %r10, 0; mov.u32 %r11, 2;
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 1024;
        @%p1 cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint
            [%r1], [%d0, {{%r10, %r10, %r11}}], [%r2], %d5;
        {WAIT} mad.lo.u32 %r3, %r0, 4, %r1; ld.shared.u32 %r4, [%r3]; mad.wide.u32 %d3, %r0, 4, %d1;
        st.global.u32 [%d3], %r4;"""
    device = Device("sm_90a")
    given, out = device.array(source), device.empty(256, np.float32)
    text = kernel(body, 2, shared=SHARED)
    box = tensor_map(device, source, given.pointer, (32, 8, 1), 0, F32_KIND)
    launch(text, [box, out.pointer], device=device, block=(256, 1, 1))
    np.testing.assert_array_equal(out.numpy().view(np.uint32), source[2].ravel().view(np.uint32))


@every_landing
def test_multicast_reaches_every_cta_of_a_cluster(landing: Landing) -> None:
    """CTA 1 sends to both; each waits on its own mbarrier, and then tells the other over its mbarrier that it read."""
    source = samples("u32", 64)
    body = f"""{START} mov.u32 %r10, %cluster_ctarank; mov.u32 %r11, %ctaid.x;
        @%p1 mbarrier.init.shared::cta.b64 [%r2], 1; @%p1 mbarrier.init.shared::cta.b64 [%r2+8], 64;
        fence.mbarrier_init.release.cluster; barrier.cluster.arrive.release.aligned;
        barrier.cluster.wait.acquire.aligned;
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 256;
        setp.eq.and.u32 %p2, %r10, 1, %p1; mov.u16 %h1, 3;
        @%p2 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
            [%r1], [%d0], 256, [%r2], %h1;
        {WAIT} mad.lo.u32 %r3, %r0, 4, %r1; ld.shared.u32 %r4, [%r3]; add.u32 %r4, %r4, %r10;
        mad.lo.u32 %r5, %r11, 64, %r0; mad.wide.u32 %d3, %r5, 4, %d1; st.global.u32 [%d3], %r4;
        xor.b32 %r6, %r10, 1; add.u32 %r7, %r2, 8; mapa.shared::cluster.u32 %r8, %r7, %r6;
        mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r8];
        {{ .reg .pred done; AGAIN: mbarrier.test_wait.parity.shared::cta.b64 done, [%r7], 0; @!done bra AGAIN; }}
        mapa.shared::cluster.u32 %r8, %r3, %r6; ld.shared::cluster.u32 %r9, [%r8];
        getctarank.shared::cluster.u32 %r12, %r8; setp.ne.u32 %p4, %r12, %r6; @%p4 trap;
        st.global.u32 [%d3+1024], %r9; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"""
    device = Device("sm_90a", Options(landing=landing))
    given, out = device.array(source), device.zeros(512, np.uint32)
    text = kernel(body, 2, shared=SHARED)
    pointers = [given.pointer, out.pointer]
    report = launch(text, pointers, device=device, grid=(4, 1, 1), block=(64, 1, 1), cluster=(2, 1, 1))
    assert report.hazards == ()
    first, second = out.numpy()[:256].reshape(4, 64), out.numpy()[256:].reshape(4, 64)
    np.testing.assert_array_equal(first, source + (np.arange(4, dtype=np.uint32) % 2)[:, None])
    np.testing.assert_array_equal(second, np.tile(source, (4, 1)))


def test_phases_alternate() -> None:
    """Two threads of different warps hand a counter back and forth over two mbarriers."""
    body = f"""{START} @%p1 mbarrier.init.shared.b64 [%r2], 1; @%p1 mbarrier.init.shared.b64 [%r2+8], 1;
        mov.u32 %r8, 0; @%p1 st.shared.u32 [%r1], %r8; bar.sync 0; and.b32 %r3, %r0, 31; setp.ne.u32 %p3, %r3, 0;
        @%p3 bra END; mov.u32 %r4, 0; setp.ne.u32 %p2, %r0, 0; add.u32 %r10, %r2, 8; selp.u32 %r11, %r10, %r2, %p2;
        selp.u32 %r12, %r2, %r10, %p2; @%p2 bra WAITS;
        LOOP: ld.shared.u32 %r5, [%r1]; add.u32 %r5, %r5, 1; st.shared.u32 [%r1], %r5;
        mbarrier.arrive.shared.b64 %d7, [%r12];
        WAITS: and.b32 %r6, %r4, 1;
        SPIN: mbarrier.try_wait.parity.shared.b64 %p4, [%r11], %r6; @!%p4 bra SPIN;
        add.u32 %r4, %r4, 1; setp.lt.u32 %p5, %r4, 5; @%p5 bra LOOP;
        @!%p2 bra DONE; ld.shared.u32 %r5, [%r1]; st.global.u32 [%d0], %r5; mbarrier.arrive.shared.b64 %d7, [%r12];
        DONE: END: bar.sync 0; @%p1 mbarrier.inval.shared.b64 [%r2];"""
    device = Device("sm_90a")
    out = device.empty(1, np.uint32)
    report = launch(kernel(body, 2, shared=SHARED), [out.pointer, 0], device=device, block=(64, 1, 1))
    assert out.numpy()[0] == 9
    assert report.hazards == ()


def test_misuse_of_mbarriers() -> None:
    never = f"{START} mbarrier.arrive.shared.b64 %d7, [%r2];"
    with pytest.raises(BarrierFault, match="no mbarrier was initialised"):
        launch(kernel(never, 2, shared=SHARED), [0, 0], device=Device("sm_90a"))
    often = f"{START} @%p1 mbarrier.init.shared.b64 [%r2], 3; bar.sync 0; mbarrier.arrive.shared.b64 %d7, [%r2];"
    with pytest.raises(BarrierFault, match="more than 3 arrivals"):
        launch(kernel(often, 2, shared=SHARED), [0, 0], device=Device("sm_90a"))


RULES = [
    (TensorMap(BF16_KIND, 8, (64,), (), (64,), (1,), 0), "address"),
    (TensorMap(BF16_KIND, 0, (64, 4), (130,), (64, 4), (1, 1), 0), "strides"),
    (TensorMap(BF16_KIND, 0, (512,), (), (512,), (1,), 0), "box"),
    (TensorMap(BF16_KIND, 0, (64,), (), (7,), (1,), 0), "inner box"),
    (TensorMap(BF16_KIND, 0, (128,), (), (128,), (1,), 3), "wider than the swizzle"),
    (TensorMap(BF16_KIND, 0, (64,), (), (64,), (2,), 0), "element strides"),
]


@pytest.mark.parametrize(("made", "message"), RULES, ids=[message for _, message in RULES])
def test_tensor_maps_that_the_driver_refuses(made: TensorMap, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        made.check()


def test_tensor_map_round_trip() -> None:
    made = TensorMap(F32_KIND, 4096, (64, 8, 2), (256, 2048), (32, 8, 1), (1, 1, 1), 3, nan=True)
    assert TensorMap.decode(made.encode()) == made
    assert TensorMap.decode(bytes(128)) is None
    assert made.outside() == 0x7FFFFFFF


def test_a_copy_off_its_tensor_is_a_fault() -> None:
    device = Device("sm_90a")
    values = np.zeros((8, 64), np.uint16)
    memory = device.array(values)
    lies = TensorMap(BF16_KIND, memory.pointer, (64, 4000), (128,), (64, 8), (1, 1), 0)
    box = device.array(np.frombuffer(lies.encode(), np.uint8))
    body = f"""{START} @%p1 mbarrier.init.shared.b64 [%r2], 1; bar.sync 0; mov.u32 %r10, 0; mov.u32 %r11, 3000;
        @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
            [%r1], [%d0, {{%r10, %r11}}], [%r2];"""
    with pytest.raises(MemoryFault, match="outside every allocation"):
        launch(kernel(body, 2, shared=SHARED), [box.pointer, 0], device=device)
