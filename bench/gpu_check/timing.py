"""Times on the device by its own events, implementations in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

ROUNDS = 7
#: Seconds of a round: many launches in a row, so that the host's part does not show.
SECONDS = 0.01


@dataclass(frozen=True)
class Timed:
    """``seconds`` a call, the median over rounds; ``spread``: half the distance of its quartiles, over the median."""

    seconds: float
    spread: float


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, Timed]:
    """Time calls in turns. Each has been called before, so that nothing is set up while it is timed."""
    repeats = {}
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        repeats[name] = max(1, min(1000, round(SECONDS / max(_round(call, 3), 1e-7))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(_round(call, repeats[name]))
    return {name: summary(times) for name, times in found.items()}


def _round(call: Callable[[], object], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def summary(times: list[float]) -> Timed:
    middle = statistics.median(times)
    if len(times) < 2:
        return Timed(middle, 0.0)
    low, _, high = statistics.quantiles(times, n=4)
    return Timed(middle, (high - low) / 2 / middle)
