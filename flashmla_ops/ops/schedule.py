"""``flashmla::decode_schedule``: an explicit plan that balances sequences of different lengths over parallel parts.

Its layout and its rule are in `flashmla_ops.reference.schedule`. Its size depends on ``b`` and ``num_parts`` alone, so
nothing recompiles when lengths change; ``num_parts`` is an argument, never read from the machine.

    cache_seqlens   [b] int32: how many rows each sequence has
    s_q, h_q, h_kv  query tokens of a sequence, query heads and KV heads of the calls that it is for
    num_parts       parts that run in parallel

Returns an int32 tensor for the argument ``schedule`` of `decode`. Raises `ArgumentError` for what does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.errors import ArgumentError
from flashmla_ops.ops._vmap import loop
from flashmla_ops.ops.check import Check, Result
from flashmla_ops.ops.operator import Arguments, Operator
from flashmla_ops.reference.schedule import HEADER, MAX_PARTS, row_block, schedule_numel


@dataclass
class DecodeSchedule(Arguments):
    """Lengths, the sizes of the queries to come, and how many parts there are to be."""

    cache_seqlens: Tensor  # [b] int32
    s_q: int
    h_q: int
    h_kv: int
    num_parts: int


def contract(check: Check, a: DecodeSchedule) -> Result:
    check.dims("cache_seqlens", a.cache_seqlens, "[b]")
    check.dtype("cache_seqlens", a.cache_seqlens, torch.int32)
    check.require("s_q", a.s_q >= 1, "at least 1", a.s_q)
    check.require("h_kv", a.h_kv >= 1, "at least 1", a.h_kv)
    check.require("h_q", a.h_q >= 0 and a.h_q % a.h_kv == 0, f"a multiple of h_kv {a.h_kv}", a.h_q)
    possible = a.num_parts >= 1 and a.num_parts <= MAX_PARTS
    check.require("num_parts", possible, f"a value in [1, {MAX_PARTS}]", a.num_parts)
    return Result([schedule_numel(a.cache_seqlens.size(0), a.num_parts)], torch.int32)


def check_values(check: Check, a: DecodeSchedule) -> None:
    for i, length in enumerate(a.cache_seqlens.tolist()):
        if length < 0:
            raise ArgumentError(check.op, "cache_seqlens", "lengths of at least 0", f"{length} at [{i}]")


def check_schedule(check: Check, schedule: Tensor, cache_seqlens: Tensor, s_q: int, h_q: int, h_kv: int) -> None:
    """Raise unless ``schedule`` is the one that `decode_schedule` makes for these lengths and heads."""
    b = cache_seqlens.size(0)
    made_for, parts = schedule[:4].tolist(), int(schedule[4])
    wanted = [b, s_q, h_q, h_kv]
    expected = f"a schedule made for [b, s_q, h_q, h_kv] {wanted}"
    check.require("schedule", made_for == wanted, expected, f"one made for {made_for}")
    sized = 1 <= parts <= MAX_PARTS and schedule.numel() == schedule_numel(b, parts)
    sized = sized and int(schedule[5]) == row_block(b, s_q, h_q, h_kv, parts)
    check.require("schedule", sized, "the tensor that decode_schedule returned", f"{schedule.numel()} elements")
    lengths = schedule[HEADER : HEADER + b]
    for i in (lengths != cache_seqlens).nonzero().flatten().tolist():
        expected = f"a schedule made for length {int(cache_seqlens[i])} at [{i}]"
        raise ArgumentError(check.op, "schedule", expected, f"one made for length {int(lengths[i])}")
    fresh = reference.decode_schedule(cache_seqlens, s_q, h_q, h_kv, parts)
    same = torch.equal(fresh, schedule)
    check.require("schedule", same, "the tensor that decode_schedule returned", "other cuts")


DECODE_SCHEDULE = Operator(
    "decode_schedule",
    DecodeSchedule,
    contract,
    lambda a: reference.decode_schedule(*a.values()),
    returns=("schedule",),
    values=check_values,
    vmap=loop(lambda: torch.ops.flashmla.decode_schedule.default),
)
