"""A pool beside a model of it: lists of tokens. A row's value is a number of all tokens up to it, so that a row of
another sequence, another time or a released page is never taken for the right one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from flashmla_ops.errors import OutOfPagesError, PoolBusyError
from flashmla_ops.kv_cache import KVPool, Sequence, Step
from flashmla_ops.kv_cache.prefix import PrefixCache
from flashmla_ops.kv_cache.python_pages import PythonPages

N_PAGES, PAGE_SIZE, VOCABULARY = 12, 3, 2
POISONED = -1  # what poison is as int64


class Broken(Exception):
    """Raised inside steps."""


def values(tokens: list[int]) -> list[int]:
    """The value of each token's row."""
    found, value = [], 1
    for token in tokens:
        value = (value * 1_000_003 + token + 1) % (1 << 61)
        found.append(value)
    return found


@dataclass
class Expected:
    """A sequence as it should be."""

    sequence: Sequence
    tokens: list[int] = field(default_factory=list)  # those with a row


@dataclass
class Running:
    """An open step, and what it may read until it closes."""

    step: Step
    rows: list[tuple[list[int], list[int]]]  # slots and values, by sequence


class Modelled:
    """The operations of a pool. Each checks what it did; `check` everything else."""

    def __init__(self, python: bool = False, poison: bool = True) -> None:
        self.pool = KVPool(n_pages=N_PAGES, page_size=PAGE_SIZE, d=1, dtype=torch.int64, max_batch=4, poison=poison)
        if python:
            self.pool.pages = PythonPages(N_PAGES, PAGE_SIZE)
            self.pool.pages.watch()
            self.pool.prefixes = PrefixCache(self.pool.pages)
            self.pool._begin()
        self.rows = self.pool.cache()[:, :, 0, 0].flatten().numpy()
        self.alive: list[Expected] = []
        self.running: list[Running] = []

    def open(self, tokens: list[int]) -> None:
        sequence = self.pool.open(tokens)
        assert sequence.length == sequence.cached <= max(0, len(tokens) - 1)
        self.alive.append(Expected(sequence, tokens[: sequence.length]))

    def grow(self, chosen: list[Expected], counts: list[int], ends: str) -> None:
        """A step that ``ends`` well, badly, or stays open. Its tokens are those that are known, and then zeros."""
        chosen = [each for each in chosen if each.sequence.swapped is None]
        counts = counts[: len(chosen)]
        before = [(list(each.tokens), each.sequence.pages, each.sequence.length) for each in chosen]
        for each, count in zip(chosen, counts, strict=True):
            known = each.sequence.tokens
            known.extend([0] * (len(each.tokens) + count - len(known)))
        fits = self.pool.can_fit(counts, [each.sequence for each in chosen])
        try:
            step = self.pool.step([each.sequence for each in chosen], counts)
            assert fits
        except OutOfPagesError as error:
            assert before == [(each.tokens, each.sequence.pages, each.sequence.length) for each in chosen]
            assert not fits
            if error.needed <= error.free + (0 if self.running else error.evictable):
                raise AssertionError("there were enough") from error
            return
        slots = step.slot_mapping.tolist()
        for each, count in zip(chosen, counts, strict=True):
            each.tokens = each.sequence.tokens[: len(each.tokens) + count].tolist()
            for value in values(each.tokens)[len(each.tokens) - count :]:
                self.rows[slots.pop(0)] = value
        assert not slots
        table, lengths = step.block_table.tolist(), step.cache_seqlens.tolist()
        assert lengths == [len(each.tokens) for each in chosen]
        reads = []
        for row, each in zip(table, chosen, strict=True):
            assert row[: -(-len(each.tokens) // PAGE_SIZE)] == each.sequence.pages[: -(-len(each.tokens) // PAGE_SIZE)]
            places = [row[t // PAGE_SIZE] * PAGE_SIZE + t % PAGE_SIZE for t in range(len(each.tokens))]
            reads.append((places, values(each.tokens)))
        if ends == "open" and len(self.running) < 3:
            self.running.append(Running(step, reads))
        elif ends == "badly":
            with pytest.raises(Broken), step:
                raise Broken
            for each, (tokens, _, _) in zip(chosen, before, strict=True):
                each.tokens = tokens
        else:
            step.close()

    def close(self, index: int) -> None:
        if self.running:
            self.running.pop(index % len(self.running)).step.close()

    def fork(self, parent: Expected) -> None:
        if self.is_running(parent):
            with pytest.raises(PoolBusyError):
                self.pool.fork(parent.sequence)
        elif parent.sequence.swapped is None:
            self.alive.append(Expected(self.pool.fork(parent.sequence), list(parent.tokens)))

    def truncate(self, each: Expected, length: int) -> None:
        if each.sequence.swapped is None:
            self.pool.truncate(each.sequence, min(length, len(each.tokens)))
            del each.tokens[length:]

    def release(self, each: Expected) -> None:
        self.alive.remove(each)
        self.pool.release(each.sequence)

    def lose(self, each: Expected) -> None:
        """Nobody has it any more, and nobody has said so. An open step would have it."""
        if not self.is_running(each):
            self.alive.remove(each)

    def reserve(self, each: Expected, tokens: int) -> None:
        if each.sequence.swapped is None:
            try:
                self.pool.reserve(each.sequence, tokens)
            except OutOfPagesError:
                return
            assert len(each.sequence.pages) * PAGE_SIZE >= len(each.tokens) + tokens

    def swap(self, each: Expected, path: Path | None) -> None:
        """Out, or in if it is out."""
        if each.sequence.swapped is None:
            try:
                self.pool.swap_out(each.sequence, path)
            except PoolBusyError:
                assert self.is_running(each)
            return
        try:
            self.pool.swap_in(each.sequence)
        except OutOfPagesError:
            assert each.sequence.swapped is not None

    def compact(self) -> None:
        if self.running:
            with pytest.raises(PoolBusyError):
                self.pool.compact_()
            return
        self.pool.compact_()
        states = self.pool.pages.states()
        assert states == sorted(states, key=lambda kind: kind == 0)

    def is_running(self, each: Expected) -> bool:
        return any(each.sequence in running.step.sequences for running in self.running)

    def check(self) -> None:
        """Every invariant."""
        pages = self.pool.pages
        self.pool.can_fit(0)  # settles what was lost
        held: Counter[int] = Counter()
        for each in self.alive:
            assert each.sequence.length == len(each.tokens)
            if each.sequence.swapped is None:
                mine = each.sequence.pages
                held.update(mine)
                places = [mine[t // PAGE_SIZE] * PAGE_SIZE + t % PAGE_SIZE for t in range(len(each.tokens))]
                assert self.rows[places].tolist() == values(each.tokens)
        for running in self.running:
            for places, read in running.rows:
                assert self.rows[places].tolist() == read, "a page was handed out that an open step reads"
        kinds = pages.states()
        for page in range(N_PAGES):
            assert pages.references(page) == held[page], page
            assert (kinds[page] in (1, 2)) == (held[page] > 0)
        counts = pages.counts()
        assert counts.free + counts.used + counts.evictable + counts.deferred == N_PAGES
        assert counts.free == kinds.count(0) == pages.n_free
        assert counts.evictable == kinds.count(3)
        assert counts.deferred == kinds.count(4) == len(pages.deferred())
        assert counts.deferred == 0 or self.running
        poisoned = self.rows.reshape(N_PAGES, PAGE_SIZE) == POISONED
        assert all(poisoned[page].all() for page in range(N_PAGES) if kinds[page] == 0)


def random_operation(pool: Modelled, draw: Any, path: Path) -> None:
    """One operation, chosen by a `random.Random`."""
    kind = draw.choices(
        ("open", "grow", "close", "fork", "truncate", "release", "lose", "reserve", "swap", "compact", "evict"),
        (14, 34, 10, 8, 8, 10, 3, 3, 6, 2, 2),
    )[0]
    if kind == "open" or not pool.alive:
        pool.open([draw.randrange(VOCABULARY) for _ in range(draw.randrange(12))])
        return
    each = draw.choice(pool.alive)
    match kind:
        case "grow":
            chosen = draw.sample(pool.alive, min(len(pool.alive), draw.randrange(1, 5)))
            counts = [draw.choice((0, 1, 1, 2, 5, each.sequence.pending)) for each in chosen]
            pool.grow(chosen, counts, draw.choice(("well", "well", "badly", "open")))
        case "close":
            pool.close(draw.randrange(3))
        case "fork":
            pool.fork(each)
        case "truncate":
            pool.truncate(each, draw.randrange(12))
        case "release":
            pool.release(each)
        case "lose":
            pool.lose(each)
        case "reserve":
            pool.reserve(each, draw.randrange(9))
        case "swap":
            pool.swap(each, draw.choice((None, None, None, path / f"{draw.randrange(4)}{id(each)}")))
        case "compact":
            pool.compact()
        case "evict":
            pool.pool.evict()
