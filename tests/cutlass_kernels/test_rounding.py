"""fma.rm.f32 of the emulator, which expf uses, against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlass_kernels.emulator.ops.arithmetic import _fma32_down

FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


@settings(max_examples=500)
@given(FLOATS, FLOATS, FLOATS)
def test_fma_rounds_down(a: float, b: float, c: float) -> None:
    actual = _fma32_down(*(np.array([x], np.float32) for x in (a, b, c)))[0]
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    assert Fraction(float(actual)) <= exact, (a, b, c)
    above = np.nextafter(actual, np.float32(np.inf))
    assert Fraction(float(above)) > exact, (a, b, c)
