"""What many ranks are said to do follows from what one does."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bench import scale
from bench.runner import OURS
from bench.scale import Geometry, Link, Parts, Plan, best, plans, step
from bench.suites import dist

LINK = Link("paper", 1e-5, 1e9)
PARTS = Parts({1 << i: 1e-9 * (1 << i) + 1e-8 for i in range(8)}, 0.0, 1e10, LINK)


def results() -> dict[str, Any]:
    """As the suite writes them, of a machine on which everything takes what `PARTS` says."""

    def row(case: dist.DistCase, seconds: float) -> dict[str, Any]:
        spread = {"median": seconds * case.times, "q1": seconds, "q3": seconds}
        return {"case": vars(case), "timings": {OURS: spread}}

    rows = []
    for case in dist.cases(False):
        if case.group == dist.HEADS:
            rows.append(row(case, PARTS.attention(case.h_q, case.b * case.s_kv)))
        if case.group == dist.MESSAGES:
            there_and_back = 2 * LINK.send(case.bytes)
            way = getattr(LINK, case.way)
            rows.append(row(case, there_and_back if case.way == "send" else way(case.ranks, case.bytes)))
    host = {"microarchitecture": "paper", "threads": 2}
    return {"results": rows, "host": host, "limits": {"dram_read": 2e10}, "date": "2000-01-01"}


def test_parts_come_from_results() -> None:
    parts = scale.parts_of(results())
    assert parts.seconds == pytest.approx(PARTS.seconds)
    assert (parts.spread, parts.weights) == (0.0, PARTS.weights)
    assert (parts.link.latency, parts.link.rate) == pytest.approx((LINK.latency, LINK.rate))
    assert {row[-1] for row in scale.check(results(), parts)} == {"1.00"}


def test_one_rank_is_the_sum_of_its_parts() -> None:
    geometry = Geometry()
    layer = (geometry.whole + geometry.by_heads) * 2 / PARTS.weights + PARTS.attention(128, 3 * 100)
    found = step(Plan(1, 1, 1, 1), 3, 100, PARTS, LINK)
    assert found.seconds == pytest.approx(geometry.layers * layer)
    assert found.sent == found.waiting == 0
    # The layer of DeepSeek-V3 without its two norms of 1,536 and 512 weights.
    assert geometry.whole + geometry.by_heads == 187_105_280


def test_cutting_by_pages_gathers_states() -> None:
    one, four = (step(Plan(1, 1, n, 1), 1, 4096, PARTS, LINK) for n in (1, 4))
    state = 128 * (512 * 2 + 4)
    exchanged = 61 * 3 * LINK.send(state)
    saved = 61 * PARTS.attention(128, 4096 - 1024)
    assert four.seconds == pytest.approx(one.seconds - saved + exchanged)
    assert (four.cache, four.sent) == pytest.approx((one.cache / 4, 61 * 3 * state))


@pytest.mark.parametrize("ranks", [8, 64])
def test_plans_have_all_ranks(ranks: int) -> None:
    found = list(plans(ranks, 4, Geometry()))
    assert len(set(found)) == len(found) > 5
    assert {each.layers * each.heads * each.pages * each.sequences for each in found} == {ranks}
    assert all(each.layers * each.sequences <= 4 for each in found)


def test_more_ranks_are_never_slower_and_waiting_costs() -> None:
    tokens = [best(ranks, 64, 32768, PARTS, LINK).tokens for ranks in (8, 32, 128)]
    assert tokens == sorted(tokens)
    uneven = Parts(PARTS.seconds, 0.1, PARTS.weights, LINK)
    plan = Plan(1, 8, 1, 1)
    assert step(plan, 64, 4096, uneven, LINK).seconds > step(plan, 64, 4096, PARTS, LINK).seconds


def test_the_document_says_where_it_comes_from() -> None:
    text = scale.document(results())
    assert len(re.findall(r"\| +1024 +\|", text)) == len(scale.LOADS) * len(scale.links(PARTS))
    assert "## 25 Gb/s, 20 us" in text
