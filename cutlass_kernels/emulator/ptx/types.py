"""PTX types as numpy sees them. A register holds bits: an unsigned integer of its width, or a bool for a predicate."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Lane values: a numpy array with one element a lane, or a numpy scalar that all lanes share.
Value = Any
Array = NDArray[Any]

_BITS = {
    "pred": 1,
    "f16x2": 32,
    "bf16x2": 32,
    "bf16": 16,
    "tf32": 32,
    "e4m3": 8,
    "e5m2": 8,
    "e4m3x2": 16,
    "e5m2x2": 16,
    **{f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)},
    "b128": 128,
    "f16": 16,
    "f32": 32,
    "f64": 64,
}
UNSIGNED: dict[int, np.dtype[Any]] = {
    8: np.dtype(np.uint8),
    16: np.dtype(np.uint16),
    32: np.dtype(np.uint32),
    64: np.dtype(np.uint64),
}
_NUMPY: dict[str, np.dtype[Any]] = {
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "tf32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "pred": np.dtype(np.bool_),
}


def is_type(name: str) -> bool:
    """Whether a dotted part of an opcode is a type and not a qualifier."""
    return name in _BITS


def bits(name: str) -> int:
    """Width in bits; 1 for a predicate."""
    return _BITS[name]


def dtype(name: str) -> np.dtype[Any]:
    """The numpy type that arithmetic of a PTX type uses; untyped bits and packed types are unsigned integers."""
    return _NUMPY.get(name) or UNSIGNED[_BITS[name]]


def is_float(name: str) -> bool:
    """f16, f32 or f64: types that numpy computes in directly."""
    return name in ("f16", "f32", "f64")


def is_signed(name: str) -> bool:
    """A signed integer type."""
    return name[0] == "s" and name[1:].isdigit()
