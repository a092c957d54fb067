"""Decode over a paged cache as a benchmark case: the tensors, the exact result and our call. MLA and GQA alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench.runner import Problem, Work
from bench.suite import DTYPES, TOLERANCE, Bound, Peer, copies_of, describe, make_problem
from flashmla_ops import reference
from flashmla_ops.kv_cache import as_cache, new_slab


def row_widths(cache: str, d_qk: int, d_v: int) -> tuple[int, int, int]:
    """How rows lie: the width of a kv_cache row, qk_start, and the width of a k_cache row."""
    return {
        "one tensor": (d_qk, 0, 0),
        "two tensors": (d_v, 0, d_qk - d_v),
        "[V, K] rows": (d_v + d_qk, d_v, 0),
        "V and K": (d_v, d_v, d_qk),
    }[cache]


@dataclass(frozen=True)
class PagedCase:
    b: int
    h_q: int
    s_kv: int
    dtype: str
    s_q: int = 1
    page_size: int = 64
    d_qk: int = 576
    d_v: int = 512
    h_kv: int = 1
    cache: str = "one tensor"
    varying: bool = False  # lengths from 0 to twice their mean, s_kv
    group: str = "grid"

    @property
    def lengths(self) -> list[int]:
        """Lengths of the sequences; they add up to b * s_kv. Varying ones need b >= 4: two are zero."""
        if not self.varying:
            return [self.s_kv] * self.b
        shortest = 2 * self.s_kv * (self.b / (self.b - 2) - 1)
        steps = max(1, self.b - 3)
        lengths = [round(shortest + (2 * self.s_kv - shortest) * i / steps) for i in range(self.b - 2)]
        lengths[0] += self.b * self.s_kv - sum(lengths)
        return [0, *lengths[1::2], 0, *lengths[::2]]

    @property
    def pairs(self) -> int:
        """(query token, key) pairs of one head: the last query token sees all keys, the one before it all but one."""
        return sum(max(0, length - past) for length in self.lengths for past in range(self.s_q))

    @property
    def flops(self) -> float:
        return 2.0 * self.h_q * self.pairs * (self.d_qk + self.d_v)

    @property
    def cache_bytes(self) -> int:
        d, _, d_k = row_widths(self.cache, self.d_qk, self.d_v)
        return sum(self.lengths) * self.h_kv * (d + d_k) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class PagedInputs:
    """The tensors of one case. ``copies`` hold equal rows; each call takes the next, so that none is in cache."""

    case: PagedCase
    q: Tensor  # [b, s_q, h_q, d_qk]
    copies: Sequence[tuple[Any, ...]]  # (kv_cache: Tensor, k_cache: Tensor | None), each [n_pages, page_size, h_kv, d]
    block_table: Tensor  # [b, max_pages] int32
    cache_seqlens: Tensor  # [b] int32
    qk_start: int
    softmax_scale: float


def make_inputs(case: PagedCase, cold_bytes: int, seed: int = 0) -> PagedInputs:
    """Random rows in shuffled pages. Pages lie as [n_pages, h_kv, page_size, d]: one head's rows are neighbours."""
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.dtype]
    max_pages = -(-max(case.lengths) // case.page_size)
    n_pages = case.b * max_pages
    d, qk_start, d_k = row_widths(case.cache, case.d_qk, case.d_v)

    def pages(width: int) -> Tensor:
        slab = new_slab(n_pages, case.page_size, case.h_kv, width, dtype)
        return as_cache(slab.copy_(torch.randn(slab.shape, generator=generator)))

    return PagedInputs(
        case=case,
        q=torch.randn((case.b, case.s_q, case.h_q, case.d_qk), generator=generator).to(dtype),
        copies=copies_of((pages(d), pages(d_k) if d_k else None), cold_bytes, clone_cache),
        block_table=torch.randperm(n_pages, generator=generator).view(case.b, max_pages).int(),
        cache_seqlens=torch.tensor(case.lengths, dtype=torch.int32),
        qk_start=qk_start,
        softmax_scale=case.d_qk**-0.5,
    )


def clone_cache(cache: Tensor) -> Tensor:
    """A copy in a slab of its own, on the memory that caches of this library have."""
    n_pages, page_size, h_kv, d = cache.shape
    clone = as_cache(new_slab(n_pages, page_size, h_kv, d, cache.dtype))
    return clone.copy_(cache)


def exact(inputs: PagedInputs) -> Tensor:
    """The float64 result, in pieces that need little memory: one query token and one KV head at a time.

    Without a mask a query head of a KV head may as well be a query token. The mask is in the lengths.
    """
    case, out = inputs.case, inputs.q.new_empty((*inputs.q.shape[:3], inputs.case.d_v), dtype=torch.float64)
    group = case.h_q // case.h_kv
    for token in range(case.s_q):
        seen = (inputs.cache_seqlens - (case.s_q - 1 - token)).clamp_min(0)
        for head in range(case.h_kv):
            queries = slice(head * group, (head + 1) * group)
            kv_cache, k_cache = inputs.copies[0]
            part, _ = reference.decode(
                inputs.q[:, token, queries, None],
                kv_cache[:, :, head : head + 1],
                None if k_cache is None else k_cache[:, :, head : head + 1],
                inputs.block_table,
                seen,
                case.d_v,
                inputs.qk_start,
                inputs.softmax_scale,
            )
            out[:, token, queries] = part[:, :, 0]
    return out


def bind_ours(inputs: PagedInputs) -> Bound:
    case = inputs.case

    def decode(kv_cache: Tensor, k_cache: Tensor | None) -> Tensor:
        out: Tensor = torch.ops.flashmla.decode(
            inputs.q,
            kv_cache,
            k_cache,
            inputs.block_table,
            inputs.cache_seqlens,
            case.d_v,
            inputs.qk_start,
            inputs.softmax_scale,
            case.s_q > 1,
        )[0]
        return out

    return decode


def problem(suite: str, case: PagedCase, peers: Sequence[Peer[PagedInputs]], cold_bytes: int) -> Problem:
    inputs = make_inputs(case, cold_bytes)
    work = Work(
        title=describe(case, suite),
        case=asdict(case),
        flops=case.flops,
        bytes=case.cache_bytes,
        dtype=DTYPES[case.dtype],
        tolerance=TOLERANCE[case.dtype],
    )
    return make_problem(work, inputs, inputs.copies, bind_ours, peers, exact(inputs))
