"""Bitwise logic, comparisons and selections."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cutlass_kernels.emulator.machine.machine import Machine
from cutlass_kernels.emulator.machine.scheduler import Lanes
from cutlass_kernels.emulator.ops.arithmetic import apply, flushed
from cutlass_kernels.emulator.ops.packed import widened
from cutlass_kernels.emulator.ptx.syntax import Immediate, Instruction, Pair
from cutlass_kernels.emulator.ptx.types import Value, bits, is_float
from cutlass_kernels.emulator.registry import instruction
from cutlass_kernels.emulator.steps import Reader, Step
from cutlass_kernels.emulator.translate import Translator

_BITWISE: dict[str, Callable[[Value, Value], Value]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@instruction(*_BITWISE, kind="logic")
def _bitwise(t: Translator, item: Instruction) -> Step:
    kind, function = item.opcode[-1], _BITWISE[item.opcode[0]]
    if kind != "pred":
        return apply(t, item, function, (kind, kind))
    write, a, b = t.write(item.operands[0]), t.predicate(item.operands[1]), t.predicate(item.operands[2])
    return lambda machine, lanes: write(machine, lanes, function(a(machine, lanes), b(machine, lanes)))


@instruction("not", kind="logic")
def _not(t: Translator, item: Instruction) -> Step:
    kind = item.opcode[-1]
    if kind != "pred":
        return apply(t, item, np.invert, (kind,))
    write, a = t.write(item.operands[0]), t.predicate(item.operands[1])
    return lambda machine, lanes: write(machine, lanes, ~a(machine, lanes))


@instruction("cnot", kind="logic")
def _cnot(t: Translator, item: Instruction) -> Step:
    kind = item.opcode[-1]
    return apply(t, item, lambda a: (a == 0).astype(a.dtype), (kind,))


@instruction("lop3", kind="logic")
def _lop3(t: Translator, item: Instruction) -> Step:
    table = item.operands[4]
    if not isinstance(table, Immediate) or item.opcode[-1] != "b32":
        raise t.unsupported("lop3 with a predicate or a table that is no literal")
    terms = [n for n in range(8) if table.value >> n & 1]

    def function(a: Value, b: Value, c: Value) -> Value:
        found = (a & np.uint32(0)) | (b & np.uint32(0)) | (c & np.uint32(0))
        for n in terms:
            found = found | ((a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c))
        return found

    plain = Instruction(item.opcode, item.operands[:4], item.guard, item.line, item.text)
    return apply(t, plain, function, ("u32", "u32", "u32"))


_COMPARE: dict[str, Callable[[Value, Value], Value]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}
_TESTS = (*_COMPARE, *_UNORDERED, "num", "nan")
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(t: Translator, name: str, kind: str) -> Callable[[Value, Value], Value]:
    floating = is_float(kind) or kind == "bf16"

    def unordered(a: Value, b: Value) -> Value:
        return np.isnan(a) | np.isnan(b)

    if name in _UNORDERED and floating:
        ordered = _COMPARE[_UNORDERED[name]]
        return lambda a, b: ordered(a, b) | unordered(a, b)
    if name == "nan" and floating:
        return unordered
    if name == "num" and floating:
        return lambda a, b: ~unordered(a, b)
    if name == "ne" and floating:
        return lambda a, b: (a != b) & ~unordered(a, b)
    if name not in _COMPARE:
        raise t.unsupported(f"the comparison .{name} of .{kind}")
    return _COMPARE[name]


def _operand(t: Translator, item: Instruction, index: int, kind: str) -> Reader:
    if kind != "bf16":
        return t.read(item.operands[index], kind)
    read = t.read(item.operands[index], "u16")
    return lambda machine, lanes: widened(np.atleast_1d(read(machine, lanes)), "bf16")[:, 0]


@instruction("setp", kind="predicate", accepts=f"{' '.join(_TESTS)} and or xor ftz")
def _setp(t: Translator, item: Instruction) -> Step:
    opcode, kind = item.opcode, item.opcode[-1]
    if kind in ("f16x2", "bf16x2"):
        raise t.unsupported(f"setp of .{kind}")
    compare = _comparison(t, opcode[1], kind)
    target = item.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    write, write_not = t.write(first), t.write(second)
    a, b = _operand(t, item, 1, kind), _operand(t, item, 2, kind)
    combine = next((_COMBINE[part] for part in opcode[2:-1] if part in _COMBINE), None)
    third = t.predicate(item.operands[3]) if len(item.operands) > 3 else None
    if (combine is None) != (third is None):
        raise t.unsupported("setp with a predicate but no operator, or the reverse")
    flush = "ftz" in opcode

    def step(machine: Machine, lanes: Lanes) -> None:
        x, y = a(machine, lanes), b(machine, lanes)
        if flush:
            x, y = flushed(x), flushed(y)
        holds = compare(x, y)
        if third is None or combine is None:
            write(machine, lanes, holds)
            write_not(machine, lanes, ~holds)
            return
        other = third(machine, lanes)
        write(machine, lanes, combine(holds, other))
        write_not(machine, lanes, combine(~holds, other))

    return step


@instruction("set", kind="predicate", accepts=f"{' '.join(_TESTS)} ftz")
def _set(t: Translator, item: Instruction) -> Step:
    target, kind = item.opcode[-2], item.opcode[-1]
    compare = _comparison(t, item.opcode[1], kind)
    if target == "f32":
        return apply(t, item, lambda a, b: compare(a, b).astype(np.float32), (kind, kind))
    return apply(t, item, lambda a, b: -compare(a, b).astype(np.int32), (kind, kind))


@instruction("selp", kind="move")
def _selp(t: Translator, item: Instruction) -> Step:
    kind = f"u{bits(item.opcode[-1])}"
    write, a, b = t.write(item.operands[0]), t.read(item.operands[1], kind), t.read(item.operands[2], kind)
    chosen = t.predicate(item.operands[3])

    def step(machine: Machine, lanes: Lanes) -> None:
        if not machine.taint.marks:
            write(machine, lanes, np.where(chosen(machine, lanes), a(machine, lanes), b(machine, lanes)))
            return
        # Only what is chosen is handed on, with its marks.
        where, marks = machine.lanes(lanes), []
        holds = chosen(machine, lanes)
        for read in (a, b):
            machine.taint.begin()
            marks.append((read(machine, lanes), machine.taint.seen(where)))
        (first, one), (second, two) = marks
        nothing = np.zeros(where.size, np.bool_)
        machine.taint.replace(where, np.where(holds, nothing if one is None else one, nothing if two is None else two))
        write(machine, lanes, np.where(holds, first, second))

    return step


@instruction("slct", kind="move", accepts="ftz")
def _slct(t: Translator, item: Instruction) -> Step:
    kind, test = item.opcode[-2], item.opcode[-1]
    return apply(t, item, lambda a, b, c: np.where(c >= 0, a, b), (kind, kind, test))


@instruction("testp", kind="predicate", accepts="finite infinite number notanumber normal subnormal")
def _testp(t: Translator, item: Instruction) -> Step:
    kind = item.opcode[-1]
    tiny = np.finfo(np.float32 if kind == "f32" else np.float64).tiny
    tests: dict[str, Callable[[Value], Value]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (a != 0) & (np.abs(a) < tiny),
    }
    return apply(t, item, tests[item.opcode[1]], (kind,))
