"""Operands of instructions as closures over the machine: read, write, address.

A closure takes the machine and the lanes that execute (None: all of them) and returns a numpy array with one element
for each of those lanes, or a numpy scalar that they share. What a full-width read returns is a view of the register;
a write takes over what it is given, and copies views.
"""

from __future__ import annotations

import numpy as np

from cutlass_kernels.emulator.errors import UnsupportedInstruction
from cutlass_kernels.emulator.layout import Layout
from cutlass_kernels.emulator.machine.machine import Machine
from cutlass_kernels.emulator.machine.scheduler import Lanes
from cutlass_kernels.emulator.machine.spaces import LOCAL, PARAMETER, SHARED, Space
from cutlass_kernels.emulator.ptx.syntax import (
    Address,
    Immediate,
    Instruction,
    Operand,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)
from cutlass_kernels.emulator.ptx.types import UNSIGNED, Array, Value, bits, dtype
from cutlass_kernels.emulator.steps import Reader, Step, Writer

_WINDOW = {Space.SHARED: SHARED, Space.LOCAL: LOCAL, Space.PARAMETER: PARAMETER, Space.GLOBAL: 0}
SPACES = {
    "shared": Space.SHARED,
    "global": Space.GLOBAL,
    "local": Space.LOCAL,
    "param": Space.PARAMETER,
    "const": Space.GLOBAL,
}


class Translator:
    """Makes the closures of one kernel. ``watched``: registers that asynchronous products use.

    ``following`` and ``target`` are the blocks that the instruction being translated may hand its lanes to.
    """

    def __init__(self, layout: Layout, watched: frozenset[int]) -> None:
        self.layout, self.watched = layout, watched
        self.at: Instruction | None = None
        self.block, self.following, self.target = 0, 0, 0
        #: By block: what happens to lanes that park in front of it and are woken without success.
        self.time_outs: dict[int, Step] = {}

    def unsupported(self, what: str) -> UnsupportedInstruction:
        """The error for something that the present instruction asks for."""
        return UnsupportedInstruction(what, self.at.line if self.at else None, self.at.text if self.at else "")

    # Reading

    def read(self, operand: Operand, kind: str, use: str | None = None) -> Reader:
        """An operand as numbers of a PTX type. ``use``: what depends on it at once (see `machine.taint`)."""
        if isinstance(operand, Register):
            return self._read_register(operand, kind, use)
        if isinstance(operand, Immediate):
            value = self._immediate(operand, kind)
            return lambda machine, lanes: value
        if isinstance(operand, Special):
            return self._read_special(operand.name, kind)
        if isinstance(operand, Symbol):
            return self._read_symbol(operand, kind)
        raise self.unsupported(f"an operand of the form {type(operand).__name__}")

    def predicate(self, operand: Operand, use: str | None = None) -> Reader:
        """A predicate operand, perhaps negated; a literal is 0 or not 0. ``use`` as in `read`."""
        if isinstance(operand, Immediate):
            value = np.bool_(operand.value != 0)
            return lambda machine, lanes: value
        if not isinstance(operand, Register):
            raise self.unsupported("a predicate that is no register")
        read = self._read_register(operand, "pred", use)
        if operand.negated:
            return lambda machine, lanes: ~read(machine, lanes)
        return read

    def vector(self, operand: Operand) -> tuple[Operand, ...]:
        """The items of ``{...}``, or the operand alone."""
        return operand.items if isinstance(operand, Vector) else (operand,)

    def _read_register(self, register: Register, kind: str, use: str | None = None) -> Reader:
        index, have, want = register.index, bits(register.type), bits(kind)
        number = dtype(kind)
        watched = register.index in self.watched

        def plain(machine: Machine, lanes: Lanes) -> Value:
            if machine.taint.marks:
                machine.taint.read(index, machine.lanes(lanes), use)
            values = machine.registers[index]
            return values.view(number) if lanes is None else values[lanes].view(number)

        def resized(machine: Machine, lanes: Lanes) -> Value:
            if machine.taint.marks:
                machine.taint.read(index, machine.lanes(lanes), use)
            values = machine.registers[index]
            return (values if lanes is None else values[lanes]).astype(UNSIGNED[want]).view(number)

        reader = plain if have == want else resized
        return self._watching(reader, index) if watched else reader

    def _watching(self, reader: Reader, index: int) -> Reader:
        def checked(machine: Machine, lanes: Lanes) -> Value:
            if machine.warpgroups.busy:
                machine.warpgroups.touch(index, machine.lanes(lanes))
            return reader(machine, lanes)

        return checked

    def _immediate(self, operand: Immediate, kind: str) -> Value:
        number = dtype(kind)
        if operand.kind == "int":
            if number.kind == "f":
                return number.type(operand.value)
            return UNSIGNED[bits(kind)].type(operand.value & ((1 << bits(kind)) - 1)).view(number)
        width = 32 if operand.kind == "f32" else 64
        pattern = UNSIGNED[width].type(operand.value)
        if bits(kind) == width:
            return pattern.view(number)
        if kind == "f64" and width == 32:
            return np.float64(pattern.view(np.float32))
        raise self.unsupported(f"a literal of {width} bits for .{kind}")

    def _read_special(self, name: str, kind: str) -> Reader:
        number, width = dtype(kind), UNSIGNED[bits(kind)]

        def read(machine: Machine, lanes: Lanes) -> Value:
            values = machine.special(name)
            return (values if lanes is None else values[lanes]).astype(width).view(number)

        return read

    def _read_symbol(self, symbol: Symbol, kind: str) -> Reader:
        space, offset = self.place(symbol)
        number = dtype(kind)
        if space is Space.GLOBAL:
            name = symbol.name
            return lambda machine, lanes: number.type(machine.symbols[name] + offset)
        value = number.type(offset)
        return lambda machine, lanes: value

    def place(self, symbol: Symbol) -> tuple[Space, int]:
        """The state space of a name and its byte offset there (for global names, the offset from their address)."""
        layout = self.layout
        tables = ((Space.SHARED, layout.shared), (Space.LOCAL, layout.local), (Space.PARAMETER, layout.parameters))
        for space, offsets in tables:
            if symbol.name in offsets:
                return space, offsets[symbol.name] + symbol.offset
        if symbol.name in layout.globals:
            return Space.GLOBAL, symbol.offset
        raise self.unsupported(f"the name {symbol.name}")

    # Writing

    def write(self, operand: Operand | None) -> Writer:
        """A destination. Values narrower than the register are extended: signed ones by their sign."""
        if operand is None or isinstance(operand, Sink):
            return lambda machine, lanes, value: None
        if not isinstance(operand, Register):
            raise self.unsupported(f"a destination of the form {type(operand).__name__}")
        index = operand.index
        stored = np.dtype(np.bool_) if operand.type == "pred" else UNSIGNED[bits(operand.type)]

        def write(machine: Machine, lanes: Lanes, value: Value) -> None:
            if value.dtype.itemsize != stored.itemsize:
                value = value.astype(np.dtype(f"{value.dtype.kind}{stored.itemsize}"))
            value = value.view(stored) if value.dtype != stored else value
            if machine.taint.marks:
                machine.taint.write(index, machine.lanes(lanes))
            registers = machine.registers
            if lanes is None:
                if value.ndim == 0:
                    value = np.full(machine.n, value)
                elif value.base is not None:
                    value = value.copy()
                registers[index] = value
                return
            values = registers[index]
            if not values.flags.writeable:
                registers[index] = values = values.copy()
            values[lanes] = value

        return self._marking(write, index) if index in self.watched else write

    def _marking(self, writer: Writer, index: int) -> Writer:
        def checked(machine: Machine, lanes: Lanes, value: Value) -> None:
            machine.warpgroups.written(index, machine.lanes(lanes))
            writer(machine, lanes, value)

        return checked

    # Addresses

    def space(self, opcode: tuple[str, ...]) -> Space:
        """The state space that an opcode names; generic without one."""
        for part in opcode:
            if (found := SPACES.get(part.split("::")[0])) is not None:
                return found
        return Space.GENERIC

    def address(self, operand: Operand) -> Reader:
        """``[base + offset]`` as uint64, one for each lane (never a scalar)."""
        if not isinstance(operand, Address):
            raise self.unsupported("an operand that is no address")
        base, offset = self._base(operand), np.uint64(operand.offset & 0xFFFFFFFFFFFFFFFF)

        def address(machine: Machine, lanes: Lanes) -> Array:
            found = base(machine, lanes)
            if found.ndim == 0:
                found = np.full(machine.n if lanes is None else lanes.size, found)
            return np.asarray(found + offset) if offset else found

        return address

    def _base(self, operand: Address) -> Reader:
        base = operand.base
        if isinstance(base, Symbol):
            return self._read_symbol(base, "u64")
        return self.read(base, "u64", "an address")

    def generic_window(self, space: Space) -> np.uint64:
        """Where a state space begins among generic addresses."""
        return np.uint64(_WINDOW[space])
