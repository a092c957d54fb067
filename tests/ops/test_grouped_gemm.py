"""`flashmla::grouped_gemm`, and the out variants of `gemm` and `bmm`, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.errors import from_message
from flashmla_ops.ops.grouped_gemm import runs
from tests.ops.test_gemm import UNIT, build, gemm_cases
from tests.ops.test_opcheck import check

SIZES = st.lists(st.integers(0, 6) | st.sampled_from([32, 33, 40]), min_size=1, max_size=6)


def operands(sizes: list[int], n: int, k: int, dtype: str, seed: int, strided: bool = False) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    wide = 2 * k if strided else k
    a = torch.randn(sum(sizes), wide, generator=generator).to(getattr(torch, dtype))[:, :k]
    weight = torch.randn(len(sizes), n, wide, generator=generator).to(a.dtype)[..., :k]
    return a, weight, torch.tensor([0, *sizes]).cumsum(0, dtype=torch.int32)


@settings(max_examples=200)
@given(
    sizes=SIZES,
    n=st.integers(1, 70),
    k=st.integers(1, 140),
    dtype=st.sampled_from(sorted(UNIT)),
    strided=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_grouped_gemm(sizes: list[int], n: int, k: int, dtype: str, strided: bool, seed: int) -> None:
    a, weight, offsets = operands(sizes, n, k, dtype, seed, strided)
    actual = torch.ops.flashmla.grouped_gemm(a, weight, offsets)
    groups = list(runs(offsets, a.size(0)))
    expected = reference.grouped_gemm(a, weight, groups)
    size = reference.grouped_gemm(a.abs(), weight.abs(), groups)
    bound = 2.0**-21 * size + 1.01 * UNIT[dtype] * expected.abs() + 2.0**-24
    error = (actual.double() - expected).abs()
    assert (error <= bound).all(), f"sizes={sizes} n={n} k={k} dtype={dtype!r} strided={strided} seed={seed}"


def test_a_group_sees_its_own_weight_only() -> None:
    a, weight, offsets = operands([2, 3], 8, 16, "bfloat16", 0)
    expected = torch.ops.flashmla.grouped_gemm(a, weight, offsets)
    weight[0] = torch.nan
    assert torch.equal(torch.ops.flashmla.grouped_gemm(a, weight, offsets)[2:], expected[2:])


@pytest.mark.parametrize(
    ("offsets", "actual"),
    [([1, 2, 5], "1 at [0]"), ([0, 3, 2], "2 at [2]"), ([0, 6, 6], "6 at [1]"), ([0, 2, 4], "4 at [2]")],
)
def test_bad_offsets_are_named(offsets: list[int], actual: str) -> None:
    a, weight, _ = operands([2, 3], 8, 16, "float32", 0)
    with pytest.raises(RuntimeError) as raised:
        torch.ops.flashmla.grouped_gemm(a, weight, torch.tensor(offsets, dtype=torch.int32))
    error = from_message(str(raised.value))
    assert (error.argument, error.actual) == ("offsets", actual)


A, WEIGHT, OFFSETS = operands([2, 3], 8, 16, "float32", 0)
BAD = {
    "a": ({"a": torch.randn(5, 15)}, "rows of 16 elements, as weight"),
    "weight": ({"weight": WEIGHT.bfloat16()}, "float32"),
    "offsets": ({"offsets": OFFSETS.long()}, "int32"),
}


@pytest.mark.parametrize("argument", BAD)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_bad_argument_is_named(argument: str, device: str) -> None:
    changed, expected = BAD[argument]
    inputs = {"a": A, "weight": WEIGHT, "offsets": OFFSETS} | changed
    with pytest.raises(RuntimeError) as raised:
        torch.ops.flashmla.grouped_gemm(**{name: tensor.to(device) for name, tensor in inputs.items()})
    error = from_message(str(raised.value))
    assert (error.argument, error.expected) == (argument, expected)


def test_a_gradient_is_refused() -> None:
    with pytest.raises(RuntimeError, match="argument 'weight' requires a gradient"):
        torch.ops.flashmla.grouped_gemm(A, WEIGHT.clone().requires_grad_(), OFFSETS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_opcheck(dtype: str) -> None:
    a, weight, offsets = operands([2, 0, 35], 8, 16, dtype, 0)
    ops, out = torch.ops.flashmla, torch.zeros(37, 8, dtype=a.dtype)
    check(ops.grouped_gemm.default, a, weight, offsets)
    check(ops.grouped_gemm.out, a, weight, offsets, out=out)
    check(ops.gemm.out, a, weight[0], out=out)
    check(ops.bmm.out, a.expand(3, 37, 16), weight.mT, out=torch.zeros(3, 37, 8, dtype=a.dtype))


@settings(max_examples=100)
@given(gemm_cases(), st.booleans())
def test_gemm_out_is_gemm(case: object, strided: bool) -> None:
    inputs = build(case)
    expected = torch.ops.flashmla.gemm(**inputs)
    room = torch.full((*expected.shape[:-1], 2 * expected.size(-1)), torch.nan, dtype=expected.dtype)
    out = room[..., : expected.size(-1)] if strided else torch.empty_like(expected)
    assert torch.ops.flashmla.gemm.out(**inputs, out=out) is None
    assert torch.equal(out, expected), case
    assert not strided or room[..., expected.size(-1) :].isnan().all()


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"), [((5, 7), "float32", "shape [5, 8]"), ((5, 8), "float16", "float32")]
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_bad_out_is_named(shape: tuple[int, int], dtype: str, expected: str, device: str) -> None:
    out = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    with pytest.raises(RuntimeError) as raised:
        torch.ops.flashmla.gemm.out(A.to(device), WEIGHT[0].to(device), out=out)
    error = from_message(str(raised.value))
    assert (error.argument, error.expected) == ("out", expected)


def check_fake(op: object, **inputs: object) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    actual = op(**inputs)
    with FakeTensorMode() as mode:
        fake = op(**{name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in inputs.items()})
    assert (fake.shape, fake.dtype, fake.stride()) == (actual.shape, actual.dtype, actual.stride()), inputs


@settings(max_examples=500)
@given(gemm_cases())
def test_the_fake_of_gemm_has_the_shape_dtype_and_strides_of_the_result(case: object) -> None:
    check_fake(torch.ops.flashmla.gemm, **build(case))


@settings(max_examples=500)
@given(
    batch=st.integers(0, 5),
    m=st.integers(0, 9) | st.sampled_from([32, 33, 70]),
    n=st.integers(0, 70),
    k=st.integers(0, 70),
    dtype=st.sampled_from(sorted(UNIT)),
    along_k=st.booleans(),
    turned=st.booleans(),
)
def test_the_fake_of_bmm_has_the_shape_dtype_and_strides_of_the_result(
    batch: int, m: int, n: int, k: int, dtype: str, along_k: bool, turned: bool
) -> None:
    of = {"dtype": getattr(torch, dtype)}
    a = torch.ones(m, batch, k, **of).transpose(0, 1) if turned else torch.ones(batch, m, k, **of)
    weight = torch.ones(batch, n, k, **of).mT if along_k else torch.ones(batch, k, n, **of)
    check_fake(torch.ops.flashmla.bmm, a=a, weight=weight)


@settings(max_examples=500)
@given(
    sizes=st.lists(st.integers(0, 6) | st.just(40), max_size=5),
    n=st.integers(0, 30),
    k=st.integers(1, 30),
    dtype=st.sampled_from(sorted(UNIT)),
    strided=st.booleans(),
)
def test_the_fake_of_grouped_gemm_has_the_shape_dtype_and_strides_of_the_result(
    sizes: list[int], n: int, k: int, dtype: str, strided: bool
) -> None:
    a, weight, offsets = operands(sizes, n, k, dtype, 0, strided)
    check_fake(torch.ops.flashmla.grouped_gemm, a=a, weight=weight, offsets=offsets)


def test_compiled() -> None:
    @torch.compile(fullgraph=True, dynamic=True)
    def model(a: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        return torch.ops.flashmla.grouped_gemm(a * 2, weight, offsets) + 1

    for sizes in ([2, 3], [1, 4], [0, 40]):
        a, weight, offsets = operands(sizes, 8, 16, "float32", 0)
        expected = torch.ops.flashmla.grouped_gemm(a * 2, weight, offsets) + 1
        torch.testing.assert_close(model(a, weight, offsets), expected)
