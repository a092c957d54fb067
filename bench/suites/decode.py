"""Suite ``decode``: absorbed MLA decode over a paged cache."""

from __future__ import annotations

import itertools
from functools import partial

from bench import paged
from bench.paged import PagedCase
from bench.peers import torch_paged, vllm_cpu, zentorch
from bench.suite import Suite

NAME = "decode"


def grid(dtype: str) -> list[PagedCase]:
    shapes = [
        *itertools.product((1, 4, 16), (16, 64, 128), (1024, 4096)),
        *itertools.product((1, 4), (16, 64, 128), (16384,)),
    ]
    return [PagedCase(*shape, dtype) for shape in sorted(shapes)]


def cases(quick: bool) -> list[PagedCase]:
    if quick:
        small = [c for dtype in ("bf16", "fp32") for c in grid(dtype) if c.b < 16 and c.h_q != 64 and c.s_kv == 1024]
        return [*small, PagedCase(4, 16, 1024, "bf16", s_q=2, page_size=61, varying=True, group="speculative")]
    half = [PagedCase(4, h_q, 4096, "fp16", group="fp16") for h_q in (16, 128)]
    speculative = [PagedCase(4, 16, 4096, "bf16", s_q=s_q, group="speculative") for s_q in (2, 4)]
    return [*grid("bf16"), *grid("fp32"), *half, *speculative]


PEERS = (*torch_paged.PEERS, zentorch.PAGED, vllm_cpu.PAGED)
SUITE = Suite(NAME, "absorbed MLA decode over a paged cache", cases, partial(paged.problem, NAME), PEERS)
