"""FlashMLALayer, convert and restore: the tokens, weights and names of the attention that was replaced."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    StaticCache,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.llama.modeling_llama import LlamaAttention

from flashmla import FlashMLALayer, convert, is_converted, restore
from flashmla_ops.errors import ArgumentError, FallbackWarning, UnsupportedModelError
from flashmla_ops.integrations.transformers import SUPPORTED_MODEL_TYPES, PagedLatentCache, disable, enable, is_enabled
from flashmla_ops.integrations.transformers.families import GROUPED_MODEL_TYPES
from flashmla_ops.integrations.transformers.growing import GrowingLayer
from flashmla_ops.integrations.transformers.masks import MAX_ABSORBED_QUERIES
from tests.integrations.grouped import tiny_grouped
from tests.integrations.models import cached, left_padded, tiny_model, tokens
from tests.integrations.test_generate import generate

LONG = MAX_ABSORBED_QUERIES + 6
#: Types that are tried with the masks of eager attention too, which are added to the scores.
MASKS_ADDED = ("llama", "qwen3", "deepseek_v2", "deepseek_v3", "gpt_oss")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def tiny(model_type: str, implementation: str = "sdpa", **changes: Any) -> PreTrainedModel:
    if model_type in GROUPED_MODEL_TYPES:
        try:
            return tiny_grouped(model_type, implementation=implementation, **changes)
        except ValueError as error:
            if "does not support an attention implementation" in str(error):
                pytest.skip(f"this transformers has no {implementation} of {model_type}")
            raise
    model = tiny_model(model_type, **changes)
    model.set_attn_implementation(implementation)
    return model


def converted(model_type: str, implementation: str = "sdpa", **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model with eager attention, and one with the same weights, converted."""
    model = tiny(model_type, implementation)
    convert(model, **options)
    return tiny(model_type, "eager"), model


def calls(name: str) -> Any:
    return mock.patch.object(torch.ops.flashmla, name, wraps=getattr(torch.ops.flashmla, name))


@pytest.mark.parametrize(
    ("model_type", "implementation"),
    # transformers has no SDPA with sinks.
    [(each, "sdpa") for each in SUPPORTED_MODEL_TYPES if each != "gpt_oss"] + [(each, "eager") for each in MASKS_ADDED],
)
def test_tokens_and_logits_of_every_supported_type(model_type: str, implementation: str) -> None:
    eager, model = converted(model_type, implementation, preallocate=True)
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 6}
    for inputs in ({"input_ids": tokens(1, 9)}, left_padded([LONG, 33, 3])):
        actual: Any = generate(model, inputs, **options)
        expected: Any = generate(eager, inputs, **options)
        assert torch.equal(actual.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
    beams = {"num_beams": 4, "max_new_tokens": 6}
    assert torch.equal(generate(model, inputs, **beams), generate(eager, inputs, **beams))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "deepseek_v3"])
@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"prefill_chunk_size": 30}, {"prompt_lookup_num_tokens": 4}],
    ids=["static", "chunked prefill", "prompt lookup"],
)
def test_other_ways_to_generate(model_type: str, options: dict[str, Any]) -> None:
    eager, model = converted(model_type, preallocate=True)
    inputs = {"input_ids": tokens(1, 24).repeat(1, 3)}
    assert torch.equal(generate(model, inputs, **options), generate(eager, inputs))


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_assisted(model_type: str) -> None:
    eager, model = converted(model_type, preallocate=True)
    inputs = {"input_ids": tokens(1, 20)}
    expected = generate(eager, inputs)
    for main, assistant in ((model, eager), (eager, model)):
        assert torch.equal(generate(main, inputs, assistant_model=assistant), expected)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("length", [5, LONG])
def test_operators_that_run_and_their_levels(length: int, levels: int) -> None:
    """No mask: `decode` for short queries, `prefill` for long ones, both at the level of the layer."""
    eager, model = converted("llama", layers=levels)
    ids = tokens(2, length)
    with calls("prefill") as prefill, calls("decode") as decode:
        out = model(ids, use_cache=False).logits
    ran, other = (prefill, decode) if length > MAX_ABSORBED_QUERIES else (decode, prefill)
    assert (ran.call_count, other.call_count) == (2, 0)
    assert {call.kwargs["levels"] for call in ran.call_args_list} == {levels}
    torch.testing.assert_close(out, eager(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_the_cache_is_read_in_place(model_type: str, static: bool, padded: bool) -> None:
    _, model = converted(model_type)
    cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache(config=model.config)
    inputs = left_padded([20, 11 if padded else 20])
    model(**inputs, **cached(cache))
    padding = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    with calls("decode") as decode, calls("decode_up") as decode_up, calls("attend_masked") as masked:
        model(tokens(2, 1), **cached(cache), attention_mask=padding)
    found = [call for op in (decode, decode_up, masked) for call in op.call_args_list]
    assert len(found) == 2
    for call, layer in zip(found, cache.layers, strict=True):
        assert {read.data_ptr() for read in call.args[1:3]} == {layer.keys.data_ptr(), layer.values.data_ptr()}
        assert sum(read.numel() for read in call.args[1:3]) == layer.keys.numel() + layer.values.numel()


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "deepseek_v3"])
def test_one_graph_for_every_step(model_type: str) -> None:
    torch._dynamo.reset()
    eager, model = converted(model_type)
    ours, theirs = (StaticCache(config=each.config, max_cache_len=64) for each in (model, eager))
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    model(tokens(2, 20), **cached(ours))
    eager(tokens(2, 20), **cached(theirs))
    counters.clear()
    for i in range(5):
        step = {"input_ids": tokens(2, 1, seed=i), "position_ids": torch.tensor([[20 + i]])}
        out, expected = compiled(**step, **cached(ours)).logits, eager(**step, **cached(theirs)).logits
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("length", [9, LONG])
def test_compiled_and_exported_without_a_cache(model_type: str, length: int) -> None:
    torch._dynamo.reset()
    eager, model = converted(model_type)
    ids = tokens(2, length)
    expected = eager(ids, use_cache=False).logits
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)
    exported = torch.export.export(model, (ids,), {"use_cache": False})
    torch.testing.assert_close(exported.module()(ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "qwen3", "deepseek_v3"])
def test_weights_are_shared_and_named_as_before(model_type: str) -> None:
    eager, model = tiny(model_type, "eager"), tiny(model_type, "eager")
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    assert convert(model) == 2
    assert is_converted(model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in eager.named_parameters()]
    model.load_state_dict(eager.state_dict())
    assert restore(model) == 2
    assert dict(model.named_modules()) == modules
    assert not is_converted(model)
    assert torch.equal(model(tokens(2, 9)).logits, eager(tokens(2, 9)).logits)
    with pytest.raises(UnsupportedModelError, match="is not converted"):
        restore(model)


def test_a_converted_model_is_trained_cast_and_restored() -> None:
    _, model = converted("llama")
    model.train().double()
    layer = model.model.layers[0].self_attn
    layer.q_proj.weight.mul_(2)
    weight = layer.q_proj.weight
    restore(model)
    attention = model.model.layers[0].self_attn
    assert type(attention) is LlamaAttention
    assert attention.q_proj.weight is weight
    assert attention.training


def through_torch(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch": through_torch,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_a_copy_is_converted_and_apart(model_type: str, way: str) -> None:
    eager, model = converted(model_type, layers=2, preallocate=True)
    twin = COPIES[way](model)
    inputs = left_padded([20, 7])
    assert is_converted(twin)
    layer = twin.model.layers[1].self_attn
    assert (layer.levels, layer.preallocate) == (2, True)
    assert layer.q_proj if model_type == "llama" else layer.kv_b_proj
    assert torch.equal(generate(twin, inputs), generate(eager, inputs))
    next(layer.parameters()).mul_(2)
    assert next(layer.adopted[0].parameters()) is next(layer.parameters())
    assert torch.equal(generate(model, inputs), generate(eager, inputs))
    restore(twin)
    assert is_converted(model)


def test_save_pretrained(tmp_path: Any) -> None:
    eager, model = converted("qwen3")
    model.save_pretrained(tmp_path / "converted")
    eager.set_attn_implementation("sdpa")
    eager.save_pretrained(tmp_path / "plain")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "converted" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert not is_converted(loaded)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("length", [7, LONG])
def test_gradients_are_those_of_transformers_and_padded_ones_are_said_once(model_type: str, length: int) -> None:
    eager, model = converted(model_type)
    ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.long)
    with torch.enable_grad():
        eager.train()(ids, labels=ids).loss.backward()
        with warnings.catch_warnings(action="error"):
            model.train()(ids, labels=ids).loss.backward()
        mask[0, 4:] = 0
        with pytest.warns(FallbackWarning, match="a gradient is required") as caught:
            model(ids, attention_mask=mask)
        model(ids, attention_mask=mask)
    assert [warning.category for warning in caught] == [FallbackWarning]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_nothing_is_told_where_all_is_served() -> None:
    _, model = converted("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, left_padded([20, 7]))


def test_attention_weights() -> None:
    eager, model = converted("llama")
    inputs = left_padded([20, 7])
    actual, expected = (each(**inputs, output_attentions=True).attentions for each in (model, eager))
    assert len(actual) == 2
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


# The snippet of the issue, and fresh weights


def test_the_snippet() -> None:
    model, expected = tiny("llama"), tiny("llama")
    inputs = left_padded([20, 7])
    for i, layer in enumerate(model.model.layers):
        weights = layer.self_attn.state_dict()
        layer.self_attn = FlashMLALayer(embed_dim=64, num_heads=4, num_kv_heads=2, layers=3, bias=True)
        layer.self_attn.load_state_dict(weights)
        if i == 0:
            layer.self_attn = FlashMLALayer.from_attention(layer.self_attn, layers=3, threshold=None, preallocate=True)
    tokens_of = [generate(model, inputs)]
    convert(model)
    tokens_of.append(generate(model, inputs))
    enable(model)
    assert is_enabled(model)
    tokens_of.append(model.generate(**inputs, max_new_tokens=12, do_sample=False))
    assert all(torch.equal(out, generate(expected, inputs)) for out in tokens_of)
    with pytest.raises(UnsupportedModelError, match=r"is enabled: call disable"):
        restore(model)
    disable(model)
    assert not is_enabled(model)
    assert torch.equal(generate(model, inputs), tokens_of[0])
    restore(model)
    assert [type(layer.self_attn) is LlamaAttention for layer in model.model.layers] == [False, False]
    assert torch.equal(generate(model, inputs), tokens_of[0])


@pytest.mark.parametrize("num_kv_heads", [None, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_fresh_weights_have_the_names_of_llama(num_kv_heads: int | None) -> None:
    model = tiny("llama", num_key_value_heads=num_kv_heads or 4, attention_bias=False)
    attention = model.model.layers[1].self_attn
    layer = FlashMLALayer(embed_dim=64, num_heads=4, num_kv_heads=num_kv_heads)
    assert isinstance(layer, LlamaAttention)
    assert layer.state_dict().keys() == attention.state_dict().keys()
    layer.load_state_dict(attention.state_dict())
    x = torch.randn(2, 9, 64)
    rotary = model.model.rotary_emb(x, torch.arange(9)[None])
    out, weights = layer(x, position_embeddings=rotary, attention_mask=None)
    assert weights is None
    torch.testing.assert_close(out, attention(x, position_embeddings=rotary, attention_mask=None)[0])


@pytest.mark.parametrize("q_lora_rank", [None, 24])
def test_fresh_weights_of_mla(q_lora_rank: int | None) -> None:
    model = tiny("deepseek_v3", q_lora_rank=q_lora_rank)
    sizes = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24}
    inputs = left_padded([20, 7])
    expected = generate(model, inputs)
    for layer in model.model.layers:
        weights = layer.self_attn.state_dict()
        layer.self_attn = FlashMLALayer(embed_dim=64, num_heads=4, q_lora_rank=q_lora_rank, **sizes)
        assert isinstance(layer.self_attn, DeepseekV3Attention)
        layer.self_attn.load_state_dict(weights)
    assert torch.equal(generate(model, inputs), expected)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]


def test_a_fresh_layer_does_not_guess_its_place() -> None:
    layer = FlashMLALayer(embed_dim=64, num_heads=4)
    x, rotary = torch.randn(1, 1, 64), (torch.ones(1, 1, 16), torch.zeros(1, 1, 16))
    cache = DynamicCache()
    for _ in range(2):
        cache.update(torch.randn(1, 4, 3, 16), torch.randn(1, 4, 3, 16), len(cache.layers))
    with pytest.raises(ArgumentError, match="layer_idx"):
        layer(x, position_embeddings=rotary, attention_mask=None, past_key_values=cache)


# Caches


def test_room_ahead() -> None:
    _, model = converted("llama", preallocate=True)
    cache = DynamicCache(config=model.config)
    generate(model, {"input_ids": tokens(1, 20)}, **cached(cache))
    layer = cache.layers[0]
    assert type(layer) is GrowingLayer
    memory = layer.keys.data_ptr()
    for _ in range(3):
        model(tokens(1, 1), **cached(cache))
    assert layer.keys.data_ptr() == memory
    shallow = copy.copy(layer)
    kept = layer.keys.clone()
    shallow.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))
    layer.update(torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16))
    assert torch.equal(layer.keys[:, :, :-1], kept)
    assert torch.equal(shallow.keys[:, :, -1], torch.zeros(1, 2, 16))


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_a_paged_cache(model_type: str) -> None:
    eager, model = converted(model_type)
    for inputs in ({"input_ids": tokens(2, LONG)}, left_padded([20, 7])):
        cache = PagedLatentCache(model, page_size=4)
        assert torch.equal(generate(model, inputs, **cached(cache)), generate(eager, inputs))


# Refusals


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "indexed": (
        lambda: tiny_model("deepseek_v32", index_n_heads=2, index_head_dim=16, index_topk=8),
        "'deepseek_v32' attends to indexed tokens",
    ),
    "diffllama": (lambda: tiny_grouped("diffllama"), "model type 'diffllama' is not known to be exact"),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)), "'gpt2'"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("by", [convert, enable])
def test_refusals_name_the_type_and_the_reason(name: str, by: Callable[[nn.Module], int]) -> None:
    make, reason = REFUSED[name]
    model = make()
    modules = dict(model.named_modules())
    with pytest.raises(UnsupportedModelError, match=reason):
        by(model)
    assert dict(model.named_modules()) == modules
    if hasattr(model, "model"):
        with pytest.raises(UnsupportedModelError, match=reason):
            FlashMLALayer.from_attention(model.model.layers[0].self_attn)


def test_attention_that_is_not_transformers_own() -> None:
    class Mine(LlamaAttention):
        pass

    model = tiny("llama")
    attention = model.model.layers[0].self_attn
    attention.__class__ = Mine
    with pytest.raises(UnsupportedModelError, match=r"expected an attention of transformers, got a .*Mine"):
        convert(model)
    attention.__class__ = LlamaAttention
    attention.forward = attention.forward
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.self_attn\.forward: expected transformers' own"):
        convert(model)
    with pytest.raises(UnsupportedModelError, match="expected the attention module of a model of transformers"):
        FlashMLALayer.from_attention(nn.Linear(2, 2))
    enabled = tiny("llama")
    enable(enabled)
    with pytest.raises(UnsupportedModelError, match=r"is enabled: call disable"):
        convert(enabled)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("threshold", {"threshold": 1.01}),
        ("layers", {"layers": 4}),
        ("embed_dim", {"embed_dim": 0}),
        ("num_heads", {"num_heads": 3}),
        ("num_kv_heads", {"num_kv_heads": 3}),
        ("head_dim", {"head_dim": 7}),
        ("kv_lora_rank", {"kv_lora_rank": -1}),
    ],
)
def test_options_that_do_not_fit(argument: str, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"argument '{argument}'"):
        FlashMLALayer(**{"embed_dim": 64, "num_heads": 4} | options)


def test_a_threshold_out_of_range_converts_nothing() -> None:
    model = tiny("llama")
    with pytest.raises(ArgumentError, match=r"a number in \[0, 1\], got -0\.05"):
        convert(model, threshold=-0.05)
    assert not is_converted(model)


def test_the_short_name_needs_no_transformers() -> None:
    code = "import sys; sys.modules['transformers'] = None; import flashmla; flashmla.FlashMLA; flashmla.FlashMLALayer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "transformers" in done.stderr.splitlines()[-1]
    assert "ImportError" in done.stderr or "ModuleNotFoundError" in done.stderr
