"""How decode kernels share their work: what a call is, its items, and which of them a block has.

Work is a line of items, each as long as its tiles. The line is cut into as many pieces of equal length as there are
parts, and a part takes what falls into its piece, whatever the lengths are; blocks of the same part and other query
rows read the same tiles at the same time. Where a cut goes through an item, the pieces are merged by `combine`; or no
item is cut, so that its result has the same bits whatever the others are. Each block finds its piece itself: no
schedule is made, and nothing waits for the host.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import cutlass
from cutlass import Float32, Int32, Int64, const_expr, cute

from cutlass_kernels.attention import ptx
from cutlass_kernels.attention.config import CallConfig
from cutlass_kernels.attention.rows import Rows, Source

#: A part is not made shorter than this many tokens: a merge costs more than it saves.
LEAST_TOKENS = 128
#: How much larger than the one in use (log2) a maximum must be to take its place: weights stay below 2 ** this.
HEADROOM = 8.0
LOG2_E = math.log2(math.e)
Value = Any


class Results(NamedTuple):
    """Where results go, and how items and their rows count. Addresses and strides are in bytes."""

    out: Int64
    lse: Int64
    sink: Int64  # 0: none
    out_parts: Int64  # [parts, 2, row blocks * rows, d_v] float32
    lse_parts: Int64  # [parts, 2, row blocks * rows] float32, log2
    spans: Int64  # [items, 2] int32: the first and the last part of an item
    out_batch: Int64
    out_token: Int64
    out_head: Int64
    lse_batch: Int64
    lse_head: Int64
    lse_token: Int64
    h_kv: Int32
    tokens: Int32  # items of a sequence and KV head: 1, or its query tokens
    tokens_magic: Int32
    tokens_shift: Int32
    group: Int32  # query heads of a KV head
    group_magic: Int32
    group_shift: Int32


class Arguments(NamedTuple):
    first: Source
    second: Source
    to: Results
    q: Int64
    q_batch: Int64
    q_token: Int64
    q_head: Int64
    batch: Int32  # items of a KV head
    s_q: Int32  # query tokens of an item
    causal: Int32
    whole: Int32  # whether no item is to be cut
    scale: Float32  # log2(e) times the softmax scale


class Item(NamedTuple):
    """What a block works on: one sequence (of one query token), one KV head."""

    number: Int32
    sequence: Int32
    token: Int32  # the first query token
    head: Int32  # the KV head
    length: Int32  # rows of the first source
    second_length: Int32
    tiles: Int32  # of the first source
    last: Int32  # one past the last tile of this part


class LineKernel:
    """What the decode kernels have in common, to be compiled by `cute.compile`."""

    arguments = Arguments
    kernel: Any

    def __init__(self, config: CallConfig, copiers: int) -> None:
        """``copiers``: threads of a block that copy rows."""
        self.config: Any = config
        self.first = Rows(config, config.codes, config.kv, config.k, copiers)
        self.second = Rows(config, config.second_codes, config.kv + config.k, 0, copiers)

    @cute.jit
    def launch(self, a: Arguments) -> None:
        self.kernel(a).launch(grid=[1, 1, 1], block=[self.config.threads, 1, 1], smem=self.config.shared_bytes)

    @cute.jit
    def piece(self, a: Arguments, part: Int32, parts: Int32, lane: Int32) -> tuple[Int32, Int32, Int32]:
        """A part's piece of the line: how many tiles it has, the item that it begins in, and the tile of it."""
        total = Int32(0)
        for first in cutlass.range(0, a.batch, 32, unroll=1):
            total += self.tiles(a, first + lane)
        total = self.warp_sum(total) * a.to.h_kv
        begin = self.cut(total, part, parts)
        item, tile, before = Int32(0), Int32(0), Int32(0)
        for first in cutlass.range(0, a.batch, 32, unroll=1):
            tiles = self.tiles(a, first + lane)
            upto = self.warp_scan(tiles * a.to.h_kv, lane)
            start = begin - (before + upto - tiles * a.to.h_kv)
            if start >= 0 and start < tiles * a.to.h_kv:
                item = (first + lane) * a.to.h_kv + start // tiles
                tile = start % tiles
            before += cute.arch.shuffle_sync(upto, 31)
        remaining, item, tile = self.cut(total, part + 1, parts) - begin, self.warp_sum(item), self.warp_sum(tile)
        if a.whole != 0:
            remaining, item = self.whole_items(a, part, parts, lane)
            tile = Int32(0)
        return remaining, item, tile

    @cute.jit
    def whole_items(self, a: Arguments, part: Int32, parts: Int32, lane: Int32) -> tuple[Int32, Int32]:
        """The tiles of a part that has as many items as the others, and its first item."""
        items = Int64(a.batch) * Int64(a.to.h_kv)
        begin, end = (Int32(items * Int64(part + i) // Int64(parts)) for i in range(2))
        total = Int32(0)
        for first in cutlass.range(0, a.batch, 32, unroll=1):
            start = (first + lane) * a.to.h_kv
            low, high = (cutlass.min(cutlass.max(bound - start, 0), a.to.h_kv) for bound in (begin, end))
            total += self.tiles(a, first + lane) * (high - low)
        return self.warp_sum(total), begin

    @cute.jit
    def lengths(self, a: Arguments, index: Int32) -> tuple[Int32, Int32]:
        """Rows of each source of an item of a KV head."""
        sequence = index
        if const_expr(self.config.source == "indices"):
            sequence = ptx.divide(index, a.to.tokens_magic, a.to.tokens_shift)
        second = Int32(0)
        if const_expr(self.config.second):
            second = self.second.length(a.second, sequence)
        return self.first.length(a.first, sequence), second

    def in_tiles(self, length: Value) -> Value:
        return (length + (self.config.tile - 1)) // self.config.tile

    @cute.jit
    def tiles_of(self, length: Int32, second: Int32) -> Int32:
        """Tiles of an item with so many rows of each source: at least one, which writes the result of an empty one."""
        tiles = self.in_tiles(length) + self.in_tiles(second)
        return tiles if tiles > 0 else Int32(1)

    @cute.jit
    def tiles(self, a: Arguments, index: Int32) -> Int32:
        """Tiles of an item; 0 past the last one."""
        tiles = Int32(0)
        if index < a.batch:
            length, second = self.lengths(a, index)
            tiles = self.tiles_of(length, second)
        return tiles

    @cute.jit
    def item(self, a: Arguments, number: Int32, tile: Int32, remaining: Int32) -> Item:
        index = number // a.to.h_kv
        sequence = ptx.divide(index, a.to.tokens_magic, a.to.tokens_shift)
        length, second = self.lengths(a, index)
        token, head, tiles = index - sequence * a.to.tokens, number - index * a.to.h_kv, self.in_tiles(length)
        every = self.tiles_of(length, second)
        last = tile + remaining if tile + remaining < every else every
        return Item(number, sequence, token, head, length, second, tiles, last)

    @cute.jit
    def note_span(self, a: Arguments, item: Item, tile: Int32, part: Int32) -> None:
        if tile == 0:
            ptx.store(a.to.spans + Int64(item.number) * 8, [part], "b32")
        if item.last == self.tiles_of(item.length, item.second_length):
            ptx.store(a.to.spans + Int64(item.number) * 8, [part], "b32", 4)

    def cut(self, total: Value, part: Value, parts: Value) -> Value:
        """Where a part begins on the line."""
        even = Int32(Int64(total) * Int64(part) // Int64(parts))
        return cutlass.min(cutlass.max(even, part * (LEAST_TOKENS // self.config.tile)), total)

    def warp_sum(self, value: Value) -> Value:
        for d in range(5):
            value += cute.arch.shuffle_sync_bfly(value, 1 << d)
        return value

    def warp_scan(self, value: Value, lane: Value) -> Value:
        """Sums of lanes 0 to this one."""
        for d in range(5):
            value += cute.arch.shuffle_sync_up(value, 1 << d, mask_and_clamp=0) * Int32(lane >= (1 << d))
        return value

    @cute.jit
    def find(self, a: Arguments, item: Item, found: cute.Tensor, tile: Int32, token: Int32) -> None:
        """Where this thread's rows of a tile are; nowhere past this part's last tile."""
        line = Int64(item.sequence)
        if const_expr(self.config.source == "indices"):
            line = Int64(item.sequence) * a.to.tokens + item.token
        length = item.length if tile < item.last else Int32(0)
        if const_expr(self.config.second):
            if tile < item.tiles:
                self.first.find(
                    a.first, a.first.index + line * a.first.index_row, found, tile * self.config.tile, token, length
                )
            else:
                length = item.second_length if tile < item.last else Int32(0)
                start = (tile - item.tiles) * self.config.tile
                self.second.find(a.second, a.second.index + line * a.second.index_row, found, start, token, length)
        else:
            self.first.find(
                a.first, a.first.index + line * a.first.index_row, found, tile * self.config.tile, token, length
            )
