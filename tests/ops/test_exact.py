"""Small integers, whose attention is exact in every dtype: no tolerance at all."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.strategies import DTYPES
from tests.support.cases import DecodeCase, DecodeInputs, build

#: d, d_v, qk_start, d_k of each row layout.
LAYOUTS = {
    "mla": (576, 512, 0, None),
    "mla_two": (512, 512, 0, 64),
    "gqa": (96, 48, 48, None),
    "gqa_two": (48, 48, 48, 48),
    "odd": (37, 19, 5, 11),
}


def integer_case(layout: str, dtype: str, num_parts: int | None, **changes: object) -> tuple[DecodeCase, DecodeInputs]:
    """Lengths are powers of two; live cache elements become integers of [-8, 8], dead ones stay NaN."""
    d, d_v, qk_start, d_k = LAYOUTS[layout]
    case = DecodeCase(
        lengths=(1, 2, 64, 512, 0, 8), h_q=18, h_kv=3, page_size=16, d=d, d_v=d_v, qk_start=qk_start, d_k=d_k
    )
    case = replace(case, dtype=dtype, num_parts=num_parts, **changes)
    inputs = build(case)
    for cache in (inputs.kv_cache, inputs.k_cache):
        if cache is not None:
            cache.copy_((cache * 40).round().clamp(-8, 8))
    return case, inputs


def live_rows(inputs: DecodeInputs, cache: Tensor, sequence: int) -> Tensor:  # [length, h_kv, d]
    """A sequence's rows, token by token: written apart from the library's own gathering."""
    length, page_size = int(inputs.cache_seqlens[sequence]), cache.size(1)
    tokens = [cache[int(inputs.block_table[sequence, t // page_size]), t % page_size] for t in range(length)]
    return torch.stack(tokens) if tokens else cache.new_empty(0, *cache.shape[2:])


@pytest.mark.parametrize("num_parts", [None, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zero", ["q", "scale"])
def test_equal_weights_give_the_exact_mean(layout: str, dtype: str, num_parts: int | None, zero: str) -> None:
    case, inputs = integer_case(layout, dtype, num_parts, softmax_scale=None if zero == "q" else 0.0)
    if zero == "q":
        inputs.q.zero_()
    out, lse = torch.ops.flashmla.decode(**inputs.kwargs())
    group = case.h_q // case.h_kv
    for i, length in enumerate(case.lengths):
        if length == 0:
            assert (out[i] == 0).all()
            assert (lse[i] == torch.inf).all()
            continue
        values = live_rows(inputs, inputs.kv_cache, i)[..., : case.d_v].double()
        mean = values.sum(0).div(length).repeat_interleave(group, dim=0)
        assert torch.equal(out[i, 0], mean.to(out.dtype))
        expected = torch.full_like(lse[i], math.log(length))
        assert torch.allclose(lse[i], expected, rtol=2.0**-22, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_mean_is_exact(dtype: str) -> None:
    """Four query tokens over 4 tokens see 1, 2, 3 and 4 of them; over 2 tokens the first two see nothing."""
    _, inputs = integer_case("mla", dtype, None, lengths=(4, 2), s_q=4, causal=True)
    inputs.q.zero_()
    out, lse = torch.ops.flashmla.decode(**inputs.kwargs())
    for i, length in enumerate((4, 2)):
        rows = live_rows(inputs, inputs.kv_cache, i)[..., :512].double()
        for s in range(4):
            seen = length - 4 + s + 1
            if seen <= 0:
                assert (out[i, s] == 0).all()
                assert (lse[i, :, s] == torch.inf).all()
            elif seen != 3:
                mean = rows[:seen].sum(0).div(seen).repeat_interleave(6, dim=0)
                assert torch.equal(out[i, s], mean.to(out.dtype))


@pytest.mark.parametrize("num_parts", [None, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("two", [False, True])
def test_a_score_far_above_the_others_selects_its_row(dtype: str, num_parts: int | None, two: bool) -> None:
    """The last 16 elements of a key are the token's number in binary, as +-1; a query asks for one number.

    The score of that token is 64 * 16 * scale, every other one at least 128 lower: exp(-128) is 0 in float32.
    """
    case, inputs = integer_case("mla_two" if two else "mla", dtype, num_parts, softmax_scale=1.0, s_q=2)
    code = torch.arange(16)

    def codes(tokens: Tensor) -> Tensor:
        return ((tokens[:, None] >> code & 1) * 2 - 1).to(inputs.q.dtype)

    key = inputs.k_cache if two else inputs.kv_cache
    for i, length in enumerate(case.lengths):
        for t in range(length):
            key[inputs.block_table[i, t // 16].long(), t % 16, :, -16:] = codes(torch.tensor([t]))
    wanted = torch.randint(0, 2**31, (len(case.lengths), 2, case.h_q), generator=torch.Generator().manual_seed(3))
    wanted = wanted % inputs.cache_seqlens.clamp(min=1)[:, None, None]
    inputs.q.zero_()
    inputs.q[..., -16:] = 64 * codes(wanted.flatten()).view(*wanted.shape, 16)
    out, lse = torch.ops.flashmla.decode(**inputs.kwargs())
    for i, length in enumerate(case.lengths):
        if length == 0:
            continue
        rows = live_rows(inputs, inputs.kv_cache, i)
        for s, head in [(s, head) for s in range(2) for head in range(case.h_q)]:
            assert torch.equal(out[i, s, head], rows[wanted[i, s, head], head // 6, : case.d_v])
        assert torch.allclose(lse[i], torch.full_like(lse[i], 1024.0), rtol=2.0**-22, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_is_returned_as_it_is(dtype: str) -> None:
    inputs = build(DecodeCase(lengths=(1,), h_q=9, dtype=dtype, q_spread=3.0))
    out, lse = torch.ops.flashmla.decode(**inputs.kwargs())
    row = inputs.kv_cache[int(inputs.block_table[0, 0]), 0, 0]
    assert torch.equal(out[0, 0], row[:512].expand(9, 512))
    score = inputs.q[0, 0].double() @ row.double() / 24
    assert torch.allclose(lse[0, :, 0].double(), score, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attn_sink_of_the_lse_halves_the_result(dtype: str) -> None:
    """exp(lse) / (exp(lse) + exp(sink)) is 1/2 for sink = lse = 0, 1 for -inf and 0 for +inf."""
    _, inputs = integer_case("mla", dtype, None, lengths=(1, 0))
    inputs.q.zero_()
    sink = torch.tensor([0.0, torch.inf, -torch.inf] * 6)
    out, lse = torch.ops.flashmla.decode(**inputs.kwargs(attn_sink=sink))
    plain, plain_lse = torch.ops.flashmla.decode(**inputs.kwargs())
    assert torch.equal(lse, plain_lse)
    assert torch.equal(out[:, :, 0::3], plain[:, :, 0::3] / 2)
    assert (out[:, :, 1::3] == 0).all()
    assert torch.equal(out[:, :, 2::3], plain[:, :, 2::3])
