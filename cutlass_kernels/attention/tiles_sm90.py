"""How queries and tiles come to shared memory for `decode_sm90`: what the copying warpgroup does.

A tile is copied block by block (64 tokens, 64 elements), each with an mbarrier that says when it is there. Halves of
the value's blocks are waited for on their own, since each becomes free when its warpgroup has added it.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Int32, Int64, Uint32, const_expr, cute, range_constexpr

from cutlass_kernels.attention import ptx
from cutlass_kernels.attention import warpgroup as wg
from cutlass_kernels.attention.config import DecodeSm90Config
from cutlass_kernels.attention.line import Arguments, Item, LineKernel
from cutlass_kernels.attention.rows import LOADERS, Rows, Source

Value = Any
#: Threads of a warpgroup.
GROUP = 128
#: Blocks of codes that are on the way from memory while one is decoded.
AHEAD = 2


class TileCopies(LineKernel):
    """What the copying warpgroup does."""

    def __init__(self, config: DecodeSm90Config) -> None:
        super().__init__(config, GROUP)
        self.half = config.d_v // 2  # columns of a warpgroup
        self.passes = self.first.passes

    @cute.jit
    def copy_item(
        self,
        a: Arguments,
        item: Item,
        found: cute.Tensor,
        tile: Int32,
        uses: Int32,
        memory: Int32,
        target: Int32,
        token: Int32,
        chunk: Int32,
    ) -> Int32:
        """Copy the tiles of an item; ``target``: where this thread's first 16 bytes of a block go.

        Bit s of ``uses`` counts, modulo 2, the uses of stage s; returns it as it is afterwards.
        """
        c = self.config
        stage = Int32(0)
        for t in cutlass.range(tile, item.last, unroll=1):
            parity = (uses >> stage) & 1 ^ 1
            uses = uses ^ (1 << stage)
            free = memory + c.free_at + stage * 16
            full = memory + c.full_at + stage * (8 * c.blocks)
            live = memory + c.live_at + stage * c.tile + token
            to = target + stage * c.stage_bytes
            if const_expr(c.second):
                if t < item.tiles:
                    self.copy_tile(self.first, a.first, a, item, found, t, free, full, live, to, parity, chunk, token)
                else:
                    self.copy_tile(self.second, a.second, a, item, found, t, free, full, live, to, parity, chunk, token)
            else:
                self.copy_tile(self.first, a.first, a, item, found, t, free, full, live, to, parity, chunk, token)
            stage = stage ^ 1
        return uses

    @cute.jit
    def copy_tile(
        self,
        rows: cutlass.Constexpr,
        s: Source,
        a: Arguments,
        item: Item,
        found: cute.Tensor,
        tile: Int32,
        free: Int32,
        full: Int32,
        live: Int32,
        to: Int32,
        parity: Int32,
        chunk: Int32,
        token: Int32,
    ) -> None:
        c = self.config
        sizes, places, others = [], [], []
        for i in range_constexpr(self.passes):
            at = tile * c.tile + token + i * rows.step
            size, kv_from, k_from, tail_from = rows.locate(s, item.head, found[i], at)
            sizes.append(size)
            places.append(kv_from)
            others.append(tail_from if rows.codes else k_from)
        self.find(a, item, found, tile + 1, token)  # on the way while the tile's place becomes free
        codes: list[Any] = []  # of this block and of `AHEAD` more: what is on the way from memory
        if const_expr(rows.codes is not None):
            for block in range_constexpr(AHEAD):
                codes.append(self.load_codes(rows, places, others, sizes, chunk, block, codes))
        wg.wait_barrier(free, parity)
        for block in range_constexpr(c.blocks):
            if const_expr(block == self.half // 64):
                wg.wait_barrier(free + 8, parity)
                if chunk == 0:
                    for i in range_constexpr(self.passes):
                        ptx.store_shared(live, [sizes[i]], "b8", i * rows.step)
                    wg.arrive(full + 8 * (c.blocks - 1))
                if const_expr(rows.codes is not None and not c.second):
                    self.prefetch(rows, s, item, found, tile + 1, token, chunk)
            if const_expr(rows.codes is None):
                self.copy_block(rows, places, others, sizes, chunk, to, block)
                wg.arrive_with_copies(full, 8 * block)
            else:
                if const_expr(block + AHEAD < c.blocks):
                    codes.append(self.load_codes(rows, places, others, sizes, chunk, block + AHEAD, codes))
                for i in range_constexpr(self.passes):
                    words = codes[block][i]
                    if const_expr(block * 64 < rows.codes.values):
                        words = rows.elements(words[:-1], words[-1])
                    ptx.store_shared(to, words, "b32", block * c.block_bytes + i * rows.step * 128)
                wg.fence_async()
                wg.arrive(full + 8 * block)

    @cute.jit
    def prefetch(
        self,
        rows: cutlass.Constexpr,
        s: Source,
        item: Item,
        found: cute.Tensor,
        tile: Int32,
        token: Int32,
        chunk: Int32,
    ) -> None:
        """Bring the codes of the rows found to L2: a line a thread."""
        for i in range_constexpr(self.passes):
            at = tile * self.config.tile + token + i * rows.step
            size, place, _, _ = rows.locate(s, item.head, found[i], at)
            if size != 0 and chunk * 128 < rows.codes.head:
                ptx.prefetch(place + Int64(chunk) * 128)

    def copy_block(
        self, rows: Rows, places: Value, others: Value, sizes: Value, chunk: Value, to: Value, block: int
    ) -> None:
        """Begin to copy this thread's 16 bytes of a block, in each of its rows."""
        for i in range(self.passes):
            source, at = (places, block * 128) if block * 64 < rows.kv else (others, block * 128 - 2 * rows.kv)
            place = block * self.config.block_bytes + i * rows.step * 128
            ptx.copy16_to(to, source[i] + chunk * 16, sizes[i], place, at)

    def load_codes(
        self, rows: Rows, places: Value, tails: Value, sizes: Value, chunk: Value, block: int, before: Value
    ) -> list[Value]:
        """This thread's eight elements of a block, in each of its rows: codes and their scale, or two bytes each."""
        codes = rows.codes
        if block * 64 >= codes.values:
            at = codes.rope_at + (block * 64 - codes.values) * 2
            return [self.load_row(places[i] + chunk * 16, sizes[i], 4, at) for i in range(self.passes)]
        found = []
        for i in range(self.passes):
            words = self.load_row(places[i] + chunk * codes.bits, sizes[i], codes.bits // 4, block * 8 * codes.bits)
            group = block * 64 // codes.group
            if block and codes.group > 64 and group == (block - 1) * 64 // codes.group:
                words.append(before[block - 1][i][-1])
            else:
                scales = tails[i] - codes.head if codes.tail else places[i]
                if codes.group < 64:
                    scales += chunk // (codes.group // 8) * codes.scale_bytes
                at = codes.scales_at + group * codes.scale_bytes
                words.append(self.load_scale(scales, sizes[i], codes.scale_bytes, at))
            found.append(words)
        return found

    @cute.jit
    def load_row(self, place: Int64, size: Int32, count: cutlass.Constexpr, offset: cutlass.Constexpr) -> list[Value]:
        """Values of 32 bits side by side; zeros of a row that is not there."""
        found = cute.make_rmem_tensor((count,), Uint32)
        found.fill(0)
        if size != 0:
            loaded = ptx.load_vector(place, count, offset)
            for i in range_constexpr(count):
                found[i] = loaded[i]
        return [found[i] for i in range(count)]

    @cute.jit
    def load_scale(self, place: Int64, size: Int32, count: cutlass.Constexpr, offset: cutlass.Constexpr) -> Uint32:
        """``count`` bytes; zero of a row that is not there."""
        found = Uint32(0)
        if size != 0:
            if const_expr(count == 4):
                found = ptx.load(place, offset)
            else:
                found = ptx.load_global_byte(place, offset)
        return found

    @cute.jit
    def copy_queries(self, a: Arguments, item: Item, row: Int32, rows: Int32, chunk: Int32, to: Int32) -> None:
        """Begin to copy this thread's part of the queries: of every sixteenth row from ``row`` on."""
        c = self.config
        base = a.q + Int64(item.sequence) * a.q_batch + Int64(item.token) * a.q_token
        base += Int64(item.head * a.to.group) * a.q_head + chunk * 16
        for i in range_constexpr(self.passes):
            r = row + i * (GROUP // LOADERS)
            size, source = Int32(0), base
            if r < rows:
                size = Int32(16)
                s = ptx.divide(r, a.to.group_magic, a.to.group_shift)
                source = base + Int64(s) * a.q_token + Int64(r - s * a.to.group) * a.q_head
            for block in range_constexpr(c.blocks):
                ptx.copy16_to(to, source, size, block * c.block_bytes + i * (GROUP // LOADERS * 128), block * 128)
