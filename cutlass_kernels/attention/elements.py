"""Elements in global memory as float32, whatever their type: loaded, and stored rounded to nearest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cutlass import Float32, Uint32

from cutlass_kernels.attention import ptx
from cutlass_kernels.attention.around_config import ELEMENT_BYTES

Value = Any
SIGN = 0x80000000


def load(address: Value, dtype: str, count: int) -> list[Value]:
    """``count`` elements: 1, or a multiple of 16 bytes at a multiple of 16 bytes."""
    return floats(load_raw(address, dtype, count), dtype)[:count]


def load_raw(address: Value, dtype: str, count: int) -> list[Value]:
    """As `load`, in the words that they lie in."""
    size = ELEMENT_BYTES[dtype]
    if count == 1:
        return ptx.load_words(address, 1, 0, "b32" if size == 4 else "u16")
    return [word for at in range(0, count * size, 16) for word in ptx.load_words(address, 4, at)]


def floats(words: Sequence[Value], dtype: str) -> list[Value]:
    """The elements in words. The sign of a NaN is kept, which a conversion of the device need not do."""
    if dtype == "fp32":
        return [ptx.bits(word, Float32) for word in words]
    if dtype == "bf16":
        return [ptx.bits(half, Float32) for word in words for half in (word << 16, word & Uint32(0xFFFF0000))]
    return [_signed(half) for word in words for half in (word, word >> 16)]


def _signed(half: Value) -> Value:
    number = ptx.bits(ptx.half_to_float(half), Uint32)
    return ptx.bits((number & Uint32(SIGN - 1)) | ((half << 16) & Uint32(SIGN)), Float32)


def store(address: Value, values: Sequence[Value], dtype: str) -> None:
    """As many as `load` takes."""
    if dtype == "fp32":
        for at in range(0, len(values), 4):
            ptx.store(address, values[at : at + 4], "f32", 4 * at)
    elif len(values) == 1:
        ptx.store(address, [ptx.pack(values[0], values[0], dtype)], "b16")
    else:
        words = [ptx.pack(values[at], values[at + 1], dtype) for at in range(0, len(values), 2)]
        for at in range(0, len(words), 4):
            ptx.store(address, words[at : at + 4], "b32", 4 * at)


def load_own(address: Value, count: int) -> list[Value]:
    """float32 that an earlier launch, or this thread, has written: 1, or a multiple of four."""
    step = min(count, 4)
    return [value for at in range(0, count, step) for value in ptx.load_floats(address, step, 4 * at)]
