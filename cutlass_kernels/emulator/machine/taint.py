"""Registers that hold what was read from memory that nobody wrote. Reading ahead is harmless, using the value is not.

Pipelined kernels fetch fragments of a tile that never comes and drop them. So a load only marks its registers; moves
carry the marks along; any other instruction that reads a marked register reports it, and the next write clears it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cutlass_kernels.emulator.machine.clocks import Ints
from cutlass_kernels.emulator.machine.hazards import Hazards


class Taint:
    """Marks by register. ``marks`` is empty while nothing is marked, which readers ask first."""

    def __init__(self, lanes: int, hazards: Hazards) -> None:
        self.marks: dict[int, NDArray[np.bool_]] = {}
        self._lanes, self._hazards = lanes, hazards

    def mark(self, register: int, lanes: Ints) -> None:
        """Lanes of a register hold something that nobody wrote."""
        self.marks.setdefault(register, np.zeros(self._lanes, np.bool_))[lanes] = True

    def clear(self, register: int, lanes: Ints) -> None:
        """Lanes of a register are written."""
        marks = self.marks.get(register)
        if marks is not None:
            marks[lanes] = False
            if not marks.any():
                del self.marks[register]

    def use(self, register: int, lanes: Ints) -> None:
        """Lanes of a register are read by something that computes."""
        marks = self.marks.get(register)
        if marks is not None and (hit := marks[lanes]).any():
            self._hazards.add("uninitialised", "a value is used that nobody wrote to memory", int(hit.sum()))

    def copy(self, source: int, target: int, lanes: Ints) -> None:
        """Lanes of a register are moved to another, which was just written."""
        marks = self.marks.get(source)
        if marks is not None and (hit := lanes[marks[lanes]]).size:
            self.mark(target, hit)
