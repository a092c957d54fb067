"""Operands of an instruction: names looked up in the scopes around it."""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Protocol

from cutlass_kernels.emulator.ptx.syntax import (
    Address,
    Immediate,
    Kernel,
    Label,
    Operand,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)

_INTEGER = re.compile(r"^(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")
_FLOAT = re.compile(r"^0([fFdD])([0-9a-fA-F]{8}|[0-9a-fA-F]{16})$")
_SUM = re.compile(r"^(.*?)\s*\+\s*(-?(?:0[xX][0-9a-fA-F]+|\d+))$", re.DOTALL)


class ScopeLike(Protocol):
    """The part of a scope that looking up a name needs."""

    registers: dict[str, int]
    labels: dict[str, int]

    @property
    def parent(self) -> ScopeLike | None: ...


def split_top_level(text: str) -> list[str]:
    """Cut at commas outside of brackets, braces and parentheses."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


class LineIndex:
    """Line numbers of text positions."""

    def __init__(self, code: str) -> None:
        self.starts = [0, *(found.end() for found in re.finditer("\n", code))]

    def at(self, position: int) -> int:
        """The 1-based line of a position."""
        return bisect_right(self.starts, position)


class OperandParser:
    """Parses operands of one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def parse(self, text: str, scope: ScopeLike, *, branch: bool = False) -> Operand:
        """One operand. Raises KeyError or ValueError on text that is none."""
        if branch:
            return Label(look_up(text, scope, "labels"))
        if text.startswith("["):
            return self._address(text[1:-1].strip(), scope)
        if text.startswith("{"):
            return Vector(tuple(self.parse(item, scope) for item in split_top_level(text[1:-1])))
        if text.startswith("("):
            return Vector(tuple(self.parse(item, scope) for item in split_top_level(text[1:-1])))
        if "|" in text:
            first, second = (part.strip() for part in text.split("|"))
            return Pair(self._destination(first, scope), self._destination(second, scope))
        if text.startswith("!"):
            plain = self._name(text[1:].strip(), scope)
            if not isinstance(plain, Register):
                raise ValueError(text)
            return Register(plain.index, plain.type, negated=True)
        return self._name(text, scope)

    def _destination(self, text: str, scope: ScopeLike) -> Operand | None:
        return None if text == "_" else self._name(text, scope)

    def _address(self, text: str, scope: ScopeLike) -> Address:
        base, *rest = split_top_level(text)
        coordinates: tuple[Operand, ...] = ()
        if rest:
            vector = self.parse(rest[0], scope)
            coordinates = vector.items if isinstance(vector, Vector) else (vector,)
        offset = 0
        if found := _SUM.match(base):
            base, offset = found[1], int(found[2], 0)
        parsed = self._name(base, scope)
        if not isinstance(parsed, Register | Symbol | Immediate):
            raise ValueError(text)
        return Address(parsed, offset, coordinates)

    def _name(self, text: str, scope: ScopeLike) -> Operand:
        if text == "_":
            return Sink()
        if found := _INTEGER.match(text):
            magnitude = int(found[2], 8) if re.match(r"^0\d", found[2]) else int(found[2], 0)
            return Immediate("int", -magnitude if found[1] else magnitude)
        if found := _FLOAT.match(text):
            return Immediate("f32" if found[1] in "fF" else "f64", int(found[2], 16))
        try:
            index = look_up(text, scope, "registers")
            return Register(index, self.kernel.registers[index][1])
        except KeyError:
            pass
        if text.startswith("%"):
            return Special(text)
        if found := _SUM.match(text):
            return Symbol(self._symbol(found[1]), int(found[2], 0))
        return Symbol(self._symbol(text))

    def _symbol(self, name: str) -> str:
        if re.match(r"^[A-Za-z_$][\w$]*$", name):
            return name
        raise ValueError(name)


def look_up(name: str, scope: ScopeLike, table: str) -> int:
    """The number of a name in the "registers" or "labels" of the nearest scope that has it. Raises KeyError."""
    found: ScopeLike | None = scope
    while found is not None:
        names: dict[str, int] = getattr(found, table)
        if name in names:
            return names[name]
        found = found.parent
    raise KeyError(name)
