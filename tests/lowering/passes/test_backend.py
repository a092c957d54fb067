"""The trained model of the demo, unmodified, through ``torch.compile(backend="flashmla")`` itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

import flashmla_ops
from tests.lowering.compiled import Compiled
from tests.lowering.passes.attentions import inputs, sdpa
from tests.lowering.passes.graphs import assert_equal_to

FIXTURE = Path(flashmla_ops.__file__).parent / "fixtures" / "tiny_mla_lm"


def test_attention_is_rewritten_on_the_way_to_inductor() -> None:
    compiled = Compiled(sdpa(is_causal=True))
    tensors = inputs(6, 6)
    assert_equal_to(compiled(*tensors), sdpa(is_causal=True)(*(x.double() for x in tensors)))
    assert "torch.ops.flashmla.decode" in compiled.sources[0]
    assert "_scaled_dot_product" not in compiled.sources[0]


@pytest.mark.slow
def test_a_trained_model_decodes_on_its_own_latents() -> None:
    model = AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=torch.float32).eval()
    ids = torch.arange(3, 15)[None]
    caches = [StaticCache(config=model.config, max_cache_len=64) for _ in range(2)]
    for cache in caches:
        model(ids, past_key_values=cache)
    compiled = Compiled(model.forward)
    for i in range(4):
        token = torch.tensor([[20 + i]])
        logits = compiled(token, past_key_values=caches[0]).logits
        assert_equal_to(logits, model(token, past_key_values=caches[1]).logits, tolerance=1e-3)
    assert compiled.compilations == 1
    (source,) = compiled.sources
    assert source.count("flashmla.decode") >= model.config.num_hidden_layers
    assert "_scaled_dot_product" not in source
