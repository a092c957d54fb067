"""`decode` generated as a template: one kernel with the pointwise work after it, equal to a call of the library."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lowering
from flashmla_ops import cpu
from lowering import Settings, cache_key, versions
from tests.lowering.compiled import Compiled
from tests.strategies import DTYPES
from tests.support.cases import DecodeCase, build

CASE = DecodeCase(lengths=(20, 0, 33), s_q=2, h_q=6, page_size=16, d=40, d_v=32, causal=True)
TEMPLATE = {"flashmla.decode": "template"}
Epilogue = Callable[[Tensor, Tensor, Tensor], Any]


def gate_residual_cast(out: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    return (out * torch.sigmoid(gate) + residual).to(torch.float64)


def several_users(out: Tensor, gate: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return out * gate, out + residual, out


def flattened_heads(out: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    return out.flatten(2) * gate.flatten(2)


def transposed(out: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    return out.transpose(1, 2) * gate.transpose(1, 2) + 1


def broadcast(out: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    return torch.relu(out * gate[:, :1, :1, :1])


def summed(out: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    return (out * gate).sum(-1)


def decode_then(epilogue: Epilogue) -> Callable[..., Any]:
    def step(q: Tensor, kv: Tensor, table: Tensor, lengths: Tensor, gate: Tensor, residual: Tensor) -> Any:
        out, _ = torch.ops.flashmla.decode(q, kv, None, table, lengths, 32, causal=True)
        return epilogue(out, gate, residual)

    return step


def step_arguments(case: DecodeCase) -> tuple[Tensor, ...]:
    inputs = build(case)
    generator = torch.Generator().manual_seed(3)
    shape = (len(case.lengths), case.s_q, case.h_q, 32)
    gate, residual = (torch.randn(shape, generator=generator).to(inputs.q.dtype) for _ in range(2))
    return inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens, gate, residual


#: Generated code is for this machine, whichever of the library's kernels FLASHMLA_CPU chooses: those round otherwise.
ALLOWED = {"rtol": 2.0**-6, "atol": 2.0**-6} if os.environ.get("FLASHMLA_CPU") else {"rtol": 1e-5, "atol": 1e-6}


def compare(actual: Any, expected: Any) -> None:
    """Results equal those with a call of the library, up to the rounding of a fused chain in the last place."""
    for ours, theirs in zip(_tensors(actual), _tensors(expected), strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, **ALLOWED)


def _tensors(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


@pytest.mark.parametrize(
    ("epilogue", "kernels"),
    [
        (gate_residual_cast, 1),
        (several_users, 1),
        (flattened_heads, 1),
        (transposed, 1),
        (broadcast, 1),
        (summed, 2),  # a reduction stays a kernel of its own
    ],
)
def test_pointwise_work_goes_into_the_kernel(epilogue: Epilogue, kernels: int) -> None:
    arguments = step_arguments(CASE)
    compiled = Compiled(decode_then(epilogue), TEMPLATE)
    compare(compiled(*arguments), Compiled(decode_then(epilogue))(*arguments))
    assert [step.kind for step in compiled.program.steps] == ["kernel"] * kernels


def test_one_compilation_serves_all_sizes() -> None:
    step = decode_then(gate_residual_cast)
    compiled = Compiled(step, TEMPLATE, dynamic=True)
    for lengths in ((20, 0, 33), (5, 90), (1, 2, 3, 4, 5, 6)):
        arguments = step_arguments(replace(CASE, lengths=lengths, dtype="float32", strided=False))
        torch.testing.assert_close(compiled(*arguments), step(*arguments), rtol=1e-5, atol=1e-6)
    assert compiled.compilations == 1


CASES = {
    "two tensors, sinks": DecodeCase(lengths=(70, 3), h_q=16, page_size=16, d=32, d_v=32, d_k=8, sink=True),
    "grouped heads": DecodeCase(lengths=(9, 40), h_q=6, h_kv=2, page_size=16, d=48, d_v=16, qk_start=16, s_q=3),
    "scheduled in parts": DecodeCase(lengths=(300, 40), h_q=20, page_size=16, d=40, d_v=32, num_parts=5),
    "scale": DecodeCase(lengths=(50,), h_q=4, page_size=8, d=40, d_v=24, softmax_scale=-0.25),
}


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=pytest.mark.slow) if d == "float16" else d for d in DTYPES])
def test_every_argument_reaches_the_kernel(dtype: str) -> None:
    """All cases in one graph, so that they compile at once."""
    arguments = [build(replace(case, dtype=dtype)).kwargs() for case in CASES.values()]

    def step(calls: list[dict[str, Any]]) -> list[Tensor]:
        return [torch.ops.flashmla.decode(**call)[0] + 1 for call in calls]

    compiled = Compiled(step, TEMPLATE)
    for ours, theirs in zip(compiled(arguments), step(arguments), strict=True):
        torch.testing.assert_close(ours, theirs, **ALLOWED)
    assert [step.kind for step in compiled.program.steps] == ["kernel"] * (
        len(CASES) + 1
    )  # a strided schedule is copied


@pytest.mark.parametrize(
    "isa", ["avx2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("generic", "emulated", "avx512"))]
)
def test_a_chosen_instruction_set_reaches_the_kernel(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu.STATE.isas.get(isa):
        pytest.skip(f"this processor does not run {isa}")
    monkeypatch.setattr(cpu.STATE, "active", isa)
    compiled, inputs = Compiled(decode_then(gate_residual_cast), TEMPLATE), step_arguments(CASE)
    expected = decode_then(gate_residual_cast)(*inputs)  # by kernels that may round products of bf16 otherwise
    torch.testing.assert_close(compiled(*inputs), expected, atol=2e-2, rtol=2e-2)
    assert f"#define FLASHMLA_ON_{isa}\n" in compiled.sources[0]
    assert cache_key.extended_tag("", Settings()).split("-")[2] == isa


def test_the_reference_is_not_replaced_by_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.STATE, "active", cpu.REFERENCE)
    compiled = Compiled(decode_then(gate_residual_cast), TEMPLATE)
    compiled(*step_arguments(CASE))
    assert "flashmla.decode.default" in [step.name for step in compiled.program.steps]


def test_errors_are_those_of_the_operator() -> None:
    step = decode_then(several_users)
    compiled = Compiled(step, TEMPLATE)
    q, kv, table, lengths, gate, residual = step_arguments(replace(CASE, strided=False))
    bad_table = table.clone()
    bad_table[2, 1] = kv.size(0)
    too_long = lengths.clone()
    too_long[1] = table.size(1) * CASE.page_size + 1
    for bad in ((q, kv, bad_table, lengths), (q, kv, table, too_long)):
        with pytest.raises(RuntimeError, match=r"flashmla::decode: argument") as expected:
            step(*bad, gate, residual)
        with pytest.raises(RuntimeError, match=r"flashmla::decode: argument") as actual:
            compiled(*bad, gate, residual)
        assert str(expected.value).splitlines()[0] == str(actual.value).splitlines()[0]
    compare(compiled(q, kv, table, lengths, gate, residual), step(q, kv, table, lengths, gate, residual))


def test_a_used_lse_leaves_the_call_to_the_library_and_says_so() -> None:
    def step(q: Tensor, kv: Tensor, table: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.flashmla.decode(q, kv, None, table, lengths, 32)
        return out * 2, lse

    explained = lowering.explain(step, *step_arguments(CASE)[:4], options=TEMPLATE)
    (decision,) = explained.lowered
    assert not decision.rewritten
    assert "LSE" in decision.reason
    assert [s.name for s in explained.after.steps if s.kind == "flashmla"] == ["flashmla.decode.default"]


def test_both_ways_are_timed_and_one_is_taken() -> None:
    explained = lowering.explain(
        decode_then(gate_residual_cast), *step_arguments(CASE), options={"flashmla.decode": "autotune"}
    )
    (decision,) = explained.lowered
    kinds = [step.kind for step in explained.after.steps]
    assert kinds == (["kernel"] if decision.rewritten else ["flashmla", "kernel"])
    assert decision.rewritten or decision.reason == "a call of the library was faster"


@pytest.mark.parametrize("winner", ["library", "template"])
def test_what_was_faster_is_what_runs(winner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(name: str, choices: list[Any], *_: Any) -> tuple[Any, bool]:
        return choices[winner == "template"].output_node(), winner == "template"

    monkeypatch.setattr(versions, "select", choose)
    arguments = step_arguments(CASE)
    step = decode_then(gate_residual_cast)
    compiled = Compiled(step, {"flashmla.decode": "autotune"})
    compare(compiled(*arguments), Compiled(step)(*arguments))
    assert [s.kind for s in compiled.program.steps] == {"library": ["flashmla", "kernel"], "template": ["kernel"]}[
        winner
    ]


def test_the_default_calls_the_library() -> None:
    compiled = Compiled(decode_then(gate_residual_cast))
    compiled(*step_arguments(CASE))
    assert [step.kind for step in compiled.program.steps] == ["flashmla", "kernel"]
