"""Floating-point arithmetic and conversions against numpy, and against exact rationals where numpy would round
twice."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from cutlass_kernels.emulator import from_bf16, to_bf16
from cutlass_kernels.emulator.formats import FP8
from tests.cutlass_kernels.emulator.harness import Array, compute, samples

LANES = 512
Oracle = Callable[..., Any]
DTYPES: dict[str, Any] = {"f32": np.float32, "f64": np.float64, "f16": np.float16}


def numbers(kind: str, patterns: Array) -> Array:
    """Bit patterns as numbers."""
    if kind == "bf16":
        return from_bf16(patterns)
    return patterns.view(DTYPES[kind]) if kind in DTYPES else patterns


def same(found: Array, wanted: Array) -> None:
    """Equal bit for bit, any NaN for a NaN."""
    nan = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(found), nan)
    unsigned = np.dtype(f"u{wanted.dtype.itemsize}")
    np.testing.assert_array_equal(found[~nan].view(unsigned), wanted[~nan].view(unsigned))


def flush(a: Array) -> Array:
    return np.where(np.abs(a) < np.float32(2.0**-126), np.copysign(np.float32(0), a), a)


def rounded(exact: Fraction, dtype: Any) -> Any:
    """The number of a type nearest to a rational, ties to even, from the bits of its mantissa."""
    info = np.finfo(dtype)
    if exact == 0:
        return dtype(0)
    sign, exact = (-1, -exact) if exact < 0 else (1, exact)
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    exponent -= exact < Fraction(2) ** exponent
    step = Fraction(2) ** (max(exponent, int(info.minexp)) - int(info.nmant))
    quotient, rest = divmod(exact, step)
    quotient += rest * 2 > step or (rest * 2 == step and quotient % 2 == 1)
    value = quotient * step
    return dtype(sign * np.inf) if value > Fraction(float(info.max)) else dtype(sign * float(value))


def fused(a: Array, b: Array, c: Array, dtype: Any = np.float32) -> Array:
    """a * b + c rounded once."""
    with np.errstate(all="ignore"):
        plain = (a.astype(np.float64) * b + c).astype(dtype)
    special = ~(np.isfinite(a) & np.isfinite(b) & np.isfinite(c))
    for lane in np.flatnonzero(~special):
        exact = Fraction(float(a[lane])) * Fraction(float(b[lane])) + Fraction(float(c[lane]))
        if exact != 0:
            plain[lane] = rounded(exact, dtype)
    return plain


CASES: list[tuple[str, str, str, Oracle]] = [
    ("add.f32 %o0, %i0, %i1;", "f32 f32", "f32", np.add),
    ("add.rn.ftz.f32 %o0, %i0, %i1;", "f32 f32", "f32", lambda a, b: flush(flush(a) + flush(b))),
    ("add.sat.f32 %o0, %i0, %i1;", "f32 f32", "f32", lambda a, b: np.clip(np.nan_to_num(a + b, nan=0), 0, 1)),
    ("sub.f64 %o0, %i0, %i1;", "f64 f64", "f64", np.subtract),
    ("mul.rn.f32 %o0, %i0, %i1;", "f32 f32", "f32", np.multiply),
    ("mul.f32 %o0, %i0, 0f40490FDB;", "f32", "f32", lambda a: a * np.float32(np.pi)),
    ("mul.f64 %o0, %i0, 0d4000000000000000;", "f64", "f64", lambda a: a * 2),
    ("fma.rn.f32 %o0, %i0, %i1, %i2;", "f32 f32 f32", "f32", fused),
    ("mad.rn.f32 %o0, %i0, %i1, %i2;", "f32 f32 f32", "f32", fused),
    ("div.rn.f32 %o0, %i0, %i1;", "f32 f32", "f32", np.divide),
    ("div.full.f32 %o0, %i0, %i1;", "f32 f32", "f32", np.divide),
    ("min.f32 %o0, %i0, %i1;", "f32 f32", "f32", np.fmin),
    ("max.NaN.f32 %o0, %i0, %i1;", "f32 f32", "f32", np.maximum),
    ("max.f32 %o0, %i0, %i1, %i2;", "f32 f32 f32", "f32", lambda a, b, c: np.fmax(np.fmax(a, b), c)),
    ("neg.f32 %o0, %i0;", "f32", "f32", np.negative),
    ("abs.f64 %o0, %i0;", "f64", "f64", np.abs),
    ("abs.ftz.f32 %o0, %i0;", "f32", "f32", lambda a: np.abs(flush(a))),
    ("copysign.f32 %o0, %i0, %i1;", "f32 f32", "f32", lambda sign, value: np.copysign(value, sign)),
    ("sqrt.rn.f32 %o0, %i0;", "f32", "f32", np.sqrt),
    ("rsqrt.approx.f32 %o0, %i0;", "f32", "f32", lambda a: 1 / np.sqrt(a)),
    ("rcp.rn.f32 %o0, %i0;", "f32", "f32", lambda a: 1 / a),
    ("ex2.approx.f32 %o0, %i0;", "f32", "f32", np.exp2),
    ("ex2.approx.ftz.f32 %o0, %i0;", "f32", "f32", lambda a: flush(np.exp2(flush(a)))),
    ("lg2.approx.f32 %o0, %i0;", "f32", "f32", np.log2),
    ("sin.approx.f32 %o0, %i0;", "f32", "f32", np.sin),
    ("cos.approx.f32 %o0, %i0;", "f32", "f32", np.cos),
    ("tanh.approx.f32 %o0, %i0;", "f32", "f32", np.tanh),
    ("selp.f32 %o0, %i0, %i1, %i2;", "f32 f32 pred", "f32", lambda a, b, p: np.where(p, a, b)),
    ("mov.f32 %o0, %i0;", "f32", "f32", lambda a: a),
    ("slct.f32.f32 %o0, %i0, %i1, %i2;", "f32 f32 f32", "f32", lambda a, b, c: np.where(c >= 0, a, b)),
    ("cvt.f64.f32 %o0, %i0;", "f32", "f64", lambda a: a.astype(np.float64)),
    ("cvt.rn.f32.f64 %o0, %i0;", "f64", "f32", lambda a: a.astype(np.float32)),
    ("cvt.rn.f32.s32 %o0, %i0;", "s32", "f32", lambda a: a.astype(np.float32)),
    ("cvt.rn.f32.u64 %o0, %i0;", "u64", "f32", lambda a: a.astype(np.float32)),
    ("cvt.rn.f64.s64 %o0, %i0;", "s64", "f64", lambda a: a.astype(np.float64)),
    ("cvt.rni.f32.f32 %o0, %i0;", "f32", "f32", np.rint),
    ("cvt.rmi.f32.f32 %o0, %i0;", "f32", "f32", np.floor),
    ("cvt.rpi.f32.f32 %o0, %i0;", "f32", "f32", np.ceil),
    ("cvt.rzi.f32.f32 %o0, %i0;", "f32", "f32", np.trunc),
    ("cvt.sat.f32.f32 %o0, %i0;", "f32", "f32", lambda a: np.clip(np.nan_to_num(a, nan=0), 0, 1)),
    ("cvt.f32.f16 %o0, %i0;", "f16", "f32", lambda a: a.astype(np.float32)),
    ("cvt.rn.f16.f32 %o0, %i0;", "f32", "f16", lambda a: a.astype(np.float16)),
    ("cvt.rn.f16.f64 %o0, %i0;", "f64", "f16", lambda a: a.astype(np.float16)),
    ("cvt.f32.bf16 %o0, %i0;", "bf16", "f32", lambda a: a),
]  # fmt: skip


@pytest.mark.parametrize("divergent", [False, True], ids=["together", "divergent"])
@pytest.mark.parametrize(("snippet", "inputs", "output", "oracle"), CASES, ids=[case[0] for case in CASES])
def test_as_numpy_computes_it(snippet: str, inputs: str, output: str, oracle: Oracle, divergent: bool) -> None:
    kinds = inputs.split()
    columns = [samples(kind, LANES, seed) for seed, kind in enumerate(kinds)]
    (found,) = compute(snippet, list(zip(kinds, columns, strict=True)), [output], divergent=divergent)
    with np.errstate(all="ignore"):
        wanted = np.asarray(oracle(*(numbers(kind, column) for kind, column in zip(kinds, columns, strict=True))))
    if divergent:
        wanted = np.where(np.arange(LANES) % 2 == 1, wanted, wanted.dtype.type(0))
    same(found.view(DTYPES[output]), wanted.astype(DTYPES[output]))


def test_fma_of_doubles_is_within_one_unit() -> None:
    a, b, c = (samples("f64", LANES, seed) for seed in range(3))
    (found,) = compute("fma.rn.f64 %o0, %i0, %i1, %i2;", [("f64", x) for x in (a, b, c)], ["f64"])
    with np.errstate(all="ignore"):
        wanted = fused(a, b, c, np.float64)
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(finite, np.isfinite(found.view(np.float64)))
    got, wanted = found.view(np.float64)[finite], wanted[finite]
    assert (np.abs(got - wanted) <= np.spacing(np.abs(wanted))).all()


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize(
    ("snippet", "oracle"),
    [
        ("fma.{mode}.f32 %o0, %i0, %i1, %i2;", lambda a, b, c: a * b + c),
        ("add.{mode}.f32 %o0, %i0, %i1;", lambda a, b, c: a + b),
        ("sub.{mode}.f32 %o0, %i0, %i1;", lambda a, b, c: a - b),
        ("mul.{mode}.f32 %o0, %i0, %i1;", lambda a, b, c: a * b),
    ],
)
def test_directed_rounding(snippet: str, oracle: Callable[..., Fraction], mode: str) -> None:
    """The result lies on the right side of the exact rational, and no number lies between them."""
    columns = [samples("f32", LANES, seed) for seed in range(3)]
    for column in columns:
        column[~np.isfinite(column) | (np.abs(column) > 1e15)] = 1 / 3
    (found,) = compute(snippet.format(mode=mode), [("f32", column) for column in columns], ["f32"])
    for lane, got in enumerate(found.view(np.float32)):
        exact = oracle(*(Fraction(float(column[lane])) for column in columns))
        up = mode == "rp" or (mode == "rz" and exact < 0)
        beyond = np.nextafter(got, np.float32(-np.inf if up else np.inf))
        assert Fraction(float(got)) >= exact if up else Fraction(float(got)) <= exact
        assert Fraction(float(beyond)) < exact if up else Fraction(float(beyond)) > exact


def test_rounding_modes_of_narrowing() -> None:
    a = samples("f64", LANES)
    keep = np.isfinite(a) & (np.abs(a) < 1e38)
    a[~keep] = 1 / 3
    near = a.astype(np.float32)
    for mode, allowed in (("rz", np.abs), ("rm", lambda x: x), ("rp", np.negative)):
        (found,) = compute(f"cvt.{mode}.f32.f64 %o0, %i0;", [("f64", a)], ["f32"])
        got = found.view(np.float32)
        assert (allowed(got.astype(np.float64)) <= allowed(a)).all(), mode
        assert (np.abs(got - near) <= np.spacing(np.abs(near))).all(), mode


INTEGERS = [
    ("cvt.rni.s32.f32 %o0, %i0;", "f32", "s32", np.rint),
    ("cvt.rzi.s32.f32 %o0, %i0;", "f32", "s32", np.trunc),
    ("cvt.rmi.u32.f32 %o0, %i0;", "f32", "u32", np.floor),
    ("cvt.rpi.u32.f64 %o0, %i0;", "f64", "u32", np.ceil),
    ("cvt.rzi.s32.f16 %o0, %i0;", "f16", "s32", np.trunc),
]


@pytest.mark.parametrize(("snippet", "source", "target", "rounding"), INTEGERS, ids=[case[0] for case in INTEGERS])
def test_floats_to_integers_clamp(snippet: str, source: str, target: str, rounding: Oracle) -> None:
    a = samples(source, LANES)
    (found,) = compute(snippet, [(source, a)], [target])
    dtype = np.int32 if target == "s32" else np.uint32
    info = np.iinfo(dtype)

    def convert(value: float) -> int:
        return 0 if np.isnan(value) else int(min(max(rounding(np.float64(value)), info.min), info.max))

    np.testing.assert_array_equal(found.view(dtype), np.array([convert(float(value)) for value in a], dtype))


COMPARISONS: list[tuple[str, Oracle]] = [
    ("lt", np.less),
    ("le", np.less_equal),
    ("ne", lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)),
    ("equ", lambda a, b: (a == b) | np.isnan(a) | np.isnan(b)),
    ("neu", np.not_equal),
    ("gtu", lambda a, b: ~(a <= b)),
    ("geu", lambda a, b: ~(a < b)),
    ("num", lambda a, b: ~np.isnan(a) & ~np.isnan(b)),
    ("nan", lambda a, b: np.isnan(a) | np.isnan(b)),
]


@pytest.mark.parametrize(("name", "oracle"), COMPARISONS, ids=[case[0] for case in COMPARISONS])
@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
def test_comparisons(name: str, kind: str, oracle: Oracle) -> None:
    a, b = samples(kind, LANES, 1), samples(kind, LANES, 2)
    b[::5] = a[::5]
    (found,) = compute(f"setp.{name}.{kind} %o0, %i0, %i1;", [(kind, a), (kind, b)], ["pred"])
    np.testing.assert_array_equal(found.astype(np.bool_), oracle(numbers(kind, a), numbers(kind, b)))


def test_classes_of_numbers() -> None:
    a = samples("f32", LANES)
    tests = {"finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan, "number": lambda x: ~np.isnan(x)}
    tests["subnormal"] = lambda x: (x != 0) & (np.abs(x) < np.float32(2.0**-126))
    tests["normal"] = lambda x: np.isfinite(x) & (np.abs(x) >= np.float32(2.0**-126))
    for name, oracle in tests.items():
        (found,) = compute(f"testp.{name}.f32 %o0, %i0;", [("f32", a)], ["pred"])
        np.testing.assert_array_equal(found.astype(np.bool_), oracle(a), err_msg=name)


# Half precision, one and two in a register


def halves(kind: str, seed: int) -> Array:
    """Pairs of halves as uint32."""
    part = samples(kind, 2 * LANES, seed)
    return np.ascontiguousarray(part).view(np.uint32)


def unpacked(kind: str, packed: Array) -> Array:
    """The numbers of packed halves."""
    parts = np.ascontiguousarray(packed).view(np.uint16)
    return from_bf16(parts) if kind == "bf16" else parts.view(np.float16)


def to_half(exact: Any, kind: str) -> Any:
    """A finite rational as f16, or as a bf16 in float32."""
    if kind == "f16":
        return rounded(exact, np.float16)
    if exact == 0:
        return np.float32(0)
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    step = Fraction(2) ** (max(exponent, -126) - 7)
    quotient, rest = divmod(magnitude, step)
    quotient += rest * 2 > step or (rest * 2 == step and quotient % 2 == 1)
    value = float(quotient * step)
    return np.float32(np.copysign(value if value < 3.4e38 else np.inf, 1 if exact > 0 else -1))


HALF_OPERATIONS: list[tuple[str, int, Callable[..., Fraction]]] = [
    ("add.rn.f16x2 %o0, %i0, %i1;", 2, lambda a, b: a + b),
    ("add.rn.bf16x2 %o0, %i0, %i1;", 2, lambda a, b: a + b),
    ("sub.f16x2 %o0, %i0, %i1;", 2, lambda a, b: a - b),
    ("mul.f16x2 %o0, %i0, %i1;", 2, lambda a, b: a * b),
    ("mul.bf16x2 %o0, %i0, %i1;", 2, lambda a, b: a * b),
    ("fma.rn.f16x2 %o0, %i0, %i1, %i2;", 3, lambda a, b, c: a * b + c),
    ("fma.rn.bf16x2 %o0, %i0, %i1, %i2;", 3, lambda a, b, c: a * b + c),
    ("fma.rn.relu.bf16x2 %o0, %i0, %i1, %i2;", 3, lambda a, b, c: max(a * b + c, Fraction(0))),
    ("min.f16x2 %o0, %i0, %i1;", 2, min),
    ("max.NaN.bf16x2 %o0, %i0, %i1;", 2, max),
    ("neg.bf16x2 %o0, %i0;", 1, lambda a: -a),
    ("abs.f16x2 %o0, %i0;", 1, abs),
]


@pytest.mark.parametrize(("snippet", "count", "oracle"), HALF_OPERATIONS, ids=[case[0] for case in HALF_OPERATIONS])
def test_packed_halves_round_once(snippet: str, count: int, oracle: Callable[..., Fraction]) -> None:
    kind = "bf16" if "bf16" in snippet else "f16"
    packed = [halves(kind, seed) for seed in range(count)]
    (found,) = compute(snippet, [("b32", value) for value in packed], ["b32"])
    columns, got = [unpacked(kind, value) for value in packed], unpacked(kind, found)
    finite = np.logical_and.reduce([np.isfinite(column) for column in columns])
    for lane in np.flatnonzero(finite):
        exact = oracle(*(Fraction(float(column[lane])) for column in columns))
        assert got[lane] == to_half(exact, kind), (snippet, [column[lane] for column in columns])


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_single_halves(kind: str) -> None:
    a, b = samples(kind, LANES, 1), samples(kind, LANES, 2)
    (found,) = compute(f"add.{kind} %o0, %i0, %i1;", [(kind, a), (kind, b)], [kind])
    x, y = numbers(kind, a).astype(np.float64), numbers(kind, b).astype(np.float64)
    with np.errstate(all="ignore"):
        wanted = x + y
    for lane in np.flatnonzero(np.isfinite(wanted)):
        assert numbers(kind, found)[lane] == to_half(Fraction(wanted[lane]), kind)
    np.testing.assert_array_equal(np.isnan(numbers(kind, found)), np.isnan(wanted))


def test_pairs_of_halves_from_floats() -> None:
    a, b = samples("f32", LANES, 1), samples("f32", LANES, 2)
    inputs = [("f32", a), ("f32", b)]
    (bf16, f16, relu) = compute(
        "cvt.rn.bf16x2.f32 %o0, %i0, %i1; cvt.rn.f16x2.f32 %o1, %i0, %i1; cvt.rn.relu.bf16x2.f32 %o2, %i0, %i1;",
        inputs,
        ["b32", "b32", "b32"],
    )
    for packed, kind, lower, upper in ((bf16, "bf16", b, a), (f16, "f16", b, a)):
        with np.errstate(over="ignore"):
            wanted = [from_bf16(to_bf16(x)) if kind == "bf16" else x.astype(np.float16) for x in (lower, upper)]
        same(unpacked(kind, packed)[0::2], wanted[0])
        same(unpacked(kind, packed)[1::2], wanted[1])
    negative = np.isfinite(a) & (a < 0)
    assert (unpacked("bf16", relu)[1::2][negative] == 0).all()


def test_bf16_rounds_to_nearest_even_for_every_upper_half() -> None:
    upper = np.arange(0x3F80, 0x4080, dtype=np.uint32)
    for lower in (0, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        bits = (upper << 16) | np.uint32(lower)
        (found,) = compute("cvt.rn.bf16.f32 %o0, %i0;", [("f32", bits.view(np.float32))], ["bf16"])
        up = (lower > 0x8000) | ((lower == 0x8000) & (upper % 2 == 1))
        np.testing.assert_array_equal(found, (upper + up).astype(np.uint16))


def test_truncation_to_bf16() -> None:
    a = samples("f32", LANES)
    (found,) = compute("cvt.rz.bf16.f32 %o0, %i0;", [("f32", a)], ["bf16"])
    finite = np.isfinite(a)
    np.testing.assert_array_equal(found[finite], (a.view(np.uint32) >> 16).astype(np.uint16)[finite])


def test_tf32_rounds_ties_away() -> None:
    a = samples("f32", LANES)
    a[:4] = np.array([0x3F801000, 0x3F801001, 0x3F800FFF, 0xBF801000], np.uint32).view(np.float32)
    (found,) = compute("cvt.rna.tf32.f32 %o0, %i0;", [("f32", a)], ["b32"])
    bits = a.view(np.uint32).astype(np.uint64)
    wanted = ((bits + 0x1000) & 0xFFFFE000).astype(np.uint32)
    finite = np.isfinite(a)
    np.testing.assert_array_equal(found[finite], wanted[finite])


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_fp8_pairs(kind: str) -> None:
    values = FP8[kind]
    finite = np.unique(values[np.isfinite(values)])
    middles = (finite[1:] + finite[:-1]) / 2
    probes = np.concatenate([finite, middles, np.nextafter(middles, np.float32(9e9)), [1e9, -1e9, np.inf, np.nan]])
    a = np.resize(probes.astype(np.float32), -(-len(probes) // 32) * 32)
    b = np.roll(a, 1)
    snippet = f"cvt.rn.satfinite.{kind}x2.f32 %o0, %i0, %i1; cvt.rn.f16x2.{kind}x2 %o1, %o0;"
    found, back = compute(snippet, [("f32", a), ("f32", b)], ["b16", "b32"])
    codes = np.ascontiguousarray(found).view(np.uint8)
    for column, source in ((codes[1::2], a), (codes[0::2], b)):
        got = values[column]
        nan = np.isnan(source)
        np.testing.assert_array_equal(np.isnan(got), nan)
        clipped = np.clip(source[~nan].astype(np.float64), finite[0], finite[-1])
        distance = np.abs(finite[None, :] - clipped[:, None]).min(axis=1)
        np.testing.assert_array_equal(np.abs(got[~nan] - clipped), distance)
        tie = np.isin(clipped, middles)
        assert (column[~nan][tie] % 2 == 0).all()
    with np.errstate(over="ignore"):
        same(back.view(np.float16), values[codes].astype(np.float16))
