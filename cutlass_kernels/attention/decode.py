"""``flashmla::decode`` and ``flashmla::sparse_decode`` by mma.sync, cp.async and ldmatrix: sm_80 and newer.

A block has `DecodeConfig.rows` query rows of one item (a sequence and KV head; with indices, a query token and KV head)
and goes through the rows of the cache in tiles. A tile is copied to shared memory once, from wherever its rows lie; its
value is part of its key, so both products read it there. A group of four warps shares 32 query rows (16 in the smallest
kernel). In the first product each warp has a quarter of the key's elements, so that its part of the queries stays in
registers; the four partial scores are added in shared memory. In the second one each has a quarter of the value's
elements. So no element of a tile is read from shared memory more than once a group and product.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, Uint32, const_expr, cute, range_constexpr

from cutlass_kernels.attention import ptx
from cutlass_kernels.attention.config import ACROSS, DecodeConfig
from cutlass_kernels.attention.line import HEADROOM, LOG2_E, Arguments, Item, LineKernel
from cutlass_kernels.attention.rows import LOADERS

GROUP = ACROSS * 32
Value = Any


class DecodeKernel(LineKernel):
    """The kernel of a configuration."""

    def __init__(self, config: DecodeConfig) -> None:
        super().__init__(config, config.threads)
        self.steps, self.columns = config.steps, config.columns
        self.each = config.tile // 8  # scores of a row that a thread has in the softmax

    @cute.kernel
    def kernel(self, a: Arguments) -> None:
        c, to = self.config, a.to
        thread, _, _ = cute.arch.thread_idx()
        row_block, part, _ = cute.arch.block_idx()
        row_blocks, parts, _ = cute.arch.grid_dim()
        lane, across, down = self.place(thread)
        memory = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=128).toint())
        rows = a.s_q * to.group

        token, chunk = thread // LOADERS, thread % LOADERS  # this thread's part in copying
        peer = across * 32 + lane  # number of this thread in its group
        group_row = row_block * c.rows + down * (c.blocks * 16)

        if const_expr(not self.all_have(self.steps - 1)):
            self.clear_padding(memory, thread)

        remaining, number, tile = self.piece(a, part, parts, lane)
        o = cute.make_rmem_tensor((self.columns * c.blocks * 8,), Float32)
        top = cute.make_rmem_tensor((c.blocks,), Float32)
        norm = cute.make_rmem_tensor((c.blocks,), Float32)
        limit = cute.make_rmem_tensor((c.blocks,), Int32)
        found = cute.make_rmem_tensor((self.first.passes,), Int32)  # places of the rows to copy next

        while remaining > 0:
            item = self.item(a, number, tile, remaining)
            if thread == 0 and row_block == 0:
                self.note_span(a, item, tile, part)

            # Copies of the first tiles, on the way while the queries come. The other group may still need the tiles
            # of the item before; a group of its own has ended that item with a barrier.
            if const_expr(c.down > 1):
                cute.arch.sync_threads()
            for ahead in range_constexpr(c.stages - 1):
                self.find(a, item, found, tile + ahead, token)
                self.copy(a, item, found, tile + ahead, token, chunk, memory + ahead * c.stage_bytes)
            self.find(a, item, found, tile + (c.stages - 1), token)
            queries = self.load_queries(a, item, group_row + lane // 4, rows, lane, across)
            o.fill(0.0)
            for i in range_constexpr(c.blocks):
                top[i], norm[i] = -Float32.inf, Float32(0.0)
                row_token = ptx.divide(group_row + peer // 8 + 16 * i, to.group_magic, to.group_shift)
                limit[i] = item.length - a.s_q + row_token + 1 if a.causal != 0 else item.length
            self.lay_down(memory, thread, top, norm)
            self.lay_down_limits(memory, thread, limit, number, tile)
            self.lay_down_item(memory, thread, item)

            stage, filled = memory, memory + (c.stages - 1) * c.stage_bytes
            for t in cutlass.range(tile, item.last, unroll=1):
                cute.arch.cp_async_wait_group(c.stages - 2)
                cute.arch.sync_threads()
                item = self.take_up_item(memory, thread, item)
                self.copy(a, item, found, t + (c.stages - 1), token, chunk, filled)
                self.find(a, item, found, t + c.stages, token)
                place = stage
                if const_expr(len(c.all_codes) > 0):
                    place = memory + c.decoded_at
                    self.decode(item, t, stage, place, token, chunk)
                    cute.arch.sync_threads()
                self.multiply_keys(queries, thread, memory, place)
                ptx.barrier(down + 1, GROUP)
                self.softmax(thread, memory, stage + c.live_at, t * c.tile, top, norm, limit, a.scale)
                ptx.barrier(down + 1, GROUP)
                self.multiply_values(o, thread, memory, place)
                filled = stage
                stage = stage + c.stage_bytes if stage < memory + (c.stages - 1) * c.stage_bytes else memory
            cute.arch.cp_async_wait_group(0)

            # Again: none of this is kept while tiles are worked on.
            thread = ptx.anew(thread)
            lane, across, down = self.place(thread)
            peer, group_row = across * 32 + lane, row_block * c.rows + down * (c.blocks * 16)
            number, tile = self.take_up_place(memory, thread, number, tile)
            self.take_up(memory, thread, top, norm)
            item = self.item(a, number, tile, remaining)
            whole = tile == 0 and item.last == self.tiles_of(item.length, item.second_length)
            slot = part * 2 if tile > 0 else part * 2 + 1
            part_row = Int64(slot) * (row_blocks * c.rows)
            ptx.barrier(down + 1, GROUP)  # factors of the last tile have been read
            factors = memory + c.factors_at + down * (c.blocks * 64)
            self.finish_rows(a, item, whole, part_row, group_row, rows, peer, top, norm, factors)
            ptx.barrier(down + 1, GROUP)
            self.store(a, item, whole, part_row, group_row, rows, factors, o, lane, across)

            remaining -= item.last - tile
            number += 1
            tile = Int32(0)

    # Tiles

    @cute.jit
    def copy(
        self, a: Arguments, item: Item, found: cute.Tensor, tile: Int32, token: Int32, chunk: Int32, stage: Int32
    ) -> None:
        if const_expr(self.config.second):
            if tile < item.tiles:
                self.first.copy(a.first, item.head, found, tile * self.config.tile, token, chunk, stage)
            else:
                self.second.copy(a.second, item.head, found, Int32(0), token, chunk, stage)
        else:
            self.first.copy(a.first, item.head, found, tile * self.config.tile, token, chunk, stage)
        cute.arch.cp_async_commit_group()

    @cute.jit
    def decode(self, item: Item, tile: Int32, stage: Int32, place: Int32, token: Int32, chunk: Int32) -> None:
        if const_expr(self.config.second):
            if tile < item.tiles:
                self.first.decode(stage, place, token, chunk)
            else:
                self.second.decode(stage, place, token, chunk)
        else:
            self.first.decode(stage, place, token, chunk)

    @cute.jit
    def clear_padding(self, memory: Int32, thread: Int32) -> None:
        """What stands for steps of the key that a warp does not have: zeros behind each row."""
        c = self.config
        tiles = 1 if c.all_codes else c.stages
        for i in cutlass.range(thread, tiles * c.tile * 4, c.threads, unroll=1):
            row = i // 4
            to = memory + (c.decoded_at if c.all_codes else 0) + row // c.tile * c.stage_bytes
            ptx.store_shared(to + row % c.tile * c.row_bytes + 2 * c.d + i % 4 * 4, [Uint32(0)], "b32")

    @cute.jit
    def load_queries(
        self, a: Arguments, item: Item, row: Int32, rows: Int32, lane: Int32, across: Int32
    ) -> list[Value]:
        """The warp's part of the queries, as operands: [step][block of 16 rows] of four registers."""
        c = self.config
        base = a.q + Int64(item.sequence) * a.q_batch + Int64(item.token) * a.q_token
        base += Int64(item.head * a.to.group) * a.q_head + lane % 4 * 4 + across * (self.steps * 32)
        places = []
        for i in range_constexpr(2 * c.blocks):
            r = cutlass.min(row + 8 * i, rows - 1)
            s = ptx.divide(r, a.to.group_magic, a.to.group_shift)
            places.append(base + Int64(s) * a.q_token + Int64(r - s * a.to.group) * a.q_head)
        found = []
        for j in range_constexpr(self.steps):
            blocks = []
            for i in range_constexpr(c.blocks):
                part = []
                for at in range_constexpr(4):
                    value = Uint32(0)
                    if const_expr(self.all_have(j)):
                        value = ptx.load(places[2 * i + at % 2], j * 32 + at // 2 * 16)
                    else:
                        if across * self.steps + j < c.d_qk // 16:
                            value = ptx.load(places[2 * i + at % 2], j * 32 + at // 2 * 16)
                    part.append(value)
                blocks.append(part)
            found.append(blocks)
        return found

    def all_have(self, step: int) -> bool:
        """Whether the last warp has this step of the key, and so all."""
        return (ACROSS - 1) * self.steps + step < self.config.d_qk // 16

    # Products

    def place(self, thread: Value) -> tuple[Value, Value, Value]:
        """The lane, and where the warp is: across the elements of a row, and down the query rows."""
        warp = thread // 32
        return thread % 32, warp % ACROSS, warp // ACROSS

    def multiply_keys(self, queries: list[Value], thread: Value, memory: Value, tile: Value) -> None:
        """Scores of this warp's elements of the key, to shared memory."""
        c = self.config
        lane, across, down = self.place(ptx.anew(thread))
        at = (lane % 8 + lane // 16 * 8) * c.row_bytes
        zeros = tile + at + 2 * c.d
        key_at = tile + at + (lane // 8 % 2 * 16 + 2 * c.qk_start) + across * (self.steps * 32)
        partial = memory + c.scores_at + down * c.group_scores + across * (c.blocks * 16 * c.score_row)
        partial += lane // 4 * c.score_row + lane % 4 * 8
        for n in range(c.tile // 16):
            sums = [[[Float32(0.0)] * 4 for _ in range(2)] for _ in range(c.blocks)]
            for j in range(self.steps):
                if self.all_have(j):
                    b = ptx.ldmatrix(key_at, n * 16 * c.row_bytes + j * 32)
                else:
                    has = Int32(across * self.steps + j < c.d_qk // 16)
                    b = ptx.ldmatrix(key_at * has + (zeros - j * 32) * (1 - has), n * 16 * c.row_bytes + j * 32)
                for i in range(c.blocks):
                    for half in range(2):
                        sums[i][half] = ptx.mma(sums[i][half], queries[j][i], b[2 * half : 2 * half + 2], c.dtype)
            for i in range(c.blocks):
                for half in range(2):
                    at = 16 * i * c.score_row + (n * 16 + half * 8) * 4
                    ptx.store_shared(partial, sums[i][half][:2], "f32", at)
                    ptx.store_shared(partial, sums[i][half][2:], "f32", at + 8 * c.score_row)

    @cute.jit
    def softmax(
        self,
        thread: Int32,
        memory: Int32,
        live_at: Int32,
        first: Int32,
        top: cute.Tensor,
        norm: cute.Tensor,
        limit: cute.Tensor,
        scale: Float32,
    ) -> None:
        """The weights of the group's scores, and the factors of the sums before them; eight threads a row."""
        c = self.config
        thread = ptx.anew(thread)
        self.take_up(memory, thread, top, norm)
        self.take_up_limits(memory, thread, limit)
        lane, across, down = self.place(thread)
        row, column = across * 4 + lane // 8, lane % 8
        own_scores = memory + c.scores_at + down * c.group_scores + row * c.score_row + column * (4 * self.each)
        own_weights = memory + c.weights_at + down * (c.blocks * 16 * c.weight_row)
        own_weights += row * c.weight_row + column * (2 * self.each)
        factors = memory + c.factors_at + down * (c.blocks * 64) + row * 4
        live_at += column * self.each
        first += column * self.each
        live = ptx.load_shared(live_at, self.each // 4, 0, Uint32)
        for i in range_constexpr(c.blocks):
            scores = []
            visible = limit[i] - first
            for part in range_constexpr(self.each // 4):
                sums = [
                    ptx.load_shared(own_scores, 4, (w * c.blocks + i) * 16 * c.score_row + part * 16)
                    for w in range(ACROSS)
                ]
                for at in range_constexpr(4):
                    score = (sums[0][at] + sums[1][at]) + (sums[2][at] + sums[3][at])
                    is_live = (live[part] >> (8 * at)) & 0xFF != 0
                    if const_expr(c.source == "pages"):
                        is_live = is_live and visible > 4 * part + at
                    scores.append(score * scale if is_live else -Float32.inf)
            largest = scores[0]
            for at in range_constexpr(1, self.each):
                largest = ptx.maximum(largest, scores[at])
            for d in range_constexpr(3):
                largest = ptx.maximum(largest, cute.arch.shuffle_sync_bfly(largest, 1 << d))
            old = top[i]
            new = largest if largest > old + HEADROOM else old
            top[i] = new
            base = new if new > -Float32.inf else Float32(0.0)
            factor = ptx.exp2(old - base)
            found = [ptx.exp2(score - base) for score in scores]
            total = norm[i] * factor
            for at in range_constexpr(self.each):
                total += found[at]
            norm[i] = total
            for part in range_constexpr(self.each // 4):
                pairs = [ptx.pack(found[4 * part + 2 * h], found[4 * part + 2 * h + 1], c.dtype) for h in range(2)]
                ptx.store_shared(own_weights, pairs, "b32", 16 * i * c.weight_row + part * 8)
            if column == 0:
                ptx.store_shared(factors, [factor], "f32", 64 * i)
        self.lay_down(memory, thread, top, norm)

    # What rests in shared memory while it is not needed

    def rest(self, memory: Value, thread: Value) -> Value:
        return memory + self.config.rest_at + thread * 16

    def lay_down(self, memory: Value, thread: Value, top: Value, norm: Value) -> None:
        if self.config.crowded:
            ptx.store_shared(self.rest(memory, thread), [top[0], norm[0], top[1], norm[1]], "f32")

    def take_up(self, memory: Value, thread: Value, top: Value, norm: Value) -> None:
        if self.config.crowded:
            top[0], norm[0], top[1], norm[1] = ptx.load_shared(self.rest(memory, thread), 4)

    def lay_down_limits(self, memory: Value, thread: Value, limit: Value, number: Value, tile: Value) -> None:
        if self.config.crowded:
            values = [limit[0], limit[1], number, tile]
            ptx.store_shared(self.rest(memory, thread), values, "b32", self.config.threads * 16)

    def take_up_limits(self, memory: Value, thread: Value, limit: Value) -> None:
        if self.config.crowded:
            limit[0], limit[1] = ptx.load_shared(self.rest(memory, thread), 2, self.config.threads * 16, Int32)

    def take_up_place(self, memory: Value, thread: Value, number: Value, tile: Value) -> tuple[Value, Value]:
        if not self.config.crowded:
            return number, tile
        number, tile = ptx.load_shared(self.rest(memory, thread), 2, self.config.threads * 16 + 8, Int32)
        return number, tile

    def lay_down_item(self, memory: Value, thread: Value, item: Item) -> None:
        c = self.config
        if c.crowded and c.second:
            for half in range(2):
                values = item[4 * half : 4 * half + 4]
                ptx.store_shared(self.rest(memory, thread), values, "b32", c.threads * 16 * (2 + half))

    def take_up_item(self, memory: Value, thread: Value, item: Item) -> Item:
        c = self.config
        if not (c.crowded and c.second):
            return item
        place = self.rest(memory, ptx.anew(thread))
        return Item(*(v for half in range(2) for v in ptx.load_shared(place, 4, c.threads * 16 * (2 + half), Int32)))

    @cute.jit
    def multiply_values(self, o: cute.Tensor, thread: Int32, memory: Int32, tile: Int32) -> None:
        """o = factor o + weights values, for this warp's elements of the value."""
        c = self.config
        lane, across, down = self.place(ptx.anew(thread))
        at_row = memory + c.factors_at + down * (c.blocks * 64) + lane // 4 * 4
        weight_at = memory + c.weights_at + down * (c.blocks * 16 * c.weight_row)
        weight_at += lane % 16 * c.weight_row + lane // 16 * 16
        value_at = tile + lane % 16 * c.row_bytes + lane // 16 * 16 + across * (self.columns * 32)
        scale = [[ptx.load_shared(at_row, 1, 64 * i + 32 * h)[0] for h in range(2)] for i in range(c.blocks)]
        same = scale[0][0] == 1.0
        for i in range_constexpr(c.blocks):
            for h in range_constexpr(2):
                same = same & (scale[i][h] == 1.0)
        if not cute.arch.vote_all_sync(same):
            for n in range_constexpr(2 * self.columns):
                for i in range_constexpr(c.blocks):
                    for at in range_constexpr(4):
                        o[(n * c.blocks + i) * 4 + at] = o[(n * c.blocks + i) * 4 + at] * scale[i][at // 2]
        for step in range_constexpr(c.tile // 16):
            a = [ptx.ldmatrix(weight_at, 16 * i * c.weight_row + step * 32) for i in range(c.blocks)]
            for n in range_constexpr(self.columns):
                b = ptx.ldmatrix(value_at, step * 16 * c.row_bytes + 32 * n, transposed=True)
                for i in range_constexpr(c.blocks):
                    for half in range_constexpr(2):
                        at = ((2 * n + half) * c.blocks + i) * 4
                        sums = ptx.mma([o[at + x] for x in range(4)], a[i], b[2 * half : 2 * half + 2], c.dtype)
                        for x in range_constexpr(4):
                            o[at + x] = sums[x]

    # Results

    @cute.jit
    def finish_rows(
        self,
        a: Arguments,
        item: Item,
        whole: cutlass.Boolean,
        part_row: Int64,
        group_row: Int32,
        rows: Int32,
        peer: Int32,
        top: cute.Tensor,
        norm: cute.Tensor,
        finals: Int32,
    ) -> None:
        """The LSE of each row of the group, and what its sums are multiplied by; eight threads a row."""
        c, to = self.config, a.to
        lse = to.lse + Int64(item.sequence) * to.lse_batch + Int64(item.token) * to.lse_token
        lse += Int64(item.head * to.group) * to.lse_head
        for i in range_constexpr(c.blocks):
            row = group_row + peer // 8 + 16 * i
            total = norm[i]
            for d in range_constexpr(3):
                total += cute.arch.shuffle_sync_bfly(total, 1 << d)
            seen = total != 0.0
            log_sum = ptx.log2(total) + top[i]
            final = 1.0 / total if seen else Float32(0.0)
            if peer % 8 == 0:
                if whole:
                    if row < rows:
                        s = ptx.divide(row, to.group_magic, to.group_shift)
                        g = row - s * to.group
                        value = log_sum * Float32(1 / LOG2_E) if seen else Float32.inf
                        ptx.store(lse + Int64(s) * to.lse_token + Int64(g) * to.lse_head, [value], "f32")
                        if to.sink != 0:
                            logit = ptx.load_floats(to.sink + Int64(item.head * to.group + g) * 4, 1)[0]
                            share = 1.0 / (1.0 + ptx.exp2((logit - value) * Float32(LOG2_E)))
                            final = final * share if seen else Float32(0.0)
                else:
                    log_sum = log_sum if seen else -Float32.inf
                    ptx.store(to.lse_parts + (part_row + row) * 4, [log_sum], "f32")
                ptx.store_shared(finals + (peer // 8 + 16 * i) * 4, [final], "f32")

    @cute.jit
    def store(
        self,
        a: Arguments,
        item: Item,
        whole: cutlass.Boolean,
        part_row: Int64,
        group_row: Int32,
        rows: Int32,
        finals: Int32,
        o: cute.Tensor,
        lane: Int32,
        across: Int32,
    ) -> None:
        """The results, or what `combine` is to merge."""
        c, to = self.config, a.to
        out = to.out + Int64(item.sequence) * to.out_batch + Int64(item.token) * to.out_token + lane % 4 * 4
        for i in range_constexpr(c.blocks):
            for half in range_constexpr(2):
                local = lane // 4 + 16 * i + 8 * half
                row = group_row + local
                factor = ptx.load_shared(finals + local * 4)[0]
                if whole:
                    if row < rows:
                        s = ptx.divide(row, to.group_magic, to.group_shift)
                        place = out + Int64(s) * to.out_token
                        place += Int64(item.head * to.group + row - s * to.group) * to.out_head
                        self.store_row(o, i, half, factor, place, across, False)
                else:
                    place = to.out_parts + (part_row + row) * (4 * c.d_v) + lane % 4 * 8
                    self.store_row(o, i, half, factor, place, across, True)

    @cute.jit
    def store_row(
        self,
        o: cute.Tensor,
        i: cutlass.Constexpr,
        half: cutlass.Constexpr,
        factor: Float32,
        to: Int64,
        across: Int32,
        part: cutlass.Constexpr,
    ) -> None:
        """A row of this warp's results; ``part``: in float32."""
        c = self.config
        for n in range_constexpr(2 * self.columns):
            column = across * (2 * self.columns) + n
            if column < c.d_v // 8:
                at = (n * c.blocks + i) * 4 + 2 * half
                # A row that saw nothing is 0, whatever its sums are.
                pair = [o[at + x] * factor if factor != 0.0 else Float32(0.0) for x in range(2)]
                if const_expr(part):
                    ptx.store(to + Int64(column) * 32, pair, "f32")
                else:
                    ptx.store(to + Int64(column) * 16, [ptx.pack(pair[0], pair[1], c.dtype)], "b32")
