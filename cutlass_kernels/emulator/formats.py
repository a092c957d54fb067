"""Number formats that numpy lacks, as bit patterns: bfloat16, fp8 (e4m3, e5m2), tf32."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float32]


def to_bf16(values: ArrayLike) -> NDArray[np.uint16]:
    """float32 to bfloat16 bits, to nearest even; every NaN becomes 0x7fff as on a device."""
    single = np.ascontiguousarray(values, np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(single), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bf16(bits: ArrayLike) -> Floats:
    """bfloat16 bits to float32, exactly."""
    return (np.ascontiguousarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_tf32(values: ArrayLike) -> Floats:
    """float32 rounded to the 10 explicit mantissa bits of tf32, to nearest, ties away (PTX cvt.rna.tf32.f32)."""
    single = np.ascontiguousarray(values, np.float32)
    bits = (single.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(single), bits.view(np.float32), single)


def truncate_tf32(values: ArrayLike) -> Floats:
    """A register as a tf32 tensor-core instruction reads it: the low 13 bits are ignored."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _table(exponent_bits: int, bias: int, nan_from: int, infinity: int | None) -> Floats:
    code = np.arange(256)
    mantissa_bits = 7 - exponent_bits
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    fraction = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    magnitude = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))
    positive = code & 0x7F
    magnitude[positive >= nan_from] = np.nan
    if infinity is not None:
        magnitude[positive == infinity] = np.inf
    return np.where(code & 0x80, -magnitude, magnitude).astype(np.float32)


#: The value of each of the 256 codes (OCP 8-bit floating point specification, 2023).
FP8 = {"e4m3": _table(4, 7, 0x7F, None), "e5m2": _table(5, 15, 0x7D, 0x7C)}
_LARGEST = {"e4m3": 0x7E, "e5m2": 0x7B}


def to_fp8(values: ArrayLike, kind: str) -> NDArray[np.uint8]:
    """float32 to fp8 codes, to nearest even, saturating at the largest finite number; NaN becomes 0x7f."""
    single = np.asarray(values, np.float32)
    finite = FP8[kind][: _LARGEST[kind] + 1].astype(np.float64)
    middles = (finite[1:] + finite[:-1]) / 2
    magnitude = np.abs(single).astype(np.float64)
    below = np.searchsorted(middles, magnitude, side="left")
    tie = (below < middles.size) & (middles[np.minimum(below, middles.size - 1)] == magnitude)
    code = (below + (tie & (below % 2 == 1))).astype(np.uint8) | np.where(np.signbit(single), 0x80, 0).astype(np.uint8)
    return np.where(np.isnan(single), np.uint8(0x7F), code)


def to_e4m3(values: ArrayLike) -> NDArray[np.uint8]:
    """float32 to e4m3 codes, to nearest even, saturating at 448."""
    return to_fp8(values, "e4m3")


def from_e4m3(codes: ArrayLike) -> Floats:
    """e4m3 codes to float32, exactly."""
    return FP8["e4m3"][np.asarray(codes, np.uint8)]


def widen(bits: NDArray[Any], kind: str) -> NDArray[Any]:
    """Elements of a matrix instruction in the type it multiplies in: float32, or float64 for integers (exact)."""
    if kind == "bf16":
        return from_bf16(bits)
    if kind == "f16":
        return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)
    if kind == "tf32":
        return truncate_tf32(np.ascontiguousarray(bits).view(np.float32))
    if kind in FP8:
        return np.asarray(FP8[kind][bits])
    return np.ascontiguousarray(bits).view(np.int8 if kind == "s8" else np.uint8).astype(np.float64)
