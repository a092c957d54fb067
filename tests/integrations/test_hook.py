"""enable() and disable(): what they change, what they leave, and what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel, StaticCache

from flashmla_ops.errors import UnsupportedModelError
from flashmla_ops.integrations.transformers import ABSORBED_ATTENTION, disable, enable, is_enabled
from flashmla_ops.integrations.transformers.masks import MAX_ABSORBED_QUERIES
from flashmla_ops.integrations.transformers.versions import CACHE_ARGUMENT
from flashmla_ops.nn.fast_linear import fast_linear
from tests.integrations.models import cached, left_padded, tiny_model, tokens


def logits(model: PreTrainedModel) -> torch.Tensor:
    cache = model(tokens(2, MAX_ABSORBED_QUERIES + 1), use_cache=True)[CACHE_ARGUMENT]
    out: torch.Tensor = model(tokens(2, 3, seed=1), **cached(cache)).logits
    return out


def count_decodes(model: PreTrainedModel) -> int:
    """How often a short query runs the operator."""
    with mock.patch.object(torch.ops.flashmla, "decode_up", wraps=torch.ops.flashmla.decode_up) as decode:
        logits(model)
    return int(decode.call_count)


def test_state_dict_is_untouched() -> None:
    model = tiny_model()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    enable(model)
    logits(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[name].data_ptr() == pointer for name, (pointer, _) in before.items())
    assert all(torch.equal(after[name], value) for name, (_, value) in before.items())


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_operator_reads_the_cache_in_place(static: bool, padded: bool) -> None:
    """kv_cache and k_cache are the cache's own tensors: the same memory, the same number of elements."""
    model = tiny_model()
    enable(model)
    cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache(config=model.config)
    inputs = left_padded([20, 11 if padded else 20])
    model(**inputs, **cached(cache))
    padding = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    with mock.patch.object(torch.ops.flashmla, "decode_up", wraps=torch.ops.flashmla.decode_up) as decode:
        model(tokens(2, 1), **cached(cache), attention_mask=padding)
    for call, layer in zip(decode.call_args_list, cache.layers, strict=True):
        for read, own in zip(call.args[1:3], (layer.keys, layer.values), strict=True):
            assert read.data_ptr() == own.data_ptr()
            assert read.numel() == own.numel()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_disable_restores(implementation: str) -> None:
    model = tiny_model()
    model.set_attn_implementation(implementation)
    attributes = [dict(module.__dict__) for module in model.modules()]
    expected = logits(model)
    assert enable(model) == 2
    assert is_enabled(model)
    assert count_decodes(model) == 2
    disable(model)
    assert not is_enabled(model)
    assert model.config._attn_implementation == implementation
    assert [module.__dict__ for module in model.modules()] == attributes
    assert count_decodes(model) == 0
    assert torch.equal(logits(model), expected)


def test_enable_twice_then_disable_once() -> None:
    model = tiny_model()
    enable(model.model)
    assert enable(model) == 2
    disable(model)
    assert model.config._attn_implementation == "eager"
    with pytest.raises(UnsupportedModelError, match="not enabled"):
        disable(model)


def test_a_copy_has_its_own_switch() -> None:
    model = tiny_model()
    enable(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].self_attn.kv_b_proj.weight.mul_(2)
    expected = tiny_model()
    expected.load_state_dict(twin.state_dict())
    torch.testing.assert_close(logits(twin), logits(expected), atol=1e-4, rtol=1e-4)
    disable(twin)
    assert is_enabled(model)
    assert count_decodes(model) == 2


def test_weights_loaded_after_enable_are_used() -> None:
    model, other = tiny_model(), tiny_model()
    for parameter in other.parameters():
        parameter.mul_(1.1)
    enable(model)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(logits(model), logits(other), atol=1e-4, rtol=1e-4)


def test_another_attention_chosen_after_enable_works_and_stays() -> None:
    model = tiny_model()
    expected = logits(model)
    enable(model)
    model.set_attn_implementation("eager")
    assert torch.equal(logits(model), expected)
    disable(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("length", [7, MAX_ABSORBED_QUERIES + 1])
def test_gradients_take_the_expanded_path(length: int) -> None:
    model, eager = tiny_model(), tiny_model()
    enable(model)
    ids = tokens(2, length)
    with torch.enable_grad():
        for each in (model, eager):
            each.train()
            each(ids, labels=ids).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("length", [5, MAX_ABSORBED_QUERIES + 1])
def test_gradient_of_kv_b_proj_alone(length: int) -> None:
    model, eager = tiny_model(num_hidden_layers=1), tiny_model(num_hidden_layers=1)
    enable(model)
    for each in (model, eager):
        each.requires_grad_(False)
        each.model.layers[0].self_attn.kv_b_proj.weight.requires_grad_(True)
        with torch.enable_grad():
            each(tokens(1, length)).logits.square().mean().backward()
    ours, theirs = (each.model.layers[0].self_attn.kv_b_proj.weight.grad for each in (model, eager))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_attention_without_enable() -> None:
    model = tiny_model()
    model.set_attn_implementation(ABSORBED_ATTENTION)
    with pytest.raises(UnsupportedModelError, match=r"call .*enable"):
        model(tokens(1, 4))


def test_no_attention_that_is_known() -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel \(model type 'gpt2'\) has no attention that"):
        enable(GPT2LMHeadModel(config))


def test_indexed_model() -> None:
    model = tiny_model("deepseek_v32", index_n_heads=2, index_head_dim=16, index_topk=8)
    with pytest.raises(UnsupportedModelError, match="'deepseek_v32' attends to indexed tokens"):
        enable(model)
    assert model.config._attn_implementation == "eager"


def test_unknown_model_type() -> None:
    model = tiny_model()
    model.config.model_type = "new_mla"
    with pytest.raises(UnsupportedModelError, match="'new_mla' is not known to be exact"):
        enable(model)


@pytest.mark.parametrize("first", [enable, fast_linear])
def test_fast_linear_layers_are_plain(first: Callable[[nn.Module], int]) -> None:
    model, eager = tiny_model(), tiny_model()
    first(model)
    fast_linear(model)
    enable(model)
    torch.testing.assert_close(logits(model), logits(eager), atol=1e-4, rtol=1e-4)
    assert count_decodes(model) == 2
