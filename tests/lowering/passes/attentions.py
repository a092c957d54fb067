"""Ways to write attention that are all the same to the passes. Each is ``f(q, k, v)`` on the tensors of `inputs`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

B, H, H_KV, D, D_V = 2, 4, 2, 16, 16
SCALE = 0.3

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(
    s_q: int, s_kv: int, h_kv: int = H, d_v: int = D_V, dtype: torch.dtype = torch.float32, seed: int = 0, b: int = B
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, h, s, d, generator=g) for h, s, d in ((H, s_q, D), (h_kv, s_kv, D), (h_kv, s_kv, d_v)))
    return (2 * q).to(dtype), k.to(dtype), v.to(dtype)


def positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The positions of queries, as a column, and of keys, as a row."""
    return torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None, :]


def bottom_right(q: Tensor, k: Tensor) -> Tensor:
    i, j = positions(q, k)
    return j <= i + (k.shape[-2] - q.shape[-2])


def scores(q: Tensor, k: Tensor, scale: float = SCALE) -> Tensor:
    return torch.matmul(q, k.transpose(-1, -2)) * scale


def repeat_kv(x: Tensor, n: int) -> Tensor:
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention as transformers writes it."""
    weights = scores(q, k)
    if mask is not None:
        weights = weights + mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.1, training=False), v)


def _additive(q: Tensor, k: Tensor, least: float) -> Tensor:
    zeros = torch.zeros((), dtype=q.dtype)
    return torch.where(bottom_right(q, k)[None, None], zeros, torch.full((), least, dtype=q.dtype))


def _triu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((q.shape[-2], k.shape[-2]), -math.inf).triu(1 + k.shape[-2] - q.shape[-2])
    return eager(q, k, v, mask.to(q.dtype))


def _masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k).masked_fill(~bottom_right(q, k), -math.inf), -1) @ v


def _einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bhij,bhjx->bihx", weights, v)


def _keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((k @ q.transpose(-1, -2) * SCALE).transpose(-1, -2), -1) @ v


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, s, d = q.shape
    grouped = q.view(b, k.shape[1], h // k.shape[1], s, d)
    weights = torch.softmax(grouped @ k[:, :, None].transpose(-1, -2) * SCALE, -1)
    return (weights @ v[:, :, None]).reshape(b, h, s, -1)


def sdpa(**options: Any) -> Function:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


#: Attention with as many KV heads as query heads.
SAME_HEADS: dict[str, Function] = {
    "sdpa": sdpa(),
    "sdpa-scale": sdpa(scale=SCALE),
    "sdpa-mask-bool": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bottom_right(q, k)),
    "sdpa-mask-additive": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=_additive(q, k, -math.inf), scale=SCALE
    ),
    "eager": eager,
    "eager-mask-least": lambda q, k, v: eager(q, k, v, _additive(q, k, torch.finfo(q.dtype).min)),
    "eager-mask-triu": _triu,
    "masked-fill": _masked_fill,
    "scale-of-q": lambda q, k, v: torch.softmax((q * SCALE) @ k.transpose(-1, -2), -1) @ v,
    "scale-of-k": lambda q, k, v: torch.softmax(q @ (k * SCALE).transpose(-1, -2), -1) @ v,
    "scale-divides": lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) / 4.0, -1) @ v,
    "no-scale": lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2), -1) @ v,
    "einsum": _einsum,
    "keys-first": _keys_first,
    "folded-heads": lambda q, k, v: torch.bmm(
        torch.softmax(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)) * SCALE, -1), v.flatten(0, 1)
    ),
    "token-major": lambda q, k, v: eager(q, k.transpose(1, 2).clone().transpose(1, 2), v).transpose(1, 2).flatten(2),
    "every-other-key": lambda q, k, v: eager(q, k[:, :, ::2], v[:, :, ::2]),
    "prefix": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=positions(q, k)[1] < k.shape[-2] - 1),
    "slice": lambda q, k, v: eager(q, k[:, :, 1:], v[:, :, 1:]),
    "one-head-of-many": lambda q, k, v: eager(q[:, 1:2], k[:, 1:2], v[:, 1:2]),
    "one-sequence": lambda q, k, v: eager(q[:1], k[:1], v[:1]),
    "keys-of-one-sequence": lambda q, k, v: eager(q, k[:1].expand_as(k), v[:1].expand_as(v)),
}

#: Attention with fewer KV heads.
FEWER_HEADS: dict[str, Function] = {
    "gqa-sdpa": sdpa(enable_gqa=True),
    "gqa-mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bottom_right(q, k), enable_gqa=True),
    "gqa-repeat": lambda q, k, v: eager(q, repeat_kv(k, H // H_KV), repeat_kv(v, H // H_KV)),
    "gqa-interleave": lambda q, k, v: sdpa(scale=SCALE)(q, *(x.repeat_interleave(H // H_KV, 1) for x in (k, v))),
    "gqa-grouped": _grouped,
    "heads-tiled": lambda q, k, v: eager(
        q, *(x[:, None].expand(-1, H // H_KV, -1, -1, -1).reshape(x.shape[0], H, *x.shape[2:]) for x in (k, v))
    ),
    "mqa": lambda q, k, v: eager(q, k[:, :1].expand(-1, H, -1, -1), v[:, :1].expand(-1, H, -1, -1)),
    "mqa-broadcast": lambda q, k, v: eager(q, k[:, :1], v[:, :1]),
}

#: Attention that is itself only with at least as many queries as keys, or the other way round.
SQUARE: dict[str, Function] = {"sdpa-causal": sdpa(is_causal=True)}
