"""Registers and local memory of the kernel in a cubin: an ELF file whose section .nv.info lists attributes.

Attributes as `cuobjdump --dump-elf` names them: https://docs.nvidia.com/cuda/cuda-binary-utilities.
"""

from __future__ import annotations

import struct

_FRAME_SIZE, _REGISTERS = 0x11, 0x2F
#: How an attribute holds its value: none, one byte or two in its header, or as many bytes as those two say.
_SIZED = 4


def usage(cubin: bytes) -> dict[str, int]:
    """``registers`` a thread, and ``stack_bytes``: local memory, where spilled registers are, too."""
    found = dict(_attributes(_section(cubin, b".nv.info")))
    return {"registers": found[_REGISTERS], "stack_bytes": found.get(_FRAME_SIZE, 0)}


def _section(elf: bytes, wanted: bytes) -> bytes:
    """The content of a section of a 64-bit ELF file. Raises `LookupError`."""
    (offset,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, offset + size * i) for i in range(count)]
    table = headers[names][4]
    for name, _, _, _, start, length in headers:
        text = elf[table + name : elf.index(b"\0", table + name)]
        if text == wanted:
            return elf[start : start + length]
    raise LookupError(f"no section {wanted.decode()}")


def _attributes(info: bytes) -> list[tuple[int, int]]:
    """(attribute, value) of those that say one number of a symbol: of the one kernel."""
    found, at = [], 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _SIZED:
            if size == 8:
                found.append((attribute, struct.unpack_from("<II", info, at)[1]))
            at += size
    return found
