"""wgmma: matrix products that four warps start together and that run until a wait for their group.

Under "late" a product reads its operands (registers too) and writes its accumulators at the wait; under "early" at its
issue. Either way shared operands count as being read until the wait, and registers of the product must not be touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from cutlass_kernels.emulator.errors import DivergentCollective
from cutlass_kernels.emulator.machine.clocks import Ints
from cutlass_kernels.emulator.machine.context import Context
from cutlass_kernels.emulator.machine.geometry import WARPGROUP
from cutlass_kernels.emulator.ptx.syntax import Instruction

SIZE = WARPGROUP


@dataclass
class _Product:
    at: Instruction | None
    words: Ints
    registers: frozenset[int]
    #: None once it has been computed.
    compute: Callable[[], None] | None


@dataclass
class _Warpgroup:
    lanes: Ints
    open: list[_Product] = field(default_factory=list)
    committed: list[list[_Product]] = field(default_factory=list)


class Warpgroups:
    """The warpgroups of a launch, by the number of their first lane over 128."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._groups: dict[int, _Warpgroup] = {}
        #: Registers of unfinished products by warpgroup.
        self.busy: dict[int, set[int]] = {}
        #: Registers of products that threads wrote since their last wgmma.fence, by warpgroup.
        self._unfenced: dict[int, set[int]] = {}

    def split(self, lanes: Ints) -> list[Ints]:
        """Lanes as whole warpgroups. Raises `DivergentCollective`."""
        whole = lanes.size % SIZE == 0
        rows = lanes.reshape(-1, SIZE) if whole else lanes[None, :]
        if not whole or (self.context.thread[rows[:, 0]] % SIZE).any() or (rows[:, -1] - rows[:, 0] != SIZE - 1).any():
            raise self.context.fault(DivergentCollective, "wgmma by a part of a warpgroup of 128 threads")
        return list(rows)

    def issue(self, lanes: Ints, words: Ints, registers: frozenset[int], compute: Callable[[], None]) -> None:
        """A product of one warpgroup starts. ``words``: shared words that it reads, each
        operand's once."""
        context = self.context
        if context.order is not None:
            context.order.async_read(words, int(context.domain[lanes[0]]), context.warp[lanes[::32]])
        if self._unfenced.get(int(lanes[0]) // SIZE, frozenset()) & registers:
            context.hazards.add("in flight", "a wgmma of registers written without a wgmma.fence after it")
        early = context.options.landing == "early"
        if early:
            compute()
        group = self._groups.setdefault(int(lanes[0]) // SIZE, _Warpgroup(lanes))
        group.open.append(_Product(context.hazards.at, words, registers, None if early else compute))
        self.busy.setdefault(int(lanes[0]) // SIZE, set()).update(registers)

    def commit(self, lanes: Ints) -> None:
        """wgmma.commit_group."""
        for row in self.split(lanes):
            group = self._groups.setdefault(int(row[0]) // SIZE, _Warpgroup(row))
            group.committed.append(group.open)
            group.open = []

    def wait(self, still: int, lanes: Ints) -> None:
        """wgmma.wait_group: all but the youngest ``still`` groups are done."""
        for row in self.split(lanes):
            number = int(row[0]) // SIZE
            group = self._groups.setdefault(number, _Warpgroup(row))
            done = max(len(group.committed) - still, 0)
            for products in group.committed[:done]:
                for product in products:
                    self._settle(group, product)
            group.committed = group.committed[done:]
            left = [p.registers for products in (*group.committed, group.open) for p in products]
            self.busy[number] = set().union(*left)
            if not self.busy[number]:
                del self.busy[number]

    def touch(self, register: int, lanes: Ints) -> None:
        """A thread reads or writes a register: a hazard if a product of its warpgroup still uses it."""
        users = [number for number, registers in self.busy.items() if register in registers]
        if users and (hit := np.isin(lanes // SIZE, users)).any():
            self.context.hazards.add("in flight", "a register that an unfinished wgmma uses", int(hit.sum()))

    def written(self, register: int, lanes: Ints) -> None:
        """A thread writes a register that products use: wgmma.fence must come before the next of them."""
        if self.busy:
            self.touch(register, lanes)
        for number in set((lanes[::32] // SIZE).tolist()):
            self._unfenced.setdefault(number, set()).add(register)

    def fence(self, lanes: Ints) -> None:
        """wgmma.fence."""
        for row in self.split(lanes):
            self._unfenced.pop(int(row[0]) // SIZE, None)

    def finish(self) -> None:
        """Threads have exited: products that nobody waited for never had a result."""
        for group in self._groups.values():
            for product in (p for products in (*group.committed, group.open) for p in products):
                self.context.hazards.at = product.at
                self.context.hazards.add("unwaited", "a wgmma that its warpgroup never waits for")

    def _settle(self, group: _Warpgroup, product: _Product) -> None:
        context, waiting = self.context, self.context.hazards.at
        context.hazards.at = product.at
        if product.compute is not None:
            product.compute()
        if context.order is not None:
            warps = context.warp[group.lanes[::32]]
            context.order.async_read_done(product.words, int(context.domain[group.lanes[0]]), warps)
        context.hazards.at = waiting
