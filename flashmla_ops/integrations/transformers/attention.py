"""Attention for transformers' MLA layers: short queries attend to the latent cache where it lies, absorbed.

An MLA key is ``[W_UK c, k_pe]`` and its value ``W_UV c``, where c is the cached latent and W_UK, W_UV are the two
halves of ``kv_b_proj``. Therefore ``q_nope . (W_UK c) = (W_UK^T q_nope) . c`` and ``sum_t p_t (W_UV c_t) = W_UV (sum_t
p_t c_t)``: one multiplication of the query and one of the result replace the expansion of the whole cache, and every
head reads the same row ``[c, k_pe]`` (DeepSeek-V2, arXiv:2405.04434, section 2.1.2). Long queries are cheaper on
expanded heads: the new tokens' own, and the cached prefix's, chunk by chunk.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.import_utils import is_tracing

from flashmla_ops.errors import UnsupportedModelError
from flashmla_ops.integrations.transformers.masks import (
    MAX_ABSORBED_QUERIES,
    is_prefix,
    mask_for_sdpa,
    prefix_mask,
    tokens_mask,
    without_needless,
)
from flashmla_ops.integrations.transformers.projection import obstacle, weight_of
from flashmla_ops.integrations.transformers.ragged import PAGED, Batch, attend_ragged, is_ragged, write
from flashmla_ops.integrations.transformers.rows import (
    Pages,
    Rows,
    check_mask,
    contiguous_rows,
    dtype_obstacle,
    gather_pages,
    needs_gradient,
    paged_rows,
    prefill_behind,
    token_pages,
)
from flashmla_ops.integrations.transformers.served import (
    SUMMARIZED,
    Served,
    attend_with_weights,
    is_causal,
    wants_weights,
)
from flashmla_ops.integrations.transformers.summarized import cached_in_pages
from flashmla_ops.integrations.transformers.training import attend_causally
from flashmla_ops.nn.prefix import Expand
from flashmla_ops.sparsity.select import record, select, share_lost

#: The name of this attention in transformers' registries. transformers takes any name with "flash" in it for one of its
#: own flash-attention kernels.
ABSORBED_ATTENTION = "absorbed_mla"

#: An attention module with ``kv_b_proj`` and ``expand_kv``; transformers has no common class for them.
MLAModule = Any


class AbsorbedMLA(Served):
    """Methods that the attention modules of an enabled model get beside their own."""

    keys_first: ClassVar[bool] = True

    def expand_kv(self, latent: Tensor, rope: Tensor | Pages) -> tuple[Tensor, Tensor | Pages]:
        """Hand the cache on as it is, unless another attention was chosen since `enable`."""
        if self.config._attn_implementation in (ABSORBED_ATTENTION, PAGED + ABSORBED_ATTENTION):
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
    with a prefix mask run `flashmla::prefill` on heads expanded chunk by chunk, and on all of them where a gradient is
    required and every query sees the tokens up to its own. What needs more than the operators have (a gradient behind a
    prefix or under padding, dropout, a boolean mask for each head, float64, for short queries a ``kv_b_proj`` that was
    adapted or hooked, for long ones a mask that is not plainly causal) runs SDPA on the expanded cache; where
    that is so for every call, a `FallbackWarning` says it once for each model. Returns ``out [b, s_q, h_q, d_v]`` and,
    where ``output_attentions`` was asked of the call or of the configuration, the weights ``[b, h_q, s_q, s_kv]``,
    which take attention on expanded heads, written out; otherwise None. Continuous batches have no mask.

    Raises `UnsupportedModelError` unless `enable` was called, and `ArgumentError` for a mask whose length is not the
    cache's.
    """
    if not isinstance(module, AbsorbedMLA):
        raise UnsupportedModelError(
            f"attention '{ABSORBED_ATTENTION}' needs latents: call flashmla_ops.integrations.transformers.enable(model)"
        )
    if is_ragged(module, kwargs):
        assert isinstance(value, Tensor)
        return _ragged(module, query, key, value, scaling, kwargs), None
    layer = kwargs.pop(SUMMARIZED, None)
    rows = _latent_rows(key, value)
    if attention_mask is not None:
        check_mask(attention_mask, rows.s_kv)
    if wants_weights(module, kwargs):
        keys, values, mask = _expanded(module, query, key, value, attention_mask)
        causal = is_causal(module, kwargs)
        return attend_with_weights(module, query, keys, values, mask, dropout, scaling, causal)
    if layer is not None:
        attention_mask = without_needless(attention_mask)
    if attention_mask is None and query.shape[2] > 1 and is_causal(module, kwargs):
        # Each query sees the cache's first tokens up to its own: what no mask means to SDPA, and when it is left out.
        attention_mask = prefix_mask(query.shape[0], query.shape[2], 0, query.device)
    if _can_absorb(module, query, rows, attention_mask, dropout):
        return _absorbed(module, query, rows, attention_mask, scaling, layer), None
    if attention_mask is not None and _can_prefill(module, query, rows, attention_mask, dropout):
        return _prefilled(module, query, rows, attention_mask, scaling), None
    keys, values, mask = _expanded(module, query, key, value, attention_mask)
    if _needs_gradient(module, query, rows):
        out = attend_causally(module, query, keys, values, mask, dropout, scaling, kwargs)
        if out is not None:
            return out, None
        module.tell_gradient()
    out, _ = sdpa_attention_forward(module, query, keys, values, mask, dropout=dropout, scaling=scaling, **kwargs)
    return out, None


def _latent_rows(key: Tensor, value: Tensor | Pages) -> Rows:
    return paged_rows(key, value) if isinstance(value, Pages) else contiguous_rows(key, value)


def _can_absorb(module: MLAModule, query: Tensor, rows: Rows, mask: Tensor | None, dropout: float) -> bool:
    s_q = query.shape[2]
    if s_q > MAX_ABSORBED_QUERIES or dropout > 0.0:
        return False
    if reason := obstacle(module.kv_b_proj):
        module.tell_fallback(f"kv_b_proj is more than its weight: {reason}")
        return False
    if reason := dtype_obstacle(query, rows, weight_of(module.kv_b_proj)):
        module.tell_fallback(reason)
        return False
    if _needs_gradient(module, query, rows):
        return False
    if mask is None:
        return s_q == 1
    if mask.dtype in (torch.bool, torch.int32):
        return mask.shape[1] == 1
    return rows.k_cache is not None and mask.dtype in (torch.float32, query.dtype) and not mask.requires_grad


def _can_prefill(module: MLAModule, query: Tensor, rows: Rows, mask: Tensor, dropout: float) -> bool:
    """Whether a long query is plainly causal behind a prefix, and eager: the prefix is cut into chunks on the host."""
    if query.shape[2] <= MAX_ABSORBED_QUERIES or dropout > 0.0 or is_tracing(query):
        return False
    if mask.dtype != torch.int32 or not is_prefix(mask) or dtype_obstacle(query, rows):
        return False
    return not _needs_gradient(module, query, rows)


def _needs_gradient(module: MLAModule, query: Tensor, rows: Rows) -> bool:
    return needs_gradient(query, rows, *module.kv_b_proj.parameters())


def _absorbed(
    module: MLAModule, query: Tensor, rows: Rows, mask: Tensor | None, scaling: float | None, layer: Any = None
) -> Tensor:  # [b, s_q, h_q, d_v]
    w_uk, w_uv = up_projections(module)
    q = absorb_query(query, w_uk)
    d_c = w_uk.shape[-1]
    if mask is not None and mask.dtype == torch.bool:
        b, _, s_q, _ = query.shape
        mask = tokens_mask(mask.expand(b, 1, s_q, rows.s_kv))
    up = w_uv.transpose(1, 2)
    if mask is not None and mask.dtype != torch.int32:
        latent = torch.ops.flashmla.attend_masked(q, rows.kv_cache, rows.k_cache, mask, d_c, 0, scaling)
        heads = latent.permute(2, 0, 1, 3).flatten(1, 2)  # [h_q, b * s_q, d_c]
        values: Tensor = torch.ops.flashmla.bmm(heads, up)
        return values.view(-1, *latent.shape[:2], up.shape[2]).permute(1, 2, 0, 3)
    if mask is not None and not is_prefix(mask):
        return _attend_tokens(q, rows, mask, up, scaling, module.levels)
    seqlens = rows.cache_seqlens if mask is None else mask[:, 0, -1, 0].contiguous()
    out: Tensor
    options = {"softmax_scale": scaling, "causal": True, "levels": module.levels, "row_format": rows.row_format}
    if (cached := cached_in_pages(layer, rows, seqlens)) is not None:
        sparsity = layer.sparsity
        chosen = select(q, cached, sparsity, 0, scaling)
        heads = (chosen.heads.kv_cache, chosen.heads.k_cache)
        out, lse = torch.ops.flashmla.decode_up(q, *heads, chosen.pages, chosen.lengths, up, d_c, **options)
        lost = share_lost(chosen, lse)
        record(sparsity.tally(module.layer_idx), q, cached, sparsity, chosen.lengths, lost, d_c)
        return out
    caches = (rows.kv_cache, rows.k_cache, rows.block_table, seqlens)
    out, _ = torch.ops.flashmla.decode_up(q, *caches, up, d_c, **options)
    return out


def _prefilled(
    module: MLAModule, query: Tensor, rows: Rows, mask: Tensor, scaling: float | None
) -> Tensor:  # [b, s_q, h_q, d_v]
    """The new tokens are in the cache already, behind the prefix of each sequence."""
    expand = _expansion(module)
    options = {"expand": expand, "softmax_scale": scaling, "levels": module.levels}
    return prefill_behind(query.transpose(1, 2), rows, mask[:, 0, 0, 0] - 1, expand, **options)


def _expansion(module: MLAModule) -> Expand:
    """Rows ``[n, 1, ...]``, of one tensor or two, to every head's keys and values, by the model's own code."""

    def expand(latents: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        if rope is None:
            latents, rope = latents.split([module.kv_lora_rank, latents.shape[-1] - module.kv_lora_rank], dim=-1)
        keys, values = module.expanded(latents.transpose(0, 1)[None], rope.transpose(0, 1)[None])
        return keys[0].transpose(0, 1), values[0].transpose(0, 1)

    return expand


def _ragged(
    module: MLAModule, query: Tensor, latent: Tensor, rope: Tensor, scaling: float | None, kwargs: dict[str, Any]
) -> Tensor:  # [1, t, h_q, d_v]
    """The t new tokens of all sequences of a continuous batch."""
    if (latents := getattr(kwargs["cache"], "latents", None)) is None:
        raise UnsupportedModelError("continuous batching of MLA needs pages of latents: call enable(model)")
    batch = write(module.layer_idx, latent, rope, (latents, kwargs["cache"].rotary), kwargs)

    def attend(q: Tensor, batch: Batch) -> Tensor:
        w_uk, w_uv = up_projections(module)
        absorbed = absorb_query(q.transpose(0, 1)[None], w_uk)[0]
        rows = (batch.rows.kv_cache, batch.rows.k_cache, batch.rows.block_table, batch.rows.cache_seqlens)
        options = {"softmax_scale": scaling, "causal": True, "levels": module.levels, "cu_seqlens_q": batch.bounds}
        out: Tensor = torch.ops.flashmla.decode_up(absorbed, *rows, w_uv.transpose(1, 2), w_uk.shape[-1], **options)[0]
        return out

    expand = _expansion(module)
    keys, values = expand(latent[0].transpose(0, 1), rope[0].transpose(0, 1))
    options = {"expand": expand, "softmax_scale": scaling, "levels": module.levels}
    absorbs = not obstacle(module.kv_b_proj)
    return attend_ragged(query[0].transpose(0, 1), keys, values, batch, attend if absorbs else None, **options)[None]


def _attend_tokens(
    q: Tensor,  # [b, s_q, h_q, d_c + d_r]
    rows: Rows,
    mask: Tensor,
    up: Tensor,  # [h_q, d_c, d_v]
    scaling: float | None,
    levels: int,
) -> Tensor:  # [b, s_q, h_q, d_v]
    """Attention to listed tokens."""
    b, s_q, h_q, d_qk = q.shape
    kv_cache, k_cache, slots, lengths = token_pages(rows, mask)
    out: Tensor
    out, _ = torch.ops.flashmla.decode_up(
        q.reshape(b * s_q, 1, h_q, d_qk),
        kv_cache,
        k_cache,
        slots,
        lengths,
        up,
        up.shape[1],
        softmax_scale=scaling,
        row_format=rows.row_format,
        levels=levels,
    )
    return out.view(b, s_q, h_q, -1)


def up_projections(module: MLAModule) -> tuple[Tensor, Tensor]:
    """Views of ``kv_b_proj.weight`` as W_UK ``[h_q, d_nope, d_c]`` and W_UV ``[h_q, d_v, d_c]``, read at each call."""
    split = [module.qk_nope_head_dim, module.v_head_dim]
    weight = weight_of(module.kv_b_proj).view(-1, sum(split), module.kv_lora_rank)
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
        key, value = gather_pages(key, value, module.kv_lora_rank, query.dtype)
    return *module.expanded(key, value), mask_for_sdpa(mask, query.shape[2], key.shape[2])
