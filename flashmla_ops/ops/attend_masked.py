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

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.ops._autocast import cast
from flashmla_ops.ops._sharding import Way
from flashmla_ops.ops._vmap import loop
from flashmla_ops.ops.check import Check, Result, dtype_name
from flashmla_ops.ops.decode import check_rows, of_heads
from flashmla_ops.ops.operator import Arguments, Operator


@dataclass
class AttendMasked(Arguments):
    """Queries, keys and values, and which of them see each other."""

    q: Tensor  # [b, s_q, h_q, d_qk]
    kv_cache: Tensor  # [b, s_kv, h_kv, d], d contiguous
    k_cache: Tensor | None  # [b, s_kv, h_kv, d_k], d_k contiguous
    mask: Tensor  # [b, h_q, s_q, s_kv], each size or 1; bool, or added to the scores
    d_v: int
    qk_start: int = 0
    softmax_scale: float | None = None
    nan_where_empty: bool = False


def contract(check: Check, a: AttendMasked) -> Result:
    check.dims("q", a.q, "[b, s_q, h_q, d_qk]")
    check.floating("q", a.q)
    b, s_q, h_q, _ = a.q.shape
    check.require("q", s_q >= 1, "at least 1 query token (s_q)", s_q)
    check.dims("kv_cache", a.kv_cache, "[b, s_kv, h_kv, d]")
    check.dtype("kv_cache", a.kv_cache, a.q.dtype)
    check.device("kv_cache", a.kv_cache, a.q)
    check.contiguous_rows("kv_cache", a.kv_cache)
    check.size("kv_cache", a.kv_cache, 0, b, " sequences, as q")
    s_kv = a.kv_cache.size(1)
    check.require("kv_cache", s_kv >= 1, "at least 1 token (s_kv)", s_kv)
    check_rows(
        check, "kv_cache", a.q, a.kv_cache, a.k_cache, a.kv_cache.size(3), a.d_v, a.qk_start, "[b, s_kv, h_kv, d_k]"
    )
    check.dims("mask", a.mask, "[b, h_q, s_q, s_kv]")
    served = a.mask.dtype in (torch.bool, torch.float32, a.q.dtype)
    check.require("mask", served, "bool, float32 or the type of q", dtype_name(a.mask.dtype))
    check.device("mask", a.mask, a.q)
    for dim in range(4):
        size = b if dim == 0 else h_q if dim == 1 else s_q if dim == 2 else s_kv
        fits = a.mask.size(dim) == 1 or a.mask.size(dim) == size
        check.require("mask", fits, f"size {size} or 1 in dimension {dim}", a.mask.size(dim))
    return Result([b, s_q, h_q, a.d_v], a.q.dtype)


def autocast(dtype: torch.dtype, a: AttendMasked) -> AttendMasked:
    """Queries, and a mask that is added, in the cache's dtype: to cast the cache would copy it."""
    mask = a.mask if a.mask.dtype == torch.float32 else cast(a.mask, a.kv_cache.dtype)
    return dataclasses.replace(a, q=cast(a.q, a.kv_cache.dtype), mask=mask)


def sharding(a: AttendMasked) -> list[Way]:
    """By sequences, heads or query tokens; the mask too, where it has a size for each."""

    def masked(dim: int) -> Way:
        return {"mask": dim} if a.mask.size(dim) > 1 else {}

    return [
        {"q": 0, "kv_cache": 0, "k_cache": 0, "out": 0, **masked(0)},
        {"q": 2, "out": 2, **of_heads(a), **masked(1)},
        {"q": 1, "out": 1, **masked(2)},
    ]


ATTEND_MASKED = Operator(
    "attend_masked",
    AttendMasked,
    contract,
    lambda a: reference.attend_masked(*a.values()),
    returns=("out",),
    vmap=loop(lambda: torch.ops.flashmla.attend_masked.default),
    autocast=autocast,
    sharding=sharding,
)
