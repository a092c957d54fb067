"""Attention of a batch of vLLM over its caches: functions of tensors, which know nothing of vLLM.

A batch has its decoding sequences first, with one query token each, and then those with more (prompts, or chunks of
them). vLLM's caches are ``[n_pages, page_size, d]`` of latents, or ``[n_pages, h_kv, page_size, 2 * d]``, where we
write rows ``[V, K]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError
from flashmla_ops.formats import LATENTS, NATIVE, row_bytes
from flashmla_ops.nn.prefix import Expand, prefill_with_prefix

OP = "vllm"
#: What vLLM takes a row of its ``fp8_ds_mla`` for.
ROW_BYTES = 656
#: Row formats of as many bytes, and the kv_lora_rank and qk_rope_head_dim of their latents.
LATENT_FORMATS = {name: sizes for name, sizes in LATENTS.items() if row_bytes(name) == ROW_BYTES}


class Batch(NamedTuple):
    """The sequences of a step. Query token i of a sequence of length n is its token n - (its query tokens) + i."""

    decodes: int  # sequences with one query token, which come first
    prefixes: list[int]  # [b], how many tokens each had before this step
    cache_seqlens: Tensor  # [b] int32, with this step's tokens
    block_table: Tensor  # [b, max_pages] int32
    cu_seqlens_q: Tensor  # [b + 1] int32, where each sequence's query tokens begin


class Options(NamedTuple):
    """How a layer of grouped heads attends: the options of `decode` and `prefill` of these names."""

    softmax_scale: float
    window: int = 0
    softcap: float = 0.0
    attn_sink: Tensor | None = None  # [h_q] float32
    causal: bool = True


def row_format_of(kv_cache_dtype: str, chosen: str | None, kv_lora_rank: int, rotary: int) -> str:
    """The row format of a latent cache of vLLM, whose ``--kv-cache-dtype`` is given.

    ``chosen``: of ``additional_config``, for formats that vLLM has no name for. Raises `ArgumentError` for a format
    that is not one of latents, and for latents of other sizes than the format's.
    """
    if kv_cache_dtype in ("auto", "float16", "bfloat16", "float32"):
        return NATIVE
    row_format = chosen or "fp8_v32"
    if row_format not in LATENT_FORMATS:
        raise ArgumentError(OP, "flashmla_row_format", f"one of {', '.join(LATENT_FORMATS)}", row_format)
    sizes, given = LATENT_FORMATS[row_format], (kv_lora_rank, rotary)
    if given != sizes:
        expected = f"a model with latents of {sizes[0]} and {sizes[1]} elements, which {row_format} rows hold"
        raise ArgumentError(OP, "kv_cache_dtype", expected, f"{given[0]} and {given[1]}")
    return row_format


def decode_latents(
    q: Tensor,  # [b, h_q, d_c + d_r], absorbed
    cache: Tensor,  # [n_pages, page_size, d]
    block_table: Tensor,  # [b, max_pages] int32
    cache_seqlens: Tensor,  # [b] int32
    d_c: int,
    softmax_scale: float,
    row_format: str,
) -> tuple[Tensor, Tensor]:  # [b, h_q, d_c], [b, h_q] float32
    """One query token a sequence over its latents. A sequence of length 0 has the LSE that vLLM expects, -inf."""
    rows = cache.unsqueeze(2)
    out, lse = torch.ops.flashmla.decode(
        q.unsqueeze(1), rows, None, block_table, cache_seqlens, d_c, 0, softmax_scale, row_format=row_format
    )
    return out.squeeze(1), lse.squeeze(2).masked_fill_(lse.squeeze(2) == torch.inf, -torch.inf)


def append_latents(latents: Tensor, rotary: Tensor, cache: Tensor, slots: Tensor, row_format: str) -> None:
    """Write latents ``[n, d_c]`` with rotary parts ``[n, 1, d_r]`` or ``[n, d_r]``. Negative slots are skipped."""
    n = slots.numel()
    rows = torch.cat([latents[:n], rotary.reshape(-1, rotary.shape[-1])[:n]], dim=-1).unsqueeze(1)
    if row_format == NATIVE:
        rows = rows.to(cache.dtype)
    torch.ops.flashmla.append_(cache.unsqueeze(2), rows, slots.flatten().long(), row_format)


def prefill_latents(
    q: Tensor,  # [t, h_q, d_qk]
    k: Tensor,  # [t, h_q, d_qk]
    v: Tensor,  # [t, h_q, d_v]
    cache: Tensor,  # [n_pages, page_size, d]
    cu_seqlens: Tensor,  # [b + 1] int32
    prefix_lens: Tensor | None,  # [b] int32; None: no sequence has a prefix
    block_table: Tensor,  # [b, max_pages] int32
    expand: Expand,
    softmax_scale: float,
    row_format: str,
) -> Tensor:  # [t, h_q, d_v]
    """Prompts, or chunks of prompts, in expanded heads; what a sequence has in pages already is expanded in chunks."""
    if prefix_lens is None:
        return prefill(q, k, v, cu_seqlens, Options(softmax_scale))
    out, _ = prefill_with_prefix(
        q,
        k,
        v,
        cu_seqlens,
        cache.unsqueeze(2),
        None,
        block_table,
        prefix_lens,
        softmax_scale=softmax_scale,
        row_format=row_format,
        expand=expand,
    )
    return out


def prefill(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, options: Options) -> Tensor:
    """New tokens of all sequences over each other."""
    out: Tensor = torch.ops.flashmla.prefill(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        options.causal,
        options.softmax_scale,
        attn_sink=options.attn_sink,
        window=options.window,
        softcap=options.softcap,
    )[0]
    return out


def as_rows(cache: Tensor) -> Tensor:
    """A cache ``[n_pages, h_kv, page_size, 2 * d]`` as ``[n_pages, page_size, h_kv, 2 * d]``."""
    return cache.transpose(1, 2)


def append_grouped(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Write keys and values ``[n, h_kv, d]`` as rows ``[V, K]``. Negative slots are skipped."""
    n = slots.numel()
    rows = torch.cat([v[:n], k[:n]], dim=-1).to(cache.dtype)
    torch.ops.flashmla.append_(as_rows(cache), rows, slots.flatten().long())


def attend_grouped(
    q: Tensor,  # [t, h_q, d]
    k: Tensor | None,  # [t, h_kv, d]; None: they are only in the cache
    v: Tensor | None,
    cache: Tensor,  # [n_pages, h_kv, page_size, 2 * d], with this step's rows
    batch: Batch,
    options: Options,
) -> Tensor:  # [t, h_q, d]
    """All sequences of a step: those that decode in one call, and the others in another."""
    split = batch.decodes
    if split == len(batch.prefixes):
        return _decode(q, cache, batch, options, None)
    if split == 0:
        return _extend(q, k, v, cache, batch, options)
    decoding = Batch(split, *_of(batch, slice(0, split)), batch.cu_seqlens_q[: split + 1])
    rest = Batch(0, *_of(batch, slice(split, None)), batch.cu_seqlens_q[split:] - split)
    new_k, new_v = (None if each is None else each[split:] for each in (k, v))
    first = _decode(q[:split], cache, decoding, options, None)
    return torch.cat([first, _extend(q[split:], new_k, new_v, cache, rest, options)])


def _of(batch: Batch, sequences: slice) -> tuple[list[int], Tensor, Tensor]:
    return batch.prefixes[sequences], batch.cache_seqlens[sequences], batch.block_table[sequences]


def _extend(q: Tensor, k: Tensor | None, v: Tensor | None, cache: Tensor, batch: Batch, options: Options) -> Tensor:
    """Sequences of several query tokens: over each other alone, or over pages, where this step's rows are too."""
    if k is None or v is None or any(batch.prefixes):
        return _decode(q, cache, batch, options, batch.cu_seqlens_q)
    return prefill(q, k, v, batch.cu_seqlens_q, options)


def _decode(q: Tensor, cache: Tensor, batch: Batch, options: Options, cu_seqlens_q: Tensor | None) -> Tensor:
    d = q.shape[2]
    out: Tensor = torch.ops.flashmla.decode(
        q.unsqueeze(1) if cu_seqlens_q is None else q,
        as_rows(cache),
        None,
        batch.block_table,
        batch.cache_seqlens,
        d,
        d,
        options.softmax_scale,
        options.causal,
        attn_sink=options.attn_sink,
        window=options.window,
        softcap=options.softcap,
        cu_seqlens_q=cu_seqlens_q,
    )[0]
    return out.reshape(q.shape)
