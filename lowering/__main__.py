"""``python -m lowering FILE.svg``: draw what the backend makes of a decode step of one small DeepSeek-V3 layer.

The text of `lowering.explain` is printed. Needs transformers.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowering.explain import Explanation, explain

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": None,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
}


def decode_step() -> Explanation:
    """A step of two sequences on transformers' static cache of 256 tokens, by a model that is not changed."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, StaticCache

    from flashmla_ops.integrations.transformers.versions import CACHE_ARGUMENT

    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES)).eval()
    cache = StaticCache(config=model.config, max_cache_len=256)
    with torch.no_grad():
        model(torch.arange(20).view(2, 10), **{CACHE_ARGUMENT: cache})

    def step(ids: Tensor, past: Any) -> Tensor:
        logits: Tensor = model(ids, **{CACHE_ARGUMENT: past}).logits
        return logits

    return explain(step, torch.tensor([[3], [5]]), cache)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lowering", description=__doc__)
    parser.add_argument("file", type=Path, help="where the picture goes")
    file = parser.parse_args().file
    explained = decode_step()
    print(explained)
    file.write_text(explained.svg())
