"""vmap over the operators is the same as a Python loop over them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.cases import DecodeCase, build

CASE = DecodeCase((5, 0, 40), s_q=2, h_q=9, d=24, d_v=16, page_size=8, causal=True, dtype="float32", strided=False)


def attend(q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.flashmla.decode(q, kv_cache, None, block_table, cache_seqlens, CASE.d_v, causal=CASE.causal)


@pytest.mark.parametrize("in_dims", [(0, None, None, None), (2, 0, None, None), (0, 1, 0, 0), (None, 0, None, 0)])
def test_decode(in_dims: tuple[int | None, ...]) -> None:
    inputs = build(CASE)
    plain = (inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
    mapped = [
        x if dim is None else torch.stack([x, x.flip(0) if i == 3 else x * 1, x], dim)
        for i, (x, dim) in enumerate(zip(plain, in_dims, strict=True))
    ]
    if in_dims[3] is not None:  # other lengths need other pages
        mapped[3] = torch.stack([inputs.cache_seqlens, inputs.cache_seqlens // 2, inputs.cache_seqlens])
    out, lse = torch.vmap(attend, in_dims)(*mapped)
    for i in range(3):
        one = [x if dim is None else x.select(dim, i) for x, dim in zip(mapped, in_dims, strict=True)]
        expected = attend(*one)
        assert torch.equal(out[i], expected[0])
        assert torch.equal(lse[i], expected[1])


def test_decode_does_not_reach_into_another_cache() -> None:
    inputs = build(CASE)
    caches = torch.stack([inputs.kv_cache, inputs.kv_cache])
    table = inputs.block_table.clone()
    table[2, 0] = inputs.kv_cache.size(0)  # one past the end: the first page of the next cache, were it only added to
    with pytest.raises(RuntimeError, match="block_table"):
        torch.vmap(attend, (None, 0, None, None))(inputs.q, caches, table, inputs.cache_seqlens)


def test_decode_refuses_a_schedule() -> None:
    inputs = build(CASE)
    plan = torch.ops.flashmla.decode_schedule(inputs.cache_seqlens, 2, 9, 1, 2)

    def planned(q: Tensor) -> Tensor:
        table, lengths = inputs.block_table, inputs.cache_seqlens
        return torch.ops.flashmla.decode(q, inputs.kv_cache, None, table, lengths, CASE.d_v, schedule=plan)[0]

    with pytest.raises(RuntimeError, match="argument 'schedule': expected None under vmap"):
        torch.vmap(planned)(torch.stack([inputs.q, inputs.q]))


@pytest.mark.parametrize("batched", [True, False])
def test_merge_states(batched: bool) -> None:
    shape = (2, 3, 4) if batched else (3, 4)
    outs = torch.randn(5, 2, *shape, 8)
    lses = torch.randn(5, 2, *shape).transpose(-1, -2)

    def merge(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.flashmla.merge_states(list(out), list(lse))

    out, lse = torch.vmap(merge)(outs, lses)
    for i in range(5):
        expected = merge(outs[i], lses[i])
        assert torch.equal(out[i], expected[0])
        assert torch.equal(lse[i], expected[1])
