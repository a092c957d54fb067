"""``flashmla::decode``: attention of a few query tokens a sequence over a paged cache, read in place.

    value = kv_cache[page, t, head, 0 : d_v]
    key   = kv_cache[page, t, head, qk_start :] ++ k_cache[page, t, head, :]

so one operator serves MLA (absorbed, one KV head, ``qk_start`` 0) and GQA or MHA (``[V, K]`` rows, or V and K apart).

``levels`` is how much of the kernel's hierarchy is used, for the same result up to rounding: 1, whole rows of scores in
memory, as attention is written on paper; 2, blocks of tokens that stay in cache, with an online softmax; 3 (the
default), blocks, and sequences cut into parts that run in parallel and are merged. `flashmla_ops.footprint` says what
each keeps in memory.

    q                [b, s_q, h_q, d_qk] float32, bfloat16 or float16: queries; [t_q, h_q, d_qk] with ``cu_seqlens_q``
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
    window           a query sees the last so many of the rows that it would see without; 0: all of them. Pages of rows
                     that no query sees are not looked at: they may have been given to others
    softcap          scaled scores s become softcap * tanh(s / softcap); 0: they stay
    cu_seqlens_q     [b + 1] int32 or int64 or None: sequence i has the query tokens from cu_seqlens_q[i] to
                     cu_seqlens_q[i + 1]: prompts, parts of prompts and decoding sequences in one call
    batch_invariant  a sequence's results are the same bits whatever else is in the batch, on any number of threads

Returns out [b, s_q, h_q, d_v], of q's type, and lse [b, h_q, s_q] float32, the natural log of the sum of exponentials
(with ``cu_seqlens_q`` out [t_q, h_q, d_v] and lse [h_q, t_q]); ``decode.out`` writes them into ``out`` and ``lse``. A
query that sees no row has out 0 and lse +inf.
Raises `ArgumentError` for what does not fit, a length beyond the block table, a page that the cache does not have (of a
row that counts), and a schedule for other lengths, or beside a window, ``cu_seqlens_q`` or ``batch_invariant``, which
have the work cut in ways of their own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.errors import ArgumentError
from flashmla_ops.formats import FORMAT_NAMES, NAMES, NATIVE, row_elements
from flashmla_ops.ops._autocast import cast
from flashmla_ops.ops._sharding import Way
from flashmla_ops.ops._vmap import each, folded
from flashmla_ops.ops.check import Check, Result, lse_shape, with_last
from flashmla_ops.ops.operator import Arguments, Operator, Static
from flashmla_ops.ops.quantize import check_pages
from flashmla_ops.ops.ragged import check_boundaries, check_bounds
from flashmla_ops.ops.schedule import check_schedule
from flashmla_ops.reference.schedule import schedule_numel

#: The largest number of float32.
MAX_SOFTCAP = 3.4028234663852886e38


@dataclass
class Cached(Arguments):
    """Queries, and the sequences of a paged cache that they attend to."""

    q: Tensor  # [b, s_q, h_q, d_qk], or [t_q, h_q, d_qk] where sequences are ragged
    kv_cache: Tensor  # [n_pages, page_size, h_kv, d], d contiguous
    k_cache: Tensor | None  # [n_pages, page_size, h_kv, d_k], d_k contiguous
    block_table: Tensor  # [b, max_pages] int32
    cache_seqlens: Tensor  # [b] int32


@dataclass
class Options(Arguments):
    """How they attend."""

    d_v: int
    qk_start: int = 0
    softmax_scale: float | None = None
    causal: bool = False
    schedule: Tensor | None = None  # as decode_schedule returns it
    row_format: str = NATIVE
    attn_sink: Tensor | None = None  # [h_q] float32
    levels: Static = 3
    window: int = 0
    softcap: float = 0.0
    cu_seqlens_q: Tensor | None = None  # [b + 1] int32 or int64
    batch_invariant: bool = False


@dataclass
class Decode(Options, Cached):
    """The fields of `Cached`, then those of `Options`."""


def contract(check: Check, a: Decode) -> tuple[Result, Result]:
    """Of `decode`, and of operators that have its arguments and more."""
    check.require("levels", a.levels in (1, 2, 3), "1, 2 or 3", a.levels)
    uncut = a.levels == 3 or a.schedule is None
    check.require("schedule", uncut, "None below level 3, where no sequence is cut", "a tensor")
    check.require("row_format", a.row_format in NAMES, f"one of {FORMAT_NAMES}", a.row_format)
    check_queries(check, a.q, a.cu_seqlens_q)
    b = a.q.size(0) if a.cu_seqlens_q is None else a.cu_seqlens_q.size(0) - 1
    check_cache(check, "kv_cache", a.kv_cache, a.q, a.row_format)
    native = a.row_format == NATIVE
    check.require("k_cache", native or a.k_cache is None, f"None with rows of {a.row_format}", "a tensor")
    d = a.kv_cache.size(3) if native else row_elements(a.row_format)
    check_rows(check, "kv_cache", a.q, a.kv_cache, a.k_cache, d, a.d_v, a.qk_start, "[n_pages, page_size, h_kv, d_k]")
    check_table(check, a.block_table, a.cache_seqlens, a.q, b, " sequences, as q")
    check_sink(check, a.q, a.attn_sink)
    check_scores(check, a.window, a.softcap)
    if a.schedule is not None:
        uniform = a.window == 0 and a.cu_seqlens_q is None and not a.batch_invariant
        check.require("schedule", uniform, "None with window, cu_seqlens_q or batch_invariant", "a tensor")
        check.dims("schedule", a.schedule, "[n]")
        check.dtype("schedule", a.schedule, torch.int32)
        check.device("schedule", a.schedule, a.q)
        smallest = schedule_numel(b, 1)
        enough = a.schedule.size(0) >= smallest
        check.require("schedule", enough, f"at least {smallest} elements", a.schedule.size(0))
    return Result(with_last(a.q, a.d_v), a.q.dtype), Result(lse_shape(a.q), torch.float32)


def check_queries(check: Check, q: Tensor, cu_seqlens_q: Tensor | None) -> None:
    """The queries of sequences, or ragged ones."""
    if cu_seqlens_q is None:
        check.dims("q", q, "[b, s_q, h_q, d_qk]")
        check.require("q", q.size(1) >= 1, "at least 1 query token (s_q)", q.size(1))
    else:
        check.dims("q", q, "[t_q, h_q, d_qk]")
        check_boundaries(check, "cu_seqlens_q", cu_seqlens_q, q)
    check.floating("q", q)


def check_table(check: Check, block_table: Tensor, cache_seqlens: Tensor, like: Tensor, b: int, unit: str) -> None:
    """The pages and lengths of b sequences. ``unit`` says whose: " sequences, as q"."""
    check.dims("block_table", block_table, "[b, max_pages]")
    check.dtype("block_table", block_table, torch.int32)
    check.device("block_table", block_table, like)
    check.size("block_table", block_table, 0, b, unit)
    check.dims("cache_seqlens", cache_seqlens, "[b]")
    check.dtype("cache_seqlens", cache_seqlens, torch.int32)
    check.device("cache_seqlens", cache_seqlens, like)
    check.size("cache_seqlens", cache_seqlens, 0, b, unit)


def check_cache(check: Check, name: str, cache: Tensor, q: Tensor, row_format: str) -> None:
    """A paged cache of rows for these queries."""
    check.dims(name, cache, "[n_pages, page_size, h_kv, d]")
    if row_format == NATIVE:
        check.dtype(name, cache, q.dtype)
    else:
        check_pages(check, name, cache, row_format)
    check.device(name, cache, q)
    check.contiguous_rows(name, cache)
    check.require(name, cache.size(1) >= 1, "page_size of at least 1", cache.size(1))


def check_rows(
    check: Check,
    name: str,
    q: Tensor,
    cache: Tensor,
    k_cache: Tensor | None,
    d: int,
    d_v: int,
    qk_start: int,
    k_shape: str,
) -> None:
    """The rows [.., h_kv, d] of a cache, and those of ``k_cache``, hold the values and the keys of the heads of q.

    ``d``: the elements of a row. ``k_shape``: the shape of ``k_cache``, whose first three sizes are those of ``cache``.
    """
    h_q, d_qk, h_kv = q.size(-2), q.size(-1), cache.size(-2)
    check.require(name, h_kv >= 1, "at least 1 KV head (h_kv)", h_kv)
    check.require("q", h_q % h_kv == 0, f"query heads in multiples of the {h_kv} KV heads", h_q)
    check.require("d_v", d_v >= 1 and d_v <= d, f"a value in [1, {d}]", d_v)
    check.require("qk_start", qk_start >= 0 and qk_start <= d, f"a value in [0, {d}]", qk_start)
    if k_cache is not None:
        check.dims("k_cache", k_cache, k_shape)
        check.dtype("k_cache", k_cache, q.dtype)
        check.device("k_cache", k_cache, q)
        check.contiguous_rows("k_cache", k_cache)
        check.same_sizes("k_cache", k_cache, name, cache, 3)
    d_key = d - qk_start + (0 if k_cache is None else k_cache.size(3))
    check.require("q", d_qk == d_key and d_qk >= 1, f"d_qk {d_key}, the length of a key", d_qk)


def check_sink(check: Check, q: Tensor, attn_sink: Tensor | None) -> None:
    if attn_sink is not None:
        check.dims("attn_sink", attn_sink, "[h_q]")
        check.dtype("attn_sink", attn_sink, torch.float32)
        check.device("attn_sink", attn_sink, q)
        check.size("attn_sink", attn_sink, 0, q.size(-2), " heads, as q")


def check_scores(check: Check, window: int, softcap: float) -> None:
    check.require("window", window >= 0, "at least 1, or 0 for none", window)
    check.require("softcap", softcap >= 0 and softcap <= MAX_SOFTCAP, "a positive number, or 0 for none", softcap)


def check_values(check: Check, a: Decode) -> None:
    """The preconditions that lengths and the schedule decide; those of pages are the reference's."""
    check_sequences(check, a, a.cu_seqlens_q)
    if a.schedule is not None:
        check_schedule(check, a.schedule, a.cache_seqlens, a.q.size(1), a.q.size(2), a.kv_cache.size(2))


def check_sequences(check: Check, a: Cached, cu_seqlens_q: Tensor | None) -> None:
    """The preconditions that lengths and boundaries decide."""
    check_lengths(check, a.block_table, a.cache_seqlens, a.kv_cache.size(1))
    if cu_seqlens_q is not None:
        check_bounds(check.op, "cu_seqlens_q", cu_seqlens_q, a.q.size(0))


def check_lengths(check: Check, block_table: Tensor, cache_seqlens: Tensor, page_size: int) -> None:
    """Raise unless the block table has room for the lengths."""
    capacity = block_table.size(1) * page_size
    for i, length in enumerate(cache_seqlens.tolist()):
        if not 0 <= length <= capacity:
            raise ArgumentError(check.op, "cache_seqlens", f"lengths in [0, {capacity}]", f"{length} at [{i}]")


def inputs(a: Decode) -> dict[str, Any]:
    """What the reference takes: all but what only says how to compute it."""
    return {name: value for name, value in vars(a).items() if name not in ("schedule", "levels", "batch_invariant")}


def fold(size: int, dims: dict[str, Any], a: Decode) -> Decode:
    """The arguments of one call for all entries, whose mapped dimension joins the sequences.

    Caches that are mapped too join their pages, as `folds` has found.
    """
    tables, kv_cache, k_cache = folded(a.block_table, dims["block_table"], size), a.kv_cache, a.k_cache
    if dims["kv_cache"] is not None:
        n_pages = kv_cache.movedim(dims["kv_cache"], 0).size(1)
        first = torch.arange(size, dtype=torch.int32, device=tables.device).repeat_interleave(tables.size(0) // size)
        # A page that is not in its own cache must not become a page of the next one.
        tables = torch.where((tables >= 0) & (tables < n_pages), tables + n_pages * first[:, None], -1)
        kv_cache = folded(kv_cache, dims["kv_cache"], size)
        k_cache = None if k_cache is None else folded(k_cache, dims["k_cache"], size)
    lengths = folded(a.cache_seqlens, dims["cache_seqlens"], size)
    q = folded(a.q, dims["q"], size)
    return dataclasses.replace(a, q=q, kv_cache=kv_cache, k_cache=k_cache, block_table=tables, cache_seqlens=lengths)


def folds(dims: dict[str, Any], a: Decode, *of_heads: str) -> bool:
    """Whether one call can serve all entries: without a copy of a cache, and with heads that are the same for all.

    ``of_heads``: the arguments that belong to heads.
    """
    if a.cu_seqlens_q is not None:
        return False
    if any(dims[name] is not None for name in of_heads):
        return False
    if a.k_cache is not None and (dims["kv_cache"] is None) != (dims["k_cache"] is None):
        return False
    return _joins(a.kv_cache, dims["kv_cache"]) and (a.k_cache is None or _joins(a.k_cache, dims["k_cache"]))


def _joins(cache: Tensor, dim: int | None) -> bool:
    """Whether the mapped dimension and the pages are one dimension in memory."""
    if dim is None:
        return True
    entries = cache.movedim(dim, 0)
    return entries.stride(0) == entries.size(1) * entries.stride(1)


def mapped(
    op: torch._ops.OpOverload, check: Check, size: int, dims: dict[str, Any], a: Decode, *of_heads: str
) -> tuple[Any, Any]:
    """The rule for vmap of an operator that attends: the mapped dimension joins the sequences where `folds` says so."""
    check.require("schedule", a.schedule is None, "None under vmap (it is made for one batch)", "a tensor")
    if not folds(dims, a, *of_heads):
        return each(op, size, dims, a)
    out, lse = op(*fold(size, dims, a).values())
    return (out.unflatten(0, (size, -1)), lse.unflatten(0, (size, -1))), (0, 0)


def vmap(size: int, dims: dict[str, Any], a: Decode) -> tuple[Any, Any]:
    return mapped(torch.ops.flashmla.decode.default, DECODE.check, size, dims, a, "attn_sink")


def autocast(dtype: torch.dtype, a: Decode) -> Decode:
    """Queries in the cache's dtype, whatever autocast's is: to cast the cache would copy it. Results have it too."""
    return dataclasses.replace(a, q=cast(a.q, a.kv_cache.dtype))


def sharding(a: Decode) -> list[Way]:
    """By sequences, by heads (with those of the caches, if they have more than one), or by query tokens.

    A schedule is made for all of them.
    """
    if a.schedule is not None:
        return []
    if a.cu_seqlens_q is not None:
        return [{"q": 1, "attn_sink": 0, "out": 1, "lse": 0, **of_heads(a)}]
    ways: list[Way] = [
        {"q": 0, "block_table": 0, "cache_seqlens": 0, "out": 0, "lse": 0},
        {"q": 2, "attn_sink": 0, "out": 2, "lse": 1, **of_heads(a)},
    ]
    return ways if a.causal else [*ways, {"q": 1, "out": 1, "lse": 2}]


def of_heads(a: Any) -> Way:
    """How the caches are cut where query heads are. One KV head is every rank's."""
    return {"kv_cache": 2, "k_cache": 2} if a.kv_cache.size(2) > 1 else {}


DECODE = Operator(
    "decode",
    Decode,
    contract,
    lambda a: reference.decode(**inputs(a)),
    returns=("out", "lse"),
    values=check_values,
    vmap=vmap,
    autocast=autocast,
    sharding=sharding,
).with_out(contiguous_rows=("out",))
