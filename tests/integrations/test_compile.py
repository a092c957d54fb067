"""Absorbed attention under torch.compile: one graph for every length, no break, and no copy of the cache."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from transformers import CompileConfig, PreTrainedModel, StaticCache

from flashmla_ops.integrations.transformers import StaticPagedLatentCache, enable
from tests.integrations.models import cached, left_padded, tiny_model, tokens
from tests.integrations.test_generate import generate

CAPACITY, PROMPT, STEPS = 512, 20, 10

CACHES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "contiguous": lambda model: StaticCache(config=model.config, max_cache_len=CAPACITY),
    "paged": lambda model: StaticPagedLatentCache(model, CAPACITY, page_size=16),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def step_inputs(i: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(2, 1, seed=i), "position_ids": torch.tensor([[PROMPT + i]])}


def compile_and_compare(
    new_cache: Callable[[PreTrainedModel], Any], backend: str, model_type: str = "deepseek_v3", **changes: Any
) -> tuple[list[str], int]:
    """Decode ten tokens after a prompt, compiled and eager; the generated code and the elements of a layer's cache."""
    eager, absorbed = (tiny_model(model_type, **changes) for _ in range(2))
    enable(absorbed)
    ours, theirs = new_cache(absorbed), CACHES["contiguous"](eager)
    absorbed(tokens(2, PROMPT), **cached(ours))
    eager(tokens(2, PROMPT), **cached(theirs))
    compiled = torch.compile(absorbed.forward, fullgraph=True, backend=backend)
    counters.clear()
    logits, code = run_and_get_code(lambda: compiled(**step_inputs(0), **cached(ours)).logits)
    for i in range(STEPS):
        if i > 0:
            logits = compiled(**step_inputs(i), **cached(ours)).logits
        expected = eager(**step_inputs(i), **cached(theirs)).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    layer = ours.layers[0]
    return code, (layer.slab if hasattr(layer, "slab") else layer.values).numel()


@pytest.mark.parametrize("cache", CACHES)
def test_one_graph_and_no_copy_of_the_cache(cache: str) -> None:
    code, cache_elements = compile_and_compare(CACHES[cache], "inductor", num_hidden_layers=1)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    (source,) = code
    assert "torch.ops.flashmla.decode" in source
    allocated = re.findall(r"= empty_strided_cpu\(\(([\d, ]+)\)", source)
    assert allocated
    largest = max(math.prod(int(size) for size in shape.split(",") if size.strip()) for shape in allocated)
    assert largest < cache_elements


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("cache", CACHES)
def test_one_graph_for_every_model(cache: str, model_type: str, moe: bool) -> None:
    compile_and_compare(CACHES[cache], "aot_eager", model_type, moe=moe)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("lengths", [[20, 20], [20, 7]], ids=["unpadded", "left-padded"])
def test_generate_compiles_its_decode_step_once(cache: str, lengths: list[int]) -> None:
    eager, absorbed = tiny_model(), tiny_model()
    enable(absorbed)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    inputs = left_padded(lengths)
    out = generate(absorbed, inputs, **cached(CACHES[cache](absorbed)), compile_config=config)
    assert torch.equal(out, generate(eager, inputs))
    assert counters["stats"]["unique_graphs"] == 1


def test_export_of_a_forward_without_a_cache() -> None:
    absorbed = tiny_model(num_hidden_layers=1)
    enable(absorbed)
    ids = tokens(2, 9)
    exported = torch.export.export(absorbed, (ids,), {"use_cache": False})
    assert any("flashmla.decode" in str(node.target) for node in exported.graph.nodes)
    logits = exported.module()(ids, use_cache=False).logits
    torch.testing.assert_close(logits, absorbed(ids, use_cache=False).logits)
