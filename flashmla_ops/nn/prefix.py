"""Prefill behind a cached prefix: new tokens attend to each other, then to what their sequences already have in pages.

GQA and MHA rows are keys and values as they lie, and are read in place. MLA rows are latents that have to be expanded
to heads first: that is done chunk by chunk, so that memory stays bounded however long the prefix is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError
from flashmla_ops.formats import NAMES, NATIVE, QUANTIZED
from flashmla_ops.ops.check import Check
from flashmla_ops.ops.quantize import check_pages

OP = "prefill_with_prefix"
#: Prefix tokens that are expanded at a time: 40 MiB in bf16 with 16 heads of 192 + 128.
CHUNK_TOKENS = 4096

#: kv_cache rows [n, h, d], k_cache rows [n, h, d_k] or None -> k [n, h_kv, d_qk], v [n, h_kv, d_v].
Expand = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class Span(NamedTuple):
    """Tokens ``start`` to ``stop`` of one sequence."""

    sequence: int
    start: int
    stop: int


def prefill_with_prefix(
    q: Tensor,  # [t, h_q, d_qk]
    k: Tensor,  # [t, h_kv, d_qk]
    v: Tensor,  # [t, h_kv, d_v]
    cu_seqlens: Tensor,  # [b + 1] int32
    kv_cache: Tensor,  # [n_pages, page_size, h, d]
    k_cache: Tensor | None,  # [n_pages, page_size, h, d_k]
    block_table: Tensor,  # [b, max_pages] int32
    prefix_lens: Tensor,  # [b] int32
    *,
    qk_start: int = 0,
    softmax_scale: float | None = None,
    row_format: str = NATIVE,
    expand: Expand | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    levels: int = 3,
) -> tuple[Tensor, Tensor]:  # out [t, h_q, d_v], lse [h_q, t] float32
    """Causal attention of new tokens over their sequence's cached prefix and each other.

    ``q``, ``k`` and ``v`` hold the new tokens of all sequences one after another, as in `flashmla::prefill`; sequence i
    has ``prefix_lens[i]`` tokens before them in the cache. Whether the new tokens' rows have been appended already does
    not matter: the cache is read up to ``prefix_lens`` only.

    Without ``expand`` the rows are read in place, as `flashmla::decode` reads them with ``qk_start``. With it (see
    `latents_to_heads`) they become keys and values ``chunk_tokens`` at a time. Partial results are merged in float32.
    ``row_format`` is that of a cache of bytes, whose rows are elements of ``q``'s type by the time they are expanded.
    ``levels`` is the operators'.

    Lengths are read on the host: it is a function for eager code. Raises `ArgumentError` for arguments that do not fit
    each other, for pages that are not in the cache, and what `flashmla::prefill` and `flashmla::decode` raise.
    """
    bounds: list[int] = cu_seqlens.tolist()
    prefixes: list[int] = prefix_lens.tolist()
    cache = Prefix(kv_cache, k_cache, block_table, prefix_lens, row_format)
    _check(bounds, prefixes, cache, chunk_tokens)
    _check_pages(prefixes, cache)
    new = torch.ops.flashmla.prefill(q, k, v, cu_seqlens, cu_seqlens, True, softmax_scale, levels)
    spans = [Span(i, 0, prefix) for i, prefix in enumerate(prefixes) if prefix and bounds[i] < bounds[i + 1]]
    if not spans:
        return new[0], new[1]
    out, lse = new[0].float(), new[1]
    for chunk in ([span] for span in spans) if expand is None else chunks(spans, chunk_tokens):
        first, last = chunk[0].sequence, chunk[-1].sequence
        queries = slice(bounds[first], bounds[last + 1])
        if expand is None:
            part = _over_pages(q[queries], cache, first, v.shape[2], qk_start, softmax_scale, levels)
        else:
            cu_q = cu_seqlens[first : last + 2] - bounds[first]
            part = _over_heads(q[queries], cu_q, cache, chunk, expand, softmax_scale, levels)
        merged = torch.ops.flashmla.merge_states([out[queries], part[0].float()], [lse[:, queries], part[1]])
        out[queries], lse[:, queries] = merged
    return out.to(q.dtype), lse


class Prefix(NamedTuple):
    """The cached tokens of all sequences."""

    kv_cache: Tensor
    k_cache: Tensor | None
    block_table: Tensor
    lengths: Tensor
    row_format: str


def _over_pages(
    q: Tensor, cache: Prefix, sequence: int, d_v: int, qk_start: int, scale: float | None, levels: int
) -> tuple[Tensor, Tensor]:
    """One sequence's queries ``[s_q, h_q, d_qk]`` over the rows of its prefix, where they lie."""
    row = slice(sequence, sequence + 1)
    tensors = (cache.kv_cache, cache.k_cache, cache.block_table[row], cache.lengths[row])
    options = {"row_format": cache.row_format, "levels": levels}
    out, lse = torch.ops.flashmla.decode(q[None], *tensors, d_v, qk_start, scale, **options)
    return out[0], lse[0]


def _over_heads(
    q: Tensor,
    cu_seqlens_q: Tensor,
    cache: Prefix,
    chunk: Sequence[Span],
    expand: Expand,
    scale: float | None,
    levels: int,
) -> tuple[Tensor, Tensor]:
    """The queries of the chunk's sequences over its tokens, expanded. Sequences between that have none see nothing."""
    rows, k_rows = gather(cache.kv_cache, cache.k_cache, cache.block_table, chunk, cache.row_format)
    if cache.row_format != NATIVE:
        rows = torch.ops.flashmla.dequantize_rows(rows, cache.row_format, q.dtype)
    keys, values = expand(rows, k_rows)
    counts = [0] * (chunk[-1].sequence + 1 - chunk[0].sequence)
    for span in chunk:
        counts[span.sequence - chunk[0].sequence] = span.stop - span.start
    cu_seqlens_k = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=q.device)
    part = torch.ops.flashmla.prefill(q, keys, values, cu_seqlens_q, cu_seqlens_k, False, scale, levels)
    return part[0], part[1]


def latents_to_heads(
    weight: Tensor,  # [h_q * (d_nope + d_v), d_c], of kv_b_proj
    d_nope: int,
    d_v: int,
) -> Expand:
    """The expansion of MLA rows ``[c, k_pe]``, or c and k_pe apart: every head's key is ``[W_UK c, k_pe]``.

    Its value is ``W_UV c`` (DeepSeek-V2, arXiv:2405.04434, section 2.1.2).
    """
    d_c = weight.shape[1]

    def expand(rows: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor]:
        latents, joined = rows[:, 0].split([d_c, rows.shape[2] - d_c], dim=-1)
        rope = joined if rotary is None else rotary[:, 0]
        heads = torch.ops.flashmla.gemm(latents, weight).unflatten(1, (-1, d_nope + d_v))
        nope, values = heads.split([d_nope, d_v], dim=-1)
        return torch.cat([nope, rope[:, None].expand(-1, heads.shape[1], -1)], dim=-1), values

    return expand


def chunks(spans: Sequence[Span], tokens: int) -> Iterator[list[Span]]:
    """The spans in order, cut so that each list holds at most ``tokens`` tokens."""
    chunk: list[Span] = []
    room = tokens
    for sequence, start, stop in spans:
        while start < stop:
            cut = min(stop, start + room)
            chunk.append(Span(sequence, start, cut))
            room -= cut - start
            start = cut
            if room == 0:
                yield chunk
                chunk, room = [], tokens
    if chunk:
        yield chunk


def gather(
    kv_cache: Tensor,  # [n_pages, page_size, h, d]
    k_cache: Tensor | None,  # [n_pages, page_size, h, d_k]
    block_table: Tensor,  # [b, max_pages] int32
    spans: Sequence[Span],
    row_format: str = NATIVE,
) -> tuple[Tensor, Tensor | None]:  # [n, h, d], [n, h, d_k]
    """The rows of the spans' n tokens as they are stored, one after another."""
    page_size, device = kv_cache.shape[1], kv_cache.device
    positions = torch.cat([torch.arange(span.start, span.stop, device=device) for span in spans])
    counts = torch.tensor([span.stop - span.start for span in spans], device=device)
    sequences = torch.tensor([span.sequence for span in spans], device=device).repeat_interleave(counts)
    at = block_table[sequences, positions // page_size].long(), positions % page_size
    parts = [kv_cache] if row_format == NATIVE else QUANTIZED[row_format].parts(kv_cache)
    pieces = [part[at] for part in parts]
    rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
    return rows, None if k_cache is None else k_cache[at]


def _check(bounds: Sequence[int], prefixes: Sequence[int], cache: Prefix, chunk_tokens: int) -> None:
    b = len(bounds) - 1
    block_table, kv_cache, k_cache = cache.block_table, cache.kv_cache, cache.k_cache
    if any(last < first for first, last in pairwise(bounds)):
        raise ArgumentError(OP, "cu_seqlens", "values that never fall", list(bounds))
    if len(prefixes) != b:
        raise ArgumentError(OP, "prefix_lens", f"{b} lengths, one for each sequence of cu_seqlens", len(prefixes))
    if block_table.dim() != 2 or block_table.shape[0] != b:
        raise ArgumentError(OP, "block_table", f"shape [{b}, max_pages]", list(block_table.shape))
    if kv_cache.dim() != 4:
        raise ArgumentError(OP, "kv_cache", "shape [n_pages, page_size, h, d]", list(kv_cache.shape))
    if k_cache is not None and k_cache.shape[:3] != kv_cache.shape[:3]:
        raise ArgumentError(OP, "k_cache", f"{list(kv_cache.shape[:3])}, as kv_cache", list(k_cache.shape[:3]))
    if cache.row_format not in NAMES:
        raise ArgumentError(OP, "row_format", f"one of {', '.join(NAMES)}", cache.row_format)
    if cache.row_format != NATIVE:
        check_pages(Check(OP), "kv_cache", kv_cache, cache.row_format)
        if k_cache is not None:
            raise ArgumentError(OP, "k_cache", f"None with rows of {cache.row_format}", "a tensor")
    if chunk_tokens < 1:
        raise ArgumentError(OP, "chunk_tokens", "at least 1", chunk_tokens)


def _check_pages(prefixes: Sequence[int], cache: Prefix) -> None:
    """Every page of every prefix, once, before any work. What stands behind them in the table does not matter."""
    n_pages, page_size = cache.kv_cache.shape[:2]
    for i, (row, prefix) in enumerate(zip(cache.block_table.tolist(), prefixes, strict=True)):
        if not 0 <= prefix <= len(row) * page_size:
            expected = f"lengths in [0, {len(row) * page_size}], what block_table has room for"
            raise ArgumentError(OP, "prefix_lens", expected, f"{prefix} at [{i}]")
        for index, page in enumerate(row[: -(-prefix // page_size)]):
            if not 0 <= page < n_pages:
                raise ArgumentError(OP, "block_table", f"pages in [0, {n_pages})", f"{page} at [{i}, {index}]")
