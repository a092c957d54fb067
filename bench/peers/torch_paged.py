"""Decode in plain torch: gather the pages through the block table, then attend to the dense copy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from bench.paged import PagedInputs
from bench.peers import no_compiler
from bench.suite import Bound, Peer

#: q [b, h, s, d_qk], keys [b, h_kv, s_kv, d_qk], values [b, h_kv, s_kv, d_v], scale -> [b, h, s, d_v].
Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def head_table(inputs: PagedInputs) -> Tensor:
    """[b, h_kv, max_pages]: where each head's part of a page lies among all parts."""
    h_kv = inputs.case.h_kv
    return inputs.block_table.long()[:, None] * h_kv + torch.arange(h_kv)[:, None]


def gather(cache: Tensor, table: Tensor) -> Tensor:
    """[n_pages, page_size, h_kv, d], [b, h_kv, max_pages] -> [b, h_kv, s_kv, d]: one dense copy, in that order."""
    return cache.transpose(1, 2).flatten(0, 1)[table].flatten(2, 3)


def dense(inputs: PagedInputs, table: Tensor, kv_cache: Tensor, k_cache: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values of every sequence, without the rows that fill up its last page."""
    s_kv = inputs.case.s_kv
    rows = gather(kv_cache, table)[:, :, :s_kv]
    keys = rows[..., inputs.qk_start :]
    if k_cache is not None:
        k_rows = gather(k_cache, table)[:, :, :s_kv]
        keys = k_rows if keys.size(-1) == 0 else torch.cat([keys, k_rows], dim=-1)
    return keys, rows[..., : inputs.case.d_v]


def softmax_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    scores = q @ keys.transpose(-1, -2) * scale
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ values


def sdpa(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    return scaled_dot_product_attention(q, keys, values, scale=scale)


def rows_of_groups(attention: Attention) -> Callable[[PagedInputs], Bound]:
    """The query heads of a KV head become query rows of one head: the rows are read once for all of them."""

    def bind(inputs: PagedInputs) -> Bound:
        case, table = inputs.case, head_table(inputs)
        grouped = inputs.q.view(case.b, case.h_kv, case.h_q // case.h_kv, case.d_qk)

        def decode(kv_cache: Tensor, k_cache: Tensor | None) -> Tensor:
            keys, values = dense(inputs, table, kv_cache, k_cache)
            return attention(grouped, keys, values, inputs.softmax_scale).view(case.b, 1, case.h_q, case.d_v)

        return decode

    return bind


def bind_compiled(inputs: PagedInputs) -> Bound:
    torch.compiler.reset()  # each case has the compiler to itself: no recompile limit, no dynamic shapes from the last
    compiled: Bound = torch.compile(rows_of_groups(softmax_attention)(inputs), fullgraph=True, dynamic=False)
    return compiled


def bind_flex(inputs: PagedInputs) -> Bound:
    """Over a dense copy: its paged form asks for pages of whole mask blocks, and for a mask that maps every token."""
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def flex(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        out: Tensor = compiled(q, keys, values, scale=scale)
        return out

    return rows_of_groups(flex)(inputs)


def bind_enable_gqa(inputs: PagedInputs) -> Bound:
    q, table = inputs.q.transpose(1, 2), head_table(inputs)  # q: [b, h_q, 1, d_qk]

    def decode(kv_cache: Tensor, k_cache: Tensor | None) -> Tensor:
        keys, values = dense(inputs, table, kv_cache, k_cache)
        out = scaled_dot_product_attention(q, keys, values, scale=inputs.softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)

    return decode


def unmasked(inputs: PagedInputs) -> str | None:
    """Peers without a mask run what needs none."""
    return "written for equal lengths" if inputs.case.varying else one_token(inputs)


def not_compiled_for(inputs: PagedInputs) -> str | None:
    """FlexAttention takes ten seconds to compile for a case, more than all of its timing."""
    case = inputs.case
    chosen = case.b == 4 and case.dtype == "bf16" and case.group == "grid"
    return unmasked(inputs) or (None if chosen else "slow to compile: timed on the grid at b 4 in bf16")


def one_token(inputs: PagedInputs) -> str | None:
    return "written for one query token a sequence" if inputs.case.s_q > 1 else None


EAGER = Peer(
    "torch eager",
    "gather the pages, two matmuls and a softmax",
    rows_of_groups(softmax_attention),
    unfair=unmasked,
)
COMPILED = Peer(
    "torch.compile",
    "the same, compiled with static shapes by Inductor",
    bind_compiled,
    no_compiler,
    unmasked,
)
SDPA = Peer("torch SDPA", "gather the pages, then SDPA with query heads as rows", rows_of_groups(sdpa), unfair=unmasked)
ENABLE_GQA = Peer(
    "SDPA enable_gqa",
    "gather the pages, then SDPA with enable_gqa",
    bind_enable_gqa,
    unfair=unmasked,
)

FLEX = Peer(
    "FlexAttention",
    "gather the pages, then flex_attention compiled by Inductor, with query heads as rows",
    bind_flex,
    no_compiler,
    not_compiled_for,
)

PEERS = (EAGER, COMPILED, SDPA, FLEX)
GQA_PEERS = (EAGER, COMPILED, SDPA, ENABLE_GQA, FLEX)
