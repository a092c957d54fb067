"""Suite ``pool``: the books of the KV pool: pages by themselves, steps of a batch, and traces of a server.

`bench.occupancy` has the memory of the same traces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench import serving
from bench.peers import vllm_blocks
from bench.runner import Problem, Work
from bench.suite import Bound, Peer, Suite, describe, make_problem
from flashmla_ops.kv_cache import KVPool
from flashmla_ops.kv_cache.native_pages import NativePages
from flashmla_ops.kv_cache.python_pages import PythonPages

NAME = "pool"
PAGES, STEPS, TRACES = "pages", "steps", "traces"
#: Pages that are held while others come and go.
HELD = 64


@dataclass(frozen=True)
class PoolCase:
    group: str
    n: int  # pages that are allocated and released, sequences of a step, or requests
    tokens: int = serving.MEMORY  # that fit in memory
    page_size: int = 16
    shared: float = 0.0  # part of the requests that begin with a system prompt
    dtype: str = ""


Bind = Callable[[PoolCase], Bound]


def churn(allocate: Callable[[], Any], release: Callable[[Any], object], free: Callable[[], int], n: int) -> Bound:
    """``n`` pages allocated one by one, each after the oldest of `HELD` was released; the pages that are free."""
    held = [allocate() for _ in range(HELD)]

    def call() -> Tensor:
        for i in range(n):
            release(held[i % HELD])
            held[i % HELD] = allocate()
        return torch.tensor([float(free())])

    return call


def bind_books(case: PoolCase, books: type[NativePages] | type[PythonPages]) -> Bound:
    pages = books(case.tokens // case.page_size, case.page_size)
    return churn(pages.allocate_one, pages.release_one, lambda: pages.n_free, case.n)


def bind_ours(case: PoolCase) -> Bound:
    if case.group == PAGES:
        return bind_books(case, NativePages)
    if case.group == STEPS:
        return bind_step(case)
    return served(case, lambda: serving.Ours(case.tokens, case.page_size))


def bind_step(case: PoolCase) -> Bound:
    """A step of ``n`` sequences, taken back afterwards."""
    pool = KVPool(layers=0, n_pages=case.n * 64, page_size=case.page_size, max_batch=case.n)
    sequences = [pool.open() for _ in range(case.n)]
    pool.step(sequences, 500).close()

    def call() -> Tensor:
        step = pool.step(sequences)
        total = step.cache_seqlens
        pool.close_step(step, written=False)
        return total.sum()[None]

    return call


def served(case: PoolCase, policy: Callable[[], serving.Policy]) -> Bound:
    requests = serving.trace(case.n, case.shared)

    def call() -> Tensor:
        outcome = serving.simulate(requests, policy())
        return torch.tensor([float(outcome.finished), float(outcome.generated)])

    return call


def bind_vllm(case: PoolCase) -> Bound:
    if case.group == PAGES:
        pool = vllm_blocks.new(case.tokens // case.page_size)
        return churn(lambda: pool.get_new_blocks(1), pool.free_blocks, pool.get_num_free_blocks, case.n)
    return served(case, lambda: serving.Blocks(case.tokens, case.page_size, vllm_blocks.new))


def only(*groups: str) -> Callable[[PoolCase], str | None]:
    return lambda case: None if case.group in groups else f"for {' and '.join(groups)}"


def problem(case: PoolCase, peers: Sequence[Peer[PoolCase]], cold_bytes: int) -> Problem:
    if case.group == PAGES:
        expected = [float(case.tokens // case.page_size - HELD)]
    elif case.group == STEPS:
        expected = [case.n * 501.0]
    else:
        expected = [float(case.n), float(sum(each.output for each in serving.trace(case.n, case.shared)))]
    work = Work(describe(case, NAME), asdict(case), flops=0.0, bytes=0.0, dtype=torch.float64, tolerance=0.0)
    return make_problem(work, case, [()], bind_ours, peers, torch.tensor(expected, dtype=torch.float64))


def cases(quick: bool) -> list[PoolCase]:
    if quick:
        return [PoolCase(PAGES, 1000), PoolCase(STEPS, 256), PoolCase(TRACES, 50)]
    steps = [PoolCase(STEPS, n) for n in (1, 16, 256)]
    traces = [PoolCase(TRACES, serving.REQUESTS, page_size=size, shared=part) for size, part in serving.TRACES]
    return [PoolCase(PAGES, 10_000), *steps, *traces]


PEERS: tuple[Peer[PoolCase], ...] = (
    Peer(
        vllm_blocks.NAME,
        "allocating and freeing its blocks; it makes no tables",
        bind_vllm,
        missing=vllm_blocks.missing,
        unfair=only(PAGES, TRACES),
    ),
    Peer("books in Python", "ours without a compiler", lambda case: bind_books(case, PythonPages), unfair=only(PAGES)),
    Peer(
        "contiguous, reserved",
        "the greatest length for each request",
        lambda case: served(case, lambda: serving.Reserved(case.tokens)),
        unfair=only(TRACES),
    ),
    Peer(
        "contiguous, growing",
        "doubled when full",
        lambda case: served(case, lambda: serving.Growing(case.tokens)),
        unfair=only(TRACES),
    ),
)
SUITE = Suite(NAME, "the books of the KV pool", cases, problem, PEERS)
