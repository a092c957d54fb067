"""Races in global memory: every way to hand data on to another CTA, each with what it lacks left out."""

from __future__ import annotations

import numpy as np
import pytest

from cutlass_kernels.emulator import Device, Options
from tests.cutlass_kernels.emulator.harness import kernel, launch

#: CTA 0 writes a word a thread and gives; CTA 1 takes and reads. %d2: the word; %d1: the flag; %p0: thread 0.
BODY = """
    ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r9, 1;
    mad.wide.u32 %d2, %r0, 4, %d0; setp.eq.u32 %p0, %r0, 0; setp.eq.u32 %p1, %r1, 1; @%p1 bra TAKE;
    st.global.u32 [%d2], %r0; GIVE bra OVER;
    TAKE: @!%p0 bra MEET;
    SPIN: POLL setp.ne.u32 %p2, %r4, 1; @%p2 bra SPIN; AFTER
    MEET: JOIN ld.global.u32 %r5, [%d2]; st.global.u32 [%d2+1024], %r5;
    OVER:
"""
RELEASE, ACQUIRE = "@%p0 st.global.release.gpu.u32 [%d1], %r9;", "ld.global.acquire.gpu.u32 %r4, [%d1];"
MEET = "bar.sync 0;"
#: what CTA 0 does to hand on, how CTA 1 polls, what follows the poll, and how its threads meet
CLEAN = {
    "release and acquire": (f"{MEET} {RELEASE}", ACQUIRE, "", MEET),
    "fences around volatile": (
        f"{MEET} membar.gl; @%p0 st.volatile.global.u32 [%d1], %r9;",
        "ld.volatile.global.u32 %r4, [%d1];",
        "membar.gl;",
        MEET,
    ),
    "every thread fences, then one gives": (
        f"fence.sc.gpu; {MEET} @%p0 red.relaxed.gpu.global.add.u32 [%d1], %r9;",
        "ld.relaxed.gpu.global.u32 %r4, [%d1];",
        "fence.acq_rel.gpu;",
        MEET,
    ),
    "an atomic takes": (f"{MEET} {RELEASE}", "atom.global.cas.b32 %r4, [%d1], 9, 9;", "", MEET),
    "an atomic gives on": (
        f"{MEET} {RELEASE} @%p0 atom.relaxed.gpu.global.add.u32 %r6, [%d1], 0;",
        "atom.acquire.gpu.global.or.b32 %r4, [%d1], 0;",
        "",
        MEET,
    ),
    "every thread takes": (
        f"{MEET} {RELEASE}",
        ACQUIRE,
        "",
        "WAIT: " + ACQUIRE + "setp.ne.u32 %p3, %r4, 1; @%p3 bra WAIT;",
    ),
}
BROKEN = {
    "the flag is set before the others have written": (RELEASE, ACQUIRE, "", MEET),
    "the flag is not released": (f"{MEET} @%p0 st.relaxed.gpu.global.u32 [%d1], %r9;", ACQUIRE, "", MEET),
    "the fence is of the CTA only": (
        f"{MEET} fence.acq_rel.cta; @%p0 st.volatile.global.u32 [%d1], %r9;",
        ACQUIRE,
        "",
        MEET,
    ),
    "the fence comes before the others have written": (
        f"membar.gl; @%p0 st.volatile.global.u32 [%d1], %r9; {MEET}",
        ACQUIRE,
        "",
        MEET,
    ),
    "the poll does not acquire": (f"{MEET} {RELEASE}", "ld.relaxed.gpu.global.u32 %r4, [%d1];", "", MEET),
    "the others do not wait for the poll": (f"{MEET} {RELEASE}", ACQUIRE, "", ""),
    "the flag is an ordinary word": (f"{MEET} @%p0 st.global.u32 [%d1], %r9;", ACQUIRE, "", MEET),
}


def hazards(parts: tuple[str, str, str, str]) -> set[tuple[str, str]]:
    body = BODY
    for name, part in zip(("GIVE", "POLL", "AFTER", "JOIN"), parts, strict=True):
        body = body.replace(name, part, 1)
    device = Device(options=Options())
    data, flag = device.zeros(512, np.uint32), device.zeros(1, np.uint32)
    report = launch(kernel(body), [data.pointer, flag.pointer], device=device, grid=(2, 1, 1), block=(64, 1, 1))
    return {(hazard.kind, hazard.detail) for hazard in report.hazards}


@pytest.mark.parametrize("parts", CLEAN.values(), ids=CLEAN.keys())
def test_data_that_is_handed_on(parts: tuple[str, str, str, str]) -> None:
    assert hazards(parts) == set()


@pytest.mark.parametrize("parts", BROKEN.values(), ids=BROKEN.keys())
def test_data_that_is_not(parts: tuple[str, str, str, str]) -> None:
    assert ("race", "a read of global memory that another warp writes") in hazards(parts)


@pytest.mark.parametrize(("stride", "found"), [(256, set()), (0, {"race"})], ids=["apart", "the same words"])
def test_two_ctas_write(stride: int, found: set[str]) -> None:
    body = f"""ld.param.u64 %d0, [p0]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mad.wide.u32 %d1, %r0, 4, %d0;
        mad.wide.u32 %d1, %r1, {stride}, %d1; st.global.u32 [%d1], %r0;"""
    device = Device()
    data = device.zeros(512, np.uint32)
    report = launch(kernel(body, 1), [data.pointer], device=device, grid=(2, 1, 1), block=(64, 1, 1))
    assert {hazard.kind for hazard in report.hazards} == found


@pytest.mark.parametrize(("meet", "found"), [("bar.sync 0;", set()), ("", {"race"})], ids=["with", "without a barrier"])
def test_warps_of_one_cta_share_global_memory(meet: str, found: set[str]) -> None:
    body = f"""ld.param.u64 %d0, [p0]; mov.u32 %r0, %tid.x; mad.wide.u32 %d1, %r0, 4, %d0; st.global.u32 [%d1], %r0;
        {meet} xor.b32 %r2, %r0, 32; mad.wide.u32 %d2, %r2, 4, %d0; ld.global.u32 %r3, [%d2];"""
    device = Device()
    data = device.zeros(64, np.uint32)
    report = launch(kernel(body, 1), [data.pointer], device=device, block=(64, 1, 1))
    assert {hazard.kind for hazard in report.hazards} == found


def test_atomics_do_not_race_with_one_another() -> None:
    body = "ld.param.u64 %d0, [p0]; red.global.add.u32 [%d0], 1; atom.global.max.u32 %r1, [%d0], 5;"
    device = Device()
    data = device.zeros(1, np.uint32)
    report = launch(kernel(body, 1), [data.pointer], device=device, grid=(3, 1, 1), block=(64, 1, 1))
    assert report.hazards == ()


def test_large_grids_are_not_followed() -> None:
    """More than 512 warps at once: one of the limits."""
    body = "ld.param.u64 %d0, [p0]; mov.u32 %r0, %ctaid.x; st.global.u32 [%d0], %r0;"
    device = Device()
    data = device.zeros(1, np.uint32)
    report = launch(kernel(body, 1), [data.pointer], device=device, grid=(108, 1, 1), block=(256, 1, 1))
    assert report.hazards == ()


def test_narrow_writes_to_one_word_are_not_compared() -> None:
    body = """ld.param.u64 %d0, [p0]; mov.u32 %r0, %ctaid.x; mad.wide.u32 %d1, %r0, 2, %d0; mov.u16 %h0, 7;
        st.global.u16 [%d1], %h0; ld.global.u16 %h1, [%d1];"""
    device = Device()
    data = device.zeros(1, np.uint32)
    report = launch(kernel(body, 1), [data.pointer], device=device, grid=(2, 1, 1))
    assert report.hazards == ()
