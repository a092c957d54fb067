"""Arenas need a C++ compiler; without one the tests of the others run."""

from __future__ import annotations

import ctypes
import gc
import subprocess
from collections.abc import Iterator
from ctypes import c_bool, c_int, c_size_t, c_void_p
from pathlib import Path

import pytest
import torch

from flashmla_build import compiler
from flashmla_ops.cpu import build
from flashmla_ops.errors import BuildError
from flashmla_ops.kv_cache import Arena

_SIGNATURES = {
    "raw_allocate": (c_void_p, [c_size_t]),
    "raw_deallocate": (None, [c_void_p]),
    "keeps_contract": (c_bool, [c_size_t]),
    "allocate_in_region": (c_int, [c_size_t, c_void_p]),
    "allocate_in_pool": (c_void_p, [c_size_t]),
    "allocate_in_thread": (c_void_p, [c_size_t]),
}


@pytest.fixture(scope="session")
def cxx() -> list[str]:
    """The C++ compiler."""
    try:
        return compiler(BuildError)
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def probe(cxx: list[str], tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """arena_probe.cpp: what only C++ can ask an allocator for."""
    target = tmp_path_factory.mktemp("probe") / "probe.so"
    source = Path(__file__).with_name("arena_probe.cpp")
    libraries = Path(torch.__file__).parent / "lib"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fopenmp", *build._torch_flags()]
    links = [f"-L{libraries}", "-ltorch_cpu", "-lc10"]
    subprocess.run([*cxx, *flags, "-o", str(target), str(source), *links], check=True)
    library = ctypes.CDLL(str(target))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@pytest.fixture
def arena() -> Iterator[Arena]:
    """An arena from which everything comes back."""
    arena = Arena("64MiB")
    yield arena
    torch._dynamo.reset()
    gc.collect()
    assert (arena.stats().blocks, arena.stats().deferred_blocks) == (0, 0)
