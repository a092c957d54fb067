"""`gemm="autotune"`: the library's products and those of ATen are timed when compiling, and one of them is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lowering
from flashmla_ops import reference
from lowering import versions
from lowering.ops import choose_product
from lowering.session import recording
from tests.lowering import test_cache
from tests.lowering.compiled import Compiled
from tests.lowering.layers import mla_inputs, mla_layer
from tests.lowering.passes.graphs import assert_equal_to
from tests.lowering.passes.test_products import BIAS, BOTH, DOWN, TOLERANCE, Block, K, N, W, X, draw, fused_mlp, to

AUTOTUNE = {"flashmla.gemm": "autotune"}
FASTER = "the aten product was faster"
LIBRARY, ATEN = 0, 1  # among the choices


class Case(NamedTuple):
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    library: list[str]  # the program's steps; kernels as "kernel"
    aten: list[str]


CASES: dict[str, Case] = {
    "linear": Case(F.linear, (X, W), ["flashmla.gemm.out"], ["mm"]),
    "bias": Case(F.linear, (X, W, BIAS), ["flashmla.gemm.out"], ["addmm"]),
    "many rows": Case(F.linear, (draw(70, K), W, BIAS), ["flashmla.gemm.out"], ["addmm"]),
    "silu": Case(
        lambda x, w, b: F.silu(F.linear(x, w, b)), (X, W, BIAS), ["flashmla.gemm.out", "kernel"], ["addmm", "kernel"]
    ),
    "residual": Case(
        lambda x, w, b, r: F.linear(x, w, b) + r,
        (X, W, BIAS, draw(2, 3, N)),
        ["flashmla.gemm.out"],
        ["addmm", "kernel"],
    ),
    "silu * up, residual": Case(
        fused_mlp, (X, BOTH, DOWN), ["flashmla.gemm.out"] * 2, ["mm", "kernel", "mm", "kernel"]
    ),
    "by head": Case(lambda x, w: x.transpose(0, 1) @ w, (X, draw(3, K, 8)), ["flashmla.bmm.out"], ["bmm"]),
}


def force(monkeypatch: pytest.MonkeyPatch, winner: int) -> list[str]:
    """Have this choice taken everywhere; the names under which choices were asked for."""
    asked = []

    def select(name: str, choices: list[Any], *_: Any) -> tuple[Any, bool]:
        asked.append(name)
        return choices[winner].output_node(), False

    monkeypatch.setattr(versions, "select", select)
    return asked


def steps(compiled: Compiled) -> list[str]:
    return ["kernel" if step.kind == "kernel" else step.name for step in compiled.program.steps]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("winner", [LIBRARY, ATEN])
@pytest.mark.parametrize("name", CASES)
def test_what_was_faster_is_what_runs(
    name: str, winner: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    force(monkeypatch, winner)
    inputs = to(dtype, case.inputs)
    compiled = Compiled(case.function, AUTOTUNE)
    with recording() as session:
        out = compiled(*inputs)
    assert_equal_to(out, case.function(*(x.double() for x in inputs)), tolerance=TOLERANCE[dtype])
    assert steps(compiled) == (case.aten if winner == ATEN else case.library)
    decisions = [decision for decision in session.lowered if decision.pattern == "product of the library"]
    assert decisions
    assert {decision.reason for decision in decisions} == {FASTER if winner == ATEN else ""}


@pytest.mark.parametrize("run", [choose_product.run_library, choose_product.run_aten])
@pytest.mark.parametrize("names", [(), ("bias",), ("residual",), ("bias", "residual")])
@pytest.mark.parametrize("activation", ["none", "silu_mul"])
def test_what_is_timed_computes_the_product(run: Any, names: tuple[str, ...], activation: str) -> None:
    n = 2 * N if activation == "silu_mul" else N
    a, weight, given = X[0], BOTH[:n], {"bias": draw(n), "residual": draw(3, N)}
    out = torch.empty(3, N)
    options = {"activation": activation} if activation != "none" else {}
    run(a, weight, *(given[name] for name in names), out=out, op="gemm", names=names, **options)
    assert_equal_to(out, reference.gemm(a, weight, **{name: given[name] for name in names}, activation=activation))


@pytest.mark.parametrize("run", [choose_product.run_library, choose_product.run_aten])
def test_what_is_timed_computes_the_product_by_head(run: Any) -> None:
    a, weight, out = X.transpose(0, 1), draw(3, K, 8), torch.empty(3, 2, 8)
    run(a, weight, out=out, op="bmm", names=())
    assert_equal_to(out, a @ weight)


@pytest.mark.parametrize("winner", [LIBRARY, ATEN])
def test_a_product_is_written_into_its_slice_of_the_queries(winner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = force(monkeypatch, winner)
    compiled = Compiled(mla_layer, AUTOTUNE)
    with recording() as session:
        out = compiled(*mla_inputs())
    assert_equal_to(out, mla_layer(*mla_inputs()))
    assert "flashmla_bmm" in asked
    assert any(decision.pattern == "product written in place" for decision in session.lowered)


@pytest.mark.parametrize("winner", [LIBRARY, ATEN])
def test_one_compilation_serves_any_number_of_rows(winner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, winner)
    compiled = Compiled(fused_mlp, AUTOTUNE)
    for rows in (5, 2, 40):
        x = draw(rows, K, seed=rows)
        torch._dynamo.mark_dynamic(x, 0)
        assert_equal_to(compiled(x, BOTH, DOWN), fused_mlp(x, BOTH, DOWN))
    assert compiled.compilations == 1


@pytest.mark.parametrize("winner", [LIBRARY, ATEN])
def test_frozen_weights(winner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = force(monkeypatch, winner)
    block = Block().eval()
    with versions.patch_inductor({"freezing": True}):
        assert_equal_to(Compiled(block, AUTOTUNE)(X), block(X))
    assert asked == ["flashmla_gemm"] * 2


def test_calls_in_the_model_stay_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """They round once, and may have a scale for each row of int8 weights."""
    asked = force(monkeypatch, ATEN)
    weight, scale = torch.randint(-128, 128, (N, K), dtype=torch.int8), draw(N).abs()

    def step(x: Tensor, weight: Tensor, scale: Tensor, plain: Tensor) -> tuple[Tensor, Tensor]:
        gemm = torch.ops.flashmla.gemm
        return gemm(x, weight, weight_scale=scale, activation="silu"), gemm(x, plain, out_dtype=torch.bfloat16)

    for ours, theirs in zip(Compiled(step, AUTOTUNE)(X, weight, scale, W), step(X, weight, scale, W), strict=True):
        assert torch.equal(ours, theirs)
    assert asked == []


def test_both_are_timed_and_the_record_says_which_was_taken() -> None:
    x = draw(4, K)
    torch._dynamo.mark_dynamic(x, 0)
    explained = lowering.explain(fused_mlp, x, BOTH, DOWN, options=AUTOTUNE)
    assert [decision.pattern for decision in explained.lowered] == ["product of the library"] * 2
    for decision in explained.lowered:
        assert decision.rewritten or decision.reason == FASTER
    served = sum(decision.rewritten for decision in explained.lowered)
    assert [step.kind for step in explained.after.steps].count("flashmla") == served


def test_a_package_follows_the_rule_of_auto_and_says_so() -> None:
    def step(x: Tensor, many: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, w), F.linear(many, w)

    inputs = (draw(2, K), draw(70, K), W)
    compiled = Compiled(step, AUTOTUNE | {"cpp_wrapper": True})
    with recording() as session:
        for ours, theirs in zip(compiled(*inputs), step(*inputs), strict=True):
            assert_equal_to(ours, theirs)
    (lowered,) = session.lowered
    assert "has no Python" in lowered.reason
    assert "as with 'auto'" in lowered.reason
    (record,) = session.rewrites
    assert ["70 rows" in decision.reason for decision in record] == [True, False]


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import flashmla_ops
from lowering import versions
from torch._dynamo.utils import counters

versions.select = lambda name, choices, *_: (choices[{winner}].output_node(), False)
x, w = torch.ones(2, 64), torch.ones(32, 64)
with torch.no_grad():
    step = torch.compile(torch.nn.functional.linear, backend=sys.argv[2], options={{"flashmla.gemm": "autotune"}})
    assert step(x, w).eq(64).all()
hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
print("hit" if hits else "miss")
"""


@pytest.mark.slow
@pytest.mark.parametrize("winner", [LIBRARY, ATEN])
def test_a_second_process_finds_the_choice(winner: int, tmp_path: Path) -> None:
    script = SCRIPT.format(winner=winner)
    assert [test_cache.run(test_cache.ROOT, tmp_path, script=script) for _ in range(2)] == ["miss", "hit"]
