"""Reading and writing rows of a paged cache, one definition for every page size and stride."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError
from flashmla_ops.formats import NATIVE, QUANTIZED


def gather_rows(
    cache: Tensor,  # [n_pages, page_size, h_kv, d]
    pages: Tensor,  # [max_pages] int32, one row of a block table
    begin: int,
    end: int,
    *,
    row_format: str = NATIVE,
    op: str = "decode",
    sequence: int = 0,
) -> Tensor:  # [end - begin, h_kv, elements]
    """Rows [begin, end) of a sequence. Entries of other rows' pages are not looked at, whatever they hold."""
    n_pages, page_size = cache.shape[:2]
    for index in range(begin // page_size, -(-end // page_size)):
        page = int(pages[index])
        if not 0 <= page < n_pages:
            raise ArgumentError(op, "block_table", f"pages in [0, {n_pages})", f"{page} at [{sequence}, {index}]")
    positions = torch.arange(begin, end, device=cache.device)
    return read_rows(cache, pages.long()[positions // page_size], positions % page_size, row_format)


def read_rows(
    cache: Tensor,  # [n_pages, page_size, h_kv, d]
    pages: Tensor,  # [n] int64
    offsets: Tensor,  # [n] int64, in their pages
    row_format: str = NATIVE,
) -> Tensor:  # [n, h_kv, elements], in the cache's dtype, or in float64 from bytes
    """Rows of a cache as elements, whatever its format."""
    if row_format == NATIVE:
        return cache[pages, offsets]
    row = QUANTIZED[row_format]
    parts = [part[pages, offsets] for part in row.parts(cache.view(torch.uint8))]
    return row.dequantize(torch.cat(parts, dim=-1))


def append(
    cache: Tensor,  # [n_pages, page_size, h_kv, d], written in place
    rows: Tensor,  # [n, h_kv, elements]
    slot_mapping: Tensor,  # [n] int64: page * page_size + offset; negative: skip this row
    row_format: str = NATIVE,
) -> None:
    """Write row i to slot ``slot_mapping[i]``. Where two rows name one slot, the later one stays."""
    page_size, parts = cache.shape[1], [cache]
    if row_format != NATIVE:
        row = QUANTIZED[row_format]
        parts, rows = row.parts(cache.view(torch.uint8)), row.quantize(rows)
    pieces = rows.split([part.size(-1) for part in parts], dim=-1)
    for i, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            for part, piece in zip(parts, pieces, strict=True):
                part[slot // page_size, slot % page_size] = piece[i]
