"""Integer and floating-point arithmetic (PTX ISA, "Integer Arithmetic Instructions", "Floating-Point Instructions").

Rounding is to nearest even, in float32 also in the other three ways for sums and products. ``.approx`` results are
computed with numpy and are thus closer to the truth than a device need be. ``.ftz`` flushes subnormal inputs and
results.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cutlass_kernels.emulator.machine.machine import Machine
from cutlass_kernels.emulator.machine.scheduler import Lanes
from cutlass_kernels.emulator.ops.packed import halves
from cutlass_kernels.emulator.ops.rounding import exact_fma, rounded
from cutlass_kernels.emulator.ptx.syntax import Instruction
from cutlass_kernels.emulator.ptx.types import UNSIGNED, Value, bits, dtype, is_float, is_signed
from cutlass_kernels.emulator.registry import instruction
from cutlass_kernels.emulator.steps import Step
from cutlass_kernels.emulator.translate import Translator

Function = Callable[..., Value]
_TINY = np.float32(2.0**-126)


def flushed(value: Value) -> Value:
    """Subnormal float32 as zero of the same sign."""
    return np.where(np.abs(value) < _TINY, np.copysign(np.float32(0), value), value)


def apply(t: Translator, item: Instruction, function: Function, kinds: tuple[str, ...], *, flush: bool = False) -> Step:
    """A step that computes the first operand from the others, read as the types in ``kinds``."""
    write = t.write(item.operands[0])
    readers = [t.read(operand, kind) for operand, kind in zip(item.operands[1:], kinds, strict=True)]
    if flush:
        plain = function

        def function(*values: Value) -> Value:
            return flushed(plain(*(flushed(value) for value in values)))

    if len(readers) == 1:
        (one,) = readers
        return lambda machine, lanes: write(machine, lanes, function(one(machine, lanes)))
    if len(readers) == 2:
        first, second = readers

        def binary(machine: Machine, lanes: Lanes) -> None:
            write(machine, lanes, function(first(machine, lanes), second(machine, lanes)))

        return binary

    def general(machine: Machine, lanes: Lanes) -> None:
        write(machine, lanes, function(*(read(machine, lanes) for read in readers)))

    return general


def _saturated(function: Function, kind: str) -> Function:
    """.sat: floats to [0, 1], NaN to 0; signed integers to their range."""
    if is_float(kind):

        def clamp(*values: Value) -> Value:
            found = function(*values)
            return np.clip(np.where(np.isnan(found), found.dtype.type(0), found), 0, 1).astype(found.dtype)

        return clamp
    limits = np.iinfo(dtype(kind))

    def bounded(*values: Value) -> Value:
        return np.clip(function(*(value.astype(np.int64) for value in values)), limits.min, limits.max).astype(
            limits.dtype
        )

    return bounded


def _rounding(t: Translator, item: Instruction, kind: str) -> str:
    """The rounding mode; only float32 knows others than to nearest even."""
    mode = next((part for part in item.opcode if part in ("rz", "rm", "rp")), "rn")
    if mode != "rn" and kind != "f32":
        raise t.unsupported(f"rounding .{mode} of .{kind}")
    return mode


_SIMPLE: dict[str, Function] = {"add": np.add, "sub": np.subtract}


@instruction("add", "sub", kind="arithmetic", accepts="rn rz rm rp ftz sat")
def _add(t: Translator, item: Instruction) -> Step:
    kind = item.opcode[-1]
    if kind in ("f16", "f16x2", "bf16", "bf16x2"):
        return halves(t, item, _SIMPLE[item.opcode[0]])
    function = _SIMPLE[item.opcode[0]]
    if (mode := _rounding(t, item, kind)) != "rn":
        sign = np.float32(1 if item.opcode[0] == "add" else -1)

        def function(a: Value, b: Value) -> Value:
            return rounded(exact_fma(b, sign, a), mode)

    if "sat" in item.opcode:
        function = _saturated(function, kind)
    return apply(t, item, function, (kind, kind), flush="ftz" in item.opcode)


@instruction("mul", "mad", kind="arithmetic", accepts="rn rz rm rp ftz sat lo hi wide")
def _multiply(t: Translator, item: Instruction) -> Step:
    kind, opcode = item.opcode[-1], item.opcode
    if kind in ("f16", "f16x2", "bf16", "bf16x2"):
        return halves(t, item, np.multiply)
    if is_float(kind):
        if opcode[0] == "mad":
            return _fma(t, item)
        function: Function = np.multiply
        if (mode := _rounding(t, item, kind)) != "rn":

            def function(a: Value, b: Value) -> Value:
                return rounded(np.asarray(a.astype(np.float64) * b), mode)

        if "sat" in opcode:
            function = _saturated(function, kind)
        return apply(t, item, function, (kind, kind), flush="ftz" in opcode)
    if "sat" in opcode:
        raise t.unsupported("a saturating integer product")
    form = next((f for f in ("wide", "hi", "lo") if f in opcode), "lo")
    products: dict[str, Function] = {"wide": _wide, "hi": _high(bits(kind)), "lo": np.multiply}
    product = products[form]
    result = f"{kind[0]}{2 * bits(kind)}" if form == "wide" else kind
    if opcode[0] == "mul":
        return apply(t, item, product, (kind, kind))
    return apply(t, item, lambda a, b, c: product(a, b) + c, (kind, kind, result))


def _wide(a: Value, b: Value) -> Value:
    wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(wide) * b.astype(wide)


def _high(width: int) -> Function:
    if width < 64:

        def short(a: Value, b: Value) -> Value:
            product = _wide(a, b)
            return (product >> product.dtype.type(width)).astype(a.dtype)

        return short

    def long(a: Value, b: Value) -> Value:
        """The upper 64 bits, from products of 32-bit halves; for signed numbers corrected for their signs."""
        x, y = np.broadcast_arrays(a, b)
        u, v = (
            x.view(np.uint64) if x.ndim else x.astype(np.uint64),
            y.view(np.uint64) if y.ndim else y.astype(np.uint64),
        )
        low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
        u0, u1, v0, v1 = u & low, u >> half, v & low, v >> half
        middle = u1 * v0 + ((u0 * v0) >> half)
        high = u1 * v1 + (middle >> half) + (((middle & low) + u0 * v1) >> half)
        if a.dtype.kind == "i":
            high = high - np.where(x < 0, v, np.uint64(0)) - np.where(y < 0, u, np.uint64(0))
        return high.view(a.dtype)

    return long


@instruction("mul24", "mad24", kind="arithmetic", accepts="lo")
def _multiply24(t: Translator, item: Instruction) -> Step:
    kind = item.opcode[-1]

    def low24(value: Value) -> Value:
        shift = value.dtype.type(8)
        return (value << shift) >> shift

    def product(a: Value, b: Value) -> Value:
        return low24(a) * low24(b)

    if item.opcode[0] == "mul24":
        return apply(t, item, product, (kind, kind))
    return apply(t, item, lambda a, b, c: product(a, b) + c, (kind, kind, kind))


@instruction("fma", kind="arithmetic", accepts="rn rz rm rp ftz sat relu")
def _fma(t: Translator, item: Instruction) -> Step:
    kind = item.opcode[-1]
    if kind in ("f16", "f16x2", "bf16", "bf16x2"):
        return halves(t, item, lambda a, b, c: a * b + c)
    mode = _rounding(t, item, kind)
    function: Function = _fma32(mode) if kind == "f32" else _fma64
    if "sat" in item.opcode:
        function = _saturated(function, kind)
    return apply(t, item, function, (kind, kind, kind), flush="ftz" in item.opcode)


def _fma32(mode: str) -> Function:
    def function(a: Value, b: Value, c: Value) -> Value:
        return rounded(exact_fma(a, b, c), mode)

    return function


def _fma64(a: Value, b: Value, c: Value) -> Value:
    """In long double: 11 bits more than float64, so that a result may differ from a fused one in the last bit."""
    return (a.astype(np.longdouble) * b + c).astype(np.float64)


@instruction("div", kind="arithmetic", accepts="rn full approx ftz")
def _divide(t: Translator, item: Instruction) -> Step:
    kind = item.opcode[-1]
    if is_float(kind):
        return apply(t, item, np.divide, (kind, kind), flush="ftz" in item.opcode)
    return apply(t, item, _quotient, (kind, kind))


@instruction("rem", kind="arithmetic")
def _remainder(t: Translator, item: Instruction) -> Step:
    kind = item.opcode[-1]
    return apply(t, item, lambda a, b: a - _quotient(a, b) * b, (kind, kind))


def _quotient(a: Value, b: Value) -> Value:
    """Toward zero. Division by zero gives all ones, as devices do; PTX leaves it open."""
    ones = UNSIGNED[8 * a.dtype.itemsize].type(-1 & ((1 << 8 * a.dtype.itemsize) - 1)).view(a.dtype)
    safe = np.where(b == 0, a.dtype.type(1), b)
    floor = a // safe
    if a.dtype.kind == "i":
        floor = floor + ((floor < 0) & (floor * safe != a)).astype(a.dtype)
    return np.where(b == 0, ones, floor)


@instruction("min", "max", kind="arithmetic", accepts="ftz NaN relu")
def _extreme(t: Translator, item: Instruction) -> Step:
    kind, opcode = item.opcode[-1], item.opcode
    if is_float(kind) or kind in ("bf16", "bf16x2", "f16x2"):
        table: dict[tuple[str, bool], Function] = {
            ("min", False): np.fmin,
            ("max", False): np.fmax,
            ("min", True): np.minimum,
            ("max", True): np.maximum,
        }
        function = table[opcode[0], "NaN" in opcode]
        if kind not in ("f32", "f64"):
            return halves(t, item, function)
        if len(item.operands) == 4:
            pair = function
            return apply(t, item, lambda a, b, c: pair(pair(a, b), c), (kind, kind, kind), flush="ftz" in opcode)
        return apply(t, item, function, (kind, kind), flush="ftz" in opcode)
    function = np.minimum if opcode[0] == "min" else np.maximum
    if "relu" in opcode:
        plain = function

        def function(a: Value, b: Value) -> Value:
            return np.maximum(plain(a, b), a.dtype.type(0))

    return apply(t, item, function, (kind, kind))


@instruction("neg", "abs", kind="arithmetic", accepts="ftz")
def _sign(t: Translator, item: Instruction) -> Step:
    kind = item.opcode[-1]
    function: Function = np.negative if item.opcode[0] == "neg" else np.abs
    if kind in ("f16", "f16x2", "bf16", "bf16x2"):
        return _half_sign(t, item)
    if is_float(kind) or is_signed(kind):
        return apply(t, item, function, (kind,), flush="ftz" in item.opcode)
    raise t.unsupported(f"{item.opcode[0]} of .{kind}")


def _half_sign(t: Translator, item: Instruction) -> Step:
    """The sign bits of one half or of two."""
    kind = f"u{bits(item.opcode[-1])}"
    sign = 0x80008000 if bits(kind) == 32 else 0x8000
    mask = dtype(kind).type(sign)
    if item.opcode[0] == "neg":
        return apply(t, item, lambda a: a ^ mask, (kind,))
    return apply(t, item, lambda a: a & ~mask, (kind,))


_UNARY: dict[str, Function] = {
    "sqrt": np.sqrt,
    "rsqrt": lambda a: a.dtype.type(1) / np.sqrt(a),
    "rcp": lambda a: a.dtype.type(1) / a,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@instruction(*_UNARY, kind="arithmetic", accepts="rn approx ftz")
def _function(t: Translator, item: Instruction) -> Step:
    kind, function = item.opcode[-1], _UNARY[item.opcode[0]]
    if kind in ("f16", "f16x2", "bf16", "bf16x2"):
        return halves(t, item, function)
    return apply(t, item, function, (kind,), flush="ftz" in item.opcode)


@instruction("copysign", kind="arithmetic")
def _copysign(t: Translator, item: Instruction) -> Step:
    kind = item.opcode[-1]
    return apply(t, item, lambda sign, value: np.copysign(value, sign), (kind, kind))


@instruction("sad", kind="arithmetic")
def _sad(t: Translator, item: Instruction) -> Step:
    kind = item.opcode[-1]
    return apply(t, item, lambda a, b, c: c + np.where(a < b, b - a, a - b), (kind, kind, kind))


@instruction("dp4a", kind="arithmetic")
def _dp4a(t: Translator, item: Instruction) -> Step:
    first, second = item.opcode[1], item.opcode[2]
    signed = "s32" in (first, second)

    def octets(value: Value, kind: str) -> list[Value]:
        shifts = (np.uint32(8 * n) for n in range(4))
        parts = [((value >> shift) & np.uint32(255)).astype(np.uint8) for shift in shifts]
        return [(part.view(np.int8) if kind == "s32" else part).astype(np.int64) for part in parts]

    def function(a: Value, b: Value, c: Value) -> Value:
        total = sum(x * y for x, y in zip(octets(a, first), octets(b, second), strict=True)) + c.astype(np.int64)
        return total.astype(np.int32 if signed else np.uint32)

    return apply(t, item, function, ("u32", "u32", "s32" if signed else "u32"))
