"""`flashmla::decode` against the float64 reference: drawn cases, and the official package's list of dense cases."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings

from tests import strategies
from tests.support.cases import DecodeCase
from tests.support.oracle import check_decode

#: (h_q, h_kv) of the official dense tests.
OFFICIAL_HEADS = [(h_q, h_kv) for h_q in (1, 3, 9, 63, 64, 126, 128) for h_kv in (1, 2, 3, 8) if h_q % h_kv == 0]


def official_case(
    b: int, s_q: int, s_k: int, heads: tuple[int, int], varlen: bool, causal: bool, *, zeros: bool = False
) -> DecodeCase:
    """A dense case of the official tests: d 576, d_v 512, pages of 64 tokens."""
    chance = random.Random(b * 1000 + s_k)
    lengths = [s_k] * b
    if varlen:
        lengths = [int(max(chance.normalvariate(s_k, s_k / 2), s_q)) for _ in lengths]
    if zeros:
        lengths = [0 if chance.random() < 0.5 else length for length in lengths]
    strided = b * s_k < 10_000  # a strided copy of the largest caches would not fit in memory
    return DecodeCase(tuple(lengths), s_q=s_q, h_q=heads[0], h_kv=heads[1], causal=causal, num_parts=2, strided=strided)


def official_cases(batches: tuple[int, ...], s_ks: tuple[int, ...]) -> list[DecodeCase]:
    grid = itertools.product(batches, (1, 2, 4), s_ks, OFFICIAL_HEADS, (False, True), (False, True))
    return [official_case(*point) for point in grid]


def official_corner_cases(b: int, s_k: int) -> list[DecodeCase]:
    """Some sequences are empty."""
    return [
        official_case(b, 2, s_k, heads, True, causal, zeros=True)
        for heads in OFFICIAL_HEADS
        for causal in (False, True)
    ]


@settings(max_examples=1500)
@given(strategies.decode_cases())
def test_any_case(case: DecodeCase) -> None:
    check_decode(case)


@settings(max_examples=700)
@given(strategies.option_cases())
def test_any_options(case: DecodeCase) -> None:
    check_decode(case)


@settings(max_examples=250)
@given(strategies.mla_cases())
def test_mla_case(case: DecodeCase) -> None:
    check_decode(case)


@pytest.mark.parametrize("case", official_cases((1, 2, 6), (20, 140)) + official_corner_cases(8, 140), ids=repr)
def test_official_case(case: DecodeCase) -> None:
    check_decode(case)


def test_the_official_list_is_complete() -> None:
    assert len(official_cases((1, 2, 6, 64), (20, 140, 4096))) == 2304
    assert len(official_corner_cases(128, 4096)) == 32


@pytest.mark.slow
@pytest.mark.parametrize("index", range(2304))
def test_official_case_at_its_size(index: int) -> None:
    check_decode(official_cases((1, 2, 6, 64), (20, 140, 4096))[index])


@pytest.mark.slow
@pytest.mark.parametrize("index", range(32))
def test_official_corner_case_at_its_size(index: int) -> None:
    check_decode(official_corner_cases(128, 4096)[index])
