"""Branches, exits, traps, changes of registers, and calls of the few functions that compilers leave in kernels."""

from __future__ import annotations

from cutlass_kernels.emulator.errors import DeviceTrap
from cutlass_kernels.emulator.machine.machine import Machine
from cutlass_kernels.emulator.machine.scheduler import Lanes
from cutlass_kernels.emulator.ptx.syntax import Immediate, Instruction, Symbol
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


@instruction("setmaxnreg.inc", "setmaxnreg.dec", kind="control", accepts="sync aligned", control=True)
def _registers(t: Translator, item: Instruction) -> Step:
    (operand,) = item.operands
    wanted, following, more = operand.value if isinstance(operand, Immediate) else 0, t.following, "inc" in item.opcode
    if not (24 <= wanted <= 256 and wanted % 8 == 0):
        raise t.unsupported(f"setmaxnreg to {wanted} registers, expected a multiple of 8 from 24 to 256,")
    return lambda machine, lanes: machine.budgets.change(wanted, machine.lanes(lanes), following, more)


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
