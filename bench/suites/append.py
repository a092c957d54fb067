"""Suite ``append``: new rows into a paged cache, those of a decode step and those of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bench.paged import clone_cache
from bench.runner import Problem, Work
from bench.suite import DTYPES, Bound, Peer, Suite, copies_of, describe, make_problem
from flashmla_ops.kv_cache import as_cache, new_slab

NAME = "append"


@dataclass(frozen=True)
class AppendCase:
    rows: int
    dtype: str
    h_kv: int = 1
    d: int = 576
    page_size: int = 64
    n_pages: int = 128


@dataclass(frozen=True)
class AppendInputs:
    case: AppendCase
    rows: Tensor  # [n, h_kv, d]
    slots: Tensor  # [n] int64, in no order


def bind_ours(inputs: AppendInputs) -> Bound:
    def append(kv_cache: Tensor) -> Tensor:
        torch.ops.flashmla.append_(kv_cache, inputs.rows, inputs.slots)
        return kv_cache

    return append


def bind_index_put(inputs: AppendInputs) -> Bound:
    pages, offsets = inputs.slots // inputs.case.page_size, inputs.slots % inputs.case.page_size

    def append(kv_cache: Tensor) -> Tensor:
        return kv_cache.index_put_((pages, offsets), inputs.rows)

    return append


def problem(case: AppendCase, peers: Sequence[Peer[AppendInputs]], cold_bytes: int) -> Problem:
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[case.dtype]
    rows = torch.randn((case.rows, case.h_kv, case.d), generator=generator).to(dtype)
    slots = torch.randperm(case.n_pages * case.page_size, generator=generator)[: case.rows]
    pages, offsets = slots // case.page_size, slots % case.page_size
    cache = as_cache(new_slab(case.n_pages, case.page_size, case.h_kv, case.d, dtype))

    def read(kv_cache: Tensor) -> Tensor:
        """The rows that were written. They are cleared: a call that writes nothing must not pass the next time."""
        written = kv_cache[pages, offsets]
        kv_cache.zero_()
        return written

    work = Work(
        title=describe(case, NAME),
        case=asdict(case),
        flops=0.0,
        bytes=0.0,  # the rows are in cache, and how fast memory takes them is not measured
        dtype=dtype,
        tolerance=0.0,
    )
    copies = copies_of((cache,), cold_bytes, clone_cache)
    return make_problem(work, AppendInputs(case, rows, slots), copies, bind_ours, peers, rows.double(), read)


def cases(quick: bool) -> list[AppendCase]:
    counts = (4,) if quick else (1, 16, 64, 4096)
    return [
        AppendCase(rows, "bf16", h_kv, d, n_pages=n_pages)
        for h_kv, d, n_pages in ((1, 576, 128), (8, 256, 128))
        for rows in counts
    ]


PEERS = (Peer("torch index_put_", "with pages and offsets computed beforehand", bind_index_put),)
SUITE = Suite(NAME, "new rows into a paged cache", cases, problem, PEERS)
