"""Instructions by family. Each module registers its rules when it is imported."""

from __future__ import annotations

import importlib

from cutlass_kernels.emulator.ops.synchronisation import dropped

_FAMILIES = (
    "arithmetic",
    "atomics",
    "bits",
    "control",
    "conversion",
    "copies",
    "logic",
    "matrix",
    "memory",
    "moves",
    "packed",
    "synchronisation",
    "warp",
    "warpgroup",
)


def load() -> None:
    """Register every instruction."""
    for family in _FAMILIES:
        importlib.import_module(f"{__name__}.{family}")


__all__ = ["dropped", "load"]
