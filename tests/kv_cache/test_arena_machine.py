"""Any order of allocating, freeing and epochs, against a model of what is in use."""

from __future__ import annotations

import gc
from bisect import bisect_left, insort

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from flashmla_ops.kv_cache import Arena

SIZE = 1 << 20
SIZES = st.one_of(
    st.integers(1, 600), st.integers(1, 10_000), st.integers(1, 200_000), st.sampled_from([SIZE, 1 << 18])
)


class ArenaMachine(RuleBasedStateMachine):
    """The model: the ranges of live blocks, what each is filled with, and what is freed in open epochs."""

    @initialize(grows=st.booleans(), poison=st.booleans())
    def start(self, grows: bool, poison: bool) -> None:
        self.arena = Arena(SIZE, limit=2 * SIZE if grows else None, poison=poison)
        self.live: list[tuple[Tensor, int]] = []
        self.ranges: list[tuple[int, int]] = []  # of live and deferred blocks, in order
        self.epochs: list[tuple[int, object]] = []  # number, context
        self.deferred: list[tuple[int, tuple[int, int]]] = []  # the newest epoch at the time, range
        self.opened = self.fallthroughs = 0

    def enter(self, tensor: Tensor, mark: int) -> None:
        """A tensor that was just made lies where nothing else does."""
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.numel()
        place = bisect_left(self.ranges, (first, last))
        assert place == 0 or self.ranges[place - 1][1] <= first
        assert place == len(self.ranges) or last <= self.ranges[place][0]
        insort(self.ranges, (first, last))
        tensor.fill_(mark)
        self.live.append((tensor, mark))

    @rule(n_bytes=SIZES, mark=st.integers(1, 200))
    def allocate(self, n_bytes: int, mark: int) -> None:
        with self.arena.allocator():
            tensor = torch.empty(n_bytes, dtype=torch.uint8)
        if self.arena.owns(tensor):
            self.enter(tensor, mark)
        else:
            self.fallthroughs += 1
            assert self.arena.stats().largest_free < n_bytes

    @rule(n_bytes=SIZES, mark=st.integers(1, 200))
    def zeros(self, n_bytes: int, mark: int) -> None:
        if self.arena.stats().largest_free > n_bytes:
            tensor = self.arena.zeros(n_bytes, dtype=torch.uint8)
            assert not tensor.any()
            self.enter(tensor, mark)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        tensor, mark = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        assert bool((tensor == mark).all())
        taken = (tensor.data_ptr(), tensor.data_ptr() + tensor.numel())
        if self.epochs:
            self.deferred.append((self.opened, taken))
        else:
            self.ranges.remove(taken)

    @precondition(lambda self: len(self.epochs) < 3)
    @rule()
    def open_epoch(self) -> None:
        context = self.arena.epoch()
        context.__enter__()
        self.opened += 1
        self.epochs.append((self.opened, context))

    @precondition(lambda self: self.epochs)
    @rule(data=st.data())
    def close_epoch(self, data: st.DataObject) -> None:
        _, context = self.epochs.pop(data.draw(st.integers(0, len(self.epochs) - 1)))
        context.__exit__(None, None, None)
        oldest = min((number for number, _ in self.epochs), default=self.opened + 1)
        for number, taken in self.deferred:
            if number < oldest:
                self.ranges.remove(taken)
        self.deferred = [each for each in self.deferred if each[0] >= oldest]

    @invariant()
    def books(self) -> None:
        stats = self.arena.stats()
        assert (stats.blocks, stats.deferred_blocks) == (len(self.live), len(self.deferred))
        assert (stats.epochs, stats.fallthroughs) == (len(self.epochs), self.fallthroughs)
        assert stats.in_use >= sum(tensor.numel() for tensor, _ in self.live)
        assert stats.in_use + stats.deferred <= stats.size <= stats.limit
        assert stats.peak >= stats.in_use
        assert stats.largest_free <= stats.free

    def teardown(self) -> None:
        if not hasattr(self, "arena"):
            return
        for _, context in self.epochs:
            context.__exit__(None, None, None)
        self.live.clear()
        gc.collect(0)
        with self.arena.allocator(strict=True):
            torch.empty(self.arena.stats().size, dtype=torch.uint8)  # all of it is one block again


def run(examples: int, steps: int) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    chosen = settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=checks)
    run_state_machine_as_test(ArenaMachine, settings=chosen)


@pytest.mark.usefixtures("cxx")
def test_twenty_thousand_operations() -> None:
    run(200, 100)


@pytest.mark.slow
@pytest.mark.usefixtures("cxx")
def test_a_million_operations() -> None:
    run(10_000, 100)
