"""Inputs of a block of DeepSeek-V4.1: queries, angles, and two sources of rows with poison around what is named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.formats import FP8_V41
from flashmla_ops.nn import RowSource, v41_attention
from tests.support.sparse import Rows, SparseCase, build

D_R = 64


@dataclass(frozen=True)
class BlockCase:
    b: int = 2
    s_q: int = 1
    h_q: int = 64
    extra_format: str | None = "fp4_v41"
    norm_eps: float | None = None
    dtype: str = "bfloat16"
    topk: int = 40
    n_pages: int = 20
    seed: int = 0

    @property
    def sparse(self) -> SparseCase:
        window = Rows(self.topk, n_pages=self.n_pages, page_size=16, row_format="fp8_v41", lengths=True)
        extra = None
        if self.extra_format is not None:
            extra = replace(window, topk=self.topk // 2, page_size=8, row_format=self.extra_format)
        return SparseCase(
            window, extra, self.b, self.s_q, self.h_q, dtype=self.dtype, sink=True, strided=False, seed=self.seed
        )


@dataclass(frozen=True)
class BlockInputs:
    q: Tensor  # [b, s_q, h_q, 512]
    angles: Tensor  # [b, s_q, 32]
    window: RowSource
    compressed: RowSource | None
    attn_sink: Tensor  # [h_q]
    norm_eps: float | None

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.q, self.angles.cos(), self.angles.sin(), self.window, self.compressed, self.attn_sink

    def run(self, function: Any = v41_attention) -> tuple[Tensor, Tensor]:
        codes, scales = function(*self.arguments, norm_eps=self.norm_eps)
        return codes, scales

    def expected(self) -> Tensor:
        """What is cast, in float64."""
        sources = [source_of(rows) for rows in (self.window, self.compressed) if rows is not None]
        return reference.v41_attention(self.q, self.angles, sources, self.attn_sink, self.norm_eps)


def source_of(rows: RowSource) -> reference.Source:
    b, s_q, _ = rows.indices.shape
    lengths = None if rows.topk_length is None else rows.topk_length[:, None].expand(b, s_q)
    return reference.Source(rows.cache, None, rows.indices[:, :, None], lengths, rows.row_format)


def inputs_of(case: BlockCase) -> BlockInputs:
    named = build(case.sparse)
    generator = torch.Generator().manual_seed(case.seed)
    angles = 10 * torch.randn(case.b, case.s_q, D_R // 2, generator=generator)
    window = RowSource(named["kv_cache"], named["indices"], named["topk_length"])
    compressed = None
    if case.extra_format is not None:
        parts = (named[f"extra_{name}"] for name in ("kv_cache", "indices", "topk_length", "row_format"))
        compressed = RowSource(*parts)
    return BlockInputs(named["q"], angles, window, compressed, named["attn_sink"], case.norm_eps)


def fault(codes: Tensor, scales: Tensor, expected: Tensor) -> str | None:
    """Why codes and scales are not what should be cast: they are it but for attention's error, and rounded once."""
    unit = torch.ldexp(torch.ones_like(scales, dtype=torch.float64), scales.int() - 127).repeat_interleave(32, dim=-1)
    found = FP8_V41.dequantize(torch.cat([codes.view(torch.uint8), scales], dim=-1))
    largest = expected.unflatten(-1, (-1, 2)).abs().amax(-1).repeat_interleave(2, dim=-1)  # a turn mixes two elements
    attention = 1e-3 + 3.01 / 128 * largest
    allowed = attention + (expected.abs() + attention) / 16 + unit / 1024  # half a step of e4m3, normal or not
    bad = ~((found - expected).abs() <= allowed)
    if not bad.any():
        return None
    at = tuple(bad.nonzero()[0].tolist())
    return f"{int(bad.sum())} of {bad.numel()} differ, at {list(at)}: {found[at]:.6g}, expected {expected[at]:.6g}"
