"""Arenas: memory that serves torch's own allocations on the CPU, those of compiled code among them.

    arena = Arena("256MiB")
    with arena.allocator():
        y = model(x)  # what torch allocates here, and on threads that work for this one, lies in the arena

Large blocks are given by best fit, and neighbours that are free become one; small ones come in size classes. A tensor
may outlive the context and the arena: the memory goes back to the system with the last of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from flashmla_ops import errors
from flashmla_ops.cpu import allocator
from flashmla_ops.errors import ArenaUnavailableError, ArgumentError
from flashmla_ops.kv_cache.sizes import in_words, n_bytes

LARGEST = 1 << 42  # bytes: as many units as 32 bits count


@dataclass(frozen=True)
class ArenaStats:
    """An arena at one moment. Amounts are in bytes, blocks as large as what was taken for them."""

    size: int  # what it has now
    limit: int  # what it may grow to
    in_use: int
    peak: int  # the most that were in use, deferred ones included
    blocks: int  # that are in use
    largest_free: int
    free_blocks: int  # large ones
    deferred: int  # freed, and waiting for epochs to close
    deferred_blocks: int
    epochs: int  # that are open
    fallthroughs: int  # requests that torch's own allocator served, as the arena was full
    fallthrough_bytes: int

    @property
    def free(self) -> int:
        return self.size - self.in_use - self.deferred


class Arena:
    """Memory of a fixed size, or of one that grows up to a limit, for the tensors that torch allocates in a context.

    Any thread may use it, and the child of a fork goes on with a copy of its own.
    """

    def __init__(
        self,
        size: int | str,
        *,
        limit: int | str | None = None,
        huge_pages: bool = True,
        preallocate: bool = False,
        poison: bool = False,
    ) -> None:
        """``size`` bytes ("256MiB"); with a ``limit``, it grows by as much again when that does not suffice.

        Memory comes as it is first written, or now with ``preallocate``; on Linux in huge pages if ``huge_pages``.
        With ``poison``, blocks that come back are filled with NaN. Raises `ArgumentError`, and
        `ArenaUnavailableError` where there is no compiler, or the system does not grant the memory.
        """
        first = n_bytes("arena", "size", size)
        most = first if limit is None else n_bytes("arena", "limit", limit)
        if most > LARGEST:
            raise ArgumentError("arena", "size" if limit is None else "limit", f"at most {in_words(LARGEST)}", most)
        if most < first:
            raise ArgumentError("arena", "limit", f"at least the size, {first} bytes", most)
        self._library = allocator.library()
        growth = first if most > first else 0
        options = allocator.Options(first, most, growth, huge_pages, preallocate, poison)
        self._address: int | None = self._library.flashmla_arena_new(options)
        if self._address is None:
            raise ArenaUnavailableError(f"the system does not grant {in_words(most)} of memory")
        weakref.finalize(self, self._library.flashmla_arena_drop, self._address).atexit = False

    @contextlib.contextmanager
    def allocator(self, *, strict: bool = False, all_threads: bool = False) -> Iterator[None]:
        """Serve torch's CPU allocations from the arena, until the context is left. Contexts nest.

        It holds for this thread, and for those that work for it: of parallel regions, of autograd, of `torch.jit.fork`.
        Python's threads enter contexts of their own, or are served by one with ``all_threads`` wherever they have none.
        Where the arena is full, torch's own allocator serves and `stats` counts it; with ``strict``, torch raises
        `torch.OutOfMemoryError`, which leaves the context as `ArenaFullError`.
        """
        context = self._library.flashmla_arena_enter(self._address, strict, all_threads)
        try:
            with errors.typed():
                yield
        finally:
            self._library.flashmla_arena_leave(context)

    @contextlib.contextmanager
    def epoch(self) -> Iterator[None]:
        """Reuse nothing that is freed from now on, until this epoch and all older ones have closed."""
        number = self._library.flashmla_arena_open_epoch(self._address)
        try:
            yield
        finally:
            self._library.flashmla_arena_close_epoch(self._address, number)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros in the arena. Memory that was never handed out is zero as it is, and is not written.

        Raises `ArenaFullError`.
        """
        with self.allocator(strict=True):
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
        if tensor.numel():
            data = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage())
            data[: self._library.flashmla_arena_dirty()].zero_()
        return tensor

    def owns(self, tensor: Tensor) -> bool:
        """Whether the tensor's memory lies in this arena."""
        address = tensor.untyped_storage().data_ptr() if tensor.device.type == "cpu" else 0
        return address != 0 and self._library.flashmla_arena_of(address) == self._address

    def stats(self) -> ArenaStats:
        """Bytes and blocks in use, free and deferred, and those that went elsewhere."""
        found = allocator.Stats()
        self._library.flashmla_arena_stats(self._address, ctypes.byref(found))
        return ArenaStats(**{name: getattr(found, name) for name in allocator.Stats.NAMES})

    def explain(self) -> str:
        """The same in words."""
        now = self.stats()
        grows = f" (grows to {in_words(now.limit)})" if now.limit > now.size else ""
        waiting = f", {in_words(now.deferred)} wait for {now.epochs} open epochs" if now.deferred else ""
        elsewhere = (
            f"; {now.fallthroughs} requests of {in_words(now.fallthrough_bytes)} found no room and went to torch's own"
            " allocator"
            if now.fallthroughs
            else ""
        )
        return (
            f"arena of {in_words(now.size)}{grows}: {in_words(now.in_use)} in {now.blocks} blocks, peak"
            f" {in_words(now.peak)}{waiting}; largest free block {in_words(now.largest_free)}{elsewhere}"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Arena is memory of this process: it cannot be copied or pickled (its tensors can)")
