"""How rows of the cache come to shared memory: copied as they are, or as the bytes of a format that are then decoded.

A row is copied by `LOADERS` threads. Each also decodes what it copied a part of, eight elements at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from cutlass import Float32, Int32, Int64, Uint32, const_expr, cute, range_constexpr

from cutlass_kernels.attention import ptx
from cutlass_kernels.attention.config import CallConfig, Codes

#: Threads that copy a row together, 128 bytes at a time.
LOADERS = 8
#: A float32 of these bits is NaN.
NAN = 0x7FC00000
Value = Any


class Source(NamedTuple):
    """One cache, and which of its rows each item reads. Addresses and strides are in bytes."""

    kv: Int64
    k: Int64
    index: Int64  # the block table, or indices
    lengths: Int64  # 0: the capacity
    kv_page: Int64
    kv_row: Int64
    kv_head: Int64
    k_page: Int64
    k_row: Int64
    k_head: Int64
    index_row: Int64  # from one line of `index` to the next
    n_pages: Int32
    page_size: Int32
    page_magic: Int32
    page_shift: Int32
    capacity: Int32  # how many rows a line of `index` has room for


class Rows:
    """The rows of one source of a kernel: their copies, and their decoding if they are ``codes``."""

    def __init__(self, config: CallConfig, codes: Codes | None, kv: int, k: int, copiers: int) -> None:
        """``kv`` and ``k``: elements of a row of each cache, if they are no codes. ``copiers``: threads that copy."""
        self.config: Any = config
        self.kv, self.k = kv, k
        self.codes: Any = codes
        self.step = copiers // LOADERS
        #: Rows of a tile that a thread takes part in copying.
        self.passes = config.tile // self.step

    @cute.jit
    def length(self, s: Source, sequence: Int32) -> Int32:
        length = s.capacity
        if s.lengths != 0:
            length = ptx.load(s.lengths + Int64(sequence) * 4, kind=Int32)
        length = length if length < s.capacity else s.capacity
        return length if length > 0 else Int32(0)

    @cute.jit
    def find(self, s: Source, line: Int64, found: cute.Tensor, first: Int32, token: Int32, length: Int32) -> None:
        """This thread's rows of the tile that begins at row ``first``: a page, or a slot; -1 past the end."""
        for i in range_constexpr(self.passes):
            at = first + token + i * self.step
            place = Int32(-1)
            if at < length:
                entry = at
                if const_expr(self.config.source == "pages"):
                    entry = ptx.divide(at, s.page_magic, s.page_shift)
                place = ptx.load(line + Int64(entry) * 4, kind=Int32)
            found[i] = place

    @cute.jit
    def locate(self, s: Source, head: Int32, place: Int32, at: Int32) -> tuple[Int32, Int64, Int64, Int64]:
        """16 if there is a row, else 0; and where it is: in kv_cache, in k_cache, and what a page holds apart of it.

        ``place`` is a slot, or the page of the ``at``-th row of a sequence.
        """
        size, kv_from, k_from, tail_from = Int32(0), s.kv, s.k, s.kv
        if place >= 0:
            row = place if const_expr(self.config.source == "indices") else at
            quotient = ptx.divide(row, s.page_magic, s.page_shift)
            page = quotient if const_expr(self.config.source == "indices") else place
            if page < s.n_pages:
                size = Int32(16)
                offset = row - quotient * s.page_size
                kv_from = s.kv + Int64(page) * s.kv_page + Int64(offset) * s.kv_row + Int64(head) * s.kv_head
                if const_expr(self.k > 0):
                    k_from = s.k + Int64(page) * s.k_page + Int64(offset) * s.k_row + Int64(head) * s.k_head
                if const_expr(self.codes is not None and self.codes.tail > 0):
                    tail_from = s.kv + Int64(page) * s.kv_page + Int64(s.page_size) * self.codes.head
                    tail_from += Int64(offset) * self.codes.tail
        return size, kv_from, k_from, tail_from

    @cute.jit
    def copy(
        self, s: Source, head: Int32, found: cute.Tensor, first: Int32, token: Int32, chunk: Int32, stage: Int32
    ) -> None:
        """Begin to copy this thread's part of a tile, zeros where there is no row, and note which rows there are."""
        c = self.config
        for i in range_constexpr(self.passes):
            row = token + i * self.step
            size, kv_from, k_from, tail_from = self.locate(s, head, found[i], first + row)
            if chunk == 0:
                ptx.store_shared(stage + c.live_at + row, [size], "b8")
            if const_expr(self.codes is None):
                to = stage + row * c.row_bytes + chunk * 16
                self.copy_native(kv_from + chunk * 16, k_from + (chunk * 16 - 2 * self.kv), size, chunk, to)
            else:
                to = stage + row * c.raw_row
                self.copy_chunks(kv_from + chunk * 16, size, chunk, to + chunk * 16)
                if const_expr(self.codes.tail > 0):
                    if chunk == 0:
                        ptx.copy8(to + self.codes.head, tail_from, size >> 1)

    @cute.jit
    def copy_native(self, kv_from: Int64, k_from: Int64, size: Int32, chunk: Int32, to: Int32) -> None:
        """Every eighth 16 bytes of a row of kv_cache and of k_cache, from the chunk-th on."""
        d = self.kv + self.k
        for first in range_constexpr(0, d // 8, LOADERS):
            in_kv, in_k = (first + LOADERS) * 8 <= self.kv, first * 8 >= self.kv
            if const_expr((first + LOADERS) * 8 <= d and (in_kv or in_k)):
                ptx.copy16(to, kv_from if in_kv else k_from, size, first * 16)
            else:
                if chunk < d // 8 - first:
                    source = kv_from if const_expr(not in_k) else k_from
                    if const_expr(not in_kv and not in_k and self.k > 0):
                        if chunk >= self.kv // 8 - first:
                            source = k_from
                    ptx.copy16(to, source, size, first * 16)

    @cute.jit
    def copy_chunks(self, place: Int64, size: Int32, chunk: Int32, to: Int32) -> None:
        """Every eighth 16 bytes of the codes of a row."""
        for first in range_constexpr(0, self.codes.head // 16, LOADERS):
            if const_expr(first + LOADERS <= self.codes.head // 16):
                ptx.copy16(to, place, size, first * 16)
            else:
                if chunk < self.codes.head // 16 - first:
                    ptx.copy16(to, place, size, first * 16)

    @cute.jit
    def decode(self, stage: Int32, tile: Int32, token: Int32, chunk: Int32) -> None:
        """This thread's part of the elements of a tile, from their codes."""
        c, codes = self.config, self.codes
        for i in range_constexpr(self.passes):
            row = token + i * self.step
            raw, to = stage + row * c.raw_row, tile + row * c.row_bytes + chunk * 16
            for first in range_constexpr(0, codes.values // 8, LOADERS):
                if const_expr(first + LOADERS <= codes.values // 8):
                    self.decode_unit(raw, first + chunk, to + first * 16)
                else:
                    if chunk < codes.values // 8 - first:
                        self.decode_unit(raw, first + chunk, to + first * 16)
            for first in range_constexpr(0, codes.rope // 8, LOADERS):
                if chunk < codes.rope // 8 - first:
                    words = ptx.load_shared(raw + codes.rope_at + chunk * 16, 4, first * 16, Uint32)
                    ptx.store_shared(to + 2 * codes.values + first * 16, words, "b32")

    @cute.jit
    def decode_unit(self, raw: Int32, unit: Int32, to: Int32) -> None:
        """Eight elements: the unit-th of a row."""
        codes = self.codes
        words = ptx.load_shared(raw + unit * codes.bits, codes.bits // 4, 0, Uint32)
        group = raw + codes.scales_at + unit // (codes.group // 8) * codes.scale_bytes
        stored = Uint32(0)
        if const_expr(codes.scale_bytes == 4):
            stored = ptx.load_shared(group, 1, 0, Uint32)[0]
        else:
            stored = ptx.load_byte(group)
        ptx.store_shared(to, self.elements(words, stored), "b32")

    @cute.jit
    def elements(self, words: list[Value], stored: Uint32) -> list[Value]:
        """Eight elements in pairs, from their codes and their scale."""
        codes = self.codes
        scale = ptx.bits(stored, Float32)
        if const_expr(codes.scale != "float32"):
            scale = e8m0(stored) if const_expr(codes.scale == "e8m0") else e4m3(stored << 24)
        values = []
        if const_expr(codes.code == "e4m3" and ptx.is_for(89)):
            for word in words:
                values += ptx.from_e4m3(word)
        else:
            for i in range_constexpr(8):
                if const_expr(codes.code == "e4m3"):
                    values.append(e4m3(words[i // 4] << (24 - 8 * (i % 4))))
                elif const_expr(codes.code == "int8"):
                    values.append(int8(words[i // 4] ^ Uint32(0x80808080), i % 4))
                elif const_expr(codes.code == "e2m1"):
                    values.append(e2m1(words[0] << (28 - 4 * i)))
                else:
                    values.append(int4(words[0] >> (4 * i)))
        dtype = self.config.dtype
        return [ptx.pack(values[2 * i] * scale, values[2 * i + 1] * scale, dtype) for i in range(4)]


@cute.jit
def e4m3(code: Uint32) -> Float32:
    """From the uppermost 8 bits, whose exponent and fraction are those of a float32 of another bias."""
    number = ptx.bits(ptx.shift_right(code, 4) & Uint32(0x87F00000), Float32) * Float32(2.0**120)
    is_nan = code & Uint32(0x7F000000) == Uint32(0x7F000000)
    return ptx.bits(Uint32(NAN), Float32) if is_nan else number


@cute.jit
def e2m1(code: Uint32) -> Float32:
    """From the uppermost 4 bits, as `e4m3`."""
    return ptx.bits(ptx.shift_right(code, 6) & Uint32(0x81C00000), Float32) * Float32(2.0**126)


@cute.jit
def e8m0(code: Uint32) -> Float32:
    """A power of two: the exponent of a float32, but for the smallest, which is denormal, and for NaN."""
    bits = code << 23
    bits = Uint32(1 << 22) if code == 0 else bits
    return ptx.bits(Uint32(NAN) if code == 255 else bits, Float32)


def int8(word: Value, which: int) -> Value:
    """From a byte plus 128: the lowest bits of the fraction of 2 ** 23, whose unit is 1."""
    return ptx.bits(ptx.byte(word, which, 0x4B000000), Float32) - Float32(2.0**23 + 128)


def int4(code: Value) -> Value:
    """From the lowest 4 bits."""
    return ptx.bits((code & Uint32(15)) ^ Uint32(0x4B000008), Float32) - Float32(2.0**23 + 8)
