"""The CUDA implementations of gemm, bmm and grouped_gemm, on CPU memory with interpreted kernels."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cutlass_kernels.gemm.choose import Choice, Fallback
from cutlass_kernels.gemm.problem import Device
from flashmla_ops import reference
from flashmla_ops.cuda import aten, gemm
from flashmla_ops.ops.grouped_gemm import runs
from flashmla_ops.reference.gemm import values
from tests.cuda.interpreter import A100, H100, Fleet
from tests.ops.test_gemm import UNIT, GemmCase, build, gemm_cases
from tests.ops.test_grouped_gemm import operands

DEVICES = st.sampled_from([A100, H100, Device((7, 5), 40, 65536)])


@st.composite
def cases(draw: st.DrawFn) -> GemmCase:
    """Half of the cases in multiples of 16, which kernels take."""
    case = draw(gemm_cases())
    if draw(st.booleans()):
        sizes = {"n": 16 * (case.n // 16 + 1), "k": 16 * (case.k // 16 + 1)}
        case = GemmCase(**{**case.__dict__, **sizes, "dtype": draw(st.sampled_from(["bfloat16", "float16"]))})
    return case


def close(actual: Tensor, case: GemmCase) -> None:
    """The bound of tests/ops/test_gemm.py, with one more rounding: of the gate, or of torch's product."""
    inputs = build(case)
    out_dtype = inputs.pop("out_dtype") or inputs["a"].dtype
    assert actual.dtype == out_dtype
    assert actual.is_contiguous()
    expected = reference.gemm(**inputs)
    size = reference.gemm(inputs["a"].abs(), values(inputs["weight"], inputs["weight_scale"]).abs()) + 3
    if case.activation == "silu_mul":
        size = size[..., : case.n] * size[..., case.n :]
    bound = (2.0**-21 + 4 * UNIT[case.dtype]) * size + 1.01 * UNIT[str(out_dtype)[6:]] * expected.abs() + 2.0**-24
    assert ((actual.double() - expected).abs() <= bound).all(), repr(case)


@settings(max_examples=400)
@given(cases(), DEVICES)
def test_gemm(case: GemmCase, device: Device) -> None:
    fleet = Fleet(device)
    close(gemm.gemm(fleet.launcher(), **build(case)), case)
    if device.capability < (8, 0):
        assert not fleet.launches


@pytest.mark.parametrize("device", [A100, H100])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu", "silu_mul"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_aligned_bf16_runs_on_kernels(device: Device, activation: str, bias: bool, residual: bool) -> None:
    case = GemmCase(9, 32, 64, activation=activation, bias=bias, residual=residual)
    fleet = Fleet(device)
    launcher = fleet.launcher()
    close(gemm.gemm(launcher, **build(case)), case)
    if activation == "silu_mul" and residual:
        assert not fleet.launches
        [choice] = launcher.chosen.values()
        assert choice == Fallback("no kernel adds a residual after silu_mul")
    else:
        assert len(fleet.launches) == (2 if activation == "silu_mul" else 1)
        assert all(isinstance(choice, Choice) for choice in launcher.chosen.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("activation", ["none", "silu_mul"])
def test_int4_weights_are_widened(dtype: str, activation: str) -> None:
    case = GemmCase(5, 32, 64, dtype, "int4", activation=activation, scale=True, bias=True, panels=True)
    fleet = Fleet(H100)
    close(gemm.gemm(fleet.launcher(), **build(case)), case)
    assert bool(fleet.launches) == (dtype != "float32")


def test_int8_weights_stay_int8() -> None:
    case = GemmCase(5, 32, 64, weight_dtype="int8", scale=True, bias=True)
    fleet = Fleet(H100)
    close(gemm.gemm(fleet.launcher(), **build(case)), case)
    [(config, _)] = fleet.launches
    assert (config.arch, config.a, config.weight) == ("sm_80", "bf16", "s8")


def test_few_rows_and_long_sums_split_k() -> None:
    case = GemmCase(1, 64, 2048)
    fleet = Fleet(Device((8, 6), 84, 101376))  # which nvidia-matmul-heuristics has no model of: the table chooses
    close(gemm.gemm(fleet.launcher(), **build(case)), case)
    [(config, call)] = fleet.launches
    assert config.splits
    assert call.splits > 1


def test_a_workspace_is_given_where_it_is_needed() -> None:
    fleet = Fleet(A100, scratch=1000)
    close(gemm.gemm(fleet.launcher(), **build(GemmCase(4, 32, 64))), GemmCase(4, 32, 64))
    [(_, call)] = fleet.launches
    assert call.workspace_bytes == 1000


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (GemmCase(4, 32, 63), "k is 63, and kernels move 16 bytes at a time: a multiple of 8 is needed"),
        (GemmCase(4, 31, 64), "n is 31, and kernels move 16 bytes at a time: a multiple of 8 is needed"),
        (GemmCase(4, 32, 64, dtype="float32"), "no kernel is built for linear f32 x f32 -> f32, epilogue plain"),
        (
            GemmCase(4, 32, 64, activation="relu", out_dtype="float32"),
            "no kernel is built for linear bf16 x bf16 -> f32",
        ),
    ],
)
def test_torch_runs_what_no_kernel_takes_and_the_reason_is_kept(case: GemmCase, reason: str) -> None:
    fleet = Fleet(A100)
    launcher = fleet.launcher()
    close(gemm.gemm(launcher, **build(case)), case)
    assert not fleet.launches
    [choice] = launcher.chosen.values()
    assert isinstance(choice, Fallback)
    assert choice.reason.startswith(reason)


def test_rows_that_are_not_aligned_fall_back() -> None:
    a, weight = torch.randn(4, 72).bfloat16()[:, 1:65], torch.randn(32, 64).bfloat16()
    fleet = Fleet(A100)
    launcher = fleet.launcher()
    out = gemm.gemm(launcher, a, weight)
    torch.testing.assert_close(out, (a.double() @ weight.double().T).bfloat16())
    [choice] = launcher.chosen.values()
    assert isinstance(choice, Fallback)
    assert choice.reason.endswith("misaligned operand")


def test_nothing_built_says_how_to_build() -> None:
    launcher = Fleet(A100, built=frozenset()).launcher()
    close(gemm.gemm(launcher, **build(GemmCase(4, 32, 64))), GemmCase(4, 32, 64))
    [choice] = launcher.chosen.values()
    assert isinstance(choice, Fallback)
    assert "python -m cutlass_kernels build" in choice.reason


@settings(max_examples=150)
@given(
    batch=st.integers(0, 5),
    m=st.integers(0, 9) | st.just(33),
    n=st.integers(1, 9).map(lambda n: 8 * n) | st.integers(1, 70),
    k=st.integers(1, 9).map(lambda k: 8 * k) | st.integers(1, 70),
    dtype=st.sampled_from(sorted(UNIT)),
    along_k=st.booleans(),
    device=DEVICES,
)
def test_bmm(batch: int, m: int, n: int, k: int, dtype: str, along_k: bool, device: Device) -> None:
    generator = torch.Generator().manual_seed(n * k)
    a = torch.randn(m, batch, k, generator=generator).to(getattr(torch, dtype)).transpose(0, 1)
    shape = (batch, n, k) if along_k else (batch, k, n)
    weight = torch.randn(shape, generator=generator).to(a.dtype)
    weight = weight.mT if along_k else weight
    fleet = Fleet(device)
    actual, expected = gemm.bmm(fleet.launcher(), a, weight), reference.bmm(a, weight)
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    bound = 2.0**-21 * reference.bmm(a.abs(), weight.abs()) + 1.01 * UNIT[dtype] * expected.abs() + 2.0**-24
    assert ((actual.double() - expected).abs() <= bound).all()
    fits = n % 8 == 0 and k % 8 == 0 and dtype != "float32" and actual.numel() and device.capability >= (8, 0)
    assert bool(fleet.launches) == bool(fits)
    for config, _ in fleet.launches:
        # With one row or column in sight, both layouts describe it.
        assert config.family == ("linear" if along_k and n > 1 else "batched")


@settings(max_examples=150)
@given(
    sizes=st.lists(st.integers(0, 6) | st.just(70), min_size=1, max_size=5),
    n=st.integers(1, 9).map(lambda n: 8 * n) | st.integers(1, 30),
    k=st.integers(1, 9).map(lambda k: 8 * k),
    dtype=st.sampled_from(sorted(UNIT)),
    strided=st.booleans(),
    device=DEVICES,
)
def test_grouped_gemm(sizes: list[int], n: int, k: int, dtype: str, strided: bool, device: Device) -> None:
    a, weight, offsets = operands(sizes, n, k, dtype, n * k, strided)
    fleet = Fleet(device)
    actual = gemm.grouped_gemm(fleet.launcher(), a, weight, offsets)
    groups = list(runs(offsets, a.size(0)))
    expected = reference.grouped_gemm(a, weight, groups)
    size = reference.grouped_gemm(a.abs(), weight.abs(), groups)
    bound = 2.0**-21 * size + 1.01 * UNIT[dtype] * expected.abs() + 2.0**-24
    assert ((actual.double() - expected).abs() <= bound).all()
    fits = n % 8 == 0 and dtype != "float32" and actual.numel() and device.capability >= (8, 0)
    assert bool(fleet.launches) == bool(fits)


@settings(max_examples=200)
@given(gemm_cases())
def test_torchs_operators_compute_the_same(case: GemmCase) -> None:
    close(aten.gemm(**build(case)), case)


AUTOTUNED = """
import torch, flashmla_ops
from flashmla_ops.cuda import register_autotuning
register_autotuning()
a, weight, bias = torch.randn(4, 16), torch.randn(8, 16), torch.randn(8)
function = lambda a, weight, bias: torch.ops.flashmla.gemm(a, weight, bias, activation="silu") * 2
expected = function(a, weight, bias)
compiled = torch.compile(function, fullgraph=True, options={"max_autotune": True})
torch.testing.assert_close(compiled(a, weight, bias), expected, atol=1e-5, rtol=1e-5)
stacked = torch.compile(lambda a, b: torch.ops.flashmla.bmm(a, b) + 1, fullgraph=True, options={"max_autotune": True})
torch.testing.assert_close(stacked(a[None], weight.T[None]), (a @ weight.T)[None] + 1, atol=1e-5, rtol=1e-5)
grouped = lambda a, b, offsets: torch.ops.flashmla.grouped_gemm(a, b, offsets) + 1
offsets = torch.tensor([0, 1, 1, 4], dtype=torch.int32)
for k, dtype in ((16, torch.float32), (16, torch.bfloat16), (5, torch.bfloat16)):
    inputs = a[:, :k].to(dtype), torch.randn(3, 8, k).to(dtype), offsets
    compiled = torch.compile(grouped, fullgraph=True, options={"max_autotune": True})
    torch.testing.assert_close(compiled(*inputs), grouped(*inputs), atol=1e-5, rtol=1e-2)
from torch._inductor.lowering import user_lowerings
print(sorted(str(op) for op in user_lowerings if "flashmla" in str(op)))
"""


@pytest.mark.slow
def test_inductor_chooses_between_our_operator_and_torchs() -> None:
    done = subprocess.run([sys.executable, "-c", AUTOTUNED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.splitlines()[-1]
        == "['flashmla.bmm.default', 'flashmla.gemm.default', 'flashmla.grouped_gemm.default']"
    )
