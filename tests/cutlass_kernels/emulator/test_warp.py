"""Exchanges within a warp, against loops over its lanes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cutlass_kernels.emulator import Device, DivergentCollective
from tests.cutlass_kernels.emulator.harness import Array, compute, kernel, launch, samples

LANES, WARP, EVERYONE = 128, 32, 0xFFFFFFFF


def per_warp(values: Array) -> Array:
    return values.reshape(-1, WARP)


def shuffled(mode: str, values: Array, by: Array, control: int) -> tuple[Array, Array]:
    """shfl as the manual's pseudo-code has it."""
    out, valid = values.copy(), np.zeros(values.size, np.bool_)
    segment, limit = control >> 8 & 31, control & 31
    for lane in range(values.size):
        own, first = lane % WARP, lane // WARP * WARP
        distance = int(by[lane]) & 31
        highest, lowest = own & segment | limit & ~segment, own & segment
        source = {
            "up": own - distance,
            "down": own + distance,
            "bfly": own ^ distance,
            "idx": lowest | distance & ~segment,
        }[mode]
        valid[lane] = source >= highest if mode == "up" else source <= highest
        out[lane] = values[first + (source if valid[lane] else own)]
    return out, valid


@pytest.mark.parametrize("control", [0x1F, 0x181F, 0x1C1F, 0x0F], ids=hex)
@pytest.mark.parametrize(
    ("mode", "snippet"),
    [
        ("down", "shfl.sync.down.b32 %o0|%o1, %i0, %i1, %i2, -1;"),
        ("bfly", "shfl.sync.bfly.b32 %o0|%o1, %i0, %i1, %i2, 0xffffffff;"),
        ("idx", "mov.u32 %r9, -1; shfl.sync.idx.b32 %o0|%o1, %i0, %i1, %i2, %r9;"),
    ],
)
def test_shuffles(mode: str, snippet: str, control: int) -> None:
    values, by = samples("u32", LANES, 1), samples("u32", LANES, 2)
    found, valid = compute(
        snippet, [("u32", values), ("u32", by), ("u32", np.full(LANES, control, np.uint32))], ["u32", "pred"]
    )
    wanted, wanted_valid = shuffled(mode, values, by, control)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(valid.astype(np.bool_), wanted_valid)


@pytest.mark.parametrize("control", [0, 0x1800, 0x1C00], ids=hex)
def test_shuffle_up(control: int) -> None:
    values, by = samples("u32", LANES, 1), samples("u32", LANES, 2)
    inputs = [("u32", values), ("u32", by), ("u32", np.full(LANES, control, np.uint32))]
    found, valid = compute("shfl.sync.up.b32 %o0|%o1, %i0, %i1, %i2, -1;", inputs, ["u32", "pred"])
    wanted, wanted_valid = shuffled("up", values, by, control)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(valid.astype(np.bool_), wanted_valid)


def test_votes() -> None:
    holds = samples("pred", LANES)
    holds[:WARP], holds[WARP : 2 * WARP] = 1, 0
    snippet = """vote.sync.ballot.b32 %o0, %i0, -1; vote.sync.all.pred %o1, %i0, -1; vote.sync.any.pred %o2, %i0, -1;
        vote.sync.uni.pred %o3, !%i0, -1;"""
    ballot, every, some, uniform = compute(snippet, [("pred", holds)], ["b32", "pred", "pred", "pred"])
    for warp, row in enumerate(per_warp(holds)):
        mine = slice(warp * WARP, (warp + 1) * WARP)
        assert (ballot[mine] == sum(int(bit) << lane for lane, bit in enumerate(row))).all()
        assert (every[mine] == row.all()).all()
        assert (some[mine] == row.any()).all()
        assert (uniform[mine] == (row.all() or not row.any())).all()


def test_votes_of_a_part_of_the_warp() -> None:
    """Odd lanes vote under their own mask while even ones are elsewhere."""
    holds = samples("pred", LANES)
    (ballot,) = compute("vote.sync.ballot.b32 %o0, %i0, 0xAAAAAAAA;", [("pred", holds)], ["b32"], divergent=True)
    for warp, row in enumerate(per_warp(holds)):
        wanted = sum(int(row[lane]) << lane for lane in range(1, WARP, 2))
        assert (ballot[warp * WARP + 1 : (warp + 1) * WARP : 2] == wanted).all()


def test_matches() -> None:
    values = samples("u32", LANES) % np.uint32(5)
    values[:WARP] = 3
    snippet = "match.any.sync.b32 %o0, %i0, -1; match.all.sync.b32 %o1|%o2, %i0, -1;"
    any_of, all_of, equal = compute(snippet, [("u32", values)], ["b32", "b32", "pred"])
    for warp, row in enumerate(per_warp(values)):
        for lane in range(WARP):
            same = sum(1 << other for other in range(WARP) if row[other] == row[lane])
            uniform = bool((row == row[0]).all())
            at = warp * WARP + lane
            assert (any_of[at], all_of[at], bool(equal[at])) == (same, EVERYONE if uniform else 0, uniform)


REDUCTIONS: list[tuple[str, str, Callable[[Array], int]]] = [
    ("redux.sync.add.s32 %o0, %i0, -1;", "s32", lambda row: int(row.astype(np.int64).sum())),
    ("redux.sync.min.s32 %o0, %i0, -1;", "s32", lambda row: int(row.min())),
    ("redux.sync.max.u32 %o0, %i0, -1;", "u32", lambda row: int(row.max())),
    ("redux.sync.and.b32 %o0, %i0, -1;", "u32", lambda row: int(np.bitwise_and.reduce(row))),
    ("redux.sync.or.b32 %o0, %i0, -1;", "u32", lambda row: int(np.bitwise_or.reduce(row))),
    ("redux.sync.xor.b32 %o0, %i0, -1;", "u32", lambda row: int(np.bitwise_xor.reduce(row))),
]


@pytest.mark.parametrize(("snippet", "kind", "oracle"), REDUCTIONS, ids=[case[0] for case in REDUCTIONS])
def test_reductions(snippet: str, kind: str, oracle: Callable[[Array], int]) -> None:
    values = samples(kind, LANES)
    (found,) = compute(snippet, [(kind, values)], [kind])
    for warp, row in enumerate(per_warp(values)):
        assert (found[warp * WARP : (warp + 1) * WARP] == oracle(row) & EVERYONE).all()


def test_election_takes_the_lowest_live_member() -> None:
    snippet = "mov.u32 %r9, -1; elect.sync %o0|%o1, %r9;"
    leader, elected = compute(snippet, [("u32", samples("u32", 64))], ["u32", "pred"])
    assert (leader == 0).all()
    np.testing.assert_array_equal(elected, np.arange(64) % WARP == 0)
    members = "mov.u32 %r9, 0xAAAAAAAA; elect.sync %o0|%o1, %r9;"
    leader, elected = compute(members, [("u32", samples("u32", 64))], ["u32", "pred"], divergent=True)
    np.testing.assert_array_equal(elected, np.arange(64) % WARP == 1)


def test_activemask_names_the_lanes_that_run_together() -> None:
    (mask,) = compute("activemask.b32 %o0;", [("u32", samples("u32", 64))], ["b32"], divergent=True)
    assert (mask[1::2] == 0xAAAAAAAA).all()


def test_exited_lanes_are_not_waited_for() -> None:
    body = """mov.u32 %r0, %tid.x; setp.lt.u32 %p1, %r0, 8; @%p1 ret;
        bar.warp.sync -1; vote.sync.ballot.b32 %r1, 1, -1;
        ld.param.u64 %d0, [p0]; mad.wide.u32 %d1, %r0, 4, %d0; st.global.u32 [%d1], %r1;"""
    device = Device()
    out = device.zeros(32, np.uint32)
    launch(kernel(body, 1), [out.pointer], device=device)
    assert (out.numpy()[8:] == 0xFFFFFF00).all()


def test_lanes_wait_for_members_on_another_path() -> None:
    """Both sides of a branch hold the same full-mask shuffle: PTX asks for one instruction, so that this is an
    error."""
    body = """mov.u32 %r0, %tid.x; and.b32 %r1, %r0, 1; setp.eq.u32 %p1, %r1, 0; mov.u32 %r5, -1;
        @%p1 bra EVEN; shfl.sync.idx.b32 %r2, %r0, 0, 31, %r5; bra JOIN;
        EVEN: shfl.sync.idx.b32 %r2, %r0, 0, 31, %r5; JOIN:"""
    with pytest.raises(DivergentCollective, match=r"shfl\.sync\.idx"):
        launch(kernel(body, 0), [], device=Device())


def test_early_lanes_wait_for_late_ones() -> None:
    """Odd lanes take a detour before a shuffle that all take part in."""
    body = """mov.u32 %r0, %tid.x; and.b32 %r1, %r0, 1; setp.eq.u32 %p1, %r1, 0; mov.u32 %r2, %r0; mov.u32 %r5, -1;
        @%p1 bra JOIN; add.u32 %r2, %r2, 1000;
        JOIN: xor.b32 %r3, %r0, 1; shfl.sync.idx.b32 %r4, %r2, %r3, 31, %r5;
        ld.param.u64 %d0, [p0]; mad.wide.u32 %d1, %r0, 4, %d0; st.global.u32 [%d1], %r4;"""
    device = Device()
    out = device.empty(32, np.uint32)
    launch(kernel(body, 1), [out.pointer], device=device)
    lane = np.arange(32)
    np.testing.assert_array_equal(out.numpy(), np.where(lane % 2 == 0, lane + 1001, lane - 1))


def test_a_lane_outside_of_its_mask_is_refused() -> None:
    with pytest.raises(DivergentCollective, match="leaves out"):
        compute("mov.u32 %r9, 1; shfl.sync.idx.b32 %o0, %i0, 0, 31, %r9;", [("u32", samples("u32", 32))], ["u32"])
