"""cvt: between integers, floats, half-precision pairs, fp8 pairs and tf32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cutlass_kernels.emulator.formats import FP8, from_bf16, to_bf16, to_fp8, to_tf32
from cutlass_kernels.emulator.machine.machine import Machine
from cutlass_kernels.emulator.machine.scheduler import Lanes
from cutlass_kernels.emulator.ops.arithmetic import flushed
from cutlass_kernels.emulator.ops.packed import narrowed, widened
from cutlass_kernels.emulator.ops.rounding import directed
from cutlass_kernels.emulator.ptx.syntax import Instruction
from cutlass_kernels.emulator.ptx.types import UNSIGNED, Array, Value, bits, dtype, is_float
from cutlass_kernels.emulator.registry import instruction
from cutlass_kernels.emulator.steps import Step
from cutlass_kernels.emulator.translate import Translator

_TO_INTEGER: dict[str, Callable[[Value], Value]] = {
    "rni": np.rint,
    "rmi": np.floor,
    "rpi": np.ceil,
    "rzi": np.trunc,
}


@instruction("cvt", kind="convert", accepts="rn rna rz rm rp rni rzi rmi rpi ftz sat satfinite relu pack")
def _cvt(t: Translator, item: Instruction) -> Step:
    if "pack" in item.opcode:
        return _pack_integers(t, item)
    target, source = item.opcode[-2], item.opcode[-1]
    if target in ("e4m3x2", "e5m2x2"):
        return _to_fp8(t, item, target[:4], source)
    if source in ("e4m3x2", "e5m2x2"):
        return _from_fp8(t, item, target, source[:4])
    if target in ("bf16x2", "f16x2") and source == "f32":
        return _pack_halves(t, item, target)
    return _scalar(t, item, target, source)


def _rounding(item: Instruction) -> str | None:
    modes = ("rn", "rna", "rz", "rm", "rp", *_TO_INTEGER)
    return next((part for part in item.opcode[1:-2] if part in modes), None)


def _scalar(t: Translator, item: Instruction, target: str, source: str) -> Step:
    write, read = t.write(item.operands[0]), t.read(item.operands[1], _carrier(source))
    function = _conversion(t, item, target, source)

    def step(machine: Machine, lanes: Lanes) -> None:
        value = read(machine, lanes)
        with_shape = np.atleast_1d(value)
        found = function(with_shape)
        # A copy: a conversion that changes nothing may hand back the register itself.
        write(machine, lanes, np.array(found if value.ndim else found[0]))

    return step


def _carrier(kind: str) -> str:
    return "u16" if kind == "bf16" else kind


def _conversion(t: Translator, item: Instruction, target: str, source: str) -> Callable[[Array], Array]:
    opcode, mode = item.opcode, _rounding(item)
    saturate = "sat" in opcode or "satfinite" in opcode
    if target == "tf32":
        if mode not in ("rna", None) or "satfinite" in opcode:
            raise t.unsupported("this rounding to tf32")
        return lambda a: to_tf32(a)
    floats = {"f16", "f32", "f64", "bf16"}
    if target not in floats:
        return _to_integer(t, target, source, mode, saturate)
    widen: Callable[[Array], Array] = from_bf16 if source == "bf16" else lambda a: a
    if target in ("f16", "bf16"):
        return _to_half(t, item, target, source, widen)
    number = dtype(target)

    def convert(a: Array) -> Array:
        value = widen(a)
        if mode in _TO_INTEGER:
            value = _TO_INTEGER[mode](value)
        if "ftz" in opcode and value.dtype == np.float32:
            value = flushed(value)
        found = directed(value, number, mode) if mode in ("rz", "rm", "rp") else value.astype(number)
        if "sat" in opcode:
            found = np.clip(np.where(np.isnan(found), number.type(0), found), 0, 1)
        return found

    return convert


def _to_half(
    t: Translator, item: Instruction, target: str, source: str, widen: Callable[[Array], Array]
) -> Callable[[Array], Array]:
    mode, relu = _rounding(item), "relu" in item.opcode
    if mode in ("rm", "rp", "rna") or (mode == "rz" and target == "f16") or "satfinite" in item.opcode:
        raise t.unsupported(f"this rounding to {target}")

    def convert(a: Array) -> Array:
        value = widen(a).astype(np.float64)
        if mode in _TO_INTEGER:
            value = _TO_INTEGER[mode](value)
        if relu:
            value = np.where(np.isnan(value), value, np.maximum(value, 0))
        if "sat" in item.opcode:
            value = np.where(np.isnan(value), 0, np.clip(value, 0, 1))
        if mode == "rz":
            return (value.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        return narrowed(value[:, None], target)

    return convert


def _to_integer(t: Translator, target: str, source: str, mode: str | None, saturate: bool) -> Callable[[Array], Array]:
    number = dtype(target)
    if not is_float(source) and source != "bf16":
        if not saturate:
            return lambda a: a.astype(number)
        limits = np.iinfo(number)

        def clamp(a: Array) -> Array:
            low = max(limits.min, int(np.iinfo(a.dtype).min))
            high = min(limits.max, int(np.iinfo(a.dtype).max))
            return np.clip(a, low, high).astype(number)

        return clamp
    if mode not in _TO_INTEGER:
        raise t.unsupported("a conversion to integer without its rounding")
    rounded, limits = _TO_INTEGER[mode], np.iinfo(number)

    def convert(a: Array) -> Array:
        value = rounded((from_bf16(a) if source == "bf16" else a).astype(np.longdouble))
        inside = np.clip(np.where(np.isnan(value), 0, value), limits.min, limits.max).astype(number)
        # NaN: 0, but the lowest number of 64-bit signed integers on devices.
        if bits(target) == 64:
            lost = np.uint64(0x8000000000000000).view(number)
            return np.where(np.isnan(value), lost, inside)
        return inside

    return convert


def _pack_halves(t: Translator, item: Instruction, target: str) -> Step:
    """cvt.bf16x2.f32 d, a, b: a becomes the upper half."""
    if _rounding(item) != "rn" or "satfinite" in item.opcode:
        raise t.unsupported(f"this rounding to {target}")
    write, relu = t.write(item.operands[0]), "relu" in item.opcode
    upper, lower = t.read(item.operands[1], "f32"), t.read(item.operands[2], "f32")

    def step(machine: Machine, lanes: Lanes) -> None:
        low, high = np.broadcast_arrays(np.atleast_1d(lower(machine, lanes)), np.atleast_1d(upper(machine, lanes)))
        if relu:
            low, high = np.maximum(low, np.float32(0)), np.maximum(high, np.float32(0))
        if target == "bf16x2":
            parts = [to_bf16(value) for value in (low, high)]
        else:
            parts = [narrowed(value[:, None].astype(np.float64), "f16") for value in (low, high)]
        packed = parts[0].astype(np.uint32) | (parts[1].astype(np.uint32) << np.uint32(16))
        write(machine, lanes, packed if packed.size > 1 else packed[0])

    return step


def _to_fp8(t: Translator, item: Instruction, target: str, source: str) -> Step:
    if "satfinite" not in item.opcode:
        raise t.unsupported("a conversion to fp8 without .satfinite")
    write, relu = t.write(item.operands[0]), "relu" in item.opcode

    def codes(value: Array) -> Array:
        return to_fp8(np.maximum(value, np.float32(0)) if relu else value, target).astype(np.uint16)

    if source in ("f16x2", "bf16x2"):
        pair = t.read(item.operands[1], "u32")

        def both(machine: Machine, lanes: Lanes) -> None:
            values = widened(np.atleast_1d(pair(machine, lanes)), source).astype(np.float32)
            write(machine, lanes, codes(values[:, 0]) | (codes(values[:, 1]) << np.uint16(8)))

        return both
    upper, lower = t.read(item.operands[1], "f32"), t.read(item.operands[2], "f32")

    def step(machine: Machine, lanes: Lanes) -> None:
        low, high = np.atleast_1d(lower(machine, lanes)), np.atleast_1d(upper(machine, lanes))
        write(machine, lanes, codes(low) | (codes(high) << np.uint16(8)))

    return step


def _from_fp8(t: Translator, item: Instruction, target: str, source: str) -> Step:
    if target != "f16x2":
        raise t.unsupported(f"fp8 to {target}")
    write, read, relu = t.write(item.operands[0]), t.read(item.operands[1], "u16"), "relu" in item.opcode

    def step(machine: Machine, lanes: Lanes) -> None:
        codes = np.ascontiguousarray(np.atleast_1d(read(machine, lanes))).view(np.uint8).reshape(-1, 2)
        values = FP8[source][codes].astype(np.float64)
        if relu:
            values = np.where(np.isnan(values), values, np.maximum(values, 0))
        write(machine, lanes, narrowed(values, "f16x2"))

    return step


def _pack_integers(t: Translator, item: Instruction) -> Step:
    """cvt.pack.sat.{u8,s8,u16,s16}.s32{.b32} d, a, b, c: b below a, above what of c is shifted up."""
    opcode = [part for part in item.opcode if part not in ("cvt", "pack", "sat")]
    kind = opcode[0]
    if kind not in ("u8", "s8", "u16", "s16"):
        raise t.unsupported(f"cvt.pack to {kind}")
    limits, width = np.iinfo(dtype(kind)), bits(kind)
    write, a, b = t.write(item.operands[0]), t.read(item.operands[1], "s32"), t.read(item.operands[2], "s32")
    rest = t.read(item.operands[3], "u32") if len(item.operands) > 3 else None
    mask = np.uint32((1 << width) - 1)

    def octets(value: Value) -> Value:
        return np.clip(value, limits.min, limits.max).astype(np.int32).view(UNSIGNED[32]) & mask

    def step(machine: Machine, lanes: Lanes) -> None:
        found = octets(b(machine, lanes)) | (octets(a(machine, lanes)) << np.uint32(width))
        if rest is not None:
            found = found | (rest(machine, lanes) << np.uint32(2 * width))
        write(machine, lanes, found)

    return step
