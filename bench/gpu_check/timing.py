"""Times on the device by its own events, implementations in turns.

Calls are captured in a CUDA graph and replayed: a small product is over before Python has launched the next one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

ROUNDS = 7
#: Seconds of a round: many launches in a row.
SECONDS = 0.01


@dataclass(frozen=True)
class Timed:
    """``seconds`` a call, the median over rounds; ``spread``: half the distance of its quartiles, over the median.

    ``graph``: replayed, and not launched one by one from Python.
    """

    seconds: float
    spread: float
    graph: bool = True


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, Timed]:
    """Time calls in turns. Each has been called before, so that nothing is set up while it is timed."""
    replays, repeats, graphs = {}, {}, {}
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        once = _seconds(partial(_repeat, call, 3)) / 3
        repeats[name] = max(1, min(1000, round(SECONDS / max(once, 1e-7))))
        work = partial(_repeat, call, repeats[name])
        replay = _captured(work)
        replays[name], graphs[name] = replay or work, replay is not None
    for replay in replays.values():
        replay()  # the first one also uploads the graph
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, replay in replays.items():
            found[name].append(_seconds(replay) / repeats[name])
    return {name: replace(summary(times), graph=graphs[name]) for name, times in found.items()}


def _repeat(call: Callable[[], object], repeats: int) -> None:
    for _ in range(repeats):
        call()


def _captured(launches: Callable[[], None]) -> Callable[[], None] | None:
    """What launches the same work again at once; None for what cannot be captured: it waits for the device, say."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            launches()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    replay: Callable[[], None] = graph.replay
    return replay


def _seconds(work: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def summary(times: list[float]) -> Timed:
    middle = statistics.median(times)
    if len(times) < 2:
        return Timed(middle, 0.0)
    low, _, high = statistics.quantiles(times, n=4)
    return Timed(middle, (high - low) / 2 / middle)
