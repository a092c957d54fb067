"""Suite ``end_to_end``: every implementation of a step computes the same logits, and what counts as work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import runner, steps
from bench.steps import StepCase
from bench.suite import DTYPES
from bench.suites import end_to_end, models
from tests.integrations.grouped import SIZES
from tests.integrations.models import tiny_model


def small(dtype: torch.dtype) -> Any:
    model = tiny_model("deepseek_v2", q_lora_rank=None).requires_grad_(False)
    model.set_attn_implementation("sdpa")
    return model.to(dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("b", "group"), [(1, ""), (3, steps.PANELS)])
@pytest.mark.parametrize("mode", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_every_implementation_is_right_again_and_again(dtype: str, mode: str, b: int, group: str) -> None:
    case = StepCase(100, dtype, mode, b, group)
    problem = steps.problem("end_to_end", case, end_to_end.PEERS, 0, model=small)
    assert set(problem.calls) | set(problem.skipped) == {runner.OURS, *(peer.name for peer in end_to_end.PEERS)}
    for call in problem.calls.values():
        for _ in range(3):  # a step forgets its token
            assert runner.row_error(call(), problem.expected) <= problem.work.tolerance


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_models_as_users_run_them(monkeypatch: pytest.MonkeyPatch, dtype: str, compiled: bool) -> None:
    """GQA, with a table that is tied. Ours and one peer are compiled, or else their graphs alone."""
    sizes = SIZES | {"tie_word_embeddings": True, "head_dim": 16}
    monkeypatch.setitem(models.SIZES, models.SMOLLM2, sizes)
    models.model_of.cache_clear()
    if not compiled:
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = StepCase(100, dtype, "compiled", group=models.SMOLLM2)
    problem = models.problem(case, models.PEERS, 0)
    assert set(problem.calls) == {runner.OURS, *(peer.name for peer in models.PEERS)}
    for call in problem.calls.values():
        for _ in range(3):
            assert runner.row_error(call(), problem.expected) <= problem.work.tolerance
    model = models.model_of(models.SMOLLM2, DTYPES[dtype])
    size = DTYPES[dtype].itemsize
    assert problem.work.bytes == size * (sum(p.numel() for p in model.parameters()) + 2 * 2 * 2 * 16 * 100)
    assert {parameter.dtype for parameter in model.parameters()} == {DTYPES[dtype]}
    models.model_of.cache_clear()


def test_a_step_reads_the_weights_once_and_the_cache() -> None:
    model = small(torch.float32)
    inputs = steps.make_inputs(StepCase(10, "fp32", "eager"), model)
    table = model.get_input_embeddings().weight
    weights = sum(parameter.nbytes for parameter in model.parameters()) - table.nbytes + table[0].nbytes
    layers, width = model.config.num_hidden_layers, model.config.kv_lora_rank + model.config.qk_rope_head_dim
    assert steps.step_bytes(inputs) == weights + layers * 10 * width * 4


def test_models_share_their_weights() -> None:
    inputs = steps.make_inputs(StepCase(4, "fp32", "eager"), small(torch.float32))
    pairs = zip(inputs.model.parameters(), inputs.sharing_weights().parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)


def test_the_cases_are_those_of_the_targets() -> None:
    cases = end_to_end.cases(False)
    assert {case.s_kv for case in cases} == {1024, 4096, 16384}
    assert {(case.dtype, case.mode) for case in cases} == {
        (dtype, mode) for dtype in ("bf16", "fp32") for mode in ("eager", "compiled")
    }
