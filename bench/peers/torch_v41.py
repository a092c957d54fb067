"""The block of DeepSeek-V4.1 in torch alone: rows are gathered and dequantised, then two products and a softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla_ops.formats import FP4_V41, FP8_V41
from flashmla_ops.formats.fp4_v41 import NUMBERS
from flashmla_ops.nn import RowSource
from flashmla_ops.nn.v41 import cast, normed, rotated, turned


def block(
    q: Tensor,  # [b, s_q, h_q, 512]
    cos: Tensor,  # [b, s_q, d_r / 2]
    sin: Tensor,
    window: RowSource,
    compressed: RowSource,
    attn_sink: Tensor,  # [h_q]
    *,
    norm_eps: float | None,
) -> tuple[Tensor, Tensor]:
    """As `flashmla_ops.nn.v41_attention`."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    queries = rotated(normed(q.float(), norm_eps), cos, sin).to(q.dtype)
    sources = (window, compressed)
    rows = torch.cat([gathered(source).to(q.dtype) for source in sources], dim=2)  # [b, s_q, topk, 512]
    seen = torch.cat([named(source) for source in sources], dim=2)  # [b, s_q, topk]
    scores = (queries @ rows.transpose(-1, -2)).float() * rows.size(-1) ** -0.5
    scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
    sinks = attn_sink[:, None].expand(*scores.shape[:-1], 1)
    weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1].to(q.dtype)
    return cast(turned((weights @ rows).float(), cos, -sin))


def named(source: RowSource) -> Tensor:
    """``[b, s_q, topk]``: whether an index counts and names a row."""
    n_pages, page_size = source.cache.shape[:2]
    seen: Tensor = (source.indices >= 0) & (source.indices < n_pages * page_size)
    if source.topk_length is None:
        return seen
    places = torch.arange(source.indices.size(-1), device=seen.device)
    return seen & (places < source.topk_length[:, None, None])


def gathered(source: RowSource) -> Tensor:
    """``[b, s_q, topk, 512]`` float32; row 0 where an index names none."""
    rows = source.cache.flatten(0, 2)[source.indices.long().where(named(source), 0)]
    if source.row_format == FP8_V41.name:
        codes, scales = rows.split([FP8_V41.codes_bytes, FP8_V41.groups], dim=-1)
        values, exponents = codes.view(torch.float8_e4m3fn).float(), scales.int() - 127
        scale = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
        return scaled(values, scale, FP8_V41.group)
    codes, scales = rows.split([FP4_V41.codes_bytes, FP4_V41.groups], dim=-1)
    numbers = torch.tensor([*NUMBERS, *(-x for x in NUMBERS)], dtype=torch.float32, device=rows.device)
    values = numbers[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).int()]
    return scaled(values, scales.view(torch.float8_e4m3fn).float(), FP4_V41.group)


def scaled(values: Tensor, scales: Tensor, group: int) -> Tensor:
    return torch.mul(values.unflatten(-1, (-1, group)), scales[..., None]).flatten(-2)
