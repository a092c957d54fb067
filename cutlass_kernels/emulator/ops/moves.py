"""mov in all its forms, conversions of addresses, and instructions without an effect that can be seen."""

from __future__ import annotations

import numpy as np

from cutlass_kernels.emulator.machine.machine import Machine
from cutlass_kernels.emulator.machine.scheduler import Lanes
from cutlass_kernels.emulator.machine.spaces import Space, with_rank
from cutlass_kernels.emulator.ptx.syntax import Instruction, Vector
from cutlass_kernels.emulator.ptx.types import UNSIGNED, bits
from cutlass_kernels.emulator.registry import instruction
from cutlass_kernels.emulator.steps import Step
from cutlass_kernels.emulator.translate import SPACES, Translator


@instruction("mov", kind="move")
def _mov(t: Translator, item: Instruction) -> Step:
    kind = item.opcode[-1]
    target, source = item.operands
    if isinstance(target, Vector):
        return _unpack(t, target, item)
    if isinstance(source, Vector):
        return _pack(t, source, item)
    write = t.write(target)
    read = t.predicate(source) if kind == "pred" else t.read(source, f"u{bits(kind)}" if kind[0] == "b" else kind)
    return lambda machine, lanes: write(machine, lanes, read(machine, lanes))


def _unpack(t: Translator, target: Vector, item: Instruction) -> Step:
    whole = bits(item.opcode[-1])
    part = whole // len(target.items)
    read, writers = t.read(item.operands[1], f"u{whole}"), [t.write(each) for each in target.items]
    narrow, wide = UNSIGNED[part], UNSIGNED[whole].type

    def step(machine: Machine, lanes: Lanes) -> None:
        value = read(machine, lanes)
        parts = [(value >> wide(part * n)).astype(narrow) for n in range(len(writers))]
        for write, each in zip(writers, parts, strict=True):
            write(machine, lanes, each)

    return step


def _pack(t: Translator, source: Vector, item: Instruction) -> Step:
    whole = bits(item.opcode[-1])
    part = whole // len(source.items)
    write, readers = t.write(item.operands[0]), [t.read(each, f"u{part}") for each in source.items]
    wide = UNSIGNED[whole]

    def step(machine: Machine, lanes: Lanes) -> None:
        found = readers[0](machine, lanes).astype(wide)
        for n, read in enumerate(readers[1:], 1):
            found = found | (read(machine, lanes).astype(wide) << wide.type(part * n))
        write(machine, lanes, found)

    return step


@instruction("cvta", kind="move", accepts="to shared global local const param")
def _cvta(t: Translator, item: Instruction) -> Step:
    opcode = item.opcode
    space = SPACES[next(part for part in opcode[1:] if part.split("::")[0] in SPACES).split("::")[0]]
    window = t.generic_window(Space.GLOBAL if space is Space.GLOBAL else space)
    write, read = t.write(item.operands[0]), t.read(item.operands[1], "u64")
    if "to" in opcode:
        return lambda machine, lanes: write(machine, lanes, read(machine, lanes) - window)
    return lambda machine, lanes: write(machine, lanes, read(machine, lanes) + window)


@instruction("mapa", kind="move", accepts="shared::cluster")
def _mapa(t: Translator, item: Instruction) -> Step:
    """The address of a variable of this CTA in another CTA of the cluster."""
    kind = item.opcode[-1]
    write, read = t.write(item.operands[0]), t.read(item.operands[1], kind)
    rank = t.read(item.operands[2], "u32")

    def step(machine: Machine, lanes: Lanes) -> None:
        address, to = np.broadcast_arrays(np.atleast_1d(read(machine, lanes)), np.atleast_1d(rank(machine, lanes)))
        found = with_rank(address, to)
        write(machine, lanes, found if found.size > 1 else found[0])

    return step


@instruction("getctarank", kind="move", accepts="shared::cluster")
def _getctarank(t: Translator, item: Instruction) -> Step:
    write, read = t.write(item.operands[0]), t.read(item.operands[1], item.opcode[-1])

    def step(machine: Machine, lanes: Lanes) -> None:
        address = np.atleast_1d(read(machine, lanes))
        rank = (address >> address.dtype.type(24)).astype(np.uint32) & np.uint32(255)
        own = machine.special("%cluster_ctarank")
        mine = own if lanes is None else own[lanes]
        write(machine, lanes, np.where(rank > 0, rank - np.uint32(1), mine))

    return step


@instruction("isspacep", kind="predicate", accepts="shared global local const param shared::cta")
def _isspacep(t: Translator, item: Instruction) -> Step:
    space = t.space(item.opcode)
    write, read = t.write(item.operands[0]), t.read(item.operands[1], "u64")
    below = t.generic_window(space)
    above = np.uint64(t.generic_window(Space.SHARED) if space is Space.GLOBAL else int(below) * 2)

    def step(machine: Machine, lanes: Lanes) -> None:
        address = read(machine, lanes)
        write(machine, lanes, (address >= below) & (address < above))

    return step


@instruction(
    "prefetch", kind="memory", accepts="global local L1 L2 L2::evict_last L2::evict_normal tensormap const param"
)
def _prefetch(t: Translator, item: Instruction) -> Step:
    """A hint."""
    return lambda machine, lanes: None


@instruction("nanosleep", "pmevent", kind="control", accepts="mask")
def _nothing(t: Translator, item: Instruction) -> Step:
    """Time, which does not exist here."""
    return lambda machine, lanes: None


@instruction("griddepcontrol", kind="barrier", accepts="wait launch_dependents", waits=True)
def _dependent(t: Translator, item: Instruction) -> Step:
    """Launches run one after another: the grids that a wait waits for are complete."""
    return lambda machine, lanes: None


@instruction(
    "createpolicy",
    kind="move",
    accepts="fractional range L2::evict_last L2::evict_normal L2::evict_first L2::evict_unchanged global",
)
def _policy(t: Translator, item: Instruction) -> Step:
    """A cache policy, which nothing reads."""
    write = t.write(item.operands[0])
    return lambda machine, lanes: write(machine, lanes, np.uint64(0))
