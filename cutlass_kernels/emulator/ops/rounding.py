"""Rounding once. A number rounded to odd still tells that it is inexact, and on which side the truth lies, so that
rounding it further gives what rounding the truth would have given (Boldo and Melquiond, 2008).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cutlass_kernels.emulator.ptx.types import Array, Value


def exact_fma(a: Value, b: Value, c: Value) -> Array:
    """a * b + c of float32 numbers as float64, rounded to odd. The product is exact; the sum's error is recovered."""
    product = a.astype(np.float64) * b
    c = c.astype(np.float64)
    total = np.asarray(product + c)
    back = total - product
    error = (product - (total - back)) + (c - back)
    pattern = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(total) & (pattern & 1 == 0)
    toward = np.where((error > 0) == (total > 0), 1, -1)
    return np.asarray(np.where(inexact, pattern + toward, pattern).view(np.float64))


def single_to_odd(values: Array) -> Array:
    """float64 to float32, rounded to odd."""
    single = values.astype(np.float32)
    inexact = (single.astype(np.float64) != values) & np.isfinite(single)
    pattern = single.view(np.int32)
    too_far = np.abs(single.astype(np.float64)) > np.abs(values)
    truncated = pattern - (inexact & too_far)
    return np.where(inexact, truncated | 1, pattern).astype(np.int32).view(np.float32)


def rounded(values: Array, mode: str) -> Array:
    """float64 to float32 in a PTX rounding mode."""
    return values.astype(np.float32) if mode == "rn" else directed(values, np.dtype(np.float32), mode)


def directed(value: Array, number: np.dtype[Any], mode: str) -> Array:
    """To ``number`` toward zero ("rz"), minus infinity ("rm") or plus infinity ("rp")."""
    near = value.astype(number)
    wide = np.longdouble
    if mode == "rz":
        beyond = np.abs(near.astype(wide)) > np.abs(value.astype(wide))
        toward = np.zeros_like(near)
    elif mode == "rm":
        beyond, toward = near.astype(wide) > value.astype(wide), np.full_like(near, -np.inf)
    else:
        beyond, toward = near.astype(wide) < value.astype(wide), np.full_like(near, np.inf)
    return np.where(beyond, np.nextafter(near, toward), near)
