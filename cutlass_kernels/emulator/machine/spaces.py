"""State spaces and how addresses tell them apart.

Generic addresses of shared, local and parameter memory lie in windows far above any address of this process. An
address in ``shared::cluster`` carries the rank of the CTA plus one in its bits 24 to 31; without one it means the
CTA's own memory.
"""

from __future__ import annotations

import enum

import numpy as np

from cutlass_kernels.emulator.machine.clocks import Ints
from cutlass_kernels.emulator.ptx.types import Array

SHARED, LOCAL, PARAMETER = 1 << 56, 1 << 57, 1 << 58
_RANK_SHIFT = 24


class Space(enum.Enum):
    """A state space."""

    GENERIC = "generic"
    GLOBAL = "global"
    SHARED = "shared"
    LOCAL = "local"
    PARAMETER = "parameter"


def cluster_rank(address: Array) -> tuple[Ints, Ints]:
    """Rank plus one (0: the CTA's own memory) and byte of shared addresses, a generic window already taken off."""
    plain = address.astype(np.int64) & 0xFFFFFFFF
    return plain >> _RANK_SHIFT, plain & ((1 << _RANK_SHIFT) - 1)


def with_rank(address: Array, rank: Array) -> Array:
    """mapa: the address of the same byte in the CTA of a rank. Keeps a generic window."""
    kind = address.dtype.type
    low = address & ~kind(0xFF << _RANK_SHIFT)
    return np.asarray(low | ((rank.astype(kind) + kind(1)) << kind(_RANK_SHIFT)))
