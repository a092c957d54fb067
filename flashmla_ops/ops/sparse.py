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

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.errors import ArgumentError
from flashmla_ops.formats import FORMAT_NAMES, NAMES, NATIVE, row_elements
from flashmla_ops.ops._autocast import cast
from flashmla_ops.ops._sharding import Way
from flashmla_ops.ops._vmap import loop
from flashmla_ops.ops.check import Check, Result
from flashmla_ops.ops.decode import check_cache, check_rows, check_sink, of_heads
from flashmla_ops.ops.operator import Arguments, Operator
from flashmla_ops.ops.quantize import check_pages


@dataclass
class Slots(Arguments):
    """Queries, and the slots of a paged cache that they attend to."""

    q: Tensor  # [b, s_q, h_q, d_qk]
    kv_cache: Tensor  # [n_pages, page_size, h_kv, d], d contiguous
    k_cache: Tensor | None  # [n_pages, page_size, h_kv, d_k], d_k contiguous
    indices: Tensor  # [b, s_q, topk] int32


@dataclass
class SlotOptions(Arguments):
    """How they attend, and a second cache."""

    d_v: int
    qk_start: int = 0
    softmax_scale: float | None = None
    row_format: str = NATIVE
    attn_sink: Tensor | None = None  # [h_q] float32
    topk_length: Tensor | None = None  # [b] int32
    extra_kv_cache: Tensor | None = None  # [n_pages, page_size, h_kv, d], sizes of its own but for h_kv
    extra_indices: Tensor | None = None  # [b, s_q, topk] int32
    extra_topk_length: Tensor | None = None  # [b] int32
    extra_row_format: str = NATIVE


@dataclass
class Chosen(SlotOptions, Slots):
    """The fields of `Slots`, then those of `SlotOptions`."""


@dataclass
class SparseDecode(Chosen):
    """A call of `sparse_decode`."""

    batch_invariant: bool = False


@dataclass
class Beside(Arguments):
    """Queries of one sequence, rows beside them, and the rows that each query token attends to."""

    q: Tensor  # [s_q, h_q, d_qk]
    kv: Tensor  # [s_kv, h_kv, d], d contiguous
    indices: Tensor  # [s_q, h_kv, topk] int32
    d_v: int


@dataclass
class SparsePrefill(Beside):
    """How they attend."""

    softmax_scale: float | None = None
    row_format: str = NATIVE
    attn_sink: Tensor | None = None  # [h_q] float32
    topk_length: Tensor | None = None  # [s_q] int32


def contract(check: Check, a: Chosen) -> tuple[Result, Result]:
    check_format(check, "row_format", a.row_format)
    check_format(check, "extra_row_format", a.extra_row_format)
    check.dims("q", a.q, "[b, s_q, h_q, d_qk]")
    check.floating("q", a.q)
    check_cache(check, "kv_cache", a.kv_cache, a.q, a.row_format)
    native = a.row_format == NATIVE
    check.require("k_cache", native or a.k_cache is None, f"None with rows of {a.row_format}", "a tensor")
    d, k_shape = a.kv_cache.size(3) if native else row_elements(a.row_format), "[n_pages, page_size, h_kv, d]"
    check_rows(check, "kv_cache", a.q, a.kv_cache, a.k_cache, d, a.d_v, a.qk_start, k_shape)
    check_indices(check, "indices", a.indices, a.q)
    check_lengths(check, "topk_length", a.topk_length, a.q, "[b]", " sequences, as q")
    check_sink(check, a.q, a.attn_sink)
    if a.extra_kv_cache is not None:
        check_cache(check, "extra_kv_cache", a.extra_kv_cache, a.q, a.extra_row_format)
        extra_native, h_kv = a.extra_row_format == NATIVE, a.kv_cache.size(2)
        check.size("extra_kv_cache", a.extra_kv_cache, 2, h_kv, " KV heads, as kv_cache")
        extra_d = a.extra_kv_cache.size(3) if extra_native else row_elements(a.extra_row_format)
        check_rows(check, "extra_kv_cache", a.q, a.extra_kv_cache, None, extra_d, a.d_v, a.qk_start, "")
        check.require("extra_indices", a.extra_indices is not None, "a tensor with extra_kv_cache", "None")
        if a.extra_indices is not None:
            check_indices(check, "extra_indices", a.extra_indices, a.q)
        check_lengths(check, "extra_topk_length", a.extra_topk_length, a.q, "[b]", " sequences, as q")
    else:
        check.require("extra_indices", a.extra_indices is None, "None without extra_kv_cache", "a tensor")
        check.require("extra_topk_length", a.extra_topk_length is None, "None without extra_kv_cache", "a tensor")
    b, s_q, h_q, _ = a.q.shape
    return Result([b, s_q, h_q, a.d_v], a.q.dtype), Result([b, h_q, s_q], torch.float32)


def contract_prefill(check: Check, a: SparsePrefill) -> tuple[Result, Result, Result]:
    check_format(check, "row_format", a.row_format)
    check_beside(check, a, a.row_format, a.topk_length)
    check_sink(check, a.q, a.attn_sink)
    s_q, h_q, _ = a.q.shape
    out = Result([s_q, h_q, a.d_v], a.q.dtype)
    return out, Result([s_q, h_q], torch.float32), Result([s_q, h_q], torch.float32)


def check_beside(check: Check, a: Beside, row_format: str, topk_length: Tensor | None) -> None:
    check.dims("q", a.q, "[s_q, h_q, d_qk]")
    check.floating("q", a.q)
    check.dims("kv", a.kv, "[s_kv, h_kv, d]")
    if row_format == NATIVE:
        check.dtype("kv", a.kv, a.q.dtype)
    else:
        check_pages(check, "kv", a.kv, row_format)
    check.device("kv", a.kv, a.q)
    check.contiguous_rows("kv", a.kv)
    d = a.kv.size(2) if row_format == NATIVE else row_elements(row_format)
    check_rows(check, "kv", a.q, a.kv, None, d, a.d_v, 0, "")
    check.dims("indices", a.indices, "[s_q, h_kv, topk]")
    check.dtype("indices", a.indices, torch.int32)
    check.device("indices", a.indices, a.q)
    check.size("indices", a.indices, 0, a.q.size(0), " query tokens, as q")
    check.size("indices", a.indices, 1, a.kv.size(1), " KV heads, as kv")
    check_lengths(check, "topk_length", topk_length, a.q, "[s_q]", " query tokens, as q")


def check_format(check: Check, name: str, row_format: str) -> None:
    check.require(name, row_format in NAMES, f"one of {FORMAT_NAMES}", row_format)


def check_indices(check: Check, name: str, indices: Tensor, q: Tensor) -> None:
    check.dims(name, indices, "[b, s_q, topk]")
    check.dtype(name, indices, torch.int32)
    check.device(name, indices, q)
    check.size(name, indices, 0, q.size(0), " sequences, as q")
    check.size(name, indices, 1, q.size(1), " query tokens, as q")


def check_lengths(check: Check, name: str, lengths: Tensor | None, q: Tensor, shape: str, unit: str) -> None:
    if lengths is not None:
        check.dims(name, lengths, shape)
        check.dtype(name, lengths, torch.int32)
        check.device(name, lengths, q)
        check.size(name, lengths, 0, q.size(0), unit)


def check_values(check: Check, a: Chosen) -> None:
    _check_lengths_of(check, "topk_length", a.topk_length, a.indices)
    _check_lengths_of(check, "extra_topk_length", a.extra_topk_length, a.extra_indices)


def check_prefill_lengths(check: Check, a: Any) -> None:
    """Of `sparse_prefill` and its backward."""
    _check_lengths_of(check, "topk_length", a.topk_length, a.indices)


def _check_lengths_of(check: Check, name: str, topk_length: Tensor | None, indices: Tensor | None) -> None:
    if topk_length is not None and indices is not None:
        topk = indices.size(2)
        for i, length in enumerate(topk_length.tolist()):
            if not 0 <= length <= topk:
                raise ArgumentError(check.op, name, f"lengths in [0, {topk}]", f"{length} at [{i}]")


def decode_reference(a: SparseDecode) -> tuple[Tensor, Tensor]:
    out, _, lse = reference.sparse_attention(a.q, sources_of(a), a.d_v, a.qk_start, a.softmax_scale, a.attn_sink)
    return out, lse.transpose(1, 2)


def sources_of(a: Chosen) -> list[reference.Source]:
    """The caches of `sparse_decode` and of its backward."""
    sources = [_paged(a.kv_cache, a.k_cache, a.indices, a.topk_length, a.row_format)]
    if a.extra_kv_cache is not None and a.extra_indices is not None:
        sources.append(_paged(a.extra_kv_cache, None, a.extra_indices, a.extra_topk_length, a.extra_row_format))
    return sources


def _paged(
    kv_cache: Tensor, k_cache: Tensor | None, indices: Tensor, topk_length: Tensor | None, row_format: str
) -> reference.Source:
    """A source of `sparse_decode`, whose indices are the same for all KV heads."""
    heads = indices[:, :, None].expand(-1, -1, kv_cache.size(2), -1)
    lengths = None if topk_length is None else topk_length[:, None].expand(indices.shape[:2])
    return reference.Source(kv_cache, k_cache, heads, lengths, row_format)


def prefill_reference(a: SparsePrefill) -> tuple[Tensor, ...]:
    source = reference.Source.beside(a.kv, a.indices, a.topk_length, a.row_format)
    results = reference.sparse_attention(a.q[None], [source], a.d_v, 0, a.softmax_scale, a.attn_sink)
    return tuple(result[0] for result in results)


A = TypeVar("A", SparseDecode, SparsePrefill)


def autocast(dtype: torch.dtype, a: A) -> A:
    """Queries in the dtype of the rows, whatever autocast's is: to cast a cache would copy it. Results have it too."""
    rows = a.kv_cache if isinstance(a, SparseDecode) else a.kv
    return dataclasses.replace(a, q=cast(a.q, rows.dtype))


def sharding(a: SparseDecode) -> list[Way]:
    """By sequences, by heads, or by query tokens: each has indices of its own."""
    lengths: Way = {"topk_length": 0, "extra_topk_length": 0}
    extra: Way = {"extra_kv_cache": 2} if a.kv_cache.size(2) > 1 else {}
    return [
        {"q": 0, "indices": 0, "extra_indices": 0, "out": 0, "lse": 0, **lengths},
        {"q": 2, "attn_sink": 0, "out": 2, "lse": 1, **of_heads(a), **extra},
        {"q": 1, "indices": 1, "extra_indices": 1, "out": 1, "lse": 2},
    ]


def sharding_prefill(a: SparsePrefill) -> list[Way]:
    heads: Way = {"kv": 1, "indices": 1} if a.kv.size(1) > 1 else {}
    return [
        {"q": 0, "indices": 0, "topk_length": 0, "out": 0, "max_logits": 0, "lse": 0},
        {"q": 1, "attn_sink": 0, "out": 1, "max_logits": 1, "lse": 1, **heads},
    ]


SPARSE_DECODE = Operator(
    "sparse_decode",
    SparseDecode,
    contract,
    decode_reference,
    returns=("out", "lse"),
    values=check_values,
    vmap=loop(lambda: torch.ops.flashmla.sparse_decode.default),
    autocast=autocast,
    sharding=sharding,
)
SPARSE_PREFILL = Operator(
    "sparse_prefill",
    SparsePrefill,
    contract_prefill,
    prefill_reference,
    returns=("out", "max_logits", "lse"),
    values=check_prefill_lengths,
    vmap=loop(lambda: torch.ops.flashmla.sparse_prefill.default),
    autocast=autocast,
    sharding=sharding_prefill,
)
