"""Savings of the backend in a decode layer, against the same code under Inductor alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config

import lowering
from flashmla_ops.nn import fast_linear
from lowering.explain.program import Program
from tests.lowering.compiled import Compiled
from tests.lowering.layers import gqa_inputs, gqa_layer, mla_inputs, mla_layer


def test_an_absorbed_layer_takes_fewer_generated_kernels_and_less_memory() -> None:
    explained = lowering.explain(mla_layer, *mla_inputs())
    before, after = explained.before, explained.after
    assert after.kernels <= 0.7 * before.kernels, explained
    assert len(after.steps) < len(before.steps), explained
    assert after.nbytes <= 0.6 * before.nbytes, explained
    assert after.missed == 0
    assert [step.name for step in after.steps if step.kind == "library"] == []


class Frozen(torch.nn.Module):
    """The absorbed layer with weights of its own, which freezing turns into constants."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(each, requires_grad=False) for each in weights])

    def forward(self, *inputs: Tensor) -> Tensor:
        return mla_layer(*inputs, *self.weights)


def test_with_constant_weights_it_takes_fewer_steps_of_any_kind() -> None:
    """The projections of queries and keys become one product."""
    inputs = mla_inputs()
    with torch.no_grad(), inductor_config.patch(freezing=True):
        explained = lowering.explain(Frozen(inputs[4:]).eval(), *inputs[:4])
    before, after = explained.before, explained.after
    assert len(after.steps) <= 0.7 * len(before.steps), explained
    assert after.kernels <= 0.7 * before.kernels, explained
    assert after.nbytes <= 0.6 * before.nbytes, explained


def test_a_grouped_query_layer_takes_no_more_of_either() -> None:
    explained = lowering.explain(gqa_layer, *gqa_inputs())
    assert len(explained.after.steps) <= len(explained.before.steps), explained
    assert explained.after.nbytes <= explained.before.nbytes, explained


@pytest.mark.parametrize(("layer", "inputs"), [(mla_layer, mla_inputs()), (gqa_layer, gqa_inputs())])
def test_layers_compute_what_they_say(layer: object, inputs: tuple[Tensor, ...]) -> None:
    ours, exact = copy.deepcopy(inputs), tuple(x.double() if x.is_floating_point() else x for x in inputs)
    out = Compiled(layer)(*ours)  # type: ignore[arg-type]
    torch.testing.assert_close(out.double(), layer(*exact), rtol=1e-5, atol=1e-5)  # type: ignore[operator]
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-5, atol=1e-5)


def test_no_part_of_an_absorbed_query_is_copied() -> None:
    """The product by W_UK and the rotary halves are written into the query rows; there is no kernel in between."""
    compiled = Compiled(mla_layer)
    compiled(*mla_inputs())
    (source,) = compiled.sources
    lines = source[source.index("def call(") :].splitlines()
    decode = next(line for line in lines if "flashmla.decode_up.default(" in line)
    query = decode.split("flashmla.decode_up.default(")[1].removeprefix("reinterpret_tensor(").split(",")[0]
    pieces = [line.split()[0] for line in lines if f"reinterpret_tensor({query}," in line and "# alias" in line]
    steps = [line for line in lines if re.match(r"\s+(torch\.ops|cpp_fused)", line)]
    writes = [line for line in steps if any(re.search(rf"\b{piece}\b", line) for piece in pieces)]
    assert len(pieces) == 3
    assert sum(line.strip().startswith("torch.ops.flashmla.bmm.out(") for line in writes) == 1
    assert len(writes) == 2, writes


@pytest.mark.parametrize("panels", [False, True])
def test_fast_linears_are_calls_of_the_library(panels: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 64), torch.nn.SiLU(), torch.nn.Linear(64, 32, bias=False))
    fast_linear(model, panels=panels)
    compiled = Compiled(model)
    with torch.no_grad():
        for rows in (4, 40):
            x = torch.randn(rows, 24)
            torch.testing.assert_close(compiled(x), model(x))
    program = Program.joined(compiled.sources[:1])
    assert [step.name for step in program.steps if step.kind != "kernel"] == ["flashmla.gemm.out"] * 2
