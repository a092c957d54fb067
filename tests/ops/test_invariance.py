"""Changes that leave a result as it is: places of pages, strides, how key and value are stored, others' data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import strategies
from tests.support.cases import DecodeCase, DecodeInputs, build
from tests.support.compare import difference
from tests.support.oracle import tolerances
from tests.support.poison import bits, same_bits, strided

CASE = DecodeCase(lengths=(200, 0, 65, 1, 128), s_q=2, h_q=9, causal=True, num_parts=3, q_spread=3.0)


def decode(inputs: DecodeInputs, **changes: object) -> tuple[Tensor, Tensor]:
    return torch.ops.flashmla.decode(**inputs.kwargs(**changes))


def assert_same_bits(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> None:
    assert same_bits(one[0], two[0]), "out"
    assert same_bits(one[1], two[1]), "lse"


@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_two_tensors_are_one_tensor(dtype: str) -> None:
    one = build(replace(CASE, dtype=dtype))
    latent, rotary = one.kv_cache[..., :512].contiguous(), one.kv_cache[..., 512:].contiguous()
    assert_same_bits(decode(one), decode(one, kv_cache=latent, k_cache=rotary))


@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_views_of_one_tensor_as_two(dtype: str) -> None:
    """[V, K] rows as one tensor, and as two views of the same memory."""
    one = build(replace(CASE, dtype=dtype, h_kv=3, d=128, d_v=64, qk_start=64))
    value, key = one.kv_cache[..., :64], one.kv_cache[..., 64:]
    assert_same_bits(decode(one), decode(one, kv_cache=value, k_cache=key))


@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_mla_is_gqa_with_the_value_repeated_in_the_row(dtype: str) -> None:
    mla = build(replace(CASE, dtype=dtype))
    both = torch.cat([mla.kv_cache[..., :512], mla.kv_cache], dim=-1)
    assert_same_bits(decode(mla), decode(mla, kv_cache=both, qk_start=512))


@settings(max_examples=150)
@given(strategies.decode_cases(), st.integers(0, 2**31))
def test_order_of_the_pages(case: DecodeCase, seed: int) -> None:
    inputs = build(replace(case, strided=False))
    order = torch.randperm(inputs.kv_cache.size(0), generator=torch.Generator().manual_seed(seed))
    table = inputs.block_table.clone()
    live = table < order.numel()
    table[live] = order.argsort()[table[live].long()].int()
    k_cache = None if inputs.k_cache is None else inputs.k_cache[order]
    moved = decode(inputs, kv_cache=inputs.kv_cache[order], k_cache=k_cache, block_table=table)
    assert_same_bits(decode(inputs), moved)


@settings(max_examples=150)
@given(strategies.decode_cases(), st.integers(0, 2**31))
def test_strides(case: DecodeCase, seed: int) -> None:
    inputs = build(replace(case, strided=False))
    generator = torch.Generator().manual_seed(seed)
    rows = {name: getattr(inputs, name) for name in ("q", "kv_cache", "k_cache")}
    others = {name: getattr(inputs, name) for name in ("block_table", "cache_seqlens", "schedule", "attn_sink")}
    changes = {name: strided(x, generator) for name, x in rows.items() if x is not None}
    changes |= {name: strided(x, generator, contiguous_rows=False) for name, x in others.items() if x is not None}
    assert_same_bits(decode(inputs), decode(inputs, **changes))


@pytest.mark.parametrize("page_size", [1, 3, 16, 100, 256])
@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_page_size(page_size: int, dtype: str) -> None:
    """The same rows in pages of another size."""
    case = replace(CASE, dtype=dtype, strided=False)
    inputs = build(case)
    counts = [-(-length // page_size) for length in case.lengths]
    cache = inputs.kv_cache.new_full((sum(counts), page_size, 1, case.d), torch.nan)
    table = torch.full((len(counts), max(counts)), -1, dtype=torch.int32)
    taken = 0
    for i, (count, length) in enumerate(zip(counts, case.lengths, strict=True)):
        table[i, :count] = torch.arange(taken, taken + count)
        for t in range(length):
            page = int(inputs.block_table[i, t // 64])
            cache[taken + t // page_size, t % page_size] = inputs.kv_cache[page, t % 64]
        taken += count
    out, lse = decode(inputs, kv_cache=cache, block_table=table)
    expected, expected_lse = decode(inputs)
    out_tolerance, lse_tolerance = tolerances(case, inputs)
    assert difference("out", out, expected, out_tolerance) is None
    assert difference("lse", lse, expected_lse, lse_tolerance) is None


@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_sequences_that_share_pages(dtype: str) -> None:
    """Two sequences with a common prefix read the very same pages."""
    case = replace(CASE, dtype=dtype, lengths=(192, 192), causal=False, num_parts=None, strided=False)
    inputs = build(case)
    shared = inputs.block_table.clone()
    shared[1, :2] = shared[0, :2]
    apart = inputs.kv_cache.clone()
    apart[inputs.block_table[1, :2].long()] = apart[inputs.block_table[0, :2].long()]
    assert_same_bits(decode(inputs, block_table=shared), decode(inputs, kv_cache=apart))


@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_expanded_inputs(dtype: str) -> None:
    """A stride of 0: one query for all sequences and heads, one block table row for all."""
    inputs = build(replace(CASE, dtype=dtype, lengths=(130, 130, 130), num_parts=None))
    q = inputs.q[:1, :, :1].expand_as(inputs.q)
    table = inputs.block_table[:1].expand_as(inputs.block_table)
    out, lse = decode(inputs, q=q, block_table=table)
    plain = decode(inputs, q=q.contiguous(), block_table=table.contiguous())
    assert_same_bits((out, lse), plain)


@pytest.mark.parametrize("dtype", strategies.DTYPES)
@pytest.mark.parametrize("lay_out", [False, True])
def test_out_variant(dtype: str, lay_out: bool) -> None:
    inputs = build(replace(CASE, dtype=dtype))
    out, lse = decode(inputs)
    generator = torch.Generator().manual_seed(0)
    into, lse_into = torch.full_like(out, torch.nan), torch.full_like(lse, torch.nan)
    if lay_out:
        into, lse_into = strided(into, generator), strided(lse_into, generator, contiguous_rows=False)
    assert torch.ops.flashmla.decode.out(**inputs.kwargs(), out=into, lse=lse_into) is None
    assert_same_bits((out, lse), (into, lse_into))


@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_inputs_are_left_alone(dtype: str) -> None:
    inputs = build(replace(CASE, dtype=dtype, sink=True, d_k=32))
    tensors = [x for x in inputs.kwargs().values() if isinstance(x, Tensor)]
    before = [bits(x.clone()) for x in tensors]
    decode(inputs)
    assert all(torch.equal(bits(x), was) for x, was in zip(tensors, before, strict=True))
    assert len(tensors) == 7


@pytest.mark.parametrize("dtype", strategies.DTYPES)
@pytest.mark.parametrize("num_parts", [None, 1, 3])
def test_bitwise_the_same_from_run_to_run(dtype: str, num_parts: int | None) -> None:
    inputs = build(replace(CASE, dtype=dtype, h_q=128, num_parts=num_parts, lengths=(1000, 3, 0, 700)))
    first = decode(inputs)
    for _ in range(10):
        assert_same_bits(decode(inputs), first)
