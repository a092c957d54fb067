"""``flashmla::attend_masked``: attention under any mask, fast where the mask turns out to be simple.

    out[b, s, h, :] = softmax(softmax_scale * q k^T + mask) v          (a bool mask: -inf where it is False)

Keys and values are rows of a cache that is one page a sequence, as `decode` reads them:

    value = kv_cache[b, t, head, 0 : d_v]        key = kv_cache[b, t, head, qk_start :] ++ k_cache[b, t, head, :]

The mask is read at run time. Where the queries of a sequence see consecutive keys, all of them the same or each query
one more than the query before it, only those rows are read, by the kernels of `decode` and `prefill`: an all-true
padding mask, padding on the right, and padding on the left of a single query are of this kind. Any other mask is exact
too, through ``torch.nn.functional.scaled_dot_product_attention``.

    q                [b, s_q, h_q, d_qk] float32, bfloat16 or float16
    kv_cache         [b, s_kv, h_kv, d], of q's type
    k_cache          [b, s_kv, h_kv, d_k] or None: the rest of each key
    mask             [b, h_q, s_q, s_kv], each size or 1: bool (True: seen), or added to the scores
    d_v, qk_start    the value is row[0 : d_v], the key row[qk_start :]
    softmax_scale    None: d_qk ** -0.5
    nan_where_empty  a query that sees no key becomes NaN, as in a softmax of -inf, instead of 0

Returns out [b, s_q, h_q, d_v], of q's type. Raises `ArgumentError` for shapes, types and devices that do not fit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.ops._autocast import cast
from flashmla_ops.ops._library import (
    define,
    dtype_name,
    require,
    require_contiguous_rows,
    require_device,
    require_dims,
    require_dtype,
    require_float,
)
from flashmla_ops.ops._vmap import loop

OP = "attend_masked"


def check(q: Tensor, kv_cache: Tensor, k_cache: Tensor | None, mask: Tensor, d_v: int, qk_start: int) -> None:
    """The preconditions that shapes, strides and dtypes decide; the C++ binding checks the same, in the same words."""
    require_dims(OP, "q", q, "[b, s_q, h_q, d_qk]")
    require_float(OP, "q", q)
    b, s_q, h_q, d_qk = q.shape
    require(OP, "q", s_q >= 1, "at least 1 query token (s_q)", s_q)
    require_dims(OP, "kv_cache", kv_cache, "[b, s_kv, h_kv, d]")
    require_dtype(OP, "kv_cache", kv_cache, q.dtype)
    require_device(OP, "kv_cache", kv_cache, q.device)
    require_contiguous_rows(OP, "kv_cache", kv_cache)
    require(OP, "kv_cache", kv_cache.size(0) == b, f"{b} sequences, as q", kv_cache.size(0))
    _, s_kv, h_kv, d = kv_cache.shape
    require(OP, "kv_cache", s_kv >= 1, "at least 1 token (s_kv)", s_kv)
    require(OP, "kv_cache", h_kv >= 1, "at least 1 KV head (h_kv)", h_kv)
    require(OP, "q", h_q % h_kv == 0, f"query heads in multiples of the {h_kv} KV heads", h_q)
    require(OP, "d_v", d_v >= 1 and d_v <= d, f"a value in [1, {d}]", d_v)
    require(OP, "qk_start", qk_start >= 0 and qk_start <= d, f"a value in [0, {d}]", qk_start)
    d_k = 0
    if k_cache is not None:
        require_dims(OP, "k_cache", k_cache, "[b, s_kv, h_kv, d_k]")
        require_dtype(OP, "k_cache", k_cache, q.dtype)
        require_device(OP, "k_cache", k_cache, q.device)
        require_contiguous_rows(OP, "k_cache", k_cache)
        for dim in range(3):
            size, same = kv_cache.size(dim), k_cache.size(dim) == kv_cache.size(dim)
            require(OP, "k_cache", same, f"size {size} in dimension {dim}, as kv_cache", k_cache.size(dim))
        d_k = k_cache.size(3)
    d_key = d - qk_start + d_k
    require(OP, "q", d_qk == d_key and d_qk >= 1, f"d_qk {d_key}, the length of a key", d_qk)
    require_dims(OP, "mask", mask, "[b, h_q, s_q, s_kv]")
    served = mask.dtype in (torch.bool, torch.float32, q.dtype)
    require(OP, "mask", served, "bool, float32 or the type of q", dtype_name(mask.dtype))
    require_device(OP, "mask", mask, q.device)
    for dim, size in enumerate((b, h_q, s_q, s_kv)):
        fits = mask.size(dim) == 1 or mask.size(dim) == size
        require(OP, "mask", fits, f"size {size} or 1 in dimension {dim}", mask.size(dim))


def fake(
    q: Tensor,  # [b, s_q, h_q, d_qk]
    kv_cache: Tensor,  # [b, s_kv, h_kv, d], d contiguous
    k_cache: Tensor | None,  # [b, s_kv, h_kv, d_k], d_k contiguous
    mask: Tensor,  # [b, h_q, s_q, s_kv], each size or 1; bool, or added to the scores
    d_v: int,
    qk_start: int = 0,
    softmax_scale: float | None = None,
    nan_where_empty: bool = False,
) -> Tensor:  # [b, s_q, h_q, d_v]
    check(q, kv_cache, k_cache, mask, d_v, qk_start)
    return q.new_empty((q.size(0), q.size(1), q.size(2), d_v))


def by_reference(
    q: Tensor,
    kv_cache: Tensor,
    k_cache: Tensor | None,
    mask: Tensor,
    d_v: int,
    qk_start: int = 0,
    softmax_scale: float | None = None,
    nan_where_empty: bool = False,
) -> Tensor:
    check(q, kv_cache, k_cache, mask, d_v, qk_start)
    out = reference.attend_masked(q, kv_cache, k_cache, mask, d_v, qk_start, softmax_scale, nan_where_empty)
    return out.to(q.dtype).contiguous()


def autocast(
    dtype: torch.dtype, q: Tensor, kv_cache: Tensor, k_cache: Tensor | None, mask: Tensor, *options: Any
) -> tuple[Any, ...]:
    """Queries, and a mask that is added, in the cache's dtype: to cast the cache would copy it."""
    added = mask if mask.dtype == torch.float32 else cast(mask, kv_cache.dtype)
    return cast(q, kv_cache.dtype), kv_cache, k_cache, added, *options


define(
    f"{OP}(Tensor q, Tensor kv_cache, Tensor? k_cache, Tensor mask, SymInt d_v, SymInt qk_start=0,"
    " float? softmax_scale=None, bool nan_where_empty=False) -> Tensor",
    fake=fake,
    reference=by_reference,
    vmap=loop(lambda: torch.ops.flashmla.attend_masked.default),
    autocast=autocast,
)
