"""Interleaved timing, and the memory bandwidth that bounds a decode step."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import torch

#: Idle OpenMP threads sleep. Spinning ones take the cores from the threads that have work, of this process and others.
QUIET_THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


def sleep_when_idle() -> None:
    """Start the process again with `QUIET_THREADS`, unless it has them: OpenMP reads them only when it loads."""
    if any(os.environ.get(name) != value for name, value in QUIET_THREADS.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | QUIET_THREADS)


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Run torch on one thread: models so small that handing out the work takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def median_times(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    after: Callable[[str], object] = lambda name: None,
) -> dict[str, float]:
    """Median seconds of each call. Every round runs each call once, so that a busy machine slows all of them alike.

    ``after(name)`` runs behind each call, untimed. A first, untimed round warms up.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            after(name)
            if round_ > 0:
                times[name].append(elapsed)
    return {name: statistics.median(each) for name, each in times.items()}


def read_bandwidth(n_bytes: int = 1 << 29, rounds: int = 7) -> float:
    """Bytes a second at which all threads together read memory that no cache holds: the best of several sums."""
    data = torch.ones(n_bytes // 4)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return n_bytes / best
