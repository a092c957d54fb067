"""atom and red: read-modify-write, lane after lane in the order of the threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cutlass_kernels.emulator.machine.machine import Machine
from cutlass_kernels.emulator.machine.memory import WRITTEN
from cutlass_kernels.emulator.machine.scheduler import Lanes
from cutlass_kernels.emulator.machine.spaces import Space
from cutlass_kernels.emulator.machine.visibility import Order
from cutlass_kernels.emulator.ops.packed import narrowed, widened
from cutlass_kernels.emulator.ptx.syntax import Instruction
from cutlass_kernels.emulator.ptx.types import Array, bits, dtype
from cutlass_kernels.emulator.registry import instruction
from cutlass_kernels.emulator.steps import Step
from cutlass_kernels.emulator.translate import Translator

Update = Callable[..., Any]
_ORDERS = (
    "relaxed acquire release acq_rel cta cluster gpu sys global shared shared::cta shared::cluster noftz L2::cache_hint"
)
_STRONGER: tuple[Order, ...] = ("acquire", "release", "acq_rel")
_UPDATES: dict[str, Update] = {
    "add": lambda old, x: old + x,
    "min": lambda old, x: np.minimum(old, x),
    "max": lambda old, x: np.maximum(old, x),
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "exch": lambda old, x: x,
    "cas": lambda old, compare, x: np.where(old == compare, x, old),
    "inc": lambda old, x: np.where(old >= x, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, x: np.where((old == 0) | (old > x), x, old - old.dtype.type(1)),
}


@instruction("atom", "red", kind="memory", accepts=f"{_ORDERS} {' '.join(_UPDATES)}")
def _atomic(t: Translator, item: Instruction) -> Step:
    opcode, kind = item.opcode, item.opcode[-1]
    operation = next((part for part in opcode if part in _UPDATES), None)
    if operation is None:
        raise t.unsupported("an atomic without an operation")
    update, returns = _UPDATES[operation], opcode[0] == "atom"
    operands = item.operands[1:] if returns else item.operands
    space, address = t.space(opcode), t.address(operands[0])
    order: Order = next((part for part in _STRONGER if part in opcode), "relaxed")
    half = kind in ("f16", "f16x2", "bf16", "bf16x2")
    number = dtype(f"u{bits(kind)}") if half else dtype(kind)
    count = 2 if operation == "cas" else 1
    readers = [t.read(operand, f"u{bits(kind)}" if half else kind, "an atomic") for operand in operands[1 : 1 + count]]
    write = t.write(item.operands[0] if returns else None)
    if half:
        update = _in_halves(update, kind)

    def step(machine: Machine, lanes: Lanes) -> None:
        where = machine.lanes(lanes)
        values = [np.broadcast_to(read(machine, lanes), where.shape) for read in readers]
        found = _run(machine, space, address(machine, lanes), where, number, values, update, order)
        write(machine, lanes, found)

    return step


def _in_halves(update: Update, kind: str) -> Update:
    def on_bits(old: Array, *values: Array) -> Array:
        wide = [widened(np.atleast_1d(value), kind) for value in (old, *values)]
        return narrowed(update(*wide), kind)

    return on_bits


def _run(
    machine: Machine,
    space: Space,
    address: Array,
    lanes: Array,
    number: np.dtype[Any],
    values: list[Array],
    update: Update,
    order: Order,
) -> Array:
    """Lanes that share an address follow one another: round k serves the k-th lane of each address."""
    size = number.itemsize
    space, memory, offsets = machine.locate(space, address, lanes, size)
    missing = memory.without(WRITTEN, offsets, size)
    if missing is not None:
        machine.hazards.add("uninitialised", f"an atomic on {space.value} memory that nobody wrote", int(missing.sum()))
    if machine.order is not None and space is Space.SHARED:
        words = machine.words(offsets, size)
        machine.order.write(words, machine.domain[lanes][:, None], machine.warp[lanes][:, None], atomic=True)
    if space is Space.GLOBAL:
        machine.publish(offsets, lanes, size, order, reads=True, writes=True)
    old = np.empty(lanes.size, number)
    ranks = np.argsort(offsets, kind="stable")
    ranked = offsets[ranks]
    first = np.concatenate([[True], ranked[1:] != ranked[:-1]])
    position = np.arange(lanes.size) - np.flatnonzero(first)[np.cumsum(first) - 1]
    for turn in range(int(position.max()) + 1 if lanes.size else 0):
        now = ranks[position == turn]
        before = memory.read(offsets[now], size, 1)[:, 0].view(number)
        old[now] = before
        after = np.asarray(update(before, *(value[now] for value in values)), number)
        memory.write(offsets[now], size, after.view(f"u{size}")[:, None])
    return old
