"""Choosing pages for one call of `decode`: masses, the choice, and views of the cache in which heads are pages."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError
from flashmla_ops.sparsity.config import DynamicSparsity
from flashmla_ops.sparsity.heads import HeadPages, by_head, queries_by_head, results_together
from flashmla_ops.sparsity.report import Tally
from flashmla_ops.sparsity.summaries import SUMMARIES


class Cached(NamedTuple):
    """A paged cache as `flashmla::decode` reads it, and the summaries of its pages."""

    kv_cache: Tensor  # [n_pages, page_size, h_kv, d]
    k_cache: Tensor | None  # [n_pages, page_size, h_kv, d_k]
    block_table: Tensor  # [b, max_pages] int32
    cache_seqlens: Tensor  # [b] int32
    summaries: Tensor | None  # [n_pages, h_kv, n_bytes] uint8; None where the mode takes none
    planes: Tensor | None = None  # [d_key, n_planes] float32


class Chosen(NamedTuple):
    """What `flashmla::decode` attends to, a sequence for each KV head, and the mass of the rest."""

    heads: HeadPages
    pages: Tensor  # [b * h_kv, max_pages] int32
    lengths: Tensor  # [b * h_kv] int32
    residue: Tensor  # [b, h_q, s_q] float32


def select(
    q: Tensor,  # [b, s_q, h_q, d_qk]
    cache: Cached,
    sparsity: DynamicSparsity,
    qk_start: int,
    softmax_scale: float | None,
) -> Chosen:
    """Choose the pages that ``q`` attends to, causally."""
    kv_cache, k_cache, block_table, cache_seqlens, summaries, planes = cache
    heads = by_head(kv_cache, k_cache)
    always = (sparsity.sink_pages, sparsity.local_pages, sparsity.min_context)
    if sparsity.kind is None:
        mass, slack = _masked(q, cache, sparsity)
    else:
        assert summaries is not None
        rows = (kv_cache, k_cache, block_table, cache_seqlens, summaries, sparsity.kind)
        mass, slack = torch.ops.flashmla.page_mass(q, *rows, qk_start, softmax_scale, *always, planes)
    sizes = (kv_cache.size(1), kv_cache.size(2), heads.page_step, heads.head_step)
    rule = (sparsity.rule, sparsity.limit)
    chosen = torch.ops.flashmla.choose_pages(mass, slack, block_table, cache_seqlens, *rule, *sizes, *always)
    return Chosen(heads, *chosen)


def attend(
    q: Tensor,  # [b, s_q, h_q, d_qk]
    cache: Cached,
    sparsity: DynamicSparsity,
    d_v: int,
    qk_start: int = 0,
    softmax_scale: float | None = None,
    tally: Tally | None = None,
    levels: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:  # out [b, s_q, h_q, d_v], lse and lost [b, h_q, s_q] float32
    """Causal attention of ``q`` to the pages that matter to it.

    ``lse`` is that of what was attended to; ``lost`` no less than the share of each query's softmax that was skipped,
    and 1 where nothing is known of it. ``tally`` counts the call; ``levels`` is that of `flashmla::decode`.
    """
    b, s_q, h_q, _ = q.shape
    h_kv = cache.kv_cache.size(2)
    scaled = (d_v, qk_start, softmax_scale)
    if are_short(cache.cache_seqlens, sparsity.min_context):
        out, lse = torch.ops.flashmla.decode(q, *cache[:4], *scaled, causal=True, levels=levels)
        lost, attended = torch.zeros_like(lse), None
    else:
        chosen = select(q, cache, sparsity, qk_start, softmax_scale)
        views = (chosen.heads.kv_cache, chosen.heads.k_cache, chosen.pages, chosen.lengths)
        heads, lse = torch.ops.flashmla.decode(queries_by_head(q, h_kv), *views, *scaled, causal=True, levels=levels)
        out, lse = results_together(heads, h_kv), lse.view(b, h_q, s_q)
        lost, attended = share_lost(chosen, lse), chosen.lengths
    if tally is not None:
        record(tally, q, cache, sparsity, attended, lost, d_v)
    return out, lse, lost


def are_short(cache_seqlens: Tensor, min_context: int) -> bool:
    """Whether all sequences are known to be too short to choose from: never while tracing, nor on other devices."""
    if torch.compiler.is_compiling() or type(cache_seqlens) is not Tensor:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(cache_seqlens) or not cache_seqlens.is_cpu:
        return False
    return bool(len(cache_seqlens)) and int(cache_seqlens.max()) < min_context


def share_lost(chosen: Chosen, lse: Tensor) -> Tensor:
    """A bound of the share of each query's softmax that was skipped; ``lse`` is that of what was attended to."""
    # Kernels round lse. Where it is +inf nothing was attended to: all is lost, or there was nothing.
    room = 1e-4 + 2**-20 * lse.abs().where(lse.isfinite(), 0.0)
    lost = torch.sigmoid(chosen.residue - lse.where(lse.isfinite(), -torch.inf) + room)
    return torch.where(chosen.residue == -torch.inf, 0.0, (lost * (1 + 2**-22)).clamp_max(1.0))


def record(
    tally: Tally,
    q: Tensor,
    cache: Cached,
    sparsity: DynamicSparsity,
    attended: Tensor | None,
    lost: Tensor,
    d_v: int,
) -> None:
    """Count a call; ``attended`` has the rows of each KV head that it attended to, and None stands for all."""
    _, page_size, h_kv, d = cache.kv_cache.shape
    s_q, h_q, d_qk = q.shape[1:]
    row_bytes = (d + (0 if cache.k_cache is None else cache.k_cache.size(3))) * q.element_size()
    per_row = s_q * h_q // h_kv * (d_qk + d_v)
    lengths = cache.cache_seqlens.double()
    rows = lengths.sum() * h_kv
    read = rows if attended is None else attended.sum().double()
    pages = (lengths / page_size).ceil().sum() * h_kv
    summary_bytes = 0 if cache.summaries is None else cache.summaries.size(2)
    scored = torch.where(lengths >= sparsity.min_context, (lengths / page_size).floor(), 0.0).sum() * h_kv
    per_page = 0 if sparsity.kind is None else SUMMARIES[sparsity.kind].multiply_adds(page_size, d_qk)
    tally.add(
        [
            *(1.0, pages, rows, read),
            *(rows * row_bytes, read * row_bytes, scored * summary_bytes),
            *(rows * per_row, read * per_row, scored * (per_page * s_q * h_q // h_kv)),
        ],
        lost,
    )


def _masked(q: Tensor, cache: Cached, sparsity: DynamicSparsity) -> tuple[Tensor, Tensor]:
    """Masses that say what a mask says, and a slack that proves nothing."""
    b, s_q, h_q, _ = q.shape
    h_kv, max_pages = cache.kv_cache.size(2), cache.block_table.size(1)
    mask = sparsity.mask
    assert mask is not None
    seen = mask if isinstance(mask, Tensor) else mask(q, cache.cache_seqlens, max_pages)
    if seen.dim() != 3 or seen.dtype != torch.bool or seen.size(2) < max_pages:
        expected = f"bool [b or 1, h_kv or 1, at least {max_pages}]"
        raise ArgumentError("DynamicSparsity", "mask", expected, f"{seen.dtype} {list(seen.shape)}")
    heads = seen[:, :, :max_pages].expand(b, h_kv, max_pages).repeat_interleave(h_q // h_kv, dim=1)
    mass = torch.where(heads, 0.0, float("-inf"))[:, :, None].expand(b, h_q, s_q, max_pages)
    return mass, torch.full_like(mass, float("inf"))
