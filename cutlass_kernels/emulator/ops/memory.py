"""ld and st in every state space, and fences between them."""

from __future__ import annotations

import numpy as np

from cutlass_kernels.emulator.machine.machine import Machine
from cutlass_kernels.emulator.machine.scheduler import Lanes
from cutlass_kernels.emulator.machine.spaces import Space
from cutlass_kernels.emulator.machine.visibility import Order
from cutlass_kernels.emulator.ptx.syntax import Address, Instruction, Operand, Register, Symbol
from cutlass_kernels.emulator.ptx.types import UNSIGNED, bits, is_signed
from cutlass_kernels.emulator.registry import instruction
from cutlass_kernels.emulator.steps import Step
from cutlass_kernels.emulator.translate import Translator

_CACHES = (
    "ca cg cs lu cv wb wt nc volatile relaxed acquire release weak cta cluster gpu sys "
    "L1::no_allocate L1::evict_first L1::evict_last L1::evict_normal L1::evict_unchanged "
    "L2::64B L2::128B L2::256B L2::cache_hint L2::evict_first L2::evict_last L2::evict_normal"
)
#: Loads and stores that are strong; all others are weak.
_STRONG: dict[str, Order] = {"acquire": "acquire", "release": "release", "relaxed": "relaxed", "volatile": "relaxed"}
_SPACES = "global shared shared::cta shared::cluster local const param param::entry param::func v2 v4"


def order_of(opcode: tuple[str, ...]) -> Order:
    """How an instruction orders memory, by its qualifiers."""
    return next((_STRONG[part] for part in opcode if part in _STRONG), "weak")


def _is_call_parameter(t: Translator, operand: Operand) -> bool:
    """A parameter of a call, not of the kernel."""
    return (
        isinstance(operand, Address)
        and isinstance(operand.base, Symbol)
        and operand.base.name not in t.layout.parameters
    )


@instruction("ld", "ldu", kind="memory", accepts=f"{_CACHES} {_SPACES}")
def _load(t: Translator, item: Instruction) -> Step:
    space, kind = t.space(item.opcode), item.opcode[-1]
    if space is Space.PARAMETER and _is_call_parameter(t, item.operands[1]):
        return lambda machine, lanes: None
    targets = t.vector(item.operands[0])
    writers = [t.write(target) for target in targets]
    address, width = t.address(item.operands[1]), bits(kind) // 8
    registers = [target.index for target in targets if isinstance(target, Register)]
    order = order_of(item.opcode)
    signed = UNSIGNED[bits(kind)] if not is_signed(kind) else np.dtype(f"i{width}")
    if width * len(targets) > 16:
        raise t.unsupported("a load of more than 16 bytes a thread")

    def step(machine: Machine, lanes: Lanes) -> None:
        where = machine.lanes(lanes)
        found, missing = machine.load(space, address(machine, lanes), where, width, len(writers), order)
        for column, write in enumerate(writers):
            write(machine, lanes, found[:, column].view(signed))
        if missing is not None:
            for index in registers:
                machine.taint.mark(index, where, missing)

    return step


@instruction("st", kind="memory", accepts=f"{_CACHES} {_SPACES}")
def _store(t: Translator, item: Instruction) -> Step:
    space, kind = t.space(item.opcode), item.opcode[-1]
    if space is Space.PARAMETER and _is_call_parameter(t, item.operands[0]):
        return lambda machine, lanes: None
    readers = [t.read(source, f"u{bits(kind)}") for source in t.vector(item.operands[1])]
    address, width, order = t.address(item.operands[0]), bits(kind) // 8, order_of(item.opcode)
    if width * len(readers) > 16:
        raise t.unsupported("a store of more than 16 bytes a thread")

    def step(machine: Machine, lanes: Lanes) -> None:
        where = machine.lanes(lanes)
        columns = [np.broadcast_to(read(machine, lanes), where.shape) for read in readers]
        machine.store(space, address(machine, lanes), where, width, np.stack(columns, axis=1), order)
        if machine.taint.marks and (unknown := machine.taint.seen(where)) is not None:
            machine.forget(space, address(machine, lanes), where, width * len(readers), unknown)

    return step
