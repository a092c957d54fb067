"""sparse_decode and sparse_prefill against float64, in every layout, format and number of sources."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashmla_ops import cpu
from flashmla_ops.formats import QUANTIZED
from flashmla_ops.ops.sparse import SPARSE_DECODE, SPARSE_PREFILL
from tests import strategies
from tests.support.compare import difference
from tests.support.poison import same_bits
from tests.support.sparse import (
    FLOAT32,
    FLOAT32_LSE,
    PREFILL_OUT,
    SPARSE_OUT,
    Rows,
    SparseCase,
    build,
    check,
    invalid_indices,
)
from tests.support.sparse import tolerances as tolerances_of
from tests.support.threads import threads

FORMATS = sorted(QUANTIZED)
HEADS = (1, 5, 20, 63, 112, 128)
INT = torch.int32

decode, prefill = torch.ops.flashmla.sparse_decode, torch.ops.flashmla.sparse_prefill


@settings(max_examples=200)
@given(strategies.sparse_cases())
def test_any_case(case: SparseCase) -> None:
    check(case)


@pytest.mark.parametrize("dtype", strategies.DTYPES)
@pytest.mark.parametrize("h_q", HEADS)
@pytest.mark.parametrize("name", ["native", *FORMATS])
def test_models(name: str, h_q: int, dtype: str) -> None:
    d = QUANTIZED[name].elements if name in QUANTIZED else 576
    rows = Rows(topk=150, row_format=name, page_size=64)
    check(SparseCase(rows, h_q=h_q, s_q=2, b=2, d=d, dtype=dtype, sink=True, seed=h_q))


#: V3.2, V4 (a sliding window, and compressed rows), V4.1 (FP8, and FP4), and formats that nobody pairs.
PAIRS = [("native", "native"), ("fp8_model1", "fp8_model1"), ("fp8_v41", "fp4_v41"), ("fp8_v32", "int4_g32")]


@pytest.mark.parametrize("dtype", strategies.DTYPES)
@pytest.mark.parametrize("h_q", [5, 64, 128])
@pytest.mark.parametrize("pair", PAIRS)
def test_two_sources(pair: tuple[str, str], h_q: int, dtype: str) -> None:
    window = Rows(topk=128, page_size=61, row_format=pair[0], lengths=True)
    compressed = Rows(topk=200, page_size=2, n_pages=90, row_format=pair[1], lengths=True)
    d = QUANTIZED[pair[0]].elements if pair[0] in QUANTIZED else 512
    check(SparseCase(window, compressed, h_q=h_q, d=d, dtype=dtype, sink=True, b=3))


@pytest.mark.parametrize("page_size", [1, 2, 3, 16, 61, 64, 528, 576])
@pytest.mark.parametrize("name", ["native", "fp8_v32", "fp8_model1"])
def test_page_sizes(name: str, page_size: int) -> None:
    d = QUANTIZED[name].elements if name in QUANTIZED else 576
    check(SparseCase(Rows(topk=70, n_pages=3, page_size=page_size, row_format=name), h_q=20, d=d))


@pytest.mark.parametrize("which", range(8))
@pytest.mark.parametrize("name", ["native", *FORMATS])
def test_an_invalid_index_names_nothing(name: str, which: int) -> None:
    """Nothing is read for it: the cache is NaN but for the one row that is named between two of them."""
    d = QUANTIZED[name].elements if name in QUANTIZED else 576
    named = build(SparseCase(Rows(topk=1, row_format=name, invalid=0.0), b=1, h_q=16, d=d))
    invalid = invalid_indices(5 * 16)[which]
    around = torch.tensor([[[invalid, int(named["indices"]), invalid]]], dtype=INT)
    expected = decode(**named)
    assert expected[0].isfinite().all()
    assert all(map(same_bits, decode(**named | {"indices": around}), expected))
    out, lse = decode(**named | {"indices": torch.full((1, 1, 70), invalid, dtype=INT)})
    assert (out == 0).all()
    assert (lse == math.inf).all()


@pytest.mark.parametrize("sink", [-math.inf, -1.0, 3.0, math.inf])
@pytest.mark.parametrize("h_q", [2, 16])
def test_a_sink_takes_its_share_once(sink: float, h_q: int) -> None:
    """The sink joins the rows of both sources together; lse knows nothing of it, nor does a query without rows."""
    case = SparseCase(Rows(topk=40), Rows(topk=20, page_size=3), h_q=h_q, dtype="float32", b=3)
    named = build(case)
    named["indices"][2], named["extra_indices"][2] = -1, 100000
    plain, lse = decode(**named)
    out, same = decode(**named | {"attn_sink": torch.full((h_q,), sink)})
    assert torch.equal(same, lse)
    share = torch.sigmoid(lse.double() - sink).where(lse != math.inf, 0.0).transpose(1, 2)[..., None]
    assert difference("out", out, plain.double() * share, FLOAT32) is None
    assert (out[2] == 0).all()
    assert (lse[2] == math.inf).all()


@pytest.mark.parametrize("h_q", [1, 4, 16, 128])
@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_all_rows_in_order_are_dense_attention(dtype: str, h_q: int) -> None:
    """Bit for bit, whether tiles read consecutive rows in place or rows one by one."""
    named = build(SparseCase(Rows(topk=150, invalid=0.0), b=1, h_q=h_q, dtype=dtype, strided=False))
    kv = torch.randn(5, 64, 1, 576).to(named["q"].dtype)
    table, lengths = torch.tensor([[3, 0, 4]], dtype=INT), torch.tensor([150], dtype=INT)
    slots = (table[0].repeat_interleave(64) * 64 + torch.arange(64).repeat(3))[:150]
    with threads(1):
        dense = torch.ops.flashmla.decode(named["q"], kv, None, table, lengths, 512)
        assert all(map(same_bits, decode(named["q"], kv, None, slots[None, None].int(), 512), dense))
        rows = kv.flatten(0, 1)[slots.long()]
        order = torch.randperm(150)
        scattered = torch.empty_like(rows)
        scattered[order] = rows
        one_by_one = decode(named["q"], scattered[None], None, order[None, None].int(), 512)
        assert all(map(same_bits, one_by_one, dense))


def test_a_row_that_is_named_twice_counts_twice() -> None:
    named = build(SparseCase(Rows(topk=3, invalid=0.0), b=1, h_q=4, dtype="float32", strided=False))
    twice = named | {"indices": named["indices"].repeat(1, 1, 2)}
    (out, lse), (expected, once) = decode(**twice), decode(**named)
    assert difference("out", out, expected, FLOAT32) is None
    assert difference("lse", lse, once + math.log(2), FLOAT32_LSE) is None


CUT = SparseCase(
    Rows(topk=1300, n_pages=30, page_size=64), Rows(topk=700, page_size=64, lengths=True), b=2, h_q=40, strided=False
)


@pytest.mark.parametrize("number", [2, 3, 8])
def test_rows_are_cut_where_threads_outnumber_queries(number: int) -> None:
    with threads(number):
        check(CUT)
        named = build(CUT)
        assert all(map(same_bits, decode(**named), decode(**named)))


def test_batch_invariant() -> None:
    """The same bits alone and among others, on any number of threads, before any number of indices of nothing."""
    named = build(replace(CUT, batch_invariant=True, b=3))
    whole = decode(**named)
    check(replace(CUT, batch_invariant=True))
    of_a_sequence = ("q", "indices", "extra_indices", "extra_topk_length")
    for i in range(3):
        alone = named | {name: named[name][i : i + 1] for name in of_a_sequence}
        padded = torch.cat([alone["indices"], torch.full((1, 1, 900), -1, dtype=INT)], dim=-1)
        for number in (1, 2, 7):
            with threads(number):
                for arguments in (alone, alone | {"indices": padded}):
                    assert all(same_bits(x, y[i : i + 1]) for x, y in zip(decode(**arguments), whole, strict=True))


@pytest.mark.parametrize("isa", [name for name, supported in cpu.STATE.isas.items() if supported])
@pytest.mark.parametrize("h_q", [1, 7, 64])
@pytest.mark.parametrize("pair", [("native", "native"), ("fp8_v41", "fp4_v41")])
def test_every_instruction_set(isa: str, pair: tuple[str, str], h_q: int) -> None:
    with cpu.using(isa):
        for dtype in strategies.DTYPES:
            check(SparseCase(Rows(100, row_format=pair[0]), Rows(70, row_format=pair[1]), h_q=h_q, d=512, dtype=dtype))


@pytest.mark.parametrize(
    ("name", "value", "actual"), [("topk_length", [0, 4], "4"), ("extra_topk_length", [-1, 0], "-1")]
)
def test_lengths_out_of_range(name: str, value: list[int], actual: str) -> None:
    named = build(SparseCase(Rows(topk=3, lengths=True), Rows(topk=3, lengths=True)))
    index = value.index(int(actual))
    with pytest.raises(RuntimeError, match=rf"'{name}': expected lengths in \[0, 3\], got {actual} at \[{index}\]"):
        decode(**named | {name: torch.tensor(value, dtype=INT)})


def test_offsets_past_2_to_the_31() -> None:
    """A cache of more elements than int32 counts, of which next to nothing is in memory."""
    n_pages = 2**31 // (64 * 512) + 3
    kv = torch.empty(n_pages, 64, 1, 512, dtype=torch.bfloat16)
    slots = torch.tensor([5, n_pages * 64 - 1, n_pages * 64 - 70, 2**31 // 512 + 1])
    rows = torch.randn(4, 512).bfloat16()
    kv.view(-1, 512)[slots] = rows
    q = torch.randn(1, 1, 16, 512).bfloat16()
    expected = decode(q, rows[None, :, None], None, torch.arange(4, dtype=INT)[None, None], 512)
    assert all(map(same_bits, decode(q, kv, None, slots[None, None].int(), 512), expected))
    out, _, lse = prefill(q[0], kv.view(-1, 1, 512), slots[None, None].int(), 512)
    assert same_bits(out[None], expected[0])
    assert same_bits(lse[None, :, :], expected[1].transpose(1, 2).contiguous())


def prefill_arguments(case: SparseCase) -> dict[str, Any]:
    """Those of a decode of one sequence whose cache is one page; indices differ from KV head to KV head."""
    named = build(replace(case, b=1, extra=None, rows=replace(case.rows, n_pages=1), d_k=None, qk_start=0))
    heads = [named["indices"].roll(head, 1)[0] for head in range(case.h_kv)]
    length = named["topk_length"]
    return {
        "q": named["q"][0],
        "kv": named["kv_cache"][0],
        "indices": torch.stack(heads, dim=1),
        **{name: named[name] for name in ("d_v", "softmax_scale", "row_format", "attn_sink")},
        "topk_length": None if length is None else length.expand(case.s_q).clone(),
    }


@settings(max_examples=100)
@given(strategies.sparse_cases(), st.integers(1, 90))
def test_prefill_of_any_case(case: SparseCase, tokens: int) -> None:
    case = replace(case, rows=replace(case.rows, page_size=tokens), qk_start=0, d_k=None)
    named = prefill_arguments(case)
    results = prefill(**named)
    out_tolerance, lse_tolerance = tolerances_of(case)
    tolerances = (PREFILL_OUT if out_tolerance == SPARSE_OUT else out_tolerance, lse_tolerance, lse_tolerance)
    names = ("out", "max_logits", "lse")
    for name, x, y, allowed in zip(names, results, SPARSE_PREFILL.reference(**named), tolerances, strict=True):
        problem = difference(name, x, y, allowed)
        assert problem is None, f"{problem} | {case!r}"


def test_prefill_of_nothing() -> None:
    out, max_logits, lse = prefill(torch.randn(3, 4, 16), torch.randn(0, 1, 16), torch.zeros(3, 1, 5, dtype=INT), 8)
    assert (out == 0).all()
    assert (max_logits == -math.inf).all()
    assert (lse == math.inf).all()


@pytest.mark.parametrize("h_q", [1, 9])
def test_prefill_of_70000_queries(h_q: int) -> None:
    n, d = 70_000, 8
    q, kv = torch.randn(n, h_q, d), torch.randn(300, 1, d)
    indices = torch.randint(-20, 320, (n, 1, 5), dtype=INT)
    indices[77] = -1
    out, max_logits, lse = prefill(q, kv, indices, 8)
    valid = (indices >= 0) & (indices < 300)
    rows = kv[indices.clamp(0, 299).long(), 0].squeeze(1).double()  # [n, 5, d]
    scores = torch.einsum("nhd,ntd->nht", q.double(), rows) * d**-0.5
    scores = scores.masked_fill(~valid, -math.inf)
    empty = ~valid.any(-1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    assert difference("out", out, torch.einsum("nht,ntd->nhd", weights, rows), FLOAT32) is None
    assert difference("max_logits", max_logits, scores.amax(-1), FLOAT32_LSE) is None
    assert difference("lse", lse, scores.logsumexp(-1).masked_fill(empty, math.inf), FLOAT32_LSE) is None
    assert empty.any()


@pytest.mark.parametrize("h_q", [1, 16])
def test_scores_far_below_any_sentinel(h_q: int) -> None:
    """Every score is below -1e5; their differences decide as ever."""
    kv, q = torch.randint(1, 3, (2, 8, 1, 32)).float(), torch.full((1, 9, h_q, 32), -4e3)
    kv[..., 31] = torch.rand(2, 8, 1)
    q[..., 31] = 1
    indices = torch.arange(-4, 14, dtype=INT).view(1, 9, 2)
    named = {"q": q, "kv_cache": kv, "k_cache": None, "indices": indices, "d_v": 32, "softmax_scale": 1.0}
    (out, lse), (expected, expected_lse) = decode(**named), SPARSE_DECODE.reference(**named)
    assert difference("lse", lse, expected_lse, FLOAT32_LSE) is None
    assert (lse[0, :, 2:] < -1e5).all()
    assert (lse[0, :, :2] == math.inf).all()
    torch.testing.assert_close(out, expected, atol=5e-2, rtol=0)


def test_a_nan_of_a_row_that_is_read_is_seen() -> None:
    named = build(SparseCase(Rows(topk=40), b=2, h_q=16, strided=False))
    dead = named["kv_cache"].flatten(0, 1)[:, 0].isnan().all(-1).nonzero().flatten()
    assert len(dead)
    named["indices"][1, 0, 3] = dead[0]
    out, lse = decode(**named)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    assert lse[1].isnan().all()


def test_pages_of_one_piece() -> None:
    q, cache = torch.zeros(1, 1, 4, 512), torch.zeros(2, 4, 1, 1168, dtype=torch.uint8)[..., :584]
    indices: Tensor = torch.zeros(1, 1, 3, dtype=INT)
    with pytest.raises(RuntimeError, match="stride 584 between tokens: a page of fp8_model1 is one piece, got stride"):
        decode(q, cache, None, indices, 512, row_format="fp8_model1")
    two_heads = torch.zeros(2, 4, 2, 584, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="'kv_cache': expected 1 KV head with rows of fp8_model1, got 2"):
        decode(q, two_heads, None, indices, 512, row_format="fp8_model1")
