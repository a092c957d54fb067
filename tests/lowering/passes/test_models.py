"""Unmodified transformers models: every attention is rewritten, with any cache, and the logits stay what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from tests.integrations.models import tiny_model, tokens
from tests.lowering.passes.graphs import Rewritten, assert_equal_to, operators

CAPACITY, PROMPT, LAYERS = 64, 7, 2

GQA: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.12,
}


class Family(NamedTuple):
    make: Callable[[], PreTrainedModel]
    decode: list[str]  # the operators of one layer in a step that reads a cache
    oracle: torch.dtype = torch.float64  # of the unmodified model


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**GQA)).eval()


def qwen3() -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**GQA)).eval()


FAMILIES = {
    "llama": Family(llama, ["decode"]),
    "qwen3": Family(qwen3, ["decode"]),
    "deepseek-v3-dense": Family(lambda: tiny_model(num_hidden_layers=LAYERS), ["bmm", "decode_up"]),
    # torch's grouped product, which serves experts, has no float64.
    "deepseek-v3-moe": Family(
        lambda: tiny_model(moe=True, num_hidden_layers=LAYERS), ["bmm", "decode_up"], torch.float32
    ),
}

CACHES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "static": lambda model: StaticCache(config=model.config, max_cache_len=CAPACITY),
    "dynamic": lambda model: DynamicCache(config=model.config),
}


class Pair:
    """A model compiled with the passes, and the unmodified one in float64."""

    def __init__(self, family: str, implementation: str, cache: str | None) -> None:
        self.model = FAMILIES[family].make()
        self.model.config._attn_implementation = implementation
        self.exact = copy.deepcopy(self.model).to(FAMILIES[family].oracle)
        self.exact.config._attn_implementation = implementation
        self.compiled = Rewritten(self.model.forward)
        self.caches = [None, None] if cache is None else [CACHES[cache](each) for each in (self.model, self.exact)]

    def prompt(self) -> None:
        """Into both caches, by the unmodified models."""
        for model, cache in zip((self.model, self.exact), self.caches, strict=True):
            model(tokens(2, PROMPT), past_key_values=cache)

    def check(self, ids: Tensor) -> None:
        ours, exact = self.caches
        logits = self.compiled(ids, past_key_values=ours).logits
        assert_equal_to(logits, self.exact(ids, past_key_values=exact).logits, tolerance=2e-4)


def viewed(node: torch.fx.Node) -> torch.fx.Node:
    """The node that a chain of views is of."""
    aten = torch.ops.aten
    while node.target in (aten.permute.default, aten.view.default, aten.select.int):
        node = node.all_input_nodes[0]
    return node


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_decode_on_a_static_cache(family: str, implementation: str) -> None:
    """One graph for all steps, in which every layer reads the model's own cache."""
    pair = Pair(family, implementation, "static")
    pair.prompt()
    for i in range(3):
        pair.check(tokens(2, 1, seed=i))
    (graph,) = pair.compiled.graphs
    assert operators(graph) == FAMILIES[family].decode * LAYERS
    assert pair.compiled.refusals == []
    buffers = [node for node in graph.graph.nodes if "index_put" in str(node.target)]
    read = [cache for node in graph.graph.nodes if "decode" in str(node.target) for cache in node.args[1:3]]
    assert len({viewed(cache) for cache in read}) == 2 * LAYERS
    assert {viewed(cache) for cache in read} <= set(buffers)  # views of the caches themselves, and no copy


@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["llama", "deepseek-v3-dense"])
def test_decode_on_a_growing_cache(family: str, implementation: str) -> None:
    """A graph for the first length, and one for all others."""
    pair = Pair(family, implementation, "dynamic")
    pair.prompt()
    for i in range(4):
        pair.check(tokens(2, 1, seed=i))
    assert len(pair.compiled.graphs) == 2
    assert [operators(graph) for graph in pair.compiled.graphs] == [FAMILIES[family].decode * LAYERS] * 2
    assert pair.compiled.refusals == []


@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_without_a_cache(family: str, implementation: str) -> None:
    pair = Pair(family, implementation, None)
    for length in (9, 12, 70):
        pair.check(tokens(2, length))
    assert len(pair.compiled.graphs) == 2
    assert all(operators(graph) == ["decode"] * LAYERS for graph in pair.compiled.graphs)
    assert all("no keys but the queries' own" in refusal for refusal in pair.compiled.refusals)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["llama", "deepseek-v3-dense"])
def test_prefill_into_a_cache(family: str, cache: str) -> None:
    """Then a second turn, whose queries are several and whose keys are partly cached."""
    pair = Pair(family, "sdpa", cache)
    for length in (9, 4, 5):
        pair.check(tokens(2, length, seed=length))
    assert all(operators(graph)[-1] in ("decode", "decode_up") for graph in pair.compiled.graphs)
    assert all("no keys but the queries' own" in refusal for refusal in pair.compiled.refusals)
