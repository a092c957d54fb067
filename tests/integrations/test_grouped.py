"""`enable` of GQA, MHA and MQA models: the tokens of eager attention, on transformers' caches and on paged ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel, StaticCache

from flashmla_ops.errors import ArgumentError, UnsupportedModelError
from flashmla_ops.integrations.transformers import (
    GROUPED_ATTENTION,
    PagedLatentCache,
    StaticPagedLatentCache,
    disable,
    enable,
    is_enabled,
    why_not,
)
from flashmla_ops.integrations.transformers.grouped import grouped_attention
from flashmla_ops.integrations.transformers.masks import MAX_ABSORBED_QUERIES
from flashmla_ops.integrations.transformers.rows import Pages
from tests.integrations.grouped import tiny_grouped
from tests.integrations.models import cached, left_padded, tokens
from tests.integrations.test_generate import generate

#: Types that differ in biases, norms, joint projections and rotary embedding; tests/nn/test_layer.py has all.
MODEL_TYPES = ("llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
LONG = MAX_ABSORBED_QUERIES + 6
CAPACITY = 128
CACHES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=CAPACITY),
    "paged": lambda model: PagedLatentCache(model, page_size=4),
    "static paged": lambda model: StaticPagedLatentCache(model, CAPACITY, page_size=16),
}


def pair(model_type: str = "llama") -> tuple[PreTrainedModel, PreTrainedModel]:
    eager, enabled = tiny_grouped(model_type), tiny_grouped(model_type)
    assert enable(enabled) == 2
    return eager, enabled


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_tokens_of_every_type_on_every_cache(model_type: str, cache: str) -> None:
    eager, model = pair(model_type)
    for inputs in ({"input_ids": tokens(2, LONG)}, left_padded([20, 7])):
        out = generate(model, inputs, **cached(CACHES[cache](model)), max_new_tokens=6)
        assert torch.equal(out, generate(eager, inputs, max_new_tokens=6))


@pytest.mark.parametrize("cache", ["dynamic", "paged"])
def test_beams_drafts_and_chunks(cache: str) -> None:
    eager, model = pair()
    inputs = {"input_ids": tokens(1, 24).repeat(1, 3)}
    for options in ({"num_beams": 4}, {"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 70}):
        out = generate(model, inputs, **cached(CACHES[cache](model)), **options)
        assert torch.equal(out, generate(eager, inputs, **{k: v for k, v in options.items() if k == "num_beams"}))


@pytest.mark.parametrize("cache", ["static", "static paged"])
def test_one_graph_for_every_step(cache: str) -> None:
    torch._dynamo.reset()
    eager, model = pair()
    ours, theirs = CACHES[cache](model), CACHES["static"](eager)
    model(tokens(2, 20), **cached(ours))
    eager(tokens(2, 20), **cached(theirs))
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    counters.clear()
    for i in range(4):
        step = {"input_ids": tokens(2, 1, seed=i), "position_ids": torch.tensor([[20 + i]])}
        out, expected = compiled(**step, **cached(ours)).logits, eager(**step, **cached(theirs)).logits
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_disable_restores() -> None:
    model = tiny_grouped(implementation="sdpa")
    attributes = [dict(module.__dict__) for module in model.modules()]
    expected = model(tokens(2, 9)).logits
    enable(model)
    assert is_enabled(model)
    assert why_not(model) == []
    assert model.config._attn_implementation == GROUPED_ATTENTION
    disable(model)
    assert not is_enabled(model)
    assert [module.__dict__ for module in model.modules()] == attributes
    assert torch.equal(model(tokens(2, 9)).logits, expected)


def test_attention_without_enable() -> None:
    model = tiny_grouped()
    model.set_attn_implementation(GROUPED_ATTENTION)
    with pytest.raises(UnsupportedModelError, match=r"call .*enable"):
        model(tokens(1, 4))


# Every mask, against transformers' SDPA

MODEL = tiny_grouped()
enable(MODEL)
MODULE: nn.Module = MODEL.model.layers[0].self_attn
H_Q, H_KV, D = 4, 2, 16


def states(s_q: int, s_kv: int, b: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(s_q * 100 + s_kv)
    shapes = ((b, H_Q, s_q, D), (b, H_KV, s_kv, D), (b, H_KV, s_kv, D))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def as_pages(key: Tensor, value: Tensor, page_size: int) -> tuple[Tensor, Pages]:
    """The same rows on pages in reverse order; unused rows are NaN."""
    b, h_kv, s_kv, _ = key.shape
    n = -(-s_kv // page_size)
    rows = torch.full((b, h_kv, n * page_size, 2 * D), torch.nan)
    rows[:, :, :s_kv] = torch.cat([value, key], dim=-1)
    slab = rows.view(b, h_kv, n, page_size, 2 * D).transpose(1, 2).flatten(0, 1).flip(0).contiguous()
    table = torch.arange(b * n - 1, -1, -1, dtype=torch.int32).view(b, n)
    return slab, Pages(table, torch.full((b,), s_kv, dtype=torch.int32), s_kv)


def masks(s_q: int, s_kv: int) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(s_kv)
    holes = torch.rand(2, 1, s_q, s_kv, generator=generator) < 0.5
    holes[..., 0] = True
    causal = torch.ones(s_q, s_kv, dtype=torch.bool).tril(s_kv - s_q)[None, None]
    return {
        "none": None,
        "holes": holes,
        "causal": causal,
        "one row": holes[:, :, :1],
        "of eager": torch.where(causal, 0.0, torch.finfo(torch.float32).min),
        "bias": torch.randn(2, 1, s_q, s_kv, generator=generator),
        "bias of heads": torch.randn(1, H_Q, s_q, s_kv, generator=generator),
        "heads": torch.rand(2, H_Q, s_q, s_kv, generator=generator) < torch.tensor(0.9),
        "float64": torch.where(causal, 0.0, -1e9).double(),
    }


@pytest.mark.parametrize("mask", masks(1, 1))
@pytest.mark.parametrize(("s_q", "s_kv"), [(1, 9), (5, 5), (5, 11), (LONG, LONG), (LONG, LONG + 9)])
def test_any_mask(s_q: int, s_kv: int, mask: str) -> None:
    query, key, value = states(s_q, s_kv)
    given = masks(s_q, s_kv)[mask]
    theirs = given.float() if given is not None and given.dtype == torch.float64 else given
    expected = nn.functional.scaled_dot_product_attention(
        query, key, value, theirs, scale=0.3, enable_gqa=True, is_causal=given is None and s_q > 1
    ).transpose(1, 2)
    if mask == "float64":
        key, value, query, expected = key.double(), value.double(), query.double(), expected.double()
    out = grouped_attention(MODULE, query, key, value, given, scaling=0.3)[0]
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)
    if mask != "float64":
        pages = as_pages(key, value, 4)
        torch.testing.assert_close(
            grouped_attention(MODULE, query, *pages, given, scaling=0.3)[0], expected, atol=2e-5, rtol=2e-5
        )


@pytest.mark.parametrize("output_attentions", [False, True])
def test_attention_that_sees_later_tokens(output_attentions: bool) -> None:
    query, key, value = states(5, 5)
    options = {"scaling": 0.3, "is_causal": False, "output_attentions": output_attentions}
    out = grouped_attention(MODULE, query, key, value, None, **options)[0]
    expected = nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_an_argument_that_no_operator_takes() -> None:
    with pytest.raises(UnsupportedModelError, match="attends with position_bias"):
        grouped_attention(MODULE, *states(1, 3), None, position_bias=torch.ones(4))


def test_mask_of_another_length() -> None:
    with pytest.raises(ArgumentError, match="attention_mask"):
        grouped_attention(MODULE, *states(3, 9), torch.ones(2, 1, 3, 8, dtype=torch.bool))


def test_keys_that_are_not_contiguous_are_copied() -> None:
    query, key, value = states(3, 9)
    strided = key.mT.contiguous().mT
    assert strided.stride(-1) != 1
    out, expected = (grouped_attention(MODULE, query, each, value, None)[0] for each in (strided, key))
    torch.testing.assert_close(out, expected)


def test_the_operators_read_the_prefix_in_place() -> None:
    """A long query behind a prefix: the new rows are gathered, those of the prefix are read where they lie."""
    _, model = pair()
    cache = DynamicCache(config=model.config)
    model(tokens(2, 20), **cached(cache))
    with mock.patch.object(torch.ops.flashmla, "decode", wraps=torch.ops.flashmla.decode) as decode:
        model(tokens(2, LONG), **cached(cache))
    assert decode.call_count == 2 * len(cache.layers)
    memory = {each.data_ptr() for layer in cache.layers for each in (layer.keys, layer.values)}
    assert {tensor.data_ptr() for call in decode.call_args_list for tensor in call.args[1:3]} <= memory
