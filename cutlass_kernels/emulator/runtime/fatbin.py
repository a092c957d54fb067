"""The PTX in a fatbin, as nvcc embeds it in host code and hands it to the runtime when a library is loaded.

The format is not documented; what is read here: a header (magic 0xBA55ED50, version, header size, payload size), then
entries of a kind (1: PTX), header size, padded size, and for compressed ones the sizes and a flag for LZ4 or zstd.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import struct
from collections.abc import Iterator

from cutlass_kernels.emulator.errors import NoPtx

_MAGIC, _PTX = 0xBA55ED50, 1
_LZ4, _ZSTD = 0x2000, 0x8000
_HEADER = struct.Struct("<IHHQ")


def size_of(header: bytes) -> int:
    """Bytes of a whole fatbin, from its first 16. Raises `NoPtx` for anything else."""
    magic, _, header_size, payload = _HEADER.unpack_from(header)
    if magic != _MAGIC:
        raise NoPtx(f"a fatbin begins with {_MAGIC:#x}, this with {magic:#x}")
    return int(header_size + payload)


def ptx_of(fatbin: bytes) -> list[str]:
    """Every PTX text in a fatbin, unpacked; an empty list if it holds machine code only."""
    return [_unpack(fatbin, start) for kind, start in _entries(fatbin) if kind == _PTX]


def embedded(library: bytes) -> list[str]:
    """Every PTX text in the fatbins of a library's file."""
    found, position, mark = [], 0, struct.pack("<I", _MAGIC)
    while (position := library.find(mark, position)) >= 0:
        size = size_of(library[position : position + _HEADER.size])
        if position + size <= len(library):
            found += ptx_of(library[position : position + size])
        position += 4
    return found


def _entries(fatbin: bytes) -> Iterator[tuple[int, int]]:
    _, _, position, _ = _HEADER.unpack_from(fatbin)
    while position + 64 <= len(fatbin):
        kind, _, header_size, padded = struct.unpack_from("<HHIQ", fatbin, position)
        yield kind, position
        position += header_size + padded


def _unpack(fatbin: bytes, start: int) -> str:
    header_size, padded = struct.unpack_from("<IQ", fatbin, start + 4)
    (packed,) = struct.unpack_from("<I", fatbin, start + 16)
    (flags,) = struct.unpack_from("<Q", fatbin, start + 40)
    (size,) = struct.unpack_from("<Q", fatbin, start + 56)
    body = fatbin[start + header_size : start + header_size + padded]
    if flags & _ZSTD:
        body = _zstd(body[:packed], size)
    elif flags & _LZ4:
        body = _lz4(body[:packed], size)
    return body.rstrip(b"\0").decode()


def _zstd(body: bytes, size: int) -> bytes:
    """Python's own module from 3.14 on, else the system's libzstd."""
    try:
        return bytes(importlib.import_module("compression.zstd").decompress(body))
    except ImportError:
        pass
    name = ctypes.util.find_library("zstd")
    if name is None:
        raise NoPtx(
            "the PTX is compressed with zstd, and neither Python 3.14 nor libzstd is here to unpack it: compile with"
            " nvcc --compress-mode=none"
        )
    library = ctypes.CDLL(name)
    library.ZSTD_decompress.restype = ctypes.c_size_t
    out = ctypes.create_string_buffer(size)
    written = library.ZSTD_decompress(out, ctypes.c_size_t(size), body, ctypes.c_size_t(len(body)))
    if written != size:
        raise NoPtx(f"the PTX unpacks to {written} bytes instead of {size}")
    return out.raw


def _lz4(body: bytes, size: int) -> bytes:
    """An LZ4 block, by the package lz4."""
    try:
        block = importlib.import_module("lz4.block")
    except ImportError:
        raise NoPtx(
            "the PTX is compressed with LZ4, and no package lz4 is here to unpack it: pip install lz4, or compile with"
            " nvcc --compress-mode=none"
        ) from None
    try:
        plain = bytes(block.decompress(body, uncompressed_size=size))
    except block.LZ4BlockError as error:
        raise NoPtx(f"the PTX is damaged: {error}") from error
    if len(plain) != size:
        raise NoPtx(f"the PTX unpacks to {len(plain)} bytes instead of {size}")
    return plain
