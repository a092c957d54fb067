"""``flashmla::merge_states``: results over parts of the keys, merged by their LSE; a warp a row.

A launch takes a few parts, whose addresses are parameters: nothing is copied to the device. Where there are more, what
has been merged so far lies in float32 beside the largest LSE and the sum of weights under it, and the next launch has
it for one part more.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute, range_constexpr

from cutlass_kernels.attention import elements, ptx
from cutlass_kernels.attention.around_config import ELEMENT_BYTES, MergeConfig

LOG2_E = math.log2(math.e)
#: log2 of what is below every positive float64: a part of less weight has none.
LEAST_WEIGHT = -1075.0
#: Bits of the least positive float32.
LEAST = 1
Value = Any


class Part(NamedTuple):
    """Addresses and strides are in bytes."""

    out: Int64
    out_batch: Int64
    out_token: Int64
    out_head: Int64
    lse: Int64
    lse_batch: Int64
    lse_head: Int64
    lse_token: Int64


class Parts(NamedTuple):
    p0: Part
    p1: Part
    p2: Part
    p3: Part
    p4: Part
    p5: Part
    p6: Part
    p7: Part


class Arguments(NamedTuple):
    parts: Parts
    out: Int64  # [b, s_q, h_q, d_v]
    lse: Int64  # [b, h_q, s_q] float32
    sums: Int64  # [rows, d_v] float32: merged so far
    logs: Int64  # [rows, 2] float32: the largest LSE, and the sum of weights under it
    count: Int32  # parts of this launch
    goes_on: Int32  # whether there is something merged so far
    ends: Int32  # whether this is the last launch
    rows: Int32
    d_v: Int32
    tokens: Int32
    tokens_magic: Int32
    tokens_shift: Int32
    heads: Int32
    heads_magic: Int32
    heads_shift: Int32


class MergeKernel:
    """The kernel of a configuration, to be compiled by `cute.compile`."""

    arguments = Arguments

    def __init__(self, config: MergeConfig) -> None:
        assert config.parts == len(Parts._fields)
        self.config = config

    @cute.jit
    def launch(self, a: Arguments) -> None:
        self.kernel(a).launch(grid=[1, 1, 1], block=[self.config.threads, 1, 1])

    @cute.kernel
    def kernel(self, a: Arguments) -> None:
        c = self.config
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane, row = thread % 32, block * c.warps + cute.arch.make_warp_uniform(thread // 32)
        if row < a.rows:
            index = ptx.divide(row, a.heads_magic, a.heads_shift)
            head = row - index * a.heads
            batch = ptx.divide(index, a.tokens_magic, a.tokens_shift)
            token = index - batch * a.tokens
            logs = [self.log(a, i, batch, token, head) for i in range(c.parts)]
            outs = [self.out(a.parts[i], batch, token, head) for i in range(c.parts)]
            self.merge(a, row, (Int64(batch) * a.heads + head) * a.tokens + token, logs, outs, lane)

    @cute.jit
    def log(self, a: Arguments, i: cutlass.Constexpr, batch: Int32, token: Int32, head: Int32) -> Float32:
        """A part's LSE; -inf where it saw nothing, and where there is no such part."""
        part, log = a.parts[i], -Float32.inf
        if i < a.count:
            place = part.lse + Int64(batch) * part.lse_batch + Int64(head) * part.lse_head
            log = ptx.load_floats(place + Int64(token) * part.lse_token, 1)[0]
        return -Float32.inf if log == Float32.inf else log

    def out(self, part: Value, batch: Value, token: Value, head: Value) -> Value:
        return part.out + Int64(batch) * part.out_batch + Int64(token) * part.out_token + Int64(head) * part.out_head

    @cute.jit
    def merge(
        self, a: Arguments, row: Int32, lse_row: Int64, logs: list[Value], outs: list[Value], lane: Int32
    ) -> None:
        c = self.config
        size = c.width * ELEMENT_BYTES[c.dtype]
        old_top, old_norm = -Float32.inf, Float32(0.0)
        if a.goes_on != 0:
            old_top, old_norm = ptx.load_floats(a.logs + Int64(row) * 8, 2)
        top = old_top
        for i in range_constexpr(c.parts):
            top = ptx.maximum(top, logs[i])
        base = top if top > -Float32.inf else Float32(0.0)
        # A NaN among the LSEs makes the norm NaN, and thereby all weights.
        old = old_norm * ptx.exp2_subnormal((old_top - base) * Float32(LOG2_E))
        weights = [ptx.exp2_subnormal((log - base) * Float32(LOG2_E)) for log in logs]
        norm = old
        for i in range_constexpr(c.parts):
            norm += weights[i]
        factor = 1.0 / norm if norm != 0.0 else Float32(0.0)
        old = self.weight(old * factor, old_top - base, a.goes_on != 0)
        weights = [self.weight(weights[i] * factor, logs[i] - base, i < a.count) for i in range(c.parts)]
        if lane == 0:
            if a.ends != 0:
                log = base + ptx.log2(norm) * Float32(1 / LOG2_E) if norm != 0.0 else Float32.inf
                ptx.store(a.lse + lse_row * 4, [log], "f32")
            else:
                ptx.store(a.logs + Int64(row) * 8, [top, norm], "f32")
        sums = a.sums + Int64(row) * a.d_v * 4
        to = a.out + Int64(row) * a.d_v * (size // c.width)
        for unit in cutlass.range(lane, a.d_v // c.width, 32, unroll=1):
            found = cute.make_rmem_tensor((c.width,), Float32)
            found.fill(0.0)
            # A part without weight may hold anything.
            if old != 0.0:
                self.add(found, old, elements.load_own(sums + Int64(unit) * (4 * c.width), c.width))
            for i in range_constexpr(c.parts):
                if weights[i] != 0.0:
                    values = elements.load(outs[i] + Int64(unit) * size, c.dtype, c.width)
                    self.add(found, weights[i], values)
            values = [found[x] for x in range(c.width)]
            if a.ends != 0:
                elements.store(to + Int64(unit) * size, values, c.dtype)
            else:
                elements.store(sums + Int64(unit) * (4 * c.width), values, "fp32")

    @cute.jit
    def weight(self, weight: Float32, distance: Float32, there: cutlass.Boolean) -> Float32:
        """One that float64 still has above 0 is not 0: what it multiplies may be NaN or infinite."""
        least = ptx.bits(Uint32(LEAST), Float32)
        counts = distance * Float32(LOG2_E) > LEAST_WEIGHT and weight < least
        weight = least if counts else weight
        return weight if there else Float32(0.0)

    def add(self, found: Value, weight: Value, values: list[Value]) -> None:
        for x, value in enumerate(values):
            found[x] = found[x] + weight * value
