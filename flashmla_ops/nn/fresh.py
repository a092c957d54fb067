"""Attention modules of transformers with fresh weights, from sizes alone."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import DeepseekV3Config, LlamaConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.llama.modeling_llama import LlamaAttention

from flashmla_ops.errors import ArgumentError

OP = "FlashMLALayer"


def fresh_attention(sizes: dict[str, int | None], bias: bool, layer_idx: int | None) -> nn.Module:
    """Llama's attention, or DeepSeek-V3's where ``sizes`` have a ``kv_lora_rank``. See `FlashMLALayer`.

    Weights are those of ``nn.Linear``. Raises `ArgumentError` for sizes that do not fit.
    """
    for name, size in sizes.items():
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ArgumentError(OP, name, "a whole number of at least 1", size)
    common: dict[str, Any] = {
        "hidden_size": sizes["embed_dim"],
        "num_attention_heads": sizes["num_heads"],
        "attention_bias": bias,
        "attention_dropout": 0.0,
        "attn_implementation": "sdpa",
    }
    attention: nn.Module
    if sizes["kv_lora_rank"] is not None:
        names = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        parts = {name: sizes[name] for name in names}
        config = DeepseekV3Config(**common, **parts, num_key_value_heads=sizes["num_heads"])
        attention = DeepseekV3Attention(config, layer_idx)
    else:
        attention = LlamaAttention(LlamaConfig(**common, **_heads(sizes)), layer_idx)
    return attention


def _heads(sizes: dict[str, int | None]) -> dict[str, int]:
    embed_dim, num_heads = sizes["embed_dim"], sizes["num_heads"]
    assert embed_dim is not None
    assert num_heads is not None
    num_kv_heads = sizes["num_kv_heads"] or num_heads
    if num_heads % num_kv_heads:
        raise ArgumentError(OP, "num_kv_heads", f"a divisor of num_heads {num_heads}", num_kv_heads)
    head_dim = sizes["head_dim"]
    if head_dim is None:
        if embed_dim % num_heads:
            raise ArgumentError(OP, "num_heads", f"a divisor of embed_dim {embed_dim}, or a head_dim", num_heads)
        head_dim = embed_dim // num_heads
    if head_dim % 2:
        raise ArgumentError(OP, "head_dim", "an even number, as rotary embedding needs", head_dim)
    return {"num_key_value_heads": num_kv_heads, "head_dim": head_dim}
