"""Suite ``arena``: what torch's own allocations cost when an arena serves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bench.runner import Problem, Work
from bench.suite import Bound, Peer, Suite, describe, make_problem
from flashmla_ops.kv_cache import Arena

NAME = "arena"


@dataclass(frozen=True)
class ArenaCase:
    operation: str  # "empty" or "zeros"
    n_bytes: int
    repeats: int = 1  # allocations in a call; each is freed before the next


@dataclass(frozen=True)
class ArenaInputs:
    case: ArenaCase
    arena: Arena


def repeated(case: ArenaCase) -> Tensor:
    """The last of a call's tensors, as torch makes them wherever it is told to."""
    make = torch.empty if case.operation == "empty" else torch.zeros
    for _ in range(case.repeats):
        made = make(case.n_bytes, dtype=torch.uint8)
    return made


def bind_ours(inputs: ArenaInputs) -> Bound:
    if inputs.case.operation == "zeros":
        return lambda: inputs.arena.zeros(inputs.case.n_bytes, dtype=torch.uint8)
    return bind_context(inputs)


def bind_context(inputs: ArenaInputs) -> Bound:
    def within() -> Tensor:
        with inputs.arena.allocator(strict=True):
            return repeated(inputs.case)

    return within


def bind_torch(inputs: ArenaInputs) -> Bound:
    return lambda: repeated(inputs.case)


def problem(case: ArenaCase, peers: Sequence[Peer[ArenaInputs]], cold_bytes: int) -> Problem:
    def read(made: Tensor) -> Tensor:
        """Its size, and whether it is zero. Then it is not: the next one must not be so by chance."""
        set_elements = int(made.count_nonzero()) if case.operation == "zeros" else 0
        made.fill_(1)
        return torch.tensor([made.numel(), set_elements], dtype=torch.float64)

    work = Work(
        title=describe(case, NAME),
        case=asdict(case),
        flops=0.0,
        bytes=0.0,
        dtype=torch.uint8,
        tolerance=0.0,
    )
    inputs = ArenaInputs(case, Arena(max(4 * case.n_bytes, 1 << 20)))
    expected = torch.tensor([case.n_bytes, 0], dtype=torch.float64)
    return make_problem(work, inputs, [()], bind_ours, peers, expected, read)


def cases(quick: bool) -> list[ArenaCase]:
    sizes = (64, 1 << 20) if quick else (64, 4 << 10, 64 << 10, 1 << 20, 16 << 20)
    zeros = (1 << 20,) if quick else (1 << 20, 16 << 20, 64 << 20, 256 << 20)
    return [*(ArenaCase("empty", n, 1000) for n in sizes), *(ArenaCase("zeros", n) for n in zeros)]


PEERS = (
    Peer("torch", "outside of the arena", bind_torch),
    Peer(
        "torch.zeros in the arena",
        "which writes all of it",
        bind_context,
        unfair=lambda inputs: None if inputs.case.operation == "zeros" else "the same as ours",
    ),
)
SUITE = Suite(NAME, "torch's allocations, from an arena and as they are", cases, problem, PEERS)
