"""What vLLM's CPU platform forbids although our backends can do it, and a fault of its rotary embedding.

vLLM 0.32 decides both where no hook of a backend is asked, so that two methods are wrapped here.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from vllm.logger import init_logger

from flashmla_ops.errors import UnsupportedModelError

logger = init_logger(f"vllm.{__name__}")

#: Tokens of a page of latents, unless ``--block-size`` says otherwise.
PAGE_SIZE = 64
#: The key of ``additional_config`` that chooses a row format for a latent cache of bytes.
ROW_FORMAT = "flashmla_row_format"


def mend() -> None:
    """Wrap both methods, once."""
    from vllm.platforms.cpu import CpuPlatform

    if not hasattr(CpuPlatform.check_and_update_config, "__wrapped__"):
        CpuPlatform.check_and_update_config = classmethod(_keeping(CpuPlatform.check_and_update_config.__func__))
    mend_rotary()


def mend_rotary() -> None:
    """Wrap the rotary embedding alone, once."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    if not hasattr(RotaryEmbedding.forward_cpu, "__wrapped__"):
        RotaryEmbedding.forward_cpu = _flattening(RotaryEmbedding.forward_cpu)


def _keeping(original: Any) -> Any:
    """``check_and_update_config`` that leaves an MLA model its prefix caching, chunked prefill and page size."""

    @functools.wraps(original)
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
        model = vllm_config.model_config
        if model is not None:
            _refuse_tied(model.hf_config)
        asked = scheduler.enable_chunked_prefill, cache.enable_prefix_caching, scheduler.max_num_batched_tokens
        page_size = cache.block_size if cache.user_specified_block_size else PAGE_SIZE
        original(cls, vllm_config)
        if model is None or not model.use_mla or getattr(model.hf_config, "model_type", None) == "deepseek_v4":
            return
        scheduler.enable_chunked_prefill, cache.enable_prefix_caching, scheduler.max_num_batched_tokens = asked
        cache.block_size = page_size
        if cache.cache_dtype.startswith("fp8") or ROW_FORMAT in (vllm_config.additional_config or {}):
            # vLLM's name for rows of bytes that hold their own scales: it takes the cache for nothing else.
            cache.cache_dtype = "fp8_ds_mla"
        logger.info(
            "flashmla serves MLA: prefix caching %s, chunked prefill %s, pages of %d tokens",
            *("on" if on else "off" for on in (cache.enable_prefix_caching, scheduler.enable_chunked_prefill)),
            page_size,
        )

    return check_and_update_config


def _refuse_tied(config: Any) -> None:
    """vLLM 0.32 leaves the head of these models zero where a checkpoint ties it to the embedding: every token is 0."""
    named = {"DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"} & set(getattr(config, "architectures", None) or ())
    if named and getattr(config, "tie_word_embeddings", False):
        raise UnsupportedModelError(
            f"vLLM does not load the tied head of {named.pop()}: write a checkpoint with lm_head.weight and"
            " tie_word_embeddings false, as flashmla_ops.integrations.vllm.checkpoint.untied does"
        )


def chosen_format(vllm_config: Any) -> str | None:
    """The row format that ``--additional-config`` asks for."""
    chosen = (vllm_config.additional_config or {}).get(ROW_FORMAT)
    return None if chosen is None else str(chosen)


def _flattening(original: Any) -> Any:
    """``forward_cpu`` with queries and keys of two dimensions.

    vLLM 0.32's kernel takes the stride of the last dimension but one for that of tokens. Queries ``[t, h, d]``, as
    DeepSeek's models pass them, are then rotated for the positions of other tokens.
    """

    @functools.wraps(original)
    def forward_cpu(self: Any, positions: Tensor, query: Tensor, key: Tensor | None = None) -> Any:
        if query.dim() == 2:
            return original(self, positions, query, key)
        flat = None if key is None else key.flatten(1).contiguous()
        rotated, rotated_key = original(self, positions, query.flatten(1).contiguous(), flat)
        return rotated.view(query.shape), None if key is None else rotated_key.view(key.shape)

    return forward_cpu
