"""The memory behind pages: one tensor for each layer, ``[n_pages, h_kv, page_size, d]``.

A head's rows of one page lie together, so that a kernel streams them. The operators read and write it through a view,
``[n_pages, page_size, h_kv, d]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashmla_ops.kv_cache.block_tables import PageCopy


def new_slab(
    n_pages: int,
    page_size: int,
    h_kv: int,
    d: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:  # [n_pages, h_kv, page_size, d]
    """Pages of zeros; the system provides their memory as they are first written."""
    return torch.zeros(n_pages, h_kv, page_size, d, dtype=dtype, device=device)


def as_cache(slab: Tensor) -> Tensor:
    """The view ``[n_pages, page_size, h_kv, d]`` of a slab that the operators take."""
    return slab.transpose(1, 2)


def copy_pages(slab: Tensor, copies: Sequence[PageCopy]) -> None:
    """Copy whole pages within a slab, in place. No page may be a source and a target at once."""
    if copies:
        sources, targets = torch.tensor(copies, device=slab.device).unbind(dim=1)
        slab.index_copy_(0, targets, slab.index_select(0, sources))
