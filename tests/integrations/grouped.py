"""Tiny models whose attention is GQA, MHA or MQA, with weights so large that a wrong token in the attention shows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 512,
}
#: One layer within a window, and one that sees all.
BOTH = ["sliding_attention", "full_attention"]
OF_TYPE: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 9, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 9, "layer_types": BOTH},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "gpt_oss": {
        "head_dim": 16,
        "sliding_window": 9,
        "layer_types": BOTH,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {"head_dim": 16},
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None, "num_local_experts": 2, "num_experts_per_tok": 1},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"original_max_position_embeddings": 512},
    "qwen3": {"head_dim": 24},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "seed_oss": {"head_dim": 16},
    "smollm3": {"no_rope_layer_interval": 2},
    "starcoder2": {"sliding_window": None},
}


def tiny_grouped(model_type: str = "llama", *, implementation: str = "eager", **changes: Any) -> PreTrainedModel:
    """A causal language model; the same arguments give the same weights."""
    config = AutoConfig.for_model(model_type, **SIZES | OF_TYPE.get(model_type, {}) | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.12)
        elif name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model.eval()
