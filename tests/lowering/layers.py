"""Decode layers in plain torch, from the norm to the residual: absorbed MLA, and grouped-query attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

B, CAPACITY, HIDDEN, H, D_C, D_R, D_NOPE, D_V = 2, 512, 128, 4, 64, 16, 32, 32
H_KV, D = 2, 32
Weights = tuple[Tensor, ...]


def _draw(*shapes: tuple[int, ...]) -> Weights:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def mla_inputs() -> tuple[Tensor, ...]:
    return (
        *_draw((B, 1, HIDDEN), (B, CAPACITY, D_C + D_R)),
        torch.tensor([20]),
        *_draw(
            (D_R // 2,),
            (HIDDEN,),
            (D_C,),
            (H * (D_NOPE + D_R), HIDDEN),
            (D_C + D_R, HIDDEN),
            (H, D_NOPE, D_C),
            (H, D_C, D_V),
            (HIDDEN, H * D_V),
        ),
    )


def mla_layer(
    x: Tensor,  # [b, 1, hidden]
    cache: Tensor,  # [b, capacity, d_c + d_r]
    position: Tensor,  # [1]
    angles: Tensor,
    norm: Tensor,
    latent_norm: Tensor,
    w_q: Tensor,
    w_kv: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    w_o: Tensor,
) -> Tensor:
    """Absorbed attention, as who has no operator for it writes it."""
    h = rms_norm(x, norm)
    cos, sin = (angles * position).cos(), (angles * position).sin()
    latent, k_rope = F.linear(h, w_kv).split([D_C, D_R], dim=-1)
    rows = torch.cat([rms_norm(latent, latent_norm), rotated(k_rope, cos, sin)], dim=-1)
    cache.index_copy_(1, position, rows)
    nope, rope = F.linear(h, w_q).view(B, 1, H, -1).transpose(1, 2).split([D_NOPE, D_R], dim=-1)
    absorbed = torch.bmm(nope[:, :, 0].transpose(0, 1), w_uk).transpose(0, 1)[:, :, None]
    q = torch.cat([absorbed, rotated(rope, cos, sin)], dim=-1)
    scores = q @ cache[:, None].transpose(-1, -2) * (D_NOPE + D_R) ** -0.5
    scores = scores.masked_fill(torch.arange(CAPACITY) > position, -torch.inf)
    out = torch.softmax(scores, dim=-1) @ cache[:, None, :, :D_C]
    values = torch.bmm(out[:, :, 0].transpose(0, 1), w_uv).transpose(0, 1).reshape(B, 1, H * D_V)
    return x + F.linear(values, w_o)


def gqa_inputs() -> tuple[Tensor, ...]:
    return (
        *_draw((B, 1, HIDDEN), (B, H_KV, CAPACITY, D), (B, H_KV, CAPACITY, D)),
        torch.tensor([20]),
        *_draw((D // 2,), (HIDDEN,), (H * D, HIDDEN), (H_KV * D, HIDDEN), (H_KV * D, HIDDEN), (HIDDEN, H * D)),
    )


def gqa_layer(
    x: Tensor,
    keys: Tensor,  # [b, h_kv, capacity, d]
    values: Tensor,
    position: Tensor,
    angles: Tensor,
    norm: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
) -> Tensor:
    h = rms_norm(x, norm)
    cos, sin = (angles * position).cos(), (angles * position).sin()
    q, k, v = (F.linear(h, w).view(B, 1, -1, D).transpose(1, 2) for w in (w_q, w_k, w_v))
    keys.index_copy_(2, position, rotated(k, cos, sin))
    values.index_copy_(2, position, v)
    seen = torch.arange(CAPACITY)[None] <= position
    out = F.scaled_dot_product_attention(rotated(q, cos, sin), keys, values, attn_mask=seen, enable_gqa=True)
    return x + F.linear(out.transpose(1, 2).flatten(2), w_o)
