"""Reading and writing rows of a paged cache, one definition for every page size and stride."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError


def gather_rows(
    cache: Tensor,  # [n_pages, page_size, h_kv, d]
    pages: Tensor,  # [max_pages] int32, one row of a block table
    length: int,
    *,
    op: str = "decode",
    sequence: int = 0,
) -> Tensor:  # [length, h_kv, d]
    """The first ``length`` rows of a sequence. Entries past its last page are not looked at, whatever they hold."""
    n_pages, page_size = cache.shape[:2]
    live = pages[: -(-length // page_size)].long()
    for index, page in enumerate(live.tolist()):
        if not 0 <= page < n_pages:
            raise ArgumentError(op, "block_table", f"pages in [0, {n_pages})", f"{page} at [{sequence}, {index}]")
    positions = torch.arange(length, device=cache.device)
    return cache[live[positions // page_size], positions % page_size]


def append(
    cache: Tensor,  # [n_pages, page_size, h_kv, d], written in place
    rows: Tensor,  # [n, h_kv, d]
    slot_mapping: Tensor,  # [n] int64: page * page_size + offset; negative: skip this row
) -> None:
    """Write row i to slot ``slot_mapping[i]``. Where two rows name one slot, the later one stays."""
    page_size = cache.shape[1]
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            cache[slot // page_size, slot % page_size] = rows[row]
