"""Drop-in for the official ``flash_mla`` package: the same names, argument order, defaults and return values.

    import flashmla_ops as flash_mla

Every generation of the package is served: dense and sparse decode, dense and sparse prefill (forward), the caches of V3
(elements), V3.2, V4 and V4.1 (bytes, told apart by the bytes of a row), in the signatures of all its releases; and more
than it serves: any head counts, page size and row width, float32 too, sparse decode of elements. What the official
functions assert, or read out of bounds on, raises `ArgumentError`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError, typed
from flashmla_ops.formats import FP4_V41, FP8_MODEL1, FP8_V32, FP8_V41, NATIVE
from flashmla_ops.ops.quantize import BYTES

_OP = "flash_mla_with_kvcache"
#: The formats of the official package's caches. Each has another number of bytes.
_FORMATS = (FP8_V32, FP8_MODEL1, FP8_V41, FP4_V41)


@dataclasses.dataclass
class FlashMLASchedMeta:
    """How the work of a decode call is split, filled by the first call of `flash_mla_with_kvcache` that takes it.

    It serves every later call of the same shapes and, if dense, the same ``cache_seqlens`` (one decode step's layers,
    say); a call with others raises. ``tile_scheduler_metadata`` is the tensor of
    ``torch.ops.flashmla.decode_schedule``, which holds the whole plan, so ``num_splits`` stays None; sparse decode
    needs no plan, and leaves both None.
    """

    @dataclasses.dataclass
    class Config:
        """The sizes and options that the plan was made for."""

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
        enable_batch_invariant: bool = False

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: Tensor | None = None  # [n] int32
    num_splits: Tensor | None = None


#: The argument that each field of `FlashMLASchedMeta.Config` was read from.
_SOURCES = {
    "b": "q",
    "s_q": "q",
    "h_q": "q",
    "page_block_size": "k_cache",
    "h_k": "k_cache",
    "causal": "causal",
    "is_fp8_kvcache": "k_cache",
    "topk": "indices",
    "extra_page_block_size": "extra_k_cache",
    "extra_topk": "extra_indices_in_kvcache",
    "enable_batch_invariant": "enable_batch_invariant",
}


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """An empty `FlashMLASchedMeta`, and None. Takes any arguments, as the official one does, and looks at none."""
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: Tensor,  # [b, s_q, h_q, d_qk]
    k_cache: Tensor,  # [n_pages, page_size, h_kv, d_qk], or bytes of rows
    block_table: Tensor | None,  # [b, max_pages] int32
    cache_seqlens: Tensor | None,  # [b] int32
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool | None = None,
    indices: Tensor | None = None,  # [b, s_q, topk] int32
    attn_sink: Tensor | None = None,  # [h_q] float32
    extra_k_cache: Tensor | None = None,  # [n_pages, page_size, h_kv, d_qk], or bytes of rows
    extra_indices_in_kvcache: Tensor | None = None,  # [b, s_q, extra_topk] int32
    topk_length: Tensor | None = None,  # [b] int32
    extra_topk_length: Tensor | None = None,  # [b] int32
    enable_batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:  # out [b, s_q, h_q, head_dim_v], lse [b, h_q, s_q] float32
    """Attention of ``s_q`` query tokens of each sequence; the value is the first part of the key's row.

    Without ``indices`` it is dense: over the sequence's pages, with ``causal`` the last query token sees the whole
    sequence, each earlier one a token less. With ``indices`` it is sparse: over the rows that they name, ``page *
    page_size + offset``, any other number naming nothing; ``topk_length`` says how many of them count, the first ones.
    ``extra_k_cache`` is then a second cache, with indices and lengths of its own; one softmax is over the rows of both.
    Sparse attention needs neither ``block_table`` nor ``cache_seqlens``, and does not look at them.

    A cache of bytes is of the format whose rows have as many: 656 (V3.2), 584 (V4), 528 (V4.1), or 288 (V4.1, a second
    cache only). ``is_fp8_kvcache`` may say so or be left out: releases of the official package differ in its default.

    ``softmax_scale`` defaults to ``d_qk ** -0.5``. ``lse`` is the natural log of the sum of the exponentials of the
    scaled scores; a query that sees no row has out 0 and lse +inf. ``attn_sink`` multiplies out by
    exp(lse) / (exp(lse) + exp(sink)). With ``enable_batch_invariant`` the result of a sequence has the same bits
    whatever else is in the batch. ``tile_scheduler_metadata`` comes from `get_mla_metadata`.

    Raises:
        ArgumentError: a shape, dtype, length or page does not fit; ``tile_scheduler_metadata`` was filled for other
            shapes or lengths; an argument belongs to the other kind of attention.
        NotDifferentiableError: a gradient is required over a cache of bytes, without ``indices``.
    """
    meta = tile_scheduler_metadata
    if num_splits is not None:
        raise ArgumentError(_OP, "num_splits", "None, as get_mla_metadata returned", type(num_splits).__name__)
    if not isinstance(meta, FlashMLASchedMeta):
        expected = "the FlashMLASchedMeta that get_mla_metadata returned"
        raise ArgumentError(_OP, "tile_scheduler_metadata", expected, type(meta).__name__)
    config, formats = _describe(
        q, k_cache, indices, extra_k_cache, extra_indices_in_kvcache, causal, is_fp8_kvcache, enable_batch_invariant
    )
    if meta.have_initialized:
        _check_config(meta.config, config)
    extra = {
        "topk_length": topk_length,
        "extra_k_cache": extra_k_cache,
        "extra_indices_in_kvcache": extra_indices_in_kvcache,
        "extra_topk_length": extra_topk_length,
    }
    schedule = None
    if indices is not None:
        if causal:
            raise ArgumentError(_OP, "causal", "False with indices, which say what is seen", causal)
        options = (head_dim_v, 0, softmax_scale, formats[0], attn_sink, *extra.values(), formats[1])
        results = _typed(
            lambda: torch.ops.flashmla.sparse_decode(q, k_cache, None, indices, *options, enable_batch_invariant)
        )
    else:
        _require_dense(extra, block_table, cache_seqlens)
        schedule = meta.tile_scheduler_metadata
        if not meta.have_initialized and not enable_batch_invariant:  # which cuts sequences in a way of its own
            heads = (config.s_q, config.h_q, config.h_k, _num_threads())
            schedule = _typed(lambda: torch.ops.flashmla.decode_schedule(cache_seqlens, *heads))
        tensors = (q, k_cache, None, block_table, cache_seqlens)
        options = (head_dim_v, 0, softmax_scale, causal, schedule, formats[0], attn_sink)
        results = _typed(lambda: torch.ops.flashmla.decode(*tensors, *options, batch_invariant=enable_batch_invariant))
    # Filled only now: a call that raised leaves the metadata as it was.
    meta.have_initialized, meta.config, meta.tile_scheduler_metadata = True, config, schedule
    out, lse = results
    return out, lse


def flash_mla_sparse_fwd(
    q: Tensor,  # [s_q, h_q, d_qk]
    kv: Tensor,  # [s_kv, h_kv, d_qk], or bytes of rows
    indices: Tensor,  # [s_q, h_kv, topk] int32
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,  # [h_q] float32
    topk_length: Tensor | None = None,  # [s_q] int32
) -> tuple[Tensor, Tensor, Tensor]:  # out [s_q, h_q, d_v], max_logits [s_q, h_q] float32, lse [s_q, h_q] float32
    """Attention of each query token over the rows of ``kv`` that its ``indices`` name, any other number naming nothing.

    ``topk_length`` says how many of the indices count, the first ones. ``max_logits`` and ``lse`` (natural) are of the
    scaled scores, and do not know of ``attn_sink``, which multiplies out by exp(lse) / (exp(lse) + exp(sink)). A query
    without a row has out 0, max_logits -inf and lse +inf.

    Raises:
        ArgumentError: a shape, dtype or length does not fit.
        NotDifferentiableError: a gradient is required of rows of bytes. (``max_logits`` has none.)
    """
    row_format = _format("flash_mla_sparse_fwd", "kv", kv)
    arguments = (q, kv, indices, d_v, sm_scale, row_format, attn_sink, topk_length)
    results: tuple[Tensor, Tensor, Tensor] = _typed(lambda: torch.ops.flashmla.sparse_prefill(*arguments))
    return results


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
    """
    op = "flash_attn_varlen_func"
    if dropout_p != 0.0:
        raise ArgumentError(op, "dropout_p", "0.0", dropout_p)
    if deterministic:
        raise ArgumentError(op, "deterministic", "False (results are deterministic anyway)", deterministic)
    arguments = (q, k, v, cu_seqlens_qo, cu_seqlens_kv, causal, softmax_scale)
    out, lse = _typed(lambda: torch.ops.flashmla.prefill(*arguments))
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


def _require_dense(sparse: dict[str, Tensor | None], block_table: Tensor | None, cache_seqlens: Tensor | None) -> None:
    """Check what a call without indices must have or must not. ``sparse``: the arguments that go with indices."""
    for name, value in sparse.items():
        if value is not None:
            raise ArgumentError(_OP, name, "None without indices", type(value).__name__)
    for name, value in (("block_table", block_table), ("cache_seqlens", cache_seqlens)):
        if value is None:
            raise ArgumentError(_OP, name, "a tensor: dense decode needs it", None)


def _describe(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor | None,
    extra_k_cache: Tensor | None,
    extra_indices: Tensor | None,
    causal: bool,
    is_fp8_kvcache: bool | None,
    enable_batch_invariant: bool,
) -> tuple[FlashMLASchedMeta.Config, tuple[str, str]]:
    """The sizes that a plan is made for, and the row formats of both caches."""
    for name, tensor in (("q", q), ("k_cache", k_cache), ("extra_k_cache", extra_k_cache)):
        if tensor is not None and tensor.dim() != 4:
            raise ArgumentError(_OP, name, "4 dimensions", f"{tensor.dim()} dimensions")
    row_format = _format(_OP, "k_cache", k_cache)
    quantised = row_format != NATIVE
    if row_format == FP4_V41.name:
        raise ArgumentError(_OP, "k_cache", "rows of FP4 in extra_k_cache only", f"rows of {FP4_V41.bytes} bytes")
    if is_fp8_kvcache is not None and is_fp8_kvcache != quantised:
        expected = f"{quantised} with a cache of {str(k_cache.dtype).removeprefix('torch.')}"
        raise ArgumentError(_OP, "is_fp8_kvcache", expected, is_fp8_kvcache)
    extra_format = NATIVE if extra_k_cache is None else _format(_OP, "extra_k_cache", extra_k_cache)
    return FlashMLASchedMeta.Config(
        b=q.size(0),
        s_q=q.size(1),
        h_q=q.size(2),
        page_block_size=k_cache.size(1),
        h_k=k_cache.size(2),
        causal=causal,
        is_fp8_kvcache=quantised,
        topk=_width(indices),
        extra_page_block_size=None if extra_k_cache is None else extra_k_cache.size(1),
        extra_topk=_width(extra_indices),
        enable_batch_invariant=enable_batch_invariant,
    ), (row_format, extra_format)


def _width(indices: Tensor | None) -> int | None:
    return None if indices is None or indices.dim() == 0 else indices.size(-1)


def _format(op: str, name: str, cache: Tensor) -> str:
    """The row format of a cache: that of its dtype, and of the bytes of a row."""
    if cache.dtype not in BYTES:
        return NATIVE
    for row in _FORMATS:
        if cache.size(-1) == row.bytes:
            return row.name
    expected = "rows of " + ", ".join(f"{row.bytes} ({row.name})" for row in _FORMATS) + " bytes"
    raise ArgumentError(op, name, expected, cache.size(-1))


def _typed(call: Callable[[], Any]) -> Any:
    """The result of a call of operators, with typed errors where Python is there to raise them."""
    if torch.compiler.is_compiling():
        return call()
    with typed():
        return call()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _num_threads() -> int:
    return torch.get_num_threads()


def _check_config(made_for: FlashMLASchedMeta.Config | None, config: FlashMLASchedMeta.Config) -> None:
    for field, argument in _SOURCES.items():
        expected, actual = getattr(made_for, field, None), getattr(config, field)
        if expected != actual:
            expected = f"{field} {expected}, as tile_scheduler_metadata was filled for"
            raise ArgumentError(_OP, argument, expected, f"{field} {actual}")
