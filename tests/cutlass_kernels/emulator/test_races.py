"""Random accesses of warps to shared words, in phases between barriers, against the definition of a race."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cutlass_kernels.emulator import Device
from tests.cutlass_kernels.emulator.harness import kernel, launch

WARPS, WORDS = 4, 3
#: (warp, writes, word)
Access = tuple[int, bool, int]
#: The accesses of a phase, and which pairs of warps meet at its end: all, or those of two named barriers.
Phase = tuple[list[Access], bool]

phase = st.tuples(
    st.lists(st.tuples(st.integers(0, WARPS - 1), st.booleans(), st.integers(0, WORDS - 1)), max_size=4), st.booleans()
)


def races(phases: list[Phase]) -> bool:
    """Whether two accesses of different warps to one word, one of them a write, are unordered.

    ``known[w]`` counts for each warp how many of its phases warp w is ordered after.
    """
    known = [[0] * WARPS for _ in range(WARPS)]
    done: list[tuple[int, int, bool, int]] = []
    found = False
    for number, (accesses, everyone) in enumerate(phases, 1):
        for warp, writes, word in accesses:
            for other, when, wrote, place in done:
                if other != warp and place == word and (writes or wrote) and known[warp][other] < when:
                    found = True
            done.append((warp, number, writes, word))
        for warp in range(WARPS):
            known[warp][warp] = number
        groups = [range(WARPS)] if everyone else [range(0, WARPS, 2), range(1, WARPS, 2)]
        for group in groups:
            together = [max(known[warp][other] for warp in group) for other in range(WARPS)]
            for warp in group:
                known[warp] = together.copy()
    return found


@settings(max_examples=80, deadline=None)
@given(st.lists(phase, min_size=1, max_size=5))
def test_a_race_is_found_where_there_is_one(phases: list[Phase]) -> None:
    """Even and odd warps have a named barrier each; phases end at these or at one for all."""
    lines = ["mov.u32 %r0, %tid.x; shr.u32 %r1, %r0, 5; and.b32 %r2, %r1, 1; add.u32 %r3, %r2, 1; mov.u32 %r4, tile;"]
    lines += ["setp.lt.u32 %p1, %r0, 3; mad.lo.u32 %r5, %r0, 4, %r4; @%p1 st.shared.u32 [%r5], %r0; bar.sync 0;"]
    lines += [f"setp.eq.u32 %p{2 + warp}, %r0, {32 * warp};" for warp in range(WARPS)]
    for accesses, everyone in phases:
        for warp, writes, word in accesses:
            place = f"[%r4+{4 * word}]"
            lines.append(
                f"@%p{2 + warp} " + (f"st.shared.u32 {place}, %r0;" if writes else f"ld.shared.u32 %r6, {place};")
            )
        lines.append("bar.sync 0;" if everyone else "bar.sync %r3, 64;")
    text = kernel("\n".join(lines), 0, shared=".shared .align 16 .b8 tile[16];")
    hazards = launch(text, [], device=Device(), block=(32 * WARPS, 1, 1)).hazards
    assert {hazard.kind for hazard in hazards} == ({"race"} if races(phases) else set())
