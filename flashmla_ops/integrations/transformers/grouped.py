"""Attention for transformers' MHA, GQA and MQA layers: the operators read the cache's values and keys where they lie.

A row is ``[V, K]`` of one KV head. transformers' caches keep V and K in two tensors, our paged caches in one; the
operators take both (`rows`). Short queries run `flashmla::decode`, long ones `flashmla::prefill`, and masks that only
their data decides, windows among them, `flashmla::attend_masked`, which reads no row that is hidden where the hidden
ones lie together. Softcaps and sinks are options of the first two, which take any boolean mask as a list of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.utils.import_utils import is_tracing

from flashmla_ops.errors import UnsupportedModelError
from flashmla_ops.integrations.transformers.masks import (
    MAX_ABSORBED_QUERIES,
    is_prefix,
    mask_for_sdpa,
    tokens_mask,
    without_needless,
)
from flashmla_ops.integrations.transformers.ragged import (
    is_ragged,
    read_window,
    window_of,
    write,
)
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
from flashmla_ops.sparsity import attend

#: The name of this attention in transformers' registries.
GROUPED_ATTENTION = "grouped_rows"

#: An argument that some models hand to attention functions beside the mask, and no operator takes.
UNSERVED = "position_bias"


class GroupedRows(Served):
    """Methods that MHA, GQA and MQA modules of an enabled model get beside their own."""


def grouped_attention(
    module: Any,
    query: Tensor,  # [b, h_q, s_q, d_qk]
    key: Tensor,  # [b, h_kv, s_kv, d_qk], or [n_pages, h_kv, page_size, d_v + d_qk] pages
    value: Tensor | Pages,  # [b, h_kv, s_kv, d_v], or how to read the pages
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, called by its forward through transformers' ``AttentionInterface``.

    ``attention_mask`` is an int32 mask of `masks`, a mask ``[b or 1, h_q or 1, s_q or 1, s_kv]``, boolean or added to
    the scores, or None, which means what it means to ``sdpa``: one query sees all, and of more each sees the cache's
    first tokens up to its own. A gradient is that of `flashmla::prefill` where each query sees the tokens up to its
    own; any other, dropout, float64 and attention that is not causal run transformers' own SDPA. Returns
    ``out [b, s_q, h_q, d_v]`` and, where ``output_attentions`` was asked for, the weights ``[b, h_q, s_q, s_kv]``.
    Continuous batches, which come with a paged cache of transformers, have no mask.

    ``softcap`` and ``s_aux``, a sink ``[h_q]`` beside the scores, are what they are to "eager".

    Raises `UnsupportedModelError` unless the module is enabled or a `FlashMLALayer`, and for biases; `ArgumentError`
    for a mask whose length is not the cache's.
    """
    if not isinstance(module, Served):
        raise UnsupportedModelError(
            f"attention '{GROUPED_ATTENTION}' is for models that were enabled:"
            " call flashmla_ops.integrations.transformers.enable(model)"
        )
    if kwargs.get(UNSERVED) is not None:
        raise UnsupportedModelError(f"layer {module.layer_idx} attends with {UNSERVED}, which no operator takes yet")
    scores = score_options(kwargs)
    options = {"softmax_scale": scaling, "levels": module.levels} | scores
    if is_ragged(module, kwargs):
        assert isinstance(value, Tensor)
        return _ragged(module, query, key, value, options, kwargs), None
    layer = kwargs.pop(SUMMARIZED, None)
    rows = paged_rows(key, value) if isinstance(value, Pages) else contiguous_rows(value, key)
    if attention_mask is not None:
        check_mask(attention_mask, rows.s_kv)
    if wants_weights(module, kwargs):
        keys, values, mask = _expanded(query, key, value, attention_mask)
        groups = query.shape[1] // keys.shape[1]
        expanded = repeat_kv(keys, groups), repeat_kv(values, groups)
        causal = is_causal(module, kwargs)
        return attend_with_weights(module, query, *expanded, mask, dropout, scaling, causal, **scores)
    if _runs_elsewhere(module, query, rows, attention_mask, dropout, kwargs):
        keys, values, mask = _expanded(query, key, value, attention_mask)
        if scores:  # which SDPA does not have
            groups = query.shape[1] // keys.shape[1]
            expanded = repeat_kv(keys, groups), repeat_kv(values, groups)
            causal = is_causal(module, kwargs)
            return attend_with_weights(module, query, *expanded, mask, dropout, scaling, causal, **scores)[0], None
        if needs_gradient(query, rows, mask):
            trained = attend_causally(module, query, keys, values, mask, dropout, scaling, kwargs)
            if trained is not None:
                return trained, None
            module.tell_gradient()
        out: Tensor = sdpa_attention_forward(
            module, query, keys, values, mask, dropout=dropout, scaling=scaling, **kwargs
        )[0]
        return out, None
    q = query.transpose(1, 2)
    d_v = rows.kv_cache.shape[-1] - (query.shape[-1] if rows.k_cache is None else 0)
    if layer is not None:
        attention_mask = without_needless(attention_mask)
    if attention_mask is not None and attention_mask.dtype != torch.int32:
        return _masked(module, q, key, value, rows, attention_mask, d_v, options), None
    return _listed(module, q, rows, attention_mask, d_v, options, None if scores else layer), None


def score_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a model does to its scores beside scaling them, as the operators' options; empty if nothing."""
    found: dict[str, Any] = {}
    if kwargs.get("softcap") is not None:
        found["softcap"] = float(kwargs["softcap"])
    if kwargs.get("s_aux") is not None:
        found["attn_sink"] = kwargs["s_aux"].float()
    return found


def _runs_elsewhere(
    module: Served, query: Tensor, rows: Rows, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> bool:
    """Whether a call needs more than the operators have. Says so where it is so for every call."""
    if dropout > 0.0 or (mask is not None and mask.dtype not in (torch.bool, torch.int32, torch.float32, query.dtype)):
        return True
    if reason := dtype_obstacle(query, rows):
        module.tell_fallback(reason)
        return True
    if needs_gradient(query, rows, mask):
        return True
    return mask is None and query.shape[2] > 1 and not is_causal(module, kwargs)


def _listed(
    module: Served, q: Tensor, rows: Rows, mask: Tensor | None, d_v: int, options: dict[str, Any], layer: Any = None
) -> Tensor:  # [b, s_q, h_q, d_v]
    """Under no mask, or one that lists what each query sees. ``layer``: of a cache that has summaries."""
    b, s_q, h_q, d_qk = q.shape
    if mask is not None and not is_prefix(mask):
        tokens = token_pages(rows, mask)
        out: Tensor = torch.ops.flashmla.decode(q.reshape(b * s_q, 1, h_q, d_qk), *tokens, d_v, d_v, **options)[0]
        return out.view(b, s_q, h_q, d_v)
    if s_q > MAX_ABSORBED_QUERIES and mask is None:
        return _prefilled(q, rows, d_v, options)
    if s_q > MAX_ABSORBED_QUERIES and not is_tracing(q) and not options.keys() & {"softcap", "attn_sink"}:
        assert mask is not None
        return _prefilled_behind(q, rows, mask[:, 0, 0, 0] - 1, d_v, options)
    if mask is not None:
        seqlens = mask[:, 0, -1, 0].contiguous()
    else:
        seqlens = rows.cache_seqlens if s_q == 1 else torch.full_like(rows.cache_seqlens, s_q)
    if (cached := cached_in_pages(layer, rows, seqlens)) is not None:
        sparsity = layer.sparsity
        tally = sparsity.tally(module.layer_idx)
        return attend(q, cached, sparsity, d_v, d_v, options["softmax_scale"], tally, module.levels)[0]
    out, _ = torch.ops.flashmla.decode(
        q, rows.kv_cache, rows.k_cache, rows.block_table, seqlens, d_v, d_v, causal=True, **options
    )
    return out


def _prefilled(q: Tensor, rows: Rows, d_v: int, options: dict[str, Any]) -> Tensor:
    """The cache's first tokens are those of the queries."""
    b, s_q, h_q, d_qk = q.shape
    if rows.k_cache is None:
        pages = rows.block_table[:, : -(-s_q // rows.kv_cache.shape[1])].long()
        values, keys = rows.kv_cache[pages].flatten(1, 2)[:, :s_q].split([d_v, d_qk], dim=-1)
    else:
        values, keys = rows.kv_cache[:, :s_q], rows.k_cache[:, :s_q]
    bounds = torch.arange(0, (b + 1) * s_q, s_q, dtype=torch.int32, device=q.device)
    flat = (tensor.reshape(b * s_q, *tensor.shape[2:]) for tensor in (q, keys, values))
    out: Tensor = torch.ops.flashmla.prefill(*flat, bounds, bounds, True, **options)[0]
    return out.view(b, s_q, h_q, d_v)


def _prefilled_behind(q: Tensor, rows: Rows, prefix_lens: Tensor, d_v: int, options: dict[str, Any]) -> Tensor:
    """The new tokens are in the cache already, behind the prefix of each sequence, which is read where it lies."""

    def split(first: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor]:
        values, keys = (first, second) if second is not None else first.split([d_v, q.shape[-1]], dim=-1)
        return keys, values

    return prefill_behind(q, rows, prefix_lens, split, qk_start=d_v, **options)


def _ragged(
    module: Served, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], kwargs: dict[str, Any]
) -> Tensor:  # [1, t, h_q, d_v]
    """The t new tokens of all sequences of a continuous batch."""
    assert module.layer_idx is not None
    q, d_v = query[0].transpose(0, 1), value.shape[-1]
    if (window := window_of(module.layer_idx, kwargs)) > 0:
        parts, bounds = read_window(module.layer_idx, key, value, kwargs)
        windowed: Tensor = torch.ops.flashmla.prefill(q, *parts, *bounds, True, **options, window=window)[0]
        return windowed[None]
    caches = kwargs["cache"].value_cache, kwargs["cache"].key_cache
    batch = write(module.layer_idx, value, key, caches, kwargs).padded(q.shape[0])
    rows = (batch.rows.kv_cache, batch.rows.k_cache, batch.rows.block_table, batch.rows.cache_seqlens)
    out: Tensor = torch.ops.flashmla.decode(q, *rows, d_v, d_v, causal=True, cu_seqlens_q=batch.bounds, **options)[0]
    return out[None]


def _masked(
    module: Served,
    q: Tensor,  # [b, s_q, h_q, d_qk]
    key: Tensor,
    value: Tensor | Pages,
    rows: Rows,
    mask: Tensor,
    d_v: int,
    options: dict[str, Any],
) -> Tensor:  # [b, s_q, h_q, d_v]
    """Under a mask over the cache's tokens, boolean or added, which is read at run time."""
    b, s_q = q.shape[:2]
    scored = options.keys() & {"softcap", "attn_sink"}
    if scored and mask.dtype != torch.bool:
        mask = seen_by(mask)
    if scored or (isinstance(value, Pages) and mask.dtype == torch.bool and s_q <= MAX_ABSORBED_QUERIES):
        if mask.shape[1] == 1:
            return _listed(module, q, rows, tokens_mask(mask.expand(b, 1, s_q, rows.s_kv)), d_v, options)
        if scored:
            raise UnsupportedModelError(f"layer {module.layer_idx} attends with {sorted(scored)} and a mask by head")
    if isinstance(value, Pages):
        rows = contiguous_rows(*gather_pages(key, value, d_v, q.dtype))
    scale = options["softmax_scale"]
    out: Tensor = torch.ops.flashmla.attend_masked(q, rows.kv_cache, rows.k_cache, mask, d_v, d_v, scale)
    return out


def seen_by(mask: Tensor) -> Tensor:
    """The boolean mask that one added to the scores stands for, where it adds 0 or the least number."""
    return mask >= torch.finfo(mask.dtype).min / 2


def _expanded(
    query: Tensor, key: Tensor, value: Tensor | Pages, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and a mask that SDPA understands. Differentiable."""
    if isinstance(value, Pages):
        value, key = gather_pages(key, value, key.shape[-1] - query.shape[-1], query.dtype)
    return key, value, mask_for_sdpa(mask, query.shape[2], key.shape[2])
