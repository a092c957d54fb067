"""Timing that survives a shared machine.

Implementations take turns, one *block* of calls a turn, so that whatever else the machine does hits all of them. A
block records wall time, the CPU time of each of our threads and how long our threads waited in a run queue, that is,
had work to do but no core. A block without such waiting is *clean*: its wall time is what an idle machine would have
shown. Where too few blocks are clean the busiest thread's CPU time stands in, and the result says so.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

#: Idle OpenMP threads wait for the next operator for a quarter of a millisecond (libgomp's own choice is milliseconds),
#: as between the operators of a model, then sleep: spinning on, they would take cores from the next turn.
QUIET_THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "0"}
#: Fewer clean blocks than this, and CPU time is reported instead of wall time.
ENOUGH_CLEAN = 4


@dataclass(frozen=True)
class Budget:
    """How long to measure. ``seconds`` is the wall time that one implementation may use within one case.

    It is less than `min_blocks` take of a slow one, which gets ``most_seconds``, and two blocks at least.
    """

    block_seconds: float = 0.02
    clean_blocks: int = 16
    seconds: float = 2.5
    min_blocks: int = ENOUGH_CLEAN
    most_seconds: float = 6.0
    max_delay: float = 0.03  # share of a block's wall time that our threads may have waited for a core


#: At least so long does `interleave` time from one call of ``between`` to the next.
BETWEEN_SECONDS = 2.0
#: Calls that take longer run without one before to warm up: what the turn before left in the caches is nothing to them.
LONG_CALL = 0.1

QUICK = Budget(clean_blocks=5, seconds=0.5, min_blocks=3)


@dataclass(frozen=True)
class Block:
    """One turn of one implementation; the times are seconds for one call."""

    wall: float
    cpu_max: float  # CPU time of the busiest thread: the wall time on an idle machine, if work is split evenly
    cpu_sum: float  # CPU time of all threads
    delay: float  # run-queue delay of all threads, as a share of the wall time


@dataclass(frozen=True)
class Timing:
    """Seconds for one call: the median and the quartiles of the clean blocks, or of CPU times if ``clean`` is False."""

    median: float
    q1: float
    q3: float
    clean: bool
    clean_blocks: int
    blocks: int
    cpu_max: float
    cpu_sum: float

    def as_dict(self) -> dict[str, float | int | bool]:
        return asdict(self)


def sleep_when_idle() -> None:
    """Start the process again with `QUIET_THREADS`, which OpenMP reads only when it loads."""
    if any(os.environ.get(name) != value for name, value in QUIET_THREADS.items()):
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, os.environ | QUIET_THREADS)


#: Processes that this one started with another Python than its own, by their ids.
OTHERS: set[int] = set()


def tasks() -> dict[int, Path]:
    """What the kernel says of every thread of this process and of those that it started, by thread id."""
    children = [*(child.pid for child in multiprocessing.active_children()), *OTHERS]
    folders = [Path("/proc/self/task"), *(Path(f"/proc/{pid}/task") for pid in children)]
    return {int(path.name): path for folder in folders if folder.is_dir() for path in folder.iterdir()}


def _schedstat(task: Path) -> tuple[float, float]:
    """Seconds that a thread ran and that it waited, runnable, for a core; 0 if it ended or no such statistics are."""
    try:
        ran, waited = (task / "schedstat").read_text().split()[:2]
    except (OSError, ValueError):
        return 0.0, 0.0
    return int(ran) * 1e-9, int(waited) * 1e-9


def queue_delay() -> float:
    """Seconds that our threads have waited, runnable, for a core, summed over threads."""
    return sum(_schedstat(task)[1] for task in tasks().values())


def cpu_times() -> dict[int, float]:
    """CPU seconds of each of our threads, by thread id."""
    times = {}
    for thread, task in tasks().items():
        try:
            # Linux: the clock of another thread of this process (CPUCLOCK_PERTHREAD | CPUCLOCK_SCHED).
            times[thread] = time.clock_gettime((~thread << 3) | 6)
        except OSError:  # another process's: the kernel counts when it switches threads, and this one waits for us
            times[thread] = _schedstat(task)[0]
    return times


def stolen() -> float:
    """Seconds the hypervisor kept this machine's cores for others, since boot, summed over cores."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(fields[8]) / os.sysconf("SC_CLK_TCK")


def run_block(call: Callable[[], Result], seconds: float) -> tuple[Block, Result]:
    """Call for at least ``seconds``; also returns what the last call returned."""
    delay, cpu, start = queue_delay(), cpu_times(), time.perf_counter()
    calls = 0
    while True:
        result = call()
        calls += 1
        wall = time.perf_counter() - start
        if wall >= seconds:
            break
    used = [after - cpu.get(thread, 0.0) for thread, after in cpu_times().items()]
    waited = queue_delay() - delay
    return Block(wall / calls, max(used) / calls, sum(used) / calls, waited / wall), result


def summarize(blocks: Sequence[Block], max_delay: float) -> Timing:
    clean = [block.wall for block in blocks if block.delay <= max_delay]
    enough = len(clean) >= min(ENOUGH_CLEAN, len(blocks))
    q1, median, q3 = quartiles(clean if enough else [block.cpu_max for block in blocks])
    return Timing(
        median=median,
        q1=q1,
        q3=q3,
        clean=enough,
        clean_blocks=len(clean),
        blocks=len(blocks),
        cpu_max=statistics.median(block.cpu_max for block in blocks),
        cpu_sum=statistics.median(block.cpu_sum for block in blocks),
    )


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def interleave(
    calls: Mapping[str, Callable[[], Result]],
    budget: Budget,
    check: Callable[[str, Result], None],
    between: Callable[[], None],
) -> dict[str, Timing]:
    """Time ``calls`` in turns. ``check(name, result)`` sees the last result of every block, untimed.

    ``between()`` is called, untimed too, before the first round of turns, after the last, and between two rounds if
    `BETWEEN_SECONDS` have passed since it returned.
    """
    blocks: dict[str, list[Block]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)

    def done(name: str) -> bool:
        taken = blocks[name]
        if sum(block.delay <= budget.max_delay for block in taken) >= budget.clean_blocks:
            return True
        if len(taken) < budget.min_blocks:
            return spent[name] >= budget.most_seconds and len(taken) >= 2
        return spent[name] >= budget.seconds

    last = float("-inf")
    while active := [name for name in calls if not done(name)]:
        if time.perf_counter() - last >= BETWEEN_SECONDS:
            between()
            last = time.perf_counter()
        for name in active:
            start = time.perf_counter()
            if not blocks[name] or blocks[name][-1].wall < LONG_CALL:
                calls[name]()  # the turn before left the caches to another implementation
            block, result = run_block(calls[name], budget.block_seconds)
            blocks[name].append(block)
            spent[name] += time.perf_counter() - start
            check(name, result)
    between()
    return {name: summarize(taken, budget.max_delay) for name, taken in blocks.items()}
