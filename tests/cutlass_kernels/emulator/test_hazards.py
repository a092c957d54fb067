"""Every hazard detector on a kernel with the hazard, and on its clean twin, which differs by one instruction."""

from __future__ import annotations

import numpy as np
import pytest

from cutlass_kernels.emulator import Device, Hazard, Landing, Options
from tests.cutlass_kernels.emulator.harness import kernel, launch

SHARED = ".shared .align 1024 .b8 tile[16384];\n.shared .align 8 .b64 full[4];"
START = """mov.u32 %r0, %tid.x; mov.u32 %r1, tile; mov.u32 %r2, full; setp.eq.u32 %p1, %r0, 0; ld.param.u64 %d0, [p0];
    mad.lo.u32 %r3, %r0, 4, %r1; xor.b32 %r4, %r0, 63; mad.lo.u32 %r4, %r4, 4, %r1; and.b32 %r15, %r0, 31;
    mov.u32 %r16, 0;"""
WAIT = "{ .reg .pred done; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%r2], %r16; @!done bra AGAIN; }"
INIT = "@%p1 mbarrier.init.shared::cta.b64 [%r2], 1; bar.sync 0;"
LOAD = """@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 256;
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d0], 256, [%r2];"""


def hazards(body: str, landing: Landing = "late", threads: int = 64) -> tuple[Hazard, ...]:
    device = Device("sm_90a", Options(landing=landing))
    memory = device.array(np.arange(1024, dtype=np.uint32))
    return launch(
        kernel(f"{START} {body}", 1, shared=SHARED), [memory.pointer], device=device, block=(threads, 1, 1)
    ).hazards


# (name, kind of the hazard, what the twin differs in, the twin's instruction there, the hazard's, the body)
CASES = [
    ("a missing barrier between write and read", "race", "bar.sync 0;", "",
     "st.shared.u32 [%r3], %r0; {} ld.shared.u32 %r5, [%r4]; add.u32 %r5, %r5, 1;"),
    ("a missing barrier between read and write", "race", "bar.sync 0;", "",
     "st.shared.u32 [%r3], %r0; bar.sync 0; ld.shared.u32 %r5, [%r4]; {} st.shared.u32 [%r3], %r5;"),
    ("two warps write one word in one instruction", "race", "mov.u32 %r6, %r3;", "mad.lo.u32 %r6, %r15, 4, %r1;",
     "{} st.shared.u32 [%r6], %r0;"),
    ("two warps write one word one after the other", "race", "bar.sync 0;", "",
     "st.shared.u32 [%r3], %r0; {} st.shared.u32 [%r4], %r0;"),
    ("a named barrier that the reader does not join", "race", "bar.sync 1, 64;", "bar.sync 1, 32;",
     "st.shared.u32 [%r3], %r0; {} ld.shared.u32 %r5, [%r4]; add.u32 %r5, %r5, 1;"),
    ("an atomic and a plain store", "race", "atom.shared.add.u32 %r5, [%r1], 1;", "@%p1 st.shared.u32 [%r1], %r0;",
     "@%p1 st.shared.u32 [%r1], %r0; bar.sync 0; atom.shared.add.u32 %r5, [%r1], 1; {}"),
    ("cp.async read before its wait", "in flight", "cp.async.wait_all;", "",
     "st.shared.u32 [%r3], %r0; cp.async.ca.shared.global [%r3], [%d0], 4; {} ld.shared.u32 %r5, [%r3];"
     "cp.async.wait_all;"),
    ("cp.async waited for but not by the reader", "race", "bar.sync 0;", "",
     "cp.async.ca.shared.global [%r3], [%d0], 4; cp.async.wait_all; {} ld.shared.u32 %r5, [%r4]; add.u32 %r5, %r5, 1;"),
    ("cp.async over words that others still read", "race", "bar.sync 0;", "",
     "st.shared.u32 [%r3], %r0; bar.sync 0; ld.shared.u32 %r5, [%r4]; {}"
     "cp.async.ca.shared.global [%r3], [%d0], 4; cp.async.wait_all;"),
    ("cp.async that nobody waits for", "unwaited", "cp.async.wait_all;", "",
     "cp.async.ca.shared.global [%r3], [%d0], 4; cp.async.commit_group; {}"),
    ("a bulk copy read before its mbarrier", "in flight", f"{WAIT}", "",
     f"st.shared.u32 [%r3], %r0; fence.proxy.async; {INIT} {LOAD} {{}} ld.shared.u32 %r5, [%r3]; bar.sync 0;"
     "{ .reg .pred done; LAST: mbarrier.try_wait.parity.shared::cta.b64 done, [%r2], %r16; @!done bra LAST; }"),
    ("a bulk copy over words that others still read", "race", "bar.sync 1;", "",
     f"st.shared.u32 [%r3], %r0; {INIT} ld.shared.u32 %r5, [%r4]; {{}} {LOAD} {WAIT}"),
    ("a bulk copy that nobody waits for", "unwaited", WAIT, "", f"{INIT} {LOAD} {{}}"),
    ("a bulk store without a proxy fence", "proxy", "fence.proxy.async.shared::cta;", "",
     "st.shared.u32 [%r3], %r0; {} bar.sync 0; @%p1 cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r1], 256;"
     "cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;"),
    ("a bulk store without a barrier", "race", "bar.sync 0;", "",
     "st.shared.u32 [%r3], %r0; fence.proxy.async; {}"
     "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r1], 256;"
     "cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;"),
    ("a bulk store overwritten before it has read", "in flight", "cp.async.bulk.wait_group.read 0;", "",
     "st.shared.u32 [%r3], %r0; fence.proxy.async; bar.sync 0;"
     "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r1], 256; cp.async.bulk.commit_group; {} bar.sync 0;"
     "st.shared.u32 [%r3], %r0; cp.async.bulk.wait_group.read 0;"),
    ("a bulk store that its thread does not wait for", "unwaited", "cp.async.bulk.wait_group.read 0;", "",
     "st.shared.u32 [%r3], %r0; fence.proxy.async; bar.sync 0;"
     "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r1], 256; cp.async.bulk.commit_group; {}"),
    ("a value that nobody wrote", "uninitialised", "st.shared.u32 [%r3], %r0;", "",
     "{} bar.sync 0; ld.shared.u32 %r5, [%r4]; add.u32 %r5, %r5, 1; mad.wide.u32 %d3, %r0, 4, %d0;"
     "st.global.u32 [%d3], %r5;"),
    ("an atomic on a word that nobody wrote", "uninitialised", "@%p1 st.shared.u32 [%r1], %r0;", "",
     "{} bar.sync 0; atom.shared.add.u32 %r5, [%r1], 1;"),
    ("a shuffle from a lane outside of the mask", "race", "shfl.sync.idx.b32 %r5, %r0, 1, 31, 0xAAAAAAAA;",
     "shfl.sync.idx.b32 %r5, %r0, 0, 31, 0xAAAAAAAA;",
     "and.b32 %r6, %r0, 1; setp.eq.u32 %p2, %r6, 0; @%p2 bra OVER; {} OVER:"),
    ("an mbarrier used before its init is known", "race", "bar.sync 0;", "",
     f"@%p1 mbarrier.init.shared.b64 [%r2], 64; {{}} mbarrier.arrive.shared.b64 %d7, [%r2]; {WAIT}"),
    ("an mbarrier arrival before the write", "race",
     "st.shared.u32 [%r3], %r0; mbarrier.arrive.shared.b64 %d7, [%r2];",
     "mbarrier.arrive.shared.b64 %d7, [%r2]; st.shared.u32 [%r3], %r0;",
     f"@%p1 mbarrier.init.shared.b64 [%r2], 64; bar.sync 0; {{}} {WAIT} ld.shared.u32 %r5, [%r4];"
     "add.u32 %r5, %r5, 1;"),
]  # fmt: skip


#: Under "early" a bulk copy has landed when others run: it is then a race, or nothing that can be seen.
EARLY = {"a bulk copy read before its mbarrier": "race", "a bulk copy that nobody waits for": None}


@pytest.mark.parametrize("landing", ["late", "early"])
@pytest.mark.parametrize(("name", "kind", "clean", "broken", "body"), CASES, ids=[case[0] for case in CASES])
def test_hazard_and_clean_twin(name: str, kind: str, clean: str, broken: str, body: str, landing: Landing) -> None:
    assert hazards(body.replace("{}", clean), landing) == ()
    expected = EARLY.get(name, kind) if landing == "early" else kind
    if expected is not None:
        assert expected in {hazard.kind for hazard in hazards(body.replace("{}", broken), landing)}


def test_hazards_name_the_instruction() -> None:
    (hazard,) = hazards("st.shared.u32 [%r3], %r0; ld.shared.u32 %r5, [%r4];")
    assert (hazard.kind, hazard.text, hazard.count) == ("race", "ld.shared.u32 %r5, [%r4]", 64)
    assert str(hazard).startswith("race: a read of a word that another agent writes (64x; PTX line ")


def test_one_warp_is_ordered_with_itself() -> None:
    body = "st.shared.u32 [%r3], %r0; ld.shared.u32 %r5, [%r3]; st.shared.u32 [%r3], %r5;"
    assert hazards(body) == ()


def test_narrow_writes_to_one_word_are_not_compared() -> None:
    """Each warp has its halves of the words."""
    body = """shr.u32 %r6, %r0, 5; mad.lo.u32 %r7, %r15, 4, %r1; mad.lo.u32 %r7, %r6, 2, %r7; cvt.u16.u32 %h1, %r0;
        st.shared.u16 [%r7], %h1;"""
    assert hazards(body) == ()


def test_race_checks_can_be_left_out() -> None:
    device = Device(options=Options(races=False))
    memory = device.zeros(64)
    body = f"{START} st.shared.u32 [%r3], %r0; ld.shared.u32 %r5, [%r4];"
    report = launch(kernel(body, 1, shared=SHARED), [memory.pointer], device=device, block=(64, 1, 1))
    assert report.hazards == ()


def test_only_so_many_hazards_of_a_kind_are_kept() -> None:
    body = "st.shared.u32 [%r3], %r0;" + "\nld.shared.u32 %r5, [%r4];" * 20
    assert len(hazards(body)) == Options().max_hazards
