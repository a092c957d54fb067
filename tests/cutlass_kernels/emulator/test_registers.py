"""setmaxnreg: warpgroups share the registers that their CTA began with, 168 for each of 384 threads."""

from __future__ import annotations

import numpy as np
import pytest

from cutlass_kernels.emulator import Deadlock, Device, DivergentCollective, LaunchError, UnsupportedInstruction
from tests.cutlass_kernels.emulator.harness import kernel, launch

#: By its warpgroup: the third one gives, the others take.
BY_ROLE = """mov.u32 %r0, %tid.x; ld.param.u64 %d0, [p0]; mad.wide.u32 %d1, %r0, 4, %d0;
    setp.ge.u32 %p1, %r0, {first}; @%p1 bra COPIES;
    setmaxnreg.inc.sync.aligned.u32 {computes}; bra DONE;
    COPIES: setmaxnreg.dec.sync.aligned.u32 {copies};
    DONE: st.global.u32 [%d1], %r0;"""


def run(body: str, threads: int = 384, directive: str = "", grid: int = 1) -> None:
    """Every thread gets to the end."""
    device = Device()
    out = device.zeros(threads, np.uint32)
    text = kernel(body, 1).replace(")\n{", f") {directive}\n{{")
    launch(text, [out.pointer], device=device, block=(threads, 1, 1), grid=(grid, 1, 1))
    assert out.numpy().tolist() == list(range(threads))


@pytest.mark.parametrize(("computes", "copies"), [(224, 56), (208, 88), (240, 24), (168, 168)])
def test_what_one_gives_the_others_take(computes: int, copies: int) -> None:
    """The takers come first in the text, so that they wait for the giver; in two CTAs at once."""
    run(BY_ROLE.format(first=256, computes=computes, copies=copies), grid=2)


@pytest.mark.parametrize(
    ("computes", "copies", "directive", "message"),
    [
        (208, 96, "", r"128 threads that hold 168 .* wait for 208: 5120 more, but 4096 are left of the 168 x 384"),
        (240, 32, "", "wait for 240: 9216 more, but 8192 are left"),
        (224, 56, ".maxnreg 128", "wait for 224: 12288 more, but 9216 are left of the 128 x 384"),
        (224, 56, ".maxnreg 121", "wait for 224: 12288 more, but 9216 are left of the 128 x 384"),
        (224, 56, ".minnctapersm 2", "hold 80 registers wait for 224: 18432 more, but 3072 are left of the 80 x 384"),
    ],
)
def test_too_many_registers_are_a_deadlock(computes: int, copies: int, directive: str, message: str) -> None:
    with pytest.raises(Deadlock, match=message) as caught:
        run(BY_ROLE.format(first=256, computes=computes, copies=copies), directive=directive)
    assert "setmaxnreg.inc" in caught.value.text


@pytest.mark.parametrize("count", [16, 264, 100])
def test_a_count_that_does_not_exist_is_refused(count: int) -> None:
    with pytest.raises(UnsupportedInstruction, match=f"{count} registers, expected a multiple of 8 from 24 to 256"):
        run(BY_ROLE.format(first=256, computes=count, copies=24))


@pytest.mark.parametrize(("computes", "copies", "message"), [(160, 24, "to 160"), (168, 176, "to 176")])
def test_the_wrong_direction_is_an_error(computes: int, copies: int, message: str) -> None:
    with pytest.raises(LaunchError, match=f"{message} registers by threads that hold 168"):
        run(BY_ROLE.format(first=256, computes=computes, copies=copies))


def test_whole_warpgroups_change_their_registers() -> None:
    with pytest.raises(DivergentCollective):
        run(BY_ROLE.format(first=320, computes=168, copies=24))
