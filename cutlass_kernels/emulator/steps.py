"""An instruction becomes a step: closures over the machine and the lanes that execute (None: all of them)."""

from __future__ import annotations

from collections.abc import Callable

from cutlass_kernels.emulator.machine.machine import Machine
from cutlass_kernels.emulator.machine.scheduler import Lanes
from cutlass_kernels.emulator.ptx.types import Value

Step = Callable[[Machine, Lanes], None]
Reader = Callable[[Machine, Lanes], Value]
Writer = Callable[[Machine, Lanes, Value], None]
