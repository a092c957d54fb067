"""Matrix fragments of a warp: mma, ldmatrix, stmatrix, movmatrix (PTX ISA, "Warp-level Matrix Instructions").

In a fragment, lane 4 g + t holds elements of row g (and g + 8) and of the column pair t; several elements of a type
narrower than 32 bits share a register. Products are exact; sums are taken in float32 (float64 for f64, exactly for
integers), in an order of ours: a device's order and its handling of low bits are not documented.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from cutlass_kernels.emulator.errors import DivergentCollective
from cutlass_kernels.emulator.formats import widen
from cutlass_kernels.emulator.machine.clocks import Ints
from cutlass_kernels.emulator.machine.machine import Machine
from cutlass_kernels.emulator.machine.scheduler import WARP, Lanes
from cutlass_kernels.emulator.ops.fragments import mark_rows, product_marks, register_indices, stored_rows
from cutlass_kernels.emulator.ptx.syntax import Instruction
from cutlass_kernels.emulator.ptx.types import UNSIGNED, Array, bits
from cutlass_kernels.emulator.registry import instruction
from cutlass_kernels.emulator.steps import Reader, Step
from cutlass_kernels.emulator.translate import Translator

_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")
_SHAPES = {
    "bf16": (8, 16),
    "f16": (8, 16),
    "tf32": (4, 8),
    "s8": (16, 32),
    "u8": (16, 32),
    "e4m3": (16, 32),
    "e5m2": (16, 32),
    "f64": (4,),
}


#: numpy's type of an accumulator.
ACCUMULATOR: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "s32": np.dtype(np.int32),
}


def whole_warps(machine: Machine, lanes: Lanes) -> Ints:
    """Lanes as an array of whole warps. Raises `DivergentCollective`."""
    where = machine.lanes(lanes)
    if where.size % WARP or (where[::WARP] % WARP).any() or (where[WARP - 1 :: WARP] - where[::WARP] != WARP - 1).any():
        raise machine.fault(DivergentCollective, "a matrix instruction by a part of a warp")
    return where


def registers(readers: list[Reader], machine: Machine, lanes: Lanes, where: Ints) -> Array:
    """Registers side by side: [warps, 8, 4, registers]."""
    columns = [np.broadcast_to(read(machine, lanes), where.shape) for read in readers]
    return np.stack(columns, axis=-1).reshape(-1, 8, 4, len(columns))


def elements(packed: Array, kind: str) -> Array:
    """The elements of 32-bit registers: [..., registers, elements in one]."""
    per = 32 // bits(kind)
    return np.ascontiguousarray(packed).view(UNSIGNED[bits(kind)]).reshape(*packed.shape, per)


def fragment_a(packed: Array, kind: str) -> Array:
    """A of 16 rows: registers are (rows, rows + 8) for each half of the columns -> [warps, 16, k]."""
    x = elements(packed, kind)
    warps, _, _, count, per = x.shape
    x = x.reshape(warps, 8, 4, count // 2, 2, per)
    return np.asarray(x.transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, count // 2 * 4 * per))


def fragment_b(packed: Array, kind: str) -> Array:
    """B as [warps, 8 columns, k]."""
    x = elements(packed, kind)
    warps, _, _, count, per = x.shape
    return np.asarray(x.transpose(0, 1, 3, 2, 4).reshape(warps, 8, count * 4 * per))


def fragment_c(packed: Array, kind: str) -> Array:
    """C of 16 x 8: [warps, 16, 8] in the accumulator's type."""
    x = np.ascontiguousarray(packed).view(ACCUMULATOR[kind]).reshape(-1, 8, 4, 2, 2)
    return np.asarray(x.transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8))


def unfragment_c(matrix: Array) -> Array:
    """[warps, 16, 8] as registers: [lanes, 4, or 2 for f16], uint32."""
    x = np.ascontiguousarray(matrix.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4))
    return np.asarray(x.reshape(-1, 4).view(np.uint32))


def accumulate(product: Array, c: Array, kind: str, *, saturate: bool = False) -> Array:
    """product + c in the accumulator's type: float32, rounded for f16; integers wrap unless they ``saturate``."""
    if kind == "s32":
        total = product.astype(np.int64) + c
        limits = np.iinfo(np.int32)
        return (np.clip(total, limits.min, limits.max) if saturate else total).astype(np.int32)
    single = product.astype(np.float32) + c.astype(np.float32)
    return single.astype(np.float16) if kind == "f16" else single


@instruction("mma", kind="tensor", accepts="sync aligned row col m8n8k4 m16n8k4 m16n8k8 m16n8k16 m16n8k32 satfinite")
def _mma(t: Translator, item: Instruction) -> Step:
    found = _SHAPE.fullmatch(item.opcode[3])
    kinds = [part for part in item.opcode[6:] if part != "satfinite"]
    saturate = "satfinite" in item.opcode
    if item.opcode[4:6] != ("row", "col") or found is None or len(kinds) != 4 or kinds[0] != kinds[3]:
        raise t.unsupported("this form of mma")
    m, n, k = (int(extent) for extent in found.groups())
    result, kind_a, kind_b, kind_c = kinds
    if kind_a == "f64":
        return _mma_double(t, item, (m, n, k))
    allowed = {"s32"} if kind_a in ("s8", "u8") else {"f32", "f16"} if kind_a == "f16" else {"f32"}
    if (
        (m, n) != (16, 8)
        or k not in _SHAPES.get(kind_a, ())
        or result not in allowed
        or kind_b not in _SHAPES
        or (saturate and result != "s32")
    ):
        raise t.unsupported(f"mma of {item.opcode[3]} with {kind_a}, {kind_b}")
    a, b, c = ([t.read(each, "u32") for each in t.vector(item.operands[n])] for n in (1, 2, 3))
    writers = [t.write(each) for each in t.vector(item.operands[0])]
    indices = [register_indices(t, operand) for operand in item.operands[:4]]

    def step(machine: Machine, lanes: Lanes) -> None:
        where = whole_warps(machine, lanes)
        left = widen(fragment_a(registers(a, machine, lanes, where), kind_a), kind_a)
        right = widen(fragment_b(registers(b, machine, lanes, where), kind_b), kind_b)
        addend = fragment_c(registers(c, machine, lanes, where), kind_c)
        matrix = accumulate(np.matmul(left, right.swapaxes(1, 2)), addend, result, saturate=saturate)
        machine.counters.mma += left.shape[0] * m * n * k
        packed = unfragment_c(matrix)
        marks = product_marks(machine.taint, where, *indices) if machine.taint.marks else None
        for number, write in enumerate(writers):
            write(machine, lanes, packed[:, number])
            if marks is not None and (index := indices[0][number]) is not None:
                machine.taint.mark(index, where, marks[number])

    return step


def _mma_double(t: Translator, item: Instruction, shape: tuple[int, int, int]) -> Step:
    if shape != (8, 8, 4):
        raise t.unsupported(f"mma of {item.opcode[3]} with f64")
    a, b = ([t.read(each, "f64", "a product") for each in t.vector(item.operands[n])] for n in (1, 2))
    c = [t.read(each, "f64", "a product") for each in t.vector(item.operands[3])]
    writers = [t.write(each) for each in t.vector(item.operands[0])]

    def step(machine: Machine, lanes: Lanes) -> None:
        where = whole_warps(machine, lanes)
        left = registers(a, machine, lanes, where)[..., 0]
        right = registers(b, machine, lanes, where)[..., 0]
        addend = registers(c, machine, lanes, where).reshape(-1, 8, 8)
        found = (np.matmul(left, right.swapaxes(1, 2)) + addend).reshape(-1, 2)
        machine.counters.mma += left.shape[0] * 8 * 8 * 4
        for number, write in enumerate(writers):
            write(machine, lanes, found[:, number])

    return step


def _rows(machine: Machine, address: Array, where: Ints, count: int) -> tuple[Array, Ints]:
    """Addresses of the 8-by-16-byte rows of ``count`` matrices, held by the first lanes of each warp."""
    chosen = where.reshape(-1, WARP)[:, : 8 * count].ravel()
    return address.reshape(-1, WARP)[:, : 8 * count].ravel(), chosen


def _matrices(t: Translator, item: Instruction) -> int:
    if "b16" not in item.opcode or "m8n8" not in item.opcode:
        raise t.unsupported("this shape of matrix")
    return {"x1": 1, "x2": 2, "x4": 4}[next(part for part in item.opcode if part in ("x1", "x2", "x4"))]


_MATRIX = "sync aligned m8n8 x1 x2 x4 trans shared shared::cta b16"


@instruction("ldmatrix", kind="memory", accepts=_MATRIX)
def _ldmatrix(t: Translator, item: Instruction) -> Step:
    count, transposed = _matrices(t, item), "trans" in item.opcode
    space, address = t.space(item.opcode), t.address(item.operands[1])
    writers = [t.write(each) for each in t.vector(item.operands[0])]
    indices = register_indices(t, item.operands[0])

    def step(machine: Machine, lanes: Lanes) -> None:
        where = whole_warps(machine, lanes)
        at, chosen = _rows(machine, address(machine, lanes), where, count)
        rows, missing = machine.load(space, at, chosen, 4, 4)
        data = np.ascontiguousarray(rows).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            data = data.swapaxes(2, 3)
        packed = np.ascontiguousarray(data).view(np.uint32).reshape(-1, count, WARP)
        for number, write in enumerate(writers):
            write(machine, lanes, packed[:, number].reshape(-1))
        if missing is not None:
            mark_rows(machine, where, missing.reshape(-1, count, 8), indices, transposed)

    return step


@instruction("stmatrix", kind="memory", accepts=_MATRIX)
def _stmatrix(t: Translator, item: Instruction) -> Step:
    count, transposed = _matrices(t, item), "trans" in item.opcode
    space, address = t.space(item.opcode), t.address(item.operands[0])
    readers = [t.read(each, "u32") for each in t.vector(item.operands[1])]

    def step(machine: Machine, lanes: Lanes) -> None:
        where = whole_warps(machine, lanes)
        at, chosen = _rows(machine, address(machine, lanes), where, count)
        columns = [np.broadcast_to(read(machine, lanes), where.shape).reshape(-1, WARP) for read in readers]
        data = np.ascontiguousarray(np.stack(columns, axis=1)).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            data = data.swapaxes(2, 3)
        machine.store(space, at, chosen, 4, np.ascontiguousarray(data).view(np.uint32).reshape(-1, 4))
        if machine.taint.marks and (marks := machine.taint.seen(where)) is not None:
            machine.forget(space, at, chosen, 16, stored_rows(marks, count, transposed))

    return step


@instruction("movmatrix", kind="tensor", accepts="sync aligned m8n8 trans")
def _movmatrix(t: Translator, item: Instruction) -> Step:
    write, read = t.write(item.operands[0]), t.read(item.operands[1], "u32")

    def step(machine: Machine, lanes: Lanes) -> None:
        whole_warps(machine, lanes)
        data = np.ascontiguousarray(read(machine, lanes)).view(np.uint16).reshape(-1, 8, 8).swapaxes(1, 2)
        write(machine, lanes, np.ascontiguousarray(data).view(np.uint32).reshape(-1))

    return step
