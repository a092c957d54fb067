"""Quantised models of transformers: enabled, converted and compiled."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

pytest.importorskip("transformers")

from transformers import PreTrainedModel

from flashmla_ops.errors import UnsupportedModelError
from flashmla_ops.integrations.transformers import compile, disable, enable, uncompile, why_not
from flashmla_ops.nn import FlashMLALayer, convert, restore
from flashmla_ops.quant import dequantize, quantize
from tests.integrations.models import tiny_model

PROMPT = torch.tensor([[5, 9, 3, 77], [8, 2, 6, 4]])


def llama(**options: object) -> PreTrainedModel:
    return tiny_model("llama", num_key_value_heads=2, **options)


def tokens(model: PreTrainedModel) -> Tensor:
    return model.generate(PROMPT, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("weights", ["int8", "int4", "int8-attention+int4-mlp"])
def test_generates_as_its_dequantised_weights(weights: str) -> None:
    model, other = llama(), llama()
    plan = quantize(model, weights).plan
    assert len(plan) == 15
    assert quantize(other, plan).plan == plan
    dequantize(other)
    expected = tokens(other)
    assert torch.equal(tokens(model), expected)
    assert enable(model) == 2
    assert why_not(model) == []
    assert torch.equal(tokens(model), expected)
    disable(model)
    assert convert(model) == 2
    assert isinstance(model.model.layers[0].self_attn, FlashMLALayer)
    assert torch.equal(tokens(model), expected)
    restore(model)
    if weights == "int4":
        compile(model, fullgraph=True)
        assert torch.equal(tokens(model), expected)
        uncompile(model)


def test_a_tied_head_stays_tied() -> None:
    model = llama(tie_word_embeddings=True)
    found = quantize(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {layer.name: layer.note for layer in found.layers}[
        "lm_head"
    ] == "its weight is also that of model.embed_tokens"
    assert "lm_head" in quantize(llama()).plan


def test_the_mix_by_part() -> None:
    plan = quantize(llama(), "int8-attention+int4-mlp").plan
    assert {name.rpartition(".")[2]: chosen for name, chosen in plan.items()} == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "lm_head"), "int8"),
        "gate_proj": "int4_g64",
        "up_proj": "int4_g64",
        "down_proj": "int4_g32",
    }


def test_mla_keeps_what_absorbed_attention_reads() -> None:
    model = tiny_model("deepseek_v3")
    found = quantize(model, "int4_g32")
    notes = {layer.name: layer.note for layer in found.layers}
    assert notes["model.layers.0.self_attn.kv_b_proj"] == "named in keep: kv_b_proj"
    expected = tokens(model)
    enable(model)
    assert why_not(model) == []
    assert torch.equal(tokens(model), expected)
    disable(model)
    quantize(model, "int8", keep=())
    with pytest.raises(UnsupportedModelError, match=r"kv_b_proj.*QuantizedLinear"):
        enable(model)
    dequantize(model)
    enable(model)


@torch.no_grad()
def test_compiles_with_no_graph_break() -> None:
    model = llama(num_hidden_layers=1)
    quantize(model, "int4")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("flashmla")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    out = compiled(PROMPT, use_cache=False).logits
    torch.testing.assert_close(out, model(PROMPT, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1
