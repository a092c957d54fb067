"""`flashmla::merge_states`: against the reference, and as the inverse of splitting a sequence."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashmla_ops import reference
from tests import strategies
from tests.support.cases import DecodeCase, DecodeInputs, build
from tests.support.compare import OFFICIAL_OUT, Tolerance, difference
from tests.support.oracle import tolerances
from tests.support.poison import same_bits, strided
from tests.support.threads import threads

TOLERANCES = {
    "float32": Tolerance(absolute=2.0**-20, relative=2.0**-20, cosine=1e-9),
    "float16": OFFICIAL_OUT,
    "bfloat16": OFFICIAL_OUT,
}


def make_parts(
    parts: int, shape: tuple[int, ...], dtype: str, empty: float, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Outs [..., s_q, h_q, d_v] and lses [..., h_q, s_q]; a share ``empty`` of the lses is infinite, their outs NaN."""
    generator = torch.Generator().manual_seed(seed)
    outs, lses = [], []
    for _ in range(parts):
        lse = torch.randn(*shape[:-3], shape[-2], shape[-3], generator=generator) * 5
        nothing = torch.rand(lse.shape, generator=generator) < empty
        sign = torch.where(torch.rand(lse.shape, generator=generator) < 0.5, -torch.inf, torch.inf)
        out = torch.randn(shape, generator=generator)
        out[nothing.transpose(-1, -2)] = torch.nan
        outs.append(strided(out.to(getattr(torch, dtype)), generator))
        lses.append(strided(torch.where(nothing, sign, lse), generator, contiguous_rows=False))
    return outs, lses


@settings(max_examples=300)
@given(
    st.integers(1, 5),
    st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 9), st.one_of(st.integers(1, 40), st.just(512))),
    st.booleans(),
    st.sampled_from(strategies.DTYPES),
    st.sampled_from([0.0, 0.3, 1.0]),
    strategies.SEEDS,
)
def test_agrees_with_the_reference(
    parts: int, shape: tuple[int, ...], batched: bool, dtype: str, empty: float, seed: int
) -> None:
    outs, lses = make_parts(parts, shape if batched else shape[1:], dtype, empty, seed)
    out, lse = torch.ops.flashmla.merge_states(outs, lses)
    assert out.dtype == outs[0].dtype
    assert lse.dtype == torch.float32
    assert out.is_contiguous()
    assert lse.is_contiguous()
    expected, expected_lse = reference.merge_states(outs, lses)
    assert difference("out", out, expected.to(out.dtype), TOLERANCES[dtype]) is None
    assert difference("lse", lse, expected_lse, TOLERANCES["float32"]) is None


def test_parts_that_saw_nothing_have_no_weight_and_all_of_them_give_nothing() -> None:
    out = torch.tensor([1.0, 2.0]).reshape(1, 1, 2)  # [s_q, h_q, d_v]
    nan = torch.full_like(out, torch.nan)
    lse = torch.tensor([[0.5]])  # [h_q, s_q]
    for infinite in (torch.inf, -torch.inf):
        merged, merged_lse = torch.ops.flashmla.merge_states([nan, out, nan], [lse * infinite, lse, lse * infinite])
        assert torch.equal(merged, out)
        assert torch.equal(merged_lse, lse)
        merged, merged_lse = torch.ops.flashmla.merge_states([nan, nan], [lse * infinite, lse * infinite])
        assert torch.equal(merged, torch.zeros_like(out))
        assert torch.equal(merged_lse, torch.full_like(lse, torch.inf))


def test_nan_of_a_part_that_counts_stays() -> None:
    out = torch.ones(1, 2, 3)  # [s_q, h_q, d_v]
    bad = out.clone()
    bad[0, 0, 1] = torch.nan
    merged, lse = torch.ops.flashmla.merge_states([out, bad], [torch.zeros(2, 1), torch.zeros(2, 1)])
    assert merged.isnan().tolist() == [[[False, True, False], [False] * 3]]
    assert lse.isfinite().all()


def test_equal_parts_of_integers_are_exact() -> None:
    outs = [torch.full((2, 1, 3, 8), float(value)) for value in (1, 2, 3, 6)]
    lses = [torch.zeros(2, 3, 1)] * 4
    merged, _ = torch.ops.flashmla.merge_states(outs, lses)
    assert torch.equal(merged, torch.full((2, 1, 3, 8), 3.0))


@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_one_part_is_returned_as_it_is(dtype: str) -> None:
    (out,), (lse,) = make_parts(1, (2, 3, 5, 64), dtype, 0.0, seed=1)
    merged, merged_lse = torch.ops.flashmla.merge_states([out], [lse])
    assert torch.equal(merged, out)
    assert torch.equal(merged_lse, lse)


@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_bitwise_the_same_from_run_to_run(dtype: str) -> None:
    outs, lses = make_parts(4, (8, 2, 64, 512), dtype, 0.2, seed=2)
    first = torch.ops.flashmla.merge_states(outs, lses)
    for _ in range(5):
        assert all(map(same_bits, torch.ops.flashmla.merge_states(outs, lses), first))


def pages_from(inputs: DecodeInputs, case: DecodeCase, first: int, last: int) -> dict[str, Tensor]:
    """The arguments of a decode over pages [first, last) of each sequence."""
    lengths = inputs.cache_seqlens - first * case.page_size
    lengths = lengths.clamp(0, (last - first) * case.page_size)
    return {"block_table": inputs.block_table[:, first:last], "cache_seqlens": lengths}


@settings(max_examples=200)
@given(strategies.decode_cases(), st.integers(0, 4), st.integers(0, 4))
def test_parts_of_the_sequences_merge_to_the_whole(case: DecodeCase, one: int, two: int) -> None:
    case = replace(case, causal=False, sink=False, num_parts=None)
    inputs = build(case)
    end = inputs.block_table.size(1)
    cuts = sorted((0, min(one, end), min(two, end), end))
    parts = [
        torch.ops.flashmla.decode(**inputs.kwargs(**pages_from(inputs, case, first, last)))
        for first, last in itertools.pairwise(cuts)
    ]
    outs, lses = zip(*parts, strict=True)
    merged, merged_lse = torch.ops.flashmla.merge_states(outs, lses)
    with threads(1):
        out, lse = reference.decode(**inputs.reference_kwargs())
    out_tolerance, lse_tolerance = tolerances(case, inputs)
    # Twice, for the parts were rounded to the dtype before the merge; a cosine is a square.
    twice = Tolerance(2 * out_tolerance.absolute, 2 * out_tolerance.relative, 4 * out_tolerance.cosine)
    assert difference("out", merged, out.to(merged.dtype), twice) is None, repr(case)
    assert difference("lse", merged_lse, lse, lse_tolerance) is None, repr(case)


def test_a_part_far_below_another_has_no_weight_left() -> None:
    outs = [torch.full((1, 1, 4), 3.0), torch.full((1, 1, 4), 1e30)]
    merged, lse = torch.ops.flashmla.merge_states(outs, [torch.tensor([[0.0]]), torch.tensor([[-200.0]])])
    assert torch.equal(merged, outs[0])
    assert torch.equal(lse, torch.zeros(1, 1))
