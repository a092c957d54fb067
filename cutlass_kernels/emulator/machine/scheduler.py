"""Which threads run next. Threads at the same block run together, whatever warp or CTA they belong to.

The block that comes first in the text runs first, which lets divergent threads meet again (see `ptx.flow`). Threads
that spin on memory would starve those they wait for, so that from time to time the threads that waited longest run.
Lanes are sorted int64 arrays of thread numbers; None stands for all threads of the launch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cutlass_kernels.emulator.errors import Deadlock, DivergentCollective
from cutlass_kernels.emulator.machine.clocks import Ints
from cutlass_kernels.emulator.ptx.syntax import Instruction

Lanes = Ints | None

WARP = 32
#: Blocks after which the longest-waiting threads run for as many, and after which threads count as polling.
_PATIENCE, _POLLING = 256, 1024


def merge(parts: list[Ints]) -> Ints:
    """Disjoint sorted lanes as one sorted array."""
    return parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts))


def first_of_warps(lanes: Ints) -> Ints:
    """One lane of each warp among sorted lanes."""
    warps = lanes // WARP
    return np.asarray(lanes[np.concatenate([[True], warps[1:] != warps[:-1]])])


class Scheduler:
    """Threads 0 .. ``lanes`` - 1, all at block 0.

    ``run_block(block, lanes)`` executes a block and hands its lanes on with `push`, `exit`, or to whoever parks them.
    ``idle()`` is asked when no thread can run; it returns whether it woke one. ``overdue()`` is called when threads run
    for long without any progress: they may poll for something that would come only when all wait. ``gather(block)``:
    how many threads make up a group that must enter together (0: none must); ``groups``: by that size, the group of
    each thread. ``first(block)``: the block's first instruction, for messages.
    """

    def __init__(
        self,
        lanes: int,
        run_block: Callable[[int, Lanes], None],
        idle: Callable[[], bool],
        overdue: Callable[[], bool],
        gather: Callable[[int], int],
        first: Callable[[int], Instruction],
        groups: dict[int, Ints],
    ) -> None:
        self.lanes, self.live = lanes, lanes
        self._run_block, self._gather, self._first = run_block, gather, first
        self._idle, self._overdue = idle, overdue
        self.ready: dict[int, list[Ints]] = {}
        self.held: dict[int, Ints] = {}
        self.steps = 0
        #: Counts what may let a waiting thread go on: arrivals, landings, exits.
        self.progress = 0
        self._everyone = np.arange(lanes, dtype=np.int64)
        self._pushed: dict[int, int] = {}
        self._alive = np.ones(lanes, np.bool_)
        self._groups = groups
        self._live_in = {size: np.bincount(group) for size, group in groups.items()}
        self._warps = lanes // WARP

    def expand(self, lanes: Lanes) -> Ints:
        """Lanes as an array."""
        return self._everyone if lanes is None else lanes

    def push(self, block: int, lanes: Lanes) -> None:
        """Lanes are about to enter a block."""
        lanes = self.expand(lanes)
        if not lanes.size:
            return
        if block in self.held:
            self.ready.setdefault(block, []).append(self.held.pop(block))
        self.ready.setdefault(block, []).append(lanes)
        self._pushed.setdefault(block, self.steps)

    def exit(self, lanes: Lanes) -> None:
        """Lanes are done. Those that waited for them in front of a warp-wide instruction look again."""
        lanes = self.expand(lanes)
        self._alive[lanes] = False
        self.live -= lanes.size
        for size, group in self._groups.items():
            self._live_in[size] -= np.bincount(group[lanes], minlength=self._live_in[size].size)
        self.progress += 1
        for block, waiting in self.held.items():
            self.ready.setdefault(block, []).append(waiting)
            self._pushed.setdefault(block, self.steps)
        self.held.clear()

    def hold(self, block: int, lanes: Ints) -> None:
        """Lanes stay in front of a block until others reach it."""
        if lanes.size:
            self.held[block] = merge([self.held[block], lanes]) if block in self.held else lanes

    def present(self, lanes: Ints) -> Ints:
        """For each warp the bits of its lanes among ``lanes``."""
        bits = np.bincount(lanes // WARP, weights=(1 << (lanes % WARP)).astype(np.float64), minlength=self._warps)
        return bits.astype(np.int64)

    def alive(self) -> Ints:
        """For each warp the bits of its lanes that have not exited."""
        return self.present(self._everyone[self._alive])

    def run(self, max_steps: int) -> None:
        """Until every thread has exited. Raises `Deadlock` and `DivergentCollective`."""
        self.push(0, None)
        seen, since = 0, 0
        while self.live:
            if not self.ready:
                if not self._idle():
                    self._stuck()
                continue
            self.steps += 1
            if self.progress != seen:
                seen, since = self.progress, self.steps
            elif self.steps - since > _POLLING:
                self._overdue()
                since = self.steps
            if self.steps > max_steps:
                raise Deadlock(f"a launch ran for more than {max_steps} basic blocks: threads spin on something")
            self._step(self._pick())

    def _pick(self) -> int:
        if len(self.ready) > 1 and (self.steps // _PATIENCE) & 1:
            return min(self.ready, key=lambda block: self._pushed[block])
        return min(self.ready)

    def _step(self, block: int) -> None:
        del self._pushed[block]
        lanes: Lanes = merge(self.ready.pop(block))
        if lanes is not None and lanes.size == self.lanes:
            lanes = None
        if lanes is not None and (size := self._gather(block)):
            lanes = self._whole(block, lanes, size)
            if not lanes.size:
                return
        self._run_block(block, lanes)

    def _whole(self, block: int, lanes: Ints, size: int) -> Ints:
        """The lanes whose groups are complete; the others are held."""
        group, live = self._groups[size][lanes], self._live_in[size]
        whole = (np.bincount(group, minlength=live.size) == live)[group]
        if not whole.all():
            self.hold(block, lanes[~whole])
            lanes = lanes[whole]
        return lanes

    def _stuck(self) -> None:
        if self.held:
            block, lanes = next(iter(self.held.items()))
            at = self._first(block)
            raise DivergentCollective(
                f"{lanes.size} threads wait in front of a warp-wide instruction for others that never come",
                at.line,
                at.text,
            )
        raise Deadlock(f"{self.live} threads wait at barriers that nobody will complete")
