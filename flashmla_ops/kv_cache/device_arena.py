"""Arenas on CUDA devices: chunks of memory that serve torch's caching allocator through a `torch.cuda.MemPool`."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import weakref
from collections.abc import Iterator
from ctypes import POINTER, Structure, c_bool, c_char_p, c_int, c_size_t, c_uint64
from dataclasses import dataclass

import torch

from flashmla_ops.cpu import allocator, build
from flashmla_ops.errors import ArenaUnavailableError, ArgumentError
from flashmla_ops.kv_cache.sizes import in_words, n_bytes


@dataclass(frozen=True)
class DeviceArenaStats:
    """A device's arena at one moment, in bytes. Its blocks are the segments of torch's caching allocator."""

    size: int
    limit: int
    in_use: int
    peak: int
    blocks: int
    largest_free: int
    pending: int  # freed by torch, and waiting for what their streams were given
    pending_blocks: int
    refused: int  # requests for which there was no room


class _Stats(Structure):
    NAMES = ("size", "limit", "in_use", "peak", "blocks", "largest_free", "pending", "pending_blocks", "refused")
    _fields_ = tuple((name, c_uint64) for name in NAMES)


#: Results of flashmla_device_open.
_TAKEN, _REFUSED = 1, 2
_FUNCTIONS = {
    "flashmla_device_load": (c_bool, (c_char_p,)),
    "flashmla_device_open": (c_int, (c_int, c_size_t, c_size_t, c_size_t)),
    "flashmla_device_close": (None, (c_int,)),
    "flashmla_device_stats": (c_bool, (c_int, POINTER(_Stats))),
}


def libcudart() -> str:
    """The name of the CUDA runtime that torch has loaded. Raises `ArenaUnavailableError` if it has none."""
    if torch.version.cuda is None:
        raise ArenaUnavailableError("this torch was built without CUDA")
    return f"libcudart.so.{torch.version.cuda.split('.')[0]}"


@functools.cache
def library() -> ctypes.CDLL:
    """The allocator, bound to the CUDA runtime. Raises `ArenaUnavailableError`, which says why there is none."""
    name = libcudart()
    found = allocator.loaded(build.DEVICE_ALLOCATOR, _FUNCTIONS)
    if not found.flashmla_device_load(name.encode()):
        raise ArenaUnavailableError(f"{name} cannot be loaded, or lacks functions of the CUDA runtime API")
    return found


class DeviceArena:
    """Memory of a CUDA device for the tensors that torch allocates in a context. A device has at most one.

    Segments that torch's caching allocator frees are used again when an event that was recorded then has come.
    """

    def __init__(self, size: int | str, *, device: torch.device | str = "cuda", limit: int | str | None = None) -> None:
        """``size`` bytes now; with a ``limit``, it grows by as much again when that does not suffice.

        Raises `ArgumentError`, also for a device that has an arena, and `ArenaUnavailableError` without CUDA, without a
        compiler, or where the device has not so much memory.
        """
        first = n_bytes("device_arena", "size", size)
        most = first if limit is None else n_bytes("device_arena", "limit", limit)
        if most < first:
            raise ArgumentError("device_arena", "limit", f"at least the size, {first} bytes", most)
        place = torch.device(device)
        if place.type != "cuda":
            raise ArgumentError("device_arena", "device", "a CUDA device", place)
        self._library = library()
        self._index = torch.cuda.current_device() if place.index is None else place.index
        opened = self._library.flashmla_device_open(self._index, first, first, most)
        if opened == _TAKEN:
            raise ArgumentError("device_arena", "device", "a device without an arena, or tensors of one", place)
        if opened == _REFUSED:
            raise ArenaUnavailableError(f"{place} does not grant {in_words(first)} of memory")
        self._pools: list[torch.cuda.MemPool] = []
        self._finalizer = weakref.finalize(self, _close, self._pools, self._library, self._index)
        self._finalizer.atexit = False
        functions = torch.cuda.memory.CUDAPluggableAllocator(
            self._library._name, "flashmla_device_alloc", "flashmla_device_free"
        )
        self._pools.append(torch.cuda.MemPool(functions.allocator()))

    @contextlib.contextmanager
    def allocator(self) -> Iterator[None]:
        """Serve this thread's allocations on the device from the arena, until the context is left.

        Where it is full, torch raises `torch.OutOfMemoryError`.
        """
        with torch.cuda.use_mem_pool(self._pools[0], self._index):
            yield

    def stats(self) -> DeviceArenaStats:
        """Bytes in use, free and pending, after events have been asked."""
        found = _Stats()
        self._library.flashmla_device_stats(self._index, found)
        return DeviceArenaStats(**{name: getattr(found, name) for name in _Stats.NAMES})

    def explain(self) -> str:
        """The same in words."""
        now = self.stats()
        waiting = f", {in_words(now.pending)} wait for their streams" if now.pending else ""
        return (
            f"arena of {in_words(now.size)} on cuda:{self._index}: {in_words(now.in_use)} in {now.blocks} segments,"
            f" peak {in_words(now.peak)}{waiting}; largest free block {in_words(now.largest_free)}"
        )


def _close(pools: list[torch.cuda.MemPool], library: ctypes.CDLL, index: int) -> None:
    pools.clear()  # torch gives its segments back
    library.flashmla_device_close(index)
