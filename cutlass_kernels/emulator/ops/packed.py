"""Arithmetic in f16 and bf16, alone or two in a register. Computed in float32 or float64 and rounded once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cutlass_kernels.emulator.formats import from_bf16, to_bf16
from cutlass_kernels.emulator.machine.machine import Machine
from cutlass_kernels.emulator.machine.scheduler import Lanes
from cutlass_kernels.emulator.ops.rounding import single_to_odd
from cutlass_kernels.emulator.ptx.syntax import Instruction
from cutlass_kernels.emulator.ptx.types import Array, Value, bits
from cutlass_kernels.emulator.steps import Step
from cutlass_kernels.emulator.translate import Translator


def widened(packed: Array, kind: str) -> Array:
    """The one or two numbers of each lane as float64: [lanes, 1 or 2]."""
    parts = np.ascontiguousarray(packed).view(np.uint16).reshape(-1, bits(kind) // 16)
    single = from_bf16(parts) if kind.startswith("bf") else parts.view(np.float16)
    return single.astype(np.float64)


def narrowed(values: Array, kind: str) -> Array:
    """float64 [lanes, 1 or 2] as packed bits, rounded to nearest even; NaN becomes the canonical 0x7fff."""
    if kind.startswith("bf"):
        parts = to_bf16(single_to_odd(values))
    else:
        parts = np.where(np.isnan(values), np.uint16(0x7FFF), values.astype(np.float16).view(np.uint16))
    return np.ascontiguousarray(parts, np.uint16).view(np.uint32 if bits(kind) == 32 else np.uint16).reshape(-1)


def halves(t: Translator, item: Instruction, function: Callable[..., Value]) -> Step:
    """A step that computes the first operand from the others in a half-precision type."""
    kind, opcode = item.opcode[-1], item.opcode
    write = t.write(item.operands[0])
    readers = [t.read(operand, f"u{bits(kind)}") for operand in item.operands[1:]]
    relu, saturate = "relu" in opcode, "sat" in opcode

    def step(machine: Machine, lanes: Lanes) -> None:
        values = np.broadcast_arrays(*(np.atleast_1d(read(machine, lanes)) for read in readers))
        found = function(*(widened(value, kind) for value in values))
        if relu:
            found = np.where(np.isnan(found), found, np.maximum(found, 0))
        if saturate:
            found = np.where(np.isnan(found), 0, np.clip(found, 0, 1))
        packed = narrowed(found, kind)
        write(machine, lanes, packed if packed.size > 1 else packed[0])

    return step
