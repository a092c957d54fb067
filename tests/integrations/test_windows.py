"""Windows, softcaps and sinks: the tokens of eager attention on every cache and under every mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flashmla_ops.integrations.transformers import (
    PagedLatentCache,
    StaticPagedLatentCache,
    compile,
    enable,
    why_not,
)
from flashmla_ops.integrations.transformers.grouped import grouped_attention
from flashmla_ops.nn import convert
from tests.integrations.grouped import tiny_grouped
from tests.integrations.models import cached, left_padded, tokens
from tests.integrations.test_batching import alone, batched, prompts
from tests.integrations.test_generate import generate
from tests.integrations.test_grouped import MODULE, states

#: What a type needs to have a window; of gemma2, gemma3_text and gpt_oss the usual tiny models do.
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "gemma2": {},
    "gemma3_text": {},
    "gpt_oss": {},
}
INPUTS: dict[str, dict[str, Tensor]] = {
    "long": {"input_ids": tokens(3, 70)},
    "padded": left_padded([20, 11, 5]),
    "long padded": left_padded([70, 40, 9]),
}
CACHES: dict[str, Callable[[PreTrainedModel], dict[str, Any]]] = {
    "dynamic": lambda model: {},
    "static": lambda model: {"cache_implementation": "static"},
    "paged": lambda model: cached(PagedLatentCache(model, page_size=16)),
    "static paged": lambda model: cached(StaticPagedLatentCache(model, 140, page_size=16)),
}


def make(model_type: str) -> PreTrainedModel:
    return tiny_grouped(model_type, **WINDOWS[model_type])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("model_type", WINDOWS)
def test_64_tokens_of_3_prompts(model_type: str, cache: str) -> None:
    eager, model = make(model_type), make(model_type)
    enable(model)
    assert why_not(model) == []
    for inputs in INPUTS.values():
        expected = generate(eager, inputs, max_new_tokens=64)
        assert torch.equal(generate(model, inputs, **CACHES[cache](model), max_new_tokens=64), expected)


@pytest.mark.parametrize("model_type", WINDOWS)
def test_logits_beams_and_weights(model_type: str) -> None:
    eager, model = make(model_type), make(model_type)
    enable(model)
    for inputs in INPUTS.values():
        seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        out, expected = (each(**inputs, output_attentions=True) for each in (model, eager))
        with mock.patch.object(nn.functional, "scaled_dot_product_attention", side_effect=AssertionError):
            logits = model(**inputs).logits
        torch.testing.assert_close(logits[seen], expected.logits[seen], atol=1e-4, rtol=1e-4)
        for ours, theirs in zip(out.attentions, expected.attentions, strict=True):
            torch.testing.assert_close(ours.transpose(1, 2)[seen], theirs.transpose(1, 2)[seen], atol=1e-5, rtol=1e-4)
    beams = {"num_beams": 4, "max_new_tokens": 12}
    assert torch.equal(generate(model, INPUTS["padded"], **beams), generate(eager, INPUTS["padded"], **beams))


@pytest.mark.parametrize("model_type", WINDOWS)
def test_converted_layers(model_type: str) -> None:
    """The host's own masks, those of SDPA."""
    eager, model = make(model_type), make(model_type)
    model.set_attn_implementation("sdpa" if model_type in ("mistral", "qwen2", "gemma3_text") else "eager")
    convert(model)
    for inputs in INPUTS.values():
        assert torch.equal(generate(model, inputs, max_new_tokens=12), generate(eager, inputs, max_new_tokens=12))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", WINDOWS)
def test_static_compiled(model_type: str) -> None:
    eager, model = make(model_type), make(model_type)
    enable(model)
    compile(model, fullgraph=True)
    for name in ("long", "padded"):
        expected = generate(eager, INPUTS[name], max_new_tokens=12)
        assert torch.equal(generate(model, INPUTS[name], max_new_tokens=12), expected)


@pytest.mark.usefixtures("foreign_attention_in_batches")
def test_window_in_a_continuous_batch() -> None:
    for model_type in ("mistral", "qwen2"):
        plain, model = make(model_type), make(model_type)
        enable(model)
        assert batched(model, prompts()) == [alone(plain, prompt) for prompt in prompts()]


@pytest.mark.parametrize("s_q", [1, 5, 70])
@pytest.mark.parametrize("kind", ["none", "boolean", "added", "gradient"])
def test_softcaps_and_sinks_as_written_out(s_q: int, kind: str) -> None:
    query, key, value = states(s_q, s_q + 4)
    sink = torch.linspace(-1.0, 2.0, query.shape[1])
    seen = torch.arange(s_q + 4) <= torch.arange(s_q)[:, None] + (4 if kind != "none" or s_q == 1 else 0)
    seen = seen.expand(query.shape[0], 1, s_q, s_q + 4)
    groups = query.shape[1] // key.shape[1]
    scores = torch.tanh(query @ key.repeat_interleave(groups, 1).mT * 0.3 / 2.0) * 2.0
    scores = torch.cat([scores.masked_fill(~seen, float("-inf")), sink[:, None, None].expand(*scores.shape[:3], 1)], -1)
    expected = (scores.softmax(-1)[..., :-1] @ value.repeat_interleave(groups, 1)).transpose(1, 2)
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    mask = {"none": None, "boolean": seen, "added": added, "gradient": seen}[kind]
    with torch.set_grad_enabled(kind == "gradient"):
        given = query.requires_grad_(kind == "gradient")
        out = grouped_attention(MODULE, given, key, value, mask, scaling=0.3, softcap=2.0, s_aux=sink)[0]
    torch.testing.assert_close(out.detach(), expected.detach(), atol=2e-5, rtol=2e-5)
    assert out.requires_grad == (kind == "gradient")
