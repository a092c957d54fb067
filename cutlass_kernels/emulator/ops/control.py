"""Branches, exits, traps and calls of the few functions that compilers leave in kernels."""

from __future__ import annotations

from cutlass_kernels.emulator.errors import DeviceTrap
from cutlass_kernels.emulator.machine.machine import Machine
from cutlass_kernels.emulator.machine.scheduler import Lanes
from cutlass_kernels.emulator.ptx.syntax import Instruction, Symbol
from cutlass_kernels.emulator.registry import instruction
from cutlass_kernels.emulator.steps import Step
from cutlass_kernels.emulator.translate import Translator


@instruction("bra", kind="control", accepts="uni", control=True)
def _bra(t: Translator, item: Instruction) -> Step:
    """Guarded jumps are split by `Program`; here all lanes go."""
    target = t.target
    return lambda machine, lanes: machine.scheduler.push(target, lanes)


@instruction("ret", "exit", kind="control", accepts="uni", control=True)
def _exit(t: Translator, item: Instruction) -> Step:
    return lambda machine, lanes: machine.exit(lanes)


@instruction("trap", "brkpt", kind="control")
def _trap(t: Translator, item: Instruction) -> Step:
    def step(machine: Machine, lanes: Lanes) -> None:
        who = machine.geometry.describe(int(machine.lanes(lanes)[0]))
        raise machine.fault(DeviceTrap, f"{item.opcode[0]} executed by {who}")

    return step


@instruction("call", kind="control", accepts="uni")
def _call(t: Translator, item: Instruction) -> Step:
    """vprintf prints nothing and __assertfail is a trap; other functions cannot be called."""
    names = [operand.name for operand in item.operands if isinstance(operand, Symbol)]
    if "vprintf" in names:
        return lambda machine, lanes: None

    def step(machine: Machine, lanes: Lanes) -> None:
        who = machine.geometry.describe(int(machine.lanes(lanes)[0]))
        if "__assertfail" in names:
            raise machine.fault(DeviceTrap, f"an assertion failed in {who}")
        raise t.unsupported(f"a call of {' '.join(names)}")

    return step
