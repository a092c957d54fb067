"""Caches of bytes for tests: poison wherever nothing was written, in the layouts that a format allows."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla_ops.formats import RowFormat

#: Every byte of memory that nobody may read: NaN as e4m3, e8m0, bfloat16 and float32.
POISON = 0xFF


def empty_cache(
    row: RowFormat,
    n_pages: int,
    page_size: int,
    *,
    gaps: bool,
    h_kv: int = 1,
    dtype: torch.dtype = torch.uint8,
    byte: int = POISON,
) -> Tensor:
    """``[n_pages, page_size, h_kv, bytes]`` of one byte; ``gaps``: between all that may lie apart, and before it."""
    if row.tail:  # a page is one piece
        memory = torch.full((n_pages * (page_size * row.bytes + 9 * gaps) + gaps,), byte, dtype=torch.uint8)
        strides = (page_size * row.bytes + 9 * gaps, row.bytes, row.bytes, 1)
        return memory.view(dtype).as_strided((n_pages, page_size, 1, row.bytes), strides, int(gaps))
    memory = torch.full((n_pages, page_size + gaps, h_kv + gaps, row.bytes + 5 * gaps), byte, dtype=torch.uint8)
    return memory.view(dtype)[:, :page_size, gaps:, gaps : gaps + row.bytes]


def write(row: RowFormat, cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Put quantised rows [n, h_kv, bytes] to slots."""
    parts = row.parts(cache.view(torch.uint8))
    pages, offsets = slots // cache.size(1), slots % cache.size(1)
    for part, piece in zip(parts, rows.split([part.size(-1) for part in parts], dim=-1), strict=True):
        part[pages, offsets] = piece


def read(row: RowFormat, cache: Tensor) -> Tensor:
    """All rows [n_pages, page_size, h_kv, elements], in float64."""
    return row.dequantize(torch.cat(row.parts(cache.view(torch.uint8)), dim=-1))
