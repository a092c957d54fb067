"""Models of known attention with random weights: DeepSeek-V2-Lite's (MLA) and Llama-3-8B's (GQA), in a few layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

MLA, GQA = "MLA", "GQA"
COMMON: dict[str, Any] = {
    "vocab_size": 2048,
    "intermediate_size": 1024,
    "max_position_embeddings": 16384,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
ATTENTION: dict[str, dict[str, Any]] = {
    MLA: {
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
    },
    GQA: {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
}


def write(name: str, folder: Path, layers: int, hidden_size: int) -> Any:
    """A checkpoint in bfloat16 in the folder, and the same model in float32. All its layers are dense."""
    from transformers import AutoConfig, AutoModelForCausalLM  # transformers takes seconds to import

    dense = {"first_k_dense_replace": layers} if name == MLA else {}
    sizes = COMMON | ATTENTION[name] | dense | {"num_hidden_layers": layers, "hidden_size": hidden_size}
    config = AutoConfig.for_model("deepseek_v3" if name == MLA else "llama", **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.size(1) ** -0.5)
        parameter.copy_(parameter.bfloat16())
    # A copy, since conversion would round the frequencies of the model's rotary embedding too.
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    return model
