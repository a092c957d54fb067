"""Multi-head Latent Attention with its latents expanded to heads, as models write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

B, H, D_C, D_NOPE, D_R, D_V, SCALE = 2, 4, 32, 16, 8, 24, 0.2

Tensors = tuple[Tensor, ...]


def inputs(s_q: int, s_kv: int, dtype: torch.dtype = torch.float32, seed: int = 0, b: int = B) -> Tensors:
    """q ``[b, h, s_q, d]``, latents ``[b, 1, s_kv, d_c]``, rotary keys ``[b, 1, s_kv, d_r]``, ``kv_b_proj.weight``."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((b, H, s_q, D_NOPE + D_R), (b, 1, s_kv, D_C), (b, 1, s_kv, D_R), (H * (D_NOPE + D_V), D_C))
    return tuple(torch.randn(shape, generator=g).to(dtype) for shape in shapes)


def join_by_cat(k_nope: Tensor, k_rope: Tensor) -> Tensor:
    return torch.cat([k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)], dim=-1)


def join_by_copy(k_nope: Tensor, k_rope: Tensor) -> Tensor:
    keys = k_nope.new_empty(*k_nope.shape[:-1], D_NOPE + D_R)
    keys[..., :D_NOPE].copy_(k_nope)
    keys[..., D_NOPE:].copy_(k_rope.expand(-1, k_nope.shape[1], -1, -1))
    return keys


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=j <= i + (k.shape[2] - q.shape[2]), scale=SCALE)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    weights = q @ k.transpose(2, 3) * SCALE
    weights = weights.masked_fill(j > i + (k.shape[2] - q.shape[2]), torch.finfo(q.dtype).min)
    return torch.softmax(weights, -1, dtype=torch.float32).to(q.dtype) @ v


@dataclass(frozen=True)
class Layer:
    """Attention over expanded latents, and the places where near misses differ."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = sdpa
    join: Callable[[Tensor, Tensor], Tensor] = join_by_cat
    bias: bool = False
    change_keys: Callable[[Tensor], Tensor] | None = None
    change_values: Callable[[Tensor], Tensor] | None = None
    change_latents_of_values: Callable[[Tensor], Tensor] | None = None
    change_rope: Callable[[Tensor], Tensor] | None = None
    returns_keys: bool = False

    def but(self, **changes: Any) -> Layer:
        return replace(self, **changes)

    def __call__(self, q: Tensor, latent: Tensor, k_rope: Tensor, weight: Tensor) -> Any:
        b, _, s_kv, _ = latent.shape

        def expand(rows: Tensor) -> tuple[Tensor, Tensor]:
            bias = weight[:, 0] if self.bias else None
            heads = F.linear(rows, weight, bias).view(b, s_kv, -1, D_NOPE + D_V).transpose(1, 2)
            k_nope, values = heads.split([D_NOPE, D_V], dim=-1)
            return k_nope, values

        k_nope, values = expand(latent)
        if self.change_latents_of_values is not None:
            values = expand(self.change_latents_of_values(latent))[1]
        k_nope = k_nope if self.change_keys is None else self.change_keys(k_nope)
        values = values if self.change_values is None else self.change_values(values)
        k_rope = k_rope if self.change_rope is None else self.change_rope(k_rope)
        keys = self.join(k_nope, k_rope)
        out = self.attend(q, keys, values).transpose(1, 2).flatten(2)
        return (out, keys) if self.returns_keys else out
