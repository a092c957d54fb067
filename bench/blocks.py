"""A block of DeepSeek-V4.1 as a benchmark case: its inputs, what it should compute, and two ways to write it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.peers import torch_v41
from flashmla_ops import reference
from flashmla_ops.formats import FP4_V41, FP8_V41, RowFormat
from flashmla_ops.nn import RowSource, v41_attention

PAGE_SIZE, D_R = 64, 64
NORM_EPS = 1e-6
#: Sequences whose exact result is looked at: float64 is slow.
EXACT = 4


@dataclass(frozen=True)
class BlockCase:
    b: int
    s_q: int = 1
    h_q: int = 64
    topk: int = 128  # of the window, fp8_v41
    extra_topk: int = 512  # of the compressed rows, fp4_v41
    norm: bool = False
    n_rows: int = 32768  # of each cache
    dtype: str = "bf16"  # and nothing else
    group: str = "grid"

    @property
    def flops(self) -> float:
        return 2.0 * self.b * self.s_q * self.h_q * (self.topk + self.extra_topk) * 2 * FP8_V41.elements

    @property
    def bytes(self) -> float:
        return float(self.b * self.s_q * (self.topk * FP8_V41.bytes + self.extra_topk * FP4_V41.bytes))


#: The case of a quick run, whose programs are counted too.
QUICK = BlockCase(4)


@dataclass(frozen=True)
class BlockInputs:
    case: BlockCase
    q: Tensor  # [b, s_q, h_q, 512]
    angles: Tensor  # [b, s_q, d_r / 2], and
    cos: Tensor
    sin: Tensor
    indices: Tensor  # [b, s_q, topk] int32
    extra_indices: Tensor  # [b, s_q, extra_topk] int32
    attn_sink: Tensor  # [h_q]
    caches: tuple[Tensor, Tensor]  # fp8_v41 and fp4_v41

    @property
    def norm_eps(self) -> float | None:
        return NORM_EPS if self.case.norm else None

    def block(self, window: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:
        return v41_attention(*self.arguments(window, compressed), norm_eps=self.norm_eps)

    def plain(self, window: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:
        return torch_v41.block(*self.arguments(window, compressed), norm_eps=self.norm_eps)

    def arguments(self, window: Tensor, compressed: Tensor) -> tuple[Any, ...]:
        """Those of `v41_attention`."""
        return self.q, self.cos, self.sin, *self.sources(window, compressed), self.attn_sink

    def sources(self, window: Tensor, compressed: Tensor) -> tuple[RowSource, RowSource]:
        second = RowSource(compressed, self.extra_indices, None, FP4_V41.name)
        return RowSource(window, self.indices), second


def make_inputs(case: BlockCase) -> BlockInputs:
    generator = torch.Generator().manual_seed(0)

    def cache(row: RowFormat) -> Tensor:
        pages = torch.zeros(case.n_rows // PAGE_SIZE, PAGE_SIZE, 1, row.bytes, dtype=torch.uint8)
        rows = torch.randn(case.n_rows, 1, row.elements, generator=generator)
        torch.ops.flashmla.append_(pages, rows, torch.arange(case.n_rows), row.name)
        return pages

    def chosen(topk: int) -> Tensor:
        rows = [torch.randperm(case.n_rows, generator=generator)[:topk] for _ in range(case.b * case.s_q)]
        return torch.stack(rows).int().view(case.b, case.s_q, topk)

    q = torch.randn(case.b, case.s_q, case.h_q, FP8_V41.elements, generator=generator).to(torch.bfloat16)
    angles = 10 * torch.randn(case.b, case.s_q, D_R // 2, generator=generator)
    sink = torch.randn(case.h_q, generator=generator)
    caches = cache(FP8_V41), cache(FP4_V41)
    return BlockInputs(
        case, q, angles, angles.cos(), angles.sin(), chosen(case.topk), chosen(case.extra_topk), sink, caches
    )


def exact(inputs: BlockInputs) -> Tensor:
    """What is cast, of the first sequences, in float64."""
    few = slice(0, EXACT)
    sources = [
        reference.Source(each.cache, None, each.indices[few, :, None], None, each.row_format)
        for each in inputs.sources(*inputs.caches)
    ]
    return reference.v41_attention(inputs.q[few], inputs.angles[few], sources, inputs.attn_sink, inputs.norm_eps)


def read(result: tuple[Tensor, Tensor]) -> Tensor:
    codes, scales = (part[:EXACT].view(torch.uint8) for part in result)
    return FP8_V41.dequantize(torch.cat([codes, scales], dim=-1))
