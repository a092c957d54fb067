"""Bugs that other libraries had: each must stay impossible here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashmla_ops import reference
from flashmla_ops.errors import from_message
from tests.strategies import DTYPES
from tests.support.cases import DecodeCase, build
from tests.support.compare import OFFICIAL_LSE, OFFICIAL_OUT, difference
from tests.support.oracle import mismatch
from tests.support.poison import same_bits

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def test_a_page_past_2_to_the_31_elements_is_read() -> None:
    """An element offset of 32 bits would read another page, or zeros."""
    page_size, d = 64, 576
    n_pages = 2**31 // (page_size * d) + 3
    cache = torch.empty(n_pages, page_size, 1, d, dtype=torch.bfloat16)  # reserved, and touched in the last page only
    assert cache.numel() > 2**31
    cache[-1] = torch.randn(page_size, 1, d) / 10
    q = torch.randn(1, 1, 16, d).bfloat16()
    table, length = torch.tensor([[n_pages - 1]], dtype=torch.int32), torch.tensor([page_size], dtype=torch.int32)
    out, lse = torch.ops.flashmla.decode(q, cache, None, table, length, 512)
    expected, expected_lse = reference.decode(q, cache[-1:], None, torch.zeros_like(table), length, 512)
    assert expected.abs().max() > 0.01
    assert difference("out", out, expected.bfloat16(), OFFICIAL_OUT) is None
    assert difference("lse", lse, expected_lse, OFFICIAL_LSE) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_beyond_50000_are_no_sentinel(dtype: str, sign: int) -> None:
    """Scores of -73728 + {0, 1, 2} are valid, and so are those of the other sign."""
    case = DecodeCase(lengths=(70, 3), h_q=3, dtype=dtype, softmax_scale=1.0, strided=False)
    inputs = build(case)
    slots = inputs.kv_cache.flatten(0, 1)
    live = ~slots[:, 0, 0].isnan()
    slots[live, :, :] = 128.0
    steps = torch.arange(int(live.sum())) % 3
    slots[live, 0, 575] = (128.0 - steps).to(slots.dtype)
    inputs.q.fill_(sign)
    out, lse = torch.ops.flashmla.decode(**inputs.kwargs())
    assert lse.abs().min() > 73000
    problem = mismatch(case, inputs, (out, lse), reference.decode(**inputs.reference_kwargs()))
    assert problem is None, problem


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_parts", [None, 1, 4])
@pytest.mark.parametrize("length", [1, 100, 300])
@pytest.mark.parametrize("token", [0, 64, -1])
def test_nan_of_one_sequence_stays_in_it(dtype: str, num_parts: int | None, length: int, token: int) -> None:
    case = DecodeCase(lengths=(130, length, 40), h_q=9, dtype=dtype, num_parts=num_parts)
    inputs = build(case)
    clean = torch.ops.flashmla.decode(**inputs.kwargs())
    token = token % length
    inputs.kv_cache[int(inputs.block_table[1, token // 64]), token % 64] = torch.nan
    out, lse = torch.ops.flashmla.decode(**inputs.kwargs())
    for i in (0, 2):
        assert same_bits(out[i], clean[0][i])
        assert same_bits(lse[i], clean[1][i])
    assert out[1].isnan().all()
    assert lse[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_of_one_query_head_stays_in_it(dtype: str) -> None:
    inputs = build(DecodeCase(lengths=(130, 40), s_q=2, h_q=9, dtype=dtype, causal=True))
    clean_out, clean_lse = torch.ops.flashmla.decode(**inputs.kwargs())
    inputs.q[1, 0, 4] = torch.nan
    out, lse = torch.ops.flashmla.decode(**inputs.kwargs())
    assert out[1, 0, 4].isnan().all()
    assert lse[1, 4, 0].isnan()
    out[1, 0, 4], lse[1, 4, 0] = clean_out[1, 0, 4], clean_lse[1, 4, 0]
    assert same_bits(out, clean_out)
    assert same_bits(lse, clean_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_whatever_dead_memory_holds(dtype: str, poison: float) -> None:
    inputs = build(DecodeCase(lengths=(130, 0, 63, 65), s_q=2, h_q=9, dtype=dtype, causal=True))
    expected = torch.ops.flashmla.decode(**inputs.kwargs())
    inputs.kv_cache.masked_fill_(inputs.kv_cache.isnan(), poison)
    assert all(map(same_bits, torch.ops.flashmla.decode(**inputs.kwargs()), expected))


@pytest.mark.parametrize("page", [-1, 9, 10, 2147480000, INT32_MIN, INT32_MAX])
@pytest.mark.parametrize("entry", [(0, 0), (2, 1)])
@pytest.mark.parametrize("num_parts", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_page_of_a_live_token_is_named(
    page: int, entry: tuple[int, int], num_parts: int | None, dtype: str
) -> None:
    """It is neither read as page 0 nor clamped."""
    inputs = build(DecodeCase(lengths=(130, 0, 65, 100), h_q=9, dtype=dtype, num_parts=num_parts))
    assert inputs.kv_cache.size(0) == 9
    inputs.block_table[entry] = page
    with pytest.raises(RuntimeError, match="flashmla::decode: argument 'block_table'") as caught:
        torch.ops.flashmla.decode(**inputs.kwargs())
    error = from_message(str(caught.value))
    assert (error.expected, error.actual) == ("pages in [0, 9)", f"{page} at [{entry[0]}, {entry[1]}]")


@pytest.mark.parametrize("page", [-1, 9, INT32_MIN, INT32_MAX])
def test_a_bad_page_past_the_end_is_not_looked_at(page: int) -> None:
    inputs = build(DecodeCase(lengths=(128, 0, 64, 100), h_q=9))
    expected = torch.ops.flashmla.decode(**inputs.kwargs())
    for i, length in enumerate((128, 0, 64, 100)):
        inputs.block_table[i, -(-length // 64) :] = page
    assert all(map(same_bits, torch.ops.flashmla.decode(**inputs.kwargs()), expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_pages", [0, 1])
def test_padding_of_length_0_gives_0_and_not_nan(dtype: str, max_pages: int) -> None:
    inputs = build(DecodeCase(lengths=(0, 0, 0), s_q=2, h_q=9, dtype=dtype, sink=True))
    out, lse = torch.ops.flashmla.decode(**inputs.kwargs(block_table=inputs.block_table[:, :max_pages]))
    assert (out == 0).all()
    assert (lse == torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_sequences(dtype: str) -> None:
    for num_parts in (None, 2):
        inputs = build(replace(DecodeCase(lengths=()), h_q=9, dtype=dtype, num_parts=num_parts))
        out, lse = torch.ops.flashmla.decode(**inputs.kwargs())
        assert out.shape == (0, 1, 9, 512)
        assert lse.shape == (0, 9, 1)
