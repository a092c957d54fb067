"""Models so small that ranks make them anew for every test."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.integrations.models import COMMON, tiny_model

PROMPT = torch.arange(3, 25).view(2, 11)


def made(model_type: str, **changes: Any) -> Any:
    if model_type in ("deepseek_v2", "deepseek_v3", "minicpm3"):
        return tiny_model(model_type, moe=model_type != "minicpm3", **changes)
    torch.manual_seed(0)
    sizes = {k: v for k, v in COMMON.items() if k in ("vocab_size", "hidden_size", "intermediate_size")}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2, "head_dim": 16}
    options = {**sizes, **heads, "pad_token_id": 0, "eos_token_id": None, **changes}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options)).eval()


def generated(model: Any, **options: Any) -> torch.Tensor:
    return model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=12, do_sample=False, **options)
