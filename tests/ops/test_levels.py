"""The levels of the hierarchy give the same numbers and keep less and less in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmla_ops import cpu, reference
from flashmla_ops.footprint import decode_footprint, prefill_footprint
from tests import strategies
from tests.support.cases import DecodeCase, build
from tests.support.compare import difference
from tests.support.oracle import tolerances

kernels_only = pytest.mark.skipif(cpu.STATE.active == cpu.REFERENCE, reason=f"no C++ kernels: {cpu.STATE.reason}")


@settings(max_examples=150)
@given(case=strategies.decode_cases() | strategies.option_cases(), levels=st.sampled_from([1, 2]))
def test_decode_at_any_level(case: DecodeCase, levels: int) -> None:
    inputs = build(case)
    out, lse = torch.ops.flashmla.decode(**inputs.kwargs(schedule=None), levels=levels)
    expected_out, expected_lse = reference.decode(**inputs.reference_kwargs())
    for name, actual, expected, tolerance in zip(
        ("out", "lse"), (out, lse), (expected_out, expected_lse), tolerances(case, inputs), strict=True
    ):
        problem = difference(name, actual, expected, tolerance)
        assert problem is None, f"levels={levels} {problem}\nrepro: {case!r}"


@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (6, 2), (16, 16), (9, 3)]),
    causal=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=40)
def test_prefill_at_level_1(lengths: list[int], heads: tuple[int, int], causal: bool, seed: int) -> None:
    torch.manual_seed(seed)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    q = torch.randn(sum(lengths), heads[0], 24)
    k, v = torch.randn(sum(lengths), heads[1], 24), torch.randn(sum(lengths), heads[1], 40)
    out, lse = torch.ops.flashmla.prefill(q, k, v, bounds, bounds, causal, levels=1)
    expected_out, expected_lse = reference.prefill(q, k, v, bounds, bounds, causal)
    torch.testing.assert_close(out.double(), expected_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@kernels_only
def test_levels_2_and_3_agree_bit_for_bit_on_one_part() -> None:
    inputs = build(DecodeCase((700, 0, 33), h_q=16, dtype="bfloat16", num_parts=1))
    arguments = {**inputs.kwargs(), "schedule": None}
    lone = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert all(map(torch.equal, *(torch.ops.flashmla.decode(**arguments, levels=n) for n in (2, 3))))
    finally:
        torch.set_num_threads(lone)


@pytest.mark.parametrize("levels", [0, 4, -1])
def test_other_levels_are_refused(levels: int) -> None:
    inputs = build(DecodeCase((5,), h_q=1))
    with pytest.raises(RuntimeError, match="'levels': expected 1, 2 or 3"):
        torch.ops.flashmla.decode(**inputs.kwargs(), levels=levels)


def test_a_schedule_is_refused_where_nothing_is_cut() -> None:
    inputs = build(DecodeCase((100,), h_q=16, num_parts=2))
    arguments = inputs.kwargs()
    lengths = arguments["cache_seqlens"]
    arguments["schedule"] = torch.ops.flashmla.decode_schedule(lengths, 1, 16, 1, 2)
    with pytest.raises(RuntimeError, match="'schedule': expected None below level 3"):
        torch.ops.flashmla.decode(**arguments, levels=2)


@kernels_only
def test_prefill_keeps_at_least_60_percent_less_than_level_1() -> None:
    whole, blocks = (prefill_footprint(2048, 16, levels=n, threads=2).total for n in (1, 3))
    assert blocks <= 0.4 * whole


@kernels_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("h_q", [1, 16, 128])
def test_only_scores_of_level_1_grow_with_the_context(h_q: int, dtype: torch.dtype) -> None:
    short, long = (
        [decode_footprint(2, h_q, n, dtype=dtype, levels=k, threads=2) for k in (1, 2, 3)] for n in (1024, 8192)
    )
    assert long[0].scores > 7 * short[0].scores
    assert long[1:] == short[1:]
    assert long[1].outputs < long[2].outputs
