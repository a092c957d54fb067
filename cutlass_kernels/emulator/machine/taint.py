"""Values that nobody wrote, followed from memory through registers until they matter.

Pipelined kernels read ahead into tiles that never come, and multiply rows beyond a matrix's edge, and drop the
results. So a read of unwritten memory is no hazard yet: its lanes are marked, and every instruction hands the marks of
its sources on to its results, also through shared memory and matrix instructions. A hazard is an address, a condition
or a store to global memory that depends on a marked value. Unwritten registers are not marked.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cutlass_kernels.emulator.machine.clocks import Ints
from cutlass_kernels.emulator.machine.hazards import Hazards

Marks = NDArray[np.bool_]


class Taint:
    """``marks``: lanes by register. It is empty while nothing is marked, which is what readers ask first."""

    def __init__(self, lanes: int, hazards: Hazards) -> None:
        self.marks: dict[int, Marks] = {}
        self._lanes, self._hazards = lanes, hazards
        # Lanes that read a marked value in the present instruction; None: none did.
        self._seen: Marks | None = None

    def begin(self) -> None:
        """The next instruction starts."""
        self._seen = None

    def of(self, register: int, lanes: Ints) -> Marks:
        """The marks of a register."""
        marks = self.marks.get(register)
        return np.zeros(lanes.size, np.bool_) if marks is None else marks[lanes]

    def read(self, register: int, lanes: Ints, use: str | None) -> None:
        """Lanes read a register; ``use`` names what depends on the value if that is a hazard."""
        marks = self.marks.get(register)
        if marks is None or not (hit := marks[lanes]).any():
            return
        if use is not None:
            self.report(use, int(hit.sum()))
            return
        if self._seen is None:
            self._seen = np.zeros(self._lanes, np.bool_)
        self._seen[lanes] |= hit

    def report(self, use: str, count: int) -> None:
        """A marked value matters."""
        self._hazards.add("uninitialised", f"{use} depends on memory that nobody wrote", count)

    def seen(self, lanes: Ints) -> Marks | None:
        """Which lanes read a marked value in the present instruction; None: none."""
        if self._seen is None or not (hit := self._seen[lanes]).any():
            return None
        return hit

    def replace(self, lanes: Ints, marks: Marks) -> None:
        """Say which lanes' results depend on marked values, where lanes exchange or choose values."""
        self._seen = np.zeros(self._lanes, np.bool_)
        self._seen[lanes] = marks

    def write(self, register: int, lanes: Ints) -> None:
        """Lanes write a register: it takes on the marks of what the instruction has read."""
        hit = self.seen(lanes)
        self.mark(register, lanes, np.zeros(lanes.size, np.bool_) if hit is None else hit)

    def mark(self, register: int, lanes: Ints, marks: Marks) -> None:
        """Set the marks of a register's lanes."""
        known = self.marks.get(register)
        if known is None:
            if not marks.any():
                return
            known = self.marks[register] = np.zeros(self._lanes, np.bool_)
        known[lanes] = marks
        if not known.any():
            del self.marks[register]
