"""`flashmla::gemm` and `flashmla::bmm` against their float64 definitions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from flashmla_ops import cpu, reference
from flashmla_ops.errors import ArgumentError, from_message
from flashmla_ops.panels import from_panels, pack_int4, to_panels, unpack_int4
from flashmla_ops.reference.gemm import values

FLOATS = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("none", "relu", "gelu", "silu", "silu_mul")
#: One rounding of the result; a second one of the product where many rows go through torch's own.
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True)
class GemmCase:
    m: int = 2
    n: int = 5
    k: int = 7
    dtype: str = "bfloat16"
    weight_dtype: str | None = None  # None: dtype
    out_dtype: str | None = None
    activation: str = "none"
    scale: bool = False
    bias: bool = False
    residual: bool = False
    strided: bool = False
    panels: bool = False
    group: int = 32  # of int4 weights
    group_dtype: str = "float32"
    seed: int = 0

    @property
    def int4(self) -> bool:
        return self.weight_dtype == "int4"


@st.composite
def gemm_cases(draw: st.DrawFn) -> GemmCase:
    dtype = draw(st.sampled_from(FLOATS))
    weight_dtype = draw(st.sampled_from([None, "float32", "bfloat16", "int8"]))
    panels = draw(st.booleans())
    return GemmCase(
        m=draw(st.integers(0, 18) | st.sampled_from([31, 32, 33, 70, 129])),
        n=draw(st.integers(1, 12).map(lambda panel: 16 * panel) if panels else st.integers(1, 140)),
        k=draw(st.integers(1, 70) | st.sampled_from([128, 1024, 1025, 2050, 4100])),
        dtype=dtype,
        weight_dtype=weight_dtype,
        out_dtype=draw(st.sampled_from([None, *FLOATS])),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        scale=weight_dtype == "int8" or draw(st.booleans()),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        strided=draw(st.booleans()),
        panels=panels,
        seed=draw(st.integers(0, 2**31 - 1)),
    )


@st.composite
def int4_cases(draw: st.DrawFn) -> GemmCase:
    group = draw(st.sampled_from([32, 64, 96, 128]))
    return replace(
        draw(gemm_cases()),
        n=16 * draw(st.integers(1, 12)),
        k=group * draw(st.integers(1, 9)),
        weight_dtype="int4",
        scale=True,
        panels=True,
        group=group,
        group_dtype=draw(st.sampled_from(["float32", "bfloat16"])),
    )


def wide(tensor: Tensor, strided: bool) -> Tensor:
    """The same values, as a slice of rows that are longer."""
    return torch.cat([tensor, tensor], dim=-1)[..., : tensor.size(-1)] if strided else tensor


def packed(weight: Tensor, case: GemmCase) -> Tensor:
    if case.int4:
        return pack_int4(weight)
    return to_panels(weight) if case.panels else wide(weight, case.strided)


def build(case: GemmCase) -> dict[str, Tensor | str | torch.dtype | None]:
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)
    out_dtype = None if case.out_dtype is None else getattr(torch, case.out_dtype)
    rows = 2 * case.n if case.activation == "silu_mul" else case.n

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    scale = torch.rand(rows, generator=generator) / 64 if case.scale else None
    if case.int4:
        weight = torch.randint(-8, 8, (rows, case.k), generator=generator, dtype=torch.int8)
        factors = torch.rand(rows, case.k // case.group, generator=generator) / 8
        scale = to_panels(factors.to(getattr(torch, case.group_dtype)))
    elif case.weight_dtype == "int8":
        weight = torch.randint(-127, 128, (rows, case.k), generator=generator, dtype=torch.int8)
    else:
        weight = normal(rows, case.k).to(getattr(torch, case.weight_dtype or case.dtype))
    return {
        "a": wide(normal(case.m, case.k).to(dtype), case.strided),
        "weight": packed(weight, case),
        "bias": normal(rows).to(dtype) if case.bias else None,
        "residual": wide(normal(case.m, case.n).to(out_dtype or dtype), case.strided) if case.residual else None,
        "weight_scale": scale,
        "activation": case.activation,
        "out_dtype": out_dtype,
    }


def check(case: GemmCase) -> None:
    inputs = build(case)
    actual = torch.ops.flashmla.gemm(**inputs)
    out_dtype = inputs.pop("out_dtype") or inputs["a"].dtype
    assert actual.dtype == out_dtype
    expected = reference.gemm(**inputs)
    # Rounding in float32 costs a part of the sum of |a| |w|, carried through an activation of slope at most 1.13.
    size = values(inputs["weight"], inputs["weight_scale"]).abs()
    magnitudes = {"a": inputs["a"].abs(), "weight": size, "activation": "none"}
    if case.activation == "silu_mul":
        parts = reference.gemm(**magnitudes) + 3
        size = parts[..., : case.n] * parts[..., case.n :]
    else:
        size = reference.gemm(**magnitudes) + 3
    many = 2 * UNIT[case.dtype] if case.m > 32 and not case.panels else 0.0
    bound = (2.0**-21 + many) * size + 1.01 * UNIT[str(out_dtype).removeprefix("torch.")] * expected.abs() + 2.0**-24
    error = (actual.double() - expected).abs()
    assert (error <= bound).all(), f"error {(error / bound).max():.3g} of the bound: {case!r}"


@settings(max_examples=600)
@given(gemm_cases())
def test_gemm(case: GemmCase) -> None:
    check(case)


@settings(max_examples=300)
@given(int4_cases())
def test_gemm_of_int4(case: GemmCase) -> None:
    check(case)


@pytest.mark.parametrize("isa", [name for name, supported in cpu.STATE.isas.items() if supported])
@pytest.mark.parametrize("weight_dtype", [None, "int8"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_instruction_set(isa: str, dtype: str, weight_dtype: str | None) -> None:
    with cpu.using(isa):
        for m in (1, 2, 3, 4, 5, 8, 32):
            check(GemmCase(m, 70, 1100, dtype, weight_dtype, None, "silu_mul", True, True, True, True))
            check(GemmCase(m, 3, 33, dtype, weight_dtype, None, "silu", True))
        for m in (*range(1, 10), 12, 17, 31, 130):
            check(GemmCase(m, 144, 1101, dtype, weight_dtype, None, "silu_mul", True, True, True, True, panels=True))
            check(GemmCase(m, 16, 33, dtype, weight_dtype, None, "silu", True, panels=True))


@pytest.mark.parametrize("isa", [name for name, supported in cpu.STATE.isas.items() if supported])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_instruction_set_reads_int4(isa: str, dtype: str) -> None:
    every = GemmCase(n=144, k=1152, dtype=dtype, weight_dtype="int4", activation="silu_mul", panels=True)
    with cpu.using(isa):
        for m in (*range(1, 10), 12, 17, 31, 130):
            check(replace(every, m=m, bias=True, residual=True, strided=True, group=128, group_dtype="bfloat16"))
            check(replace(every, m=m, n=16, k=32, activation="silu"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m", [1, 4, 32, 40])
def test_small_integers_are_exact(dtype: str, m: int) -> None:
    generator = torch.Generator().manual_seed(m)
    a, weight = (
        torch.randint(-3, 4, shape, generator=generator).to(getattr(torch, dtype)) for shape in [(m, 20), (67, 20)]
    )
    expected = (a.long() @ weight.long().T).double()
    assert torch.equal(torch.ops.flashmla.gemm(a, weight).double(), expected)
    assert torch.equal(torch.ops.flashmla.gemm(a, weight, out_dtype=torch.float32).double(), expected)
    panels = torch.ops.flashmla.gemm(a, to_panels(weight[:64]), out_dtype=torch.float32)
    assert torch.equal(panels.double(), expected[:, :64])
    stacked = torch.ops.flashmla.bmm(torch.stack([a, a]), torch.stack([weight.T, weight.T]))
    assert torch.equal(stacked.double(), torch.stack([expected, expected]))


@settings(max_examples=200)
@given(
    batch=st.integers(0, 5),
    m=st.integers(0, 9) | st.sampled_from([32, 33]),
    n=st.integers(1, 70) | st.just(520),
    k=st.integers(1, 140),
    dtype=st.sampled_from(FLOATS),
    along_k=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_bmm(batch: int, m: int, n: int, k: int, dtype: str, along_k: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(m, batch, k, generator=generator).to(getattr(torch, dtype)).transpose(0, 1)
    shape = (batch, n, k) if along_k else (batch, k, n)
    weight = torch.randn(shape, generator=generator).to(a.dtype)
    weight = weight.mT if along_k else weight
    actual, expected = torch.ops.flashmla.bmm(a, weight), reference.bmm(a, weight)
    assert actual.shape == (batch, m, n)
    bound = 2.0**-21 * reference.bmm(a.abs(), weight.abs()) + 1.01 * UNIT[dtype] * expected.abs() + 2.0**-24
    assert ((actual.double() - expected).abs() <= bound).all()


def test_leading_dimensions_are_kept() -> None:
    a, weight = torch.randn(2, 3, 5), torch.randn(4, 5)
    out = torch.ops.flashmla.gemm(a, weight)
    torch.testing.assert_close(out, torch.nn.functional.linear(a, weight))
    vector = torch.ops.flashmla.gemm(a[0, 0], weight)
    torch.testing.assert_close(vector, torch.nn.functional.linear(a[0, 0], weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 33])
def test_opcheck(dtype: torch.dtype, m: int) -> None:
    a, weight, bias = torch.randn(m, 16, dtype=dtype), torch.randn(24, 16, dtype=dtype), torch.randn(24, dtype=dtype)
    residual = torch.randn(m, 12, dtype=dtype)
    opcheck(torch.ops.flashmla.gemm.default, (a, weight, bias, residual), {"activation": "silu_mul"})
    opcheck(torch.ops.flashmla.gemm.default, (a[None], weight), {"out_dtype": torch.float32})
    opcheck(torch.ops.flashmla.gemm.default, (a, to_panels(weight[:16]), bias[:16]))
    opcheck(torch.ops.flashmla.bmm.default, (a.expand(3, m, 16), weight.T.expand(3, 16, 24)))


A, WEIGHT = torch.randn(2, 8), torch.randn(6, 8)
BAD = {
    "activation": ({"activation": "swish"}, "one of none, relu, gelu, silu, silu_mul"),
    "a": ({"a": torch.randn(2, 7)}, "rows of 8 elements, as weight"),
    "weight": ({"weight": torch.ones(6, 8, dtype=torch.int8)}, "weight_scale with int8"),
    "dimensions of weight": ({"weight": torch.ones(8)}, "shape [n, k] or [n / 16, k, 16]"),
    "panels": ({"weight": torch.ones(2, 8, 15)}, "contiguous [n / 16, k, 16]"),
    "strides of panels": ({"weight": torch.ones(2, 16, 8).mT}, "contiguous [n / 16, k, 16]"),
    "gates": ({"weight": torch.ones(3, 8, 16), "activation": "silu_mul"}, "an even number of panels with silu_mul"),
    "rows of int4": ({"weight": torch.ones(6, 1, dtype=torch.int32)}, "int4 in panels [n / 16, k / 8, 16]"),
    "int4": ({"weight": torch.ones(2, 1, 16, dtype=torch.int32)}, "weight_scale with int4"),
    "weight_scale": ({"weight_scale": torch.ones(5)}, "6 elements, as weight"),
    "bias": ({"bias": torch.ones(6, dtype=torch.bfloat16)}, "float32"),
    "residual": ({"residual": torch.ones(2, 5)}, "shape [2, 6]"),
    "out_dtype": ({"out_dtype": torch.int32}, "float32, bfloat16 or float16"),
}


@pytest.mark.parametrize("argument", BAD)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_bad_argument_is_named(argument: str, device: str) -> None:
    changed, expected = BAD[argument]
    inputs = {"a": A, "weight": WEIGHT} | changed
    inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    with pytest.raises(RuntimeError) as raised:
        torch.ops.flashmla.gemm(**inputs)
    error = from_message(str(raised.value))
    assert (error.argument, error.expected) == (argument if argument in changed else "weight", expected)


def test_a_gradient_is_refused() -> None:
    weight = WEIGHT.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="argument 'weight' requires a gradient"):
        torch.ops.flashmla.gemm(A, weight)
    with torch.no_grad():
        torch.ops.flashmla.gemm(A, weight)


@given(st.integers(0, 4), st.integers(0, 9), st.sampled_from(["float32", "bfloat16", "int8"]))
def test_panels_and_back(panels: int, k: int, dtype: str) -> None:
    weight = torch.arange(16 * panels * k).view(16 * panels, k).to(getattr(torch, dtype))
    packed = to_panels(weight)
    assert packed.shape == (panels, k, 16)
    assert packed.is_contiguous()
    assert torch.equal(from_panels(packed), weight)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (torch.ones(32), "shape [n / 16, k / group, 16]"),
        (torch.ones(2, 2, 16, dtype=torch.float16), "float32 or bfloat16 with int4"),
        (torch.ones(2, 16, 2).mT, "contiguous panels"),
        (torch.ones(3, 2, 16), "2 panels, as weight"),
        (torch.ones(2, 2, 15), "16 columns of a panel"),
        (torch.ones(2, 3, 16), "groups of a multiple of 32 elements of k 64"),
        (torch.ones(2, 4, 16), "groups of a multiple of 32 elements of k 64"),
        (torch.ones(2, 0, 16), "groups of a multiple of 32 elements of k 64"),
    ],
)
def test_bad_scales_of_int4_are_named(scale: Tensor, expected: str) -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.ops.flashmla.gemm(torch.ones(2, 64), torch.ones(2, 8, 16, dtype=torch.int32), weight_scale=scale)
    error = from_message(str(raised.value))
    assert (error.argument, error.expected) == ("weight_scale", expected)


@given(st.integers(0, 4), st.integers(0, 9), st.integers(0, 2**31 - 1))
def test_int4_and_back(panels: int, dwords: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (16 * panels, 8 * dwords), generator=generator, dtype=torch.int8)
    packed = pack_int4(values)
    assert packed.shape == (panels, dwords, 16)
    assert torch.equal(unpack_int4(packed), values)


def test_int4_compiles() -> None:
    weight, scale = pack_int4(torch.randint(-8, 8, (32, 64))), torch.rand(2, 2, 16)
    opcheck(torch.ops.flashmla.gemm.default, (torch.randn(3, 64), weight, None, None, scale))

    def f(a: Tensor) -> Tensor:
        return torch.ops.flashmla.gemm(a, weight, weight_scale=scale).relu() + 1

    a = torch.randn(3, 64)
    torch.testing.assert_close(torch.compile(f, backend="flashmla", fullgraph=True)(a), f(a))


def test_what_is_no_panel_is_named() -> None:
    with pytest.raises(ArgumentError, match="a multiple of 16, got shape"):
        to_panels(torch.ones(17, 3))
    with pytest.raises(ArgumentError, match="argument 'panels': expected shape"):
        from_panels(torch.ones(2, 3, 15))
    with pytest.raises(ArgumentError, match="n a multiple of 16 and k of 8"):
        pack_int4(torch.ones(16, 12))
    with pytest.raises(ArgumentError, match="argument 'panels': expected int32, got float32"):
        unpack_int4(torch.ones(2, 3, 16))
