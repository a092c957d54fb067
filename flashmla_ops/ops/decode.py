"""``flashmla::decode``: attention of a few query tokens a sequence over a paged cache, read in place.

    value = kv_cache[page, t, head, 0 : d_v]
    key   = kv_cache[page, t, head, qk_start :] ++ k_cache[page, t, head, :]

so one operator serves MLA (absorbed, one KV head, ``qk_start`` 0) and GQA or MHA (``[V, K]`` rows, or V and K apart).

``levels`` is how much of the kernel's hierarchy is used, for the same result up to rounding: 1, whole rows of scores in
memory, as attention is written on paper; 2, blocks of tokens that stay in cache, with an online softmax; 3 (the
default), blocks, and sequences cut into parts that run in parallel and are merged. `flashmla_ops.footprint` says what
each keeps in memory.

    q                [b, s_q, h_q, d_qk] float32, bfloat16 or float16: queries
    kv_cache         [n_pages, page_size, h_kv, d], of q's type; bytes with a ``row_format``
    k_cache          [n_pages, page_size, h_kv, d_k] or None: the rest of each key
    block_table      [b, max_pages] int32: the pages of each sequence
    cache_seqlens    [b] int32: how many rows each sequence has
    d_v, qk_start    elements: the value is row[0 : d_v], the key row[qk_start :]
    softmax_scale    None: d_qk ** -0.5
    causal           query s sees the rows before cache_seqlens - s_q + s + 1
    schedule         int32, as `decode_schedule` returns it for these lengths; None: made now
    row_format       "native", or a name of `flashmla_ops.formats`
    attn_sink        [h_q] float32 or None: a logit beside the scaled scores that has no value

Returns out [b, s_q, h_q, d_v], of q's type, and lse [b, h_q, s_q] float32, the natural log of the sum of exponentials;
``decode.out`` writes them into ``out`` and ``lse``. A query that sees no row has out 0 and lse +inf.
Raises `ArgumentError` for what does not fit, a length beyond the block table, a page that the cache does not have (of a
row that counts), and a schedule for other lengths.
"""

from __future__ import annotations

import inspect
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
from flashmla_ops.ops._overlap import require_apart
from flashmla_ops.ops._vmap import Dims, each, folded
from flashmla_ops.ops.quantize import require_pages
from flashmla_ops.ops.schedule import check_schedule
from flashmla_ops.reference.schedule import schedule_numel

TENSORS = "Tensor q, Tensor kv_cache, Tensor? k_cache, Tensor block_table, Tensor cache_seqlens"
OPTIONS = (
    "SymInt d_v, SymInt qk_start=0, float? softmax_scale=None, bool causal=False, Tensor? schedule=None,"
    ' str row_format="native", Tensor? attn_sink=None, int levels=3'
)
ARGUMENTS = f"{TENSORS}, {OPTIONS}"


def check(
    op: str,
    q: Tensor,
    kv_cache: Tensor,
    k_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    d_v: int,
    qk_start: int,
    schedule: Tensor | None,
    row_format: str,
    attn_sink: Tensor | None,
    levels: int,
) -> None:
    """The preconditions that shapes, strides and dtypes decide. The C++ kernel checks the same, with the same words.

    ``op``: the operator that names itself in an error: `decode`, or one that has its arguments and more.
    """
    require(op, "levels", levels in (1, 2, 3), "1, 2 or 3", levels)
    uncut = levels == 3 or schedule is None
    require(op, "schedule", uncut, "None below level 3, where no sequence is cut", "a tensor")
    require(op, "row_format", row_format in NAMES, f"one of {', '.join(NAMES)}", row_format)
    require_dims(op, "q", q, "[b, s_q, h_q, d_qk]")
    require_float(op, "q", q)
    b, s_q, h_q, d_qk = q.shape
    require(op, "q", s_q >= 1, "at least 1 query token (s_q)", s_q)
    require_dims(op, "kv_cache", kv_cache, "[n_pages, page_size, h_kv, d]")
    if row_format == NATIVE:
        require_dtype(op, "kv_cache", kv_cache, q.dtype)
    else:
        require_pages(op, "kv_cache", kv_cache, QUANTIZED[row_format])
        require(op, "k_cache", k_cache is None, f"None with rows of {row_format}", "a tensor")
    require_device(op, "kv_cache", kv_cache, q.device)
    require_contiguous_rows(op, "kv_cache", kv_cache)
    _, page_size, h_kv, d = kv_cache.shape
    d = d if row_format == NATIVE else QUANTIZED[row_format].elements
    require(op, "kv_cache", page_size >= 1, "page_size of at least 1", page_size)
    require(op, "kv_cache", h_kv >= 1, "at least 1 KV head (h_kv)", h_kv)
    require(op, "q", h_q % h_kv == 0, f"query heads in multiples of the {h_kv} KV heads", h_q)
    require(op, "d_v", d_v >= 1 and d_v <= d, f"a value in [1, {d}]", d_v)
    require(op, "qk_start", qk_start >= 0 and qk_start <= d, f"a value in [0, {d}]", qk_start)
    d_k = 0
    if k_cache is not None:
        require_dims(op, "k_cache", k_cache, "[n_pages, page_size, h_kv, d_k]")
        require_dtype(op, "k_cache", k_cache, q.dtype)
        require_device(op, "k_cache", k_cache, q.device)
        require_contiguous_rows(op, "k_cache", k_cache)
        for dim in range(3):
            same = k_cache.size(dim) == kv_cache.size(dim)
            require(
                op, "k_cache", same, f"size {kv_cache.size(dim)} in dimension {dim}, as kv_cache", k_cache.size(dim)
            )
        d_k = k_cache.size(3)
    d_key = d - qk_start + d_k
    require(op, "q", d_qk == d_key and d_qk >= 1, f"d_qk {d_key}, the length of a key", d_qk)
    require_dims(op, "block_table", block_table, "[b, max_pages]")
    require_dtype(op, "block_table", block_table, torch.int32)
    require_device(op, "block_table", block_table, q.device)
    require(op, "block_table", block_table.size(0) == b, f"{b} sequences, as q", block_table.size(0))
    require_dims(op, "cache_seqlens", cache_seqlens, "[b]")
    require_dtype(op, "cache_seqlens", cache_seqlens, torch.int32)
    require_device(op, "cache_seqlens", cache_seqlens, q.device)
    require(op, "cache_seqlens", cache_seqlens.size(0) == b, f"{b} sequences, as q", cache_seqlens.size(0))
    if attn_sink is not None:
        require_dims(op, "attn_sink", attn_sink, "[h_q]")
        require_dtype(op, "attn_sink", attn_sink, torch.float32)
        require_device(op, "attn_sink", attn_sink, q.device)
        require(op, "attn_sink", attn_sink.size(0) == h_q, f"{h_q} heads, as q", attn_sink.size(0))
    if schedule is not None:
        require_dims(op, "schedule", schedule, "[n]")
        require_dtype(op, "schedule", schedule, torch.int32)
        require_device(op, "schedule", schedule, q.device)
        smallest = schedule_numel(b, 1)
        require(op, "schedule", schedule.size(0) >= smallest, f"at least {smallest} elements", schedule.size(0))


def decode_fake(
    q: Tensor,
    kv_cache: Tensor,
    k_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    d_v: int,
    qk_start: int = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    schedule: Tensor | None = None,
    row_format: str = "native",
    attn_sink: Tensor | None = None,
    levels: int = 3,
) -> tuple[Tensor, Tensor]:
    check(
        "decode",
        q,
        kv_cache,
        k_cache,
        block_table,
        cache_seqlens,
        d_v,
        qk_start,
        schedule,
        row_format,
        attn_sink,
        levels,
    )
    b, s_q, h_q, _ = q.shape
    return q.new_empty((b, s_q, h_q, d_v)), q.new_empty((b, h_q, s_q), dtype=torch.float32)


def check_values(
    op: str, q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, schedule: Tensor | None
) -> None:
    """The preconditions that lengths and the schedule decide; those of pages are the reference's."""
    capacity = block_table.size(1) * kv_cache.size(1)
    for i, length in enumerate(cache_seqlens.tolist()):
        if not 0 <= length <= capacity:
            raise ArgumentError(op, "cache_seqlens", f"lengths in [0, {capacity}]", f"{length} at [{i}]")
    if schedule is not None:
        check_schedule(op, schedule, cache_seqlens, q.size(1), q.size(2), kv_cache.size(2))


def decode_reference(
    q: Tensor,
    kv_cache: Tensor,
    k_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    d_v: int,
    qk_start: int = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    schedule: Tensor | None = None,
    row_format: str = "native",
    attn_sink: Tensor | None = None,
    levels: int = 3,
) -> tuple[Tensor, Tensor]:
    check(
        "decode",
        q,
        kv_cache,
        k_cache,
        block_table,
        cache_seqlens,
        d_v,
        qk_start,
        schedule,
        row_format,
        attn_sink,
        levels,
    )
    check_values("decode", q, kv_cache, block_table, cache_seqlens, schedule)
    out, lse = reference.decode(
        q, kv_cache, k_cache, block_table, cache_seqlens, d_v, qk_start, softmax_scale, causal, attn_sink, row_format
    )
    return out.to(q.dtype), lse.to(torch.float32)


def check_out(out: Tensor, lse: Tensor, inputs: dict[str, Any]) -> None:
    """The preconditions of the output tensors of ``decode.out``; ``inputs`` are its other arguments."""
    op, q = "decode", inputs["q"]
    b, s_q, h_q, _ = q.shape
    for name, tensor, shape, dtype in (
        ("out", out, (b, s_q, h_q, inputs["d_v"]), q.dtype),
        ("lse", lse, (b, h_q, s_q), torch.float32),
    ):
        require_dtype(op, name, tensor, dtype)
        require_device(op, name, tensor, q.device)
        same = tensor.dim() == len(shape) and all(x == y for x, y in zip(tensor.shape, shape, strict=True))
        require(op, name, same, f"shape {list(shape)}", list(tensor.shape))
    require_contiguous_rows(op, "out", out)
    read = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    require_apart(op, "out", out, **read)
    require_apart(op, "lse", lse, **read, out=out)


_SIGNATURE = inspect.signature(decode_fake)


def decode_out_fake(*args: Any, out: Tensor, lse: Tensor, **kwargs: Any) -> None:
    decode_fake(*args, **kwargs)
    check_out(out, lse, _SIGNATURE.bind(*args, **kwargs).arguments)


def decode_out_reference(*args: Any, out: Tensor, lse: Tensor, **kwargs: Any) -> None:
    check_out(out, lse, _SIGNATURE.bind(*args, **kwargs).arguments)
    new_out, new_lse = decode_reference(*args, **kwargs)
    out.copy_(new_out)
    lse.copy_(new_lse)


class Folded(NamedTuple):
    """The tensors of a mapped call, its mapped dimension having joined the sequences."""

    q: Tensor
    kv_cache: Tensor
    k_cache: Tensor | None
    block_table: Tensor
    cache_seqlens: Tensor


def fold(
    size: int,
    in_dims: Dims,
    q: Tensor,
    kv_cache: Tensor,
    k_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
) -> Folded:
    """Caches that are mapped too join their pages, as `folds` has found. ``in_dims``: of these five tensors."""
    q_dim, kv_dim, k_dim, table_dim, lengths_dim = in_dims
    tables = folded(block_table, table_dim, size)
    if kv_dim is not None:
        n_pages = kv_cache.movedim(kv_dim, 0).size(1)
        first = torch.arange(size, dtype=torch.int32, device=tables.device).repeat_interleave(tables.size(0) // size)
        # A page that is not in its own cache must not become a page of the next one.
        tables = torch.where((tables >= 0) & (tables < n_pages), tables + n_pages * first[:, None], -1)
        kv_cache = folded(kv_cache, kv_dim, size)
        k_cache = None if k_cache is None else folded(k_cache, k_dim, size)
    return Folded(folded(q, q_dim, size), kv_cache, k_cache, tables, folded(cache_seqlens, lengths_dim, size))


def folds(in_dims: Dims, kv_cache: Tensor, k_cache: Tensor | None, **shared: int) -> bool:
    """Whether one call can serve all entries: without a copy of a cache, and with heads that are the same for all.

    ``shared``: the positions of the arguments that belong to heads.
    """
    kv_dim, k_dim = in_dims[1:3]
    if any(in_dims[position] is not None for position in shared.values() if position < len(in_dims)):
        return False
    if k_cache is not None and (kv_dim is None) != (k_dim is None):
        return False
    return _joins(kv_cache, kv_dim) and (k_cache is None or _joins(k_cache, k_dim))


def _joins(cache: Tensor, dim: int | None) -> bool:
    """Whether the mapped dimension and the pages are one dimension in memory."""
    if dim is None:
        return True
    entries = cache.movedim(dim, 0)
    return entries.stride(0) == entries.size(1) * entries.stride(1)


def autocast(dtype: torch.dtype, q: Tensor, kv_cache: Tensor, *rest: Any) -> tuple[Any, ...]:
    """Queries in the cache's dtype, whatever autocast's is: to cast the cache would copy it. Results have it too."""
    return cast(q, kv_cache.dtype), kv_cache, *rest


def vmap(
    info: Any,
    in_dims: Dims,
    q: Tensor,
    kv_cache: Tensor,
    k_cache: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    d_v: int,
    qk_start: int = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    schedule: Tensor | None = None,
    row_format: str = "native",
    attn_sink: Tensor | None = None,
    levels: int = 3,
) -> tuple[Any, Any]:
    """The mapped dimension joins the sequences."""
    size, cache = info.batch_size, (q, kv_cache, k_cache, block_table, cache_seqlens)
    require("decode", "schedule", schedule is None, "None under vmap (it is made for one batch)", "a tensor")
    options = (d_v, qk_start, softmax_scale, causal, None, row_format, attn_sink, levels)
    if not folds(in_dims, kv_cache, k_cache, attn_sink=11):
        return each(torch.ops.flashmla.decode.default, info, in_dims, *cache, *options)
    out, lse = torch.ops.flashmla.decode(*fold(size, in_dims[:5], *cache), *options)
    return (out.unflatten(0, (size, -1)), lse.unflatten(0, (size, -1))), (0, 0)


define(
    f"decode({ARGUMENTS}) -> (Tensor out, Tensor lse)",
    fake=decode_fake,
    reference=decode_reference,
    vmap=vmap,
    autocast=autocast,
)
# It returns nothing and is not tagged torch.Tag.out. With the tag, Inductor lowers `decode` to ExternKernelMultiOut,
# which in torch 2.13 takes the fake outputs' SymInt sizes for sympy expressions and asserts as soon as a size is
# dynamic; and without it, an operator that returns its arguments cannot be traced.
define(
    f"decode.out({ARGUMENTS}, *, Tensor(a!) out, Tensor(b!) lse) -> ()",
    fake=decode_out_fake,
    reference=decode_out_reference,
)
