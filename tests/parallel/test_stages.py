"""A model whose layers are on several ranks generates what it generates in one process."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from flashmla_ops.errors import ArgumentError, NotDifferentiableError, RankError, UnsupportedModelError
from flashmla_ops.integrations.transformers import PagedLatentCache, enable
from flashmla_ops.integrations.transformers.versions import CACHE_ARGUMENT
from flashmla_ops.parallel import generate_in_turns, pipeline_parallel, tensor_parallel
from flashmla_ops.parallel.local import LocalRanks
from flashmla_ops.parallel.stages import MODEL_TYPES
from tests.parallel.models import PROMPT, generated, made

LAYERS = 3


def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def staged(model_type: str, layers: tuple[int, ...] | None = None, **changes: Any) -> Any:
    model = made(model_type, num_hidden_layers=LAYERS, **changes)
    pipeline_parallel(model, mesh(), layers)
    return model


def same_tokens(model_type: str) -> list[int]:
    expected = generated(made(model_type, num_hidden_layers=LAYERS))
    model = staged(model_type)
    assert torch.equal(generated(model), expected)
    enable(model)
    assert torch.equal(generated(model), expected)
    cache = PagedLatentCache(model)  # a pool for the layers of this rank
    assert torch.equal(generated(model, **{CACHE_ARGUMENT: cache}), expected)
    later = made(model_type, num_hidden_layers=LAYERS)
    enable(later)
    pipeline_parallel(later, mesh())
    assert torch.equal(generated(later), expected)
    logits = made(model_type, num_hidden_layers=LAYERS)(PROMPT).logits
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, logits.detach(), atol=1e-5, rtol=1e-5)
    return [len(model.model.layers), sum(p.numel() for p in model.parameters())]


def in_turns(eos: int | None, enabled: bool) -> int:
    batches = [PROMPT, PROMPT[:1, :5] + 7, PROMPT[:, 2:] + 40]
    whole, model = made("deepseek_v3", num_hidden_layers=LAYERS), staged("deepseek_v3")
    if enabled:
        enable(model)
    found = generate_in_turns(model, batches, 9, eos_token_id=eos)
    options = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": eos, "pad_token_id": eos}
    for prompt, tokens in zip(batches, found, strict=True):
        expected = whole.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(tokens, expected)
    return int(found[0][0, -3])


def on_a_mesh() -> None:
    """Layers over one dimension, heads over the other."""
    expected = generated(made("deepseek_v3"))
    model, plane = made("deepseek_v3"), init_device_mesh("cpu", (2, 2), mesh_dim_names=("layers", "heads"))
    pipeline_parallel(model, plane["layers"])
    tensor_parallel(model, plane["heads"])
    enable(model)
    assert torch.equal(generated(model), expected)


def refuse() -> None:
    model = made("llama")
    before = {name: p.shape for name, p in model.named_parameters()}
    for layers in ((1,), (2, 1), (2, 0)):
        with pytest.raises(ArgumentError, match="'layers': expected 2 positive numbers whose sum is 2, got"):
            pipeline_parallel(model, mesh(), layers)
    assert {name: p.shape for name, p in model.named_parameters()} == before
    with pytest.raises(UnsupportedModelError, match="None is not known"):
        pipeline_parallel(torch.nn.Linear(2, 2), mesh())
    with pytest.raises(UnsupportedModelError, match="expected a model that pipeline_parallel cut"):
        generate_in_turns(model, [PROMPT], 1)
    pipeline_parallel(model, mesh())
    with pytest.raises(UnsupportedModelError, match="before"):
        pipeline_parallel(model, mesh())
    if dist.get_rank() == 0:
        with pytest.raises(NotDifferentiableError):
            model(PROMPT)


def without_the_other() -> str:
    model = staged("llama")
    if dist.get_rank() == 0:
        os._exit(1)
    began = time.monotonic()
    with pytest.raises(RankError, match="among 2 ranks failed on rank 1"):
        generated(model)
    return "told" if time.monotonic() - began < 60 else "late"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_same_tokens(two: LocalRanks, model_type: str) -> None:
    (first, _), (second, _) = two.run(same_tokens, model_type)
    assert (first, second) == (2, 1)


def test_layers_where_they_are_wanted(two: LocalRanks) -> None:
    assert two.run(count_layers, (1, 2)) == [1, 2]


def count_layers(layers: tuple[int, ...]) -> int:
    model = staged("llama", layers)
    assert torch.equal(generated(model), generated(made("llama", num_hidden_layers=LAYERS)))
    return len(model.model.layers)


@pytest.mark.parametrize("enabled", [False, True])
def test_batches_in_turns(two: LocalRanks, enabled: bool) -> None:
    token, _ = two.run(in_turns, None, enabled)
    two.run(in_turns, token, enabled)


def test_refusals(two: LocalRanks) -> None:
    two.run(refuse)


@pytest.mark.slow
def test_four_ranks_of_layers_and_heads(four: LocalRanks) -> None:
    four.run(on_a_mesh)


@pytest.mark.slow
def test_a_rank_that_died_is_told() -> None:
    ranks = LocalRanks(2)
    for pipe in ranks.pipes:
        pipe.send((without_the_other, ()))
    assert ranks.pipes[1].recv() == (True, "told")
    ranks.close()
