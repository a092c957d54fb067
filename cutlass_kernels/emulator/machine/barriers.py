"""The sixteen named barriers of each CTA (bar, barrier) and the barrier of each cluster."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cutlass_kernels.emulator.errors import Deadlock
from cutlass_kernels.emulator.machine.clocks import Clocks, Ints, join
from cutlass_kernels.emulator.machine.scheduler import WARP, first_of_warps
from cutlass_kernels.emulator.ptx.types import Array

NAMED = 16

#: Continues lanes after a barrier, with the reduction of their predicates where there is one.
Resume = Callable[[Ints, Array | None], None]


class Barriers:
    """Barriers of ``groups`` groups of threads; ``group_of[lane]`` and ``warp_of``, ``domain_of`` for the ordering."""

    def __init__(self, groups: int, group_of: Ints, domain_of: Ints, warp_of: Ints, clocks: Clocks | None) -> None:
        self.group_of, self.domain_of, self.warp_of, self.clocks = group_of, domain_of, warp_of, clocks
        self.groups = groups
        self.live = np.bincount(group_of, minlength=groups)
        self.arrived = np.zeros((NAMED, groups), np.int64)
        self.wanted = np.zeros((NAMED, groups), np.int64)
        self.gathered = clocks.nothing(NAMED, groups) if clocks else None
        self._waiting: dict[int, list[tuple[Ints, Array | None, Resume]]] = {}

    def arrive(self, barrier: int, lanes: Ints, count: int | None, resume: Resume | None, votes: Array | None) -> None:
        """Lanes arrive; with ``resume`` they also wait. ``count``: threads the barrier needs; None: all that live.

        ``votes``: one predicate a lane; the barrier hands each waiter [true votes, all votes].
        """
        if not 0 <= barrier < NAMED:
            raise Deadlock(f"barrier {barrier} does not exist: there are {NAMED}")
        groups = self.group_of[lanes]
        if count is not None and self._overfull(barrier, groups, count):
            # Warps that arrive in one step fill one phase after another.
            for warp in np.unique(lanes // WARP):
                mine = lanes // WARP == warp
                self._arrive(barrier, lanes[mine], count, resume, None if votes is None else votes[mine])
            return
        self._arrive(barrier, lanes, count, resume, votes)

    def _overfull(self, barrier: int, groups: Ints, count: int) -> bool:
        coming = np.bincount(groups, minlength=self.groups)
        return bool(((coming > 0) & (self.arrived[barrier] + coming > count)).any())

    def _arrive(self, barrier: int, lanes: Ints, count: int | None, resume: Resume | None, votes: Array | None) -> None:
        groups = self.group_of[lanes]
        self.arrived[barrier] += np.bincount(groups, minlength=self.groups)
        present = np.unique(groups)
        self.wanted[barrier][present] = -1 if count is None else count
        if self.clocks is not None and self.gathered is not None:
            self._give(barrier, lanes)
        if resume is not None:
            self._waiting.setdefault(barrier, []).append((lanes, votes, resume))
        self._complete(barrier, present)

    def exit(self, lanes: Ints) -> None:
        """Exited threads no longer count for barriers that need all."""
        self.live -= np.bincount(self.group_of[lanes], minlength=self.groups)
        for barrier in list(self._waiting):
            self._complete(barrier, np.unique(self.group_of[lanes]))

    def _complete(self, barrier: int, groups: Ints) -> None:
        wanted = self.wanted[barrier][groups]
        needed = np.where(wanted < 0, self.live[groups], wanted)
        done = groups[(self.arrived[barrier][groups] >= needed) & (self.arrived[barrier][groups] > 0)]
        if not done.size:
            return
        finished = np.zeros(self.groups, np.bool_)
        finished[done] = True
        self.arrived[barrier][done] = 0
        waiting, self._waiting[barrier] = self._waiting.get(barrier, []), []
        ready = []
        for lanes, votes, resume in waiting:
            mine = finished[self.group_of[lanes]]
            if not mine.all():
                self._waiting[barrier].append((lanes[~mine], None if votes is None else votes[~mine], resume))
            if mine.any():
                ready.append((lanes[mine], None if votes is None else votes[mine], resume))
        if not self._waiting[barrier]:
            del self._waiting[barrier]
        tally = self._votes(ready)
        for lanes, _, resume in ready:
            if self.clocks is not None and self.gathered is not None:
                self._take(barrier, lanes)
            resume(lanes, None if tally is None else tally[self.group_of[lanes]])
        if self.gathered is not None:
            self.gathered[:, barrier, done] = 0

    def _votes(self, ready: list[tuple[Ints, Array | None, Resume]]) -> Array | None:
        voted = [(self.group_of[lanes], votes) for lanes, votes, _ in ready if votes is not None]
        if not voted:
            return None
        groups = np.concatenate([group for group, _ in voted])
        votes = np.concatenate([vote for _, vote in voted])
        true = np.bincount(groups, weights=votes.astype(np.float64), minlength=self.groups)
        return np.stack([true, np.bincount(groups, minlength=self.groups)], axis=1).astype(np.int64)

    def _give(self, barrier: int, lanes: Ints) -> None:
        assert self.clocks is not None
        assert self.gathered is not None
        first = first_of_warps(lanes)
        given = self.clocks.release(self.domain_of[first], self.warp_of[first])
        join(self.gathered[:, barrier], self.group_of[first], given)

    def _take(self, barrier: int, lanes: Ints) -> None:
        assert self.clocks is not None
        assert self.gathered is not None
        first = first_of_warps(lanes)
        known = self.gathered[:, barrier, self.group_of[first]]
        self.clocks.acquire(self.domain_of[first], self.warp_of[first], known)


class ClusterBarriers:
    """barrier.cluster: arrival and wait are apart, and every thread of a cluster takes part in each phase."""

    def __init__(
        self, clusters: int, domain_of: Ints, warp_of: Ints, clocks: Clocks | None, push: Callable[[int, Ints], None]
    ) -> None:
        self.domain_of, self.warp_of, self.clocks, self._push = domain_of, warp_of, clocks, push
        self.live = np.bincount(domain_of, minlength=clusters)
        self.arrived, self.phase = np.zeros(clusters, np.int64), np.zeros(clusters, np.int64)
        self._arrived_in = np.full(domain_of.size, -1, np.int64)
        self._given = clocks.nothing(clusters) if clocks else None
        self._done = clocks.nothing(clusters) if clocks else None
        self._waiting: list[tuple[int, Ints]] = []

    def arrive(self, lanes: Ints) -> None:
        """barrier.cluster.arrive."""
        domains = self.domain_of[lanes]
        self._arrived_in[lanes] = self.phase[domains]
        self.arrived += np.bincount(domains, minlength=self.arrived.size)
        if self.clocks is not None and self._given is not None:
            first = first_of_warps(lanes)
            given = self.clocks.release(self.domain_of[first], self.warp_of[first])
            join(self._given, self.domain_of[first], given)
        self._complete()

    def wait(self, lanes: Ints, following: int) -> None:
        """barrier.cluster.wait; the lanes go on at a block. Raises `Deadlock` for threads that have not arrived."""
        if (self._arrived_in[lanes] < 0).any():
            raise Deadlock("barrier.cluster.wait by a thread that never arrived")
        self._waiting.append((following, lanes))
        self._wake()

    def exit(self, lanes: Ints) -> None:
        """Exited threads no longer count."""
        self.live -= np.bincount(self.domain_of[lanes], minlength=self.live.size)
        self._complete()

    def _complete(self) -> None:
        done = (self.arrived > 0) & (self.arrived >= self.live)
        if not done.any():
            return
        self.phase[done] += 1
        self.arrived[done] = 0
        if self._given is not None and self._done is not None:
            self._done[:, done] = self._given[:, done]
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for following, lanes in waiting:
            through = self.phase[self.domain_of[lanes]] > self._arrived_in[lanes]
            going, staying = lanes[through], lanes[~through]
            if staying.size:
                self._waiting.append((following, staying))
            if going.size:
                self._acquire(going)
                self._push(following, going)

    def _acquire(self, lanes: Ints) -> None:
        if self.clocks is None or self._done is None:
            return
        first = first_of_warps(lanes)
        domains = self.domain_of[first]
        self.clocks.acquire(domains, self.warp_of[first], self._done[:, domains])
