"""Continuous batching: the tokens of plain generate, through the operators, over transformers' own pages."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from flashmla_ops.errors import UnsupportedModelError
from flashmla_ops.integrations.transformers import compile, disable, enable, is_enabled, uncompile
from flashmla_ops.integrations.transformers.batching import hold_latents
from flashmla_ops.integrations.transformers.families import MLA_MODEL_TYPES
from flashmla_ops.nn import convert
from tests.integrations.grouped import tiny_grouped
from tests.integrations.models import tiny_model, tokens

pytestmark = pytest.mark.usefixtures("foreign_attention_in_batches")

NEW_TOKENS = 16
GROUPED = ("gemma", "gemma2", "gemma3_text", "gpt_oss", "llama", "qwen3", "smollm3")
LENGTHS = (9, 70, 17, 5)


def make(model_type: str, **changes: Any) -> PreTrainedModel:
    return tiny_model(model_type, **changes) if model_type in MLA_MODEL_TYPES else tiny_grouped(model_type, **changes)


def options(**changes: Any) -> GenerationConfig:
    greedy: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    return GenerationConfig(**greedy | changes)


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    return [tokens(1, length, seed=length)[0].tolist() for length in lengths]


def alone(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    new: list[int] = model.generate(torch.tensor([prompt]), generation_config=options())[0, len(prompt) :].tolist()
    return new


def batched(model: PreTrainedModel, inputs: list[list[int]], **config: Any) -> list[list[int]]:
    """Longer prompts than ``max_batch_tokens`` come in pieces, beside the next tokens of other sequences."""
    sizes = {"block_size": 16, "num_blocks": 64, "max_batch_tokens": 64} | config
    config = {"generation_config": options(), "continuous_batching_config": ContinuousBatchingConfig(**sizes)}
    results = model.generate_batch(inputs, **config).values()
    assert [result.error for result in results] == [None] * len(inputs)
    return [result.generated_tokens for result in results]


@pytest.mark.parametrize("model_type", [*GROUPED, *(t for t in MLA_MODEL_TYPES if t != "kimi_linear")])
def test_the_tokens_of_plain_generate(model_type: str) -> None:
    plain, model = make(model_type), make(model_type)
    before = type(model)
    enable(model)
    with mock.patch.object(nn.functional, "scaled_dot_product_attention", side_effect=AssertionError):
        got = batched(model, prompts())
    assert got == [alone(plain, prompt) for prompt in prompts()]
    assert is_enabled(model)
    disable(model)
    assert type(model) is before


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_a_shared_prefix(model_type: str) -> None:
    """The second batch finds the blocks of the first, and its prompts prefill behind them."""
    plain, model = make(model_type), make(model_type)
    enable(model)
    prefix = prompts((40,))[0]
    config = ContinuousBatchingConfig(block_size=16, num_blocks=64, max_batch_tokens=64)
    with model.continuous_batching_context_manager(options(), continuous_batching_config=config) as manager:
        for prompt in ([*prefix, 7], [*prefix, 9, 11]):
            manager.add_requests([prompt])
            found = None
            while found is None:
                found = manager.get_result(timeout=1)
            assert found.generated_tokens == alone(plain, prompt)
        assert manager.batch_processor.cache._total_prefix_length == 32


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_several_sequences_of_one_prompt(model_type: str) -> None:
    """They begin with copies of its last block. Sampling among one candidate is greedy."""
    plain, model = make(model_type), make(model_type)
    enable(model)
    config = ContinuousBatchingConfig(block_size=16, num_blocks=64, max_batch_tokens=64)
    sampled = options(do_sample=True, top_k=1, num_return_sequences=3)
    (prompt,) = prompts((21,))
    with model.continuous_batching_context_manager(sampled, continuous_batching_config=config) as manager:
        manager.add_requests([prompt])
        found: list[list[int]] = []
        while len(found) < 3:
            if (result := manager.get_result(timeout=1)) is not None:
                found.append(result.generated_tokens)
    assert found == [alone(plain, prompt)] * 3


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_a_compiled_batch(model_type: str) -> None:
    """Nothing is read on the host, and the tokens that pad a batch to its size count for nothing."""
    plain, model = make(model_type), make(model_type)
    enable(model)
    graph = CompileConfig(backend="eager", fullgraph=True, mode=None)
    got = batched(model, prompts(), varlen_compile_config=graph)
    assert got == [alone(plain, prompt) for prompt in prompts()]


def test_a_projection_that_is_more_than_its_weight() -> None:
    """Absorbed attention reads the weight alone, so every sequence is expanded by the model's own code."""
    plain, model = tiny_model(), tiny_model()
    enable(model)
    for each in (plain, model):
        for layer in each.model.layers:
            layer.self_attn.kv_b_proj.register_forward_hook(lambda module, args, out: out * 1.25)
    assert batched(model, prompts()) == [alone(plain, prompt) for prompt in prompts()]


def test_converted_layers_and_others() -> None:
    plain, model = tiny_grouped(), tiny_grouped(implementation="sdpa")
    convert(model)
    model.model.layers[1].self_attn = model.model.layers[1].self_attn.adopted[0]
    assert batched(model, prompts()) == [alone(plain, prompt) for prompt in prompts()]


def test_pages_of_latents_have_room_for_latents_alone() -> None:
    model = tiny_model(num_attention_heads=8, num_key_value_heads=8)
    enable(model)
    config = ContinuousBatchingConfig(block_size=16, num_blocks=4, max_batch_tokens=64)
    manager = model.init_continuous_batching(options(), config)
    cache = manager._create_batch_processor().cache
    per_token = sum(tensor[0].numel() for tensor in (*cache.latents, *cache.rotary))
    assert per_token == 2 * (model.config.kv_lora_rank + model.config.qk_rope_head_dim)
    assert not cache.key_cache
    model.set_attn_implementation(manager._original_attn_impl)


def test_refusals() -> None:
    model = tiny_model("kimi_linear")
    enable(model)
    with pytest.raises(UnsupportedModelError, match=r"latents in every layer, and only \[3\]"):
        model.generate_batch(prompts())
    model = tiny_model()
    enable(model)
    offload = ContinuousBatchingConfig(block_size=16, num_blocks=4, max_batch_tokens=64, cpu_offload_space=0.1)
    with pytest.raises(UnsupportedModelError, match=r"cpu_offload_space=0\.0"):
        model.generate_batch(prompts(), options(), offload)
    assert is_enabled(model)
    model.set_attn_implementation("paged|absorbed_mla")
    with pytest.raises(UnsupportedModelError, match="without a paged cache"):
        model(tokens(1, 3))


def test_pages_of_heads_are_refused_by_mla() -> None:
    model = tiny_model()
    convert(model)
    config = ContinuousBatchingConfig(block_size=16, num_blocks=64, max_batch_tokens=64)
    (result,) = model.generate_batch(prompts((9,)), options(), config).values()
    assert "pages of latents: call enable(model)" in result.error


def test_with_compiled_steps_in_any_order() -> None:
    model = tiny_model()
    before = type(model)
    compile(model)
    enable(model)
    uncompile(model)
    disable(model)
    assert type(model) is before
    enable(model)
    compile(model)
    disable(model)
    uncompile(model)
    assert type(model) is before


def test_holding_latents_copies_blocks() -> None:
    class Cache:
        cache_shape, block_size, dtype, device = (12, 1, 5), 4, torch.float32, "cpu"

    cache: Any = Cache()
    cache.key_cache = cache.value_cache = [torch.empty(12, 1, 5)]
    hold_latents(cache, 6, 2)
    for tensor in (*cache.latents, *cache.rotary):
        tensor.copy_(torch.arange(12.0)[:, None, None])
    cache.copy_cache([0], [2])
    assert cache.latents[0][:, 0, 0].tolist() == cache.rotary[0][:, 0, 1].tolist() == [*range(8), *range(4)]
