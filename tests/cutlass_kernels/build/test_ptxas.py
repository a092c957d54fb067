"""ptxas's report, read; and what must fail a build."""

from __future__ import annotations

from cutlass_kernels.build import ptxas

# The words of nvcc 13.0.
CLEAN = """\
ptxas info    : 17 bytes gmem
ptxas info    : Compiling entry function '_Z6squarePf' for 'sm_80'
ptxas info    : Function properties for _Z6squarePf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 106 registers, used 1 barriers, 512 bytes smem
ptxas info    : Compile time = 12.3 ms
ptxas info    : Compiling entry function '_Z4cubePf' for 'sm_80'
ptxas info    : Function properties for _Z4cubePf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 28 registers, used 0 barriers
"""


def test_every_entry_is_read() -> None:
    report = ptxas.parse(CLEAN)
    found = [(entry.entry, entry.arch, entry.registers, entry.shared) for entry in report.entries]
    assert found == [("_Z6squarePf", "sm_80", 106, 512), ("_Z4cubePf", "sm_80", 28, 0)]
    assert not report.faults()


def test_spills_fail() -> None:
    spilling = CLEAN.replace(
        "0 bytes stack frame, 0 bytes spill stores", "24 bytes stack frame, 20 bytes spill stores", 1
    )
    assert ptxas.parse(spilling).faults() == ["spills 20 bytes out, 0 in (106 registers)"]


def test_local_memory_fails() -> None:
    faults = ptxas.parse(CLEAN.replace("0 bytes stack frame", "88 bytes stack frame", 1)).faults()
    assert faults == ["88 bytes of local memory"]


def test_serialised_wgmma_fails() -> None:
    warning = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to"
        " non wgmma instructions defining accumulator registers of a wgmma between start and end of the stage\n"
    )
    assert ptxas.parse(CLEAN + warning).faults() == ["serialised wgmma (C7510), 1 times"]


def test_an_empty_report_fails() -> None:
    assert ptxas.parse("").faults() == ["no entry function in ptxas's report"]
