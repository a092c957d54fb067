"""Attention of DeepSeek-V4.1 with what stands around it (`flashmla_ops.nn.v41_attention`), in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla_ops.reference.sparse import Source, sparse_attention


def v41_attention(
    q: Tensor,  # [b, s_q, h_q, d]
    angles: Tensor,  # [b, s_q, d_r / 2]
    sources: list[Source],
    attn_sink: Tensor | None = None,  # [h_q]
    norm_eps: float | None = None,
    softmax_scale: float | None = None,
) -> Tensor:  # [b, s_q, h_q, d], before it is cast
    """Queries by the root of their mean square, if ``norm_eps`` is given; turned; attention; turned back."""
    q = q.double()
    if norm_eps is not None:
        q = q / (q.square().mean(-1, keepdim=True) + norm_eps).sqrt()
    turn = torch.polar(torch.ones_like(angles, dtype=torch.float64), angles.double())[:, :, None]
    out, _, _ = sparse_attention(_turned(q, turn), sources, q.size(-1), 0, softmax_scale, attn_sink)
    return _turned(out, turn.conj())


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """Each pair of neighbours among the last elements is a complex number, which ``turn`` multiplies."""
    d_r = 2 * turn.size(-1)
    pairs = torch.view_as_complex(x[..., -d_r:].unflatten(-1, (-1, 2)).contiguous())
    return torch.cat([x[..., :-d_r], torch.view_as_real(pairs * turn).flatten(-2)], dim=-1)
