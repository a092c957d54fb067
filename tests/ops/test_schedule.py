"""`flashmla::decode_schedule`: what it holds, that it covers the work, and which schedules `decode` refuses."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmla_ops import reference
from flashmla_ops.errors import from_message
from flashmla_ops.reference.schedule import HEADER, MIN_UNITS, UNIT, row_block, schedule_numel
from tests.strategies import DTYPES, HEADS
from tests.support.cases import DecodeCase, build
from tests.support.oracle import check_decode
from tests.support.poison import same_bits, strided

LENGTHS = st.lists(st.one_of(st.just(0), st.integers(0, 200), st.integers(0, 100_000)), max_size=8)
CASE = DecodeCase(lengths=(300, 0, 33, 64), s_q=2, h_q=18, h_kv=2, d=48, d_v=32, num_parts=3, dtype="float32")


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@settings(max_examples=400)
@given(LENGTHS, st.integers(1, 4), HEADS, st.integers(1, 40), st.integers(0, 2**31))
def test_is_the_one_that_the_reference_makes(
    lengths: list[int], s_q: int, heads: tuple[int, int], num_parts: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    cache_seqlens = strided(int32(lengths), generator, contiguous_rows=False)
    schedule = torch.ops.flashmla.decode_schedule(cache_seqlens, s_q, *heads, num_parts)
    assert torch.equal(schedule, reference.decode_schedule(cache_seqlens, s_q, *heads, num_parts))
    assert schedule.is_contiguous()


@settings(max_examples=400)
@given(LENGTHS, st.integers(1, 4), HEADS, st.integers(1, 40))
def test_parts_cover_all_work_evenly(lengths: list[int], s_q: int, heads: tuple[int, int], num_parts: int) -> None:
    b, (h_q, h_kv) = len(lengths), heads
    schedule = torch.ops.flashmla.decode_schedule(int32(lengths), s_q, h_q, h_kv, num_parts).tolist()
    assert len(schedule) == schedule_numel(b, num_parts)
    block = row_block(b, s_q, h_q, h_kv, num_parts)
    assert schedule[:HEADER] == [b, s_q, h_q, h_kv, num_parts, block, 0, 0]
    assert schedule[HEADER : HEADER + b] == lengths

    blocks = -(-s_q * (h_q // h_kv) // block)
    units = [max(1, -(-length // UNIT)) for length in lengths for _ in range(h_kv * blocks)]
    before = [sum(units[:i]) for i in range(len(units) + 1)]
    starts = schedule[HEADER + b :]
    pairs = list(zip(starts[::2], starts[1::2], strict=True))
    assert pairs[0] == (0, 0)
    assert pairs[-1] == (len(units), 0)
    for item, token in pairs[:-1]:
        assert token % UNIT == 0
        assert item == len(units) or token < max(1, units[item] * UNIT)
    cuts = [before[item] + token // UNIT for item, token in pairs]
    sizes = [end - start for start, end in itertools.pairwise(cuts)]
    assert min(sizes) >= 0
    assert max(sizes) <= max(MIN_UNITS, -(-before[-1] // num_parts))


@settings(max_examples=300)
@given(st.sampled_from(DTYPES), st.integers(1, 64), st.booleans(), st.integers(0, 2**31))
def test_any_number_of_parts_gives_the_same_result(dtype: str, num_parts: int, causal: bool, seed: int) -> None:
    check_decode(replace(CASE, dtype=dtype, num_parts=num_parts, causal=causal, q_spread=3.0, seed=seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_parts", [None, 1, 2, 5, 64])
def test_bitwise_the_same_from_run_to_run(dtype: str, num_parts: int | None) -> None:
    inputs = build(replace(CASE, dtype=dtype, num_parts=num_parts, lengths=(700, 0, 33, 64)))
    first = torch.ops.flashmla.decode(**inputs.kwargs())
    for _ in range(10):
        assert all(map(same_bits, torch.ops.flashmla.decode(**inputs.kwargs()), first))


def refusal(case: DecodeCase, schedule: torch.Tensor) -> tuple[str, str]:
    """Expected and actual of the error that `decode` raises for ``schedule``."""
    with pytest.raises(RuntimeError, match="flashmla::decode: argument 'schedule'") as caught:
        torch.ops.flashmla.decode(**build(case).kwargs(schedule=schedule))
    error = from_message(str(caught.value))
    return error.expected, error.actual


def test_stale_lengths_are_refused() -> None:
    schedule = build(CASE).schedule
    later = replace(CASE, lengths=(300, 0, 34, 64))
    assert refusal(later, schedule) == ("a schedule made for length 34 at [2]", "one made for length 33")


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("lengths", (300, 0, 33), [3, 2, 18, 2]),
        ("s_q", 1, [4, 1, 18, 2]),
        ("h_q", 16, [4, 2, 16, 2]),
        ("h_kv", 1, [4, 2, 18, 1]),
    ],
)
def test_another_shape_is_refused(field: str, value: object, wanted: list[int]) -> None:
    schedule = build(CASE).schedule
    expected, actual = refusal(replace(CASE, **{field: value}), schedule)
    assert expected == f"a schedule made for [b, s_q, h_q, h_kv] {wanted}"
    assert actual == "one made for [4, 2, 18, 2]"


@pytest.mark.parametrize("change", [-1, 1, 1000, 2**30, -(2**31)])
@pytest.mark.parametrize("index", [0, 1, 2, 3, 4, 5, *range(HEADER, schedule_numel(4, 3))])
def test_an_altered_schedule_is_refused(index: int, change: int) -> None:
    schedule = build(CASE).schedule.clone()
    schedule[index] = max(min(int(schedule[index]) + change, 2**31 - 1), -(2**31))
    refusal(CASE, schedule)


def test_a_truncated_or_longer_schedule_is_refused() -> None:
    schedule = build(CASE).schedule
    elements = schedule.numel()
    assert refusal(CASE, schedule[:-2].clone())[1] == f"{elements - 2} elements"
    longer = torch.cat([schedule, schedule[:2]])
    assert refusal(CASE, longer) == ("the tensor that decode_schedule returned", f"{elements + 2} elements")


def test_negative_length_is_refused() -> None:
    with pytest.raises(RuntimeError, match="flashmla::decode_schedule: argument 'cache_seqlens'") as caught:
        torch.ops.flashmla.decode_schedule(int32([5, 0, -3]), 1, 16, 1, 2)
    error = from_message(str(caught.value))
    assert (error.expected, error.actual) == ("lengths of at least 0", "-3 at [2]")
