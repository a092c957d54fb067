"""Attention in all its spellings is found, rewritten, and equal to the original in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.lowering.passes import attentions
from tests.lowering.passes.attentions import FEWER_HEADS, SAME_HEADS, SQUARE, Function, inputs
from tests.lowering.passes.graphs import Rewritten, assert_equal_to, dynamic_lengths, operators, rewrite, traced

ALL = {**{name: (f, attentions.H) for name, f in (SAME_HEADS | SQUARE).items()}} | {
    name: (f, attentions.H_KV) for name, f in FEWER_HEADS.items()
}


def check(function: Function, *tensors: Tensor, tolerance: float = 2e-5) -> list[str]:
    """Rewrite the graph of a function and compare with float64; the operators it calls now."""
    graph = traced(function, *tensors)
    record = rewrite(graph)
    assert [d.rewritten for d in record] == [True], "\n".join(map(str, record))
    assert not any(node.target == torch.ops.aten.bmm.default for node in graph.graph.nodes)
    expected = function(*(x.double() if x.is_floating_point() else x for x in tensors))
    assert_equal_to(graph(*tensors), expected, tolerance=tolerance)
    return operators(graph)


@pytest.mark.parametrize("name", ALL)
def test_every_spelling_decodes(name: str) -> None:
    function, h_kv = ALL[name]
    s_kv = 9 if name not in SQUARE else 5
    assert check(function, *inputs(5, s_kv, h_kv)) == ["decode"]


@pytest.mark.parametrize("s_q", [1, 3])
@pytest.mark.parametrize("name", ["sdpa-mask-bool", "eager-mask-least", "gqa-mask", "folded-heads", "einsum"])
def test_short_queries(name: str, s_q: int) -> None:
    function, h_kv = ALL[name]
    assert check(function, *inputs(s_q, 7, h_kv, b=3)) == ["decode"]


@pytest.mark.parametrize("name", ["sdpa-causal", "gqa-repeat", "eager-mask-triu", "token-major", "einsum"])
def test_long_queries_prefill(name: str) -> None:
    """One sequence, or several whose tokens lie one after another."""
    function, h_kv = ALL[name]
    assert check(function, *inputs(70, 70, h_kv, b=1)) == ["prefill"]


def test_long_queries_of_several_sequences() -> None:
    """Token-major keys are one ragged tensor; head-major ones are pages."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(70, 70))
    assert check(attentions.sdpa(is_causal=True), q, k, v) == ["prefill"]
    assert check(attentions.sdpa(is_causal=True), *inputs(70, 70)) == ["decode"]


def test_long_queries_in_a_longer_cache() -> None:
    """The keys behind the last query's are never read: they are NaN here."""
    q, k, v = inputs(70, 80, b=1)
    expected = F.scaled_dot_product_attention(*(x.double() for x in (q, k[:, :, :70], v[:, :, :70])), is_causal=True)
    graph = traced(attentions.sdpa(is_causal=True), q, k, v)
    rewrite(graph)
    assert operators(graph) == ["prefill"]
    k[:, :, 70:], v[:, :, 70:] = math.nan, math.nan
    assert_equal_to(graph(q, k, v), expected)


def test_values_of_another_size() -> None:
    assert check(attentions.sdpa(), *inputs(3, 9, d_v=24)) == ["decode"]
    assert check(attentions.sdpa(enable_gqa=True), *inputs(3, 9, attentions.H_KV, d_v=24)) == ["decode"]


def test_top_left_alignment_is_kept() -> None:
    """`is_causal` with more keys than queries: query i sees i + 1 keys, and the rest of the cache nobody."""
    assert check(attentions.sdpa(is_causal=True), *inputs(4, 9)) == ["decode"]


def test_latent_rows_shared_by_heads() -> None:
    """Absorbed attention as one writes it by hand: values are a part of the keys, and heads the rows of a product."""

    def absorbed(q: Tensor, rows: Tensor) -> Tensor:  # [b, h, d], [b, s, d]
        return torch.softmax(q @ rows.transpose(1, 2) * 0.2, -1) @ rows[..., :24]

    assert check(absorbed, torch.randn(3, 8, 32), torch.randn(3, 21, 32)) == ["decode"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sdpa-mask-bool", "eager-mask-triu", "gqa-repeat"])
def test_half_types(name: str, dtype: torch.dtype) -> None:
    function, h_kv = ALL[name]
    assert check(function, *inputs(2, 9, h_kv, dtype=dtype), tolerance=3e-2) == ["decode"]


def written_cache(q: Tensor, k: Tensor, v: Tensor, new: Tensor, at: Tensor) -> Tensor:
    """A static cache: write at ``at``, attend up to there."""
    rows = torch.arange(q.shape[-2]) + at
    k, v = k.index_copy(2, rows, new), v.index_copy(2, rows, 2 * new)
    i, j = attentions.positions(q, k)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=j <= i + at)


@pytest.mark.parametrize("s_q", [1, 3])
def test_a_written_cache_proves_its_length(s_q: int) -> None:
    q, k, v = inputs(s_q, 12)
    new = torch.randn(attentions.B, attentions.H, s_q, attentions.D)
    assert check(written_cache, q, k, v, new, torch.tensor(5)) == ["decode"]


CROPS: dict[str, Function] = {
    "longer-than-all": lambda q, k, v: attentions.sdpa()(q, k[:, :, -12:], v[:, :, -12:]),
    "begins-before-all": lambda q, k, v: attentions.sdpa()(q, k[:, :, -8:4], v[:, :, -8:4]),
    "ends-behind-all": lambda q, k, v: attentions.sdpa()(q, k[:, :, 2:40], v[:, :, 2:40]),
    "all-but-the-last": lambda q, k, v: attentions.sdpa()(q, k[:, :, -20:-1], v[:, :, -20:-1]),
    "written": lambda q, k, v: attentions.sdpa()(q, torch.slice_scatter(k, q[:, :, :2], 2, -40, 2), v),
}


@pytest.mark.parametrize("crop", CROPS)
def test_crops_beyond_the_keys(crop: str) -> None:
    """Places count from the end, and are cut to the dimension, whatever its size is."""
    function, compiled = CROPS[crop], Rewritten(CROPS[crop])
    assert check(function, *inputs(3, 5)) == ["decode"]
    assert check(function, *inputs(3, 9)) == ["decode"]
    for s_kv in (5, 6, 9, 10):
        q, k, v = inputs(3, s_kv)
        dynamic_lengths(k, v)
        assert_equal_to(compiled(q, k, v), function(q, k, v))


@pytest.mark.parametrize("s_q", [1, 3, 70])
def test_a_cache_has_no_position_before_its_first(s_q: int) -> None:
    """A query there sees no key. Rows of a negative position would be written at the end of the cache."""
    q, k, v = inputs(s_q, 80, b=1)
    new = torch.randn(1, attentions.H, s_q, attentions.D)
    graph = traced(written_cache, q, k, v, new, torch.tensor(5))
    rewrite(graph)
    assert operators(graph) == ["decode" if s_q < 70 else "prefill"]
    for at in (0, 4, 80 - s_q):
        expected = written_cache(q, k, v, new, torch.tensor(at))
        assert_equal_to(graph(q, k, v, new, torch.tensor(at)), expected)
    for at in (-1, -2, -s_q, -80):
        with pytest.raises(IndexError):
            written_cache(q, k, v, new, torch.tensor(at))
        with pytest.raises(RuntimeError, match=f"argument 'c.*_seqlens.*': expected .*, got {at}"):
            graph(q, k, v, new, torch.tensor(at))


def assigned_cache(q: Tensor, k: Tensor, v: Tensor, new: Tensor, at: Tensor) -> Tensor:
    """`written_cache` by indexed assignment, to which a negative position is one from the end."""
    rows = torch.arange(q.shape[-2]) + at
    k, v = k.clone(), v.clone()
    k[:, :, rows], v[:, :, rows] = new, 2 * new
    i, j = attentions.positions(q, k)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=j <= i + at)


@pytest.mark.parametrize("s_q", [1, 3, 70])
def test_an_assigned_cache_has_positions_from_its_end(s_q: int) -> None:
    """The mask is read at run time: queries before the first position see no key."""
    q, k, v = inputs(s_q, 80, b=1)
    new = torch.randn(1, attentions.H, s_q, attentions.D)
    graph = traced(assigned_cache, q, k, v, new, torch.tensor(5))
    rewrite(graph)
    assert operators(graph) == ["attend_masked"]
    for at in (0, 4, 80 - s_q, -1, -2, -s_q, -s_q + 1, -80):
        expected = assigned_cache(q, k, v, new, torch.tensor(at))
        assert_equal_to(graph(q, k, v, new, torch.tensor(at)), expected)


@pytest.mark.parametrize("name", ["sdpa", "sdpa-mask-bool", "gqa-sdpa", "gqa-mask", "no-scale"])
def test_every_size_is_dynamic(name: str) -> None:
    """The default scale of a size that is not known is the operators' own default."""
    function, h_kv = ALL[name]
    compiled = Rewritten(function)
    for factor in (1, 2, 3):
        shapes = ((attentions.H, 5), (h_kv, 9), (h_kv, 9))
        tensors = tuple(torch.randn(2 * factor, h * factor, s * factor, 16 * factor) for h, s in shapes)
        for x in tensors:
            torch._dynamo.mark_dynamic(x, [0, 1, 2, 3])
        assert_equal_to(compiled(*tensors), function(*(x.double() for x in tensors)))
    assert compiled.refusals == []
    assert len(compiled.graphs) == 1


@pytest.mark.parametrize("last", [9, 127])
def test_the_last_rows_of_transposed_keys_of_any_length(last: int) -> None:
    """Strides that are as large as another size by chance fix no size: the next length needs no graph of its own."""

    def newest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = k.mT[:, :, -last:].repeat_interleave(2, 1)
        return torch.softmax(q @ keys.mT, -1) @ v

    compiled = Rewritten(newest)
    q, v = torch.randn(1, 2, last, 8), torch.randn(1, 1, last, 8)
    for length in (last, last + 1, last + 40):
        k = torch.randn(1, 1, 8, length)
        torch._dynamo.mark_dynamic(k, 3)
        assert_equal_to(compiled(q, k, v), newest(*(x.double() for x in (q, k, v))))
    assert len(compiled.graphs) == 1


@pytest.mark.parametrize("s", [9, 70])
def test_a_size_that_the_graph_computes(s: int) -> None:
    """Half of a dimension is as wide as a value: an argument of the operator that is no input of the graph.

    Served or refused, it is no error.
    """

    def halves(q: Tensor, kv: Tensor) -> Tensor:
        k, v = kv.chunk(2, -1)
        return attentions.sdpa()(q, k, v)

    compiled = Rewritten(halves)
    for factor in (1, 2):
        tensors = tuple(torch.randn(2, attentions.H, s + factor, d * factor) for d in (16, 32))
        for x in tensors:
            torch._dynamo.mark_dynamic(x, [2, 3])
        assert_equal_to(compiled(*tensors), halves(*(x.double() for x in tensors)))
    assert not any("internal" in refusal for refusal in compiled.refusals)


@pytest.mark.parametrize("name", ["sdpa-mask-bool", "eager-mask-least", "gqa-mask", "gqa-repeat", "sdpa-causal"])
def test_one_graph_for_all_lengths(name: str) -> None:
    """A cache grows by concatenation: there are as many keys as past ones and queries together.

    New tokens are one tensor, as in a model: queries and new keys cannot differ in number.
    """
    function, h_kv = ALL[name]

    def grown(new: Tensor, past: Tensor) -> Tensor:
        rows = torch.cat([past, new[:, :h_kv, :, attentions.D :]], dim=2)
        k, v = rows.split([attentions.D, attentions.D_V], dim=-1)
        return function(new[..., : attentions.D], k, v)

    compiled = Rewritten(grown)
    for past, s_q in ((4, 5), (11, 6), (24, 33)):
        tensors = (
            torch.randn(attentions.B, attentions.H, s_q, 2 * attentions.D + attentions.D_V),
            torch.randn(attentions.B, h_kv, past, attentions.D + attentions.D_V),
        )
        dynamic_lengths(*tensors)
        assert_equal_to(compiled(*tensors), grown(*(x.double() for x in tensors)))
    assert compiled.refusals == []
    assert len(compiled.graphs) == 1
    assert operators(compiled.graphs[0]) == ["decode"]
