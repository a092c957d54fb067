"""wgmma.mma_async: the product of a warpgroup, its operands in shared memory described by 64-bit descriptors.

A descriptor holds a start address, two byte offsets and a swizzle (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared
Memory Layout"). Operands are taken as [rows, k]; "mn-major" ones lie with the rows innermost.
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from cutlass_kernels.emulator.errors import MemoryFault
from cutlass_kernels.emulator.formats import widen
from cutlass_kernels.emulator.machine.clocks import Ints
from cutlass_kernels.emulator.machine.machine import Machine
from cutlass_kernels.emulator.machine.memory import ALLOCATED, WRITTEN
from cutlass_kernels.emulator.machine.scheduler import Lanes
from cutlass_kernels.emulator.machine.tensormap import swizzled
from cutlass_kernels.emulator.machine.warpgroups import SIZE
from cutlass_kernels.emulator.ops.matrix import ACCUMULATOR, accumulate
from cutlass_kernels.emulator.ptx.syntax import Immediate, Instruction, Operand, Register, Vector
from cutlass_kernels.emulator.ptx.types import UNSIGNED, Array, bits
from cutlass_kernels.emulator.registry import instruction
from cutlass_kernels.emulator.steps import Step
from cutlass_kernels.emulator.translate import Translator

_SHAPE = re.compile(r"m64n(\d+)k(\d+)")
_DEPTH = {"bf16": 16, "f16": 16, "tf32": 8, "e4m3": 32, "e5m2": 32, "s8": 32, "u8": 32}
_ACCUMULATORS = {"s8": ("s32",), "u8": ("s32",), "bf16": ("f32",), "tf32": ("f32",)}
#: Swizzle of `tensormap.swizzled` by a descriptor's two top bits, and the bytes of a row then.
_SWIZZLES, _ROW = (0, 3, 2, 1), (16, 32, 64, 128)
_SHAPES = " ".join(f"m64n{n}k{k}" for n in range(8, 257, 8) for k in (8, 16, 32))


@instruction("wgmma.commit_group", kind="async", accepts="sync aligned")
def _commit(t: Translator, item: Instruction) -> Step:
    return lambda machine, lanes: machine.warpgroups.commit(machine.lanes(lanes))


@instruction("wgmma.mma_async", kind="tensor", accepts=f"sync aligned satfinite {_SHAPES}")
def _wgmma(t: Translator, item: Instruction) -> Step:
    product = _Product(t, item)
    scale = t.predicate(item.operands[3])
    a = None if isinstance(item.operands[1], Vector) else t.read(item.operands[1], "u64")
    b = t.read(item.operands[2], "u64")

    def step(machine: Machine, lanes: Lanes) -> None:
        where = machine.lanes(lanes)
        keeps = np.broadcast_to(scale(machine, lanes), where.shape)
        left = None if a is None else np.broadcast_to(a(machine, lanes), where.shape)
        right = np.broadcast_to(b(machine, lanes), where.shape)
        for row in machine.warpgroups.split(where):
            at = np.searchsorted(where, row[0])
            product.start(machine, row, None if left is None else int(left[at]), int(right[at]), bool(keeps[at]))

    return step


class _Product:
    """One instruction: its shape, types, signs and registers."""

    def __init__(self, t: Translator, item: Instruction) -> None:
        found = _SHAPE.fullmatch(item.opcode[4])
        kinds = [part for part in item.opcode[5:] if part != "satfinite"]
        if found is None or len(kinds) != 3 or kinds[1] not in _DEPTH or "satfinite" in item.opcode:
            raise t.unsupported("this form of wgmma")
        self.n, self.k = int(found[1]), int(found[2])
        self.result, self.kind_a, self.kind_b = kinds
        if self.k != _DEPTH[self.kind_a] or self.result not in _ACCUMULATORS.get(self.kind_a, ("f32", "f16")):
            raise t.unsupported("this combination of types of wgmma")
        self.d = self._registers(t, item.operands[0])
        self.a = self._registers(t, item.operands[1]) if isinstance(item.operands[1], Vector) else None
        self.registers = frozenset((*self.d, *(self.a or ())))
        self.sign_a, self.sign_b, self.a_by_rows, self.b_by_rows = self._modifiers(t, item)

    @staticmethod
    def _registers(t: Translator, operand: Operand) -> list[int]:
        found = [each.index for each in t.vector(operand) if isinstance(each, Register)]
        if len(found) != len(t.vector(operand)):
            raise t.unsupported("a matrix operand that is no register")
        return found

    def _modifiers(self, t: Translator, item: Instruction) -> tuple[int, int, bool, bool]:
        """Signs of A and B, and whether each is mn-major: literals behind the operands."""
        literals = [each.value for each in item.operands[4:] if isinstance(each, Immediate)]
        if len(literals) != len(item.operands) - 4:
            raise t.unsupported("a modifier of wgmma that is no literal")
        if not literals:
            return 1, 1, False, False
        sign_a, sign_b, *major = literals
        if self.a is not None:
            return sign_a, sign_b, False, bool(major and major[0])
        by_a, by_b = major or (0, 0)
        return sign_a, sign_b, bool(by_a), bool(by_b)

    def start(self, machine: Machine, lanes: Ints, left: int | None, right: int, keeps: bool) -> None:
        """Hand one warpgroup's product to the machine, which says when it is computed."""
        base = int(machine.cta[lanes[0]]) * machine.shared_stride
        keys = [(right, self.n, self.k, bits(self.kind_b) // 8, self.b_by_rows)]
        if left is not None:
            keys.append((left, 64, self.k, bits(self.kind_a) // 8, self.a_by_rows))
        places = [base + _places(*key) for key in keys]
        for each, key in zip(places, keys, strict=True):
            self._check(machine, each.ravel(), key[3])
        words = (base >> 2) + np.concatenate([_words(*key) for key in keys])

        def compute() -> None:
            self._compute(machine, lanes, places[1] if left is not None else None, places[0], keeps)

        machine.counters.mma += 64 * self.n * self.k
        machine.warpgroups.issue(lanes, words, self.registers, compute)

    @staticmethod
    def _check(machine: Machine, places: Ints, width: int) -> None:
        memory = machine.shared
        if (
            places.min() < 0
            or places.max() + width > memory.size
            or memory.without(ALLOCATED, places, width) is not None
        ):
            raise machine.fault(MemoryFault, "a wgmma descriptor reaches beyond the CTA's shared memory")

    def _compute(self, machine: Machine, lanes: Ints, places_a: Ints | None, places_b: Ints, keeps: bool) -> None:
        left = self._from_registers(machine, lanes) if places_a is None else self._load(machine, places_a, self.kind_a)
        right = self._load(machine, places_b, self.kind_b)
        product = np.matmul(left * left.dtype.type(self.sign_a), right.T * right.dtype.type(self.sign_b))
        before = self._accumulators(machine, lanes) if keeps else np.zeros((64, self.n), np.float32)
        self._write(machine, lanes, accumulate(product, before, self.result))

    def _load(self, machine: Machine, places: Ints, kind: str) -> Array:
        width, flat = bits(kind) // 8, places.ravel()
        if machine.shared.without(WRITTEN, flat, width) is not None:
            machine.hazards.add("uninitialised", "a wgmma reads shared memory that nobody wrote")
        return widen(machine.shared.read(flat, width, 1)[:, 0].reshape(places.shape), kind)

    def _from_registers(self, machine: Machine, lanes: Ints) -> Array:
        assert self.a is not None
        packed = np.stack([machine.registers[index][lanes] for index in self.a], axis=-1)
        per = 32 // bits(self.kind_a)
        x = np.ascontiguousarray(packed).view(UNSIGNED[bits(self.kind_a)]).reshape(4, 8, 4, -1, 2, per)
        return widen(np.ascontiguousarray(x.transpose(0, 4, 1, 3, 2, 5).reshape(64, self.k)), self.kind_a)

    def _accumulators(self, machine: Machine, lanes: Ints) -> Array:
        packed = np.stack([machine.registers[index][lanes] for index in self.d], axis=-1)
        x = np.ascontiguousarray(packed).view(ACCUMULATOR[self.result]).reshape(4, 8, 4, self.n // 8, 2, 2)
        return np.asarray(x.transpose(0, 4, 1, 3, 2, 5).reshape(64, self.n))

    def _write(self, machine: Machine, lanes: Ints, matrix: Array) -> None:
        x = matrix.reshape(4, 2, 8, self.n // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5)
        packed = np.ascontiguousarray(x).reshape(SIZE, -1).view(np.uint32)
        for column, index in enumerate(self.d):
            values = machine.registers[index]
            if not values.flags.writeable:
                machine.registers[index] = values = values.copy()
            values[lanes] = packed[:, column]


@lru_cache(maxsize=256)
def _places(descriptor: int, rows: int, k: int, width: int, by_rows: bool) -> Ints:
    """The byte in shared memory of each element [rows, k] of an operand."""
    start = (descriptor & 0x3FFF) << 4
    leading, stride = ((descriptor >> 16) & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
    swizzle, base = _SWIZZLES[descriptor >> 62], (descriptor >> 49) & 7
    if base:
        raise MemoryFault("a wgmma descriptor with a base offset is not modelled")
    row, column = np.arange(rows, dtype=np.int64)[:, None], np.arange(k, dtype=np.int64)[None, :]
    span = _ROW[swizzle]
    if by_rows:
        # Chunks of `span` bytes of rows, eight k deep. Without a swizzle the two offsets change places.
        far, deep = (stride, leading) if swizzle == 0 else (leading, stride)
        inner = row * width
        offset = inner // span * far + inner % span + column % 8 * span + column // 8 * deep
    elif swizzle:
        offset = row // 8 * stride + row % 8 * span + column * width
    else:
        inner = column * width
        offset = row // 8 * stride + row % 8 * 16 + inner // 16 * leading + inner % 16
    return swizzled(start + offset, swizzle)


@lru_cache(maxsize=256)
def _words(descriptor: int, rows: int, k: int, width: int, by_rows: bool) -> Ints:
    """Each word of an operand once."""
    return np.unique(_places(descriptor, rows, k, width, by_rows) >> 2)
