"""Tiny models of every supported type, with weights so large that a wrong token in the attention shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.mistral4.modeling_mistral4 import Mistral4ForCausalLM

from flashmla_ops.integrations.transformers.versions import CACHE_ARGUMENT

PAD, VOCABULARY = 0, 256

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 512,
}

OF_TYPE: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"topk_method": "greedy"},
    "longcat_flash": {
        "num_layers": 2,
        "head_dim": 8,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "zero_expert_num": 1,
    },
    "minicpm3": {"scale_depth": 1.4, "scale_emb": 1, "dim_model_base": 64},
    "kimi_linear": {
        "num_hidden_layers": 4,
        "linear_attn_config": {
            "full_attn_layers": [4],
            "kda_layers": [1, 2, 3],
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
        },
    },
}


def tiny_model(model_type: str = "deepseek_v3", *, moe: bool = False, **changes: Any) -> PreTrainedModel:
    """A causal language model with eager attention; the same arguments give the same weights."""
    layers = changes.get("num_hidden_layers", COMMON["num_hidden_layers"])
    arguments = COMMON | {"first_k_dense_replace": 0 if moe else layers} | OF_TYPE.get(model_type, {}) | changes
    config = AutoConfig.for_model(model_type, **arguments)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    if model_type == "mistral4":  # registered with AutoModel as a vision model only
        model = Mistral4ForCausalLM._from_config(config, attn_implementation="eager")
    else:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    return model.eval()


def cached(cache: Any) -> dict[str, Any]:
    """The argument with which this transformers takes a cache."""
    return {CACHE_ARGUMENT: cache}


def tokens(b: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids ``[b, length]``, none of them special."""
    return torch.randint(3, VOCABULARY, (b, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` of prompts of different lengths, padded on the left."""
    longest = max(lengths)
    ids = tokens(len(lengths), longest, seed)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return {"input_ids": ids.where(mask, PAD), "attention_mask": mask.long()}
