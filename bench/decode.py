"""Suite ``decode``: absorbed MLA decode over a paged cache, equal lengths, one query token a sequence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import flashmla_ops  # noqa: F401 (defines torch.ops.flashmla)
from bench.peers import Decode, DecodeInputs, Peer
from bench.runner import OURS, Problem, Work
from flashmla_ops import reference

NAME = "decode"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Largest relative error of an output row (one query head) that passes for correct.
TOLERANCE = {"bf16": 3e-2, "fp16": 5e-3, "fp32": 1e-4}
MOST_CACHES = 64


@dataclass(frozen=True)
class DecodeCase:
    b: int
    h_q: int
    s_kv: int
    dtype: str
    page_size: int = 64
    d_qk: int = 576
    d_v: int = 512

    def __str__(self) -> str:
        return f"decode b {self.b}, h_q {self.h_q}, s_kv {self.s_kv}, {self.dtype}"

    @property
    def flops(self) -> float:
        return 2.0 * self.b * self.h_q * self.s_kv * (self.d_qk + self.d_v)

    @property
    def cache_bytes(self) -> int:
        return self.b * self.s_kv * self.d_qk * DTYPES[self.dtype].itemsize


def cases(*, quick: bool, dtypes: Iterable[str]) -> list[DecodeCase]:
    """The suite; with ``quick``, only its small cases."""
    batches, lengths = ((1, 4), (1024,)) if quick else ((1, 4, 16), (1024, 4096))
    return [DecodeCase(*shape, dtype) for dtype in dtypes for shape in itertools.product(batches, (16, 128), lengths)]


def make_inputs(case: DecodeCase, cold_bytes: int, seed: int = 0) -> DecodeInputs:
    """Random rows in shuffled pages, in as many equal caches as it takes to reach ``cold_bytes``."""
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.dtype]
    max_pages = -(-case.s_kv // case.page_size)
    n_pages = case.b * max_pages
    rows = torch.randn((n_pages, case.page_size, 1, case.d_qk), generator=generator).to(dtype)
    copies = min(MOST_CACHES, max(1, -(-cold_bytes // case.cache_bytes)))
    return DecodeInputs(
        q=torch.randn((case.b, 1, case.h_q, case.d_qk), generator=generator).to(dtype),
        caches=(rows, *(rows.clone() for _ in range(copies - 1))),
        block_table=torch.randperm(n_pages, generator=generator).view(case.b, max_pages).int(),
        cache_seqlens=torch.full((case.b,), case.s_kv, dtype=torch.int32),
        d_v=case.d_v,
        softmax_scale=case.d_qk**-0.5,
    )


def exact(inputs: DecodeInputs) -> Tensor:
    """The float64 result. With one KV head a query head may as well be a query token, which needs far less memory."""
    heads_as_tokens = inputs.q.transpose(1, 2)  # [b, h_q, 1, d_qk]
    out, _ = reference.decode(
        heads_as_tokens,
        inputs.caches[0],
        None,
        inputs.block_table,
        inputs.cache_seqlens,
        inputs.d_v,
        softmax_scale=inputs.softmax_scale,
    )
    return out.transpose(1, 2)


def bind_ours(inputs: DecodeInputs) -> Decode:
    def decode(kv_cache: Tensor) -> Tensor:
        out: Tensor = torch.ops.flashmla.decode(
            inputs.q,
            kv_cache,
            None,
            inputs.block_table,
            inputs.cache_seqlens,
            inputs.d_v,
            softmax_scale=inputs.softmax_scale,
        )[0]
        return out

    return decode


def problems(wanted: Iterable[DecodeCase], peers: Iterable[Peer], cold_bytes: int) -> Iterator[Problem]:
    """The cases with everything that can run them, each made when asked for: one case's tensors live at a time."""
    peers = tuple(peers)
    return (make_problem(case, peers, cold_bytes) for case in wanted)


def make_problem(case: DecodeCase, peers: Iterable[Peer], cold_bytes: int) -> Problem:
    inputs = make_inputs(case, cold_bytes)
    calls = {OURS: rotating(bind_ours(inputs), inputs.caches)}
    skipped = {}
    for peer in peers:
        if reason := peer.missing():
            skipped[peer.name] = reason
        else:
            calls[peer.name] = rotating(peer.bind(inputs), inputs.caches)
    work = Work(
        title=str(case),
        case=asdict(case),
        flops=case.flops,
        bytes=case.cache_bytes,
        dtype=DTYPES[case.dtype],
        tolerance=TOLERANCE[case.dtype],
    )
    return Problem(work, calls, skipped, exact(inputs))


def rotating(decode: Decode, caches: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """A call that reads another cache each time."""
    turn = itertools.cycle(caches)
    return lambda: decode(next(turn))
