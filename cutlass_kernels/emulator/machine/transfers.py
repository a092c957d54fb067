"""Bulk and tensor copies (TMA): asynchronous work that ends at an mbarrier or at a bulk group.

Under "late" a load lands only when no thread can run, the oldest first ("reversed": the youngest first), and a store
reads shared memory and writes global memory only at the wait for its group; under "early" both at their issue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cutlass_kernels.emulator.errors import MemoryFault
from cutlass_kernels.emulator.machine.clocks import Ints
from cutlass_kernels.emulator.machine.context import Context
from cutlass_kernels.emulator.machine.mbarriers import MBarriers
from cutlass_kernels.emulator.machine.memory import ALLOCATED, WRITTEN
from cutlass_kernels.emulator.machine.scheduler import Scheduler
from cutlass_kernels.emulator.machine.spaces import Space
from cutlass_kernels.emulator.machine.tensormap import SIZE, TensorMap, swizzled
from cutlass_kernels.emulator.ptx.syntax import Instruction
from cutlass_kernels.emulator.ptx.types import UNSIGNED, Array

_BULK_ALIGNMENT = 16
_TENSOR_ALIGNMENT = 128


@dataclass
class _Store:
    """A copy out of shared memory that its thread has not waited for. ``move`` does it; None: it has been done."""

    at: Instruction | None
    lane: int
    group: int
    words: Ints
    move: Callable[[], None] | None


class Transfers:
    """Asynchronous work of a launch that is not tied to the waits of one thread, and bulk stores."""

    def __init__(self, context: Context, scheduler: Scheduler, mbarriers: MBarriers) -> None:
        self.context, self.scheduler, self.mbarriers = context, scheduler, mbarriers
        self._queue: list[tuple[Instruction | None, Callable[[], None]]] = []
        self._stores: list[_Store] = []
        self._group = np.zeros(context.n, np.int64)

    # Landing

    def queue(self, land: Callable[[], None]) -> None:
        """Work that may land from now on."""
        if self.context.options.landing == "early":
            land()
        else:
            self._queue.append((self.context.hazards.at, land))

    def land_one(self) -> bool:
        """Let one piece of queued work land; False if there is none."""
        if not self._queue:
            return False
        at, land = self._queue.pop(-1 if self.context.options.landing == "reversed" else 0)
        self._as(at, land)
        self.scheduler.progress += 1
        return True

    def finish(self) -> None:
        """Every thread has exited: what still flies writes or reads the shared memory of CTAs that are gone."""
        for at, land in self._queue:
            self.context.hazards.at = at
            self.context.hazards.add("unwaited", "a load into shared memory that nobody waits for")
            self._as(at, land)
        for store in self._stores:
            self.context.hazards.at = store.at
            self.context.hazards.add("unwaited", "a thread exits while its bulk store may still read shared memory")
            self._settle(store)
        self._queue, self._stores = [], []

    def _as(self, at: Instruction | None, action: Callable[[], None]) -> None:
        self.context.hazards.at = at
        action()

    # Loads

    def load_tensor(
        self, target: int, tensor_map: int, start: tuple[int, ...], barrier: int, lane: int, ctas: list[int]
    ) -> None:
        """cp.async.bulk.tensor to shared memory of ``ctas`` (their offsets), completing on an mbarrier in each."""
        box = self._map(tensor_map, lane)
        if target % _TENSOR_ALIGNMENT:
            raise self.context.fault(MemoryFault, f"a tensor copy to byte {target} of shared memory: off 128 bytes")
        chunk = swizzled(target + np.arange(0, box.box_bytes, box.element, dtype=np.int64), box.swizzle)
        bytes_at, inside = box.offsets(start)
        source = bytes_at[inside] + box.address - self.context.heap.base
        self._allocated(source, box.element)

        def fetch() -> Array:
            dtype = UNSIGNED[8 * box.element]
            data = np.full(inside.size, box.outside(), dtype)
            data[inside] = self.context.heap.memory.read(source, box.element, 1)[:, 0]
            return data[:, None]

        def unwritten() -> Array | None:
            missing = self.context.heap.memory.without(WRITTEN, source, box.element)
            return None if missing is None else np.flatnonzero(inside)[missing]

        for cta in ctas:
            self._load(cta, chunk, box.element, fetch, unwritten, barrier, lane)

    def load_bulk(self, target: int, source: int, size: int, barrier: int, lane: int, ctas: list[int]) -> None:
        """cp.async.bulk of ``size`` bytes to shared memory of ``ctas``, completing on an mbarrier in each."""
        self._bulk_rules(target, source, size)
        at = source - self.context.heap.base + np.arange(0, size, _BULK_ALIGNMENT, dtype=np.int64)
        self._allocated(at, _BULK_ALIGNMENT)
        memory = self.context.heap.memory

        def fetch() -> Array:
            return memory.read(at, 8, 2)

        def unwritten() -> Array | None:
            return memory.without(WRITTEN, at, _BULK_ALIGNMENT)

        target_at = target + np.arange(0, size, _BULK_ALIGNMENT, dtype=np.int64)
        for cta in ctas:
            self._load(cta, target_at, _BULK_ALIGNMENT, fetch, unwritten, barrier, lane)

    def _load(
        self,
        cta: int,
        inside: Ints,
        width: int,
        fetch: Callable[[], Array],
        unwritten: Callable[[], Array | None],
        barrier: int,
        lane: int,
    ) -> None:
        context = self.context
        offsets, size = inside + cta, inside.size * width
        self._in_shared(offsets, width)
        words = self._words(offsets, width)
        if context.order is not None:
            context.order.async_write(words, context.domain[lane], context.warp[lane])
        context.counters.async_bytes += size
        mbarrier = barrier + cta
        self.mbarriers.check(mbarrier, lane)

        def land() -> None:
            context.shared.write(offsets, min(width, 8), fetch())
            if (unknown := unwritten()) is not None:
                context.shared.forget(offsets[unknown], width)
            if context.order is not None:
                context.order.async_write_done(words, *self.mbarriers.stamp(mbarrier))
            self.mbarriers.complete(mbarrier, size)

        self.queue(land)

    # Stores

    def store_tensor(self, tensor_map: int, start: tuple[int, ...], source: int, lane: int) -> None:
        """cp.async.bulk.tensor from shared memory; elements outside of the tensor are dropped."""
        context, box = self.context, self._map(tensor_map, lane)
        cta = int(context.cta[lane]) * context.shared_stride
        inner = np.arange(0, box.box_bytes, box.element, dtype=np.int64)
        chunk = cta + swizzled(source + inner, box.swizzle)
        bytes_at, inside = box.offsets(start)
        target = bytes_at[inside] + box.address - context.heap.base
        self._allocated(target, box.element)

        def move() -> None:
            data = context.shared.read(chunk[inside], box.element, 1)
            context.heap.memory.write(target, box.element, data)

        self._store(chunk, box.element, lane, move)

    def store_bulk(self, target: int, source: int, size: int, lane: int) -> None:
        """cp.async.bulk of ``size`` bytes from shared to global memory."""
        context = self.context
        self._bulk_rules(source, target, size)
        steps = np.arange(0, size, _BULK_ALIGNMENT, dtype=np.int64)
        at = int(context.cta[lane]) * context.shared_stride + source + steps
        to = target - context.heap.base + steps
        self._allocated(to, _BULK_ALIGNMENT)
        self._store(at, _BULK_ALIGNMENT, lane, lambda: context.heap.memory.write(to, 8, context.shared.read(at, 8, 2)))

    def _store(self, offsets: Ints, width: int, lane: int, move: Callable[[], None]) -> None:
        context = self.context
        self._in_shared(offsets, width)
        words = self._words(offsets, width)
        if context.shared.without(WRITTEN, offsets, width) is not None:
            context.hazards.add("uninitialised", "a bulk store of shared memory that nobody wrote")
        if context.order is not None:
            context.order.async_read(words, int(context.domain[lane]), context.warp[[lane]])
        context.counters.async_bytes += offsets.size * width
        early = context.options.landing == "early"
        if early:
            move()
        self._stores.append(_Store(context.hazards.at, lane, int(self._group[lane]), words, None if early else move))

    def commit(self, lanes: Ints) -> None:
        """cp.async.bulk.commit_group."""
        self._group[lanes] += 1

    def wait(self, still: int, lanes: Ints) -> None:
        """cp.async.bulk.wait_group: all but the youngest ``still`` groups of the lanes are done (or have been read)."""
        waiting, left = set(lanes.tolist()), []
        for store in self._stores:
            if store.lane in waiting and store.group < self._group[store.lane] - still:
                self._settle(store)
            else:
                left.append(store)
        self._stores = left

    def _settle(self, store: _Store) -> None:
        context = self.context
        if store.move is not None:
            store.move()
        if context.order is not None:
            context.order.async_read_done(store.words, int(context.domain[store.lane]), context.warp[[store.lane]])

    # Checks

    def _map(self, address: int, lane: int) -> TensorMap:
        context = self.context
        wide = np.array([address], np.uint64) + np.arange(0, SIZE, 16, dtype=np.uint64)
        space, memory, offsets = context.locate(Space.GENERIC, wide, np.full(wide.size, lane), 16)
        raw = memory.read(offsets, 8, 2).tobytes()
        if (found := TensorMap.decode(raw)) is None:
            raise context.fault(MemoryFault, f"no tensor map lies at that {space.value} address")
        return found

    def _allocated(self, offsets: Ints, width: int) -> None:
        memory = self.context.heap.memory
        if not offsets.size:
            return
        outside = offsets.min() < 0 or offsets.max() + width > memory.size
        if outside or memory.without(ALLOCATED, offsets, width) is not None:
            raise self.context.fault(
                MemoryFault, "a bulk or tensor copy touches global memory outside every allocation"
            )

    def _in_shared(self, offsets: Ints, width: int) -> None:
        memory = self.context.shared
        outside = offsets.min() < 0 or offsets.max() + width > memory.size
        if outside or memory.without(ALLOCATED, offsets, width) is not None:
            raise self.context.fault(MemoryFault, "a bulk or tensor copy touches bytes beyond a CTA's shared memory")

    def _words(self, offsets: Ints, width: int) -> Ints:
        """Each shared word of a copy once. Elements narrower than a word come in chunks of 16 bytes."""
        if width < 4:
            offsets, width = offsets[:: _BULK_ALIGNMENT // width], _BULK_ALIGNMENT
        return self.context.words(offsets, width).ravel()

    def _bulk_rules(self, shared: int, other: int, size: int) -> None:
        if shared % _BULK_ALIGNMENT or other % _BULK_ALIGNMENT or size % _BULK_ALIGNMENT or size <= 0:
            raise self.context.fault(MemoryFault, f"a bulk copy of {size} bytes off its alignment of 16 bytes")
