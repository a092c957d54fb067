"""cp.async: copies of 4, 8 or 16 bytes from global to shared memory that a thread waits for by groups.

A copy may land any time between its issue and the wait of its thread. Under "late" (and "reversed") it reads its source
and lands at the wait; under "early" at the issue. Either way its words count as in flight until the wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cutlass_kernels.emulator.errors import MemoryFault
from cutlass_kernels.emulator.machine.clocks import Ints
from cutlass_kernels.emulator.machine.context import Context
from cutlass_kernels.emulator.machine.mbarriers import MBarriers
from cutlass_kernels.emulator.machine.memory import WRITTEN
from cutlass_kernels.emulator.machine.spaces import Space
from cutlass_kernels.emulator.machine.transfers import Transfers
from cutlass_kernels.emulator.ptx.syntax import Instruction
from cutlass_kernels.emulator.ptx.types import Array


@dataclass
class _Copies:
    """One instruction's copies that have not been waited for: parallel arrays, one entry a lane."""

    at: Instruction | None
    lanes: Ints
    groups: Ints
    target: Ints
    source: Ints
    wanted: Ints
    size: int
    serial: int
    landed: bool = False

    def part(self, mask: Array) -> _Copies:
        return _Copies(
            self.at,
            self.lanes[mask],
            self.groups[mask],
            self.target[mask],
            self.source[mask],
            self.wanted[mask],
            self.size,
            self.serial,
            self.landed,
        )


class CopyGroups:
    """The copies of a launch that are under way."""

    def __init__(self, context: Context, mbarriers: MBarriers, transfers: Transfers) -> None:
        self.context, self.mbarriers, self.transfers = context, mbarriers, transfers
        self.group = np.zeros(context.n, np.int64)
        self._pending: list[_Copies] = []
        self._serial = 0

    def issue(self, target: Array, source: Array, size: int, wanted: Ints, lanes: Ints) -> None:
        """Copy ``wanted`` bytes to each target and fill up to ``size`` with zeros."""
        context = self.context
        _, _, shared = context.locate(Space.SHARED, target, lanes, size)
        if context.tally is not None:
            context.tally.shared_access(shared, lanes, size)
        if context.order is not None:
            words = context.words(shared, size)
            context.order.async_write(words, context.domain[lanes][:, None], context.warp[lanes][:, None])
        source_at = self._sources(source, size, wanted, lanes)
        self._serial += 1
        copies = _Copies(context.hazards.at, lanes, self.group[lanes], shared, source_at, wanted, size, self._serial)
        if context.options.landing == "early":
            self._move(copies)
            copies.landed = True
        self._pending.append(copies)

    def commit(self, lanes: Ints) -> None:
        """cp.async.commit_group."""
        self.group[lanes] += 1

    def wait(self, still: int, lanes: Ints) -> None:
        """cp.async.wait_group: of the lanes' groups, all but the youngest ``still`` land now."""
        waiting = np.zeros(self.context.n, np.bool_)
        waiting[lanes] = True
        self._land(lambda copies: waiting[copies.lanes] & (copies.groups < self.group[copies.lanes] - still))

    def arrive(self, offsets: Ints, lanes: Ints, *, extra: bool) -> None:
        """cp.async.mbarrier.arrive: when the lanes' copies up to here have landed, they arrive on an mbarrier.

        ``extra``: without .noinc the arrival is one that the mbarrier did not expect.
        """
        context = self.context
        if extra:
            for offset in offsets.tolist():
                self.mbarriers.complete(offset, 0, arrivals=-1)
        last = self._serial
        mine = np.zeros(context.n, np.bool_)
        mine[lanes] = True

        def land() -> None:
            arrivals = dict(zip(lanes.tolist(), offsets.tolist(), strict=True))
            self._land(lambda copies: mine[copies.lanes] & (copies.serial <= last), arrivals)
            for offset in offsets.tolist():
                self.mbarriers.complete(offset, 0, arrivals=1)

        self.transfers.queue(land)

    def finish(self) -> None:
        """Threads have exited: copies that nobody waited for may still overwrite shared memory."""
        for copies in self._pending:
            self.context.hazards.at = copies.at
            self.context.hazards.add("unwaited", "a cp.async that its thread never waits for", copies.lanes.size)

    def _land(self, chosen: Callable[[_Copies], Array], offsets: dict[int, int] | None = None) -> None:
        left = []
        for copies in self._pending:
            mask = chosen(copies)
            if mask.any():
                self._finish(copies if mask.all() else copies.part(mask), offsets)
            if not mask.all():
                left.append(copies.part(~mask) if mask.any() else copies)
        self._pending = left

    def _finish(self, copies: _Copies, offsets: dict[int, int] | None) -> None:
        context = self.context
        if not copies.landed:
            self._move(copies)
        if context.order is None:
            return
        words, lanes = context.words(copies.target, copies.size), copies.lanes
        if offsets is None:
            domain, warp = context.domain[lanes], context.warp[lanes]
            context.order.async_write_done(
                words, warp[:, None], context.clocks.own(domain, warp)[:, None], generic=True
            )
            return
        for offset in set(offsets.values()):
            mine = np.array([offsets[lane] == offset for lane in lanes.tolist()])
            agent, clock = self.mbarriers.stamp(offset, generic=True)
            context.order.async_write_done(words[mine], agent, clock, generic=True)

    def _sources(self, source: Array, size: int, wanted: Ints, lanes: Ints) -> Ints:
        """Offsets in global memory; copies of no bytes have none, whatever their address."""
        context = self.context
        if (wanted < 0).any() or (wanted > size).any():
            raise context.fault(MemoryFault, f"a cp.async of {int(wanted.max())} source bytes into {size}")
        reading = wanted > 0
        offsets = np.zeros(lanes.size, np.int64)
        if not reading.any():
            return offsets
        space, at = Space.GLOBAL, source[reading]
        whole = wanted[reading] == size
        if whole.all():
            _, _, offsets[reading] = context.locate(space, at, lanes[reading], size)
        else:
            for count in np.unique(wanted[reading]).tolist():
                part = wanted[reading] == count
                first = context.locate(space, at[part], lanes[reading][part], 1)[2]
                context.locate(space, at[part] + np.uint64(count - 1), lanes[reading][part], 1)
                offsets[np.flatnonzero(reading)[part]] = first
            if (offsets & (size - 1)).any():
                raise context.fault(MemoryFault, f"a cp.async source off its alignment of {size} bytes")
        if context.tally is not None:
            context.tally.global_access(offsets[reading], lanes[reading], size, write=False)
        return offsets

    def _move(self, copies: _Copies) -> None:
        context = self.context
        width = min(copies.size, 8)
        missing = context.heap.memory.without(WRITTEN, copies.source, copies.size)
        data = context.heap.memory.read(copies.source, width, copies.size // width)
        data = np.ascontiguousarray(data)
        short = copies.wanted < copies.size
        if short.any():
            raw = data.view(np.uint8).reshape(copies.lanes.size, copies.size)
            raw[np.arange(copies.size) >= copies.wanted[:, None]] = 0
        context.shared.write(copies.target, width, data)
        # A byte that nobody wrote to global memory stays unwritten in shared memory too.
        if missing is not None and (unknown := missing & ~short).any():
            context.shared.forget(copies.target[unknown], copies.size)
