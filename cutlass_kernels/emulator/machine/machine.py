"""One launch in execution: a group of CTAs that run at once, every thread a lane of numpy vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from cutlass_kernels.emulator.errors import UnsupportedInstruction
from cutlass_kernels.emulator.layout import Layout
from cutlass_kernels.emulator.machine.barriers import Barriers, ClusterBarriers
from cutlass_kernels.emulator.machine.budgets import Budgets
from cutlass_kernels.emulator.machine.clocks import Ints
from cutlass_kernels.emulator.machine.context import Context
from cutlass_kernels.emulator.machine.copies import CopyGroups
from cutlass_kernels.emulator.machine.geometry import Geometry
from cutlass_kernels.emulator.machine.mbarriers import MBarriers
from cutlass_kernels.emulator.machine.memory import Heap
from cutlass_kernels.emulator.machine.scheduler import Lanes, Scheduler
from cutlass_kernels.emulator.machine.transfers import Transfers
from cutlass_kernels.emulator.machine.warpgroups import Warpgroups
from cutlass_kernels.emulator.options import Options, Site
from cutlass_kernels.emulator.ptx.syntax import Instruction, Kernel
from cutlass_kernels.emulator.ptx.types import UNSIGNED, Array, bits

_POISON = {8: 0xA5, 16: 0x7FA5, 32: 0x7FA5A5A5, 64: 0x7FFA5A5A5A5A5A5A}
_TIMEOUTS = 3


class Code(Protocol):
    """The program that a machine runs (`cutlass_kernels.emulator.program.Program`), as far as it knows it."""

    kernel: Kernel
    layout: Layout

    def gathers(self, block: int) -> int: ...

    def first(self, block: int) -> Instruction: ...

    def run_block(self, machine: Machine) -> Callable[[int, Lanes], None]: ...

    def time_out(self, machine: Machine, block: int, lanes: Ints) -> None: ...


class Machine(Context):
    """Registers, memories and schedulers of the CTAs that are resident together."""

    def __init__(
        self,
        program: Code,
        geometry: Geometry,
        heap: Heap,
        symbols: dict[str, int],
        parameters: bytes,
        options: Options,
    ) -> None:
        super().__init__(program.layout, geometry, heap, parameters, options)
        self.program = program
        #: Addresses of the module's global variables.
        self.symbols = symbols
        self.scheduler = Scheduler(
            self.n, program.run_block(self), self._idle, self._overdue, program.gathers, program.first, geometry.groups
        )
        clocks = self.clocks if options.races else None
        self.barriers = Barriers(geometry.ctas, self.cta, self.domain, self.warp, clocks)
        self.cluster = ClusterBarriers(geometry.domains, self.domain, self.warp, clocks, self.scheduler.push)
        self.mbarriers = MBarriers(self, self.scheduler)
        self.transfers = Transfers(self, self.scheduler, self.mbarriers)
        self.copies = CopyGroups(self, self.mbarriers, self.transfers)
        self.warpgroups = Warpgroups(self)
        self.budgets = Budgets(self, program.kernel, self.scheduler.push)
        self.sites: set[Site] = set()
        #: How many warps entered each block.
        self.executed: Ints
        self._special: dict[str, Array] = {}
        self._timeouts, self._seen = 0, -1
        self.registers: list[Array] = self._poisoned()

    def _poisoned(self) -> list[Array]:
        """Registers before their first write: arrays that are shared between them and read-only."""
        poison: dict[str, Array] = {}
        for _, kind in self.program.kernel.registers:
            if kind not in poison:
                width = bits(kind)
                dtype = np.dtype(np.bool_) if kind == "pred" else UNSIGNED[width]
                poison[kind] = np.full(self.n, _POISON.get(width, 0), dtype)
                poison[kind].flags.writeable = False
        return [poison[kind] for _, kind in self.program.kernel.registers]

    def run(self) -> None:
        """Execute until every thread has exited, then check what is left in flight."""
        with np.errstate(all="ignore"):
            self.scheduler.run(self.options.max_steps)
            self.transfers.finish()
            self.copies.finish()
            self.warpgroups.finish()

    # Lanes

    def special(self, name: str) -> Array:
        """A special register, one uint32 a lane."""
        if name not in self._special:
            try:
                self._special[name] = self.geometry.special(name)
            except KeyError:
                raise self.fault(UnsupportedInstruction, f"the special register {name} is not modelled") from None
        return self._special[name]

    def lanes(self, lanes: Lanes) -> Ints:
        """Lanes as an array."""
        return self.scheduler.expand(lanes)

    def exit(self, lanes: Lanes) -> None:
        """Threads end. The order matters: barriers look at who lives."""
        gone = self.lanes(lanes)
        self.scheduler.exit(gone)
        self.barriers.exit(gone)
        self.cluster.exit(gone)

    def _idle(self) -> bool:
        """Nobody can run: asynchronous work lands, or waits time out."""
        if self.transfers.land_one():
            return True
        progress = self.scheduler.progress
        self._timeouts = 0 if progress != self._seen else self._timeouts + 1
        self._seen = progress
        woken = self.mbarriers.unpark() if self._timeouts < _TIMEOUTS else []
        for block, lanes in woken:
            self.program.time_out(self, block, lanes)
        if not woken:
            self.budgets.check()
        return bool(woken)

    def _overdue(self) -> bool:
        """Threads poll: asynchronous work must land some time."""
        return self.transfers.land_one()
