"""The pool against a model: hypothesis looks for the shortest failure, long random walks for rare ones."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.kv_cache.model import VOCABULARY, Expected, Modelled, random_operation


class AgainstModel(RuleBasedStateMachine):
    """Every sequence reads back its tokens, every open step too, and every page is counted, after each operation."""

    @initialize(python=st.booleans())
    def start(self, python: bool) -> None:
        self.pool = Modelled(python)

    def pick(self, index: int) -> Expected:
        return self.pool.alive[index % len(self.pool.alive)]

    some = precondition(lambda self: self.pool.alive)
    index = st.integers(0, 7)

    @rule(tokens=st.lists(st.integers(0, VOCABULARY - 1), max_size=11))
    def open(self, tokens: list[int]) -> None:
        self.pool.open(tokens)

    @some
    @rule(
        chosen=st.lists(index, min_size=1, max_size=4, unique=True),
        counts=st.lists(st.sampled_from((0, 1, 2, 5)), min_size=4, max_size=4),
        pending=st.booleans(),
        ends=st.sampled_from(("well", "badly", "open")),
    )
    def grow(self, chosen: list[int], counts: list[int], pending: bool, ends: str) -> None:
        picked = list({id(each): each for each in map(self.pick, chosen)}.values())
        wanted = [each.sequence.pending for each in picked] if pending else counts[: len(picked)]
        self.pool.grow(picked, wanted, ends)

    @rule(index=index)
    def close(self, index: int) -> None:
        self.pool.close(index)

    @some
    @rule(index=index)
    def fork(self, index: int) -> None:
        self.pool.fork(self.pick(index))

    @some
    @rule(index=index, length=st.integers(0, 12))
    def truncate(self, index: int, length: int) -> None:
        self.pool.truncate(self.pick(index), length)

    @some
    @rule(index=index)
    def release(self, index: int) -> None:
        self.pool.release(self.pick(index))

    @some
    @rule(index=index)
    def lose(self, index: int) -> None:
        self.pool.lose(self.pick(index))

    @some
    @rule(index=index, tokens=st.integers(0, 8))
    def reserve(self, index: int, tokens: int) -> None:
        self.pool.reserve(self.pick(index), tokens)

    @some
    @rule(index=index)
    def swap(self, index: int) -> None:
        self.pool.swap(self.pick(index), None)

    @rule()
    def compact(self) -> None:
        self.pool.compact()

    @rule()
    def evict(self) -> None:
        self.pool.pool.evict()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check()


AgainstModel.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAgainstModel = AgainstModel.TestCase

#: One pool lives so long.
LIFE = 500


def walk(seed: int, operations: int, python: bool, path: Path) -> None:
    draw = random.Random(seed)
    for start in range(0, operations, LIFE):
        pool = Modelled(python)
        for _ in range(min(LIFE, operations - start)):
            if len(pool.alive) > 9:
                pool.release(draw.choice(pool.alive))
            random_operation(pool, draw, path)
            pool.check()


@pytest.mark.parametrize(("python", "operations"), [(False, 16_000), (True, 4_000)], ids=["C++", "Python"])
def test_a_random_walk(python: bool, operations: int, tmp_path: Path) -> None:
    walk(0, operations, python, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_long_random_walks(seed: int, tmp_path: Path) -> None:
    walk(seed, 100_000, seed == 10, tmp_path)
