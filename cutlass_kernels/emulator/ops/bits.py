"""Shifts, bit fields, permutations and counts of bits."""

from __future__ import annotations

import numpy as np

from cutlass_kernels.emulator.ops.arithmetic import apply
from cutlass_kernels.emulator.ptx.syntax import Instruction
from cutlass_kernels.emulator.ptx.types import UNSIGNED, Value, bits, is_signed
from cutlass_kernels.emulator.registry import instruction
from cutlass_kernels.emulator.steps import Step
from cutlass_kernels.emulator.translate import Translator


@instruction("shl", kind="logic")
def _shl(t: Translator, item: Instruction) -> Step:
    width = bits(item.opcode[-1])
    kind = UNSIGNED[width].type

    def function(a: Value, amount: Value) -> Value:
        return np.where(amount >= width, kind(0), a << np.minimum(amount, np.uint32(width - 1)).astype(kind))

    return apply(t, item, function, (f"u{width}", "u32"))


@instruction("shr", kind="logic")
def _shr(t: Translator, item: Instruction) -> Step:
    kind = item.opcode[-1]
    width = bits(kind)

    def function(a: Value, amount: Value) -> Value:
        most = a >> np.minimum(amount, np.uint32(width - 1)).astype(a.dtype)
        return most if a.dtype.kind == "i" else np.where(amount >= width, a.dtype.type(0), most)

    return apply(t, item, function, (kind, "u32"))


@instruction("shf", kind="logic", accepts="l r wrap clamp")
def _shf(t: Translator, item: Instruction) -> Step:
    left, wrap = item.opcode[1] == "l", item.opcode[2] == "wrap"

    def function(low: Value, high: Value, amount: Value) -> Value:
        amount = (amount & np.uint32(31) if wrap else np.minimum(amount, np.uint32(32))).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
        shifted = (both << amount) >> np.uint64(32) if left else both >> amount
        return shifted.astype(np.uint32)

    return apply(t, item, function, ("u32", "u32", "u32"))


@instruction("bfe", kind="logic")
def _bfe(t: Translator, item: Instruction) -> Step:
    kind = item.opcode[-1]
    width = bits(kind)

    def function(a: Value, position: Value, length: Value) -> Value:
        start = (position & np.uint32(255)).astype(np.int64)
        count = (length & np.uint32(255)).astype(np.int64)
        pattern = a.astype(UNSIGNED[width]).astype(np.uint64)
        kept = np.minimum(count, 64).astype(np.uint64)
        mask = np.where(
            count >= 64, np.uint64(0xFFFFFFFFFFFFFFFF), (np.uint64(1) << (kept & np.uint64(63))) - np.uint64(1)
        )
        inside = start < width
        field = np.where(inside, pattern >> np.where(inside, start, 0).astype(np.uint64), np.uint64(0)) & mask
        if not is_signed(kind):
            return field.astype(a.dtype)
        # The sign is the field's top bit, or the operand's where the field reaches beyond it.
        top = np.minimum(start + count - 1, width - 1)
        negative = (count > 0) & ((pattern >> np.maximum(top, 0).astype(np.uint64)) & np.uint64(1)).astype(np.bool_)
        have = np.minimum(count, np.maximum(width - start, 0))
        above = np.where(
            have >= 64, np.uint64(0), np.uint64(0xFFFFFFFFFFFFFFFF) << np.minimum(have, 63).astype(np.uint64)
        )
        return np.where(negative, field | above, field).astype(UNSIGNED[width]).view(a.dtype)

    return apply(t, item, function, (kind, "u32", "u32"))


@instruction("bfi", kind="logic")
def _bfi(t: Translator, item: Instruction) -> Step:
    width = bits(item.opcode[-1])
    kind = UNSIGNED[width].type

    def function(a: Value, b: Value, position: Value, length: Value) -> Value:
        start = (position & np.uint32(255)).astype(np.uint64)
        count = (length & np.uint32(255)).astype(np.uint64)
        ones = np.where(
            count >= 64, np.uint64(0xFFFFFFFFFFFFFFFF), (np.uint64(1) << (count & np.uint64(63))) - np.uint64(1)
        )
        inside, shift = start < 64, start & np.uint64(63)
        mask = np.where(inside, ones << shift, np.uint64(0)).astype(kind)
        moved = np.where(inside, a.astype(np.uint64) << shift, np.uint64(0)).astype(kind)
        return (moved & mask) | (b & ~mask)

    return apply(t, item, function, (f"u{width}", f"u{width}", "u32", "u32"))


@instruction("bmsk", kind="logic", accepts="clamp wrap")
def _bmsk(t: Translator, item: Instruction) -> Step:
    wrap = "wrap" in item.opcode

    def function(a: Value, b: Value) -> Value:
        start, count = a.astype(np.uint64), b.astype(np.uint64)
        if wrap:
            start, count = start & np.uint64(31), count & np.uint64(31)
        start, count = np.minimum(start, np.uint64(32)), np.minimum(count, np.uint64(32))
        return ((((np.uint64(1) << count) - np.uint64(1)) << start) & np.uint64(0xFFFFFFFF)).astype(np.uint32)

    return apply(t, item, function, ("u32", "u32"))


@instruction("prmt", kind="logic")
def _prmt(t: Translator, item: Instruction) -> Step:
    if item.opcode[-1] != "b32":
        raise t.unsupported("a mode of prmt")

    def function(a: Value, b: Value, selectors: Value) -> Value:
        both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
        found = (a ^ a) | (b ^ b)
        for n in range(4):
            selector = (selectors >> np.uint32(4 * n)) & np.uint32(15)
            octet = (both >> ((selector & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
            sign = np.where(octet & np.uint64(128), np.uint64(255), np.uint64(0))
            octet = np.where(selector & np.uint32(8), sign, octet)
            found = found | (octet.astype(np.uint32) << np.uint32(8 * n))
        return found

    return apply(t, item, function, ("u32", "u32", "u32"))


@instruction("popc", kind="logic")
def _popc(t: Translator, item: Instruction) -> Step:
    return apply(t, item, lambda a: np.bitwise_count(a).astype(np.uint32), (f"u{bits(item.opcode[-1])}",))


def _length(a: Value) -> Value:
    """The number of bits up to the highest one that is set, from the exponents of exact halves."""
    high, low = a.astype(np.uint64) >> np.uint64(32), a.astype(np.uint64) & np.uint64(0xFFFFFFFF)
    upper, lower = np.frexp(high.astype(np.float64))[1], np.frexp(low.astype(np.float64))[1]
    return np.where(high > 0, upper + 32, lower).astype(np.int64)


@instruction("clz", kind="logic")
def _clz(t: Translator, item: Instruction) -> Step:
    width = bits(item.opcode[-1])
    return apply(t, item, lambda a: (width - _length(a)).astype(np.uint32), (f"u{width}",))


@instruction("bfind", kind="logic", accepts="shiftamt")
def _bfind(t: Translator, item: Instruction) -> Step:
    kind, shift = item.opcode[-1], "shiftamt" in item.opcode
    width = bits(kind)

    def function(a: Value) -> Value:
        pattern = np.where(a < 0, ~a, a).astype(UNSIGNED[width]) if is_signed(kind) else a
        place = _length(pattern) - 1
        found = width - 1 - place if shift else place
        return np.where(place < 0, -1, found).astype(np.int32)

    return apply(t, item, function, (kind,))


@instruction("brev", kind="logic")
def _brev(t: Translator, item: Instruction) -> Step:
    width = bits(item.opcode[-1])

    def function(a: Value) -> Value:
        octets = np.atleast_1d(a).copy().view(np.uint8).reshape(-1, width // 8)
        flipped = np.packbits(np.unpackbits(octets, axis=1, bitorder="little"), axis=1, bitorder="big")
        return np.ascontiguousarray(flipped[:, ::-1]).view(UNSIGNED[width])[:, 0]

    return apply(t, item, function, (f"u{width}",))
