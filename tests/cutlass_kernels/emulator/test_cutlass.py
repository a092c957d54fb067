"""CUTLASS GEMMs, built by nvcc as libraries that could ship, against float64: TMA, wgmma, clusters, and their mutants.

Each kernel is compiled once (up to a minute) into the user's cache folder. All of it is marked slow.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from cutlass_kernels import emulator
from tests.cutlass_kernels.emulator.harness import Array

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent / "kernels"
V = ctypes.c_void_p


@dataclass(frozen=True)
class Built:
    """A source with its architecture and definitions."""

    source: str
    arch: str
    defines: tuple[str, ...] = ()

    def library(self) -> Path:
        """Compile, or find what was compiled before. Skips where nvcc or the headers are missing."""
        nvcc, package = shutil.which("nvcc"), importlib.util.find_spec("cutlass_library")
        if nvcc is None:
            pytest.skip("nvcc is not on PATH")
        if package is None or package.origin is None:
            pytest.skip("nvidia-cutlass, which brings CUTLASS's headers, is not installed")
        root = Path(package.origin).parent / "source"
        number = self.arch.removeprefix("sm_")
        # PTX only: ptxas is not what is tested here.
        flags = ["-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-shared", "-cudart", "shared"]
        flags += ["-Xcompiler", "-fPIC", "-gencode", f"arch=compute_{number},code=compute_{number}", *self.defines]
        text = (FOLDER / self.source).read_bytes()
        key = hashlib.sha256(repr((text, flags, nvcc, str(root))).encode()).hexdigest()[:16]
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashmla" / "emulator-tests"
        home.mkdir(parents=True, exist_ok=True)
        target = home / f"{Path(self.source).stem}-{key}.so"
        if not target.exists():
            scratch = target.with_suffix(f".{os.getpid()}.so")
            include = [f"-I{root / 'include'}", f"-I{root / 'tools/util/include'}"]
            subprocess.run([nvcc, *flags, *include, "-o", str(scratch), str(FOLDER / self.source)], check=True)
            scratch.replace(target)
        return target


SM80 = Built("gemm_sm80.cu", "sm_80")
SM90 = Built("gemm_sm90.cu", "sm_90a", ("-DCLUSTER=1",))
SM90_CLUSTER = Built("gemm_sm90.cu", "sm_90a", ("-DCLUSTER=2",))
BUILDS = {"sm_80": SM80, "sm_90a": SM90, "sm_90a, clusters of 2": SM90_CLUSTER}
every_build = pytest.mark.parametrize("built", BUILDS.values(), ids=BUILDS.keys())
SHAPES = [(128, 64, 64), (8, 8, 8), (200, 136, 328), (64, 72, 1024)]


def operands(m: int, n: int, k: int, fill: str) -> tuple[Array, Array, Array]:
    """A [m, k] and B [n, k] as bfloat16 bits, and their exact product."""
    random = np.random.default_rng([m, n, k])
    draw = (lambda shape: random.integers(-3, 4, shape)) if fill == "integers" else random.standard_normal
    a, b = (emulator.to_bf16(np.asarray(draw(shape), np.float32)) for shape in ((m, k), (n, k)))
    return a, b, emulator.from_bf16(a).astype(np.float64) @ emulator.from_bf16(b).astype(np.float64).T


def caller(a: Array, b: Array, splits: int = 1) -> Callable[[emulator.Device, ctypes.CDLL], Array]:
    """A call of ``gemm`` that returns D."""

    def call(device: emulator.Device, library: ctypes.CDLL) -> Array:
        m, n, k = len(a), len(b), a.shape[1]
        one, two, out = device.array(a), device.array(b), device.empty((m, n), np.uint16)
        workspace = device.empty(1 << 20)
        status = library.gemm(m, n, k, splits, *(V(x.pointer) for x in (one, two, out, workspace)), None)
        assert status == 0
        return emulator.from_bf16(out.numpy())

    return call


@every_build
@pytest.mark.parametrize("landing", get_args(emulator.Landing))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gemm(built: Built, shape: tuple[int, int, int], landing: emulator.Landing) -> None:
    for fill in ("integers", "random"):
        a, b, exact = operands(*shape, fill)
        options = emulator.Options(landing=landing)
        report = emulator.run(built.library(), caller(a, b), arch=built.arch, options=options)
        assert report.hazards == ()
        if fill == "integers":
            np.testing.assert_array_equal(report.result, emulator.from_bf16(emulator.to_bf16(exact)))
        else:
            scale = (
                np.abs(emulator.from_bf16(a)).astype(np.float64) @ np.abs(emulator.from_bf16(b)).astype(np.float64).T
            )
            unit = np.exp2(np.floor(np.log2(np.abs(exact) + 1e-30)) - 7)
            assert (np.abs(report.result - exact) <= unit + 2.0**-23 * np.sqrt(shape[2]) * scale).all()
        m, n, k = shape
        assert sum(launch.counters.mma for launch in report.launches) >= m * n * k


def test_split_k_waits_for_its_neighbours() -> None:
    """Serial split-K: CTAs hand partial sums on through semaphores in global memory."""
    a, b, exact = operands(128, 64, 512, "integers")
    report = emulator.run(SM80.library(), caller(a, b, splits=4), arch="sm_80")
    assert report.hazards == ()
    wanted = np.abs(report.result - exact) <= 3 * np.exp2(np.floor(np.log2(np.abs(exact) + 1)) - 7)
    assert wanted.all()


def test_counters_do_not_depend_on_the_landing() -> None:
    a, b, _ = operands(128, 64, 256, "integers")
    counted = []
    for landing in get_args(emulator.Landing):
        options = emulator.Options(landing=landing)
        (launch,) = emulator.run(SM80.library(), caller(a, b), arch="sm_80", options=options).launches
        counted.append(launch.counters)
    assert counted[0] == counted[1] == counted[2]
    assert counted[0].mma == 128 * 64 * 256
    assert counted[0].global_bytes_written == 128 * 64 * 2


def survey(built: Built, shape: tuple[int, int, int]) -> emulator.Survey:
    a, b, exact = operands(*shape, "random")
    limit = 0.02 * np.abs(exact).max()
    options = emulator.Options(max_steps=20_000)

    def accept(found: Array) -> bool:
        return bool((np.abs(found - exact) <= limit).all())

    return emulator.mutate(built.library(), caller(a, b), accept, arch=built.arch, options=options)


def test_mutants_on_sm80_are_noticed() -> None:
    """The rest is redundant: a barrier before anything is shared, one of two in a row, a wait for no copies."""
    found = survey(SM80, (64, 64, 256))
    undetected = [site.text for site in found.undetected]
    assert found.detection >= 0.8, undetected
    assert set(undetected) <= {"bar.sync 0", "cp.async.wait_all"}


def test_mutants_on_sm90_are_noticed() -> None:
    """The rest is redundant at this shape.

    The producer's last waits (nobody fills those buffers again), an arrival that nobody waits for, a wgmma.fence after
    which no register was written, and the epilogue's waits for buffers that a tile of two parts does not use twice.
    """
    found = survey(SM90, (256, 64, 1024))
    undetected = [site.text for site in found.undetected]
    assert found.detection >= 0.5, undetected
    for needed in ("bar.sync 0", "wgmma.wait_group", "mbarrier.arrive.expect_tx", "fence.proxy"):
        assert not [text for text in undetected if text.startswith(needed)], undetected
