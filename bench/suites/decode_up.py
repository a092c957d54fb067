"""Suite ``decode_up``: decode and the product of each head's result with its W_UV, as MLA needs them both."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bench.paged import PagedCase, PagedInputs, clone_cache, exact, make_inputs
from bench.runner import Problem, Work
from bench.suite import DTYPES, TOLERANCE, Bound, Peer, Suite, clone_as_it_lies, copies_of, describe, make_problem

NAME = "decode_up"
D_NOPE, D_UP = 128, 128  # of a head: its part of kv_b_proj is [D_NOPE + D_UP, d_v]


@dataclass(frozen=True)
class UpCase:
    b: int
    h_q: int
    s_kv: int
    dtype: str
    s_q: int = 1
    d_up: int = D_UP
    group: str = "grid"

    @property
    def decode(self) -> PagedCase:
        return PagedCase(self.b, self.h_q, self.s_kv, self.dtype, self.s_q)

    @property
    def flops(self) -> float:
        return self.decode.flops + 2.0 * self.b * self.s_q * self.h_q * self.decode.d_v * self.d_up

    @property
    def bytes(self) -> int:
        """Bytes of the cache and the weights."""
        weights = self.h_q * self.decode.d_v * self.d_up * DTYPES[self.dtype].itemsize
        return self.decode.cache_bytes + weights


@dataclass(frozen=True)
class UpInputs:
    case: UpCase
    decode: PagedInputs
    copies: Sequence[tuple[Tensor, Tensor]]  # kv_cache [n_pages, page_size, 1, d], weight [h_q, d_v, d_up]


def make_up(case: UpCase, cold_bytes: int) -> UpInputs:
    """Weights as absorbed attention has them: views into kv_b_proj."""
    inputs = make_inputs(case.decode, 0)
    generator = torch.Generator().manual_seed(1)
    kv_b_proj = torch.randn((case.h_q, D_NOPE + case.d_up, case.decode.d_v), generator=generator)
    weight = kv_b_proj.to(DTYPES[case.dtype])[:, D_NOPE:].transpose(1, 2)
    cache = inputs.copies[0][0]

    def clone(tensor: Tensor) -> Tensor:
        return clone_cache(tensor) if tensor is cache else clone_as_it_lies(tensor)

    return UpInputs(case, inputs, copies_of((cache, weight), cold_bytes, clone))


def bind_ours(inputs: UpInputs) -> Bound:
    d = inputs.decode

    def decode_up(kv_cache: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = torch.ops.flashmla.decode_up(
            d.q,
            kv_cache,
            None,
            d.block_table,
            d.cache_seqlens,
            weight,
            d.case.d_v,
            softmax_scale=d.softmax_scale,
            causal=d.case.s_q > 1,
        )[0]
        return out

    return decode_up


def bind_two(multiply: Callable[[Tensor, Tensor], Tensor]) -> Callable[[UpInputs], Bound]:
    """Decode, then a product of [h_q, b * s_q, d_v] by [h_q, d_v, d_up], and its result in the order of tokens."""

    def bind(inputs: UpInputs) -> Bound:
        d, case = inputs.decode, inputs.case

        def run(kv_cache: Tensor, weight: Tensor) -> Tensor:
            attended = torch.ops.flashmla.decode(
                d.q,
                kv_cache,
                None,
                d.block_table,
                d.cache_seqlens,
                d.case.d_v,
                softmax_scale=d.softmax_scale,
                causal=d.case.s_q > 1,
            )[0]
            by_head = attended.view(case.b * case.s_q, case.h_q, -1).transpose(0, 1)
            values = multiply(by_head, weight).transpose(0, 1)
            return values.reshape(case.b, case.s_q, case.h_q, case.d_up)

        return run

    return bind


def problem(case: UpCase, peers: Sequence[Peer[UpInputs]], cold_bytes: int) -> Problem:
    inputs = make_up(case, cold_bytes)
    work = Work(
        title=describe(case, NAME),
        case=asdict(case),
        flops=case.flops,
        bytes=case.bytes,
        dtype=DTYPES[case.dtype],
        tolerance=TOLERANCE[case.dtype],
    )
    weight = inputs.copies[0][1].double()
    expected = torch.einsum("bshv,hvu->bshu", exact(inputs.decode), weight)
    return make_problem(work, inputs, inputs.copies, bind_ours, peers, expected)


def cases(quick: bool) -> list[UpCase]:
    if quick:
        return [UpCase(1, 16, 1024, "bf16")]
    grid = itertools.product((16, 128), (1, 4, 16), (1024, 4096))
    return [
        *(UpCase(b, h_q, s_kv, "bf16") for h_q, b, s_kv in grid),
        *(UpCase(b, 16, 4096, "fp32", group="fp32") for b in (1, 4)),
    ]


PEERS = (
    Peer("decode + bmm", "flashmla::decode, then flashmla::bmm", bind_two(lambda a, w: torch.ops.flashmla.bmm(a, w))),
    Peer("decode + torch.bmm", "flashmla::decode, then torch.bmm", bind_two(torch.bmm)),
)
SUITE = Suite(NAME, "decode with the per-head value up-projection", cases, problem, PEERS)
