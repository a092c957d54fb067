"""Suite ``prefill``: dense attention of many query tokens, of one sequence or several of different lengths."""

from __future__ import annotations

import itertools
from functools import partial

from bench import dense
from bench.dense import PrefillCase
from bench.peers import torch_prefill, vllm_cpu, zentorch
from bench.suite import Suite

NAME = "prefill"
WIDTHS = ((192, 128), (128, 128), (64, 64))  # d_qk, d_v
RAGGED = (1024, 256, 2048, 768)


def cases(quick: bool) -> list[PrefillCase]:
    lengths = (256,) if quick else (1024, 4096)
    grid = itertools.product(("bf16", "fp32"), WIDTHS[:1] if quick else WIDTHS, lengths, (True, False))
    wide, even = WIDTHS[:2]
    ragged = (64, 192) if quick else RAGGED
    return [
        *(PrefillCase((s,), d_qk, d_v, causal, dtype) for dtype, (d_qk, d_v), s, causal in grid),
        *(PrefillCase(ragged, *wide, causal, "bf16", group="ragged") for causal in (True, False)),
        *(PrefillCase((lengths[-1],), *even, True, "bf16", h_kv=h_kv, group="h_kv < h_q") for h_kv in (4, 1)),
    ]


PEERS = (*torch_prefill.PEERS, zentorch.PREFILL, vllm_cpu.PREFILL)
SUITE = Suite(NAME, "dense attention of many query tokens", cases, partial(dense.problem, NAME), PEERS)
