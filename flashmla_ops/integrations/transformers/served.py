"""Attention modules while our attention serves them: methods that they get beside their own."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils.import_utils import is_tracing

from flashmla_ops.errors import FallbackWarning
from flashmla_ops.formats import NATIVE
from flashmla_ops.integrations.transformers.specialise import Specialised
from flashmla_ops.integrations.transformers.summarized import summarized_layer
from flashmla_ops.sparsity import DynamicSparsity

#: The argument by which an attention function gets the layer of a cache that has summaries.
SUMMARIZED = "summarized_layer"


class Served(Specialised):
    """Base class of what `enable` and `FlashMLALayer` add to an attention module."""

    config: Any
    layer_idx: int | None
    #: How much of the kernels' hierarchy is used: the operators' argument of this name.
    levels: int = 3
    #: Whether running without our operators is told where a gradient asks for it.
    tells_gradients: ClassVar[bool] = False
    #: The reasons for falling back that were told already, one set for all modules of a model.
    told_fallbacks: set[str]
    #: How decoding chooses the pages that it attends to; None: all.
    sparsity: DynamicSparsity | None = None
    #: How the paged caches made for the model keep rows: a name of `flashmla_ops.formats`.
    cache_format: str = NATIVE
    #: Whether a row of the cache begins with what transformers has as keys, as the latents of MLA are, not values.
    keys_first: ClassVar[bool] = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, which hands the layer of a cache that has summaries to the attention function."""
        asked = self.sparsity is not None or self.cache_format != NATIVE
        cache = cache_among(args, kwargs) if asked else None
        if self.cache_format != NATIVE and cache is not None and not getattr(cache, "takes_formats", False):
            self.tell_fallback(f"a {type(cache).__name__} keeps rows as they are, and not as {self.cache_format}")
        if self.sparsity is not None and cache is not None:
            layer = summarized_layer(cache, self.layer_idx, self.sparsity, keys_first=self.keys_first)
            if layer is None:
                self.tell_fallback(f"a {type(cache).__name__} has no summaries, so that attention is dense")
            else:
                kwargs[SUMMARIZED] = layer
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def tell_fallback(self, reason: str) -> None:
        """Warn once for a model and a reason. Not while a graph is traced, in which warning would be a step."""
        if is_tracing() or reason in self.told_fallbacks:
            return
        self.told_fallbacks.add(reason)
        warnings.warn(
            f"layer {self.layer_idx} runs transformers' own attention: {reason};"
            " flashmla_ops.integrations.transformers.why_not(model) lists every layer that always does",
            FallbackWarning,
            stacklevel=4,
        )

    def tell_gradient(self) -> None:
        if self.tells_gradients:
            self.tell_fallback("a gradient is required of attention that is not plainly causal")


def cache_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The cache that a forward was given."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def wants_weights(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether ``output_attentions`` was asked of the call or of the configuration."""
    return bool(kwargs.get("output_attentions", module.config.output_attentions))


def is_causal(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether several queries without a mask see no later tokens: said by the call, or else by the module."""
    said = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if said is None else said)


def attend_with_weights(
    module: Any,
    query: Tensor,  # [b, h_q, s_q, d_qk]
    keys: Tensor,  # [b, h_q, s_kv, d_qk]
    values: Tensor,  # [b, h_q, s_kv, d_v]
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    causal: bool,
    softcap: float | None = None,
    attn_sink: Tensor | None = None,  # [h_q]
) -> tuple[Tensor, Tensor]:
    """Attention written out as "eager" does: ``out [b, s_q, h_q, d_v]`` and weights ``[b, h_q, s_q, s_kv]``.

    ``causal``: several queries without a mask see no later tokens. ``softcap``, ``attn_sink``: the operators'.
    """
    s_q, s_kv = query.shape[2], keys.shape[2]
    if mask is None and causal and s_q > 1:
        mask = torch.ones(s_q, s_kv, dtype=torch.bool, device=query.device).tril()
    scores = query @ keys.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.finfo(scores.dtype).min).to(scores.dtype)
    scores = scores if mask is None else scores + mask
    if attn_sink is not None:
        sinks = attn_sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)[..., :s_kv]
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ values).transpose(1, 2), weights
