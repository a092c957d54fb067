"""Attention for transformers' MLA layers: short queries attend to the latent cache where it lies, absorbed.

An MLA key is ``[W_UK c, k_pe]`` and its value ``W_UV c``, where c is the cached latent and W_UK, W_UV are the two
halves of ``kv_b_proj``. Therefore ``q_nope . (W_UK c) = (W_UK^T q_nope) . c`` and ``sum_t p_t (W_UV c_t) = W_UV (sum_t
p_t c_t)``: one multiplication of the query and one of the result replace the expansion of the whole cache, and every
head reads the same row ``[c, k_pe]`` (DeepSeek-V2, arXiv:2405.04434, section 2.1.2). Long queries are cheaper on
expanded heads: the new tokens' own, and the cached prefix's, chunk by chunk.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.import_utils import is_tracing

from flashmla_ops.errors import ArgumentError, FallbackWarning, UnsupportedModelError
from flashmla_ops.integrations.transformers.masks import (
    MAX_ABSORBED_QUERIES,
    boolean_mask,
    is_prefix,
    tokens_mask,
)
from flashmla_ops.integrations.transformers.projection import obstacle
from flashmla_ops.integrations.transformers.specialise import Specialised
from flashmla_ops.nn.prefix import Span, gather, prefill_with_prefix
from flashmla_ops.ops.check import FLOATS

#: The name of this attention in transformers' registries. transformers takes any name with "flash" in it for one of its
#: own flash-attention kernels.
ABSORBED_ATTENTION = "absorbed_mla"

#: An attention module with ``kv_b_proj`` and ``expand_kv``; transformers has no common class for them.
MLAModule = Any


class Pages(NamedTuple):
    """How to read the pages that a paged cache's ``update`` returns."""

    block_table: Tensor  # [b, max_pages] int32
    cache_seqlens: Tensor  # [b] int32, the tokens in the cache, new ones included
    s_kv: int  # the length that the mask covers: the tokens in the cache, or its capacity where that is static


class LatentRows(NamedTuple):
    """Either cache, as `flashmla::decode` reads it."""

    kv_cache: Tensor  # [n_pages, page_size, 1, d]
    k_cache: Tensor | None  # [n_pages, page_size, 1, d_r], where c and k_pe lie apart
    block_table: Tensor  # [b, max_pages] int32
    cache_seqlens: Tensor  # [b] int32
    s_kv: int


class AbsorbedMLA(Specialised):
    """Methods that the attention modules of an enabled model get beside their own."""

    config: Any
    #: The reasons for falling back that were told already, one set for all modules of a model.
    told_fallbacks: set[str]

    def expand_kv(self, latent: Tensor, rope: Tensor | Pages) -> tuple[Tensor, Tensor | Pages]:
        """Hand the cache on as it is, unless another attention was chosen since `enable`."""
        if self.config._attn_implementation == ABSORBED_ATTENTION:
            return latent, rope
        return self.expanded(latent, rope)

    def expanded(self, latent: Tensor, rope: Tensor | Pages) -> tuple[Tensor, Tensor]:
        """The model's own ``expand_kv``: keys ``[b, h_q, s_kv, d_nope + d_r]`` and values ``[b, h_q, s_kv, d_v]``."""
        return super().expand_kv(latent, rope)  # type: ignore[misc,no-any-return]


def absorbed_attention(
    module: MLAModule,
    query: Tensor,  # [b, h_q, s_q, d_nope + d_r]
    key: Tensor,  # [b, 1, s_kv, d_c] latents, or [n_pages, 1, page_size, d_c + d_r] pages
    value: Tensor | Pages,  # [b, 1, s_kv, d_r] rotary keys, or how to read the pages
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one MLA layer, called by its forward through transformers' ``AttentionInterface``.

    ``attention_mask`` is a boolean mask ``[b or 1, 1, s_q or 1, s_kv]``, an int32 mask of `masks`, None (attend to all;
    causal if s_q > 1), or anything that ``sdpa`` takes. Short queries run `flashmla::decode` on the cache; long ones
    with a prefix mask run `flashmla::prefill` on heads expanded chunk by chunk. What needs more than the operators have
    (a gradient, dropout, an additive mask, a mask for each head, float64, for short queries a ``kv_b_proj`` that was
    adapted or hooked, for long ones padding) runs transformers' own SDPA on the expanded cache; where that is so for
    every call, a `FallbackWarning` says it once for each model. Returns ``out [b, s_q, h_q, d_v]`` and, where
    ``output_attentions`` was asked of the call or of the configuration, the weights ``[b, h_q, s_q, s_kv]``, which
    take attention on expanded heads, written out; otherwise None.

    Raises `UnsupportedModelError` unless `enable` was called, and `ArgumentError` for a mask whose length is not the
    cache's.
    """
    if not isinstance(module, AbsorbedMLA):
        raise UnsupportedModelError(
            f"attention '{ABSORBED_ATTENTION}' needs latents: call flashmla_ops.integrations.transformers.enable(model)"
        )
    rows = _latent_rows(key, value)
    if attention_mask is not None:
        _check_mask(attention_mask, rows.s_kv)
    if kwargs.get("output_attentions", module.config.output_attentions):
        return _with_weights(module, query, key, value, attention_mask, dropout, scaling)
    if _can_absorb(module, query, rows, attention_mask, dropout):
        return _absorbed(module, query, rows, attention_mask, scaling), None
    if attention_mask is not None and _can_prefill(module, query, rows, attention_mask, dropout):
        return _prefilled(module, query, rows, attention_mask, scaling), None
    keys, values, mask = _expanded(module, query, key, value, attention_mask)
    out, _ = sdpa_attention_forward(module, query, keys, values, mask, dropout=dropout, scaling=scaling, **kwargs)
    return out, None


def _latent_rows(key: Tensor, value: Tensor | Pages) -> LatentRows:
    """Views of the cache as pages; nothing is copied. A contiguous cache is one page a sequence."""
    if isinstance(value, Pages):
        return LatentRows(key.transpose(1, 2), None, *value)
    b, _, s_kv, _ = key.shape
    block_table = torch.arange(b, device=key.device, dtype=torch.int32)[:, None]
    cache_seqlens = torch.full((b,), s_kv, device=key.device, dtype=torch.int32)
    return LatentRows(key.transpose(1, 2), value.transpose(1, 2), block_table, cache_seqlens, s_kv)


def _check_mask(mask: Tensor, s_kv: int) -> None:
    if mask.dtype == torch.int32:
        known, expected = mask.shape[-1] in (1, 1 + s_kv), f"a prefix mask or the positions of {s_kv} tokens"
    else:
        known, expected = mask.shape[-1] == s_kv, f"a mask over the {s_kv} tokens of the cache"
    if mask.dim() != 4 or not known:
        raise ArgumentError("decode", "attention_mask", expected, f"shape {list(mask.shape)}")


def _can_absorb(module: MLAModule, query: Tensor, rows: LatentRows, mask: Tensor | None, dropout: float) -> bool:
    s_q = query.shape[2]
    if s_q > MAX_ABSORBED_QUERIES or dropout > 0.0:
        return False
    if reason := obstacle(module.kv_b_proj):
        _tell_fallback(module, f"kv_b_proj is more than its weight: {reason}")
        return False
    if reason := _dtype_obstacle(query, rows, module.kv_b_proj.weight):
        _tell_fallback(module, reason)
        return False
    if _needs_gradient(query, rows, module.kv_b_proj):
        return False
    if mask is None:
        return s_q == 1  # for longer queries SDPA defines what no mask means
    return mask.dtype in (torch.bool, torch.int32) and mask.shape[1] == 1


def _can_prefill(module: MLAModule, query: Tensor, rows: LatentRows, mask: Tensor, dropout: float) -> bool:
    """Whether a long query is plainly causal behind a prefix, and eager: the prefix is cut into chunks on the host."""
    if query.shape[2] <= MAX_ABSORBED_QUERIES or dropout > 0.0 or is_tracing(query):
        return False
    if mask.dtype != torch.int32 or not is_prefix(mask) or _dtype_obstacle(query, rows):
        return False
    return not _needs_gradient(query, rows, module.kv_b_proj)


def _dtype_obstacle(query: Tensor, rows: LatentRows, *weights: Tensor) -> str:
    """Why the operators do not take these dtypes; empty if they do."""
    if query.dtype not in FLOATS:
        return f"no operator takes {query.dtype}"
    others = [tensor for tensor in (rows.kv_cache, rows.k_cache, *weights) if tensor is not None]
    if any(tensor.dtype != query.dtype for tensor in others):
        return f"queries are {query.dtype}, but not the cache and the weights of kv_b_proj, as under autocast"
    return ""


def _needs_gradient(query: Tensor, rows: LatentRows, kv_b_proj: nn.Module) -> bool:
    """Whether a gradient is required, of which the operators have none."""
    tensors = [tensor for tensor in (query, rows.kv_cache, rows.k_cache) if tensor is not None]
    return torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *kv_b_proj.parameters()))


def _tell_fallback(module: MLAModule, reason: str) -> None:
    """Warn once for a model and a reason. Not while a graph is traced, in which warning would be a step."""
    if is_tracing() or reason in module.told_fallbacks:
        return
    module.told_fallbacks.add(reason)
    warnings.warn(
        f"layer {module.layer_idx} runs transformers' attention on an expanded cache: {reason};"
        " flashmla_ops.integrations.transformers.why_not(model) lists every such layer",
        FallbackWarning,
        stacklevel=4,
    )


def _absorbed(
    module: MLAModule, query: Tensor, rows: LatentRows, mask: Tensor | None, scaling: float | None
) -> Tensor:  # [b, s_q, h_q, d_v]
    w_uk, w_uv = up_projections(module)
    q = absorb_query(query, w_uk)
    d_c = w_uk.shape[-1]
    if mask is not None and mask.dtype == torch.bool:
        b, _, s_q, _ = query.shape
        mask = tokens_mask(mask.expand(b, 1, s_q, rows.s_kv))
    up = w_uv.transpose(1, 2)
    if mask is not None and not is_prefix(mask):
        return _attend_tokens(q, rows, mask, up, scaling)
    seqlens = rows.cache_seqlens if mask is None else mask[:, 0, -1, 0].contiguous()
    out: Tensor
    out, _ = torch.ops.flashmla.decode_up(
        q, rows.kv_cache, rows.k_cache, rows.block_table, seqlens, up, d_c, softmax_scale=scaling, causal=True
    )
    return out


def _prefilled(
    module: MLAModule, query: Tensor, rows: LatentRows, mask: Tensor, scaling: float | None
) -> Tensor:  # [b, s_q, h_q, d_v]
    """The new tokens are in the cache already, behind the prefix of each sequence."""
    b, h_q, s_q, d_qk = query.shape
    prefix_lens = mask[:, 0, 0, 0] - 1

    def expand(latents: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        if rope is None:
            latents, rope = latents.split([module.kv_lora_rank, latents.shape[-1] - module.kv_lora_rank], dim=-1)
        keys, values = module.expanded(latents.transpose(0, 1)[None], rope.transpose(0, 1)[None])
        return keys[0].transpose(0, 1), values[0].transpose(0, 1)

    new = [Span(i, prefix, prefix + s_q) for i, prefix in enumerate(prefix_lens.tolist())]
    caches = (rows.kv_cache, rows.k_cache)
    keys, values = expand(*gather(*caches, rows.block_table, new))
    cu_seqlens = torch.arange(0, (b + 1) * s_q, s_q, dtype=torch.int32, device=query.device)
    out, _ = prefill_with_prefix(
        query.transpose(1, 2).reshape(b * s_q, h_q, d_qk),
        keys,
        values,
        cu_seqlens,
        *caches,
        rows.block_table,
        prefix_lens,
        softmax_scale=scaling,
        expand=expand,
    )
    return out.view(b, s_q, h_q, -1)


def _attend_tokens(
    q: Tensor,  # [b, s_q, h_q, d_c + d_r]
    rows: LatentRows,
    mask: Tensor,
    up: Tensor,  # [h_q, d_c, d_v]
    scaling: float | None,
) -> Tensor:  # [b, s_q, h_q, d_v]
    """Attention to listed tokens: each query is a sequence of its own whose pages are single tokens of the cache."""
    b, s_q, h_q, d_qk = q.shape
    page_size = rows.kv_cache.shape[1]
    positions = mask[:, 0, :, 1:].flatten(1)  # [b, s_q * s_kv]
    pages = rows.block_table.gather(1, (positions // page_size).long())
    slots = (pages * page_size + positions % page_size).view(b * s_q, rows.s_kv)
    kv_cache, k_cache = (None if x is None else x.flatten(0, 1)[:, None] for x in (rows.kv_cache, rows.k_cache))
    out: Tensor
    out, _ = torch.ops.flashmla.decode_up(
        q.reshape(b * s_q, 1, h_q, d_qk),
        kv_cache,
        k_cache,
        slots,
        mask[:, 0, :, 0].flatten(),
        up,
        up.shape[1],
        softmax_scale=scaling,
    )
    return out.view(b, s_q, h_q, -1)


def up_projections(module: MLAModule) -> tuple[Tensor, Tensor]:
    """Views of ``kv_b_proj.weight`` as W_UK ``[h_q, d_nope, d_c]`` and W_UV ``[h_q, d_v, d_c]``, read at each call."""
    split = [module.qk_nope_head_dim, module.v_head_dim]
    weight = module.kv_b_proj.weight.view(-1, sum(split), module.kv_lora_rank)
    w_uk, w_uv = weight.split(split, dim=1)
    return w_uk, w_uv


def absorb_query(query: Tensor, w_uk: Tensor) -> Tensor:
    """``[b, h_q, s_q, d_nope + d_r]`` to ``[b, s_q, h_q, d_c + d_r]``: the first d_nope dimensions through W_UK."""
    b, h_q, s_q, d_qk = query.shape
    d_nope = w_uk.shape[1]
    by_head = query.transpose(0, 1).reshape(h_q, b * s_q, d_qk)
    nope, rope = by_head.split([d_nope, d_qk - d_nope], dim=-1)
    q = torch.cat([torch.ops.flashmla.bmm(nope, w_uk), rope], dim=-1)
    return q.view(h_q, b, s_q, -1).permute(1, 2, 0, 3)


def _expanded(
    module: MLAModule, query: Tensor, key: Tensor, value: Tensor | Pages, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values expanded by the model's own code, and a mask that SDPA understands. Differentiable."""
    if isinstance(value, Pages):
        key, value = gather_pages(key, value, module.kv_lora_rank)
    if mask is not None and mask.dtype == torch.int32:
        whole = is_prefix(mask) and key.shape[2] == query.shape[2]  # without a prefix, SDPA's own causal mask will do
        mask = None if whole and query.shape[2] > 1 else boolean_mask(mask, key.shape[2])
    return *module.expanded(key, value), mask


def _with_weights(
    module: MLAModule,
    query: Tensor,
    key: Tensor,
    value: Tensor | Pages,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention written out as "eager" does: ``out [b, s_q, h_q, d_v]`` and weights ``[b, h_q, s_q, s_kv]``."""
    keys, values, mask = _expanded(module, query, key, value, attention_mask)
    s_q, s_kv = query.shape[2], keys.shape[2]
    if mask is None and s_q > 1:
        mask = torch.ones(s_q, s_kv, dtype=torch.bool, device=query.device).tril()
    scores = query @ keys.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.finfo(scores.dtype).min).to(scores.dtype)
    scores = scores if mask is None else scores + mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ values).transpose(1, 2), weights


def gather_pages(pages: Tensor, view: Pages, d_c: int) -> tuple[Tensor, Tensor]:
    """The rows of all sequences as transformers has them: ``[b, 1, s_kv, d_c]`` and ``[b, 1, s_kv, d_r]``."""
    rows = pages[view.block_table.long(), 0].flatten(1, 2)[:, None, : view.s_kv]
    latent, rope = rows.split([d_c, rows.shape[-1] - d_c], dim=-1)
    return latent, rope
