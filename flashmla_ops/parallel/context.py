"""Decoding with the pages of each sequence spread over ranks: each attends to its own rows, and the results are merged.

Page i of a sequence, counted from its first, is on rank ``i % ranks``, so that ranks have equally many whatever the
length. A rank keeps its pages in a cache and a block table of its own: entry j of its table is page
``j * ranks + rank`` of the sequence. `local_table` makes such a table from one for all pages, `local_slots` the slots
at which new rows are appended.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashmla_ops.errors import ArgumentError, NotDifferentiableError
from flashmla_ops.ops import decode
from flashmla_ops.parallel.collectives import gathered

OP = "context_parallel_decode"


def local_lengths(lengths: Tensor, page_size: int, ranks: int, rank: int) -> Tensor:
    """How many of the first ``lengths`` rows of each sequence a rank has: [...] of any integers."""
    pages = lengths // page_size
    whole = (pages - rank + ranks - 1) // ranks * page_size
    return torch.where(pages % ranks == rank, whole + lengths % page_size, whole)


def local_table(block_table: Tensor, ranks: int, rank: int) -> Tensor:
    """A rank's columns of a table [b, max_pages] of all pages: [b, ceil((max_pages - rank) / ranks)]."""
    return block_table[:, rank::ranks].contiguous()


def local_slots(
    block_table: Tensor,  # [b, max_local_pages] int32: the rank's own
    sequences: Tensor,  # [n] integers: whose row it is
    positions: Tensor,  # [n] integers: where in its sequence it lies; negative: nowhere
    page_size: int,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """``slot_mapping`` [n] int64 for `append_` of new rows on every rank: -1 for the rows of others."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    page, offset = positions.long() // page_size, positions.long() % page_size
    mine = (page % ranks == rank) & (positions >= 0)
    # Tables of two ranks differ by one column at most.
    beyond = page // ranks - block_table.size(1) >= torch.where(mine, 0, 1)
    for i in beyond.nonzero().flatten().tolist():
        limit = (block_table.size(1) * ranks + rank) * page_size
        raise ArgumentError("append_", "positions", f"rows before {limit}", f"{int(positions[i])} at [{i}]")
    if block_table.size(1) == 0:
        return torch.full_like(page, -1)
    column = torch.where(mine, page // ranks, 0)
    return torch.where(mine, block_table[sequences.long(), column].long() * page_size + offset, -1)


def merge_over_ranks(out: Tensor, lse: Tensor, *, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """The states of all ranks, each over rows of its own, as one: ``out [b, s_q, h_q, d_v]``, ``lse [b, h_q, s_q]``.

    Every rank gets the same bits. Each sends ``out`` and ``lse`` once to every other. Raises `RankError` if one of them
    does not answer.
    """
    if torch.is_grad_enabled() and out.requires_grad:
        raise NotDifferentiableError(OP, "q")
    merged: tuple[Tensor, Tensor] = torch.ops.flashmla.merge_states(gathered(out, group), gathered(lse, group))
    return merged


def context_parallel_decode(
    q: Tensor,  # [b, s_q, h_q, d_qk]: the same on every rank
    kv_cache: Tensor,  # [n_pages, page_size, h_kv, d]: the rank's own pages
    k_cache: Tensor | None,
    block_table: Tensor,  # [b, max_local_pages] int32: the rank's own
    cache_seqlens: Tensor,  # [b] int32: rows of each whole sequence, the same on every rank
    d_v: int,
    *,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`torch.ops.flashmla.decode` over sequences whose pages lie on several ranks, page i on rank ``i % ranks``.

    Arguments and ``options`` are those of `decode` but for the cache and its table, of which each rank has its part,
    and without ``window``, ``schedule`` and ``cu_seqlens_q``. ``causal`` is aligned to the end of the whole sequence.
    Returns ``out`` [b, s_q, h_q, d_v] and ``lse`` [b, h_q, s_q] of the whole, the same on every rank: ``lse`` +inf
    where no rank has a row, and without the sink, which is applied once. Results of bfloat16 and float16 are rounded
    before they are merged. Raises `ArgumentError` as `decode`, `RankError` if a rank does not answer, and
    `NotDifferentiableError` where a gradient is required.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    given = decode.Options(d_v, **options)
    for name, unset in (("window", 0), ("schedule", None), ("cu_seqlens_q", None)):
        if (value := getattr(given, name)) is not unset and value != unset:
            raise ArgumentError(OP, name, f"{unset}: it is not served over ranks", value)
    if q.dim() != 4:
        raise ArgumentError(OP, "q", "shape [b, s_q, h_q, d_qk]", f"{q.dim()} dimensions")
    page_size, s_q = kv_cache.size(1), q.size(1)
    # The page of a sequence that would be the next in this table; others have those before it.
    capacity = (block_table.size(1) * ranks + rank) * page_size
    for i in ((cache_seqlens < 0) | (cache_seqlens > capacity)).nonzero().flatten().tolist():
        raise ArgumentError(OP, "cache_seqlens", f"lengths in [0, {capacity}]", f"{int(cache_seqlens[i])} at [{i}]")
    tokens, table, lengths = q, block_table, cache_seqlens
    apart = given.causal and s_q > 1
    if apart:
        # The rows that a query sees end at another place on each rank: each query is a sequence of its own.
        ends = cache_seqlens[:, None] - s_q + 1 + torch.arange(s_q, dtype=cache_seqlens.dtype, device=q.device)
        lengths = ends.clamp(min=0).flatten()
        tokens, table = q.flatten(0, 1)[:, None], block_table.repeat_interleave(s_q, dim=0)
    out, lse = torch.ops.flashmla.decode(
        tokens,
        kv_cache,
        k_cache,
        table,
        local_lengths(lengths, page_size, ranks, rank),
        **vars(dataclasses.replace(given, causal=False, attn_sink=None)),
    )
    out, lse = merge_over_ranks(out, lse, group=group)
    if apart:
        out, lse = out.view(*q.shape[:-1], d_v), lse.view(q.size(0), s_q, -1).transpose(1, 2)
    if given.attn_sink is not None:
        # [b, h_q, s_q]; not a number where no row meets an infinite sink, and out is 0.
        kept = torch.sigmoid(lse - given.attn_sink[:, None]).nan_to_num(0.0)
        out = (out * kept.transpose(1, 2)[..., None]).to(q.dtype)
    return out, lse
