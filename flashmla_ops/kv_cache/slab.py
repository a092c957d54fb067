"""The memory behind pages: one tensor for each layer, ``[n_pages, h_kv, page_size, d]``.

A head's rows of one page lie together, so that a kernel streams them. The operators read and write it through a view,
``[n_pages, page_size, h_kv, d]``.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from flashmla_ops.kv_cache.tables import PageCopy

HUGE_PAGE = 2 << 20  # bytes of Linux's transparent huge pages on x86-64, and on Arm with pages of 4 KB


def new_slab(
    n_pages: int,
    page_size: int,
    h_kv: int,
    d: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:  # [n_pages, h_kv, page_size, d]
    """Pages of zeros. On Linux's CPUs their memory comes as it is first written, on huge pages where there are any.

    Rows are read in the order of block tables, so that on pages of 4 KB each address translation serves few of them.
    Measured on Zen 4 from DRAM, huge pages against those: GQA takes 3 to 18 % less time, MLA with 16 heads 7 to 10 %,
    and 14 % with one token a page.
    """
    shape = (n_pages, h_kv, page_size, d)
    if not torch.compiler.is_compiling():
        like = torch.empty(0, dtype=dtype, device=device)
        # Not where a mode makes other tensors, such as fake ones.
        if type(like) is torch.Tensor and like.device.type == "cpu":
            slab = _reserve(math.prod(shape), like.dtype)
            if slab is not None:
                return slab.view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)


def _reserve(count: int, dtype: torch.dtype) -> Tensor | None:
    """Zeros that take no memory until written; None if they are few, or the system has no such memory."""
    n_bytes = count * dtype.itemsize
    if n_bytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        memory = mmap.mmap(-1, n_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without huge pages
        # The rest, on small pages, takes no more than it needs.
        memory.madvise(mmap.MADV_HUGEPAGE, start, n_bytes // HUGE_PAGE * HUGE_PAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start)


def as_cache(slab: Tensor) -> Tensor:
    """The view ``[n_pages, page_size, h_kv, d]`` of a slab that the operators take."""
    return slab.transpose(1, 2)


def copy_pages(slab: Tensor, copies: Sequence[PageCopy]) -> None:
    """Copy whole pages within a slab, in place. No page may be a source and a target at once."""
    if copies:
        sources, targets = torch.tensor(copies, device=slab.device).unbind(dim=1)
        slab.index_copy_(0, targets, slab.index_select(0, sources))


def zeros_on_demand(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU that take memory as they are written, where the system has such memory."""
    reserved = _reserve(math.prod(shape), dtype)
    return torch.zeros(*shape, dtype=dtype, device="cpu") if reserved is None else reserved.view(*shape)
