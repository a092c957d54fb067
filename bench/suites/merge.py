"""Suite ``merge``: partial results of attention into one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bench.peers import no_compiler
from bench.runner import Problem, Work
from bench.suite import DTYPES, TOLERANCE, Bound, Peer, Suite, describe, make_problem
from flashmla_ops import reference

NAME = "merge"


@dataclass(frozen=True)
class MergeCase:
    parts: int
    b: int
    h_q: int
    dtype: str
    s_q: int = 1
    d_v: int = 512


@dataclass(frozen=True)
class MergeInputs:
    outs: list[Tensor]  # each [b, s_q, h_q, d_v]
    lses: list[Tensor]  # each [b, h_q, s_q] float32


def merge(outs: list[Tensor], lses: list[Tensor]) -> Tensor:
    """In plain torch, accumulating in float32."""
    weights = torch.softmax(torch.stack(lses), dim=0).transpose(-1, -2).unsqueeze(-1)
    return (torch.stack(outs) * weights).sum(dim=0).to(outs[0].dtype)


def bind_ours(inputs: MergeInputs) -> Bound:
    return lambda: torch.ops.flashmla.merge_states(inputs.outs, inputs.lses)[0]


def bind_eager(inputs: MergeInputs) -> Bound:
    return lambda: merge(inputs.outs, inputs.lses)


def bind_compiled(inputs: MergeInputs) -> Bound:
    torch.compiler.reset()
    compiled = torch.compile(merge, fullgraph=True, dynamic=False)
    return lambda: compiled(inputs.outs, inputs.lses)


def problem(case: MergeCase, peers: Sequence[Peer[MergeInputs]], cold_bytes: int) -> Problem:
    """Nothing is cold: the parts to merge were just computed."""
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[case.dtype]
    shape = (case.b, case.s_q, case.h_q)
    inputs = MergeInputs(
        [torch.randn((*shape, case.d_v), generator=generator).to(dtype) for _ in range(case.parts)],
        [torch.randn((case.b, case.h_q, case.s_q), generator=generator) for _ in range(case.parts)],
    )
    expected, _ = reference.merge_states(inputs.outs, inputs.lses)
    work = Work(
        title=describe(case, NAME),
        case=asdict(case),
        flops=0.0,
        bytes=0.0,  # the parts are in cache: memory does not limit this
        dtype=dtype,
        tolerance=TOLERANCE[case.dtype],
    )
    return make_problem(work, inputs, [()], bind_ours, peers, expected)


def cases(quick: bool) -> list[MergeCase]:
    if quick:
        return [MergeCase(2, 4, 16, "bf16")]
    shapes = itertools.product((2, 8), (1, 16), (16, 128))
    return [MergeCase(*shape, dtype) for shape in shapes for dtype in ("bf16", "fp32")]


PEERS = (
    Peer("torch eager", "softmax of the lse, weighted sum", bind_eager),
    Peer("torch.compile", "the same, compiled by Inductor", bind_compiled, no_compiler),
)
SUITE = Suite(NAME, "partial results of attention into one", cases, problem, PEERS)
