"""The errors of the emulator. Each says what was met, where, and in which PTX line."""

from __future__ import annotations


class EmulatorError(RuntimeError):
    """Base class. ``line`` is the 1-based line of the PTX text and ``text`` that line, where there is one."""

    def __init__(self, message: str, line: int | None = None, text: str = "") -> None:
        self.message, self.line, self.text = message, line, text
        where = "" if line is None else f" (PTX line {line}: {text.strip()})"
        super().__init__(message + where)


class PtxSyntaxError(EmulatorError):
    """Text that the PTX parser does not understand."""


class UnsupportedInstruction(EmulatorError):
    """An instruction, or a qualifier of one, that the emulator does not model. Nothing is ever skipped silently."""


class MemoryFault(EmulatorError):
    """An access outside every allocation, or a misaligned one: the kernel would be killed on a device."""


class Deadlock(EmulatorError):
    """No thread can run and nothing in flight can wake one: also for registers that setmaxnreg never gets."""


class DivergentCollective(EmulatorError):
    """A warp-wide instruction was reached by a part of the threads that it needs."""


class DeviceTrap(EmulatorError):
    """The kernel executed ``trap``, ``brkpt`` or a failed ``assert``."""


class LaunchError(EmulatorError):
    """A launch that no device of that architecture takes: sizes, shared memory, clusters, unknown kernel."""


class RuntimeUnavailable(EmulatorError):
    """The mock CUDA runtime cannot be built or cannot take the place of libcudart in this process."""


class NoPtx(EmulatorError):
    """A library carries no PTX that can be read and none lies beside it."""


class BarrierFault(EmulatorError):
    """An mbarrier that was never initialised, or that got more arrivals than it expects."""
