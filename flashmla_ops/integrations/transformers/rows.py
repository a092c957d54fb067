"""The content of a cache of transformers as the operators read it: rows in pages, where they lie.

A row is ``[c_kv, k_pe]`` of MLA, or ``[V, K]`` of a KV head. transformers' own caches keep the two parts in two
tensors, each one page a sequence; our paged caches keep whole rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError
from flashmla_ops.formats import NATIVE
from flashmla_ops.nn.prefix import Expand, Span, gather, prefill_with_prefix
from flashmla_ops.ops.check import FLOATS


class Pages(NamedTuple):
    """How to read the pages that a paged cache's ``update`` returns."""

    block_table: Tensor  # [b, max_pages] int32
    cache_seqlens: Tensor  # [b] int32, the tokens in the cache, new ones included
    s_kv: int  # the length that the mask covers: the tokens in the cache, or its capacity where that is static
    row_format: str = NATIVE


class Rows(NamedTuple):
    """Either cache, as `flashmla::decode` reads it."""

    kv_cache: Tensor  # [n_pages, page_size, h_kv, d]
    k_cache: Tensor | None  # [n_pages, page_size, h_kv, d_k], where the two parts of a row lie apart
    block_table: Tensor  # [b, max_pages] int32
    cache_seqlens: Tensor  # [b] int32
    s_kv: int
    row_format: str = NATIVE


def contiguous_rows(
    first: Tensor,  # [b, h_kv, s_kv, d]: values, or latents
    second: Tensor,  # [b, h_kv, s_kv, d_k]: keys, or rotary keys
) -> Rows:
    """Views of a cache that is one page a sequence; a cache of transformers is never copied."""
    b, _, s_kv, _ = first.shape
    # Without a cache a model may hand over states that are views of something else.
    first, second = (x if x.stride(-1) == 1 else x.contiguous() for x in (first, second))
    block_table = torch.arange(b, device=first.device, dtype=torch.int32)[:, None]
    cache_seqlens = torch.full((b,), s_kv, device=first.device, dtype=torch.int32)
    return Rows(first.transpose(1, 2), second.transpose(1, 2), block_table, cache_seqlens, s_kv)


def paged_rows(slab: Tensor, pages: Pages) -> Rows:
    """Views of a slab ``[n_pages, h_kv, page_size, d]``."""
    return Rows(slab.transpose(1, 2), None, *pages)


def gather_pages(slab: Tensor, pages: Pages, d_first: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rows of all sequences as transformers has them, in two parts ``[b, h_kv, s_kv, d]`` of ``dtype``."""
    found = slab[pages.block_table.long()]  # [b, max_pages, h_kv, page_size, d]
    rows = elements(found.transpose(1, 2).flatten(2, 3)[:, :, : pages.s_kv], pages.row_format, dtype)
    first, second = rows.split([d_first, rows.shape[-1] - d_first], dim=-1)
    return first, second


def elements(rows: Tensor, row_format: str, dtype: torch.dtype) -> Tensor:
    """Rows as they are stored ``[..., d]``, as elements."""
    return rows if row_format == NATIVE else torch.ops.flashmla.dequantize_rows(rows, row_format, dtype)


def token_pages(rows: Rows, mask: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Attention to listed tokens: each query is a sequence of its own whose pages are single tokens of the cache.

    ``mask``: in the tokens form of `masks`, for s_q queries of each of b sequences. Returns the caches
    ``[n_pages * page_size, 1, h_kv, d]``, the block table ``[b * s_q, s_kv]`` and the lengths ``[b * s_q]``.
    """
    page_size = rows.kv_cache.shape[1]
    positions = mask[:, 0, :, 1:].flatten(1)  # [b, s_q * s_kv]
    pages = rows.block_table.gather(1, (positions // page_size).long())
    slots = (pages * page_size + positions % page_size).view(-1, rows.s_kv)
    kv_cache, k_cache = (None if x is None else x.flatten(0, 1)[:, None] for x in (rows.kv_cache, rows.k_cache))
    assert kv_cache is not None
    return kv_cache, k_cache, slots, mask[:, 0, :, 0].flatten()


def check_mask(mask: Tensor, s_kv: int) -> None:
    """Raise `ArgumentError` unless a mask is one of `masks`, or one over the cache's tokens."""
    if mask.dtype == torch.int32:
        known, expected = mask.shape[-1] in (1, 1 + s_kv), f"a prefix mask or the positions of {s_kv} tokens"
    else:
        known, expected = mask.shape[-1] == s_kv, f"a mask over the {s_kv} tokens of the cache"
    if mask.dim() != 4 or not known:
        raise ArgumentError("decode", "attention_mask", expected, f"shape {list(mask.shape)}")


def dtype_obstacle(query: Tensor, rows: Rows, *weights: Tensor) -> str:
    """Why the operators do not take these dtypes; empty if they do."""
    if query.dtype not in FLOATS:
        return f"no operator takes {query.dtype}"
    cached = (rows.kv_cache, rows.k_cache) if rows.row_format == NATIVE else ()
    others = [tensor for tensor in (*cached, *weights) if tensor is not None]
    if any(tensor.dtype != query.dtype for tensor in others):
        what = "the cache and the weights of kv_b_proj" if weights else "the cache"
        return f"queries are {query.dtype}, but not {what}, as under autocast"
    return ""


def needs_gradient(query: Tensor, rows: Rows, *weights: Any) -> bool:
    """Whether a gradient is required: operators that read a cache, or weights beside it, are not asked for one."""
    tensors = [tensor for tensor in (query, rows.kv_cache, rows.k_cache, *weights) if tensor is not None]
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def prefill_behind(
    q: Tensor,  # [b, s_q, h_q, d_qk]
    rows: Rows,
    prefix_lens: Tensor,  # [b] int32
    split: Expand,
    **options: Any,
) -> Tensor:  # [b, s_q, h_q, d_v]
    """Queries of new tokens, which are in the cache already, behind the prefix of each sequence.

    ``split`` makes keys and values of the rows of new tokens; ``options`` are those of `prefill_with_prefix`.
    """
    b, s_q, h_q, d_qk = q.shape
    cache = (rows.kv_cache, rows.k_cache, rows.block_table)
    spans = [Span(i, n, n + s_q) for i, n in enumerate(prefix_lens.tolist())]
    first, second = gather(*cache, spans, rows.row_format)
    keys, values = split(elements(first, rows.row_format, q.dtype), second)
    cu_seqlens = torch.arange(0, (b + 1) * s_q, s_q, dtype=torch.int32, device=q.device)
    flat = q.reshape(b * s_q, h_q, d_qk)
    out, _ = prefill_with_prefix(
        flat, keys, values, cu_seqlens, *cache, prefix_lens, row_format=rows.row_format, **options
    )
    return out.view(b, s_q, h_q, -1)
