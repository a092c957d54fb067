"""setmaxnreg: warpgroups give registers to the pool of their CTA and take them from it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cutlass_kernels.emulator.errors import Deadlock, LaunchError
from cutlass_kernels.emulator.machine.clocks import Ints
from cutlass_kernels.emulator.machine.context import Context
from cutlass_kernels.emulator.machine.geometry import WARPGROUP
from cutlass_kernels.emulator.ptx.syntax import Instruction, Kernel

#: Registers of a multiprocessor, which are handed out to threads by eight.
REGISTERS, UNIT = 65536, 8


def at_launch(kernel: Kernel, threads: int) -> int:
    """Registers of a thread when a block of as many begins: all that there are, but for what directives say."""
    blocks = kernel.min_blocks or 1
    most = min(256, REGISTERS // (threads * blocks) // UNIT * UNIT)
    return most if kernel.max_registers is None else min(most, -(-kernel.max_registers // UNIT) * UNIT)


class Budgets:
    """What each warpgroup holds of the registers of its CTA. What ended threads hold does not come back."""

    def __init__(self, context: Context, kernel: Kernel, push: Callable[[int, Ints], None]) -> None:
        self.context, self._push = context, push
        self.launched = at_launch(kernel, context.geometry.threads)
        #: Registers of a thread by the warpgroup's first lane, once they have changed; and a CTA's free ones.
        self._held: dict[int, int] = {}
        self._free = np.zeros(context.geometry.ctas, np.int64)
        self._waiting: list[tuple[int, Ints, int, Instruction | None]] = []

    def change(self, wanted: int, lanes: Ints, following: int, more: bool) -> None:
        """Each of the warpgroups goes on at a block with ``wanted`` registers a thread, once they are there."""
        for row in self._split(lanes):
            held = self._held.get(int(row[0]), self.launched)
            if wanted < held if more else wanted > held:
                raise self.context.fault(LaunchError, f"setmaxnreg to {wanted} registers by threads that hold {held}")
            self._waiting.append((wanted, row, following, self.context.hazards.at))
        self._serve()

    def check(self) -> None:
        """Nothing else goes on. Raises `Deadlock` if warpgroups wait for registers."""
        if not self._waiting:
            return
        wanted, row, _, at = self._waiting[0]
        held, free = self._held.get(int(row[0]), self.launched), int(self._free[self.context.cta[row[0]]])
        threads = self.context.geometry.threads
        raise Deadlock(
            f"{row.size} threads that hold {held} registers wait for {wanted}: {row.size * (wanted - held)} more, but"
            f" {free} are left of the {self.launched} x {threads} that their CTA began with",
            at.line if at else None,
            at.text if at else "",
        )

    def _split(self, lanes: Ints) -> list[Ints]:
        group = self.context.geometry.groups[WARPGROUP][lanes]
        return np.split(lanes, np.flatnonzero(np.diff(group)) + 1)

    def _serve(self) -> None:
        """The first to ask is served first; whoever needs less may overtake."""
        waiting, self._waiting = self._waiting, []
        waiting.sort(key=lambda each: each[0] > self._held.get(int(each[1][0]), self.launched))
        for each in waiting:
            wanted, row, following, _ = each
            cta, first = self.context.cta[row[0]], int(row[0])
            more = row.size * (wanted - self._held.get(first, self.launched))
            if more > self._free[cta]:
                self._waiting.append(each)
                continue
            self._free[cta] -= more
            self._held[first] = wanted
            self._push(following, row)
