"""One case made concrete: operands, the result in float64, and how far a correct kernel may be from it.

The bound, elementwise, where scales include alpha, and the slope is that of the activation (1.13 of silu and gelu):

    |error| <= 1 ulp of the output + slope * 2^-23 sqrt(k) (|A| |B|) * |scales|

for one rounding of the result and float32 sums in any order. Hopper keeps 13 fraction bits of what it adds to an fp8
sum (`FP8_SUMS`). gelu's 1 + erf(x / sqrt(2)) cancels where x is negative:
there, 2^-21 (|A| |B| * |scales| + |bias|) more. A gate multiplies the second term. Serial split-K keeps its partial
sums in the output's type: each of the splits may add half an ulp of |A| |B|. Small integers
have exact sums: with no activation or relu, and no split past what the output holds exactly, nothing may differ at all.
Where float64 has a NaN or an infinity, the output must have it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import erf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cutlass_kernels import emulator
from cutlass_kernels.gemm.config import GemmConfig
from cutlass_kernels.verify.cases import Case

Array = NDArray[Any]
Float = NDArray[np.float64]

#: Bits of the significand, the leading one included, and the exponent of the smallest normal number.
FORMATS = {"bf16": (8, -126), "fp16": (11, -14), "f32": (24, -126), "e4m3": (4, -6)}
#: How far the fp8 sums of a Hopper device are from exact ones, over |A| |B|. In each step of 32 in k, its tensor cores
#: align products and sum to the largest exponent and cut them off after 13 fraction bits; CUTLASS adds what comes out
#: to float32 sums every 128 in k. Measured on an H100; a model of it comes to 2^-12.2 at most on our cases.
FP8_SUMS = 2.0**-11
_SLOPES = {"none": 1.0, "relu": 1.0, "silu": 1.13, "gelu": 1.13}
#: A "special" operand has these among its normal elements: the last two are subnormal. e4m3 has no infinities.
_SPECIAL = {
    "bf16": (np.nan, np.inf, -np.inf, 0.0, -0.0, 2.0**-133, -(2.0**-130)),
    "fp16": (np.nan, np.inf, -np.inf, 0.0, -0.0, 2.0**-24, -(2.0**-20)),
    "f32": (np.nan, np.inf, -np.inf, 0.0, -0.0, 2.0**-149, -(2.0**-130)),
    "e4m3": (np.nan, 0.0, -0.0, 2.0**-9, -(2.0**-8)),
}


def encode(values: Float, element: str) -> Array:
    """Values as they lie in memory; bf16 and e4m3 as bits."""
    if element == "bf16":
        return np.asarray(emulator.to_bf16(values.astype(np.float32)))
    if element == "e4m3":
        return np.asarray(emulator.to_e4m3(values.astype(np.float32)))
    kinds: dict[str, Any] = {"fp16": np.float16, "f32": np.float32, "s8": np.int8}
    return values.astype(kinds[element])


def decode(stored: Array, element: str) -> Float:
    if element == "bf16":
        return np.asarray(emulator.from_bf16(stored), np.float64)
    if element == "e4m3":
        return np.asarray(emulator.from_e4m3(stored), np.float64)
    return stored.astype(np.float64)


def ulp(values: Float, element: str) -> Float:
    """The distance of neighbouring numbers of a format around each value."""
    bits, smallest = FORMATS[element]
    exponent = np.floor(np.log2(np.maximum(np.abs(values), 2.0**smallest)))
    return np.asarray(2.0 ** (exponent - bits + 1), np.float64)


@dataclass(frozen=True)
class Problem:
    """Operands by the names of the C ABI, as stored, and what is expected of d [batch, m, n]."""

    config: GemmConfig
    case: Case
    operands: dict[str, Array]
    alpha: float
    beta: float
    expected: Float
    bound: Float
    exact: bool

    @property
    def stored_type(self) -> np.dtype[Any]:
        """The numpy type in which d is stored."""
        return encode(np.zeros(1), self.config.d).dtype

    @property
    def stored_bytes(self) -> int:
        return self.stored_type.itemsize

    def mismatches(self, stored: Array) -> tuple[int, float]:
        """Elements outside the bound (all that differ at all, if exact), and the largest error over its bound."""
        actual = decode(stored, self.config.d)
        same = (actual == self.expected) | (np.isnan(actual) & np.isnan(self.expected))
        finite = np.isfinite(actual) & np.isfinite(self.expected)
        error = np.full(actual.shape, np.inf)
        np.subtract(actual, self.expected, out=error, where=finite)
        error = np.where(same, 0.0, np.abs(error))
        ratio = float(np.max(error / self.bound, initial=0.0))
        if self.exact:
            rounded = decode(encode(self.expected, self.config.d), self.config.d)
            return int(np.count_nonzero(actual != rounded)), ratio
        return int(np.count_nonzero(error > self.bound)), ratio


def build(config: GemmConfig, case: Case) -> Problem:
    """Draw operands and compute the expected result."""
    random = np.random.default_rng(case.seed + 7919 * case.k + case.m)
    shapes = _shapes(config, case)
    operands: dict[str, Array] = {}
    values: dict[str, Float] = {}
    for name, (shape, element) in shapes.items():
        drawn = _draw(random, case, name, shape, element)
        operands[name] = encode(drawn, element)
        values[name] = decode(operands[name], element)
    alpha = 1.0 if case.fill == "integers" else 0.75
    beta = 0.0 if "c" not in operands else 1.0 if case.fill == "integers" else 0.5
    with np.errstate(invalid="ignore", over="ignore"):
        expected, bound = _expect(config, case, values, alpha, beta)
    exact = case.fill == "integers" and config.epilogue.activation in ("none", "relu") and not config.epilogue.gate
    return Problem(config, case, operands, alpha, beta, expected, bound, exact)


def _shapes(config: GemmConfig, case: Case) -> dict[str, tuple[tuple[int, ...], str]]:
    groups = len(case.groups) if config.family == "grouped" else case.batch
    rows = (case.k, case.n) if config.family == "batched" else (case.n, case.k)
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "a": ((case.batch, case.m, case.k), config.a),
        "weight": ((groups, *rows), config.weight),
    }
    epilogue = config.epilogue
    if epilogue.plain and case.c != "none" and config.family != "grouped":
        shapes["c"] = ((case.batch, 1 if case.c == "row" else case.m, case.n), config.d)
    elif epilogue.gate or epilogue.residual:
        shapes["c"] = ((case.batch, case.m, case.n), config.d)
    if case.optional:
        if epilogue.bias:
            shapes["bias"] = ((case.n,), config.d)
        if epilogue.row_scale:
            shapes["row_scale"] = ((case.m,), "f32")
        if epilogue.col_scale:
            shapes["col_scale"] = ((case.n,), "f32")
    return shapes


def _draw(random: np.random.Generator, case: Case, name: str, shape: tuple[int, ...], element: str) -> Float:
    """Integers: sparse ones and minus ones, so that sums stay where every output format is exact; powers of two."""
    if name.endswith("scale"):
        if case.fill == "integers":
            return np.ldexp(1.0, random.integers(-1, 2, shape)).astype(np.float64)
        return random.uniform(0.5, 2.0, shape) / (8.0 if element == "s8" else 1.0)
    if case.fill == "integers":
        some = random.random(shape) < min(1.0, 64.0 / case.k) if name in ("a", "weight") else True
        return (random.integers(-2, 3, shape) * some).astype(np.float64)
    if element == "s8":
        return random.integers(-127, 128, shape).astype(np.float64)
    drawn = random.standard_normal(shape)
    if case.fill == "special":
        # So that about a third of the sums, and of the elements of bias and c, stay finite.
        some = random.random(shape) < (0.5 / case.k if name in ("a", "weight") else 0.5)
        drawn = np.where(some, random.choice(_SPECIAL[element], shape), drawn)
    return drawn


def _expect(config: GemmConfig, case: Case, values: dict[str, Float], alpha: float, beta: float) -> tuple[Float, Float]:
    sums, sizes = _products(config, case, values["a"], values["weight"])
    scale = np.full((case.m, case.n), alpha)
    if "row_scale" in values:
        scale = scale * values["row_scale"][:, None]
    if "col_scale" in values:
        scale = scale * values["col_scale"][None, :]
    bias = values.get("bias", np.zeros(1))
    result = _activate(config.epilogue.activation, sums * scale + bias)
    size = sizes * np.abs(scale)
    sums_off = 2.0**-23 * np.sqrt(case.k) + (FP8_SUMS if config.a == "e4m3" else 0.0)
    error = _SLOPES[config.epilogue.activation] * sums_off * size
    if config.epilogue.activation == "gelu":
        error = error + 2.0**-21 * (size + np.abs(bias))
    if config.epilogue.gate:
        gate = _activate("silu", values["c"])
        result, error = result * gate, error * np.abs(gate)
    elif "c" in values:
        result = result + (beta if config.epilogue.plain else 1.0) * values["c"]
    if case.splits > 1:
        error = error + case.splits * 0.5 * ulp(size, config.d)
    finite = np.isfinite(result)
    return result, np.where(finite, error, 0.0) + ulp(np.where(finite, result, 1.0), config.d)


def _products(config: GemmConfig, case: Case, a: Float, weight: Float) -> tuple[Float, Float]:
    """A B and |A| |B|, [batch, m, n]."""
    if config.family == "grouped":
        ends = np.cumsum((0, *case.groups))
        runs = [(a[0, ends[g] : ends[g + 1]], weight[g].T) for g in range(len(case.groups))]
        return np.concatenate([x @ w for x, w in runs])[None], np.concatenate([abs(x) @ abs(w) for x, w in runs])[None]
    right = weight if config.family == "batched" else weight.swapaxes(1, 2)
    return a @ right, np.abs(a) @ np.abs(right)


def _activate(name: str, x: Float) -> Float:
    if name == "relu":
        return np.maximum(x, 0.0)
    if name == "silu":
        return np.asarray(x / (1.0 + np.exp(-x)))
    if name == "gelu":
        return np.asarray(0.5 * x * (1.0 + np.vectorize(erf)(x / np.sqrt(2.0))))
    return x
