"""Tests of compiled kernels share one thing: the smoke list, built once."""

from __future__ import annotations

import pytest

from cutlass_kernels.build import libraries, toolchain
from cutlass_kernels.build.libraries import Built
from cutlass_kernels.errors import MissingToolError
from cutlass_kernels.gemm.catalogue import smoke
from cutlass_kernels.gemm.config import GemmConfig


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skips where nothing can be built."""
    pytest.importorskip("cutlass_library", reason="nvidia-cutlass is not installed")
    try:
        toolchain.nvcc()
    except MissingToolError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def built(compiler: None) -> dict[GemmConfig, Built]:
    return dict(zip(smoke(), libraries.build(smoke(), quiet=True), strict=True))
