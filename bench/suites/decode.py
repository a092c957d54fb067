"""Suite ``decode``: absorbed MLA decode over a paged cache: the grid, and the shapes beside it."""

from __future__ import annotations

import itertools
from functools import partial

from bench import paged
from bench.paged import PagedCase
from bench.peers import torch_paged, vllm_cpu, zentorch
from bench.suite import Suite

NAME = "decode"
ODD_HEADS = (1, 3, 8, 9, 63, 126)
PAGE_SIZES = (1, 16, 61, 256)


def grid(dtype: str) -> list[PagedCase]:
    shapes = [
        *itertools.product((1, 4, 16), (16, 64, 128), (1024, 4096)),
        *itertools.product((1, 4), (16, 64, 128), (16384,)),
    ]
    return [PagedCase(*shape, dtype) for shape in sorted(shapes)]


def shapes() -> list[PagedCase]:
    """What the grid leaves out, each beside the case of the grid that it is compared with."""
    shape = partial(PagedCase, b=4, s_kv=4096, dtype="bf16", group="shapes")
    return [
        *(shape(h_q=heads) for heads in (*ODD_HEADS, 16, 64, 128)),
        *(shape(h_q=16, s_q=tokens) for tokens in (2, 4)),
        *(shape(h_q=heads, b=16, varying=varying) for heads in (16, 128) for varying in (False, True)),
        *(shape(h_q=heads, page_size=size) for heads in (16, 128) for size in (*PAGE_SIZES, 4096)),
        *(shape(h_q=heads, cache="two tensors") for heads in (16, 128)),
    ]


def cases(quick: bool) -> list[PagedCase]:
    if quick:
        small = [c for dtype in ("bf16", "fp32") for c in grid(dtype) if c.b < 16 and c.h_q != 64 and c.s_kv == 1024]
        return [*small, PagedCase(4, 16, 1024, "bf16", s_q=2, page_size=61, varying=True, group="shapes")]
    half = [PagedCase(4, h_q, 4096, "fp16", group="fp16") for h_q in (16, 128)]
    return [*grid("bf16"), *grid("fp32"), *half, *shapes()]


PEERS = (*torch_paged.PEERS, zentorch.PAGED, vllm_cpu.PAGED)
SUITE = Suite(NAME, "absorbed MLA decode over a paged cache", cases, partial(paged.problem, NAME), PEERS)
