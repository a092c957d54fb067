"""The parts of a machine share a context: who the lanes are, the memories, the clocks, and who looks for hazards.

Every part is given a `Context` and the other parts that it calls, so that none knows the whole machine.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cutlass_kernels.emulator.errors import EmulatorError, MemoryFault
from cutlass_kernels.emulator.layout import Layout
from cutlass_kernels.emulator.machine.clocks import Clocks, Ints
from cutlass_kernels.emulator.machine.geometry import Geometry
from cutlass_kernels.emulator.machine.hazards import Hazards
from cutlass_kernels.emulator.machine.memory import ALLOCATED, WRITTEN, Heap, Memory
from cutlass_kernels.emulator.machine.races import Races
from cutlass_kernels.emulator.machine.spaces import LOCAL, PARAMETER, SHARED, Space, cluster_rank
from cutlass_kernels.emulator.machine.taint import Taint
from cutlass_kernels.emulator.machine.tally import Tally
from cutlass_kernels.emulator.machine.visibility import Order, Visibility
from cutlass_kernels.emulator.options import Options
from cutlass_kernels.emulator.ptx.types import Array
from cutlass_kernels.emulator.report import Counters

Fault = TypeVar("Fault", bound=EmulatorError)


class Context:
    """The lanes of the CTAs that are resident together, and their memories, whose every access goes through here."""

    def __init__(self, layout: Layout, geometry: Geometry, heap: Heap, parameters: bytes, options: Options) -> None:
        self.geometry, self.options, self.heap = geometry, options, heap
        self.n = geometry.lanes
        self.thread, self.cta, self.domain, self.warp = geometry.thread, geometry.cta, geometry.domain, geometry.warp
        self.hazards, self.counters = Hazards(options.max_hazards), Counters()
        self.taint = Taint(self.n, self.hazards)
        self.tally = Tally(self.counters) if options.counters else None
        self.clocks = Clocks(geometry.domains, geometry.warps_in_domain)
        self._memories(layout, parameters)
        words = self.shared.size // 4
        self.order = Races(words, self.clocks, self.hazards) if options.races else None
        self.visible: Visibility | None = None
        if options.races and self.clocks.far:
            self.visible = Visibility(heap.memory.size // 4, self.clocks, self.hazards)

    def _memories(self, layout: Layout, parameters: bytes) -> None:
        geometry = self.geometry
        self.shared_bytes = layout.shared_bytes(geometry.dynamic_shared)
        #: Bytes from one CTA's shared memory to the next; the gap is not allocated.
        self.shared_stride = -(-(self.shared_bytes + 1) // 1024) * 1024
        self.shared = Memory(self.shared_stride * geometry.ctas)
        # A NaN in every floating format: zeros could pass for results.
        self.shared.data[:] = 0xFF
        self.shared.state.reshape(-1)[: self.shared_stride * geometry.ctas].reshape(geometry.ctas, -1)[
            :, : self.shared_bytes
        ] = ALLOCATED
        self.local_stride = -(-layout.local_bytes // 16) * 16
        self.local = Memory(self.local_stride * self.n)
        self.local.state[:] = ALLOCATED
        self.parameters = Memory(len(parameters))
        self.parameters.write_bytes(0, np.frombuffer(parameters, np.uint8))

    def fault(self, kind: type[Fault], message: str) -> Fault:
        """An error at the present instruction."""
        at = self.hazards.at
        return kind(message, at.line if at else None, at.text if at else "")

    def locate(self, space: Space, address: Array, lanes: Ints, size: int) -> tuple[Space, Memory, Ints]:
        """Offsets of accesses of ``size`` bytes, checked for bounds and alignment. ``address``: uint64, one a lane."""
        if space is Space.GENERIC:
            space, address = self._generic(address)
        memory: Memory
        if space is Space.SHARED:
            memory, offsets = self.shared, self._shared_offsets(address, lanes, size)
        elif space is Space.GLOBAL:
            memory, offsets = self.heap.memory, (address - np.uint64(self.heap.base)).astype(np.int64)
        elif space is Space.LOCAL:
            memory, offsets = self.local, address.astype(np.int64) + lanes * self.local_stride
        else:
            memory, offsets = self.parameters, address.astype(np.int64)
        self._check(space, memory, offsets, lanes, size)
        return space, memory, offsets

    def _generic(self, address: Array) -> tuple[Space, Array]:
        top = int(address[0]) if address.size else 0
        for window, space in ((PARAMETER, Space.PARAMETER), (LOCAL, Space.LOCAL), (SHARED, Space.SHARED)):
            if top >= window:
                if (address < np.uint64(window)).any():
                    raise self.fault(
                        MemoryFault, "one generic access of lanes in different state spaces is not modelled"
                    )
                return space, address - np.uint64(window)
        if (address >= np.uint64(SHARED)).any():
            raise self.fault(MemoryFault, "one generic access of lanes in different state spaces is not modelled")
        return Space.GLOBAL, address

    def _shared_offsets(self, address: Array, lanes: Ints, size: int) -> Ints:
        rank, inside = cluster_rank(address)
        cta = self.cta[lanes]
        if rank.any():
            peers = self.geometry.cluster_ctas
            if (rank > peers).any():
                raise self.fault(MemoryFault, f"shared memory of CTA {int(rank.max()) - 1} in a cluster of {peers}")
            cta = np.where(rank > 0, cta // peers * peers + rank - 1, cta)
        beyond = inside + size > self.shared_bytes
        if beyond.any():
            worst = int(inside[beyond].max())
            raise self.fault(
                MemoryFault, f"{size} bytes at byte {worst} of shared memory, of which a CTA has {self.shared_bytes}"
            )
        return np.asarray(cta * self.shared_stride + inside, np.int64)

    def _check(self, space: Space, memory: Memory, offsets: Ints, lanes: Ints, size: int) -> None:
        crooked = offsets & (size - 1)
        if crooked.any():
            lane = int(np.flatnonzero(crooked)[0])
            where = self.geometry.describe(int(lanes[lane]))
            raise self.fault(MemoryFault, f"{space.value} access of {size} bytes off its alignment by {where}")
        outside = (offsets < 0) | (offsets + size > memory.size)
        missing = None if outside.any() else memory.without(ALLOCATED, offsets, size)
        if missing is not None or outside.any():
            bad = outside if missing is None else missing
            lane = int(np.flatnonzero(bad)[0])
            where = self.geometry.describe(int(lanes[lane]))
            raise self.fault(
                MemoryFault,
                f"{space.value} access of {size} bytes outside every allocation, at {int(offsets[lane]):#x} of the"
                f" {space.value} memory, by {where} and {int(bad.sum()) - 1} other threads",
            )

    def load(
        self, space: Space, address: Array, lanes: Ints, width: int, count: int, order: Order = "weak"
    ) -> tuple[Array, NDArray[np.bool_] | None]:
        """[lanes, count] elements of ``width`` bytes, and which lanes read what nobody wrote (None: none)."""
        size = width * count
        space, memory, offsets = self.locate(space, address, lanes, size)
        missing = memory.without(WRITTEN, offsets, size)
        self._observe(space, offsets, lanes, size, order, write=False)
        return memory.read(offsets, width, count), missing

    def store(
        self, space: Space, address: Array, lanes: Ints, width: int, values: Array, order: Order = "weak"
    ) -> None:
        """Store [lanes, count] elements of ``width`` bytes."""
        size = width * values.shape[1]
        space, memory, offsets = self.locate(space, address, lanes, size)
        if space is Space.PARAMETER:
            raise self.fault(MemoryFault, "a store to kernel parameters")
        self._observe(space, offsets, lanes, size, order, write=True)
        memory.write(offsets, width, values)

    def forget(self, space: Space, address: Array, lanes: Ints, size: int, unknown: NDArray[np.bool_]) -> None:
        """Some lanes stored values that nobody ever wrote: a hazard in global memory, elsewhere remembered."""
        space, memory, offsets = self.locate(space, address, lanes, size)
        if space is Space.GLOBAL:
            self.taint.report("a store", int(unknown.sum()))
        else:
            memory.forget(offsets[unknown], size)

    def _observe(self, space: Space, offsets: Ints, lanes: Ints, size: int, order: Order, *, write: bool) -> None:
        if self.tally is not None and offsets.size:
            if space is Space.SHARED:
                self.tally.shared_access(offsets, lanes, size)
            elif space is Space.GLOBAL:
                self.tally.global_access(offsets, lanes, size, write=write)
        if self.order is not None and space is Space.SHARED:
            words, domain, warp = self.words(offsets, size), self.domain[lanes][:, None], self.warp[lanes][:, None]
            if write:
                self.order.write(words, domain, warp, narrow=size < 4)
            else:
                self.order.read(words, domain, warp)
        if space is Space.GLOBAL:
            self.publish(offsets, lanes, size, order, reads=not write, writes=write)

    def publish(self, offsets: Ints, lanes: Ints, size: int, order: Order, *, reads: bool, writes: bool) -> None:
        """Accesses to global memory, for those who look for races there."""
        if self.visible is not None and offsets.size:
            words = self.words(offsets, size)
            domain, warp = self.domain[lanes], self.warp[lanes]
            self.visible.access(words, domain, warp, order, reads=reads, writes=writes, narrow=size < 4)

    @staticmethod
    def words(offsets: Ints, size: int) -> NDArray[np.int64]:
        """The 4-byte words of accesses: [accesses, words]."""
        return (offsets >> 2)[:, None] + np.arange(max(size // 4, 1))
