"""Suite ``scaling``: time per token as sequences grow, and what a second thread is worth where arithmetic limits.

Each is timed in turns with what it is compared with: short sequences of as many tokens together, and fewer threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench import dense, paged
from bench.dense import PrefillCase
from bench.paged import PagedCase
from bench.runner import OURS, Problem
from bench.suite import Peer, Suite, describe

NAME = "scaling"
#: Groups of cases.
LENGTHS, THREADS = "lengths", "threads"
SHORTEST = 4096
#: The implementation that is not a peer: our kernel on the shortest sequences, as often as it takes.
SHORT = f"{SHORTEST} tokens a call"
#: The operators that are timed, by name: a case of the other suites, but for its length.
OPERATORS: dict[str, PagedCase | PrefillCase] = {
    "MLA decode, h_q 16": PagedCase(1, 16, 0, "bf16"),
    "MLA decode, h_q 128": PagedCase(1, 128, 0, "bf16"),
    "GQA decode, 64/8 heads": PagedCase(1, 64, 0, "bf16", h_kv=8, d_qk=128, d_v=128, cache="[V, K] rows"),
    "prefill, 16 heads": PrefillCase((), 192, 128, True, "bf16"),
}


@dataclass(frozen=True)
class ScalingCase:
    operator: str
    s_kv: int  # tokens of the only sequence
    threads: int
    group: str

    @property
    def concrete(self) -> PagedCase | PrefillCase:
        """The case of another suite that is timed here."""
        case = OPERATORS[self.operator]
        if isinstance(case, PagedCase):
            return replace(case, s_kv=self.s_kv)
        return replace(case, s=(self.s_kv,))


def problem(case: ScalingCase, peers: Sequence[Peer[Any]], cold_bytes: int) -> Problem:
    """The problem of the other suite, beside what the case is compared with."""
    made = concrete_problem(case, cold_bytes)
    work = replace(made.work, title=describe(case, NAME), case=asdict(case) | {"dtype": case.concrete.dtype})
    if case.group == THREADS:
        calls = {name: on_threads(n, made.calls[OURS]) for name, n in thread_counts(case.threads).items()}
        return replace(made, work=work, calls=calls)
    if case.s_kv == SHORTEST:
        return replace(made, work=work)
    short = concrete_problem(replace(case, s_kv=SHORTEST), cold_bytes)
    calls = {**made.calls, SHORT: repeated(short.calls[OURS], case.s_kv // SHORTEST)}
    return replace(made, work=work, calls=calls, others={SHORT: short.expected})


def concrete_problem(case: ScalingCase, cold_bytes: int) -> Problem:
    concrete = case.concrete
    if isinstance(concrete, PagedCase):
        return paged.problem(NAME, concrete, (), cold_bytes)
    return dense.problem(NAME, concrete, (), cold_bytes)


def repeated(call: Callable[[], Tensor], times: int) -> Callable[[], Tensor]:
    def run() -> Tensor:
        for _ in range(times - 1):
            call()
        return call()

    return run


def thread_counts(threads: int) -> dict[str, int]:
    """The implementations of a case of `THREADS`: ours on fewer threads than the case's, and on all."""
    return {**{f"on {n}": n for n in range(1, threads)}, OURS: threads}


def on_threads(threads: int, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        torch.set_num_threads(threads)
        return call()

    return run


def cases(quick: bool) -> list[ScalingCase]:
    threads = torch.get_num_threads()
    decodes = [name for name, case in OPERATORS.items() if isinstance(case, PagedCase)]
    lengths = [SHORTEST << i for i in range(2 if quick else 6)]
    bound = ("MLA decode, h_q 16", "MLA decode, h_q 128", "prefill, 16 heads")
    return [
        *(ScalingCase(name, s_kv, threads, LENGTHS) for name, s_kv in itertools.product(decodes, lengths)),
        *(ScalingCase(name, SHORTEST, threads, THREADS) for name in bound),
    ]


SUITE = Suite(NAME, "time per token over lengths, and threads", cases, problem, ())
