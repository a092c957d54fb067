"""``flashmla::decode_schedule``: its rule and layout are in `flashmla_ops.reference.schedule`. One block.

Sequences come in chunks, one a thread. What precedes each on the line of work is summed up in shared memory, where each
part then searches for the sequence that its cut goes through.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
from cutlass import Int32, Int64, Uint32, cute, range_constexpr

from cutlass_kernels.attention import ptx
from cutlass_kernels.attention.around_config import ScheduleConfig
from cutlass_kernels.attention.config import WARP

Value = Any


class Arguments(NamedTuple):
    lengths: Int64  # [b] int32
    length: Int64  # bytes from one to the next
    schedule: Int64
    b: Int32
    s_q: Int32
    h_q: Int32
    h_kv: Int32
    parts: Int32
    row_block: Int32
    items: Int32  # of a sequence


class ScheduleKernel:
    """The kernel of a configuration, to be compiled by `cute.compile`."""

    arguments = Arguments

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config

    @cute.jit
    def launch(self, a: Arguments) -> None:
        self.kernel(a).launch(grid=[1, 1, 1], block=[self.config.threads, 1, 1], smem=self.config.shared_bytes)

    @cute.kernel
    def kernel(self, a: Arguments) -> None:
        c = self.config
        thread, _, _ = cute.arch.thread_idx()
        memory = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=128).toint())
        if thread == 0:
            self.store_header(a)

        total = Int64(0)
        for first in cutlass.range(0, a.b, c.threads, unroll=1):
            sequence = first + thread
            if sequence < a.b:
                ptx.store(a.schedule + Int64(sequence) * 4, [self.length(a, sequence)], "b32", 4 * c.header)
            total = self.sum_up(a, memory, sequence, total)
        total *= a.items

        starts = a.schedule + (Int64(a.b) + c.header) * 4
        for part in cutlass.range(thread, a.parts + 1, c.threads, unroll=1):
            if self.cut(a, part, total) == total:
                self.store(starts + Int64(part) * 8, a.b * a.items, Int32(0))
        before = Int64(0)
        for first in cutlass.range(0, a.b, c.threads, unroll=1):
            after = self.sum_up(a, memory, first + thread, before)
            for part in cutlass.range(thread, a.parts + 1, c.threads, unroll=1):
                cut = self.cut(a, part, total)
                if cut >= before * a.items and cut < after * a.items:
                    self.place(a, memory, starts + Int64(part) * 8, first, cut, before)
            before = after

    def store_header(self, a: Value) -> None:
        numbers = [a.b, a.s_q, a.h_q, a.h_kv, a.parts, a.row_block]
        for i in range(self.config.header):
            ptx.store(a.schedule, [numbers[i] if i < len(numbers) else Int32(0)], "b32", 4 * i)

    @cute.jit
    def place(self, a: Arguments, memory: Int32, to: Int64, first: Int32, cut: Int64, before: Int64) -> None:
        """The item and token of a cut that goes through a sequence of this chunk."""
        low, high = Int32(0), Int32(self.config.threads - 1)  # the first sequence that ends behind the cut
        while low < high:
            middle = (low + high) // 2
            behind = ptx.load_shared_wide(memory + middle * 8) * a.items > cut
            high = middle if behind else high
            low = low if behind else middle + 1
        start = before
        if low > 0:
            start = ptx.load_shared_wide(memory + (low - 1) * 8)
        units = ptx.load_shared_wide(memory + low * 8) - start
        inside = cut - start * a.items
        item = inside // units
        token = Int32(inside - item * units) * self.config.unit
        self.store(to, (first + low) * a.items + Int32(item), token)

    def store(self, to: Value, item: Value, token: Value) -> None:
        """A pair; with an odd ``b`` it does not lie at a multiple of its size."""
        ptx.store(to, [item], "b32")
        ptx.store(to, [token], "b32", 4)

    @cute.jit
    def cut(self, a: Arguments, part: Int32, total: Int64) -> Int64:
        even = total * Int64(part) // Int64(a.parts)
        return cutlass.min(cutlass.max(even, Int64(part) * self.config.least_units), total)

    @cute.jit
    def length(self, a: Arguments, sequence: Int32) -> Int32:
        return ptx.load(a.lengths + Int64(sequence) * a.length, kind=Int32)

    @cute.jit
    def units(self, a: Arguments, sequence: Int32) -> Int32:
        """At least one; 0 past the last sequence."""
        units = Int32(0)
        if sequence < a.b:
            length = self.length(a, sequence)
            units = (length - 1) // self.config.unit + 1 if length > 0 else Int32(1)
        return units

    @cute.jit
    def sum_up(self, a: Arguments, memory: Int32, sequence: Int32, before: Int64) -> Int64:
        """Each thread's sum of units up to its sequence to shared memory; returns that of the whole chunk."""
        c = self.config
        lane, warp = sequence % WARP, sequence % c.threads // WARP
        units = Uint32(self.units(a, sequence))
        for d in range_constexpr(5):
            units += cute.arch.shuffle_sync_up(units, 1 << d, mask_and_clamp=0) * Uint32(lane >= (1 << d))
        if lane == WARP - 1:
            ptx.store_shared(memory + warp * 8, [Int64(units)], "b64", c.totals_at)
        cute.arch.sync_threads()
        upto, after = before + Int64(units), before
        for i in range_constexpr(c.threads // WARP):
            total = ptx.load_shared_wide(memory + (c.totals_at + i * 8))
            after += total
            upto += total if i < warp else Int64(0)
        ptx.store_shared(memory + sequence % c.threads * 8, [upto], "b64")
        cute.arch.sync_threads()
        return after
