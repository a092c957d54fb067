"""``flashmla::append_``: rows into the slots of a paged cache, copied or encoded; a warp a row.

Where two rows name one slot the later stays, whichever block is first. A block therefore looks at the slots of all
rows behind its own. It marks its slots in a table in shared memory, by their lowest bits, so that one look tells for
nearly every slot that it is none of them. It writes the rows that no later one replaces. With up to 32 rows a block
that reads n ** 2 / 64 slots in all: 8 MB for 8192 rows, from the L2 cache, and no workspace, sort or second launch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
from cutlass import Int32, Int64, Uint32, const_expr, cute, range_constexpr

from cutlass_kernels.attention import ptx
from cutlass_kernels.attention.around_config import AppendConfig
from cutlass_kernels.attention.encode import Encoder

#: Slots that a thread loads at once, and accesses of a copy.
AHEAD = 4
Value = Any


class Arguments(NamedTuple):
    """Addresses and strides are in bytes."""

    cache: Int64
    rows: Int64
    slots: Int64  # [n] int64
    cache_page: Int64
    cache_row: Int64
    cache_head: Int64
    row: Int64
    head: Int64
    slot: Int64
    n: Int32
    capacity: Int32  # slots of the cache
    page_size: Int32
    page_size_magic: Int32
    page_size_shift: Int32
    heads: Int32
    units: Int32  # accesses of a row of one head, where rows are copied
    units_magic: Int32
    units_shift: Int32
    block_rows: Int32  # a multiple of the warps of a block


class Copier:
    """Rows as they are."""

    def __init__(self, config: AppendConfig) -> None:
        self.width = config.width

    @cute.jit
    def write(self, a: Arguments, source: Int64, page: Int64, offset: Int32, lane: Int32) -> None:
        """All heads of a row to a place of the page at an address."""
        width = self.width
        to = page + Int64(offset) * a.cache_row
        count, kind = (width // 4, "b32") if const_expr(width >= 4) else (1, "b16")
        total = a.heads * a.units
        for start in cutlass.range(lane, total, AHEAD * 32, unroll=1):
            values, places = [], []
            for i in range_constexpr(AHEAD):
                unit = cutlass.min(start + 32 * i, total - 1)
                head = ptx.divide(unit, a.units_magic, a.units_shift)
                at = Int64(unit - head * a.units) * width
                values.append(ptx.load_words(source + Int64(head) * a.head + at, count, 0, kind))
                places.append(to + Int64(head) * a.cache_head + at)
            for i in range_constexpr(AHEAD):
                if start + 32 * i < total:
                    ptx.store(places[i], values[i], kind)


class AppendKernel:
    """The kernel of a configuration, to be compiled by `cute.compile`."""

    arguments = Arguments

    def __init__(self, config: AppendConfig) -> None:
        self.config = config
        self.writer = Copier(config) if config.codes is None else Encoder(config, config.codes)

    @cute.jit
    def launch(self, a: Arguments) -> None:
        self.kernel(a).launch(grid=[1, 1, 1], block=[self.config.threads, 1, 1], smem=self.config.shared_bytes)

    @cute.kernel
    def kernel(self, a: Arguments) -> None:
        c = self.config
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane, warp = thread % 32, cute.arch.make_warp_uniform(thread // 32)
        memory = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=128).toint())
        first = block * a.block_rows
        count = cutlass.min(a.block_rows, a.n - first)

        self.mark(a, memory, first, count, thread)
        found = self.replaced(a, memory, first, thread)
        if lane == 0:
            ptx.or_shared(memory + c.late_at, found)
        cute.arch.sync_threads()
        late = ptx.load_shared(memory + c.late_at, 1, 0, Uint32)[0]
        for i in cutlass.range(warp, count, c.warps, unroll=1):
            slot = ptx.load_shared(memory + c.slots_at + i * 4, 1, 0, Int32)[0]
            if slot >= 0 and (late >> i) & Uint32(1) == 0:
                page = ptx.divide(slot, a.page_size_magic, a.page_size_shift)
                source, to = a.rows + Int64(first + i) * a.row, a.cache + Int64(page) * a.cache_page
                self.writer.write(a, source, to, slot - page * a.page_size, lane)

    # Slots

    @cute.jit
    def slot(self, a: Arguments, row: Int32) -> Int32:
        """-1 for what is not written: a negative slot, and one past the end."""
        wide = ptx.load_wide(a.slots + Int64(row) * a.slot)
        return Int32(wide) if wide >= 0 and wide < Int64(a.capacity) else Int32(-1)

    @cute.jit
    def mark(self, a: Arguments, memory: Int32, first: Int32, count: Int32, thread: Int32) -> None:
        """The slots of the block's rows, and in the table a bit for each row."""
        c = self.config
        for i in range_constexpr(c.table // c.threads):
            ptx.store_shared(memory + thread * 4, [Uint32(0)], "b32", i * 4 * c.threads)
        if thread == 0:
            ptx.store_shared(memory + c.late_at, [Uint32(0)], "b32")
        cute.arch.sync_threads()
        if thread < c.most_rows:
            slot = Int32(-1)
            if thread < count:
                slot = self.slot(a, first + thread)
            ptx.store_shared(memory + c.slots_at + thread * 4, [slot], "b32")
            if slot >= 0:
                ptx.or_shared(memory + slot % c.table * 4, Uint32(1) << thread)
        cute.arch.sync_threads()

    @cute.jit
    def replaced(self, a: Arguments, memory: Int32, first: Int32, thread: Int32) -> Uint32:
        """A bit for each row of the block whose slot a later row names: of those that this warp has looked at."""
        c = self.config
        found = Uint32(0)
        for start in cutlass.range(first + 1 + thread, a.n, AHEAD * c.threads, unroll=1):
            slots = [self.slot(a, cutlass.min(start + i * c.threads, a.n - 1)) for i in range(AHEAD)]
            for i in range_constexpr(AHEAD):
                row = start + i * c.threads
                if row < a.n and slots[i] >= 0:
                    marks = ptx.load_shared(memory + slots[i] % c.table * 4, 1, 0, Uint32)[0] & ~found
                    if row - first < c.most_rows:
                        marks &= (Uint32(1) << (row - first)) - Uint32(1)  # the rows before this one
                    while marks != 0:
                        which = ptx.lowest_bit(marks)
                        if ptx.load_shared(memory + c.slots_at + which * 4, 1, 0, Int32)[0] == slots[i]:
                            found |= Uint32(1) << which
                        marks &= marks - Uint32(1)
        return ptx.warp_or(found)
