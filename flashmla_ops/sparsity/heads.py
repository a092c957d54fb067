"""A cache whose KV heads are pages of their own: each can then have its own list of pages, and nothing is copied."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from flashmla_ops.errors import ArgumentError

OP = "sparsity"


class HeadPages(NamedTuple):
    """Views ``[n, page_size, 1, d]``: page p of KV head h of the cache is page ``p * page_step + h * head_step``."""

    kv_cache: Tensor
    k_cache: Tensor | None
    page_step: int
    head_step: int


def by_head(kv_cache: Tensor, k_cache: Tensor | None) -> HeadPages:
    """Views of caches ``[n_pages, page_size, h_kv, d]``. Raises `ArgumentError` where the two lie differently."""
    if kv_cache.size(2) == 1:
        return HeadPages(kv_cache, k_cache, 1, 0)
    steps = _steps(kv_cache)
    if k_cache is not None and _steps(k_cache) != steps:
        expected = f"heads and pages that lie as in kv_cache, {steps[1]} to {steps[0]}"
        raise ArgumentError(OP, "k_cache", expected, list(k_cache.stride()))
    return HeadPages(_view(kv_cache, *steps), None if k_cache is None else _view(k_cache, *steps), *steps)


def _steps(cache: Tensor) -> tuple[int, int]:
    """How far apart pages are, and heads of a page, in units that divide both."""
    page, head = cache.stride(0), cache.stride(2)
    unit = math.gcd(page, head)
    return page // unit, head // unit


def _view(cache: Tensor, page_step: int, head_step: int) -> Tensor:
    n_pages, page_size, h_kv, d = cache.shape
    if page_step == h_kv * head_step:  # a slab [n_pages, h_kv, page_size, d]
        return cache.transpose(1, 2).flatten(0, 1)[:, :, None]
    n = (n_pages - 1) * page_step + (h_kv - 1) * head_step + 1 if n_pages else 0
    unit = cache.stride(0) // page_step
    return cache.as_strided((n, page_size, 1, d), (unit, cache.stride(1), cache.stride(1), 1))


def queries_by_head(q: Tensor, h_kv: int) -> Tensor:
    """``[b, s_q, h_q, d]`` to ``[b * h_kv, s_q, h_q / h_kv, d]``: a sequence for each KV head."""
    heads: Tensor = q.unflatten(2, (h_kv, -1))
    return heads.transpose(1, 2).flatten(0, 1)


def results_together(out: Tensor, h_kv: int) -> Tensor:
    """``[b * h_kv, s_q, h_q / h_kv, d]`` back to ``[b, s_q, h_q, d]``."""
    sequences: Tensor = out.unflatten(0, (-1, h_kv))
    return sequences.transpose(1, 2).flatten(2, 3)
