"""``flashmla::sparse_decode`` and ``flashmla::sparse_prefill``: each query token attends to rows that indices name.

An index is a slot of a cache, ``page * page_size + offset``; any other number (-1, say, or one past the end) names
nothing, and is skipped. ``topk_length`` says how many of the indices count, the first ones. Rows are those of `decode`:

    value = kv_cache[page, t, head, 0 : d_v]
    key   = kv_cache[page, t, head, qk_start :] ++ k_cache[page, t, head, :]

`sparse_decode` reads a paged cache, and may read a second one beside it, with indices, pages and a format of its own;
the rows of both are in one softmax. `sparse_prefill` reads rows that lie beside the queries. A query that no index
gives a row has out 0 and lse +inf (and max_logits -inf). Neither max_logits nor lse, natural logarithms both, know of
``attn_sink``, which multiplies out by exp(lse) / (exp(lse) + exp(sink)).

    q                 [b, s_q, h_q, d_qk] float32, bfloat16 or float16; of sparse_prefill [s_q, h_q, d_qk]
    kv_cache, k_cache [n_pages, page_size, h_kv, d] and d_k or None; bytes with a ``row_format``
    kv                [s_kv, h_kv, d], of sparse_prefill: the rows beside the queries
    indices           [b, s_q, topk] int32: slots; of sparse_prefill [s_q, h_kv, topk] int32: rows of kv
    d_v, qk_start     elements: the value is row[0 : d_v], the key row[qk_start :]
    softmax_scale     None: d_qk ** -0.5
    attn_sink         [h_q] float32 or None
    topk_length       [b] int32 or None; of sparse_prefill [s_q]
    extra_kv_cache    [n_pages, page_size, h_kv, d] or None: the second cache, in ``extra_row_format``
    extra_indices, extra_topk_length  [b, s_q, topk] and [b] int32, of the second cache
    batch_invariant   a sequence's result is the same bits whatever else is in the batch, on any number of threads

Returns out [b, s_q, h_q, d_v] and lse [b, h_q, s_q] float32; sparse_prefill out [s_q, h_q, d_v], max_logits and lse
[s_q, h_q] float32. Raises `ArgumentError` for shapes, types and devices that do not fit and for a length outside
[0, topk]; an index never raises.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.errors import ArgumentError
from flashmla_ops.formats import NAMES, NATIVE, QUANTIZED
from flashmla_ops.ops._autocast import cast
from flashmla_ops.ops._library import (
    define,
    require,
    require_contiguous_rows,
    require_device,
    require_dims,
    require_dtype,
    require_float,
)
from flashmla_ops.ops._vmap import loop
from flashmla_ops.ops.quantize import require_pages

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


class _Cache(NamedTuple):
    """What rows of a cache have: the names of its arguments begin with ``prefix``."""

    h_kv: int
    d: int
    d_k: int


def _check_query(op: str, q: Tensor, shape: str) -> None:
    require_dims(op, "q", q, shape)
    require_float(op, "q", q)


def _check_cache(op: str, name: str, cache: Tensor, q: Tensor, row_format: str) -> _Cache:
    """A cache of rows, [n_pages, page_size, h_kv, d]."""
    require_dims(op, name, cache, "[n_pages, page_size, h_kv, d]")
    if row_format == NATIVE:
        require_dtype(op, name, cache, q.dtype)
    else:
        require_pages(op, name, cache, QUANTIZED[row_format])
    require_device(op, name, cache, q.device)
    require_contiguous_rows(op, name, cache)
    _, page_size, h_kv, d = cache.shape
    require(op, name, page_size >= 1, "page_size of at least 1", page_size)
    return _Cache(h_kv, d if row_format == NATIVE else QUANTIZED[row_format].elements, 0)


def _check_rows(op: str, name: str, q: Tensor, cache: _Cache, d_v: int, qk_start: int) -> None:
    """Heads and widths of queries and rows. ``name``: of the cache, for what both are asked for."""
    h_q, d_qk = q.shape[-2:]
    h_kv, d, d_k = cache
    require(op, name, h_kv >= 1, "at least 1 KV head (h_kv)", h_kv)
    require(op, "q", h_q % h_kv == 0, f"query heads in multiples of the {h_kv} KV heads", h_q)
    require(op, "d_v", d_v >= 1 and d_v <= d, f"a value in [1, {d}]", d_v)
    require(op, "qk_start", qk_start >= 0 and qk_start <= d, f"a value in [0, {d}]", qk_start)
    d_key = d - qk_start + d_k
    require(op, "q", d_qk == d_key and d_qk >= 1, f"d_qk {d_key}, the length of a key", d_qk)


def _check_indices(op: str, prefix: str, q: Tensor, indices: Tensor, topk_length: Tensor | None) -> None:
    """Of `sparse_decode`."""
    b, s_q = q.shape[:2]
    name = f"{prefix}indices"
    require_dims(op, name, indices, "[b, s_q, topk]")
    require_dtype(op, name, indices, torch.int32)
    require_device(op, name, indices, q.device)
    require(op, name, indices.size(0) == b, f"{b} sequences, as q", indices.size(0))
    require(op, name, indices.size(1) == s_q, f"{s_q} query tokens, as q", indices.size(1))
    _check_lengths(op, f"{prefix}topk_length", q, topk_length, "[b]", "sequences")


def _check_lengths(op: str, name: str, q: Tensor, lengths: Tensor | None, shape: str, what: str) -> None:
    if lengths is not None:
        require_dims(op, name, lengths, shape)
        require_dtype(op, name, lengths, torch.int32)
        require_device(op, name, lengths, q.device)
        require(op, name, lengths.size(0) == q.size(0), f"{q.size(0)} {what}, as q", lengths.size(0))


def _check_sink(op: str, q: Tensor, attn_sink: Tensor | None) -> None:
    if attn_sink is not None:
        h_q = q.size(-2)
        require_dims(op, "attn_sink", attn_sink, "[h_q]")
        require_dtype(op, "attn_sink", attn_sink, torch.float32)
        require_device(op, "attn_sink", attn_sink, q.device)
        require(op, "attn_sink", attn_sink.size(0) == h_q, f"{h_q} heads, as q", attn_sink.size(0))


def _check_format(op: str, name: str, row_format: str) -> None:
    require(op, name, row_format in NAMES, f"one of {', '.join(NAMES)}", row_format)


def _check_values(op: str, name: str, topk_length: Tensor | None, topk: int) -> None:
    """What the C++ kernels check before they run."""
    for i, length in enumerate([] if topk_length is None else topk_length.tolist()):
        if not 0 <= length <= topk:
            raise ArgumentError(op, name, f"lengths in [0, {topk}]", f"{length} at [{i}]")


def decode_fake(
    q: Tensor,  # [b, s_q, h_q, d_qk]
    kv_cache: Tensor,  # [n_pages, page_size, h_kv, d], d contiguous
    k_cache: Tensor | None,  # [n_pages, page_size, h_kv, d_k], d_k contiguous
    indices: Tensor,  # [b, s_q, topk] int32
    d_v: int,
    qk_start: int = 0,
    softmax_scale: float | None = None,
    row_format: str = NATIVE,
    attn_sink: Tensor | None = None,  # [h_q] float32
    topk_length: Tensor | None = None,  # [b] int32
    extra_kv_cache: Tensor | None = None,  # [n_pages, page_size, h_kv, d], sizes of its own but for h_kv
    extra_indices: Tensor | None = None,  # [b, s_q, topk] int32
    extra_topk_length: Tensor | None = None,  # [b] int32
    extra_row_format: str = NATIVE,
    batch_invariant: bool = False,
) -> Pair:  # out [b, s_q, h_q, d_v], lse [b, h_q, s_q] float32
    op = "sparse_decode"
    _check_format(op, "row_format", row_format)
    _check_format(op, "extra_row_format", extra_row_format)
    _check_query(op, q, "[b, s_q, h_q, d_qk]")
    cache = _check_cache(op, "kv_cache", kv_cache, q, row_format)
    if k_cache is not None:
        require(op, "k_cache", row_format == NATIVE, f"None with rows of {row_format}", "a tensor")
        cache = cache._replace(d_k=_check_cache(op, "k_cache", k_cache, q, NATIVE).d)
        for dim in range(3):
            size, same = kv_cache.size(dim), k_cache.size(dim) == kv_cache.size(dim)
            require(op, "k_cache", same, f"size {size} in dimension {dim}, as kv_cache", k_cache.size(dim))
    _check_rows(op, "kv_cache", q, cache, d_v, qk_start)
    _check_indices(op, "", q, indices, topk_length)
    _check_sink(op, q, attn_sink)
    if extra_kv_cache is None:
        require(op, "extra_indices", extra_indices is None, "None without extra_kv_cache", "a tensor")
        require(op, "extra_topk_length", extra_topk_length is None, "None without extra_kv_cache", "a tensor")
    else:
        extra = _check_cache(op, "extra_kv_cache", extra_kv_cache, q, extra_row_format)
        same = extra.h_kv == cache.h_kv
        require(op, "extra_kv_cache", same, f"{cache.h_kv} KV heads, as kv_cache", extra.h_kv)
        _check_rows(op, "extra_kv_cache", q, extra, d_v, qk_start)
        if extra_indices is None:
            raise ArgumentError(op, "extra_indices", "a tensor with extra_kv_cache", None)
        _check_indices(op, "extra_", q, extra_indices, extra_topk_length)
    b, s_q, h_q, _ = q.shape
    return q.new_empty((b, s_q, h_q, d_v)), q.new_empty((b, h_q, s_q), dtype=torch.float32)


def decode_reference(
    q: Tensor,
    kv_cache: Tensor,
    k_cache: Tensor | None,
    indices: Tensor,
    d_v: int,
    qk_start: int = 0,
    softmax_scale: float | None = None,
    row_format: str = NATIVE,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_kv_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    extra_row_format: str = NATIVE,
    batch_invariant: bool = False,
) -> Pair:
    op = "sparse_decode"
    extra = (extra_kv_cache, extra_indices, extra_topk_length, extra_row_format)
    decode_fake(q, kv_cache, k_cache, indices, d_v, qk_start, softmax_scale, row_format, attn_sink, topk_length, *extra)
    _check_values(op, "topk_length", topk_length, indices.size(2))
    sources = [_paged(kv_cache, k_cache, indices, topk_length, row_format)]
    if extra_kv_cache is not None and extra_indices is not None:
        _check_values(op, "extra_topk_length", extra_topk_length, extra_indices.size(2))
        sources.append(_paged(extra_kv_cache, None, extra_indices, extra_topk_length, extra_row_format))
    out, _, lse = reference.sparse_attention(q, sources, d_v, qk_start, softmax_scale, attn_sink)
    return out.to(q.dtype), lse.transpose(1, 2).to(torch.float32).contiguous()


def _paged(
    kv_cache: Tensor, k_cache: Tensor | None, indices: Tensor, topk_length: Tensor | None, row_format: str
) -> reference.Source:
    """A source of `sparse_decode`, whose indices are the same for all KV heads."""
    heads = indices[:, :, None].expand(-1, -1, kv_cache.size(2), -1)
    lengths = None if topk_length is None else topk_length[:, None].expand(indices.shape[:2])
    return reference.Source(kv_cache, k_cache, heads, lengths, row_format)


def prefill_fake(
    q: Tensor,  # [s_q, h_q, d_qk]
    kv: Tensor,  # [s_kv, h_kv, d], d contiguous
    indices: Tensor,  # [s_q, h_kv, topk] int32
    d_v: int,
    softmax_scale: float | None = None,
    row_format: str = NATIVE,
    attn_sink: Tensor | None = None,  # [h_q] float32
    topk_length: Tensor | None = None,  # [s_q] int32
) -> Triple:  # out [s_q, h_q, d_v], max_logits [s_q, h_q] float32, lse [s_q, h_q] float32
    op = "sparse_prefill"
    _check_format(op, "row_format", row_format)
    _check_query(op, q, "[s_q, h_q, d_qk]")
    require_dims(op, "kv", kv, "[s_kv, h_kv, d]")
    if row_format == NATIVE:
        require_dtype(op, "kv", kv, q.dtype)
    else:
        require_pages(op, "kv", kv, QUANTIZED[row_format])
    require_device(op, "kv", kv, q.device)
    require_contiguous_rows(op, "kv", kv)
    d = kv.size(2) if row_format == NATIVE else QUANTIZED[row_format].elements
    _check_rows(op, "kv", q, _Cache(kv.size(1), d, 0), d_v, 0)
    require_dims(op, "indices", indices, "[s_q, h_kv, topk]")
    require_dtype(op, "indices", indices, torch.int32)
    require_device(op, "indices", indices, q.device)
    require(op, "indices", indices.size(0) == q.size(0), f"{q.size(0)} query tokens, as q", indices.size(0))
    require(op, "indices", indices.size(1) == kv.size(1), f"{kv.size(1)} KV heads, as kv", indices.size(1))
    _check_lengths(op, "topk_length", q, topk_length, "[s_q]", "query tokens")
    _check_sink(op, q, attn_sink)
    s_q, h_q, _ = q.shape
    lse = q.new_empty((s_q, h_q), dtype=torch.float32)
    return q.new_empty((s_q, h_q, d_v)), torch.empty_like(lse), lse


def prefill_reference(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    d_v: int,
    softmax_scale: float | None = None,
    row_format: str = NATIVE,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> Triple:
    prefill_fake(q, kv, indices, d_v, softmax_scale, row_format, attn_sink, topk_length)
    _check_values("sparse_prefill", "topk_length", topk_length, indices.size(2))
    lengths = None if topk_length is None else topk_length[None]
    source = reference.Source(kv[None], None, indices[None], lengths, row_format)
    results = reference.sparse_attention(q[None], [source], d_v, 0, softmax_scale, attn_sink)
    out, max_logits, lse = (x[0] for x in results)
    return out.to(q.dtype), max_logits.to(torch.float32), lse.to(torch.float32)


def autocast(dtype: torch.dtype, q: Tensor, rows: Tensor, *rest: Any) -> tuple[Any, ...]:
    """Queries in the dtype of the rows, whatever autocast's is: to cast a cache would copy it. Results have it too."""
    return cast(q, rows.dtype), rows, *rest


define(
    "sparse_decode(Tensor q, Tensor kv_cache, Tensor? k_cache, Tensor indices, SymInt d_v, SymInt qk_start=0,"
    ' float? softmax_scale=None, str row_format="native", Tensor? attn_sink=None, Tensor? topk_length=None,'
    " Tensor? extra_kv_cache=None, Tensor? extra_indices=None, Tensor? extra_topk_length=None,"
    ' str extra_row_format="native", bool batch_invariant=False) -> (Tensor out, Tensor lse)',
    fake=decode_fake,
    reference=decode_reference,
    vmap=loop(lambda: torch.ops.flashmla.sparse_decode.default),
    autocast=autocast,
)
define(
    "sparse_prefill(Tensor q, Tensor kv, Tensor indices, SymInt d_v, float? softmax_scale=None,"
    ' str row_format="native", Tensor? attn_sink=None, Tensor? topk_length=None)'
    " -> (Tensor out, Tensor max_logits, Tensor lse)",
    fake=prefill_fake,
    reference=prefill_reference,
    vmap=loop(lambda: torch.ops.flashmla.sparse_prefill.default),
    autocast=autocast,
)
