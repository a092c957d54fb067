"""A suite: cases, and how one case becomes a `Problem` with everything that can run it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

import flashmla_ops  # noqa: F401 (defines torch.ops.flashmla)
from bench.runner import OURS, Problem, Work

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Largest relative error of a row of the result that passes for correct.
TOLERANCE = {"bf16": 3e-2, "fp16": 5e-3, "fp32": 1e-4}
MOST_COPIES = 64

Inputs = TypeVar("Inputs")
#: An implementation bound to a case. It takes one copy of what must come from memory, and returns a tensor, or what the
#: problem's ``read`` makes one of.
Bound = Callable[..., Any]


def always(*_: object) -> None:
    """The reason of a peer that is never missing and can run every case."""


@dataclass(frozen=True)
class Peer(Generic[Inputs]):
    """Another implementation of a suite's operator: a plugin."""

    name: str
    description: str
    bind: Callable[[Inputs], Bound]
    #: Why this machine cannot run it, or None.
    missing: Callable[[], str | None] = always
    #: Why it cannot run a case as its authors would, or None.
    unfair: Callable[[Inputs], str | None] = always


@dataclass(frozen=True)
class Suite:
    """``problem(case, peers, cold_bytes)`` makes a case concrete, with data of ``cold_bytes`` to rotate through."""

    name: str
    description: str
    cases: Callable[[bool], Sequence[Any]]  # dataclasses; with True, small ones only
    problem: Callable[[Any, Sequence[Peer[Any]], int], Problem]
    peers: Sequence[Peer[Any]]
    #: Why nothing of it can run here, or None.
    missing: Callable[[], str | None] = always

    def problems(self, cases: Iterable[Any], peers: Sequence[Peer[Any]], cold_bytes: int) -> Iterator[Problem]:
        """Problems, each made when asked for: one case's tensors live at a time."""
        return (self.problem(case, peers, cold_bytes) for case in cases)


def make_problem(
    work: Work,
    inputs: Inputs,
    copies: Sequence[tuple[Any, ...]],
    ours: Callable[[Inputs], Bound],
    peers: Iterable[Peer[Inputs]],
    expected: Tensor,
    read: Callable[[Any], Tensor] | None = None,
) -> Problem:
    """Our implementation and the peers, each bound to ``inputs`` and called with the next of ``copies`` each time."""
    calls = {OURS: rotating(ours(inputs), copies)}
    skipped = {}
    for peer in peers:
        if reason := peer.missing() or peer.unfair(inputs):
            skipped[peer.name] = reason
        else:
            calls[peer.name] = rotating(peer.bind(inputs), copies)
    return Problem(work, calls, skipped, expected, *(() if read is None else (read,)))


def rotating(bound: Bound, copies: Sequence[tuple[Any, ...]]) -> Callable[[], Any]:
    """A call that reads another copy each time."""
    turn = itertools.cycle(copies)
    return lambda: bound(*next(turn))


def clone_as_it_lies(tensor: Tensor) -> Tensor:
    """A copy of the whole storage: a view into it keeps its strides and its neighbours."""
    whole = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0).clone()
    return torch.as_strided(whole, tensor.size(), tensor.stride(), tensor.storage_offset())


def copies_of(
    tensors: tuple[Tensor | None, ...], cold_bytes: int, clone: Callable[[Tensor], Tensor] = clone_as_it_lies
) -> list[tuple[Any, ...]]:
    """The tensors and as many equal copies, with the same strides, as it takes to reach ``cold_bytes``."""
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    count = min(MOST_COPIES, max(1, -(-cold_bytes // size)))
    clones = [tuple(None if t is None else clone(t) for t in tensors) for _ in range(count - 1)]
    return [tensors, *clones]


def describe(case: Any, suite: str) -> str:
    """``decode: b 1, h_q 16, ...``: a case in one line, without what is as usual."""
    values = ((field.name, getattr(case, field.name), field.default) for field in fields(case))
    return f"{suite}: " + ", ".join(f"{name} {value}" for name, value, usual in values if value != usual)
