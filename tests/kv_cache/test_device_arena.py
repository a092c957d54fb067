"""Arenas of CUDA devices, on the mock of the CUDA runtime: no GPU, and streams that tests hold."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int, c_ssize_t, c_void_p
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cutlass_kernels.emulator.device import Device
from cutlass_kernels.emulator.runtime import build as mock
from cutlass_kernels.emulator.runtime.bridge import Bridge
from flashmla_ops.errors import ArenaUnavailableError, ArgumentError
from flashmla_ops.kv_cache import device_arena
from flashmla_ops.kv_cache.device_arena import DeviceArena

MIB = 1 << 20
MAIN, SIDE = c_void_p(16), c_void_p(32)  # streams


class Cuda:
    """The mock runtime, and the two functions that torch calls."""

    def __init__(self, runtime: ctypes.CDLL, library: ctypes.CDLL) -> None:
        self.runtime, self._alloc, self._free = runtime, library.flashmla_device_alloc, library.flashmla_device_free
        self._alloc.restype, self._alloc.argtypes = c_void_p, (c_ssize_t, c_int, c_void_p)
        self._free.restype, self._free.argtypes = None, (c_void_p, c_ssize_t, c_int, c_void_p)

    def alloc(self, n_bytes: int, stream: c_void_p = MAIN) -> int | None:
        found: int | None = self._alloc(n_bytes, 0, stream)
        return found

    def free(self, pointer: int | None, n_bytes: int, stream: c_void_p = MAIN) -> None:
        self._free(pointer, n_bytes, 0, stream)

    def hold(self, stream: c_void_p, held: bool = True) -> None:
        self.runtime.mock_hold_stream(stream, held)


class FakePool:
    """Stands in for torch.cuda.MemPool, which a torch without CUDA lacks: it gives its segments back when it goes."""

    def __init__(self, functions: Cuda) -> None:
        self.functions = functions
        self.segments: list[tuple[int | None, int]] = []

    def __del__(self) -> None:
        for pointer, n_bytes in self.segments:
            self.functions.free(pointer, n_bytes)


@pytest.fixture
def cuda(cxx: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    path = mock.build("libcudart.so.13")
    runtime = ctypes.CDLL(str(path))
    monkeypatch.setattr(device_arena, "libcudart", lambda: str(path))
    library = device_arena.library.__wrapped__()
    monkeypatch.setattr(device_arena, "library", lambda: library)
    functions = Cuda(runtime, library)

    @contextmanager
    def use(pool: FakePool, device: int) -> Iterator[None]:
        assert device == 0
        pool.segments.append((functions.alloc(2 * MIB), 2 * MIB))
        yield

    def pluggable(path: str, alloc: str, free: str) -> Any:
        assert getattr(ctypes.CDLL(path), alloc)
        assert getattr(ctypes.CDLL(path), free)
        return SimpleNamespace(allocator=lambda: functions)

    monkeypatch.setattr(torch.cuda.memory, "CUDAPluggableAllocator", pluggable)
    monkeypatch.setattr(torch.cuda, "MemPool", FakePool)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", use)
    before = runtime.mock_synchronisations()
    with Bridge(Device(memory=64 * MIB)).serving(runtime):
        yield functions
    assert runtime.mock_synchronisations() == before  # nothing ever waits


@pytest.fixture
def arena(cuda: Cuda) -> Iterator[DeviceArena]:
    arena = DeviceArena("16MiB", device="cuda:0")
    yield arena
    arena._finalizer()  # pytest may hold it longer


def test_segments_come_from_the_arena(arena: DeviceArena) -> None:
    with arena.allocator():
        pass
    stats = arena.stats()
    assert (stats.size, stats.in_use, stats.blocks) == (16 * MIB, 2 * MIB, 1)
    assert arena.explain() == "arena of 16 MiB on cuda:0: 2 MiB in 1 segments, peak 2 MiB; largest free block 14 MiB"


@pytest.mark.parametrize("n_bytes", [1, 512, 2 * MIB, 5_000_000])
def test_addresses_are_aligned_and_apart(cuda: Cuda, arena: DeviceArena, n_bytes: int) -> None:
    pointers = [cuda.alloc(n_bytes) for _ in range(3)]
    assert all(pointer is not None and pointer % 512 == 0 for pointer in pointers)
    ordered = sorted(pointer for pointer in pointers if pointer)
    assert all(second - first >= n_bytes for first, second in pairwise(ordered))
    for pointer in pointers:
        cuda.free(pointer, n_bytes)
    assert arena.stats().largest_free == 16 * MIB


def test_a_block_waits_for_its_stream(cuda: Cuda, arena: DeviceArena) -> None:
    block = cuda.alloc(10 * MIB)
    cuda.hold(MAIN)
    cuda.free(block, 10 * MIB)
    assert (arena.stats().pending, arena.stats().in_use) == (10 * MIB, 0)
    assert "10 MiB wait for their streams" in arena.explain()
    assert cuda.alloc(10 * MIB) is None  # at once
    assert arena.stats().refused == 1
    cuda.hold(MAIN, False)
    assert cuda.alloc(10 * MIB) == block
    cuda.free(block, 10 * MIB)


def test_streams_do_not_wait_for_each_other(cuda: Cuda, arena: DeviceArena) -> None:
    first, second = cuda.alloc(6 * MIB, MAIN), cuda.alloc(6 * MIB, SIDE)
    cuda.hold(MAIN)
    cuda.free(first, 6 * MIB, MAIN)
    cuda.free(second, 6 * MIB, SIDE)
    assert arena.stats().pending_blocks == 1
    again = cuda.alloc(6 * MIB, MAIN)
    assert again == second
    cuda.free(again, 6 * MIB, SIDE)
    cuda.hold(MAIN, False)
    assert arena.stats().pending_blocks == 0


def test_only_what_came_before_the_free_is_waited_for(cuda: Cuda, arena: DeviceArena) -> None:
    first, second = cuda.alloc(2 * MIB), cuda.alloc(2 * MIB)
    cuda.free(first, 2 * MIB)
    cuda.hold(MAIN)
    cuda.free(second, 2 * MIB)
    assert arena.stats().pending_blocks == 1
    cuda.hold(MAIN, False)


def test_while_a_graph_is_captured(cuda: Cuda, arena: DeviceArena) -> None:
    block = cuda.alloc(10 * MIB)
    cuda.runtime.mock_capture(MAIN, True)
    cuda.free(block, 10 * MIB)
    assert cuda.alloc(10 * MIB, SIDE) is None
    small = cuda.alloc(2 * MIB)
    assert small is not None
    cuda.runtime.mock_capture(MAIN, False)
    assert cuda.alloc(10 * MIB) == block
    for pointer, n_bytes in ((block, 10 * MIB), (small, 2 * MIB)):
        cuda.free(pointer, n_bytes)


def test_refusals_leave_no_error_behind(cuda: Cuda, arena: DeviceArena) -> None:
    block = cuda.alloc(16 * MIB)
    cuda.hold(MAIN)
    cuda.free(block, 16 * MIB)
    assert cuda.alloc(MIB) is None
    assert cuda.runtime.cudaGetLastError() == 0
    cuda.hold(MAIN, False)


def test_it_grows_by_chunks_up_to_its_limit(cuda: Cuda) -> None:
    arena = DeviceArena("4MiB", device="cuda:0", limit="20MiB")
    held = [cuda.alloc(3 * MIB) for _ in range(3)]
    assert None not in held
    assert arena.stats().size == 12 * MIB
    large = cuda.alloc(7 * MIB)
    assert large is not None
    assert cuda.alloc(2 * MIB) is None
    for pointer in (*held, large):
        cuda.free(pointer, 0)
    assert arena.stats().blocks == 0


def test_memory_goes_back_with_the_arena(cuda: Cuda) -> None:
    frees, events = cuda.runtime.mock_frees(), cuda.runtime.mock_live_events()
    for _ in range(3):
        arena = DeviceArena("4MiB", device="cuda:0", limit="8MiB")
        with arena.allocator(), arena.allocator():
            pass
        cuda.free(cuda.alloc(4 * MIB), 4 * MIB)
        with pytest.raises(ArgumentError, match="a device without an arena"):
            DeviceArena("4MiB", device="cuda:0")
        del arena
        gc.collect()
    assert cuda.runtime.mock_frees() == frees + 3 * 2
    assert cuda.runtime.mock_live_events() == events


def test_an_arena_whose_blocks_are_pending_goes_later(cuda: Cuda) -> None:
    arena = DeviceArena("4MiB", device="cuda:0")
    block = cuda.alloc(MIB)
    cuda.hold(MAIN)
    cuda.free(block, MIB)
    del arena
    gc.collect()
    with pytest.raises(ArgumentError, match="or tensors of one"):
        DeviceArena("4MiB", device="cuda:0")
    cuda.hold(MAIN, False)
    assert DeviceArena("8MiB", device="cuda:0").stats().size == 8 * MIB


def test_what_makes_no_sense(cuda: Cuda) -> None:
    with pytest.raises(ArgumentError, match="argument 'device': expected a CUDA device"):
        DeviceArena("4MiB", device="cpu")
    with pytest.raises(ArgumentError, match="argument 'limit'"):
        DeviceArena("4MiB", device="cuda:0", limit="1MiB")
    with pytest.raises(ArenaUnavailableError, match="cuda:0 does not grant 1 GiB of memory"):
        DeviceArena("1GiB", device="cuda:0")


def test_nothing_is_left_where_torch_makes_no_pool(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(_: object) -> None:
        raise RuntimeError("no driver")

    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "MemPool", no_driver)
        with pytest.raises(RuntimeError, match="no driver"):
            DeviceArena("4MiB", device="cuda:0")
    gc.collect()
    assert DeviceArena("4MiB", device="cuda:0").stats().size == 4 * MIB


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_without_cuda() -> None:
    with pytest.raises(ArenaUnavailableError, match="built without CUDA"):
        DeviceArena("1MiB", device="cuda:0")
