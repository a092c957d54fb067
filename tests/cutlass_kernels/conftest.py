"""Tests of compiled kernels share one thing: the smoke list, built once."""

from __future__ import annotations

from pathlib import Path

import pytest

from cutlass_kernels.build import libraries, toolchain
from cutlass_kernels.build.libraries import Built
from cutlass_kernels.errors import MissingToolError
from cutlass_kernels.gemm.catalogue import smoke
from cutlass_kernels.gemm.config import GemmConfig


@pytest.fixture(scope="session")
def own_runtime() -> None:
    """Skips where this process has the CUDA runtime of another, which kernels find in place of the emulator's."""
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcudart" in line}
    if loaded := [path for path in mapped if "nvidia" in path or "torch" in path]:
        pytest.skip(f"a build of torch for CUDA has loaded {loaded[0]}")


@pytest.fixture(scope="session")
def compiler(own_runtime: None) -> None:
    """Skips where nothing can be built, or be run."""
    pytest.importorskip("cutlass_library", reason="nvidia-cutlass is not installed")
    try:
        toolchain.nvcc()
    except MissingToolError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def built(compiler: None) -> dict[GemmConfig, Built]:
    return dict(zip(smoke(), libraries.build(smoke(), quiet=True), strict=True))
