"""``flashmla::decode_schedule``: an explicit plan that balances sequences of different lengths over parallel parts.

Its layout and its rule are in `flashmla_ops.reference.schedule`. Its size depends on ``b`` and ``num_parts`` alone, so
nothing recompiles when lengths change; ``num_parts`` is an argument, never read from the machine.

    cache_seqlens   [b] int32: how many rows each sequence has
    s_q, h_q, h_kv  query tokens of a sequence, query heads and KV heads of the calls that it is for
    num_parts       parts that run in parallel

Returns an int32 tensor for the argument ``schedule`` of `decode`. Raises `ArgumentError` for what does not fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.errors import ArgumentError
from flashmla_ops.ops._library import define, require, require_dims, require_dtype
from flashmla_ops.ops._vmap import loop
from flashmla_ops.reference.schedule import HEADER, MAX_PARTS, row_block, schedule_numel

OP = "decode_schedule"


def check(cache_seqlens: Tensor, s_q: int, h_q: int, h_kv: int, num_parts: int) -> None:
    require_dims(OP, "cache_seqlens", cache_seqlens, "[b]")
    require_dtype(OP, "cache_seqlens", cache_seqlens, torch.int32)
    require(OP, "s_q", s_q >= 1, "at least 1", s_q)
    require(OP, "h_kv", h_kv >= 1, "at least 1", h_kv)
    require(OP, "h_q", h_q >= 0 and h_q % h_kv == 0, f"a multiple of h_kv {h_kv}", h_q)
    valid = num_parts >= 1 and num_parts <= MAX_PARTS
    require(OP, "num_parts", valid, f"a value in [1, {MAX_PARTS}]", num_parts)


def fake(cache_seqlens: Tensor, s_q: int, h_q: int, h_kv: int, num_parts: int) -> Tensor:
    check(cache_seqlens, s_q, h_q, h_kv, num_parts)
    return cache_seqlens.new_empty((schedule_numel(cache_seqlens.size(0), num_parts),))


def by_reference(cache_seqlens: Tensor, s_q: int, h_q: int, h_kv: int, num_parts: int) -> Tensor:
    check(cache_seqlens, s_q, h_q, h_kv, num_parts)
    for i, length in enumerate(cache_seqlens.tolist()):
        if length < 0:
            raise ArgumentError(OP, "cache_seqlens", "lengths of at least 0", f"{length} at [{i}]")
    return reference.decode_schedule(cache_seqlens, s_q, h_q, h_kv, num_parts)


def check_schedule(op: str, schedule: Tensor, cache_seqlens: Tensor, s_q: int, h_q: int, h_kv: int) -> None:
    """Raise unless ``schedule`` is the one that `decode_schedule` makes for these lengths and heads."""
    b = cache_seqlens.size(0)
    made_for, parts = schedule[:4].tolist(), int(schedule[4])
    wanted = [b, s_q, h_q, h_kv]
    expected = f"a schedule made for [b, s_q, h_q, h_kv] {wanted}"
    require(op, "schedule", made_for == wanted, expected, f"one made for {made_for}")
    sized = 1 <= parts <= MAX_PARTS and schedule.numel() == schedule_numel(b, parts)
    sized = sized and int(schedule[5]) == row_block(b, s_q, h_q, h_kv, parts)
    require(op, "schedule", sized, "the tensor that decode_schedule returned", f"{schedule.numel()} elements")
    lengths = schedule[HEADER : HEADER + b]
    for i in (lengths != cache_seqlens).nonzero().flatten().tolist():
        expected = f"a schedule made for length {int(cache_seqlens[i])} at [{i}]"
        raise ArgumentError(op, "schedule", expected, f"one made for length {int(lengths[i])}")
    fresh = reference.decode_schedule(cache_seqlens, s_q, h_q, h_kv, parts)
    same = torch.equal(fresh, schedule)
    require(op, "schedule", same, "the tensor that decode_schedule returned", "other cuts")


define(
    f"{OP}(Tensor cache_seqlens, SymInt s_q, SymInt h_q, SymInt h_kv, SymInt num_parts) -> Tensor",
    fake=fake,
    reference=by_reference,
    vmap=loop(lambda: torch.ops.flashmla.decode_schedule.default),
)
