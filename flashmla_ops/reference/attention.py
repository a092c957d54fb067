"""Attention over a paged cache, and the merge of partial results, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flashmla_ops.formats import NATIVE
from flashmla_ops.reference.cache import gather_rows


def decode(
    q: Tensor,  # [b, s_q, h_q, d_qk], or [t_q, h_q, d_qk] with cu_seqlens_q
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
    window: int = 0,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,  # [b + 1]
    *,
    op: str = "decode",
) -> tuple[Tensor, Tensor]:  # out [b, s_q, h_q, d_v] and lse [b, h_q, s_q], or [t_q, h_q, d_v] and [h_q, t_q], float64
    """softmax(scale * q k^T) v over each sequence's rows; the value and the key are slices of the same row.

    Query s of a sequence sees the rows `visible` to it. A query that sees none has out 0 and lse +inf. ``attn_sink``
    scales out by exp(lse) / (exp(lse) + exp(sink)). ``op`` names itself in the error for a page that the cache does
    not have.
    """
    queries = list(q) if cu_seqlens_q is None else [q[slice(*ends)] for ends in pairwise(cu_seqlens_q.tolist())]
    outs, lses = [], []
    for i, (one, length) in enumerate(zip(queries, cache_seqlens.tolist(), strict=True)):
        begins, ends = visible(len(one), length, causal, window)
        first, last = min(begins, default=0), max(ends, default=0)  # rows that no query sees are not looked at
        rows = gather_rows(kv_cache, block_table[i], first, last, row_format=row_format, op=op, sequence=i)
        value, key = rows[..., :d_v], rows[..., qk_start:]
        if k_cache is not None:
            key = torch.cat([key, gather_rows(k_cache, block_table[i], first, last, op=op, sequence=i)], dim=-1)
        t = torch.arange(first, last, device=q.device)
        shown = (t >= t.new_tensor(begins)[:, None]) & (t < t.new_tensor(ends)[:, None])
        out, lse = attend(one, key, value, shown, softmax_scale, softcap)
        outs.append(out)
        lses.append(lse)
    if cu_seqlens_q is None:
        out, lse = torch.stack(outs) if outs else q.new_zeros(0), torch.stack(lses) if lses else q.new_zeros(0)
        out, lse = out.reshape(*q.shape[:-1], d_v).double(), lse.reshape(q.size(0), q.size(2), q.size(1)).double()
    else:
        out = torch.cat(outs) if outs else q.new_zeros((0, q.size(1), d_v), dtype=torch.float64)
        lse = torch.cat(lses, dim=-1) if lses else q.new_zeros((q.size(1), 0), dtype=torch.float64)
    if attn_sink is not None:
        share = torch.sigmoid(lse - attn_sink.double()[:, None])
        share = share.where(lse != math.inf, 0.0)  # nothing was seen: out stays 0, whatever the sink
        out *= share.transpose(-2, -1)[..., None]
    return out, lse


def visible(s_q: int, length: int, causal: bool, window: int) -> tuple[list[int], list[int]]:
    """Where the rows that each of ``s_q`` queries sees begin and end, of a sequence of ``length`` rows.

    With ``causal``, query s sees the rows before ``length - s_q + s + 1`` (bottom-right alignment). With ``window`` it
    sees the last ``window`` of those.
    """
    ends = [max(length - s_q + s + 1, 0) if causal else length for s in range(s_q)]
    return [max(end - window, 0) if window else 0 for end in ends], ends


def attend(
    q: Tensor,  # [s_q, h_q, d_qk]
    key: Tensor,  # [t, h_kv, d_qk]
    value: Tensor,  # [t, h_kv, d_v]
    shown: Tensor,  # [s_q, t] bool
    softmax_scale: float | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # [s_q, h_q, d_v], [h_q, s_q], float64
    """Attention of the queries of one sequence."""
    (s_q, h_q, d_qk), h_kv = q.shape, key.size(1)
    groups = q.double().reshape(s_q, h_kv, h_q // h_kv, d_qk)
    scores = torch.einsum("shgd,thd->hgst", groups, key.double()).reshape(h_q, s_q, len(key))
    scores = scores * (d_qk**-0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~shown, -math.inf)
    if len(key) == 0:
        return q.new_zeros((s_q, h_q, value.size(2)), dtype=torch.float64), scores.sum(dim=-1) + math.inf
    # NaN scores are not seen as empty: they stay NaN below.
    seen = (scores.amax(dim=-1) > -math.inf) | scores.isnan().any(dim=-1)  # [h, s]
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse[..., None]).exp().where(seen[..., None], 0.0)
    out = torch.einsum("hgst,thd->shgd", weights.unflatten(0, (h_kv, h_q // h_kv)), value.double())
    return out.reshape(s_q, h_q, value.size(2)), lse.where(seen, math.inf)


def decode_up(*cache: Any, weight: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`decode`, then the product of each head's result with the head's weight (MLA: W_UV).

    ``weight`` [h_q, d_v, d_up]; out [b, s_q, h_q, d_up], or [t_q, h_q, d_up]. All else is as of `decode`.
    """
    out, lse = decode(*cache, **options, op="decode_up")
    return torch.einsum("...hv,hvu->...hu", out, weight.double()), lse


def prefill(
    q: Tensor,  # [t_q, h_q, d_qk]
    k: Tensor,  # [t_k, h_kv, d_qk]
    v: Tensor,  # [t_k, h_kv, d_v]
    cu_seqlens_q: Tensor,  # [b + 1] int32 or int64
    cu_seqlens_k: Tensor,  # [b + 1] int32 or int64
    causal: bool = False,
    softmax_scale: float | None = None,
    attn_sink: Tensor | None = None,  # [h_q] float32
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # out [t_q, h_q, d_v], lse [h_q, t_q], float64
    """A `decode` over pages of one token, where V holds the values of the rows and K their keys."""
    bounds = cu_seqlens_k.tolist()
    lengths = [end - begin for begin, end in pairwise(bounds)]
    table = torch.zeros(len(lengths), max(lengths, default=0), dtype=torch.int32, device=q.device)
    for i, length in enumerate(lengths):
        table[i, :length] = torch.arange(bounds[i], bounds[i] + length)
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=q.device)
    pages, d_v = (v[:, None], k[:, None], table, seqlens), v.size(2)
    return decode(
        *(q, *pages, d_v, d_v, softmax_scale, causal, attn_sink),
        window=window,
        softcap=softcap,
        cu_seqlens_q=cu_seqlens_q,
    )


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
