"""The calls of `bench.gpu_check.caches`, as far as they go without a device: on the CPU they pass, and can fail."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.gpu_check import caches

CALLS = {call.name: call for call in caches.calls(past_the_end=False)}


@pytest.mark.parametrize("name", [name for name in CALLS if "float32" not in name and "9000" not in name])
def test_calls_pass_where_they_are_right(name: str) -> None:
    row = caches.check_one(CALLS[name], "cpu")
    assert row["state"] == "passed", row["why"]


@pytest.mark.parametrize("name", ["append_ bfloat16 to fp4_v41", "merge_states bfloat16 9 parts"])
def test_a_wrong_result_fails(name: str) -> None:
    call = CALLS[name]
    tensors = [torch.zeros_like(tensor) for tensor in call.tensors]
    wrong = dataclasses.replace(call, run=lambda *_: call.run(*tensors))
    assert caches.check_one(wrong, "cpu")["state"] == "failed"
