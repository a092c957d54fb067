"""Prefill as a benchmark case: the tensors, the exact result and our call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from bench.runner import Problem, Work
from bench.suite import DTYPES, TOLERANCE, Bound, Peer, describe, make_problem
from flashmla_ops import reference

#: float64 scores that the exact result may need at a time.
MOST_SCORES = 64 << 20


@dataclass(frozen=True)
class PrefillCase:
    s: tuple[int, ...]  # tokens of each sequence, of queries and keys alike
    d_qk: int
    d_v: int
    causal: bool
    dtype: str
    h_q: int = 16
    h_kv: int = 16
    group: str = "grid"

    @property
    def pairs(self) -> int:
        """Of a query token and a key that it sees, of one head."""
        return sum(s * (s + 1) // 2 if self.causal else s * s for s in self.s)

    @property
    def flops(self) -> float:
        return 2.0 * self.h_q * self.pairs * (self.d_qk + self.d_v)

    @property
    def bytes(self) -> int:
        """Bytes of queries, keys and values."""
        width = self.h_q * self.d_qk + self.h_kv * (self.d_qk + self.d_v)
        return sum(self.s) * width * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class PrefillInputs:
    case: PrefillCase
    q: Tensor  # [t, h_q, d_qk]
    k: Tensor  # [t, h_kv, d_qk]
    v: Tensor  # [t, h_kv, d_v]
    cu_seqlens: Tensor  # [b + 1] int32
    softmax_scale: float

    @property
    def sequences(self) -> list[slice]:
        return [slice(*bounds) for bounds in pairwise(self.cu_seqlens.tolist())]


def make_inputs(case: PrefillCase, seed: int = 0) -> PrefillInputs:
    generator = torch.Generator().manual_seed(seed)

    def heads(count: int, width: int) -> Tensor:
        return torch.randn((sum(case.s), count, width), generator=generator).to(DTYPES[case.dtype])

    return PrefillInputs(
        case=case,
        q=heads(case.h_q, case.d_qk),
        k=heads(case.h_kv, case.d_qk),
        v=heads(case.h_kv, case.d_v),
        cu_seqlens=torch.tensor([0, *accumulate(case.s)], dtype=torch.int32),
        softmax_scale=case.d_qk**-0.5,
    )


def exact(inputs: PrefillInputs) -> Tensor:
    """The float64 result, a head and a block of queries at a time: the whole score matrix would not fit in memory."""
    case = inputs.case
    out = inputs.q.new_empty((*inputs.q.shape[:2], case.d_v), dtype=torch.float64)
    for sequence, head in ((s, h) for s in inputs.sequences for h in range(case.h_q)):
        kv_head = slice(head * case.h_kv // case.h_q, head * case.h_kv // case.h_q + 1)
        length = sequence.stop - sequence.start
        rows = max(1, MOST_SCORES // length)
        for first in range(0, length, rows):
            last = min(length, first + rows)
            seen = sequence.start + (last if case.causal else length)  # bottom-right: the block's last query sees all
            keys = slice(sequence.start, seen)
            queries = slice(sequence.start + first, sequence.start + last)
            bounds = [torch.tensor([0, n], dtype=torch.int32) for n in (last - first, seen - sequence.start)]
            k, v = inputs.k[keys, kv_head], inputs.v[keys, kv_head]
            q = inputs.q[queries, head : head + 1]
            part, _ = reference.prefill(q, k, v, bounds[0], bounds[1], case.causal, inputs.softmax_scale)
            out[queries, head] = part[:, 0]
    return out


def bind_ours(inputs: PrefillInputs) -> Bound:
    def prefill() -> Tensor:
        out: Tensor = torch.ops.flashmla.prefill(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.cu_seqlens,
            inputs.cu_seqlens,
            inputs.case.causal,
            inputs.softmax_scale,
        )[0]
        return out

    return prefill


def problem(suite: str, case: PrefillCase, peers: Sequence[Peer[PrefillInputs]], cold_bytes: int) -> Problem:
    """``cold_bytes`` does not matter: a prefill computes far longer than it reads."""
    inputs = make_inputs(case)
    work = Work(
        title=describe(case, suite),
        case=asdict(case) | {"s": " + ".join(map(str, case.s))},
        flops=case.flops,
        bytes=case.bytes,
        dtype=DTYPES[case.dtype],
        tolerance=TOLERANCE[case.dtype],
    )
    return make_problem(work, inputs, [()], bind_ours, peers, exact(inputs))
