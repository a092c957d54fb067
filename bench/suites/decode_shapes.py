"""Suite ``decode_shapes``: what the shape of a decode costs, timed in turns with the usual shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from bench import paged
from bench.paged import PagedCase, PagedInputs
from bench.runner import OURS, Problem
from bench.suite import Peer, Suite

NAME = "decode_shapes"
#: The implementation that is not a peer: our kernel at the usual shape.
USUAL = "the usual shape"
ODD_HEADS = (1, 3, 8, 9, 63, 126)
PAGE_SIZES = (1, 16, 61, 256, 4096)


def usual(case: PagedCase) -> PagedCase:
    """The shape that kernels are made for, with as many tokens and no fewer heads."""
    full = -(-case.h_q // 16) * 16
    return replace(case, h_q=full, page_size=64, cache="one tensor", varying=False)


def problem(case: PagedCase, peers: Sequence[Peer[PagedInputs]], cold_bytes: int) -> Problem:
    made = paged.problem(NAME, case, peers, cold_bytes)
    other = paged.problem(NAME, usual(case), (), cold_bytes)
    return replace(made, calls={**made.calls, USUAL: other.calls[OURS]}, others={USUAL: other.expected})


def cases(quick: bool) -> list[PagedCase]:
    shape = partial(PagedCase, b=4, s_kv=1024 if quick else 4096, dtype="bf16")
    full = (16,) if quick else (16, 128)
    return [
        *(shape(h_q=h_q, group="heads") for h_q in ODD_HEADS[: 1 if quick else None]),
        *(shape(h_q=h_q, b=16, varying=True, group="lengths") for h_q in full),
        *(shape(h_q=h_q, page_size=size, group="page size") for h_q in full for size in PAGE_SIZES),
        *(shape(h_q=h_q, cache="two tensors", group="two tensors") for h_q in full),
    ]


SUITE = Suite(NAME, "decode of odd shapes beside usual ones", cases, problem, ())
