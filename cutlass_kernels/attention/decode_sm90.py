"""``flashmla::decode`` for the tensor cores of sm_90a: wgmma, with a warpgroup that copies and two that compute.

The line of work and the partial results are those of `decode`; `combine` serves both. A block has 64 query rows and
goes through tiles of 64 tokens, by two: the first warpgroup computes the weights of the first tile of a pair, the
second one those of the second tile. Each of them has half of the value's columns and adds both tiles to them, so
weights go from one to the other through shared memory, with the maxima that they are relative to. While one computes
weights, the products of the other keep the tensor cores busy. The third warpgroup copies what both have done with
(`tiles_sm90`); mbarriers say what is there and what is free.

The idea of two warpgroups that share a softmax is that of FlashMLA for Hopper ("A deep dive into the kernel").
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, Uint32, const_expr, cute, range_constexpr

from cutlass_kernels.attention import ptx
from cutlass_kernels.attention import warpgroup as wg
from cutlass_kernels.attention.line import HEADROOM, LOG2_E, Arguments, Item
from cutlass_kernels.attention.rows import LOADERS
from cutlass_kernels.attention.tiles_sm90 import GROUP, TileCopies

Value = Any
#: Registers of a thread that computes, and of one that copies, or that decodes what it copies. A block begins with 168
#: for each thread, so those of three warpgroups are at most 504 together: for more, a device would wait for ever.
COPYING, DECODING = (224, 56), (216, 72)
#: A smaller scale counts as this one, which makes scores equal too: 0 times the -inf of a masked score would be NaN.
LEAST_SCALE = 2.0**-100
#: Hardware barriers: of the two warpgroups that compute, and of the second one.
BOTH, SECOND = 1, 3


class DecodeSm90Kernel(TileCopies):
    """The kernel of a configuration, for sm_90a."""

    @cute.kernel
    def kernel(self, a: Arguments) -> None:
        c = self.config
        thread, _, _ = cute.arch.thread_idx()
        row_block, part, _ = cute.arch.block_idx()
        _, parts, _ = cute.arch.grid_dim()
        lane, warp = thread % 32, cute.arch.make_warp_uniform(thread // 32)
        role = warp // 4
        computes, copies = DECODING if c.all_codes else COPYING
        memory = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024).toint())
        row0 = row_block * c.rows

        if thread == 0:
            self.init_barriers(memory)
        cute.arch.sync_threads()
        remaining, number, tile = self.piece(a, part, parts, lane)
        remaining, number, tile = self.uniform(remaining), self.uniform(number), self.uniform(tile)
        if role == 2:
            wg.fewer_registers(copies)
            self.copies(a, memory, thread - 2 * GROUP, row0, remaining, number, tile)
        else:
            wg.more_registers(computes)
            self.computes(a, memory, thread, role, row_block, part, remaining, number, tile)

    @cute.jit
    def copies(
        self, a: Arguments, memory: Int32, copier: Int32, row0: Int32, remaining: Int32, number: Int32, tile: Int32
    ) -> None:
        """What the third warpgroup does."""
        c = self.config
        token, chunk = copier // LOADERS, copier % LOADERS
        target = memory + token * 128 + (chunk ^ token % 8) * 16
        found = cute.make_rmem_tensor((self.passes,), Int32)  # places of the rows to copy next
        uses, items = Int32(0), Int32(0)
        while remaining > 0:
            item = self.uniform_item(a, number, tile, remaining)
            self.find(a, item, found, tile, token)
            wg.wait_barrier(memory + c.queries_free_at, items % 2 ^ 1)
            self.copy_queries(a, item, row0 + token, a.s_q * a.to.group, chunk, target + c.queries_at)
            wg.arrive_with_copies(memory + c.queries_full_at)
            items += 1
            uses = self.copy_item(a, item, found, tile, uses, memory, target, token, chunk)
            remaining -= item.last - tile
            number += 1
            tile = Int32(0)

    @cute.jit
    def computes(
        self,
        a: Arguments,
        memory: Int32,
        thread: Int32,
        role: Int32,
        row_block: Int32,
        part: Int32,
        remaining: Int32,
        number: Int32,
        tile: Int32,
    ) -> None:
        """What the first two warpgroups do."""
        c, to = self.config, a.to
        o = cute.make_rmem_tensor((self.half // 2,), Float32)
        top = cute.make_rmem_tensor((2,), Float32)
        norm = cute.make_rmem_tensor((2,), Float32)
        limit = cute.make_rmem_tensor((2,), Int32)
        lane, row0 = thread % 32, row_block * c.rows
        local = thread // 32 % 4 * 16 + lane // 4  # this thread has rows local and local + 8
        uses, items = Int32(0), Int32(0)
        while remaining > 0:
            item = self.uniform_item(a, number, tile, remaining)
            if thread == 0 and row_block == 0:
                self.note_span(a, item, tile, part)
            o.fill(0.0)
            for i in range_constexpr(2):
                top[i], norm[i] = -Float32.inf, Float32(0.0)
                limit[i] = Int32(0x7FFFFFFF)
                if const_expr(c.source == "pages"):
                    token_of_row = ptx.divide(row0 + local + 8 * i, to.group_magic, to.group_shift)
                    limit[i] = item.length - a.s_q + token_of_row + 1 if a.causal != 0 else item.length
            wg.wait_barrier(memory + c.queries_full_at, items % 2)
            if role == 0:
                uses = self.first_warpgroup(memory, o, top, norm, limit, tile, item.last, uses, local, lane, a.scale)
            else:
                uses = self.second_warpgroup(memory, o, top, norm, limit, tile, item.last, uses, local, lane, a.scale)

            # The norm of a row: the sum of what its four threads in each warpgroup have.
            norms = memory + c.norms_at + items % 2 * (8 * c.rows) + local * 4
            for i in range_constexpr(2):
                for d in range_constexpr(2):
                    norm[i] = norm[i] + cute.arch.shuffle_sync_bfly(norm[i], 1 << d)
                if lane % 4 == 0:
                    ptx.store_shared(norms + role * (4 * c.rows), [norm[i]], "f32", 32 * i)
            ptx.barrier(Int32(BOTH), 2 * GROUP)
            items += 1
            self.finish(a, item, tile, part, row0, local, lane, role, norms, o, top)
            remaining -= item.last - tile
            number += 1
            tile = Int32(0)

    @cute.jit
    def finish(
        self,
        a: Arguments,
        item: Item,
        tile: Int32,
        part: Int32,
        row0: Int32,
        local: Int32,
        lane: Int32,
        role: Int32,
        norms: Int32,
        o: cute.Tensor,
        top: cute.Tensor,
    ) -> None:
        """Write this thread's columns of its two rows: results, or what `combine` is to merge."""
        c, to = self.config, a.to
        row_blocks, _, _ = cute.arch.grid_dim()
        whole = tile == 0 and item.last == self.tiles_of(item.length, item.second_length)
        slot = part * 2 if tile > 0 else part * 2 + 1
        column = Int64(role * self.half + lane % 4 * 2)
        for i in range_constexpr(2):
            total = ptx.load_shared(norms, 1, 32 * i)[0] + ptx.load_shared(norms, 1, 4 * c.rows + 32 * i)[0]
            seen = total != 0.0
            log_sum = ptx.log2(total) + top[i]
            final = 1.0 / total if seen else Float32(0.0)
            row = row0 + local + 8 * i
            if whole:
                if row < a.s_q * to.group:
                    s = ptx.divide(row, to.group_magic, to.group_shift)
                    head, token = Int64(item.head * to.group + row - s * to.group), Int64(item.token + s)
                    value = log_sum * Float32(1 / LOG2_E) if seen else Float32.inf
                    if role == 0 and lane % 4 == 0:
                        place = to.lse + Int64(item.sequence) * to.lse_batch + head * to.lse_head
                        ptx.store(place + token * to.lse_token, [value], "f32")
                    if to.sink != 0:
                        logit = ptx.load_floats(to.sink + head * 4, 1)[0]
                        share = 1.0 / (1.0 + ptx.exp2((logit - value) * Float32(LOG2_E)))
                        final = final * share if seen else Float32(0.0)
                    place = to.out + Int64(item.sequence) * to.out_batch + token * to.out_token + head * to.out_head
                    self.store_half_row(o, i, final, place + column * 2, False)
            else:
                part_row = Int64(slot) * (row_blocks * c.rows) + row
                if role == 0 and lane % 4 == 0:
                    log_sum = log_sum if seen else -Float32.inf
                    ptx.store(to.lse_parts + part_row * 4, [log_sum], "f32")
                self.store_half_row(o, i, final, to.out_parts + part_row * (4 * c.d_v) + column * 4, True)

    @cute.jit
    def uniform_item(self, a: Arguments, number: Int32, tile: Int32, remaining: Int32) -> Item:
        """The item, with bounds of loops that all threads of a warp are known to share: products must not diverge."""
        item = self.item(a, number, tile, remaining)
        length, tiles, last = self.uniform(item.length), self.uniform(item.tiles), self.uniform(item.last)
        return Item(item.number, item.sequence, item.token, item.head, length, item.second_length, tiles, last)

    def uniform(self, value: Value) -> Value:
        """A value that all threads of a warp have, and the compiler knows it."""
        return cute.arch.make_warp_uniform(value)

    def init_barriers(self, memory: Value) -> None:
        c = self.config
        for stage in range(2):
            for block in range(c.blocks):
                # The last block's one also says that the stage's live bytes are there.
                live = GROUP // LOADERS if block == c.blocks - 1 else 0
                wg.init_barrier(memory + c.full_at + 8 * (stage * c.blocks + block), GROUP + live)
            for half in range(2):
                wg.init_barrier(memory + c.free_at + 8 * (2 * stage + half), GROUP // 32)
            wg.init_barrier(memory + c.weighed_at + 8 * stage, GROUP // 32)
        wg.init_barrier(memory + c.queries_full_at, GROUP)
        wg.init_barrier(memory + c.queries_free_at, 2 * GROUP // 32)

    # What the two warpgroups do with the tiles of an item

    @cute.jit
    def first_warpgroup(
        self,
        memory: Int32,
        o: cute.Tensor,
        top: cute.Tensor,
        norm: cute.Tensor,
        limit: cute.Tensor,
        tile: Int32,
        last: Int32,
        uses: Int32,
        local: Int32,
        lane: Int32,
        scale: Float32,
    ) -> Int32:
        c = self.config
        found = cute.make_rmem_tensor((32,), Float32)  # a tile's weights
        weights = cute.make_rmem_tensor((16,), Uint32)  # the same, rounded
        factors = cute.make_rmem_tensor((2,), Float32)
        for t in cutlass.range(tile, last, 2, unroll=1):
            scores = wg.wait_products(self.begin_scores(memory, 0, uses))
            if t + 2 >= last:
                self.arrive(memory + c.queries_free_at, lane)
            self.softmax_tile(scores, found, weights, memory, 0, t * c.tile, top, limit, factors, lane, scale)
            self.publish(memory, 0, weights, top, local, lane)
            self.rescale(o, factors)
            self.add_values(memory, 0, 0, o, [weights[i] for i in range(16)])
            self.add_norms(found, factors, norm)
            self.finish_values(memory, 0, 0, o, lane)
            if t + 1 < last:
                self.follow(memory, 1, uses, o, top, norm, factors, local)
                self.add_values(memory, 1, 0, o, None)
                self.finish_values(memory, 1, 0, o, lane)
                uses = uses ^ 2
            uses = uses ^ 1
        return uses

    @cute.jit
    def second_warpgroup(
        self,
        memory: Int32,
        o: cute.Tensor,
        top: cute.Tensor,
        norm: cute.Tensor,
        limit: cute.Tensor,
        tile: Int32,
        last: Int32,
        uses: Int32,
        local: Int32,
        lane: Int32,
        scale: Float32,
    ) -> Int32:
        c = self.config
        found = cute.make_rmem_tensor((32,), Float32)  # a tile's weights
        weights = cute.make_rmem_tensor((16,), Uint32)  # the same, rounded
        factors = cute.make_rmem_tensor((2,), Float32)
        if tile + 1 == last:
            self.arrive(memory + c.queries_free_at, lane)
        for t in cutlass.range(tile, last, 2, unroll=1):
            if t + 1 < last:
                scores = self.begin_scores(memory, 1, uses)
                self.follow(memory, 0, uses, o, top, norm, factors, local)
                self.add_values(memory, 0, 1, o, None)
                scores = wg.wait_products(scores, 1)
                if t + 3 >= last:
                    self.arrive(memory + c.queries_free_at, lane)
                self.softmax_tile(scores, found, weights, memory, 1, (t + 1) * c.tile, top, limit, factors, lane, scale)
                if const_expr(c.shares):
                    # The weights take the place of a part of the keys: all four warps must be done with them.
                    ptx.barrier(Int32(SECOND), GROUP)
                self.publish(memory, 1, weights, top, local, lane)
                self.finish_values(memory, 0, 1, o, lane)
                self.rescale(o, factors)
                self.add_values(memory, 1, 1, o, [weights[i] for i in range(16)])
                self.add_norms(found, factors, norm)
                self.finish_values(memory, 1, 1, o, lane)
                uses = uses ^ 2
            else:
                self.follow(memory, 0, uses, o, top, norm, factors, local)
                self.add_values(memory, 0, 1, o, None)
                self.finish_values(memory, 0, 1, o, lane)
            uses = uses ^ 1
        return uses

    @cute.jit
    def arrive(self, barrier: Int32, lane: Int32) -> None:
        """A warp arrives, once all of its threads are here."""
        cute.arch.sync_warp()
        if lane == 0:
            wg.arrive(barrier)

    def begin_scores(self, memory: Value, stage: int, uses: Value) -> list[Value]:
        c = self.config
        queries, keys = wg.by_rows(memory + c.queries_at), wg.by_rows(memory + stage * c.stage_bytes)
        full = memory + c.full_at + stage * (8 * c.blocks)
        fences = 1 if c.all_codes else c.blocks  # who decodes rows has a fence behind them
        return wg.multiply_blocks(queries, keys, c.blocks, full, (uses >> stage) & 1, c.dtype, fences)

    @cute.jit
    def softmax_tile(
        self,
        scores: list[Value],
        found: cute.Tensor,
        weights: cute.Tensor,
        memory: Int32,
        stage: cutlass.Constexpr,
        first: Int32,
        top: cute.Tensor,
        limit: cute.Tensor,
        factors: cute.Tensor,
        lane: Int32,
        scale: Float32,
    ) -> None:
        """The weights of a tile's scores, as operands of a product, and the factors of the sums before them."""
        c = self.config
        live_at = memory + c.live_at + stage * c.tile + lane % 4 * 2
        live = [ptx.load_two_bytes(live_at, 8 * j) for j in range(8)]
        every = live[0]
        for j in range_constexpr(1, 8):
            every = every & live[j]
        for at in range_constexpr(32):
            found[at] = scores[at]
        first = first + lane % 4 * 2
        size = ptx.maximum(ptx.maximum(scale, -scale), Float32(LEAST_SCALE))
        if every != 0x1010 or first + 57 >= limit[0] or scale < 0.0:
            sign = Float32(-1.0) if scale < 0.0 else Float32(1.0)
            for j in range_constexpr(8):
                for i in range_constexpr(2):
                    for x in range_constexpr(2):
                        is_live = (live[j] >> (8 * x)) & 0xFF != 0 and first + 8 * j + x < limit[i]
                        at = 4 * j + 2 * i + x
                        found[at] = found[at] * sign if is_live else -Float32.inf
        for i in range_constexpr(2):
            largest = self.reduce([found[at] for at in range(32) if at // 2 % 2 == i], ptx.maximum) * size
            for d in range_constexpr(2):
                largest = ptx.maximum(largest, cute.arch.shuffle_sync_bfly(largest, 1 << d))
            old = top[i]
            new = largest if largest > old + HEADROOM else old
            top[i] = new
            base = new if new > -Float32.inf else Float32(0.0)
            factors[i] = ptx.exp2(old - base)
            for j in range_constexpr(8):
                at = 4 * j + 2 * i
                for x in range_constexpr(2):
                    found[at + x] = ptx.exp2(ptx.fma(found[at + x], size, -base))
                weights[2 * j + i] = ptx.pack(found[at], found[at + 1], c.dtype)

    def reduce(self, values: list[Value], combine: Any) -> Value:
        """All values combined by two, so that no long chain of operations waits for itself."""
        while len(values) > 1:
            values = [combine(values[at], values[at + 1]) for at in range(0, len(values), 2)]
        return values[0]

    def add_norms(self, found: Value, factors: Value, norm: Value) -> None:
        for i in range(2):
            total = self.reduce([found[at] for at in range(32) if at // 2 % 2 == i], lambda x, y: x + y)
            norm[i] = norm[i] * factors[i] + total

    @cute.jit
    def publish(
        self,
        memory: Int32,
        stage: cutlass.Constexpr,
        weights: cute.Tensor,
        top: cute.Tensor,
        local: Int32,
        lane: Int32,
    ) -> None:
        """Weights and maxima to shared memory, for the other warpgroup."""
        c = self.config
        to = memory + c.weights_at(stage) + local * 128 + lane // 4 * 16 + lane % 4 * 4
        for j in range_constexpr(8):
            for i in range_constexpr(2):
                ptx.store_shared(to ^ (j * 16), [weights[2 * j + i]], "b32", 1024 * i)
        if lane % 4 == 0:
            for i in range_constexpr(2):
                ptx.store_shared(memory + c.tops_at + stage * (4 * c.rows) + local * 4, [top[i]], "f32", 32 * i)
        wg.fence_async()
        self.arrive(memory + c.weighed_at + 8 * stage, lane)

    @cute.jit
    def follow(
        self,
        memory: Int32,
        stage: cutlass.Constexpr,
        uses: Int32,
        o: cute.Tensor,
        top: cute.Tensor,
        norm: cute.Tensor,
        factors: cute.Tensor,
        local: Int32,
    ) -> None:
        """Wait for the other warpgroup's weights, and take over its maxima."""
        c = self.config
        wg.wait_barrier(memory + c.weighed_at + 8 * stage, (uses >> stage) & 1)
        for i in range_constexpr(2):
            new = ptx.load_shared(memory + c.tops_at + stage * (4 * c.rows) + local * 4, 1, 32 * i)[0]
            base = new if new > -Float32.inf else Float32(0.0)
            factors[i] = ptx.exp2(top[i] - base)
            norm[i] = norm[i] * factors[i]
            top[i] = new
        self.rescale(o, factors)

    @cute.jit
    def rescale(self, o: cute.Tensor, factors: cute.Tensor) -> None:
        same = (factors[0] == 1.0) & (factors[1] == 1.0)
        if not cute.arch.vote_all_sync(same):
            for at in range_constexpr(self.half // 2):
                o[at] = o[at] * factors[at // 2 % 2]

    def add_values(self, memory: Value, stage: int, half: int, o: Value, weights: list[Value] | None) -> None:
        """Begin to add a tile's weights times this warpgroup's columns of its values."""
        c = self.config
        values = wg.by_columns(memory + stage * c.stage_bytes + half * (self.half // 64 * c.block_bytes))
        a = weights if weights is not None else wg.by_rows(memory + c.weights_at(stage))
        self.put(o, wg.add_product([o[at] for at in range(self.half // 2)], a, values, c.dtype))

    def finish_values(self, memory: Value, stage: int, half: int, o: Value, lane: Value) -> None:
        """Wait for the sums, and let the columns be overwritten."""
        self.put(o, wg.wait_products([o[at] for at in range(self.half // 2)]))
        self.arrive(memory + self.config.free_at + 8 * (2 * stage + half), lane)

    def put(self, o: Value, sums: list[Value]) -> None:
        for at, value in enumerate(sums):
            o[at] = value

    @cute.jit
    def store_half_row(
        self, o: cute.Tensor, i: cutlass.Constexpr, factor: Float32, to: Int64, part: cutlass.Constexpr
    ) -> None:
        """A row of this warpgroup's columns; ``part``: float32, to be combined."""
        for j in range_constexpr(self.half // 8):
            # A row that saw nothing is 0, whatever its sums are.
            pair = [o[4 * j + 2 * i + x] * factor if factor != 0.0 else Float32(0.0) for x in range(2)]
            if const_expr(part):
                ptx.store(to, pair, "f32", 32 * j)
            else:
                ptx.store(to, [ptx.pack(pair[0], pair[1], self.config.dtype)], "b32", 16 * j)
