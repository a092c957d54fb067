"""A flat memory with one state byte for each data byte: allocated, written."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cutlass_kernels.emulator.ptx.types import UNSIGNED, Array

ALLOCATED, WRITTEN = 1, 2
_ALIGNMENT = 1024

Offsets = NDArray[np.int64]


def _aligned_bytes(size: int) -> NDArray[np.uint8]:
    """Zeroed bytes at an aligned address; untouched pages cost nothing."""
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size]


class Memory:
    """``size`` bytes. Offsets are int64 arrays, one for each access, aligned to the access."""

    def __init__(self, size: int) -> None:
        self.size = -(-max(size, 16) // 16) * 16
        self.data = _aligned_bytes(self.size)
        self.state = np.zeros(self.size, np.uint8)
        self._data = {width // 8: self.data.view(kind) for width, kind in UNSIGNED.items()}
        self._state = {width // 8: self.state.view(kind) for width, kind in UNSIGNED.items()}
        self._pairs = self._state[8].reshape(-1, 2)

    def read(self, offsets: Offsets, width: int, count: int) -> Array:
        """``count`` elements of ``width`` bytes at each offset: [accesses, count], unsigned."""
        words = self._data[width]
        if count == 1:
            return words[offsets // width][:, None]
        return np.asarray(words.reshape(-1, count)[offsets // (width * count)])

    def write(self, offsets: Offsets, width: int, values: Array) -> None:
        """Store [accesses, count] elements. Of two lanes with one address, the later one wins."""
        count = values.shape[1]
        words = self._data[width]
        if count == 1:
            words[offsets // width] = values[:, 0]
        else:
            words.reshape(-1, count)[offsets // (width * count)] = values
        self._mark(offsets, width * count)

    def _mark(self, offsets: Offsets, size: int) -> None:
        value = int.from_bytes(bytes([ALLOCATED | WRITTEN] * min(size, 8)), "little")
        if size == 16:
            self._pairs[offsets // 16] = value
        else:
            self._state[size][offsets // size] = value

    def without(self, flag: int, offsets: Offsets, size: int) -> NDArray[np.bool_] | None:
        """Which accesses of ``size`` bytes touch a byte whose state lacks ``flag``; None if none does."""
        wanted = int.from_bytes(bytes([flag] * min(size, 8)), "little")
        found: NDArray[Any] = self._pairs[offsets // 16] if size == 16 else self._state[size][offsets // size]
        missing = (found & found.dtype.type(wanted)) != wanted
        if size == 16:
            missing = missing.any(axis=1)
        return missing if missing.any() else None

    def forget(self, offsets: Offsets, size: int) -> None:
        """Count bytes as not written."""
        self.state[offsets[:, None] + np.arange(size)] = ALLOCATED

    def write_bytes(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Store contiguous bytes and mark them written."""
        self.data[offset : offset + data.size] = data
        self.state[offset : offset + data.size] = ALLOCATED | WRITTEN


class Heap:
    """Global memory: allocations in a `Memory`, at real addresses of this process, so that host code can touch them."""

    GUARD = 512

    def __init__(self, size: int) -> None:
        self.memory = Memory(size)
        self.base = self.memory.data.ctypes.data
        self.top = _ALIGNMENT

    def allocate(self, size: int, alignment: int = 256) -> int:
        """The address of ``size`` bytes, never written. Raises MemoryError when the heap is full."""
        start = -(-self.top // alignment) * alignment
        if start + size + self.GUARD > self.memory.size:
            raise MemoryError(
                f"the emulated device has {self.memory.size} bytes, {self.top} of them in use; {size} more"
            )
        self.memory.state[start : start + size] = ALLOCATED
        self.top = start + size + self.GUARD
        return self.base + start

    def offset(self, address: int) -> int:
        """Offset in the memory of an address."""
        return address - self.base

    def holds(self, address: int, size: int) -> bool:
        """Whether a range lies in allocated memory."""
        start = address - self.base
        inside = start >= 0 and start + size <= self.memory.size
        return inside and bool((self.memory.state[start : start + size] & ALLOCATED).all())
