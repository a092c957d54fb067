"""Counts memory transactions: 32-byte sectors of global memory, passes over the 32 banks of shared memory.

Shared memory serves 128 bytes a pass, one 4-byte word a bank. Accesses of 8 and 16 bytes a lane are served by halves
and quarters of a warp (CUDA C++ programming guide, "Shared Memory"; for wide accesses the convention of Nsight
Compute's derived metrics). Lanes that read the same word share it.
"""

from __future__ import annotations

import numpy as np

from cutlass_kernels.emulator.machine.clocks import Ints
from cutlass_kernels.emulator.machine.scheduler import WARP
from cutlass_kernels.emulator.report import Counters

_BANKS, _SECTOR = 32, 32
_NOTHING = np.iinfo(np.int64).max


class Tally:
    """Adds to `Counters`."""

    def __init__(self, counters: Counters) -> None:
        self.counters = counters

    def global_access(self, offsets: Ints, lanes: Ints, size: int, *, write: bool) -> None:
        """Each lane touches ``size`` bytes at an offset."""
        sectors = _distinct(_rows(offsets // _SECTOR, lanes // WARP, WARP))
        if write:
            self.counters.global_bytes_written += offsets.size * size
            self.counters.global_sectors_written += sectors
        else:
            self.counters.global_bytes_read += offsets.size * size
            self.counters.global_sectors_read += sectors

    def shared_access(self, offsets: Ints, lanes: Ints, size: int) -> None:
        """Each lane touches ``size`` bytes at an offset."""
        words = max(size // 4, 1)
        in_a_pass = WARP // words
        rows = _rows(offsets // 4, lanes // in_a_pass, in_a_pass)
        if words > 1:
            spread = rows[:, :, None] + np.arange(words)
            rows = np.where(rows[:, :, None] == _NOTHING, _NOTHING, spread).reshape(rows.shape[0], -1)
        rows = np.sort(rows, axis=1)
        fresh = rows != _NOTHING
        fresh[:, 1:] &= rows[:, 1:] != rows[:, :-1]
        row, column = np.nonzero(fresh)
        banks = row * _BANKS + rows[row, column] % _BANKS
        load = np.bincount(banks, minlength=rows.shape[0] * _BANKS).reshape(-1, _BANKS)
        self.counters.shared_wavefronts += int(load.max(axis=1).sum())
        self.counters.shared_ideal += rows.shape[0]


def _rows(values: Ints, group: Ints, width: int) -> Ints:
    """Values of sorted lanes as one row a group, the lanes that take no part filled in."""
    if values.size % width == 0 and (group[::width] == group[width - 1 :: width]).all():
        return values.reshape(-1, width)
    starts = np.concatenate([[True], group[1:] != group[:-1]])
    row = np.cumsum(starts) - 1
    column = np.arange(values.size) - np.flatnonzero(starts)[row]
    rows = np.full((int(row[-1]) + 1, width), _NOTHING, np.int64)
    rows[row, column] = values
    return rows


def _distinct(rows: Ints) -> int:
    rows = np.sort(rows, axis=1)
    changes = int((rows[:, 1:] != rows[:, :-1]).sum()) + rows.shape[0]
    return int(changes - (rows[:, -1] == _NOTHING).sum())
