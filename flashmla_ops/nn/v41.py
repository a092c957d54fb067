"""`v41_attention`: attention of DeepSeek-V4.1 between its products, in plain PyTorch around `sparse_decode`.

The official package has it as one kernel of one GPU, ``fused_norm_rope_attn_rope_cast``: RMSNorm of the queries (in V4
alone), their rotary embedding, attention over two sources of rows, the rotary embedding undone on the output, and a
cast of the output to e4m3 for the product that follows. Here a compiler puts the same together: compiled for the
CPU, what comes before `sparse_decode` is one generated kernel, and what comes after it another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError
from flashmla_ops.formats import FP8_V41

OP = "v41_attention"


class RowSource(NamedTuple):
    """A source of rows: a cache, and the slots of it that each query token attends to."""

    cache: Tensor  # [n_pages, page_size, 1, bytes] uint8 or float8_e4m3fn
    indices: Tensor  # [b, s_q, topk] int32: slots; any other number names nothing
    topk_length: Tensor | None = None  # [b] int32: how many of the indices count, the first ones
    row_format: str = FP8_V41.name


def v41_attention(
    q: Tensor,  # [b, s_q, h_q, 512] bfloat16, float16 or float32
    cos: Tensor,  # [b, s_q, d_r / 2] float32, of the angles of the query tokens
    sin: Tensor,
    window: RowSource,
    compressed: RowSource | None = None,
    attn_sink: Tensor | None = None,  # [h_q] float32
    *,
    norm_eps: float | None = None,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the rows of both sources, and cast what comes out to e4m3, with a scale for each 32 elements.

    Each pair of the last ``d_r`` elements of a query, neighbours, is turned by an angle of its token, and of the output
    turned back: rows are keys and values in one, and were turned before they were appended (`rotated`). ``norm_eps``
    not None: queries are first divided by the root of their mean square plus ``norm_eps``. ``softmax_scale`` None means
    512 ** -0.5. All of it is in float32 but the queries and the output of `sparse_decode`, which have the type of q.

    Returns codes ``[b, s_q, h_q, 512]`` float8_e4m3fn and scales ``[b, s_q, h_q, 16]`` uint8, e8m0: side by side they
    are rows of fp8_v41. Raises `ArgumentError` for angles of another shape, and what `sparse_decode` does.
    """
    check_angles(q, cos, sin)
    cos, sin = cos[:, :, None], sin[:, :, None]
    x = normed(q.float(), norm_eps)
    extra = (None,) * 3 if compressed is None else compressed[:3]
    out, _ = torch.ops.flashmla.sparse_decode(
        torch.cat([part.to(q.dtype) for part in turned(x, cos, sin)], dim=-1),
        window.cache,
        None,
        window.indices,
        FP8_V41.elements,
        0,
        softmax_scale,
        window.row_format,
        attn_sink,
        window.topk_length,
        *extra,
        *(() if compressed is None else (compressed.row_format,)),
    )
    return cast(turned(out.float(), cos, -sin))


def normed(x: Tensor, norm_eps: float | None) -> Tensor:
    """``x`` over the root of its rows' mean square plus ``norm_eps``; None: as it is."""
    return x if norm_eps is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_eps)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` [..., d] with the last ``d_r`` elements turned, in float32, by angles that broadcast to [..., d_r / 2]."""
    return torch.cat([part.to(x.dtype) for part in turned(x.float(), cos, sin)], dim=-1)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The elements before the rotary ones, and these with each pair of neighbours turned."""
    d_r = 2 * cos.size(-1)
    rest, rotary = x.split([x.size(-1) - d_r, d_r], dim=-1)
    even, odd = rotary.unflatten(-1, (-1, 2)).unbind(-1)
    return rest, torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def cast(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows ``[..., d]`` that come in parts of whole groups: no row is put together first."""
    groups = [part.unflatten(-1, (-1, FP8_V41.group)) for part in parts]
    exponents = [FP8_V41.exponents(each) for each in groups]
    codes = [FP8_V41.scaled(*each).to(torch.float8_e4m3fn) for each in zip(groups, exponents, strict=True)]
    return torch.cat(codes, dim=-2).flatten(-2), FP8_V41.store(torch.cat(exponents, dim=-1))


def check_angles(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    group = FP8_V41.group
    for name, angles in (("cos", cos), ("sin", sin)):
        fits = angles.dim() == 3 and angles.shape[:2] == q.shape[:2] and 2 * angles.size(-1) % group == 0
        if not fits or angles.size(-1) != cos.size(-1):
            expected = f"[{', '.join(map(str, q.shape[:2]))}, d_r / 2] with d_r a multiple of {group}"
            raise ArgumentError(OP, name, expected, list(angles.shape))
