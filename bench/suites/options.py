"""Suite ``options``: windows, softcaps, ragged queries and batch invariance of `decode`, beside doing without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from bench.runner import Problem, Work
from bench.suite import DTYPES, TOLERANCE, Bound, Peer, Suite, copies_of, describe, make_problem
from flashmla_ops.ops.decode import DECODE
from flashmla_ops.reference.attention import visible

NAME = "options"
PAGE_SIZE = 64
D, D_V = 576, 512
#: Sequences whose exact result is looked at: float64 is slow.
EXACT = 2


@dataclass(frozen=True)
class OptionCase:
    s_kv: tuple[int, ...]  # rows of each sequence, in whole pages
    s_q: tuple[int, ...]  # query tokens of each
    h_q: int
    window: int = 0  # in whole pages
    softcap: float = 0.0
    batch_invariant: bool = False
    dtype: str = "bf16"
    group: str = ""

    @property
    def ragged(self) -> bool:
        return len(set(self.s_q)) > 1

    @property
    def pairs(self) -> int:
        """Of a query token and a row that it sees."""
        seen = (visible(s_q, s_kv, True, self.window) for s_q, s_kv in zip(self.s_q, self.s_kv, strict=True))
        return sum(end - begin for begins, ends in seen for begin, end in zip(begins, ends, strict=True))

    @property
    def rows(self) -> int:
        """Rows that any query sees."""
        seen = (visible(s_q, s_kv, True, self.window) for s_q, s_kv in zip(self.s_q, self.s_kv, strict=True))
        return sum(max(ends) - min(begins) for begins, ends in seen)


@dataclass(frozen=True)
class OptionInputs:
    case: OptionCase
    q: Tensor  # [t_q, h_q, 576]
    block_table: Tensor  # [b, max_pages] int32
    cache_seqlens: Tensor  # [b] int32
    cu_seqlens_q: Tensor  # [b + 1] int32

    def of(self, first: int, last: int, **changes: Any) -> dict[str, Any]:
        """The arguments of `decode`, but for the cache, for sequences [first, last)."""
        case, bounds = self.case, self.cu_seqlens_q[first : last + 1]
        q = self.q[bounds[0] : bounds[-1]]
        if len(set(case.s_q[first:last])) == 1:
            queries = {"q": q.unflatten(0, (last - first, -1))}
        else:
            queries = {"q": q, "cu_seqlens_q": bounds - bounds[0]}
        own = {"block_table": self.block_table[first:last], "cache_seqlens": self.cache_seqlens[first:last]}
        options = {name: getattr(case, name) for name in ("window", "softcap", "batch_invariant")}
        return queries | own | options | {"k_cache": None, "d_v": D_V, "causal": True} | changes


def bind_ours(inputs: OptionInputs) -> Bound:
    arguments = inputs.of(0, len(inputs.case.s_q))

    def decode(cache: Tensor) -> Tensor:
        return attended(cache, arguments)

    return decode


def attended(cache: Tensor, arguments: dict[str, Any]) -> Tensor:
    """[t_q, h_q, d_v]"""
    out: Tensor = torch.ops.flashmla.decode(kv_cache=cache, **arguments)[0]
    return out.flatten(0, -3) if out.dim() == 4 else out


def bind_without(inputs: OptionInputs) -> Bound:
    """The same results without the option: a table of the window's pages, or a call for each number of queries."""
    case = inputs.case
    starts = [i for i, n in enumerate(case.s_q) if i == 0 or n != case.s_q[i - 1]]
    calls = [inputs.of(*ends, window=0, batch_invariant=False) for ends in pairwise([*starts, len(case.s_q)])]
    if case.window:
        (call,) = calls
        call["block_table"] = call["block_table"][:, -case.window // PAGE_SIZE :]
        call["cache_seqlens"] = torch.full_like(call["cache_seqlens"], case.window)

    def decode(cache: Tensor) -> Tensor:
        return torch.cat([attended(cache, call) for call in calls])

    return decode


def is_softcap(inputs: OptionInputs) -> str | None:
    return "other results" if inputs.case.softcap else None


def bind_torch(inputs: OptionInputs) -> Bound:
    """Rows gathered, two matmuls, a mask and a softmax, one sequence at a time."""
    case, bounds = inputs.case, inputs.cu_seqlens_q.tolist()

    def decode(cache: Tensor) -> Tensor:
        outs = []
        for i, (first, last) in enumerate(pairwise(bounds)):
            begins, ends = visible(last - first, case.s_kv[i], True, case.window)
            pages = inputs.block_table[i, min(begins) // PAGE_SIZE : max(ends) // PAGE_SIZE]
            rows, at = cache[pages.long()].flatten(0, 2), min(begins) // PAGE_SIZE * PAGE_SIZE
            scores = (inputs.q[first:last] @ rows.T) * D**-0.5  # [s_q, h_q, t]
            if case.softcap:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            if last - first > 1 or case.window:
                t = torch.arange(at, at + len(rows))
                hidden = (t < torch.tensor(begins)[:, None]) | (t >= torch.tensor(ends)[:, None])
                scores = scores.masked_fill(hidden[:, None], -torch.inf)
            outs.append(torch.softmax(scores, dim=-1, dtype=torch.float32).to(rows.dtype) @ rows[:, :D_V])
        return torch.cat(outs)

    return decode


def problem(case: OptionCase, peers: Sequence[Peer[OptionInputs]], cold_bytes: int) -> Problem:
    generator = torch.Generator().manual_seed(0)
    dtype, counts = DTYPES[case.dtype], [s_kv // PAGE_SIZE for s_kv in case.s_kv]
    pages = torch.randperm(sum(counts), generator=generator).int()
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for i, own in enumerate(pages.split(counts)):
        table[i, : len(own)] = own
    cache = torch.randn(len(pages), PAGE_SIZE, 1, D, generator=generator).to(dtype)
    q = torch.randn(sum(case.s_q), case.h_q, D, generator=generator).to(dtype)
    bounds = torch.tensor([*accumulate(case.s_q, initial=0)], dtype=torch.int32)
    inputs = OptionInputs(case, q, table, torch.tensor(case.s_kv, dtype=torch.int32), bounds)
    last = len(case.s_q)
    expected, _ = DECODE.reference(kv_cache=cache, **inputs.of(max(last - EXACT, 0), last))
    expected = expected.flatten(0, -3) if expected.dim() == 4 else expected
    work = Work(
        title=describe(case, NAME),
        case=asdict(case),
        flops=2.0 * case.pairs * case.h_q * (D + D_V),
        bytes=float(case.rows * D * dtype.itemsize),
        dtype=dtype,
        tolerance=TOLERANCE[case.dtype],
    )
    copies = copies_of((cache,), cold_bytes)
    return make_problem(work, inputs, copies, bind_ours, peers, expected.double(), lambda out: out[-len(expected) :])


def cases(quick: bool) -> list[OptionCase]:
    batches = ((4, 128),) if quick else ((1, 128), (4, 128), (16, 128), (4, 16), (16, 16))
    windows = [OptionCase((8192,) * b, (1,) * b, h, window=1024, group="window") for b, h in batches]
    softcaps = [OptionCase((4096,) * b, (1,) * b, h, softcap=30.0, group="softcap") for b, h in batches]
    same = [OptionCase((4096,) * b, (1,) * b, h, batch_invariant=True, group="batch invariant") for b, h in batches]
    chunk, decoding = 256, (4 if quick else 16)
    mixed = [OptionCase((2048, *(4096,) * decoding), (chunk, *(1,) * decoding), h, group="ragged") for h in (16, 128)]
    return [*windows, *softcaps, *same, *mixed]


PEERS = (
    Peer(
        "without the option",
        "the same kernels, called so that the option is not needed",
        bind_without,
        unfair=is_softcap,
    ),
    Peer("torch eager", "rows gathered, two matmuls, a mask and a softmax for each sequence", bind_torch),
)
SUITE = Suite(NAME, "options of decode over a paged latent cache", cases, problem, PEERS)
