"""Products with int8 weights as torchao writes them become `flashmla::gemm`; weights scaled by group stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowering.settings import Settings
from tests.lowering.passes.graphs import assert_equal_to, operators, rewrite, traced

K, N = 24, 40
CODES = torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
CODES2, BOTH = CODES.flip(0).contiguous(), torch.cat([CODES, CODES.flip(0)])
SCALE = torch.rand(N, 1, generator=torch.Generator().manual_seed(1)) / 100 + 0.01
X, BIAS, RESIDUAL = (torch.randn(*n, generator=torch.Generator().manual_seed(2)) for n in ((2, 3, K), (N,), (2, 3, N)))


def int8(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Its linear layer, of torchao 0.18."""
    y = x.reshape(-1, x.shape[-1]) @ codes.to(x.dtype).t()
    y = (y * scale.to(x.dtype).flatten()).reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def gated(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    gate, up = int8(x[0], codes, scale).chunk(2, dim=-1)
    return F.silu(gate) * up


class Case(NamedTuple):
    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    said: str  # of the rewrite, or of the refusal
    served: int = 1


CASES = {
    "linear": Case(int8, (X, CODES, SCALE), "int8 linear -> flashmla::gemm"),
    "scale-of-one-dimension": Case(int8, (X, CODES, SCALE.flatten()), "int8 linear -> flashmla::gemm"),
    "scale-first": Case(
        lambda x, w, s: s.to(x.dtype).flatten() * (x[0] @ w.to(x.dtype).t()), (X, CODES, SCALE), "int8 linear"
    ),
    "bias": Case(int8, (X, CODES, SCALE, BIAS), "int8 linear -> flashmla::gemm"),
    "bias-and-residual": Case(lambda *a: int8(*a[:4]) + a[4], (X, CODES, SCALE, BIAS, RESIDUAL), "linear + residual"),
    "gate": Case(gated, (X, BOTH, torch.cat([SCALE, SCALE])), "silu * up"),
    "two-of-one-input": Case(lambda x, v, w, s: int8(x, v, s) + int8(x, w, s), (X, CODES, CODES2, SCALE), "int8", 2),
    "not-scaled": Case(lambda x, w: x[0] @ w.to(x.dtype).t(), (X, CODES), "not scaled next", 0),
    "used-twice": Case(lambda x, w, s: (y := x[0] @ w.to(x.dtype).t()) * s.flatten() + y, (X, CODES, SCALE), "next", 0),
    "scaled-by-row": Case(
        lambda x, w, s: (x[0] @ w.to(x.dtype).t()) * s, (X, CODES, SCALE[:3]), "no number for each column", 0
    ),
    "scaled-by-a-number": Case(lambda x, w: (x[0] @ w.to(x.dtype).t()) * 0.5, (X, CODES), "no number for each", 0),
    "uint8": Case(
        lambda x, w, s: (x[0] @ w.to(x.dtype).t()) * s.flatten(), (X, CODES.view(torch.uint8), SCALE), "computed", 0
    ),
    "by-group": Case(
        lambda x, w, s: x[0] @ ((w.view(N, 3, 8).to(x.dtype) - 1) * s.to(x.dtype)).view(N, K).t(),
        (X, CODES, SCALE[..., None].expand(N, 3, 1)),
        "scaled by group before the product",
        0,
    ),
    "in-another-type": Case(
        lambda x, w, s: (x[0].half() @ w.half().t()) * s.flatten(), (X, CODES, SCALE), "is scaled in float32", 0
    ),
    "many-rows": Case(int8, (X.repeat(1, 8, 1), CODES, SCALE), "48 rows", 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_weights_of_integers(name: str, dtype: torch.dtype) -> None:
    function, inputs, said, served = CASES[name]
    # Scales stay float32, as torchao has them.
    inputs = tuple(x.to(dtype) if x.is_floating_point() and x.shape[0] not in (N, 2 * N) else x for x in inputs)
    inputs = tuple(x.to(dtype) if x is BIAS else x for x in inputs)
    graph = traced(function, *inputs)
    record = rewrite(graph, Settings())
    assert operators(graph) == ["gemm"] * served, [*map(str, record)]
    assert any(said in str(decision) for decision in record), [*map(str, record)]
    assert not any("internal error" in str(decision) for decision in record)
    expected = function(*(x.double() if x.is_floating_point() else x for x in inputs))
    assert_equal_to(graph(*inputs), expected, tolerance=2e-5 if dtype == torch.float32 else 0.1)


def test_a_computed_scale_and_a_narrow_one() -> None:
    """The operator takes float32: a scale of another type is converted."""
    for function, scale in ((int8, SCALE.bfloat16()), (lambda x, w, s: int8(x, w, s.abs()), SCALE)):
        graph = traced(function, X.bfloat16(), CODES, scale)
        rewrite(graph, Settings())
        assert operators(graph) == ["gemm"]
        assert_equal_to(graph(X.bfloat16(), CODES, scale), int8(X.double(), CODES, scale.double()), tolerance=0.1)


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_torchao_compiles_to_gemm(bias: bool) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=bias)).bfloat16()
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    x = torch.randn(2, 64).bfloat16()
    from tests.lowering.compiled import Compiled

    compiled = Compiled(layer)
    assert_equal_to(compiled(x), layer(x), tolerance=0.05)
    assert [step.name for step in compiled.program.steps if step.kind == "flashmla"] == ["flashmla.gemm.out"]
