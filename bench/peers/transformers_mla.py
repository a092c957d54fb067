"""A decode step of the same model without us: transformers' SDPA, and absorbed attention in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.peers import no_compiler
from bench.steps import StepInputs, forget
from bench.suite import Bound, Peer

#: The name of `absorbed` in transformers' registry.
ABSORBED = "absorbed_in_torch"


def bind_step(inputs: StepInputs, model: Any) -> Bound:
    """With the cache that transformers chooses: one that grows, and a static one for compiled code."""
    from transformers import DynamicCache, StaticCache

    if inputs.case.mode == "eager":
        growing = inputs.fill(DynamicCache(config=model.config))
        return inputs.step(model.forward, growing, lambda: growing.crop(-1))
    static = inputs.fill(StaticCache(config=model.config, max_cache_len=inputs.case.s_kv + 1))
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False)
    return inputs.step(compiled, static, lambda: forget(static, inputs.case.s_kv))


def bind_sdpa(inputs: StepInputs) -> Bound:
    return bind_step(inputs, inputs.sharing_weights())


def absorbed(
    module: Any,
    query: Tensor,  # [b, h_q, s_q, d_nope + d_r]
    latents: Tensor,  # [b, 1, s_kv, d_c]
    rope: Tensor,  # [b, 1, s_kv, d_r]
    mask: Tensor | None,  # [b, 1, s_q, s_kv] bool
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in the latent space: W_UK into the query, W_UV out of the result; query heads are rows."""
    split = [module.qk_nope_head_dim, module.v_head_dim]
    w_uk, w_uv = module.kv_b_proj.weight.view(-1, sum(split), module.kv_lora_rank).split(split, dim=1)
    nope, rotated = query.split([module.qk_nope_head_dim, module.qk_rope_head_dim], dim=-1)
    scores = (nope @ w_uk) @ latents.transpose(-1, -2) + rotated @ rope.transpose(-1, -2)
    scores = scores * scaling if mask is None else (scores * scaling).masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    out = (weights @ latents) @ w_uv.transpose(-1, -2)
    return out.transpose(1, 2), None


def bind_absorbed(inputs: StepInputs) -> Bound:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ABSORBED, absorbed)
    AttentionMaskInterface.register(ABSORBED, sdpa_mask)
    model = inputs.sharing_weights()
    for layer in model.model.layers:
        layer.self_attn.expand_kv = lambda latents, rope: (latents, rope)
    model.set_attn_implementation(ABSORBED)
    return bind_step(inputs, model)


def uncompilable(inputs: StepInputs) -> str | None:
    return no_compiler() if inputs.case.mode == "compiled" else None


PEERS = (
    Peer("transformers SDPA", "the model as it is", bind_sdpa, unfair=uncompilable),
    Peer("absorbed torch", "the same with absorbed attention in plain torch", bind_absorbed, unfair=uncompilable),
)
