"""``flashmla::decode_up``: `decode`, followed by the product of each head's result with a weight of its own.

    out[b, s, h, :] = attended[b, s, h, :] weight[h]

MLA multiplies what was attended to by W_UV, from the latent to the head's values: ``weight`` is then a transposed view
into ``kv_b_proj``. It is read once for all sequences, and what was attended to is no tensor.

    weight           [h_q, d_v, d_up], of q's type, contiguous along d_v or d_up

The others are those of `decode`: q, kv_cache, k_cache, block_table, cache_seqlens, d_v, qk_start, softmax_scale,
causal, schedule, row_format, attn_sink, levels, window, softcap, cu_seqlens_q and batch_invariant. Returns out
[b, s_q, h_q, d_up] and lse [b, h_q, s_q] float32 (ragged: [t_q, h_q, d_up] and [h_q, t_q]), and raises `ArgumentError`,
as `decode` does.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.ops import decode
from flashmla_ops.ops._autocast import cast
from flashmla_ops.ops._sharding import Way
from flashmla_ops.ops.check import Check, Result, with_last
from flashmla_ops.ops.operator import Operator


@dataclass
class Weighted(decode.Cached):
    """`decode.Cached`, and a weight for each head."""

    weight: Tensor  # [h_q, d_v, d_up], contiguous along d_v or d_up


@dataclass
class DecodeUp(decode.Decode, Weighted):
    """The fields of `Weighted`, then those of `decode.Options`."""


def contract(check: Check, a: DecodeUp) -> tuple[Result, Result]:
    _, lse = decode.contract(check, a)
    weight = a.weight
    check.dims("weight", weight, "[h_q, d_v, d_up]")
    check.dtype("weight", weight, a.q.dtype)
    check.device("weight", weight, a.q)
    check.size("weight", weight, 0, a.q.size(-2), " heads, as q")
    check.require("weight", weight.size(1) == a.d_v, f"d_v {a.d_v}", weight.size(1))
    check.require("weight", weight.size(2) >= 1, "d_up of at least 1", weight.size(2))
    rows = weight.stride(2) == 1 or weight.size(2) == 1
    columns = weight.stride(1) == 1 or a.d_v == 1
    strides = f"strides {weight.stride(1)} and {weight.stride(2)}"
    check.require("weight", rows or columns, "one of the last two dimensions contiguous", strides)
    return Result(with_last(a.q, weight.size(2)), a.q.dtype), lse


def vmap(size: int, dims: dict[str, Any], a: DecodeUp) -> tuple[Any, Any]:
    """The sequences of all entries share the weight, or each entry is a call of its own."""
    op = torch.ops.flashmla.decode_up.default
    return decode.mapped(op, DECODE_UP.check, size, dims, a, "weight", "attn_sink")


def autocast(dtype: torch.dtype, a: DecodeUp) -> DecodeUp:
    """As of `decode`, and the weight in the cache's dtype too."""
    return dataclasses.replace(a, q=cast(a.q, a.kv_cache.dtype), weight=cast(a.weight, a.kv_cache.dtype))


def sharding(a: DecodeUp) -> list[Way]:
    """As of `decode`, with the weight by heads where they are cut; or by what the heads become."""
    heads = "attn_sink"  # is in the ways that cut heads, and in no other
    ways = [{**way, "weight": 0} if heads in way else way for way in decode.sharding(a)]
    return [*ways, {"weight": 2, "out": a.q.dim() - 1}]


DECODE_UP = Operator(
    "decode_up",
    DecodeUp,
    contract,
    lambda a: reference.decode_up(**decode.inputs(a)),
    returns=("out", "lse"),
    values=decode.check_values,
    vmap=vmap,
    autocast=autocast,
    sharding=sharding,
)
