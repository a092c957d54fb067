"""``python -m flashmla_ops.parallel.demo``: two processes, each with half of a model's heads, and one with all of them.

They generate the same tokens. The model is a small DeepSeek-V3 with random weights.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from flashmla_ops.parallel import tensor_parallel
from flashmla_ops.parallel.local import LocalRanks

RANKS = 2


def main() -> int:
    with LocalRanks(RANKS) as ranks:
        found = ranks.run(generate)
    for rank, (said, _) in enumerate(found):
        print(f"rank {rank}: {said}")
    return 0 if all(same for _, same in found) else 1


def generate() -> tuple[str, bool]:
    """On a rank: what it generated, and whether the tokens are those of one process."""
    from torch.distributed.device_mesh import init_device_mesh

    from flashmla_ops.integrations.transformers import enable

    one, several = _model(), _model()
    enable(one)
    tensor_parallel(several, init_device_mesh("cpu", (RANKS,)))
    enable(several)
    expected, tokens = _generate(one), _generate(several)
    same = torch.equal(tokens, expected)
    said = "the same tokens" if same else f"OTHER TOKENS THAN {expected[0, -8:].tolist()}"
    return f"{_heads(several)} of {_heads(one)} heads, {said}: {tokens[0, -8:].tolist()}", same


def _model() -> Any:
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 96, "kv_lora_rank": 64}
    dims = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "hidden_size": 128}
    layers = {"num_hidden_layers": 2, "first_k_dense_replace": 2, "intermediate_size": 256, "vocab_size": 512}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DeepseekV3Config(**heads, **dims, **layers, eos_token_id=None))
    return model.eval()


def _generate(model: Any) -> Tensor:
    prompt = torch.arange(3, 19)[None]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    tokens: Tensor = model.generate(prompt, **options)
    return tokens


def _heads(model: Any) -> int:
    attention = model.model.layers[0].self_attn
    heads: int = attention.o_proj.in_features // attention.v_head_dim
    return heads


if __name__ == "__main__":
    sys.exit(main())
