"""vLLM's backend of GQA, MQA and MHA models: rows ``[V, K]`` in pages of ``CPU_ATTN``'s size and shape.

Served: attention of decoders, causal or not, with windows, softcap and sinks, heads of any size. A layer with ALiBi, a
cache of fp8, or an encoder's or cross attention goes to vLLM's own backend, and a line of the log says so once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from flashmla_ops.errors import UnsupportedModelError
from flashmla_ops.integrations.vllm import attend
from flashmla_ops.integrations.vllm.sizes import AnySize

logger = init_logger(f"vllm.{__name__}")


class FlashGroupedBackend(AnySize, CPUAttentionBackend):  # type: ignore[misc]
    """In place of ``CPU_ATTN``."""

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> type[FlashGroupedImpl]:
        return FlashGroupedImpl

    @staticmethod
    def get_builder_cls() -> type[FlashGroupedBuilder]:
        return FlashGroupedBuilder


@dataclass
class Metadata(CPUAttentionMetadata):  # type: ignore[misc]
    """vLLM's, and ours, which has a default because theirs have."""

    batch: attend.Batch | None = None


class FlashGroupedBuilder(CPUAttentionMetadataBuilder):  # type: ignore[misc]
    #: vLLM puts sequences with so many query tokens first.
    reorder_batch_threshold: int = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()
        self.ours = all(layer.impl.elsewhere is None for layer in layers)
        if self.ours:
            # What vLLM's own initialiser adds is for its kernels, which do not have heads of all sizes.
            super(CPUAttentionMetadataBuilder, self).__init__(kv_cache_spec, layer_names, vllm_config, device)
        else:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Metadata:
        common = common_attn_metadata
        if not self.ours:
            theirs = super().build(common_prefix_len, common, fast_build)
            return Metadata(**vars(theirs), batch=_batch(common))
        return Metadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
            causal=common.causal,
            batch=_batch(common),
        )


def _batch(common: Any) -> attend.Batch:
    decodes = split_decodes_and_prefills(common, decode_threshold=1)[0]
    ends: list[int] = common.query_start_loc_cpu.tolist()
    lengths: list[int] = common.seq_lens.tolist()
    prefixes = [n - (stop - start) for n, start, stop in zip(lengths, ends[:-1], ends[1:], strict=True)]
    return attend.Batch(decodes, prefixes, common.seq_lens.int(), common.block_table_tensor, common.query_start_loc)


def why_elsewhere(attn_type: str, alibi_slopes: Any, kv_cache_dtype: str) -> str | None:
    """Why vLLM's own backend serves a layer; None where ours does."""
    if attn_type != AttentionType.DECODER:
        return f"attention of type {attn_type}"
    if alibi_slopes is not None:
        return "ALiBi"
    if kv_cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        return f"a cache of {kv_cache_dtype}"
    return None


class FlashGroupedImpl(CPUAttentionBackendImpl):  # type: ignore[misc]
    """One layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
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
            sinks,
        )
        self.elsewhere = why_elsewhere(attn_type, alibi_slopes, kv_cache_dtype)
        if self.elsewhere is not None:
            logger.warning_once("flashmla leaves layers with %s to vLLM's own CPU_ATTN", self.elsewhere)

    def forward(
        self,
        layer: Any,
        query: Tensor,  # [t, h_q, d]
        key: Tensor | None,  # [t, h_kv, d]
        value: Tensor | None,
        kv_cache: Tensor,  # [n_pages, h_kv, page_size, 2 * d]
        attn_metadata: Metadata | None,
        output: Tensor,  # [t, h_q, d]
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of all query tokens of a step, whose rows are in the cache already."""
        if self.elsewhere is not None or attn_metadata is None:
            scales = output_scale, output_block_scale
            theirs: Tensor = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
            return theirs
        if attn_metadata.dynamic_causal is not None or not isinstance(attn_metadata.causal, bool):
            raise UnsupportedModelError("flashmla serves sequences in vLLM that are all causal, or all not")
        assert attn_metadata.batch is not None
        t = attn_metadata.num_actual_tokens
        out = attend.attend_grouped(
            query[:t],
            None if key is None else key[:t],
            None if value is None else value[:t],
            kv_cache,
            attn_metadata.batch,
            self._options(attn_metadata.causal),
        )
        output[:t].view(out.shape).copy_(out)
        return output

    def _options(self, causal: bool) -> attend.Options:
        return attend.Options(
            softmax_scale=self.scale,
            window=max(0, self.sliding_window),
            softcap=float(self.logits_soft_cap),
            attn_sink=None if self.sinks is None else self.sinks.float(),
            causal=causal,
        )

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if self.elsewhere is not None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        else:
            attend.append_grouped(key, value, kv_cache, slot_mapping)
