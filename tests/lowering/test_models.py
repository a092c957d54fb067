"""Whole models under the backend: one graph, two compilations at most for all batches and lengths, no cache copied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import ReinplaceCounters, counters
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StaticCache

import flashmla_ops
from flashmla_ops.integrations.transformers import StaticPagedLatentCache, enable
from lowering.explain.program import Program
from tests.integrations.models import tiny_model
from tests.lowering.compiled import Compiled

FIXTURE = Path(flashmla_ops.__file__).parent / "fixtures" / "tiny_mla_lm"
CAPACITY, PROMPT = 128, 20
SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def trained() -> PreTrainedModel:
    """The demo's model, with absorbed attention."""
    return absorbed(AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=torch.float32).eval())


def absorbed(model: PreTrainedModel) -> PreTrainedModel:
    enable(model)
    return model


def of_type(model_type: str) -> PreTrainedModel:
    """A model of transformers as it is, with SDPA."""
    config = AutoConfig.for_model(model_type, **SMALL)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def static(model: PreTrainedModel) -> Any:
    return StaticCache(config=model.config, max_cache_len=CAPACITY)


def paged(model: PreTrainedModel) -> Any:
    return StaticPagedLatentCache(model, CAPACITY, page_size=16)


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[PreTrainedModel], Any]]] = {
    "trained MLA, paged": (trained, paged),
    "trained MLA, static": (trained, static),
    "DeepSeek-V3 dense": (lambda: absorbed(tiny_model(moe=False)), paged),
    "DeepSeek-V3 MoE": (lambda: absorbed(tiny_model(moe=True)), paged),
    "DeepSeek-V3 as it is": (lambda: tiny_model(moe=False), static),
    "Llama": (lambda: of_type("llama"), static),
    "Qwen3": (lambda: of_type("qwen3"), static),
}
FAST = ("DeepSeek-V3 dense",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in MODELS])
def test_ten_batches_and_lengths(name: str) -> None:
    build, new_cache = MODELS[name]
    model = build()

    def forward(ids: Tensor, positions: Tensor, cache: Any) -> Tensor:
        logits: Tensor = model(input_ids=ids, position_ids=positions, past_key_values=cache).logits
        return logits

    compiled = Compiled(forward)
    for i, b in enumerate(range(2, 12)):
        ids = torch.randint(3, 256, (b, PROMPT + i), generator=torch.Generator().manual_seed(b))
        caches = [new_cache(model) for _ in range(2)]
        for cache in caches:
            model(ids, past_key_values=cache)
        step = (ids[:, :1], torch.tensor([[PROMPT + i]]))
        torch.testing.assert_close(compiled(*step, caches[0]), forward(*step, caches[1]), atol=1e-4, rtol=1e-4)
    assert compiled.compilations <= 2
    assert not counters["graph_break"]
    assert ReinplaceCounters.get_total_missed() == 0
    for source in compiled.sources:
        # Rows are written by generated kernels; attention and products are calls.
        calls = {step.name for step in Program.joined([source]).steps if step.kind == "flashmla"}
        assert calls <= {
            "flashmla.decode.default",
            "flashmla.decode_up.default",
            "flashmla.bmm.out",
            "flashmla.gemm.out",
        }
