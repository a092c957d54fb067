"""mbarrier objects in shared memory: phases, arrival counts, transaction counts (PTX ISA, "mbarrier")."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cutlass_kernels.emulator.errors import BarrierFault
from cutlass_kernels.emulator.machine.clocks import ASYNC_AGENTS, Ints, Knowledge
from cutlass_kernels.emulator.machine.context import Context
from cutlass_kernels.emulator.machine.scheduler import Scheduler, first_of_warps


@dataclass
class MBarrier:
    """``pending`` arrivals and ``transactions`` (bytes) still to come in phase number ``phase``."""

    domain: int
    agent: int
    expected: int
    pending: int
    given: Knowledge
    done: Knowledge
    #: Who initialised it, and when.
    maker: int
    made_at: int
    phase: int = 0
    transactions: int = 0
    #: Parked lanes by the block that they wait in front of, with the parity or phase they wait for.
    parked: list[tuple[int, Ints]] = field(default_factory=list)


class MBarriers:
    """All mbarriers of a launch, by their offset in shared memory."""

    def __init__(self, context: Context, scheduler: Scheduler) -> None:
        self.context, self.scheduler = context, scheduler
        self.table: dict[int, MBarrier] = {}
        self._made: dict[int, int] = {}

    def initialise(self, offsets: Ints, counts: Ints, lanes: Ints) -> None:
        """mbarrier.init."""
        clocks = self.context.clocks
        for offset, count, lane in zip(offsets.tolist(), counts.tolist(), lanes.tolist(), strict=True):
            domain = int(self.context.domain[lane])
            number = self._made.get(domain, 0)
            self._made[domain] = number + 1
            old = self.table.get(offset)
            agent = old.agent if old else number % ASYNC_AGENTS
            maker = int(self.context.warp[lane])
            made_at = int(clocks.know[0][domain, maker, maker])
            self.table[offset] = MBarrier(
                domain, agent, count, count, clocks.nothing(), clocks.nothing(), maker, made_at
            )

    def invalidate(self, offsets: Ints) -> None:
        """mbarrier.inval."""
        for offset in set(offsets.tolist()):
            self._at(offset)
            del self.table[offset]

    def arrive(self, offsets: Ints, counts: Ints, expect: Ints, lanes: Ints) -> Ints:
        """Each lane adds ``expect`` bytes to the transaction count and arrives ``counts`` times: the phases before."""
        context = self.context
        phases = np.zeros(lanes.size, np.int64)
        for offset in np.unique(offsets).tolist():
            barrier, mine = self._at(offset), offsets == offset
            phases[mine] = barrier.phase
            arriving = lanes[mine]
            self._initialised(barrier, arriving)
            if context.order is not None and counts[mine].any():
                first = first_of_warps(arriving)
                given = context.clocks.release(context.domain[first], context.warp[first])
                barrier.given = np.maximum(barrier.given, given.max(axis=1))
            barrier.transactions += int(expect[mine].sum())
            barrier.pending -= int(counts[mine].sum())
            self._settle(offset, barrier)
        return phases

    def complete(self, offset: int, size: int, *, arrivals: int = 0) -> None:
        """Asynchronous work of ``size`` bytes is done (and arrives ``arrivals`` times)."""
        barrier = self._at(offset)
        barrier.transactions -= size
        barrier.pending -= arrivals
        self._settle(offset, barrier)

    def stamp(self, offset: int, *, generic: bool = False) -> tuple[int, int]:
        """Agent and clock of a completion on an mbarrier, which those who wait for it will know.

        ``generic``: through the asynchronous proxy they see it only after a fence.
        """
        barrier, clocks = self._at(offset), self.context.clocks
        clock = clocks.complete(barrier.domain, barrier.agent)
        barrier.given[: 1 if generic else 2, clocks.warps + barrier.agent] = clock
        return clocks.warps + barrier.agent, clock

    def test(self, offsets: Ints, wanted: Ints, lanes: Ints, *, parity: bool) -> NDArray[np.bool_]:
        """Which lanes find the phase that they wait for complete; these are then ordered after its arrivals."""
        context, passed = self.context, np.zeros(lanes.size, np.bool_)
        for offset in np.unique(offsets).tolist():
            barrier, mine = self._at(offset), offsets == offset
            self._initialised(barrier, lanes[mine])
            now = barrier.phase & 1 if parity else barrier.phase
            passed[mine] = through = wanted[mine] != now
            waiters = lanes[mine][through]
            if waiters.size and context.order is not None:
                first = first_of_warps(waiters)
                context.clocks.acquire(context.domain[first], context.warp[first], barrier.done)
        return passed

    def park(self, block: int, offsets: Ints, lanes: Ints) -> None:
        """Lanes wait in front of a block until the phase of their mbarrier changes."""
        for offset in np.unique(offsets).tolist():
            self._at(offset).parked.append((block, lanes[offsets == offset]))

    def unpark(self) -> list[tuple[int, Ints]]:
        """All parked lanes, which park no longer: a wait may time out."""
        woken = [entry for barrier in self.table.values() for entry in barrier.parked]
        for barrier in self.table.values():
            barrier.parked.clear()
        return woken

    def _at(self, offset: int) -> MBarrier:
        barrier = self.table.get(offset)
        if barrier is None:
            raise self.context.fault(BarrierFault, f"no mbarrier was initialised at byte {offset} of shared memory")
        return barrier

    def check(self, offset: int, lane: int) -> None:
        """A copy names an mbarrier: it must exist, and its thread must know that it does."""
        self._initialised(self._at(offset), np.array([lane], np.int64))

    def _initialised(self, barrier: MBarrier, lanes: Ints) -> None:
        """A hazard where nothing orders the use of an mbarrier after its initialisation."""
        context = self.context
        if context.order is None:
            return
        first = first_of_warps(lanes)
        known = context.clocks.know[0][context.domain[first], context.warp[first], barrier.maker]
        if (late := known < barrier.made_at).any():
            context.hazards.add(
                "race", "an mbarrier is used by a warp that nothing orders after its init", int(late.sum())
            )

    def _settle(self, offset: int, barrier: MBarrier) -> None:
        if barrier.pending < 0:
            raise self.context.fault(BarrierFault, f"more than {barrier.expected} arrivals in one phase of an mbarrier")
        if barrier.pending or barrier.transactions:
            return
        barrier.phase += 1
        barrier.pending = barrier.expected
        barrier.done = barrier.given.copy()
        self.scheduler.progress += 1
        parked, barrier.parked = barrier.parked, []
        for block, lanes in parked:
            self.scheduler.push(block, lanes)
