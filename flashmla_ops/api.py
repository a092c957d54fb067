"""Drop-in for the official ``flash_mla`` package: the same names, argument order, defaults and return values.

    import flashmla_ops as flash_mla

Dense decode and dense prefill (forward) are served, for more than the official package serves: any head counts, page
size and row width, float32 too. What the official functions assert raises `ArgumentError`, and so does every argument
of a mode that is not served here: nothing is silently ignored.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError, typed

_OP = "flash_mla_with_kvcache"


@dataclasses.dataclass
class FlashMLASchedMeta:
    """How the work of a decode call is split, filled by the first call of `flash_mla_with_kvcache` that takes it.

    It serves every later call of the same shapes and the same ``cache_seqlens`` (one decode step's layers, say); a call
    with others raises. ``tile_scheduler_metadata`` is the tensor of ``torch.ops.flashmla.decode_schedule``, which
    holds the whole plan, so ``num_splits`` stays None.
    """

    @dataclasses.dataclass
    class Config:
        """What the plan was made for."""

        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool
        is_fp8_kvcache: bool
        topk: int | None
        extra_page_block_size: int | None
        extra_topk: int | None

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: Tensor | None = None  # [n] int32
    num_splits: Tensor | None = None


#: The argument that each field of `FlashMLASchedMeta.Config` was read from.
_SOURCES = {"b": "q", "s_q": "q", "h_q": "q", "page_block_size": "k_cache", "h_k": "k_cache", "causal": "causal"}


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """An empty `FlashMLASchedMeta`, and None. Takes any arguments, as the official one does, and looks at none."""
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: Tensor,  # [b, s_q, h_q, d_qk]
    k_cache: Tensor,  # [n_pages, page_size, h_kv, d_qk]
    block_table: Tensor | None,  # [b, max_pages] int32
    cache_seqlens: Tensor | None,  # [b] int32
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # out [b, s_q, h_q, head_dim_v], lse [b, h_q, s_q] float32
    """Attention of ``s_q`` query tokens of each sequence over its pages; the value is the first part of the key's row.

    ``softmax_scale`` defaults to ``d_qk ** -0.5``. With ``causal`` the last query token sees the whole sequence, each
    earlier one a token less. ``lse`` is the natural log of the sum of the exponentials of the scaled scores; a query
    that sees no token has out 0 and lse +inf. ``tile_scheduler_metadata`` comes from `get_mla_metadata`.

    The remaining arguments belong to sparse and FP8 decode, which are not served: they must keep their defaults.

    Raises:
        ArgumentError: a shape, dtype, length or page does not fit; ``tile_scheduler_metadata`` was filled for other
            shapes or lengths; an argument of a mode that is not served was given.
        NotDifferentiableError: a gradient is required.
    """
    unserved = {
        "num_splits": num_splits,
        "indices": indices,
        "attn_sink": attn_sink,
        "extra_k_cache": extra_k_cache,
        "extra_indices_in_kvcache": extra_indices_in_kvcache,
        "topk_length": topk_length,
        "extra_topk_length": extra_topk_length,
    }
    for name, value in unserved.items():
        if value is not None:
            raise ArgumentError(_OP, name, "None: only dense decode is served", type(value).__name__)
    if is_fp8_kvcache:
        raise ArgumentError(_OP, "is_fp8_kvcache", "False: FP8 caches are not served", is_fp8_kvcache)
    if block_table is None:
        raise ArgumentError(_OP, "block_table", "a tensor: dense decode needs it", None)
    if cache_seqlens is None:
        raise ArgumentError(_OP, "cache_seqlens", "a tensor: dense decode needs it", None)
    meta = tile_scheduler_metadata
    if not isinstance(meta, FlashMLASchedMeta):
        expected = "the FlashMLASchedMeta that get_mla_metadata returned"
        raise ArgumentError(_OP, "tile_scheduler_metadata", expected, type(meta).__name__)

    if torch.compiler.is_compiling():
        return _decode(q, k_cache, block_table, cache_seqlens, head_dim_v, meta, softmax_scale, causal)
    with typed():
        return _decode(q, k_cache, block_table, cache_seqlens, head_dim_v, meta, softmax_scale, causal)


def flash_attn_varlen_func(
    q: Tensor,  # [t_q, h_q, d_qk]
    k: Tensor,  # [t_k, h_kv, d_qk]
    v: Tensor,  # [t_k, h_kv, d_v]
    cu_seqlens_qo: Tensor,  # [b + 1] int32 or int64
    cu_seqlens_kv: Tensor,  # [b + 1] int32 or int64
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:  # out [t_q, h_q, d_v], lse [t_q, h_q] float32
    """Dense attention over sequences that lie one after another; ``causal`` is aligned bottom-right.

    ``lse`` is the natural log, and -inf for a query that sees no key, as the official function has it (the operator
    says +inf). ``max_seqlen_qo``, ``max_seqlen_kv`` and ``is_varlen`` are hints that nothing here needs.

    Raises:
        ArgumentError: a shape, dtype or bound does not fit; ``dropout_p`` or ``deterministic`` is given, which the
            official function refuses too.
        NotDifferentiableError: a gradient is required: there is no backward yet.
    """
    op = "flash_attn_varlen_func"
    if dropout_p != 0.0:
        raise ArgumentError(op, "dropout_p", "0.0", dropout_p)
    if deterministic:
        raise ArgumentError(op, "deterministic", "False (results are deterministic anyway)", deterministic)
    arguments = (q, k, v, cu_seqlens_qo, cu_seqlens_kv, causal, softmax_scale)
    if torch.compiler.is_compiling():
        out, lse = torch.ops.flashmla.prefill(*arguments)
    else:
        with typed():
            out, lse = torch.ops.flashmla.prefill(*arguments)
    return out, lse.masked_fill(lse == torch.inf, -torch.inf).T


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,  # [t, h, d_qk + d_qk + d_v]
    cu_seqlens: Tensor,  # [b + 1] int32 or int64
    max_seqlen: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """`flash_attn_varlen_func` on q, k and v that lie in one tensor; they are read in place."""
    d_v = qkv.shape[-1] - 2 * head_dim_qk
    q, k, v = qkv.split([head_dim_qk, head_dim_qk, d_v], dim=-1)
    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return flash_attn_varlen_func(q, k, v, *bounds, dropout_p, softmax_scale, causal, deterministic, is_varlen)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,  # [t_q, h_q, d_qk]
    kv: Tensor,  # [t_k, h_kv, d_qk + d_v]
    cu_seqlens_qo: Tensor,  # [b + 1] int32 or int64
    cu_seqlens_kv: Tensor,  # [b + 1] int32 or int64
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """`flash_attn_varlen_func` on k and v that lie in one tensor; they are read in place."""
    k, v = kv.split([head_dim_qk, kv.shape[-1] - head_dim_qk], dim=-1)
    bounds = (cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv)
    return flash_attn_varlen_func(q, k, v, *bounds, dropout_p, softmax_scale, causal, deterministic, is_varlen)


def _decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    meta: FlashMLASchedMeta,
    softmax_scale: float | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    for name, tensor in (("q", q), ("k_cache", k_cache)):
        if tensor.dim() != 4:
            raise ArgumentError(_OP, name, "4 dimensions", f"{tensor.dim()} dimensions")
    (b, s_q, h_q, _), (_, page_size, h_kv, _) = q.shape, k_cache.shape
    config = FlashMLASchedMeta.Config(b, s_q, h_q, page_size, h_kv, causal, False, None, None, None)
    if meta.have_initialized:
        _check_config(meta.config, config)
        schedule = meta.tile_scheduler_metadata
    else:
        schedule = torch.ops.flashmla.decode_schedule(cache_seqlens, s_q, h_q, h_kv, _num_threads())
    out, lse = torch.ops.flashmla.decode(
        q, k_cache, None, block_table, cache_seqlens, head_dim_v, 0, softmax_scale, causal, schedule
    )
    # Filled only now: a call that raised leaves the metadata as it was.
    meta.have_initialized, meta.config, meta.tile_scheduler_metadata = True, config, schedule
    return out, lse


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _num_threads() -> int:
    return torch.get_num_threads()


def _check_config(made_for: FlashMLASchedMeta.Config | None, config: FlashMLASchedMeta.Config) -> None:
    for field, argument in _SOURCES.items():
        expected, actual = getattr(made_for, field, None), getattr(config, field)
        if expected != actual:
            expected = f"{field} {expected}, as tile_scheduler_metadata was filled for"
            raise ArgumentError(_OP, argument, expected, f"{field} {actual}")
