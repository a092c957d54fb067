"""Blocks, turns and statistics, on made-up numbers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import timing


def block(wall: float, *, cpu: float = 1.0, delay: float = 0.0) -> timing.Block:
    return timing.Block(wall, cpu, 2 * cpu, delay)


def test_only_clean_blocks_count() -> None:
    blocks = [block(w) for w in (1.0, 2.0, 3.0, 4.0, 5.0)] + [block(100.0, delay=0.5)] * 9
    summary = timing.summarize(blocks, max_delay=0.03)
    assert (summary.q1, summary.median, summary.q3) == (2.0, 3.0, 4.0)
    assert summary.clean
    assert (summary.clean_blocks, summary.blocks) == (5, 14)


def test_cpu_time_stands_in_where_too_few_blocks_are_clean() -> None:
    blocks = [block(50.0, cpu=7.0)] * 3 + [block(100.0, cpu=7.0, delay=0.5)] * 4
    summary = timing.summarize(blocks, max_delay=0.03)
    assert not summary.clean
    assert summary.median == summary.cpu_max == 7.0
    assert summary.cpu_sum == 14.0


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=50))
def test_quartiles_are_ordered_and_inside(values: list[float]) -> None:
    q1, median, q3 = timing.quartiles(values)
    assert min(values) <= q1 <= median <= q3 <= max(values)


def test_turns_are_interleaved_and_every_block_is_checked() -> None:
    calls: list[str] = []
    checked: list[tuple[str, int]] = []
    counter = itertools.count()

    def call(name: str) -> int:
        calls.append(name)
        return next(counter)

    budget = timing.Budget(block_seconds=0.0, clean_blocks=3, seconds=0.0, min_blocks=3, max_delay=float("inf"))
    result = timing.interleave(
        {"a": lambda: call("a"), "b": lambda: call("b")},
        budget,
        lambda name, value: checked.append((name, value)),
        lambda: None,
    )
    assert calls == ["a", "a", "b", "b"] * 3  # a warm call and a block of one call each turn
    assert [name for name, _ in checked] == ["a", "b"] * 3
    assert [value for _, value in checked] == [1, 3, 5, 7, 9, 11]  # what the timed call returned, not the warm one
    assert result["a"].blocks == 3


def test_slow_implementations_get_two_blocks_and_one_warm_call() -> None:
    counts = dict.fromkeys(("slow", "fast"), 0)

    def call(name: str) -> None:
        counts[name] += 1
        if name == "slow":
            time.sleep(1.1 * timing.LONG_CALL)

    budget = timing.Budget(block_seconds=0.0, clean_blocks=9, seconds=0.0, most_seconds=0.1, max_delay=float("inf"))
    calls = {name: partial(call, name) for name in counts}
    result = timing.interleave(calls, budget, lambda name, value: None, lambda: None)
    assert (result["slow"].blocks, counts["slow"]) == (2, 3)
    assert (result["fast"].blocks, counts["fast"]) == (timing.ENOUGH_CLEAN, 2 * timing.ENOUGH_CLEAN)


@pytest.mark.parametrize(("seconds", "every_round"), [(0.0, True), (1e9, False)])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_between_is_called_around_the_rounds_and_never_in_one(
    monkeypatch: pytest.MonkeyPatch, seconds: float, every_round: bool, rounds: int
) -> None:
    events = ""

    def event(name: str) -> None:
        nonlocal events
        events += name

    def run_block(call: Callable[[], None], seconds: float) -> tuple[timing.Block, None]:
        event("(")
        call()
        event(")")
        return block(0.0), None

    monkeypatch.setattr(timing, "run_block", run_block)
    monkeypatch.setattr(timing, "BETWEEN_SECONDS", seconds)
    budget = timing.Budget(clean_blocks=rounds, seconds=0.0, min_blocks=rounds)
    calls = {name: partial(event, name) for name in "ab"}
    timing.interleave(calls, budget, lambda name, result: None, partial(event, "|"))
    turns = "a(a)b(b)"  # a warm call and a block each
    expected = {True: ("|" + turns) * rounds + "|", False: "|" + turns * rounds + "|"}
    assert events == expected[every_round]


def test_a_block_counts_the_cpu_time_of_this_thread() -> None:
    measured, value = timing.run_block(lambda: sum(range(20_000)), seconds=0.01)
    assert value == sum(range(20_000))
    assert 0 < measured.cpu_max <= measured.cpu_sum
    assert measured.cpu_max <= measured.wall * 1.5
