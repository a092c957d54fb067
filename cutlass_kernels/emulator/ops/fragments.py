"""Marks of values that nobody wrote (`machine.taint`), carried through matrix fragments by rows and columns.

Lane 4 g + t of a warp holds, of an 8 by 8 matrix of 16-bit elements, those of row g at columns 2 t and 2 t + 1.
"""

from __future__ import annotations

import numpy as np

from cutlass_kernels.emulator.machine.clocks import Ints
from cutlass_kernels.emulator.machine.machine import Machine
from cutlass_kernels.emulator.machine.taint import Marks, Taint
from cutlass_kernels.emulator.ptx.syntax import Operand, Register
from cutlass_kernels.emulator.translate import Translator

Indices = list[int | None]


def register_indices(t: Translator, operand: Operand) -> Indices:
    """The registers of ``{...}``; None for what is no register."""
    return [each.index if isinstance(each, Register) else None for each in t.vector(operand)]


def _marks(taint: Taint, register: int | None, lanes: Ints) -> Marks:
    """[warps, 8, 4]."""
    found = np.zeros(lanes.size, np.bool_) if register is None else taint.of(register, lanes)
    return found.reshape(-1, 8, 4)


def product_marks(taint: Taint, lanes: Ints, d: Indices, a: Indices, b: Indices, c: Indices) -> list[Marks]:
    """For each register of D = A B + C of 16 by 8, the lanes that depend on a marked element."""
    rows: Marks = np.zeros((lanes.size // 32, 2, 8), np.bool_)
    for number, register in enumerate(a):
        rows[:, number % 2] |= _marks(taint, register, lanes).any(axis=2)
    columns = np.zeros((lanes.size // 32, 8), np.bool_)
    for register in b:
        columns |= _marks(taint, register, lanes).any(axis=2)
    pairs: Marks = columns.reshape((-1, 1, 4, 2))
    found = []
    for number, register in enumerate(c):
        # Four registers of 32 bits: two columns of each half of the rows. Two of packed halves: both columns in one.
        half, column = (
            (number // 2, pairs[..., number % 2]) if len(d) == 4 else (number, np.asarray(pairs.any(axis=-1)))
        )
        held: Marks = rows[:, half, :, None] | column | _marks(taint, register, lanes)
        found.append(held.reshape(-1))
    return found


def mark_rows(machine: Machine, lanes: Ints, missing: Marks, targets: Indices, transposed: bool) -> None:
    """ldmatrix has read rows that nobody wrote: ``missing`` [warps, matrices, 8 rows]."""
    elements = np.asarray(np.repeat(missing[..., None], 8, axis=-1))
    if transposed:
        elements = elements.swapaxes(2, 3)
    held = np.asarray(elements.reshape(*missing.shape[:2], 32, 2).any(axis=-1))
    for number, register in enumerate(targets):
        if register is not None:
            machine.taint.mark(register, lanes, held[:, number].reshape(-1))


def stored_rows(marks: Marks, count: int, transposed: bool) -> Marks:
    """Which rows of stmatrix depend on marked lanes: flat [warps, matrices, 8]."""
    lanes = marks.reshape(-1, 8, 4)
    rows = np.asarray(np.repeat(lanes.any(axis=1), 2, axis=-1) if transposed else lanes.any(axis=2))
    return np.asarray(np.repeat(rows[:, None], count, axis=1)).reshape(-1)
