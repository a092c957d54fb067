"""Tensor maps: what cuTensorMapEncodeTiled makes and TMA instructions read.

A device's 128 bytes are opaque; ours carry the arguments under a magic number, as only the emulator reads them. The
rules are those of the CUDA driver API reference for cuTensorMapEncodeTiled.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from cutlass_kernels.emulator.errors import LaunchError
from cutlass_kernels.emulator.machine.clocks import Ints
from cutlass_kernels.emulator.ptx.types import Array

SIZE = 128
_MAGIC = 0x50414D54
_FORMAT = struct.Struct("<IBBBBQ5Q4Q5H5H")
#: Bytes of an element by CUtensorMapDataType: u8, u16, u32, s32, u64, s64, f16, f32, f64, bf16, f32 ftz, tf32, tf32
#: ftz.
_ELEMENT = (1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4)
_FLOATS = (6, 7, 8, 9, 10, 11, 12)


@dataclass(frozen=True)
class TensorMap:
    """``sizes``, ``box`` and ``steps`` (element strides) innermost first; ``strides`` in bytes from the second on.

    ``swizzle``: 0 none, 1, 2, 3 for 32, 64 and 128 bytes. ``nan``: fill with NaN outside of the tensor, not zero.
    """

    kind: int
    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]
    swizzle: int
    nan: bool = False

    @property
    def element(self) -> int:
        """Bytes of an element."""
        return _ELEMENT[self.kind]

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.sizes)

    def check(self) -> None:
        """Raises `LaunchError` where cuTensorMapEncodeTiled would refuse."""
        rules = (
            (0 <= self.kind < len(_ELEMENT), f"data type {self.kind}"),
            (1 <= self.rank <= 5, f"rank {self.rank}"),
            (self.address % 16 == 0, f"address {self.address:#x} off 16 bytes"),
            (all(0 < size <= 1 << 32 for size in self.sizes), f"sizes {self.sizes}"),
            (all(s % 16 == 0 and s < 1 << 40 for s in self.strides), f"strides {self.strides} (multiples of 16 bytes)"),
            (all(0 < extent <= 256 for extent in self.box), f"box {self.box} (1 to 256)"),
            (all(1 <= step <= 8 for step in self.steps), f"element strides {self.steps}"),
            (0 <= self.swizzle <= 3, f"swizzle {self.swizzle}"),
        )
        for holds, what in rules:
            if not holds:
                raise LaunchError(f"cuTensorMapEncodeTiled does not take {what}")
        inner = self.box[0] * self.element
        if inner % 16:
            raise LaunchError(f"cuTensorMapEncodeTiled does not take an inner box of {inner} bytes (a multiple of 16)")
        if self.swizzle and inner > 16 << self.swizzle:
            raise LaunchError(f"an inner box of {inner} bytes is wider than the swizzle of {16 << self.swizzle}")
        if any(step != 1 for step in self.steps):
            raise LaunchError(f"element strides {self.steps}: only 1 is modelled")

    def encode(self) -> bytes:
        """The 128 bytes."""
        filled = (*self.sizes, *(1,) * (5 - self.rank)), (*self.strides, *(0,) * (5 - self.rank))
        box, steps = (*self.box, *(1,) * (5 - self.rank)), (*self.steps, *(1,) * (5 - self.rank))
        flags = self.swizzle | (int(self.nan) << 4)
        head = (_MAGIC, self.kind, self.rank, flags, 0, self.address)
        return _FORMAT.pack(*head, *filled[0], *filled[1][:4], *box, *steps).ljust(SIZE, b"\0")

    @classmethod
    def decode(cls, raw: bytes) -> TensorMap | None:
        """The map in 128 bytes, or None if they are none."""
        magic, kind, rank, flags, _, address, *rest = _FORMAT.unpack_from(raw)
        if magic != _MAGIC:
            return None
        sizes, strides, box, steps = rest[:5], rest[5:9], rest[9:14], rest[14:19]
        return cls(
            kind,
            address,
            tuple(sizes[:rank]),
            tuple(strides[: rank - 1]),
            tuple(box[:rank]),
            tuple(steps[:rank]),
            flags & 15,
            bool(flags >> 4),
        )

    @property
    def box_bytes(self) -> int:
        """Bytes that a copy moves into or out of shared memory."""
        return int(np.prod(self.box)) * self.element

    def offsets(self, start: tuple[int, ...]) -> tuple[Ints, Array]:
        """Byte offset in the tensor of each element of a box at ``start``, and which elements lie inside."""
        offset: Ints = np.zeros((1,) * self.rank, np.int64)
        inside: Array = np.ones((1,) * self.rank, np.bool_)
        for axis, stride in enumerate((self.element, *self.strides)):
            shape = [1] * self.rank
            shape[self.rank - 1 - axis] = self.box[axis]
            index = (start[axis] + np.arange(self.box[axis], dtype=np.int64)).reshape(shape)
            offset = offset + index * stride
            inside = inside & (index >= 0) & (index < self.sizes[axis])
        full = tuple(reversed(self.box))
        return np.broadcast_to(offset, full).ravel(), np.broadcast_to(inside, full).ravel()

    def outside(self) -> int:
        """The bits of an element outside of the tensor."""
        return (
            {2: 0x7FFF, 4: 0x7FFFFFFF, 8: 0x7FFFFFFFFFFFFFFF}[self.element] if self.nan and self.kind in _FLOATS else 0
        )


def swizzled(offsets: Ints, swizzle: int) -> Ints:
    """Shared-memory bytes after the 16-byte chunks of each row of 32, 64 or 128 bytes have been exchanged."""
    return offsets ^ (((offsets >> 7) & ((1 << swizzle) - 1)) << 4) if swizzle else offsets
