"""The pieces of an item that went to several parts of `decode`, merged by their LSE: one warp a query row."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
from cutlass import Float32, Int32, Int64, cute, range_constexpr

from cutlass_kernels.attention import ptx
from cutlass_kernels.attention.config import CombineConfig
from cutlass_kernels.attention.line import LOG2_E, Results

Value = Any


class Arguments(NamedTuple):
    to: Results
    rows: Int32  # query rows of an item
    part_rows: Int32  # rows of a part: those of whole blocks


class CombineKernel:
    """The kernel of a configuration, to be compiled by `cute.compile`."""

    arguments = Arguments

    def __init__(self, config: CombineConfig) -> None:
        self.config = config
        self.columns = -(-config.d_v // 128)  # of 128 elements, four a lane

    @cute.jit
    def launch(self, a: Arguments) -> None:
        self.kernel(a).launch(grid=[1, 1, 1], block=[self.config.threads, 1, 1])

    @cute.kernel
    def kernel(self, a: Arguments) -> None:
        c, to = self.config, a.to
        thread, _, _ = cute.arch.thread_idx()
        item, block, _ = cute.arch.block_idx()
        lane, row = thread % 32, block * c.warps + thread // 32
        first = ptx.load(to.spans + Int64(item) * 8, 0, Int32)
        last = ptx.load(to.spans + Int64(item) * 8, 4, Int32)
        if first < last and row < a.rows:
            index = item // to.h_kv
            sequence = ptx.divide(index, to.tokens_magic, to.tokens_shift)
            s = ptx.divide(row, to.group_magic, to.group_shift)
            head = (item - index * to.h_kv) * to.group + row - s * to.group
            s += index - sequence * to.tokens
            top = -Float32.inf
            for part in cutlass.range(first + lane, last + 1, 32, unroll=1):
                top = ptx.maximum(top, self.log_sum(a, part, first, row))
            for d in range_constexpr(5):
                top = ptx.maximum(top, cute.arch.shuffle_sync_bfly(top, 1 << d))
            base = top if top > -Float32.inf else Float32(0.0)
            norm = Float32(0.0)
            sums = cute.make_rmem_tensor((self.columns * 4,), Float32)
            sums.fill(0.0)
            for begin in cutlass.range(first, last + 1, 32, unroll=1):
                own = Float32(0.0)  # the weight of this lane's piece
                if begin + lane <= last:
                    own = ptx.exp2(self.log_sum(a, begin + lane, first, row) - base)
                norm += own
                end = begin + 32 if begin + 32 <= last else last + 1
                for part in cutlass.range(begin, end, unroll=4):
                    weight = cute.arch.shuffle_sync(own, part - begin)
                    place = self.place(a, to.out_parts, part, first, row, 4 * c.d_v) + lane * 16
                    for i in range_constexpr(self.columns):
                        if lane * 4 + 128 * i < c.d_v:
                            values = ptx.load_floats(place, 4, 512 * i)
                            for x in range_constexpr(4):
                                # A piece without weight may hold anything.
                                product = weight * values[x] if weight != 0.0 else Float32(0.0)
                                sums[4 * i + x] = sums[4 * i + x] + product
            for d in range_constexpr(5):
                norm += cute.arch.shuffle_sync_bfly(norm, 1 << d)
            seen = norm != 0.0
            factor = 1.0 / norm if seen else Float32(0.0)
            value = (ptx.log2(norm) + base) * Float32(1 / LOG2_E) if seen else Float32.inf
            if to.sink != 0:
                logit = ptx.load_floats(to.sink + Int64(head) * 4, 1)[0]
                if seen:
                    factor = factor / (1.0 + ptx.exp2((logit - value) * Float32(LOG2_E)))
            if lane == 0:
                place = to.lse + Int64(sequence) * to.lse_batch + Int64(head) * to.lse_head
                ptx.store(place + Int64(s) * to.lse_token, [value], "f32")
            place = to.out + Int64(sequence) * to.out_batch + Int64(s) * to.out_token + Int64(head) * to.out_head
            for i in range_constexpr(self.columns):
                if lane * 4 + 128 * i < c.d_v:
                    scaled = [sums[4 * i + x] * factor for x in range(4)]
                    pairs = [ptx.pack(scaled[x], scaled[x + 1], c.dtype) for x in (0, 2)]
                    ptx.store(place + lane * 8, pairs, "b32", 256 * i)

    def log_sum(self, a: Value, part: Value, first: Value, row: Value) -> Value:
        return ptx.load_floats(self.place(a, a.to.lse_parts, part, first, row, 4), 1)[0]

    def place(self, a: Value, parts: Value, part: Value, first: Value, row: Value, size: int) -> Value:
        """The address of a row's piece: an item begins in a part's second place, and goes on in the first of others."""
        slot = Int64(part) * 2 + Int64(Int32(part == first))
        return parts + (slot * a.part_rows + row) * size
