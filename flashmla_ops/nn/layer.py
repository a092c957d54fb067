"""`FlashMLALayer`: an attention layer of a transformers model, whose attention is ``torch.ops.flashmla.*``.

A layer is an attention module of transformers with one thing exchanged: the attention function that its forward calls.
Projections, biases, norms and rotary embedding are the model's own code, and parameters have the model's own names. The
class of a layer is derived from `FlashMLALayer` and from the class of the attention, so it is an instance of both.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashmla_ops.errors import ArgumentError, UnsupportedModelError
from flashmla_ops.integrations.transformers.attention import AbsorbedMLA
from flashmla_ops.integrations.transformers.configs import copy_for
from flashmla_ops.integrations.transformers.families import MLA, family_of, unserved
from flashmla_ops.integrations.transformers.growing import preallocate_layer
from flashmla_ops.integrations.transformers.served import Served, cache_among
from flashmla_ops.integrations.transformers.specialise import subclass
from flashmla_ops.nn.fresh import fresh_attention
from flashmla_ops.sparsity import DynamicSparsity

OP = "FlashMLALayer"


class FlashMLALayer(Served, nn.Module):
    """The attention of one decoder layer, to stand where ``LlamaAttention`` or ``DeepseekV3Attention`` stood.

        layer.self_attn = FlashMLALayer(embed_dim=2048, num_heads=32, num_kv_heads=8)  # fresh weights
        layer.self_attn = FlashMLALayer.from_attention(layer.self_attn)  # the same weights, the same tokens

    Takes what the attention that it replaces takes: ``hidden_states [b, s, embed_dim]``, ``position_embeddings`` of the
    model's rotary embedding, ``attention_mask`` in any form of transformers' "eager" and "sdpa", and a `Cache` or none.
    Returns ``(out [b, s, embed_dim], weights or None)``. A forward that needs dropout, or a gradient under a
    mask, runs transformers' SDPA. Without dropout, a `FallbackWarning` says so once.

    ``layers`` is how much of the kernels' hierarchy is used, for the same numbers: 1, whole rows of scores; 2, blocks;
    3, blocks, and sequences cut into parallel parts. With ``preallocate`` a cache that grows (`DynamicCache`) gets room
    ahead, so that a step writes its rows there and does not copy what the cache holds. With ``threshold`` decoding
    skips the pages that every query head of a KV head is estimated to give less than this share of its softmax (0.01 to
    0.05, say); `sparsity` has a report, and `DynamicSparsity` other ways to choose.
    """

    tells_gradients: ClassVar[bool] = True
    preallocate: bool
    #: The attention of transformers that this layer was made of, in a tuple: it is no submodule, its weights are ours.
    adopted: tuple[nn.Module]
    #: The module that `restore` puts back, in a tuple; empty where the layer was made with fresh weights.
    replaced: tuple[nn.Module, ...]

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layers: int = 3,
        threshold: float | None = None,
        sparsity: DynamicSparsity | None = None,
        preallocate: bool = False,
        bias: bool = False,
        layer_idx: int | None = None,
        kv_lora_rank: int | None = None,
        q_lora_rank: int | None = None,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
    ) -> None:
        """Fresh weights, under the names of Llama's attention, or with ``kv_lora_rank`` of DeepSeek-V3's (MLA).

        ``num_kv_heads`` None means ``num_heads``; ``head_dim`` None means ``embed_dim // num_heads``. Both are of no
        meaning to MLA, as ``q_lora_rank`` and what follows are to Llama's. ``layer_idx`` is the layer's place in the
        cache; None finds it at the first forward with a cache, which has to be an empty one.

        Raises `ArgumentError` for sizes that do not fit, ``layers`` other than 1, 2 and 3, a ``threshold`` outside
        [0, 1], and a ``sparsity`` beside it.
        """
        sizes = {
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "kv_lora_rank": kv_lora_rank,
            "q_lora_rank": q_lora_rank,
            "qk_nope_head_dim": qk_nope_head_dim,
            "qk_rope_head_dim": qk_rope_head_dim,
            "v_head_dim": v_head_dim,
        }
        attention = fresh_attention(sizes, bias, layer_idx)
        self._adopt(attention, layers, chosen_sparsity(threshold, sparsity), preallocate, set())
        self.replaced = ()

    @classmethod
    def from_attention(
        cls,
        attention: nn.Module,
        *,
        layers: int = 3,
        threshold: float | None = None,
        sparsity: DynamicSparsity | None = None,
        preallocate: bool = False,
        told: set[str] | None = None,
    ) -> FlashMLALayer:
        """A layer with the parameters of ``attention``, which are shared: training one trains the other.

        ``attention`` is the attention module of a supported model of transformers, or a `FlashMLALayer`, which then
        changes its options. It is not changed. ``told`` is a set that layers share whose fallbacks are told once.

        Raises `UnsupportedModelError`, with the reason, for any other module, and `ArgumentError` as the constructor.
        """
        replaced: tuple[nn.Module, ...] = (attention,)
        if isinstance(attention, FlashMLALayer):
            replaced = attention.replaced or replaced
            (attention,) = attention.adopted
        if reason := why_unconvertible(attention):
            raise UnsupportedModelError(f"{type(attention).__name__}{reason}")
        layer = cls.__new__(cls)
        chosen = chosen_sparsity(threshold, sparsity)
        layer._adopt(attention, layers, chosen, preallocate, set() if told is None else told)
        layer.replaced = replaced
        return layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the attention that this layer was made of: its arguments, its results."""
        cache = cache_among(args, kwargs)
        if cache is not None:
            if self.layer_idx is None:
                states = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                self.layer_idx = _place_in(cache, states.shape[1])
            if self.preallocate and not torch.compiler.is_compiling():
                preallocate_layer(cache, self.layer_idx)
        return super().forward(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{type(self).__name__}, layers={self.levels}, preallocate={self.preallocate}"

    def _get_name(self) -> str:
        return "FlashMLALayer"

    def _adopt(
        self,
        attention: nn.Module,
        layers: int,
        sparsity: DynamicSparsity | None,
        preallocate: bool,
        told: set[str],
    ) -> None:
        """Become a layer that has the attributes of ``attention``: the same parameters, buffers, modules and hooks."""
        if layers not in (1, 2, 3):
            raise ArgumentError(OP, "layers", "1, 2 or 3", layers)
        family = family_of(attention)
        vars(self).update(vars(attention))
        self.__class__ = subclass(_LatentLayer if family is MLA else FlashMLALayer, type(attention))
        self.config = copy_for(attention.config, family.attention)
        self.levels, self.preallocate, self.told_fallbacks, self.sparsity = layers, preallocate, told, sparsity
        self.adopted = (attention,)


class _LatentLayer(FlashMLALayer, AbsorbedMLA):
    """A layer of MLA."""


def chosen_sparsity(threshold: float | None, sparsity: DynamicSparsity | None) -> DynamicSparsity | None:
    """What ``threshold`` stands for, or ``sparsity``. Raises `ArgumentError` where both are given."""
    if threshold is None:
        return sparsity
    if sparsity is not None:
        raise ArgumentError(OP, "threshold", "None beside a sparsity", threshold)
    if not 0.0 <= threshold <= 1.0:
        raise ArgumentError(OP, "threshold", "None or a number in [0, 1]", threshold)
    return DynamicSparsity(mode="estimate", tau=threshold)


def why_unconvertible(attention: nn.Module) -> str:
    """Why no layer is made of a module, as its name is to be continued; empty if one is."""
    if isinstance(attention, Served):
        return ": is enabled: call disable(model) first"
    if not hasattr(attention, "config") or not hasattr(attention, "o_proj"):
        return ": expected the attention module of a model of transformers"
    return unserved(attention)


def _place_in(cache: Any, tokens: int) -> int:
    """The place of the layer that asks in an empty cache, which has been filled with ``tokens`` up to there."""
    lengths = [int(layer.get_seq_length()) if layer.is_initialized else 0 for layer in cache.layers]
    place = next((i for i, length in enumerate(lengths) if length == 0), len(lengths))
    is_full = place == len(lengths) and cache.layer_class_to_replicate is None
    if is_full or any(lengths[place:]) or any(length != tokens for length in lengths[:place]):
        expected = "the layer's place in the cache, where the first cache that it meets is not an empty one"
        raise ArgumentError(OP, "layer_idx", expected, None)
    return place
