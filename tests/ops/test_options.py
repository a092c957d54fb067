"""Options of attention on `decode`, `decode_up` and `prefill`: windows, softcaps, ragged queries, batch invariance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from flashmla_ops import reference
from flashmla_ops.errors import from_message
from tests import strategies
from tests.support.cases import DecodeCase, DecodeInputs, build
from tests.support.poison import same_bits, strided
from tests.support.threads import threads

MIXED = DecodeCase((70, 40, 9, 0, 300), s_qs=(1, 40, 3, 0, 5), h_q=9, causal=True, dtype="float32", d=24, d_v=16)
OPTIONS = replace(MIXED, window=21, softcap=2.0, sink=True, q_spread=3.0)


def decode(inputs: DecodeInputs, **changes: object) -> tuple[Tensor, Tensor]:
    return torch.ops.flashmla.decode(**inputs.kwargs(**changes))


def one_by_one(case: DecodeCase, inputs: DecodeInputs, **changes: Any) -> list[tuple[Tensor, Tensor]]:
    """Each sequence of a ragged call in a call of its own: out [s_q, h_q, d_v] and lse [h_q, s_q]."""
    results, first = [], 0
    for i, s_q in enumerate(case.s_qs or ()):
        q, own = inputs.q[None, first : first + s_q], slice(i, i + 1)
        first += s_q
        if s_q:
            lengths = {"block_table": inputs.block_table[own], "cache_seqlens": inputs.cache_seqlens[own]}
            out, lse = decode(inputs, q=q, cu_seqlens_q=None, **lengths, **changes)
            results.append((out[0], lse[0]))
    return results


@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_ragged_queries_are_as_calls_of_their_own(dtype: str) -> None:
    case = replace(OPTIONS, dtype=dtype, batch_invariant=True)
    inputs = build(case)
    out, lse = decode(inputs)
    apart = one_by_one(case, inputs)
    assert same_bits(out, torch.cat([part for part, _ in apart]))
    assert same_bits(lse, torch.cat([part for _, part in apart], dim=-1))


@settings(max_examples=200)
@given(strategies.option_cases(), st.integers(1, 5))
def test_the_same_bits_whatever_the_batch_and_the_threads(case: DecodeCase, n: int) -> None:
    s_qs = case.s_qs or (case.s_q,) * len(case.lengths)
    case = replace(case, batch_invariant=True, s_qs=s_qs, strided=False)
    inputs = build(case)
    with threads(1):
        out, lse = decode(inputs)
        apart = one_by_one(case, inputs)
    with threads(n):
        assert all(map(same_bits, (out, lse), decode(inputs)))
    if apart:
        assert same_bits(out, torch.cat([part for part, _ in apart]))
        assert same_bits(lse, torch.cat([part for _, part in apart], dim=-1))


@pytest.mark.parametrize("op", ["decode", "decode_up"])
@pytest.mark.parametrize("dtype", strategies.DTYPES)
@pytest.mark.parametrize("h_q", [3, 16, 128])
@pytest.mark.parametrize("window", [0, 3000])
def test_long_sequences_have_the_same_bits_in_any_batch(op: str, dtype: str, h_q: int, window: int) -> None:
    """A sequence of several pieces, alone and beside others."""
    case = DecodeCase((5000, 1, 700, 4099), h_q=h_q, d=40, d_v=32, dtype=dtype, batch_invariant=True, window=window)
    inputs = build(case)
    more = {} if op == "decode" else {"weight": torch.randn(h_q, 32, 24).to(inputs.q.dtype)}

    def attend(rows: slice, n_threads: int) -> tuple[Tensor, Tensor]:
        own = {name: getattr(inputs, name)[rows] for name in ("q", "block_table", "cache_seqlens")}
        with threads(n_threads):
            result: tuple[Tensor, Tensor] = getattr(torch.ops.flashmla, op)(**inputs.kwargs(**own), **more)
        return result

    together = attend(slice(None), 2)
    for i in range(len(case.lengths)):
        for n_threads in (1, 2, 3):
            for whole, alone in zip(together, attend(slice(i, i + 1), n_threads), strict=True):
                assert same_bits(whole[i : i + 1], alone), (i, n_threads)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("s_q", [1, 3])
def test_a_window_is_the_end_of_the_sequence(causal: bool, s_q: int) -> None:
    """Without causal, or for one query, a window is attention over the last rows; with it, each query has its own."""
    inputs = build(DecodeCase((90,), s_q=s_q, h_q=4, causal=causal, dtype="float32", page_size=1, d=24, d_v=16))
    out, lse = decode(inputs, window=20)
    for s in range(s_q):
        end = 90 - s_q + s + 1 if causal else 90
        table, lengths = inputs.block_table[:, end - 20 : end], torch.tensor([20], dtype=torch.int32)
        q = inputs.q[:, s : s + 1]
        part, part_lse = decode(inputs, q=q, block_table=table, cache_seqlens=lengths, causal=False)
        torch.testing.assert_close(out[:, s : s + 1], part)
        torch.testing.assert_close(lse[:, :, s : s + 1], part_lse)


def test_pages_before_every_window_belong_to_others() -> None:
    """Table entries of pages that no query sees may hold anything; a bad one that a query sees is named."""
    inputs = build(DecodeCase((100, 100), s_q=2, h_q=4, causal=True, page_size=10, d=24, d_v=16))
    expected = decode(inputs, window=25)  # the first query sees rows 74 to 98
    freed = inputs.block_table.clone()
    freed[:, :7] = 12345
    assert all(map(same_bits, expected, decode(inputs, window=25, block_table=freed)))
    defined = reference.decode(**inputs.reference_kwargs(window=25, block_table=freed))
    torch.testing.assert_close(expected[0].double(), defined[0], atol=1e-3, rtol=1e-2)
    freed[1, 7] = -5
    with pytest.raises(RuntimeError) as caught:
        decode(inputs, window=25, block_table=freed)
    assert from_message(str(caught.value)).actual == "-5 at [1, 7]"


@pytest.mark.parametrize("dtype", strategies.DTYPES)
@pytest.mark.parametrize("h_q", [1, 16])
def test_extreme_softcaps(dtype: str, h_q: int) -> None:
    """The smallest makes all weights equal, the largest changes nothing; a huge score is capped, not infinite."""
    case = DecodeCase((60,), h_q=h_q, d=24, d_v=16, dtype=dtype, q_spread=3.0)
    inputs = build(case)
    values = inputs.kv_cache[inputs.block_table[0, :1].long()][0, :60, 0, :16]
    tiny = decode(inputs, softcap=1e-38)[0]
    torch.testing.assert_close(tiny.float(), values.float().mean(0).expand_as(tiny), atol=3e-3, rtol=0)
    assert all(map(torch.allclose, decode(inputs, softcap=1e30), decode(inputs, softcap=0.0), [1e-2] * 2))
    lse = decode(inputs, q=inputs.q * 1e3, softcap=3.0)[1]
    assert lse.abs().max() <= 3.0 + torch.tensor(60.0).log()


@pytest.mark.parametrize("lay_out", [False, True])
def test_out_variant_of_ragged_queries(lay_out: bool) -> None:
    inputs = build(OPTIONS)
    out, lse = decode(inputs)
    into, lse_into = torch.full_like(out, torch.nan), torch.full_like(lse, torch.nan)
    if lay_out:
        generator = torch.Generator().manual_seed(0)
        into, lse_into = strided(into, generator), strided(lse_into, generator, contiguous_rows=False)
    torch.ops.flashmla.decode.out(**inputs.kwargs(), out=into, lse=lse_into)
    assert same_bits(out, into)
    assert same_bits(lse, lse_into)


def test_boundaries_in_int64() -> None:
    inputs = build(OPTIONS)
    assert inputs.cu_seqlens_q is not None
    assert all(map(same_bits, decode(inputs), decode(inputs, cu_seqlens_q=inputs.cu_seqlens_q.long())))


@pytest.mark.parametrize("s_qs", [(), (0, 0)])
def test_no_queries(s_qs: tuple[int, ...]) -> None:
    inputs = build(replace(OPTIONS, lengths=(5,) * len(s_qs), s_qs=s_qs))
    out, lse = decode(inputs)
    assert (list(out.shape), list(lse.shape)) == ([0, 9, 16], [9, 0])


@pytest.mark.parametrize("dtype", strategies.DTYPES)
@pytest.mark.parametrize("case", [OPTIONS, replace(OPTIONS, s_qs=None, s_q=2), replace(OPTIONS, batch_invariant=True)])
def test_decode_up_is_decode_and_a_product(dtype: str, case: DecodeCase) -> None:
    inputs = build(replace(case, dtype=dtype))
    weight = torch.randn(9, 16, 12).to(inputs.q.dtype)
    out, lse = torch.ops.flashmla.decode_up(**inputs.kwargs(), weight=weight)
    attended, attended_lse = decode(inputs)
    expected = torch.einsum("...hv,hvu->...hu", attended.double(), weight.double())
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    assert same_bits(lse, attended_lse)


@pytest.mark.parametrize("case", [OPTIONS, replace(OPTIONS, s_qs=None, s_q=2, batch_invariant=True)], ids=repr)
@pytest.mark.parametrize("op", ["decode", "decode_up"])
def test_opcheck(op: str, case: DecodeCase) -> None:
    inputs = build(case).kwargs()
    weight = {} if op == "decode" else {"weight": torch.randn(9, 16, 12)}
    opcheck(getattr(torch.ops.flashmla, op).default, (), inputs | weight)


def count_graphs(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """The function compiled for dynamic sizes, and a list that has an element for each compilation."""
    compilations: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        compilations.append(1)
        return graph.forward

    return torch.compile(function, backend=backend, fullgraph=True), compilations


def test_one_graph_for_all_lengths_and_boundaries() -> None:
    """What queries see changes from call to call; nothing is compiled again."""
    inputs = build(replace(OPTIONS, strided=False))
    compiled, compilations = count_graphs(lambda q, **named: torch.ops.flashmla.decode(q, **named))
    assert inputs.cu_seqlens_q is not None
    for shift in range(3):
        bounds = inputs.cu_seqlens_q.clone()
        bounds[1] += shift
        changes = {
            "cu_seqlens_q": bounds,
            "cache_seqlens": inputs.cache_seqlens - (inputs.cache_seqlens > 50).int() * shift,
        }
        kwargs = inputs.kwargs(**changes)
        assert all(map(same_bits, compiled(**kwargs), decode(inputs, **changes)))
    assert len(compilations) == 1


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)])
def test_vmap_over_ragged_queries(in_dims: tuple[int | None, int | None]) -> None:
    inputs = build(replace(OPTIONS, strided=False))
    assert inputs.cu_seqlens_q is not None
    bounds = torch.stack([inputs.cu_seqlens_q, torch.tensor([0, 10, 20, 30, 40, 49], dtype=torch.int32)])
    q = torch.stack([inputs.q, inputs.q.flip(0)])
    mapped = (q if in_dims[0] == 0 else q[0], bounds if in_dims[1] == 0 else bounds[0])
    out, lse = torch.vmap(lambda q, cu: decode(inputs, q=q, cu_seqlens_q=cu), in_dims)(*mapped)
    for i in range(2):
        one = decode(inputs, q=q[i if in_dims[0] == 0 else 0], cu_seqlens_q=bounds[i if in_dims[1] == 0 else 0])
        assert all(map(same_bits, one, (out[i], lse[i])))


def test_vmap_keeps_the_options() -> None:
    inputs = build(replace(OPTIONS, s_qs=None, s_q=2, strided=False))
    q = torch.stack([inputs.q, inputs.q * 2])
    out, lse = torch.vmap(lambda q: decode(inputs, q=q))(q)
    for i in range(2):
        torch.testing.assert_close((out[i], lse[i]), decode(inputs, q=q[i]))


@pytest.mark.parametrize("sink_dim", [None, 0])
@pytest.mark.parametrize("k_dim", [None, 0])
def test_vmap_over_prefill_keeps_the_options(sink_dim: int | None, k_dim: int | None) -> None:
    q, k, v = torch.randn(2, 7, 4, 8), torch.randn(2, 9, 2, 8), torch.randn(9, 2, 6)
    bounds_q, bounds_k = torch.tensor([0, 3, 7]), torch.tensor([0, 4, 9])
    sink = torch.randn(2, 4)

    def attend(q: Tensor, k: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        options = (True, None, 3, sink, 3, 1.5)
        result: tuple[Tensor, Tensor] = torch.ops.flashmla.prefill(q, k, v, bounds_q, bounds_k, *options)
        return result

    mapped = (q, k if k_dim == 0 else k[0], sink if sink_dim == 0 else sink[0])
    out, lse = torch.vmap(attend, (0, k_dim, sink_dim), (0, 0))(*mapped)
    for i in range(2):
        one = attend(q[i], k[i if k_dim == 0 else 0], sink[i if sink_dim == 0 else 0])
        torch.testing.assert_close((out[i], lse[i]), one)


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_autocast_leaves_sinks_alone(op: str) -> None:
    q, k, v = torch.randn(5, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 6)
    bounds_q, bounds_k, sink = torch.tensor([0, 5]), torch.tensor([0, 9]), torch.randn(4)
    with torch.autocast("cpu", torch.bfloat16):
        if op == "prefill":
            out, _ = torch.ops.flashmla.prefill(q, k, v, bounds_q, bounds_k, attn_sink=sink)
            assert out.dtype == torch.bfloat16
        else:
            inputs = build(replace(OPTIONS, dtype="bfloat16"))
            out, _ = decode(inputs, q=inputs.q.float())
            assert same_bits(out, decode(inputs)[0])
