"""Generated programs under the backend: the same seeds every time, more of them in the slow tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lowering.fuzz.__main__ import Tally
from tests.lowering.fuzz.generate import ATTENTION
from tests.lowering.fuzz.workers import Worker, own_cache

CHUNK = 20
#: In both modes of `backends.MODES`: what graph passes do wrong shows without code generation.
QUICK = [("passes", first) for first in range(0, 140, CHUNK)] + [("whole", 0)]
LONG = [("passes", first) for first in range(140, 4740, 200)] + [("whole", first) for first in range(10, 410, 50)]
SIZES = {"passes": 200, "whole": 50}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    found = Worker()
    with own_cache():
        yield found
    found.stop()


def run(worker: Worker, mode: str, seeds: range) -> Tally:
    tally, failures = Tally(), []
    for seed in seeds:
        outcome = worker(seed, mode)
        tally.add(seed, outcome)
        if outcome.failed:
            command = f"python -m tests.lowering.fuzz --mode {mode} --seed {seed}"
            failures.append(f"{command}\n  {outcome.kind}: {outcome.what}\n  {outcome.detail}")
    assert not failures, "\n".join(failures)
    return tally


@pytest.mark.parametrize(("mode", "first"), QUICK)
def test_programs(worker: Worker, mode: str, first: int) -> None:
    run(worker, mode, range(first, first + (CHUNK if mode == "passes" else 10)))


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "first"), LONG)
def test_more_programs(worker: Worker, mode: str, first: int) -> None:
    """Attention must be rewritten in many of them: a program whose attention is left alone tests little."""
    tally = run(worker, mode, range(first, first + SIZES[mode]))
    if sum(tally.families[family] for family in ATTENTION) > 50:
        assert tally.share > 0.35
