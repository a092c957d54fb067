"""The gradients of attention, in float64: what a backward computes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashmla_ops.formats import NATIVE
from flashmla_ops.reference.attention import decode, visible
from flashmla_ops.reference.cache import gather_rows
from flashmla_ops.reference.sparse import Source


def attention_backward(
    dout: Tensor,  # [s_q, h_q, d_v]
    dlse: Tensor | None,  # [h_q, s_q]
    q: Tensor,  # [s_q, h_q, d_qk]
    key: Tensor,  # [n, h_kv, d_qk]
    value: Tensor,  # [n, h_kv, d_v]
    out: Tensor,  # [s_q, h_q, d_v]
    lse: Tensor,  # [h_q, s_q]
    shown: Tensor,  # [s_q, n] bool
    scale: float,
    softcap: float = 0.0,
    attn_sink: Tensor | None = None,  # [h_q]
) -> tuple[Tensor, Tensor, Tensor]:  # dq, dkey and dvalue, float64
    """Of the query tokens of one sequence that attend to rows.

    The softmax is p = exp(scores - lse), and the weights are w = share * p, where a sink leaves a share. Where dw is
    the gradient with respect to them, that with respect to a score is w * (dw - sum(w * dw)) + p * dlse, and
    sum(w * dw) is sum(out * dout). Capped scores, softcap * tanh(x), have the derivative 1 - tanh(x)^2. A query that
    saw no row (lse is infinite) has weights 0.
    """
    s_q, h_q, d_qk = q.shape
    h_kv = key.size(1)
    heads = (h_kv, h_q // h_kv)  # h: KV head, g: query head of its group
    groups, douts = (x.double().reshape(s_q, *heads, x.size(2)) for x in (q, dout))
    scores = torch.einsum("shgd,thd->hgst", groups, key.double()) * scale
    slope = torch.ones(())
    if softcap:
        slope = 1 - torch.tanh(scores / softcap).square()
        scores = softcap * torch.tanh(scores / softcap)
    rows = lse.double().reshape(*heads, s_q, 1)
    softmax = (scores - rows).exp().where(~rows.isinf(), 0.0)
    share = torch.ones_like(rows) if attn_sink is None else _share(lse, attn_sink).reshape(*heads, s_q, 1)
    weights = share * softmax
    delta = (out.double() * dout.double()).sum(-1).T.reshape(*heads, s_q, 1)
    dscores = weights * (torch.einsum("shgd,thd->hgst", douts, value.double()) - delta)
    if dlse is not None:
        dscores = dscores + softmax * dlse.double().reshape(*heads, s_q, 1)
    dscores = (dscores * slope).where(~rows.isinf(), 0.0)
    weights, dscores = weights.where(shown, 0.0), dscores.where(shown, 0.0)
    dq = torch.einsum("hgst,thd->shgd", dscores, key.double()).reshape(s_q, h_q, d_qk) * scale
    dkey = torch.einsum("hgst,shgd->thd", dscores, groups) * scale
    return dq, dkey, torch.einsum("hgst,shgd->thd", weights, douts)


def _share(lse: Tensor, attn_sink: Tensor) -> Tensor:  # both [h_q, s_q]
    """What a sink leaves of the weights; all of nothing where a query saw no row."""
    return torch.sigmoid(lse.double() - attn_sink.double()[:, None]).where(~lse.isinf(), 1.0)


def sink_backward(
    dout: Tensor,  # [s_q, h_q, d_v]
    out: Tensor,  # [s_q, h_q, d_v]
    lse: Tensor,  # [h_q, s_q]
    attn_sink: Tensor,  # [h_q]
) -> Tensor:  # [h_q], float64
    """The gradient of the logits of sinks, whose weights 1 - share have no values."""
    sums = (out.double() * dout.double()).sum(-1).T
    return ((_share(lse, attn_sink) - 1) * sums).where(~lse.isinf(), 0.0).sum(-1)


def prefill_backward(
    q: Tensor,  # [t_q, h_q, d_qk]
    k: Tensor,  # [t_k, h_kv, d_qk]
    v: Tensor,  # [t_k, h_kv, d_v]
    cu_seqlens_q: Tensor,  # [b + 1] int32 or int64
    cu_seqlens_k: Tensor,  # [b + 1] int32 or int64
    dout: Tensor,  # [t_q, h_q, d_v]
    dlse: Tensor | None,  # [h_q, t_q]
    out: Tensor,  # [t_q, h_q, d_v]
    lse: Tensor,  # [h_q, t_q]
    causal: bool = False,
    softmax_scale: float | None = None,
    attn_sink: Tensor | None = None,  # [h_q]
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # dq, dk, dv and dattn_sink, float64
    """The gradients of `prefill`: those of each sequence."""
    scale = q.size(2) ** -0.5 if softmax_scale is None else softmax_scale
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v))
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(bounds_q) - 1):
        s, t = slice(*bounds_q[i : i + 2]), slice(*bounds_k[i : i + 2])
        first, last, shown = seen_rows(s.stop - s.start, t.stop - t.start, causal, window, q.device)
        keys, part = slice(t.start + first, t.start + last), None if dlse is None else dlse[:, s]
        results = (dout[s], part, q[s], k[keys], v[keys], out[s], lse[:, s])
        dq[s], dk[keys], dv[keys] = attention_backward(*results, shown, scale, softcap, attn_sink)
    return dq, dk, dv, None if attn_sink is None else sink_backward(dout, out, lse, attn_sink)


def seen_rows(s_q: int, length: int, causal: bool, window: int, device: torch.device) -> tuple[int, int, Tensor]:
    """The rows [first, last) that any query of a sequence sees, and which of them each sees: [s_q, last - first]."""
    begins, ends = visible(s_q, length, causal, window)
    first, last = min(begins, default=0), max(ends, default=0)
    t = torch.arange(first, last, device=device)
    return first, last, (t >= t.new_tensor(begins)[:, None]) & (t < t.new_tensor(ends)[:, None])


def decode_backward(
    q: Tensor,  # [b, s_q, h_q, d_qk]
    kv_cache: Tensor,  # [n_pages, page_size, h_kv, d]
    k_cache: Tensor | None,  # [n_pages, page_size, h_kv, d_k]
    block_table: Tensor,  # [b, max_pages] int32
    cache_seqlens: Tensor,  # [b] int32
    dout: Tensor,  # [b, s_q, h_q, d_v]
    dlse: Tensor | None,  # [b, h_q, s_q]
    out: Tensor,  # [b, s_q, h_q, d_v]
    lse: Tensor,  # [b, h_q, s_q]
    d_v: int,
    qk_start: int = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    attn_sink: Tensor | None = None,  # [h_q]
    window: int = 0,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,  # [b + 1]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # dq, dkv_cache, dk_cache, dattn_sink, float64
    """The gradients of `decode`. A page that several sequences hold has the sum of theirs.

    With ``cu_seqlens_q``, q, dout and out are [t_q, h_q, d], and dlse and lse [h_q, t_q].
    """
    scale = q.size(-1) ** -0.5 if softmax_scale is None else softmax_scale
    dq, dkv = torch.zeros_like(q, dtype=torch.float64), torch.zeros_like(kv_cache, dtype=torch.float64)
    dk = None if k_cache is None else torch.zeros_like(k_cache, dtype=torch.float64)
    dsink = None if attn_sink is None else torch.zeros_like(attn_sink, dtype=torch.float64)
    in_kv = kv_cache.size(3) - qk_start
    bounds = None if cu_seqlens_q is None else cu_seqlens_q.tolist()
    for i, n in enumerate(cache_seqlens.tolist()):
        own: Any = i if bounds is None else slice(bounds[i], bounds[i + 1])
        own_lse = i if bounds is None else (slice(None), own)
        one, result, gradient, row_lse = q[own], out[own], dout[own], lse[own_lse]
        first, last, shown = seen_rows(len(one), n, causal, window, q.device)
        named: dict[str, Any] = {"op": "decode_backward", "sequence": i}
        rows = gather_rows(kv_cache, block_table[i], first, last, **named)
        key = rows[..., qk_start:]
        if k_cache is not None:
            key = torch.cat([key, gather_rows(k_cache, block_table[i], first, last, **named)], dim=-1)
        row_dlse = None if dlse is None else dlse[own_lse]
        results = (gradient, row_dlse, one, key, rows[..., :d_v], result, row_lse)
        dq[own], dkey, dvalue = attention_backward(*results, shown, scale, softcap, attn_sink)
        positions = torch.arange(first, last, device=q.device)
        where = (block_table[i].long()[positions // kv_cache.size(1)], positions % kv_cache.size(1))
        dkv[..., :d_v].index_put_(where, dvalue, accumulate=True)
        dkv[..., qk_start:].index_put_(where, dkey[..., :in_kv], accumulate=True)
        if dk is not None:
            dk.index_put_(where, dkey[..., in_kv:], accumulate=True)
        if attn_sink is not None and dsink is not None:
            dsink += sink_backward(gradient, result, row_lse, attn_sink)
    return dq, dkv, dk, dsink


def decode_up_backward(
    weight: Tensor,  # [h_q, d_v, d_up]
    dout: Tensor,  # [b, s_q, h_q, d_up]
    dlse: Tensor | None,  # [b, h_q, s_q]
    **call: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:  # those of `decode_backward` and dweight, float64
    """The gradients of `decode_up`, whose other arguments are ``call``: what was attended to is computed again."""
    attended, lse = decode(**call)
    dattended = torch.einsum("...hu,hvu->...hv", dout.double(), weight.double())
    dweight = torch.einsum("thv,thu->hvu", attended.flatten(0, -3), dout.double().flatten(0, -3))
    return *decode_backward(**call, dout=dattended, dlse=dlse, out=attended, lse=lse), dweight


def sparse_backward(
    q: Tensor,  # [b, s_q, h_q, d_qk]
    sources: list[Source],
    dout: Tensor,  # [b, s_q, h_q, d_v]
    dlse: Tensor | None,  # [b, h_q, s_q]
    out: Tensor,  # [b, s_q, h_q, d_v]
    lse: Tensor,  # [b, h_q, s_q]
    d_v: int,
    qk_start: int = 0,
    softmax_scale: float | None = None,
    attn_sink: Tensor | None = None,  # [h_q]
) -> tuple[Tensor, list[RowGradients], Tensor | None]:  # dq, those of each source's caches and dattn_sink, float64
    """The gradients of `sparse_attention`. A row that is named twice counts twice."""
    scale = q.size(3) ** -0.5 if softmax_scale is None else softmax_scale
    dq, drows = torch.zeros_like(q, dtype=torch.float64), [RowGradients.zeros(source) for source in sources]
    dsink = None if attn_sink is None else torch.zeros_like(attn_sink, dtype=torch.float64)
    h_kv = sources[0].kv_cache.size(2)
    for i, s in itertools.product(range(q.size(0)), range(q.size(1))):
        for head, heads in enumerate(torch.arange(q.size(2)).chunk(h_kv) if q.size(2) else ()):
            rows = [source.rows(i, s, head, d_v, qk_start) for source in sources]
            values, keys = (torch.cat(parts)[:, None] for parts in zip(*rows, strict=True))
            query, result, gradient = (x[i, s, None, heads] for x in (q, out, dout))
            row_lse, row_dlse = lse[i, heads, s, None], None if dlse is None else dlse[i, heads, s, None]
            sink = None if attn_sink is None else attn_sink[heads]
            shown = torch.ones(1, len(keys), dtype=torch.bool, device=q.device)
            results = (gradient, row_dlse, query, keys, values, result, row_lse)
            found, dkeys, dvalues = attention_backward(*results, shown, scale, attn_sink=sink)
            dq[i, s, heads] = found[0]
            counts = [len(values) for values, _ in rows]
            parts = zip(sources, drows, dkeys[:, 0].split(counts), dvalues[:, 0].split(counts), strict=True)
            for source, gradients, dkey, dvalue in parts:
                gradients.add(source.where(i, s, head), head, qk_start, dkey, dvalue)
            if dsink is not None and sink is not None:
                dsink[heads] += sink_backward(gradient, result, row_lse, sink)
    return dq, drows, dsink


@dataclass(frozen=True)
class RowGradients:
    """The gradients of a source's caches; rows of bytes have none."""

    dkv: Tensor | None  # [n_pages, page_size, h_kv, d], float64
    dk: Tensor | None  # [n_pages, page_size, h_kv, d_k], float64

    @classmethod
    def zeros(cls, source: Source) -> RowGradients:
        native, k_cache = source.row_format == NATIVE, source.k_cache
        dkv = torch.zeros_like(source.kv_cache, dtype=torch.float64) if native else None
        return cls(dkv, None if k_cache is None else torch.zeros_like(k_cache, dtype=torch.float64))

    def add(self, where: tuple[Tensor, Tensor], head: int, qk_start: int, dkey: Tensor, dvalue: Tensor) -> None:
        """To rows ``where`` of a KV head: dkey [n, d_qk] and dvalue [n, d_v]."""
        if self.dkv is None:
            return
        dkv, in_kv = self.dkv[:, :, head], self.dkv.size(3) - qk_start
        dkv[..., : dvalue.size(1)].index_put_(where, dvalue, accumulate=True)
        dkv[..., qk_start:].index_put_(where, dkey[:, :in_kv], accumulate=True)
        if self.dk is not None:
            self.dk[:, :, head].index_put_(where, dkey[:, in_kv:], accumulate=True)


def sparse_prefill_backward(
    q: Tensor,  # [s_q, h_q, d_qk]
    kv: Tensor,  # [s_kv, h_kv, d_qk]
    indices: Tensor,  # [s_q, h_kv, topk] int32
    d_v: int,
    dout: Tensor,  # [s_q, h_q, d_v]
    dlse: Tensor | None,  # [s_q, h_q]
    out: Tensor,  # [s_q, h_q, d_v]
    lse: Tensor,  # [s_q, h_q]
    softmax_scale: float | None = None,
    attn_sink: Tensor | None = None,  # [h_q]
    topk_length: Tensor | None = None,  # [s_q] int32
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # dq, dkv, dattn_sink, float64
    """The gradients of sparse attention over rows beside the queries."""
    source, transposed = Source.beside(kv, indices, topk_length), None if dlse is None else dlse.T[None]
    results = (dout[None], transposed, out[None], lse.T[None])
    dq, [rows], dsink = sparse_backward(q[None], [source], *results, d_v, 0, softmax_scale, attn_sink)
    return dq[0], None if rows.dkv is None else rows.dkv[0], dsink
