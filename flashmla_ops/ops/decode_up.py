"""``flashmla::decode_up``: `decode`, followed by the product of each head's result with a weight of its own.

    out[b, s, h, :] = attended[b, s, h, :] weight[h]

MLA multiplies what was attended to by W_UV, from the latent to the head's values: ``weight`` is then a transposed view
into ``kv_b_proj``. It is read once for all sequences, and what was attended to is no tensor.

    weight           [h_q, d_v, d_up], of q's type, contiguous along d_v or d_up

The others are those of `decode`: q, kv_cache, k_cache, block_table, cache_seqlens, d_v, qk_start, softmax_scale,
causal, schedule, row_format, attn_sink and levels. Returns out [b, s_q, h_q, d_up] and lse [b, h_q, s_q] float32, and
raises `ArgumentError`, as `decode` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.ops import decode
from flashmla_ops.ops._autocast import cast
from flashmla_ops.ops._library import (
    define,
    require,
    require_device,
    require_dims,
    require_dtype,
)
from flashmla_ops.ops._vmap import Dims, each

OP = "decode_up"


def check_weight(q: Tensor, weight: Tensor, d_v: int) -> None:
    require_dims(OP, "weight", weight, "[h_q, d_v, d_up]")
    require_dtype(OP, "weight", weight, q.dtype)
    require_device(OP, "weight", weight, q.device)
    require(OP, "weight", weight.size(0) == q.size(2), f"{q.size(2)} heads, as q", weight.size(0))
    require(OP, "weight", weight.size(1) == d_v, f"d_v {d_v}", weight.size(1))
    require(OP, "weight", weight.size(2) >= 1, "d_up of at least 1", weight.size(2))
    rows = weight.stride(2) == 1 or weight.size(2) == 1
    require(
        OP,
        "weight",
        rows or weight.stride(1) == 1 or d_v == 1,
        "one of the last two dimensions contiguous",
        f"strides {weight.stride(1)} and {weight.stride(2)}",
    )


def fake(
    q: Tensor,
    kv_cache: Tensor,
    k_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    weight: Tensor,  # [h_q, d_v, d_up], contiguous along d_v or d_up
    d_v: int,
    qk_start: int = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    schedule: Tensor | None = None,
    row_format: str = "native",
    attn_sink: Tensor | None = None,
    levels: int = 3,
) -> tuple[Tensor, Tensor]:  # out [b, s_q, h_q, d_up], lse [b, h_q, s_q] float32
    decode.check(
        OP, q, kv_cache, k_cache, block_table, cache_seqlens, d_v, qk_start, schedule, row_format, attn_sink, levels
    )
    check_weight(q, weight, d_v)
    b, s_q, h_q, _ = q.shape
    return q.new_empty((b, s_q, h_q, weight.size(2))), q.new_empty((b, h_q, s_q), dtype=torch.float32)


def by_reference(
    q: Tensor,
    kv_cache: Tensor,
    k_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    weight: Tensor,
    d_v: int,
    qk_start: int = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    schedule: Tensor | None = None,
    row_format: str = "native",
    attn_sink: Tensor | None = None,
    levels: int = 3,
) -> tuple[Tensor, Tensor]:
    decode.check(
        OP, q, kv_cache, k_cache, block_table, cache_seqlens, d_v, qk_start, schedule, row_format, attn_sink, levels
    )
    check_weight(q, weight, d_v)
    decode.check_values(OP, q, kv_cache, block_table, cache_seqlens, schedule)
    attended = (d_v, qk_start, softmax_scale, causal, attn_sink, row_format)
    out, lse = reference.decode_up(q, kv_cache, k_cache, block_table, cache_seqlens, weight, *attended)
    return out.to(q.dtype).contiguous(), lse.to(torch.float32)


def autocast(dtype: torch.dtype, q: Tensor, kv_cache: Tensor, *rest: Any) -> tuple[Any, ...]:
    """As of `decode`, and the weight in the cache's dtype too."""
    k_cache, block_table, cache_seqlens, weight, *options = rest
    weight = cast(weight, kv_cache.dtype)
    return cast(q, kv_cache.dtype), kv_cache, k_cache, block_table, cache_seqlens, weight, *options


def vmap(
    info: Any,
    in_dims: Dims,
    q: Tensor,
    kv_cache: Tensor,
    k_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    weight: Tensor,
    d_v: int,
    qk_start: int = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    schedule: Tensor | None = None,
    row_format: str = "native",
    attn_sink: Tensor | None = None,
    levels: int = 3,
) -> tuple[Any, Any]:
    """The mapped dimension joins the sequences, which share the weight."""
    size, cache = info.batch_size, (q, kv_cache, k_cache, block_table, cache_seqlens)
    require(OP, "schedule", schedule is None, "None under vmap (it is made for one batch)", "a tensor")
    options = (weight, d_v, qk_start, softmax_scale, causal, None, row_format, attn_sink, levels)
    if not decode.folds(in_dims, kv_cache, k_cache, weight=5, attn_sink=12):
        return each(torch.ops.flashmla.decode_up.default, info, in_dims, *cache, *options)
    out, lse = torch.ops.flashmla.decode_up(*decode.fold(size, in_dims[:5], *cache), *options)
    return (out.unflatten(0, (size, -1)), lse.unflatten(0, (size, -1))), (0, 0)


define(
    f"{OP}({decode.TENSORS}, Tensor weight, {decode.OPTIONS}) -> (Tensor out, Tensor lse)",
    fake=fake,
    reference=by_reference,
    vmap=vmap,
    autocast=autocast,
)
