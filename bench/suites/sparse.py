"""Suite ``sparse``: attention over rows that indices name, in a cache of bytes or elements, from one source or two."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bench.peers import no_compiler
from bench.runner import Problem, Work
from bench.suite import DTYPES, TOLERANCE, Bound, Peer, Suite, copies_of, describe, make_problem
from flashmla_ops.formats import NATIVE, QUANTIZED
from flashmla_ops.ops.sparse import SPARSE_DECODE

NAME = "sparse"
PAGE_SIZE = 64
#: Queries whose exact result is looked at: float64 is slow.
EXACT = 8


@dataclass(frozen=True)
class SparseCase:
    b: int  # sequences of one query token, or query tokens of a prefill
    h_q: int
    topk: int
    row_format: str
    extra_topk: int = 0  # of a second source, in the same format
    n_rows: int = 32768  # of a cache
    prefill: bool = False
    dtype: str = "bf16"
    group: str = "grid"

    @property
    def page_size(self) -> int:
        return self.n_rows if self.prefill else PAGE_SIZE

    @property
    def d(self) -> int:
        return 576 if self.row_format == NATIVE else QUANTIZED[self.row_format].elements

    @property
    def row_bytes(self) -> int:
        return self.d * DTYPES[self.dtype].itemsize if self.row_format == NATIVE else QUANTIZED[self.row_format].bytes


@dataclass(frozen=True)
class SparseInputs:
    case: SparseCase
    q: Tensor  # [b, 1, h_q, d]
    indices: Tensor  # [b, 1, topk] int32
    extra_indices: Tensor | None  # [b, 1, extra_topk] int32


def make_cache(case: SparseCase, generator: torch.Generator) -> Tensor:
    """[n_pages, page_size, 1, d or bytes]"""
    rows = torch.randn(case.n_rows, 1, case.d, generator=generator).to(DTYPES[case.dtype])
    if case.row_format == NATIVE:
        return rows.view(-1, case.page_size, 1, case.d)
    cache = torch.zeros(case.n_rows // case.page_size, case.page_size, 1, case.row_bytes, dtype=torch.uint8)
    torch.ops.flashmla.append_(cache, rows, torch.arange(case.n_rows), case.row_format)
    return cache


def bind_ours(inputs: SparseInputs) -> Bound:
    case = inputs.case

    def decode(cache: Tensor) -> Tensor:
        extra = (None, None) if inputs.extra_indices is None else (cache, inputs.extra_indices)
        out: Tensor = torch.ops.flashmla.sparse_decode(
            *(inputs.q, cache, None, inputs.indices, 512, 0, None, case.row_format, None, None),
            *(*extra, None, case.row_format),
        )[0]
        return out

    def prefill(cache: Tensor) -> Tensor:
        rows = cache.view(case.n_rows, 1, -1)
        results = torch.ops.flashmla.sparse_prefill(inputs.q[:, 0], rows, inputs.indices, 512, None, case.row_format)
        out: Tensor = results[0]
        return out[:, None]

    return prefill if case.prefill else decode


def bind_torch(inputs: SparseInputs) -> Bound:
    """Gather, dequantise, softmax: what one writes in plain torch."""
    case, dtype = inputs.case, inputs.q.dtype
    parts = [inputs.indices] if inputs.extra_indices is None else [inputs.indices, inputs.extra_indices]
    chosen = torch.cat(parts, dim=-1)[:, 0].long()

    def decode(cache: Tensor) -> Tensor:
        rows = cache.view(case.n_rows, -1)[chosen]  # [b, topk, d]
        if case.row_format == "fp8_v32":
            values = rows[..., :512].view(torch.float8_e4m3fn).float().unflatten(-1, (4, 128))
            scales = rows[..., 512:528].view(torch.float32)
            rope = rows[..., 528:].view(torch.bfloat16)
            rows = torch.cat([(values * scales[..., None]).flatten(-2).to(dtype), rope.to(dtype)], dim=-1)
        scores = inputs.q[:, 0] @ rows.transpose(1, 2) * case.d**-0.5
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(dtype)
        return (weights @ rows[..., :512])[:, None]

    return decode


def bind_compiled(inputs: SparseInputs) -> Bound:
    torch.compiler.reset()
    compiled: Bound = torch.compile(bind_torch(inputs), fullgraph=True, dynamic=False)
    return compiled


def written_in_torch(inputs: SparseInputs) -> str | None:
    served = inputs.case.row_format in (NATIVE, "fp8_v32")
    return None if served else "written for elements and fp8_v32"


def problem(case: SparseCase, peers: Sequence[Peer[SparseInputs]], cold_bytes: int) -> Problem:
    generator = torch.Generator().manual_seed(0)
    cache = make_cache(case, generator)
    q = torch.randn(case.b, 1, case.h_q, case.d, generator=generator).to(DTYPES[case.dtype])

    def chosen(topk: int) -> Tensor:
        rows = [torch.randperm(case.n_rows, generator=generator)[:topk] for _ in range(case.b)]
        return torch.stack(rows).int()[:, None]

    inputs = SparseInputs(case, q, chosen(case.topk), chosen(case.extra_topk) if case.extra_topk else None)
    few = slice(0, EXACT)
    extra = (None, None) if inputs.extra_indices is None else (cache, inputs.extra_indices[few])
    expected, _ = SPARSE_DECODE.reference(
        *(q[few], cache, None, inputs.indices[few], 512, 0, None, case.row_format, None, None),
        *(*extra, None, case.row_format),
    )
    topk = case.topk + case.extra_topk
    work = Work(
        title=describe(case, NAME),
        case=asdict(case),
        flops=2.0 * case.b * case.h_q * topk * (case.d + 512),
        bytes=float(case.b * topk * case.row_bytes),
        dtype=DTYPES[case.dtype],
        tolerance=TOLERANCE[case.dtype],
    )
    copies = copies_of((cache,), 0 if case.prefill else cold_bytes)
    return make_problem(work, inputs, copies, bind_ours, peers, expected.double(), lambda out: out[few])


def cases(quick: bool) -> list[SparseCase]:
    if quick:
        return [SparseCase(4, h_q, 2048, "fp8_v32") for h_q in (16, 128)]
    grid = [SparseCase(b, h_q, 2048, "fp8_v32") for b, h_q in itertools.product((4, 16), (16, 128))]
    formats = [SparseCase(4, h_q, 2048, name, group="formats") for h_q in (16, 128) for name in (NATIVE, *QUANTIZED)]
    two = [SparseCase(64, 64, 128, name, extra_topk=512, group="two sources") for name in ("fp8_model1", "fp8_v41")]
    prefill = [SparseCase(256, 128, 2048, name, prefill=True, group="prefill") for name in (NATIVE, "fp8_v41")]
    return [*grid, *(case for case in formats if case.row_format != "fp8_v32"), *two, *prefill]


PEERS = (
    Peer("torch eager", "gather the rows, dequantise, two matmuls and a softmax", bind_torch, unfair=written_in_torch),
    Peer(
        "torch.compile",
        "the same, compiled with static shapes by Inductor",
        bind_compiled,
        no_compiler,
        written_in_torch,
    ),
)
SUITE = Suite(NAME, "attention over rows that indices name", cases, problem, PEERS)
