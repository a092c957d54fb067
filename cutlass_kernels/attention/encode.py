"""Elements to the codes of a row format, bit for bit as its definition in `flashmla_ops.formats` has it.

A warp encodes a row; a lane has eight neighbouring elements at a time, and the lanes of a group find its scale by
shuffles. Divisions are rounded to nearest and numbers that are subnormal are kept, so that float32 gives what float64
does: scales of e4m3 are powers of two, and the other formats are defined in float32.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, Uint32, const_expr, cute, range_constexpr

from cutlass_kernels.attention import elements, ptx
from cutlass_kernels.attention.around_config import ELEMENT_BYTES, AppendConfig
from cutlass_kernels.attention.config import Codes

#: Bits of float32: infinity, the canonical NaN and the least normal number.
INFINITY, NAN, LEAST = 0x7F800000, 0x7FC00000, 0x00800000
#: The NaN of e4m3, and that of bfloat16 which formats hold.
E4M3_NAN, BF16_NAN = 0x7F, 0x7FC0
#: Elements of a lane.
UNIT = 8
Value = Any


class Encoder:
    """The encoding of a configuration's codes."""

    def __init__(self, config: AppendConfig, codes: Codes) -> None:
        self.codes, self.dtype, self.aligned = codes, config.dtype, config.width == 16
        self.least = 127 + config.least_exponent
        self.size = ELEMENT_BYTES[config.dtype]
        self.scale_bytes = 4 if codes.scale == "float32" else 1
        #: Lanes of a group.
        self.lanes = codes.group // UNIT

    @cute.jit
    def write(self, a: Any, source: Int64, page: Int64, offset: Int32, lane: Int32) -> None:
        """All heads of a row to a place of the page at an address; ``a``: the arguments of `append`."""
        c = self.codes
        to = page + Int64(offset) * a.cache_row
        scales = to + c.scales_at
        if const_expr(c.tail > 0):
            scales = page + Int64(a.page_size) * c.head + Int64(offset) * c.tail
        for head in cutlass.range(a.heads, unroll=1):
            shift = Int64(head) * a.cache_head
            self.encode(source + Int64(head) * a.head, to + shift, scales + shift, lane)

    @cute.jit
    def encode(self, source: Int64, to: Int64, scales: Int64, lane: Int32) -> None:
        """A row; ``scales``: where its scales go."""
        c = self.codes
        units = c.values // UNIT
        # Lanes past the end have the last unit again, and store nothing.
        raw = []
        for first in range_constexpr(0, units, 32):
            unit = cutlass.min(first + lane, units - 1)
            raw.append(elements.load_raw(source + Int64(unit) * (UNIT * self.size), self.dtype, UNIT))
        for first in range_constexpr(0, units, 32):
            unit = first + lane
            words, scale = self.unit(elements.floats(raw[first // 32], self.dtype))
            if unit < units:
                self.store(to + Int64(unit) * c.bits, words)
                if unit % self.lanes == 0:
                    self.store_scale(scales + Int64(unit // self.lanes) * self.scale_bytes, scale)
        if const_expr(c.rope > 0):
            self.rotary(source + c.values * self.size, to + c.rope_at, lane)
        if const_expr(c.tail > 0):
            self.pad(scales, lane)

    @cute.jit
    def rotary(self, source: Int64, to: Int64, lane: Int32) -> None:
        """In bfloat16, every NaN with the same bits."""
        if lane < self.codes.rope // UNIT:
            x = elements.load(source + Int64(lane) * (UNIT * self.size), self.dtype, UNIT)
            self.store(to + Int64(lane) * (2 * UNIT), [bf16_pair(x[at], x[at + 1]) for at in range(0, UNIT, 2)])

    @cute.jit
    def pad(self, scales: Int64, lane: Int32) -> None:
        """Zeros behind the scales."""
        if lane == 0:
            for at in range_constexpr(self.codes.values // self.codes.group * self.scale_bytes, self.codes.tail):
                ptx.store(scales, [Uint32(0)], "b8", at)

    def unit(self, x: list[Value]) -> tuple[list[Value], Value]:
        """The words of a lane's codes, and the scale of its group in bits."""
        size = [ptx.bits(value, Int32) & Int32(elements.SIGN - 1) for value in x]
        if self.codes.code == "e4m3":
            codes, scale = self.e4m3(x, self.largest([self.finite(each) for each in size]))
        else:
            largest = self.largest(size)
            whole = largest < INFINITY  # no element is NaN or infinite
            encode = self.e2m1 if self.codes.code == "e2m1" else self.integers
            codes, scale = encode(x, ptx.bits(largest, Float32), whole)
        each = 32 // self.codes.bits
        words = []
        for at in range(0, UNIT, each):
            word = codes[at]
            for i in range(1, each):
                word = word | (codes[at + i] << (i * self.codes.bits))
            words.append(word)
        return words, scale

    @cute.jit
    def finite(self, size: Int32) -> Int32:
        return size if size < INFINITY else Int32(0)

    def largest(self, size: list[Value]) -> Value:
        """The largest of a group, of float32 that are not negative, by their bits."""
        found = size[0]
        for each in size[1:]:
            found = cutlass.max(found, each)
        for d in range(self.lanes.bit_length() - 1):
            found = cutlass.max(found, cute.arch.shuffle_sync_bfly(found, 1 << d))
        return found

    # Codes and scale of a group

    @cute.jit
    def e4m3(self, x: list[Value], largest: Int32) -> tuple[list[Value], Uint32]:
        """448 is 7/8 of 2 ** 9: the exponent is one more where the mantissa is above that."""
        exponent = cutlass.max(((largest + Int32(0x1FFFFF)) >> 23) - 8, Int32(self.least))
        inverse = ptx.bits((254 - exponent) << 23, Float32)
        codes = [nearest_e4m3(ptx.bits(value, Uint32), ptx.bits(value * inverse, Uint32)) for value in x]
        return codes, Uint32(exponent) if const_expr(self.scale_bytes == 1) else Uint32(exponent << 23)

    @cute.jit
    def integers(self, x: list[Value], largest: Float32, whole: cutlass.Boolean) -> tuple[list[Value], Uint32]:
        most = 2 ** (self.codes.bits - 1) - 1
        scale = ptx.maximum(ptx.quotient(largest, Float32(most)), ptx.bits(Uint32(LEAST), Float32))
        mask = Uint32(2**self.codes.bits - 1) if whole else Uint32(0)
        # Of numbers that are much smaller, remainders would not be exact.
        larger = Float32(2.0**80) if scale < 2.0**-40 else Float32(1.0)
        quotients = divided([value * larger for value in x], scale * larger)
        codes = [Uint32(ptx.nearest(each)) & mask for each in quotients]
        return codes, ptx.bits(scale, Uint32) if whole else Uint32(NAN)

    @cute.jit
    def e2m1(self, x: list[Value], largest: Float32, whole: cutlass.Boolean) -> tuple[list[Value], Uint32]:
        """The scale is the least positive e4m3 number that is no less than a sixth of the largest, or the largest."""
        code = ceiling_e4m3(ptx.quotient(largest, Float32(6.0)))
        scale = e4m3_number(code)
        mask = Uint32(15) if whole else Uint32(0)
        bits = [ptx.bits(value, Uint32) for value in x]
        codes = [nearest_e2m1(sign, each) & mask for sign, each in zip(bits, divided(x, scale), strict=True)]
        return codes, code if whole else Uint32(E4M3_NAN)

    # Stores

    def store(self, to: Value, words: list[Value]) -> None:
        if self.aligned:
            ptx.store(to, words, "b32")
        else:
            for at, word in enumerate(words):
                self.store_bytes(to, word, 4 * at)

    def store_scale(self, to: Value, scale: Value) -> None:
        if self.scale_bytes == 1:
            ptx.store(to, [scale], "b8")
        elif self.aligned:
            ptx.store(to, [scale], "b32")
        else:
            self.store_bytes(to, scale, 0)

    def store_bytes(self, to: Value, word: Value, at: int) -> None:
        for i in range(4):
            ptx.store(to, [word >> (8 * i)], "b8", at + i)


def divided(x: list[Value], scale: Value) -> list[Value]:
    """Quotients, rounded to nearest where they matter: of numbers no less than a hundredth of the scale.

    One division serves all. A quotient within a unit of its last place becomes the nearest one by its remainder, which
    is exact: P. Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor" (1990).
    """
    inverse = ptx.quotient(Float32(1.0), scale)
    found = [value * inverse for value in x]
    for _ in range(2):  # the first brings it within a unit
        rests = [ptx.multiply_add(-each, scale, value) for each, value in zip(found, x, strict=True)]
        found = [ptx.multiply_add(rest, inverse, each) for rest, each in zip(rests, found, strict=True)]
    return found


@cute.jit
def nearest_e4m3(bits: Uint32, scaled: Uint32) -> Uint32:
    """The code of ``scaled``, at most 448 or no number, under the sign of ``bits``; ties to even. Both are float32."""
    size = scaled & Uint32(elements.SIGN - 1)
    # Below the smallest normal, 2 ** -6: adding 2 ** 14 leaves multiples of 2 ** -9 at the mantissa's end.
    small = ptx.bits(ptx.bits(size, Float32) + Float32(2.0**14), Uint32) - Uint32(0x46800000)
    rebased = size - Uint32(120 << 23)
    code = (rebased + Uint32(0x7FFFF) + ((rebased >> 20) & Uint32(1))) >> 20
    code = small if size < Uint32(121 << 23) else code
    code = Uint32(E4M3_NAN) if (bits & Uint32(elements.SIGN - 1)) >= Uint32(INFINITY) else code
    return code | ((bits >> 24) & Uint32(0x80))


@cute.jit
def ceiling_e4m3(value: Float32) -> Uint32:
    """The code of the least positive number that is no less than ``value``, or of the largest: 1 to 126."""
    bits = ptx.bits(value, Uint32)
    code = (bits - Uint32(120 << 23) + Uint32(0xFFFFF)) >> 20
    if bits < Uint32(121 << 23):
        code = Uint32(cutlass.max(ptx.ceiling(value * Float32(512.0)), Int32(1)))
    return code if code < Uint32(126) else Uint32(126)


@cute.jit
def e4m3_number(code: Uint32) -> Float32:
    """Of a code that is positive and no NaN."""
    normal = ptx.bits((code + Uint32(120 << 3)) << 20, Float32)
    return normal if code >= Uint32(8) else Float32(Int32(code)) * Float32(2.0**-9)


def nearest_e2m1(bits: Value, scaled: Value) -> Value:
    """The code of ``scaled``: 0, 0.5, 1, 1.5, 2, 3, 4, 6, ties to even; under the sign of ``bits``."""
    size = ptx.bits(ptx.bits(scaled, Uint32) & Uint32(elements.SIGN - 1), Float32)
    code = Uint32(size > 0.25) + Uint32(size >= 0.75) + Uint32(size > 1.25) + Uint32(size >= 1.75)
    code = code + Uint32(size > 2.5) + Uint32(size >= 3.5) + Uint32(size > 5.0)
    return code | ((bits >> 28) & Uint32(8))


@cute.jit
def bf16_pair(low: Float32, high: Float32) -> Uint32:
    word = ptx.pack(low, high, "bf16")
    word = word if low == low else (word & Uint32(0xFFFF0000)) | Uint32(BF16_NAN)
    return word if high == high else (word & Uint32(0xFFFF)) | Uint32(BF16_NAN << 16)
