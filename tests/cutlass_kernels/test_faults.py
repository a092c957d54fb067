"""Verification reports kernels that are broken on purpose, by faults put into the PTX of built libraries."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from cutlass_kernels import verify
from cutlass_kernels.build import libraries
from cutlass_kernels.build.libraries import Built
from cutlass_kernels.gemm.catalogue import smoke
from cutlass_kernels.gemm.config import GemmConfig

PLAIN, FUSED, TMA = smoke()
#: (kernel, what is there, what it becomes, which of its occurrences: all if None, state that `verify` finds)
FAULTS = {
    "no barriers": (PLAIN, "bar.sync 0;", "", None, "hazards"),
    "no wait for copies": (PLAIN, "cp.async.wait_group 1;", "", None, "wrong"),
    "a wait for one group less": (PLAIN, "cp.async.wait_group 1;", "cp.async.wait_group 2;", 1, "hazards"),
    "sums of another type": (PLAIN, "f32.bf16.bf16.f32", "f32.f16.f16.f32", 0, "wrong"),
    "an accumulator too many": (PLAIN, "mma.sync.aligned", "//", 31, "wrong"),
    "alpha added": (PLAIN, "mul.f32", "add.f32", 3, "wrong"),
    "operands of another instruction": (PLAIN, "fma.rn.f32", "sub.f32", None, "not run"),
    "a row of d too many": (PLAIN, "setp.lt.s32", "setp.le.s32", None, "wrong"),
    "no stores": (PLAIN, "st.global.v4", "ld.global.v4", 0, "not run"),
    "results of another type": (PLAIN, "cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32", 0, "wrong"),
    "silu of another base": (FUSED, "ex2.approx", "lg2.approx", 0, "wrong"),
    "silu of another sign": (FUSED, "neg.f32", "abs.f32", 0, "wrong"),
    "no wait for products": (TMA, "wgmma.wait_group.sync.aligned 0;", "", None, "wrong"),
    "no fence before products": (TMA, "wgmma.fence.sync.aligned;", "", None, "hazards"),
    "no proxy fence": (TMA, "fence.proxy.async.shared::cta;", "", None, "hazards"),
    "a store that is not waited for": (TMA, "cp.async.bulk.wait_group.read 0;", "", None, "hazards"),
    "a product subtracted": (TMA, "p, 1, 1, 0, 0;", "p, 1,-1, 0, 0;", 2, "wrong"),
    "an arrival too few": (TMA, "mbarrier.arrive.shared::cluster", "//", 0, "wrong"),
}


def broken(built: Built, folder: Path, text: str, becomes: str, which: int | None) -> Built:
    """A copy of a library with a fault in its PTX; nothing else of it moves."""
    data = built.library.read_bytes()
    places = [at for at in range(len(data)) if data.startswith(text.encode(), at)]
    assert places, f"{built.config.name} has no {text}"
    for at in places if which is None else [places[which]]:
        padded = becomes.encode().ljust(len(text))
        data = data[:at] + padded + data[at + len(text) :]
    copy = folder / "broken"
    shutil.copytree(built.folder, copy)
    (copy / libraries.LIBRARY).write_bytes(data)
    return dataclasses.replace(built, folder=copy)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported(name: str, built: dict[GemmConfig, Built], tmp_path: Path) -> None:
    config, text, becomes, which, state = FAULTS[name]
    result = verify.verify(broken(built[config], tmp_path, text, becomes, which))
    assert result.state == state, result.why
    assert result.why
