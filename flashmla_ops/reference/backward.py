"""The gradients of attention, in float64: what a backward computes."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_backward(
    dout: Tensor,  # [s_q, h_q, d_v]
    dlse: Tensor | None,  # [h_q, s_q]
    q: Tensor,  # [s_q, h_q, d_qk]
    key: Tensor,  # [n, h_kv, d_qk]
    value: Tensor,  # [n, h_kv, d_v]
    out: Tensor,  # [s_q, h_q, d_v]
    lse: Tensor,  # [h_q, s_q]
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # dq, dkey and dvalue, float64
    """Of the query tokens of one sequence that attend to its rows, causal bottom-right.

    The weights are p = exp(scores - lse). Where dp is the gradient with respect to them, that with respect to a score
    is p * (dp - sum(p * dp) + dlse), and sum(p * dp) = sum(out * dout). A query that saw no row (lse is infinite) has
    weights 0.
    """
    s_q, h_q, d_qk = q.shape
    n, h_kv, _ = key.shape
    heads = (h_kv, h_q // h_kv)  # h: KV head, g: query head of its group
    groups, douts = (x.double().reshape(s_q, *heads, x.size(2)) for x in (q, dout))
    scores = torch.einsum("shgd,thd->hgst", groups, key.double()) * scale
    rows = lse.double().reshape(*heads, s_q, 1)
    weights = (scores - rows).exp().where(~rows.isinf(), 0.0)
    delta = (out.double() * dout.double()).sum(-1).T
    if dlse is not None:
        delta = delta - dlse.double()
    dscores = weights * (torch.einsum("shgd,thd->hgst", douts, value.double()) - delta.reshape(*heads, s_q, 1))
    dscores = dscores.where(~rows.isinf(), 0.0)
    if causal:
        last = torch.arange(s_q, device=q.device) + n - s_q
        hidden = torch.arange(n, device=q.device) > last[:, None]
        weights, dscores = weights.masked_fill(hidden, 0.0), dscores.masked_fill(hidden, 0.0)
    dq = torch.einsum("hgst,thd->shgd", dscores, key.double()).reshape(s_q, h_q, d_qk) * scale
    dkey = torch.einsum("hgst,shgd->thd", dscores, groups) * scale
    return dq, dkey, torch.einsum("hgst,shgd->thd", weights, douts)


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
) -> tuple[Tensor, Tensor, Tensor]:  # dq, dk and dv, float64
    """The gradients of `prefill`: those of each sequence."""
    scale = q.size(2) ** -0.5 if softmax_scale is None else softmax_scale
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v))
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(bounds_q) - 1):
        s, t = slice(*bounds_q[i : i + 2]), slice(*bounds_k[i : i + 2])
        part = None if dlse is None else dlse[:, s]
        dq[s], dk[t], dv[t] = attention_backward(dout[s], part, q[s], k[t], v[t], out[s], lse[:, s], causal, scale)
    return dq, dk, dv
