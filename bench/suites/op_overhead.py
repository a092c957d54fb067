"""Suite ``op_overhead``: what a call costs when there is hardly anything to compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bench.runner import Problem, Work
from bench.suite import TOLERANCE, Bound, Peer, Suite, describe, make_problem
from flashmla_ops import reference

NAME = "op_overhead"


@dataclass(frozen=True)
class OverheadCase:
    operator: str
    dtype: str = "fp32"


@dataclass(frozen=True)
class OverheadInputs:
    call: Callable[[], Tensor]
    result: Tensor  # of the operator


def tiny_decode() -> tuple[Callable[[], Tensor], Tensor]:
    q, cache = torch.ones(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    expected, _ = reference.decode(q, cache, None, table, lengths, 16)
    return lambda: torch.ops.flashmla.decode(q, cache, None, table, lengths, 16)[0], expected


def tiny_append() -> tuple[Callable[[], Tensor], Tensor]:
    cache, rows, slots = torch.zeros(1, 1, 1, 16), torch.randn(1, 1, 16), torch.zeros(1, dtype=torch.int64)

    def append() -> Tensor:
        torch.ops.flashmla.append_(cache, rows, slots)
        return cache

    return append, rows.double().unsqueeze(0)


def tiny_merge() -> tuple[Callable[[], Tensor], Tensor]:
    outs, lses = [torch.randn(1, 1, 16) for _ in range(2)], [torch.randn(1, 1) for _ in range(2)]
    return lambda: torch.ops.flashmla.merge_states(outs, lses)[0], reference.merge_states(outs, lses)[0]


def tiny_prefill() -> tuple[Callable[[], Tensor], Tensor]:
    q, k, v = (torch.randn(1, 1, 16) for _ in range(3))
    bounds = torch.tensor([0, 1], dtype=torch.int32)
    return lambda: torch.ops.flashmla.prefill(q, k, v, bounds, bounds)[0], reference.prefill(q, k, v, bounds, bounds)[0]


def tiny_gemm() -> tuple[Callable[[], Tensor], Tensor]:
    a, weight = torch.randn(1, 16), torch.randn(16, 16)
    return lambda: torch.ops.flashmla.gemm(a, weight), reference.gemm(a, weight)


OPERATORS = {
    "decode": tiny_decode,
    "append_": tiny_append,
    "merge_states": tiny_merge,
    "prefill": tiny_prefill,
    "gemm": tiny_gemm,
}


def bind_add(inputs: OverheadInputs) -> Bound:
    """Adds nothing to the operator's result, and so returns the same."""
    nothing = torch.zeros_like(inputs.result)
    return lambda: torch.ops.aten.add(inputs.result, nothing)


def problem(case: OverheadCase, peers: Sequence[Peer[OverheadInputs]], cold_bytes: int) -> Problem:
    torch.manual_seed(0)
    call, expected = OPERATORS[case.operator]()
    inputs = OverheadInputs(call, expected.to(torch.float32))
    work = Work(
        title=describe(case, NAME),
        case=asdict(case),
        flops=0.0,
        bytes=0.0,
        dtype=torch.float32,
        tolerance=TOLERANCE[case.dtype],
    )
    return make_problem(work, inputs, [()], lambda made: made.call, peers, expected)


def cases(quick: bool) -> list[OverheadCase]:
    return [OverheadCase(name) for name in OPERATORS]


PEERS = (Peer("aten::add", "a tensor of the same size plus zeros: what any operator's call costs", bind_add),)
SUITE = Suite(NAME, "calls at tiny sizes", cases, problem, PEERS)
