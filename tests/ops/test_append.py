"""`flashmla::append_`: rows land where their slots say, nothing else changes, and an error changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.errors import from_message
from tests.strategies import DTYPES, SEEDS
from tests.support.poison import same_bits, strided

INT64_MIN = -(2**63)


@dataclass
class Append:
    """Two caches, their rows and the slots; the caches start as NaN, which every untouched slot must keep."""

    kv_cache: Tensor  # [n_pages, page_size, h_kv, d]
    k_cache: Tensor  # [n_pages, page_size, h_kv, d_k]
    rows: Tensor  # [n, h_kv, d]
    k_rows: Tensor  # [n, h_kv, d_k]
    slot_mapping: Tensor  # [n] int64


def make(
    slots: list[int],
    n_pages: int,
    page_size: int,
    h_kv: int,
    d: int,
    d_k: int,
    dtype: str,
    lay_out: bool,
    seed: int = 0,
) -> Append:
    generator = torch.Generator().manual_seed(seed)
    element = getattr(torch, dtype)

    def lay(tensor: Tensor, contiguous_rows: bool = True) -> Tensor:
        return strided(tensor, generator, contiguous_rows=contiguous_rows) if lay_out else tensor

    def cache(width: int) -> Tensor:
        return lay(torch.full((n_pages, page_size, h_kv, width), torch.nan, dtype=element))

    def rows(width: int) -> Tensor:
        return lay(torch.randn(len(slots), h_kv, width, generator=generator, dtype=element), contiguous_rows=False)

    slot_mapping = lay(torch.tensor(slots, dtype=torch.int64), contiguous_rows=False)
    return Append(cache(d), cache(d_k), rows(d), rows(d_k), slot_mapping)


@st.composite
def appends(draw: st.DrawFn) -> Append:
    n_pages, page_size = draw(st.integers(1, 5)), draw(st.integers(1, 20))
    slot = st.one_of(st.integers(0, n_pages * page_size - 1), st.sampled_from([-1, -7, INT64_MIN]))
    return make(
        draw(st.lists(slot, max_size=30)),
        n_pages,
        page_size,
        h_kv=draw(st.integers(1, 4)),
        d=draw(st.one_of(st.integers(1, 40), st.sampled_from([512, 576]))),
        d_k=draw(st.integers(1, 70)),
        dtype=draw(st.sampled_from(DTYPES)),
        lay_out=draw(st.booleans()),
        seed=draw(SEEDS),
    )


@settings(max_examples=300)
@given(appends())
def test_one_tensor(case: Append) -> None:
    expected = case.kv_cache.clone()
    torch.ops.flashmla.append_(case.kv_cache, case.rows, case.slot_mapping)
    reference.append(expected, case.rows, case.slot_mapping)
    assert same_bits(case.kv_cache, expected)


@settings(max_examples=300)
@given(appends())
def test_two_tensors(case: Append) -> None:
    expected, k_expected = case.kv_cache.clone(), case.k_cache.clone()
    torch.ops.flashmla.append_.two(case.kv_cache, case.k_cache, case.rows, case.k_rows, case.slot_mapping)
    reference.append(expected, case.rows, case.slot_mapping)
    reference.append(k_expected, case.k_rows, case.slot_mapping)
    assert same_bits(case.kv_cache, expected)
    assert same_bits(case.k_cache, k_expected)


@settings(max_examples=50)
@given(appends())
def test_writes_nothing_between_the_rows_of_a_strided_cache(case: Append) -> None:
    n_pages, page_size, h_kv, d = case.kv_cache.shape
    strides = (page_size * h_kv * (d + 2) + 1, h_kv * (d + 2), d + 2, 1)
    room = torch.full((n_pages * strides[0] + 7,), 13.0, dtype=case.kv_cache.dtype)
    cache = room.as_strided(case.kv_cache.shape, strides, storage_offset=3)
    cache.fill_(torch.nan)
    outside = room == 13.0
    torch.ops.flashmla.append_(cache, case.rows, case.slot_mapping)
    assert (room[outside] == 13.0).all()


def test_the_later_of_two_rows_for_one_slot_stays() -> None:
    n = 2000  # enough to be divided among threads
    case = make([5, 3] * (n // 2), 2, 4, h_kv=1, d=576, d_k=64, dtype="float32", lay_out=False)
    torch.ops.flashmla.append_.two(case.kv_cache, case.k_cache, case.rows, case.k_rows, case.slot_mapping)
    for cache, rows in ((case.kv_cache, case.rows), (case.k_cache, case.k_rows)):
        assert torch.equal(cache[1, 1], rows[-2])
        assert torch.equal(cache[0, 3], rows[-1])
        assert int(cache.isnan().all(-1).sum()) == 6


def test_slots_past_2_to_the_31_elements() -> None:
    # The cache is only reserved, not touched, but for the page that is written.
    page_size, d = 64, 576
    n_pages = 2**31 // (page_size * d) + 3
    cache = torch.empty(n_pages, page_size, 1, d, dtype=torch.bfloat16)
    assert cache.numel() > 2**31
    rows = torch.randn(2, 1, d).bfloat16()
    slot = (n_pages - 1) * page_size
    torch.ops.flashmla.append_(cache, rows, torch.tensor([slot + 63, slot]))
    assert torch.equal(cache[-1, [63, 0]], rows)


@pytest.mark.parametrize("bad", [12, 13, 2**31, 2**63 - 1])
@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("two", [False, True])
def test_a_slot_past_the_end_raises_and_nothing_is_written(bad: int, place: int, two: bool) -> None:
    slots = [0, 1, -1, 11]
    slots[place] = bad
    case = make(slots, 3, 4, h_kv=2, d=40, d_k=8, dtype="bfloat16", lay_out=True)
    tensors = (case.kv_cache, case.k_cache, case.rows, case.k_rows) if two else (case.kv_cache, case.rows)
    with pytest.raises(RuntimeError, match="flashmla::append_: argument 'slot_mapping'") as caught:
        torch.ops.flashmla.append_(*tensors, case.slot_mapping)
    error = from_message(str(caught.value))
    assert (error.expected, error.actual) == ("slots below 12", f"{bad} at [{place}]")
    assert case.kv_cache.isnan().all()
    assert case.k_cache.isnan().all()


def test_no_rows_and_only_skipped_rows_write_nothing() -> None:
    for slots in ([], [-1, INT64_MIN]):
        case = make(slots, 2, 4, h_kv=1, d=8, d_k=4, dtype="float16", lay_out=False)
        torch.ops.flashmla.append_.two(case.kv_cache, case.k_cache, case.rows, case.k_rows, case.slot_mapping)
        assert case.kv_cache.isnan().all()
        assert case.k_cache.isnan().all()
