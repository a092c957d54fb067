"""Continuous batching of MLA: transformers' pages hold latents, and are counted as such.

transformers sizes its `PagedAttentionCache` for heads of keys and values of one width, which no MLA model caches, and
has no attention that reads latents from it. A model of MLA that is enabled therefore gets a manager of continuous
batches (``generate_batch``, ``init_continuous_batching``) whose cache holds ``c_kv`` and ``k_pe``, a token's row in two
tensors.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from flashmla_ops.errors import UnsupportedModelError
from flashmla_ops.integrations.transformers.families import MLA, attention_modules
from flashmla_ops.integrations.transformers.ragged import PAGED
from flashmla_ops.integrations.transformers.specialise import Specialised, restore, specialise


class BatchedLatents(Specialised):
    """Methods that an enabled language model of MLA gets beside its own."""

    config: Any
    set_attn_implementation: Any

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' manager, with pages of latents where our attention is chosen.

        Raises `UnsupportedModelError` for a model some of whose layers cache something else, and for offloading.
        """
        cached = sorted(module.layer_idx for _, module in attention_modules(self))  # type: ignore[arg-type]
        if cached != list(range(self.config.get_text_config().num_hidden_layers)):
            raise UnsupportedModelError(
                f"{type(self).__name__}: continuous batching needs latents in every layer, and only {cached} cache them"
            )
        manager = super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        if self.config.get_text_config()._attn_implementation != PAGED + MLA.attention:
            return manager
        if manager.continuous_batching_config.cpu_offload_space != 0.0:
            self.set_attn_implementation(MLA.attention)
            raise UnsupportedModelError("latents of continuous batching are not offloaded: set cpu_offload_space=0.0")
        specialise(manager, LatentManager)
        return manager


class LatentManager(Specialised):
    """Methods that a manager of continuous batches gets beside its own."""

    model: Any
    batch_processor: Any

    def _create_batch_processor(self) -> Any:
        if self.batch_processor is not None:
            return super()._create_batch_processor()  # type: ignore[misc]
        model, config = self.model, self.model.config.get_text_config()
        widths = config.kv_lora_rank, config.qk_rope_head_dim
        self.model = Sized(model, config, sum(widths))
        try:
            processor = super()._create_batch_processor()  # type: ignore[misc]
        finally:
            self.model = model
        hold_latents(processor.cache, *widths)
        return processor


class Sized:
    """Stands for a model where its cache is made: a token's keys and values together are as large as its latents."""

    def __init__(self, model: Any, config: Any, elements: int) -> None:
        """``elements`` is how many a token has in one layer."""
        self.device, self.dtype = model.device, model.dtype
        self.config = copy.copy(config)
        self.config.num_key_value_heads = 1
        self.config.head_dim = -(-elements // 2)


class LatentPages(Specialised):
    """Methods that a `PagedAttentionCache` gets beside its own."""

    latents: list[torch.Tensor]  # [slots, 1, d_c] of each layer of a group
    rotary: list[torch.Tensor]  # [slots, 1, d_r]
    block_size: int

    def copy_cache(self, list_source_blocks: list[int], list_forked_blocks: list[int]) -> None:
        """Copy whole blocks of all layers."""
        for tensor in (*self.latents, *self.rotary):
            blocks = tensor.unflatten(0, (-1, self.block_size))
            blocks[list_forked_blocks] = blocks[list_source_blocks]


def hold_latents(cache: Any, d_c: int, d_r: int) -> None:
    """Let a new `PagedAttentionCache` have tensors of latents and rotary keys in place of its own."""
    specialise(cache, LatentPages)
    slots, layers = cache.cache_shape[0], range(len(cache.key_cache))

    def rows(d: int) -> list[torch.Tensor]:
        return [torch.empty(slots, 1, d, dtype=cache.dtype, device=cache.device) for _ in layers]

    cache.key_cache = cache.value_cache = []
    cache.latents, cache.rotary = rows(d_c), rows(d_r)


def batch_latents(model: nn.Module) -> None:
    """Give the language models in ``model`` the methods of `BatchedLatents`."""
    for module in _language_models(model):
        specialise(module, BatchedLatents)


def unbatch_latents(model: nn.Module) -> None:
    """Undo `batch_latents`."""
    for module in _language_models(model):
        restore(module, BatchedLatents)


def _language_models(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(type(module), "init_continuous_batching")]
