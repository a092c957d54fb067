"""Divergence and reconvergence, barriers of CTAs, exits, traps, and launches that cannot be or never end."""

from __future__ import annotations

import numpy as np
import pytest

from cutlass_kernels.emulator import (
    Deadlock,
    Device,
    DeviceTrap,
    LaunchError,
    Options,
    PtxSyntaxError,
    UnsupportedInstruction,
    opcodes,
)
from cutlass_kernels.emulator.program import Program
from cutlass_kernels.emulator.ptx.parser import parse
from tests.cutlass_kernels.emulator.harness import kernel, launch

START = "mov.u32 %r0, %tid.x; ld.param.u64 %d0, [p0]; mad.wide.u32 %d1, %r0, 4, %d0;"


def results(body: str, threads: int = 64, **options: int) -> tuple[list[int], int]:
    """The values that lanes store, and the blocks that it took."""
    device = Device(options=Options(**options)) if options else Device()
    out = device.zeros(threads, np.uint32)
    report = launch(kernel(f"{START} {body}", 1), [out.pointer], device=device, block=(threads, 1, 1))
    assert report.hazards == ()
    return out.numpy().tolist(), report.steps


def test_loops_of_different_lengths_meet_again() -> None:
    """Lane n goes n % 7 times round; the code behind the loop runs once for all."""
    body = """rem.u32 %r1, %r0, 7; mov.u32 %r2, 0; mov.u32 %r3, 100; setp.eq.u32 %p1, %r1, 0; @%p1 bra DONE;
        LOOP: add.u32 %r3, %r3, %r1; add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, %r1; @%p2 bra LOOP;
        DONE: vote.sync.all.pred %p3, %p3, -1; st.global.u32 [%d1], %r3;"""
    found, steps = results(body)
    assert found == [100 + (n % 7) ** 2 for n in range(64)]
    assert steps == 1 + 6 + 1


def test_nested_branches() -> None:
    body = """and.b32 %r1, %r0, 1; and.b32 %r2, %r0, 2;
        setp.ne.u32 %p1, %r1, 0; setp.ne.u32 %p2, %r2, 0; mov.u32 %r3, 1;
        @%p1 bra ODD; @!%p2 bra JOIN; add.u32 %r3, %r3, 10; bra.uni JOIN;
        ODD: mul.lo.u32 %r3, %r3, 7; @%p2 bra DEEP; bra JOIN; DEEP: add.u32 %r3, %r3, 1000;
        JOIN: st.global.u32 [%d1], %r3;"""
    table = {0: 1, 1: 7, 2: 11, 3: 1007}
    assert results(body)[0] == [table[n % 4] for n in range(64)]


def test_writes_of_some_lanes_leave_copies_alone() -> None:
    """A register moved to another shares nothing with it."""
    body = """mov.u32 %r1, %r0; setp.lt.u32 %p1, %r0, 5; @%p1 add.u32 %r0, %r0, 100; mov.u32 %r2, %r1;
        @%p1 mov.u32 %r1, 3; st.global.u32 [%d1], %r2;"""
    assert results(body)[0] == list(range(64))


def test_names_of_scopes() -> None:
    """Braces hide registers and labels of the same name."""
    body = """mov.u32 %r1, 5; { .reg .b32 %r1; .reg .pred p; mov.u32 %r1, 9; setp.eq.u32 p, %r0, 0; @p bra OUT; OUT: }
        { .reg .pred p; setp.ne.u32 p, %r0, 0; @p bra OUT; add.u32 %r1, %r1, 1; OUT: } st.global.u32 [%d1], %r1;"""
    assert results(body)[0] == [6] + [5] * 63


def test_exit_and_return() -> None:
    body = """setp.lt.u32 %p1, %r0, 9; @%p1 exit; st.global.u32 [%d1], %r0; setp.gt.u32 %p2, %r0, 50; @!%p2 ret;
        mov.u32 %r1, 1; st.global.u32 [%d1], %r1;"""
    assert results(body)[0] == [0] * 9 + list(range(9, 51)) + [1] * 13


def test_barrier_reductions() -> None:
    body = """setp.lt.u32 %p1, %r0, 40; bar.red.popc.u32 %r1, 0, %p1; barrier.cta.red.and.pred %p2, 1, %p1;
        bar.cta.red.popc.u32 %r1, 3, 64, %p1; barrier.red.popc.u32 %r1, 0, %p1;
        bar.red.or.pred %p3, 2, 64, !%p1; selp.u32 %r2, 1000, 0, %p2; selp.u32 %r3, 100, 0, %p3;
        add.u32 %r1, %r1, %r2; add.u32 %r1, %r1, %r3; st.global.u32 [%d1], %r1;"""
    assert results(body)[0] == [140] * 64


@pytest.mark.parametrize(
    ("sync", "arrive"),
    [
        ("bar.sync", "bar.arrive"),
        ("barrier.sync", "barrier.arrive"),
        ("bar.cta.sync", "bar.cta.arrive"),
        ("barrier.cta.sync.aligned", "barrier.cta.arrive.aligned"),
    ],
)
def test_named_barriers_split_producers_and_consumers(sync: str, arrive: str) -> None:
    """Warp 0 writes and arrives, warp 1 waits and reads; the other way round on a second barrier."""
    shared = ".shared .align 4 .b8 tile[128];"
    body = f"""{START} mov.u32 %r1, tile; and.b32 %r2, %r0, 31; mad.lo.u32 %r1, %r2, 4, %r1; mov.u32 %r3, 0;
        mov.u32 %r5, 0; setp.ge.u32 %p1, %r0, 32; @%p1 bra CONSUMER;
        PRODUCER: mad.lo.u32 %r4, %r3, 100, %r2; st.shared.u32 [%r1], %r4; {arrive} 1, 64; {sync} 2, 64;
        add.u32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, 3; @%p2 bra PRODUCER; bra END;
        CONSUMER: {sync} 1, 64; ld.shared.u32 %r4, [%r1]; add.u32 %r5, %r5, %r4; {arrive} 2, 64;
        add.u32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, 3; @%p2 bra CONSUMER; st.global.u32 [%d1], %r5; END:"""
    device = Device()
    out = device.zeros(64, np.uint32)
    report = launch(kernel(body, 1, shared=shared), [out.pointer], device=device, block=(64, 1, 1))
    assert out.numpy().tolist() == [0] * 32 + [300 + 3 * n for n in range(32)]
    assert report.hazards == ()


def test_ctas_that_wait_for_one_another() -> None:
    """CTA n spins until CTA n - 1 has raised the flag to n: all must be resident, and none may starve."""
    body = f"""{START} mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r0, 0; @%p1 bra JOIN;
        SPIN: ld.global.acquire.gpu.u32 %r2, [%d0]; setp.ne.u32 %p2, %r2, %r1; @%p2 bra SPIN;
        add.u32 %r2, %r2, 1; st.global.release.gpu.u32 [%d0], %r2; JOIN: bar.sync 0;"""
    device = Device()
    flag = device.zeros(1, np.uint32)
    launch(kernel(body, 1), [flag.pointer], device=device, grid=(9, 1, 1))
    assert flag.numpy()[0] == 9


def test_a_grid_beyond_the_multiprocessors() -> None:
    body = f"""{START} mov.u32 %r1, %ctaid.x; mad.wide.u32 %d2, %r1, 4, %d0; setp.eq.u32 %p1, %r0, 0;
        @%p1 st.global.u32 [%d2], %r1;"""
    device = Device()
    out = device.empty(300, np.uint32)
    launch(kernel(body, 1), [out.pointer], device=device, grid=(300, 1, 1))
    assert out.numpy().tolist() == list(range(300))


def test_barriers_that_nobody_completes() -> None:
    with pytest.raises(Deadlock, match="64 threads wait"):
        results("bar.sync 3, 96;")
    with pytest.raises(Deadlock, match="barrier 16 does not exist"):
        results("bar.sync 16;")


def test_endless_loops_end() -> None:
    with pytest.raises(Deadlock, match="more than 500 basic blocks"):
        results("LOOP: bra LOOP;", max_steps=500)


def test_traps_name_a_thread() -> None:
    with pytest.raises(DeviceTrap, match=r"trap executed by thread \(40, 0, 0\).*PTX line"):
        results("setp.eq.u32 %p1, %r0, 40; @%p1 trap;")
    with pytest.raises(DeviceTrap, match="brkpt"):
        results("brkpt;")
    with pytest.raises(DeviceTrap, match="an assertion failed"):
        results("{ .param .b64 a; st.param.b64 [a], %d0; call.uni __assertfail, (a); }")
    results(
        "{ .param .b32 r; .param .b64 a; st.param.b64 [a], %d0; call.uni (r), vprintf, (a); ld.param.b32 %r9, [r]; }"
    )


@pytest.mark.parametrize(
    ("grid", "block", "shared", "parameters", "message"),
    [
        ((1, 1, 1), (2048, 1, 1), 0, 1, "at most 1024"),
        ((1, 1, 1), (33, 1, 1), 0, 1, "multiple of 32"),
        ((0, 1, 1), (32, 1, 1), 0, 1, "without zeros"),
        ((1, 1 << 17, 1), (32, 1, 1), 0, 1, "within the limits"),
        ((1, 1, 1), (32, 1, 1), 200_000, 1, "bytes of shared memory"),
        ((1, 1, 1), (32, 1, 1), 0, 2, "8 bytes of parameters, got 16"),
    ],
)
def test_launches_that_a_device_refuses(
    grid: tuple[int, int, int], block: tuple[int, int, int], shared: int, parameters: int, message: str
) -> None:
    with pytest.raises(LaunchError, match=message):
        launch(kernel("", 1), [0] * parameters, device=Device(), grid=grid, block=block, shared=shared)


def test_clusters_need_an_architecture_and_a_grid() -> None:
    with pytest.raises(LaunchError, match="clusters of 1"):
        launch(kernel("", 0), [], device=Device("sm_80"), grid=(2, 1, 1), cluster=(2, 1, 1))
    with pytest.raises(LaunchError, match="whole clusters"):
        launch(kernel("", 0), [], device=Device("sm_90a"), grid=(3, 1, 1), cluster=(2, 1, 1))


def test_griddepcontrol_does_nothing() -> None:
    body = """griddepcontrol.wait; griddepcontrol.launch_dependents; pmevent 1;
        bar.warp.sync -1; cvt.u32.u64 %r1, %d0; st.global.u32 [%d1], %r0;"""
    assert results(body)[0] == list(range(64))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("mov.u32 %r0, %r999;", None),
        ("add.u32 %r0, %r1, nonsense nonsense;", 8),
        ("\n\n@%q5 add.u32 %r0, %r1, %r2;", 10),
        ("bra NOWHERE;", 8),
        ("mov.u32 %r0, 5", None),
        (".weird 5;", 8),
    ],
)
def test_syntax_errors_give_the_line(text: str, line: int | None) -> None:
    with pytest.raises((PtxSyntaxError, UnsupportedInstruction)) as caught:
        launch(kernel(text, 0), [], device=Device())
    if line is not None:
        assert caught.value.line == line


def test_module_scope_is_read() -> None:
    text = """.version 8.7
.target sm_90a, debug
.address_size 64
.extern .func (.param .b32 r) vprintf (.param .b64 a, .param .b64 b);
.global .align 8 .u64 pair[2] = {0x1122334455667788, 2}; /* a
comment */ .extern .shared .align 128 .b8 dynamic[];
.shared .align 16 .b8 fixed[48];
.func (.param .b32 out) helper (.param .b32 in) { .reg .b32 %r<2>; ret; }
.visible .entry first(.param .u32 n, .param .align 64 .b8 big[128], .param .u64 .ptr .global .align 16 q)
.maxntid 384, 1, 1 .minnctapersm 1 .reqnctapercluster 2,1,1
{ .loc 1 2 3; ret; } // end
.entry second() { ret; }
"""
    module = parse(text.replace(".loc 1 2 3;", "\n.loc 1 2 3\n"))
    assert (module.target, module.version, list(module.kernels)) == ("sm_90a", "8.7", ["first", "second"])
    first = module.kernels["first"]
    assert [(p.name, p.offset, p.size) for p in first.parameters] == [("n", 0, 4), ("big", 64, 128), ("q", 192, 8)]
    assert (first.max_threads, first.cluster, first.parameter_bytes) == ((384, 1, 1), (2, 1, 1), 200)
    assert module.variables["pair"].initial[:8] == (0x1122334455667788).to_bytes(8, "little")
    assert (module.variables["dynamic"].size, module.variables["fixed"].size) == (0, 48)


@pytest.mark.parametrize("operands", ["", " 5", " %r0, %r1, %r2, %r3, %r4, %r5, %r6"])
def test_operands_that_an_instruction_does_not_have(operands: str) -> None:
    """It is taken or refused in the emulator's words: no other error."""
    refused = 0
    for name in opcodes():
        try:
            module = parse(kernel(f"{name}.b32{operands};", 0))
            Program(module.kernels["k"], module)
        except (PtxSyntaxError, UnsupportedInstruction) as error:
            refused += error.line == 8
    assert refused > 50
