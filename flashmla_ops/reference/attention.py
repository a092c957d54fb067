"""Attention over a paged cache, and the merge of partial results, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashmla_ops.formats import NATIVE
from flashmla_ops.reference.cache import gather_rows


def decode(
    q: Tensor,  # [b, s_q, h_q, d_qk]
    kv_cache: Tensor,  # [n_pages, page_size, h_kv, d]
    k_cache: Tensor | None,  # [n_pages, page_size, h_kv, d_k]
    block_table: Tensor,  # [b, max_pages] int32
    cache_seqlens: Tensor,  # [b] int32
    d_v: int,
    qk_start: int = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    attn_sink: Tensor | None = None,  # [h_q] float32
    row_format: str = NATIVE,
    *,
    op: str = "decode",
) -> tuple[Tensor, Tensor]:  # out [b, s_q, h_q, d_v], lse [b, h_q, s_q], float64
    """softmax(scale * q k^T) v over each sequence's rows; the value and the key are slices of the same row.

    With ``causal``, query s of a sequence sees the keys before ``length - s_q + s + 1`` (bottom-right alignment).
    A query that sees no key has out 0 and lse +inf. ``attn_sink`` scales out by exp(lse) / (exp(lse) + exp(sink)).
    ``op`` names itself in the error for a page that the cache does not have.
    """
    b, s_q, h_q, d_qk = q.shape
    scale = d_qk**-0.5 if softmax_scale is None else softmax_scale
    out = q.new_zeros((b, s_q, h_q, d_v), dtype=torch.float64)
    lse = q.new_full((b, h_q, s_q), math.inf, dtype=torch.float64)
    for i, length in enumerate(cache_seqlens.tolist()):
        if length == 0:
            continue
        rows = gather_rows(kv_cache, block_table[i], length, row_format=row_format, op=op, sequence=i)  # [t, h_kv, d]
        value, key = rows[..., :d_v], rows[..., qk_start:]
        if k_cache is not None:
            key = torch.cat([key, gather_rows(k_cache, block_table[i], length, op=op, sequence=i)], dim=-1)
        heads = (rows.size(1), h_q // rows.size(1))  # h: KV head, g: query head of its group
        groups = q[i].double().reshape(s_q, *heads, d_qk)
        scores = torch.einsum("shgd,thd->hgst", groups, key.double()).reshape(h_q, s_q, length) * scale
        if causal:
            last = torch.arange(s_q, device=q.device) + length - s_q
            scores.masked_fill_(torch.arange(length, device=q.device) > last[:, None], -math.inf)
        attends = scores.max(dim=-1).values > -math.inf  # [h, s]; False for NaN scores too, which stay NaN below
        seen = attends | scores.isnan().any(dim=-1)
        row_lse = scores.logsumexp(dim=-1)
        weights = (scores - row_lse[..., None]).exp().where(seen[..., None], 0.0)
        lse[i] = row_lse.where(seen, math.inf)
        weights = weights.reshape(*heads, s_q, length)
        out[i] = torch.einsum("hgst,thd->shgd", weights, value.double()).reshape(s_q, h_q, d_v)
    if attn_sink is not None:
        share = torch.sigmoid(lse - attn_sink.double()[:, None])
        share = share.where(lse != math.inf, 0.0)  # nothing was seen: out stays 0, whatever the sink
        out *= share.transpose(1, 2)[..., None]
    return out, lse


def decode_up(*cache: Any, weight: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`decode`, then the product of each head's result with the head's weight (MLA: W_UV).

    ``weight`` [h_q, d_v, d_up]; out [b, s_q, h_q, d_up]. All else is as `decode` takes and returns it.
    """
    out, lse = decode(*cache, **options, op="decode_up")
    return torch.einsum("bshv,hvu->bshu", out, weight.double()), lse


def prefill(
    q: Tensor,  # [t_q, h_q, d_qk]
    k: Tensor,  # [t_k, h_kv, d_qk]
    v: Tensor,  # [t_k, h_kv, d_v]
    cu_seqlens_q: Tensor,  # [b + 1] int32 or int64
    cu_seqlens_k: Tensor,  # [b + 1] int32 or int64
    causal: bool = False,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # out [t_q, h_q, d_v], lse [h_q, t_q], float64
    """Each sequence is a `decode` whose one page holds V as its rows' values and K as their keys."""
    t_q, h_q, _ = q.shape
    out = q.new_zeros((t_q, h_q, v.size(2)), dtype=torch.float64)
    lse = q.new_full((h_q, t_q), math.inf, dtype=torch.float64)
    first_page = torch.zeros(1, 1, dtype=torch.int32, device=q.device)
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(bounds_q) - 1):
        queries, keys = slice(*bounds_q[i : i + 2]), slice(*bounds_k[i : i + 2])
        length = torch.tensor([bounds_k[i + 1] - bounds_k[i]], dtype=torch.int32, device=q.device)
        if length == 0 or queries.start == queries.stop:
            continue
        values, d_v = v[None, keys], v.size(2)
        part = decode(q[None, queries], values, k[None, keys], first_page, length, d_v, d_v, softmax_scale, causal)
        out[queries], lse[:, queries] = part[0][0], part[1][0]
    return out, lse


def attend_masked(
    q: Tensor,  # [b, s_q, h_q, d_qk]
    kv_cache: Tensor,  # [b, s_kv, h_kv, d]
    k_cache: Tensor | None,  # [b, s_kv, h_kv, d_k]
    mask: Tensor,  # [b, h_q, s_q, s_kv], each size or 1; bool, or added to the scores
    d_v: int,
    qk_start: int = 0,
    softmax_scale: float | None = None,
    nan_where_empty: bool = False,
) -> Tensor:  # [b, s_q, h_q, d_v], float64
    """softmax(scale * q k^T + mask) v; a bool mask adds -inf where it is False.

    A query whose keys are all under -inf has out 0, as in SDPA, or NaN, as a softmax has it. Scores are added to a mask
    in float32: of a score that meets the least number nothing is left, so a query that sees no key but those attends to
    all of them alike.
    """
    keys = kv_cache[..., qk_start:] if k_cache is None else torch.cat([kv_cache[..., qk_start:], k_cache], dim=-1)
    group = q.size(2) // keys.size(2)
    k, v = (x.double().repeat_interleave(group, dim=2) for x in (keys, kv_cache[..., :d_v]))
    scale = q.size(3) ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bshd,bthd->bhst", q.double(), k) * scale
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    else:
        scores = (scores + mask).where(mask == 0, (scores.float() + mask).double())
    empty = (scores == -math.inf).all(dim=-1, keepdim=True)
    weights = torch.softmax(scores, dim=-1).masked_fill(empty, math.nan if nan_where_empty else 0.0)
    return torch.einsum("bhst,bthd->bshd", weights, v)


def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over a union of disjoint key sets, from the results over each: out [..., s, h, d], lse [..., h, s].

    A part whose lse is infinite (either sign) saw no key and has no weight.
    """
    parts = torch.stack([lse.double() for lse in lses])
    parts = parts.masked_fill(parts.isinf(), -math.inf)
    lse = parts.logsumexp(dim=0)
    empty = lse == -math.inf
    weights = (parts - lse.masked_fill(empty, 0.0)).exp()
    scaled = [
        # A part without weight may hold anything, NaN included: select, do not multiply.
        torch.where(w[..., None] > 0, out.double() * w[..., None], 0.0).where(~w[..., None].isnan(), math.nan)
        for out, w in zip(outs, weights.transpose(-1, -2), strict=True)
    ]
    return torch.stack(scaled).sum(dim=0), lse.masked_fill(empty, math.inf)
