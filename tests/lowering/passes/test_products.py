"""Products with few rows become ours where their right side is a weight, with the epilogue that is proven to be one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowering import versions
from lowering.settings import Settings
from tests.lowering.compiled import Compiled
from tests.lowering.passes.graphs import Rewritten, assert_equal_to, operators, rewrite, traced

K, N = 24, 40
AUTO = Settings()
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.1, torch.float16: 0.02}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 2).to(dtype)


X, W, W2, DOWN = draw(2, 3, K), draw(N, K, seed=1), draw(N, K, seed=2), draw(K, N, seed=3)
BIAS, BOTH = draw(N, seed=4), draw(2 * N, K, seed=5)


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The MLP as Llama writes it, with its residual."""
    return x + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def fused_mlp(x: Tensor, both: Tensor, down: Tensor) -> Tensor:
    """The MLP as Phi-3 writes it: one weight for gate and up."""
    gate, up = F.linear(x, both).chunk(2, dim=-1)
    return F.linear(up * F.silu(gate), down) + x


class Served(NamedTuple):
    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    calls: list[str]  # activation of each gemm, "+" where it adds a residual; or bmm


SERVED: dict[str, Served] = {
    "linear": Served(F.linear, (X, W), ["none"]),
    "bias": Served(F.linear, (X, W, BIAS), ["none"]),
    "one-row": Served(F.linear, (X[0, 0], W), ["none"]),
    "32-rows": Served(F.linear, (draw(32, K), W), ["none"]),
    "mm-of-a-transpose": Served(lambda x, w: x[0] @ w.T, (X, W), ["none"]),
    "slice-of-a-weight": Served(lambda x, w: F.linear(x, w[8:]), (X, W), ["none"]),
    "strided-weight": Served(lambda x, w: F.linear(x, w[:, :16]), (draw(5, 16), W), ["none"]),
    "tied": Served(lambda i, w: F.linear(F.embedding(i, w), w), (torch.tensor([[1, 5]]), W), ["none"]),
    "residual": Served(lambda x, w, r: F.linear(x, w) + r, (X, W, draw(2, 3, N)), ["none+"]),
    "residual-behind-heads": Served(
        lambda x, w, r: F.linear(x, w).view(2, 3, 4, 10) + r, (X, W, draw(2, 3, 4, 10)), ["none+"]
    ),
    "mlp": Served(mlp, (X, W, W2, DOWN), ["none", "none", "none+"]),
    "fused-mlp": Served(fused_mlp, (X, BOTH, DOWN), ["silu_mul", "none+"]),
    "by-head": Served(lambda x, w: x.transpose(0, 1) @ w, (X, draw(3, K, 8)), ["bmm"]),
    "by-head-transposed": Served(lambda x, w: x.transpose(0, 1) @ w.mT, (X, draw(3, 8, K)), ["bmm"]),
    "by-head-slice": Served(lambda x, w: x.transpose(0, 1) @ w.view(3, 12, K)[:, 4:].mT, (X, draw(36, K)), ["bmm"]),
    # what is not an epilogue stays behind the product
    "added-twice": Served(lambda x, w: (y := F.linear(x, w)) + y.sigmoid(), (X, W), ["none"]),
    "residual-broadcast": Served(lambda x, w, r: F.linear(x, w) + r, (X, W, draw(3, N)), ["none"]),
    "residual-of-another-type": Served(lambda x, w, r: F.linear(x, w) + r, (X, W, draw(2, 3, N).double()), ["none"]),
    "residual-scaled": Served(lambda x, w, r: torch.add(F.linear(x, w), r, alpha=2), (X, W, draw(2, 3, N)), ["none"]),
    "residual-and-product-used": Served(
        lambda x, w, r: ((y := F.linear(x, w)) + r, y), (X, W, draw(2, 3, N)), ["none"]
    ),
    "up-before-gate": Served(
        lambda x, w: (lambda up, gate: F.silu(gate) * up)(*F.linear(x, w).chunk(2, -1)), (X, BOTH), ["none"]
    ),
    "unequal-halves": Served(lambda x, w: F.silu((y := F.linear(x, w))[..., :30]) * y[..., 40:70], (X, BOTH), ["none"]),
    "gelu-gate": Served(
        lambda x, w: (lambda gate, up: F.gelu(gate) * up)(*F.linear(x, w).chunk(2, -1)), (X, BOTH), ["none"]
    ),
    "gate-used-twice": Served(
        lambda x, w: (lambda gate, up: (F.silu(gate) * up, gate))(*F.linear(x, w).chunk(2, -1)), (X, BOTH), ["none"]
    ),
    "half-swish": Served(
        lambda x, w: (lambda g, up: g / (2 + torch.exp(-g)) * up)(*F.linear(x, w).chunk(2, -1)), (X, BOTH), ["none"]
    ),
}


def calls(graph: torch.fx.GraphModule) -> list[str]:
    found = []
    for node in graph.graph.nodes:
        if node.target == torch.ops.flashmla.bmm.default:
            found.append("bmm")
        elif node.target == torch.ops.flashmla.gemm.default:
            found.append(node.args[5] + ("+" if node.args[3] is not None else ""))
    return found


def to(dtype: torch.dtype, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.to(dtype) if x.dtype == torch.float32 else x for x in inputs)


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SERVED)
def test_products_and_their_epilogues(name: str, dtype: torch.dtype) -> None:
    case = SERVED[name]
    inputs = to(dtype, case.inputs)
    graph = traced(case.function, *inputs)
    record = rewrite(graph, AUTO)
    assert calls(graph) == case.calls, "\n".join(map(str, record))
    expected = case.function(*(x.double() if x.is_floating_point() else x for x in inputs))
    assert_equal_to(first(graph(*inputs)), first(expected), tolerance=TOLERANCE[dtype])


class NearMiss(NamedTuple):
    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    reason: str


NEAR_MISSES: dict[str, NearMiss] = {
    "many-rows": NearMiss(F.linear, (draw(33, K), W), "33 rows"),
    "float64": NearMiss(F.linear, (X.double(), W.double()), "float64 is not a type"),
    "weight-along-columns": NearMiss(lambda x, w: x[0] @ w, (X, draw(K, N)), "along its columns"),
    "weight-computed": NearMiss(lambda x, w: F.linear(x, w * 2), (X, W), "which is computed, and no weight"),
    "weight-converted": NearMiss(lambda x, w: F.linear(x, w.float()), (X, W.double()), "which is computed"),
    "weight-expanded": NearMiss(lambda x, w: F.linear(x, w[:1].expand(N, K)), (X, W), "the same for several"),
    "activations": NearMiss(lambda x, y: x[0] @ torch.relu(y)[0].T, (X, X), "which is computed, and no weight"),
    "bias-scaled": NearMiss(
        lambda x, w, b: torch.addmm(b, x[0], w.T, beta=0.5), (X, W, BIAS), "a product scaled by 1 and a bias by 0.5"
    ),
    "bias-of-rows": NearMiss(lambda x, w, b: torch.addmm(b, x[0], w.T), (X, W, draw(3, 1)), "not one number for each"),
    "bias-strided": NearMiss(lambda x, w, b: torch.addmm(b[::2], x[0], w.T), (X, W, draw(2 * N)), "not contiguous"),
    "by-head-one-weight": NearMiss(
        lambda x, w: torch.bmm(x, w[None].expand(2, K, 8)), (X, draw(K, 8)), "the same for several"
    ),
    "by-head-computed": NearMiss(lambda x, w: torch.bmm(x, w.sigmoid()), (X, draw(2, K, 8)), "which is computed"),
    "by-head-no-row": NearMiss(
        lambda x, w: torch.bmm(x, w[:, ::2, ::2]), (X, draw(2, 2 * K, 16)), "step|contiguous|computed"
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name: str) -> None:
    case = NEAR_MISSES[name]
    graph = traced(case.function, *case.inputs)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    before = graph.code
    refusals = [decision.reason for decision in rewrite(graph, AUTO) if not decision.rewritten]
    assert any(part in text for part in case.reason.split("|") for text in refusals), refusals
    assert operators(graph) == []
    assert graph.code == before


def test_the_setting() -> None:
    for setting, rows, served in ((False, 4, []), (True, 70, ["none"]), ("auto", 70, []), ("autotune", 70, ["none"])):
        graph = traced(F.linear, draw(rows, K), W)
        rewrite(graph, Settings(gemm=setting))  # type: ignore[arg-type]
        assert calls(graph) == served
    with pytest.raises(Exception, match="'gemm': expected one of 'auto', 'autotune', True, False, got 'fast'"):
        Settings(gemm="fast")


@given(rows=st.lists(st.integers(2, 32), min_size=2, max_size=3, unique=True), with_bias=st.booleans())
@settings(max_examples=6)
def test_one_graph_for_any_number_of_rows(rows: list[int], with_bias: bool) -> None:
    torch._dynamo.reset()
    compiled = Rewritten(fused_mlp, AUTO)
    for n in rows:
        x = draw(n, K, seed=n)
        torch._dynamo.mark_dynamic(x, 0)
        assert_equal_to(compiled(x, BOTH, DOWN), fused_mlp(x, BOTH, DOWN))
    (graph,) = compiled.graphs
    assert calls(graph) == ["silu_mul", "none+"]


def test_the_graph_of_a_backward_is_left_alone() -> None:
    graph = traced(F.linear, X, W)
    for node in graph.graph.find_nodes(op="placeholder"):
        node.name = f"tangents_{node.name}"
    record = rewrite(graph, AUTO)
    assert calls(graph) == []
    assert all("a gradient is required" in decision.reason for decision in record)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (torch.nn.Linear(*n, bias=False) for n in ((K, N), (K, N), (N, K)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def test_frozen_weights_of_one_input_become_one_product() -> None:
    torch.manual_seed(0)
    block = Block().eval()
    with versions.patch_inductor({"freezing": True}):
        compiled = Compiled(block)
        assert_equal_to(compiled(X), block(X))
    products = [step.name for step in compiled.program.steps if step.kind == "flashmla"]
    assert products == ["flashmla.gemm.out"] * 2
    assert [step.kind for step in compiled.program.steps] == ["flashmla"] * 2  # and no weight is copied in a call
    assert "silu_mul" in compiled.sources[0]


def test_weights_that_are_arguments_stay_apart_and_the_record_says_why() -> None:
    graph = traced(mlp, X, W, W2, DOWN)
    (refusal,) = (decision for decision in rewrite(graph, AUTO) if not decision.rewritten)
    assert "would copy in every call" in refusal.reason
