"""Attention of each query token over rows that indices name, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flashmla_ops.formats import NATIVE
from flashmla_ops.reference.cache import read_rows


@dataclass(frozen=True)
class Source:
    """Rows of one cache, named by their slots: page * page_size + offset. Any other index names nothing."""

    kv_cache: Tensor  # [n_pages, page_size, h_kv, d]
    k_cache: Tensor | None  # [n_pages, page_size, h_kv, d_k]
    indices: Tensor  # [b, s_q, h_kv, topk] int32
    topk_length: Tensor | None  # [b, s_q] int32: so many indices count, the first ones
    row_format: str = NATIVE

    @classmethod
    def beside(
        cls,
        kv: Tensor,  # [s_kv, h_kv, d]
        indices: Tensor,  # [s_q, h_kv, topk] int32
        topk_length: Tensor | None,  # [s_q] int32
        row_format: str = NATIVE,
    ) -> Source:
        """Rows beside the queries of one sequence: a cache of one page."""
        lengths = None if topk_length is None else topk_length[None]
        return cls(kv[None], None, indices[None], lengths, row_format)

    def where(self, i: int, s: int, head: int) -> tuple[Tensor, Tensor]:
        """Pages [n] and places in them [n] of the rows of query token s of sequence i, for one KV head."""
        n_pages, page_size = self.kv_cache.shape[:2]
        chosen = self.indices[i, s, head].long()
        if self.topk_length is not None:
            chosen = chosen[: int(self.topk_length[i, s])]
        slots = chosen[(chosen >= 0) & (chosen < n_pages * page_size)]
        return slots // max(page_size, 1), slots % max(page_size, 1)

    def rows(self, i: int, s: int, head: int, d_v: int, qk_start: int) -> tuple[Tensor, Tensor]:
        """Their values [n, d_v] and keys [n, d_qk]."""
        where = self.where(i, s, head)
        rows = read_rows(self.kv_cache, *where, self.row_format)[:, head].double()
        key = rows[:, qk_start:]
        if self.k_cache is not None:
            key = torch.cat([key, read_rows(self.k_cache, *where)[:, head].double()], dim=-1)
        return rows[:, :d_v], key


def sparse_attention(
    q: Tensor,  # [b, s_q, h_q, d_qk]
    sources: list[Source],
    d_v: int,
    qk_start: int = 0,
    softmax_scale: float | None = None,
    attn_sink: Tensor | None = None,  # [h_q] float32
) -> tuple[Tensor, Tensor, Tensor]:  # out [b, s_q, h_q, d_v], max_logits and lse [b, s_q, h_q], float64
    """One softmax of each query over the rows of all sources; the value and the key are slices of the same row.

    A row that is named twice counts twice. A query without rows has out 0, max_logits -inf and lse +inf. ``attn_sink``
    multiplies out by exp(lse) / (exp(lse) + exp(sink)), and nothing else.
    """
    b, s_q, h_q, d_qk = q.shape
    h_kv = sources[0].kv_cache.size(2)
    scale = d_qk**-0.5 if softmax_scale is None else softmax_scale
    out = q.new_zeros((b, s_q, h_q, d_v), dtype=torch.float64)
    max_logits = q.new_full((b, s_q, h_q), -math.inf, dtype=torch.float64)
    lse = q.new_full((b, s_q, h_q), math.inf, dtype=torch.float64)
    for i in range(b):
        for s in range(s_q):
            for head, heads in enumerate(torch.arange(h_q).chunk(h_kv) if h_q else ()):
                rows = [source.rows(i, s, head, d_v, qk_start) for source in sources]
                values, keys = (torch.cat(parts) for parts in zip(*rows, strict=True))
                if len(keys) == 0:
                    continue
                scores = q[i, s, heads].double() @ keys.T * scale
                seen = scores.amax(dim=-1) != -math.inf  # or every weight is 0, as where there is no row
                max_logits[i, s, heads] = scores.amax(dim=-1)
                lse[i, s, heads] = scores.logsumexp(dim=-1).where(seen, math.inf)
                out[i, s, heads] = torch.softmax(scores, dim=-1).where(seen[:, None], 0.0) @ values
    if attn_sink is not None:
        share = torch.sigmoid(lse - attn_sink.double()).where(lse != math.inf, 0.0)
        out *= share[..., None]
    return out, max_logits, lse
