"""vLLM's backend of MLA models: latents in pages, decoded as they lie.

Decoding sequences attend in absorbed form (`decode`), prompts and chunks of prompts in expanded heads (`prefill`), and
what they have in pages already is expanded in chunks and merged. Rows are elements of the model's type, or bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonImpl,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
)
from vllm.v1.attention.backend import AttentionType

from flashmla_ops.errors import UnsupportedModelError
from flashmla_ops.integrations.vllm import attend
from flashmla_ops.integrations.vllm.platform import chosen_format
from flashmla_ops.integrations.vllm.sizes import AnySize


class FlashMLABackend(AnySize, MLACommonBackend):  # type: ignore[misc]
    """Latents of any size, and rows of bytes."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_ds_mla"]

    @staticmethod
    def get_name() -> str:
        return "CPU_MLA"

    @staticmethod
    def get_impl_cls() -> type[FlashMLAImpl]:
        return FlashMLAImpl

    @staticmethod
    def get_builder_cls() -> type[FlashMLABuilder]:
        return FlashMLABuilder


@dataclass
class Metadata(MLACommonMetadata):  # type: ignore[misc]
    """vLLM's, for latents of any size."""

    def __post_init__(self) -> None:
        """vLLM's own refuses all sizes but three."""


class FlashMLABuilder(MLACommonMetadataBuilder):  # type: ignore[misc]
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options, metadata_cls=Metadata)


class FlashMLAImpl(MLACommonImpl):  # type: ignore[misc]
    """One layer."""

    can_return_lse_for_decode: bool = True

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        **mla_args: Any,
    ) -> None:
        options = {"alibi_slopes": alibi_slopes, "sliding_window": sliding_window, "logits_soft_cap": logits_soft_cap}
        asked = [name for name, value in options.items() if value]
        if asked or attn_type != AttentionType.DECODER:
            what = ", ".join(asked) or f"attention of type {attn_type}"
            raise UnsupportedModelError(f"flashmla serves MLA of decoders without {what} in vLLM")
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **mla_args,
        )
        if self.dcp_world_size > 1:
            raise UnsupportedModelError("flashmla serves MLA in vLLM with its cache in one place, not over ranks")
        self.supports_quant_query_input = False
        chosen = chosen_format(get_current_vllm_config())
        self.row_format = attend.row_format_of(kv_cache_dtype, chosen, self.kv_lora_rank, self.qk_rope_head_dim)

    def do_kv_cache_update(
        self,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        kv_cache_dtype: str,
        k_scale: Tensor,
    ) -> None:
        if kv_cache.numel():
            attend.append_latents(kv_c_normed, k_pe, kv_cache, slot_mapping, self.row_format)

    def forward_mqa(
        self, q: Tensor | tuple[Tensor, Tensor], kv_c_and_k_pe_cache: Tensor, attn_metadata: Any, layer: Any
    ) -> tuple[Tensor, Tensor]:
        """Decoding sequences: absorbed queries, in one tensor or as latent and rotary parts."""
        decode = attn_metadata.decode
        return attend.decode_latents(
            torch.cat(q, dim=-1) if isinstance(q, tuple) else q,
            kv_c_and_k_pe_cache,
            decode.block_table,
            decode.seq_lens,
            self.kv_lora_rank,
            self.scale,
            self.row_format,
        )

    def forward_mha(
        self,
        q: Tensor,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: Any,
        k_scale: Tensor,
        output: Tensor,
        output_scale: Tensor | None = None,
    ) -> None:
        """Sequences of several query tokens, whose rows are in the cache already."""
        prefill = attn_metadata.prefill
        k, v = self._heads(kv_c_normed, k_pe)
        out = attend.prefill_latents(
            q,
            k,
            v,
            kv_c_and_k_pe_cache,
            prefill.query_start_loc,
            None if prefill.chunked_context is None else prefill.chunked_context.context_lens.int(),
            prefill.block_table,
            self._expand,
            self.scale,
            self.row_format,
        )
        output.view(out.shape).copy_(out)

    def _expand(self, rows: Tensor, k_rows: Tensor | None) -> tuple[Tensor, Tensor]:
        latents, rotary = rows.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        return self._heads(latents.squeeze(1), rotary)

    def _heads(self, latents: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """Latents ``[n, d_c]`` and rotary parts ``[n, 1, d_r]`` to keys and values of all heads."""
        heads = self.kv_b_proj(latents)[0].unflatten(1, (self.num_heads, -1))
        nope, v = heads.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return torch.cat([nope, rotary.expand(-1, self.num_heads, -1)], dim=-1), v
