"""Suite ``gqa_decode``: grouped-query decode over a paged cache, which memory bandwidth limits."""

from __future__ import annotations

import itertools
from functools import partial

from bench import paged
from bench.paged import PagedCase
from bench.peers import torch_paged, vllm_cpu, zentorch
from bench.suite import Suite

NAME = "gqa_decode"
HEADS = ((64, 8, 128), (9, 3, 64))  # h_q, h_kv, d


def cases(quick: bool) -> list[PagedCase]:
    batches, lengths = ((1, 4), (1024,)) if quick else ((1, 4, 16), (1024, 4096))
    return [
        PagedCase(b, h_q, s_kv, "bf16", h_kv=h_kv, d_qk=d, d_v=d, cache=cache)
        for cache in ("[V, K] rows", "V and K")
        for (h_q, h_kv, d), b, s_kv in itertools.product(HEADS, batches, lengths)
    ]


PEERS = (*torch_paged.GQA_PEERS, zentorch.PAGED, vllm_cpu.PAGED)
SUITE = Suite(NAME, "grouped-query decode over a paged cache", cases, partial(paged.problem, NAME), PEERS)
