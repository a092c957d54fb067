"""A model whose heads are on several ranks generates what it generates in one process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from flashmla_ops.errors import ArgumentError, FallbackWarning, NotDifferentiableError, RankError, UnsupportedModelError
from flashmla_ops.integrations.transformers import PagedLatentCache, enable, is_enabled, why_not
from flashmla_ops.integrations.transformers.versions import CACHE_ARGUMENT
from flashmla_ops.parallel import merge_over_ranks, tensor_parallel
from flashmla_ops.parallel.local import LocalRanks
from tests.parallel.models import PROMPT, generated, made

TYPES = ["deepseek_v2", "deepseek_v3", "llama", "mistral", "qwen2", "qwen3"]


def same_tokens(model_type: str) -> None:
    expected = generated(made(model_type))
    model, mesh = made(model_type), init_device_mesh("cpu", (dist.get_world_size(),))
    assert tensor_parallel(model, mesh) == 2
    enable(model)
    assert is_enabled(model)
    assert torch.equal(generated(model), expected)
    heads = model.model.layers[0].self_attn.o_proj.in_features
    assert heads * mesh.size() == made(model_type).model.layers[0].self_attn.o_proj.in_features
    cache = PagedLatentCache(model)  # a pool for the heads of this rank
    assert torch.equal(generated(model, **{CACHE_ARGUMENT: cache}), expected)


def refuse() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = made("deepseek_v3", num_attention_heads=3, num_key_value_heads=3)
    before = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(ArgumentError, match="num_attention_heads': expected a multiple of 2 ranks, got 3"):
        tensor_parallel(model, mesh)
    assert {name: p.shape for name, p in model.named_parameters()} == before
    with pytest.raises(UnsupportedModelError, match="not cut before"):
        tensor_parallel(cut(mesh), mesh)
    with pytest.raises(UnsupportedModelError, match="None is not known"):
        tensor_parallel(torch.nn.Linear(2, 2), mesh)
    with pytest.raises(NotDifferentiableError):
        cut(mesh)(PROMPT)


def cut(mesh: Any) -> Any:
    model = made("llama")
    tensor_parallel(model, mesh)
    return model


def merge_without_the_other() -> str:
    if dist.get_rank() == 1:
        os._exit(1)
    began = time.monotonic()
    with pytest.raises(RankError, match="among 2 ranks failed on rank 0"):
        merge_over_ranks(torch.zeros(1, 1, 4, 8), torch.zeros(1, 4, 1))
    return "told" if time.monotonic() - began < 60 else "late"


@pytest.mark.parametrize("model_type", TYPES)
def test_same_tokens(two: LocalRanks, model_type: str) -> None:
    two.run(same_tokens, model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_same_tokens_on_four_ranks(four: LocalRanks, model_type: str) -> None:
    four.run(same_tokens, model_type)


def test_refusals(two: LocalRanks) -> None:
    two.run(refuse)


@pytest.mark.slow
def test_a_rank_that_died_is_told() -> None:
    ranks = LocalRanks(2)
    for pipe in ranks.pipes:
        pipe.send((merge_without_the_other, ()))
    assert ranks.pipes[0].recv() == (True, "told")
    ranks.close()


@pytest.mark.slow
def test_the_demo() -> None:
    done = subprocess.run([sys.executable, "-m", "flashmla_ops.parallel.demo"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(line.split(":")[0] for line in done.stdout.splitlines()) == ["rank 0", "rank 1"]
    assert done.stdout.count("4 of 8 heads, the same tokens") == 2


def by_the_plan_of_transformers(model_type: str, folder: str) -> None:
    """Weights that ``from_pretrained`` cut over ranks as DTensors."""
    whole = made(model_type)
    expected = generated(whole)
    if dist.get_rank() == 0:
        whole.save_pretrained(folder)
    dist.barrier()
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": "2", "LOCAL_RANK": str(dist.get_rank())}
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    enable(model)
    assert why_not(model) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        assert torch.equal(generated(model), expected)
        assert torch.equal(generated(model, **{CACHE_ARGUMENT: PagedLatentCache(model)}), expected)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_the_plan_of_transformers(two: LocalRanks, model_type: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="from_pretrained asks for accelerate to load by a plan")
    two.run(by_the_plan_of_transformers, model_type, str(tmp_path))
