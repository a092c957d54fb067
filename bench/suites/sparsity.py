"""Suite ``sparsity``: decode that chooses its pages, the choice included, beside decode over all of them.

Keys are made so that a share of the pages matters, as measured of models (docs/sparsity.md): the keys of the others lie
where queries do not point, and hold less than a thousandth of the softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bench.paged import clone_cache
from bench.runner import Problem, Work
from bench.suite import DTYPES, TOLERANCE, Bound, Peer, Suite, copies_of, describe, make_problem
from flashmla_ops.kv_cache import as_cache, new_slab
from flashmla_ops.ops.decode import DECODE
from flashmla_ops.sparsity import Cached, DynamicSparsity, attend
from flashmla_ops.sparsity.summaries import summary_bytes

NAME = "sparsity"
PAGE_SIZE = 64
#: How far the scores of pages that matter lie above the others, in nats, and how much scores vary beside that.
APART, SPREAD = 12.0, 1.0
#: What may be lost: so little that the result is that of dense attention, which is what it is checked against.
EPS, TAU = 1e-3, 1e-4


@dataclass(frozen=True)
class SparsityCase:
    b: int
    h_q: int
    h_kv: int
    d_qk: int
    d_v: int
    s_kv: int
    matter: float  # share of the pages
    mode: str = "certified"
    dtype: str = "bf16"
    group: str = "grid"

    @property
    def qk_start(self) -> int:
        """0 for MLA, whose rows are ``[c_kv, k_pe]``; else rows are ``[V, K]``."""
        return 0 if self.d_qk > self.d_v else self.d_v

    @property
    def d(self) -> int:
        return self.d_qk + self.qk_start

    @property
    def pages(self) -> int:
        return -(-self.s_kv // PAGE_SIZE)


@dataclass(frozen=True)
class SparsityInputs:
    case: SparsityCase
    q: Tensor  # [b, 1, h_q, d_qk]
    block_table: Tensor  # [b, pages] int32
    cache_seqlens: Tensor  # [b] int32
    sparsity: DynamicSparsity


def make_rows(case: SparsityCase, q: Tensor, table: Tensor, generator: torch.Generator) -> Tensor:
    """[n_pages, page_size, h_kv, d]: keys of the share ``matter`` of each sequence's pages lie where queries point."""
    slab = new_slab(case.b * case.pages, PAGE_SIZE, case.h_kv, case.d, q.dtype)
    slab.copy_(torch.randn(slab.shape, generator=generator))
    keys = slab[..., case.qk_start :]
    matters = torch.rand(case.b, case.h_kv, case.pages, generator=generator) < case.matter
    for i in range(case.b):
        for head in range(case.h_kv):
            group = q[i, 0].float().unflatten(0, (case.h_kv, -1))[head]
            along = group.mean(dim=0)
            along = along / along.square().sum() * APART * case.d_qk**0.5
            away = torch.where(matters[i, head], 0.0, -1.0)[:, None, None] * along
            keys[table[i].long(), head] += away.to(q.dtype)
    return as_cache(slab)


def summarized(case: SparsityCase, cache: Tensor) -> Tensor:
    n_bytes = summary_bytes("codes", PAGE_SIZE, case.d_qk)
    summaries = new_slab(len(cache), 1, case.h_kv, n_bytes, torch.uint8).squeeze(2)
    last = torch.arange(PAGE_SIZE - 1, len(cache) * PAGE_SIZE, PAGE_SIZE)
    torch.ops.flashmla.summarize_(summaries, cache, None, last, "codes", case.qk_start)
    return summaries


def bind_ours(inputs: SparsityInputs) -> Bound:
    case = inputs.case

    def decode(cache: Tensor, summaries: Tensor) -> Tensor:
        cached = Cached(cache, None, inputs.block_table, inputs.cache_seqlens, summaries)
        return attend(inputs.q, cached, inputs.sparsity, case.d_v, case.qk_start)[0]

    return decode


def bind_dense(inputs: SparsityInputs) -> Bound:
    case = inputs.case

    def decode(cache: Tensor, summaries: Tensor) -> Tensor:
        tables = (inputs.block_table, inputs.cache_seqlens)
        out: Tensor = torch.ops.flashmla.decode(inputs.q, cache, None, *tables, case.d_v, case.qk_start)[0]
        return out

    return decode


def make_inputs(case: SparsityCase) -> tuple[SparsityInputs, Tensor, Tensor]:
    """Inputs, the cache ``[n_pages, page_size, h_kv, d]`` and its summaries."""
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[case.dtype]
    # The queries of a KV head point the same way but for a part of their own.
    shared = torch.randn(case.b, 1, case.h_kv, 1, case.d_qk, generator=generator)
    own = torch.randn(case.b, 1, case.h_kv, case.h_q // case.h_kv, case.d_qk, generator=generator)
    q = ((shared + 0.3 * own) * SPREAD).flatten(2, 3).to(dtype)
    table = torch.randperm(case.b * case.pages, generator=generator).view(case.b, case.pages).int()
    cache = make_rows(case, q, table, generator)
    lengths = torch.full((case.b,), case.s_kv, dtype=torch.int32)
    sparsity = DynamicSparsity(case.mode, eps=EPS, tau=TAU)
    return SparsityInputs(case, q, table, lengths, sparsity), cache, summarized(case, cache)


def problem(case: SparsityCase, peers: Sequence[Peer[SparsityInputs]], cold_bytes: int) -> Problem:
    inputs, cache, summaries = make_inputs(case)
    tables = (inputs.block_table[:1], inputs.cache_seqlens[:1])
    expected, _ = DECODE.reference(inputs.q[:1], cache, None, *tables, case.d_v, case.qk_start)
    work = Work(
        title=describe(case, NAME),
        case=asdict(case),
        flops=2.0 * case.b * case.h_q * case.s_kv * (case.d_qk + case.d_v),
        bytes=float(case.b * case.h_kv * case.s_kv * case.d * DTYPES[case.dtype].itemsize),
        dtype=DTYPES[case.dtype],
        tolerance=TOLERANCE[case.dtype],
    )
    copies = copies_of((cache, summaries), cold_bytes, _clone)
    return make_problem(work, inputs, copies, bind_ours, peers, expected.double(), lambda out: out[:1])


def _clone(tensor: Tensor) -> Tensor:
    return clone_cache(tensor) if tensor.dim() == 4 else tensor.clone()


def cases(quick: bool) -> list[SparsityCase]:
    if quick:
        return [SparsityCase(1, 9, 3, 64, 64, 8192, 0.3)]
    smollm2, llama, mla = (9, 3, 64, 64), (32, 8, 128, 128), (16, 1, 576, 512)
    grid = [
        SparsityCase(b, *heads, s_kv, matter, mode)
        for heads in (smollm2, llama)
        for b, s_kv, matter in ((4, 2048, 0.5), (4, 8192, 0.3), (4, 32768, 0.15))
        for mode in ("certified", "estimate")
    ]
    short = [SparsityCase(4, *heads, 1000, 1.0, group="below min_context") for heads in (smollm2, llama)]
    return [*grid, *short, SparsityCase(4, *mla, 8192, 0.3, group="MLA")]


PEERS = (Peer("dense decode", "this library's decode over all pages", bind_dense),)
SUITE = Suite(NAME, "decode that chooses its pages, the choice included", cases, problem, PEERS)
