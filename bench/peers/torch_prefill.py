"""Prefill in torch: SDPA, and FlexAttention compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from bench.dense import PrefillInputs
from bench.peers import no_compiler
from bench.suite import Bound, Peer


def batched(tensor: Tensor, sequence: slice) -> Tensor:
    """[t, h, d] -> [1, h, s, d]: one sequence, as torch's operators take it."""
    return tensor[sequence].transpose(0, 1).unsqueeze(0)


def by_sequence(inputs: PrefillInputs, attend: Callable[[slice], Tensor]) -> Bound:
    """Sequences one after another: [s, h_q, d_v] each."""
    if len(inputs.sequences) == 1:
        return lambda: attend(inputs.sequences[0])
    return lambda: torch.cat([attend(sequence) for sequence in inputs.sequences])


def bind_sdpa(inputs: PrefillInputs) -> Bound:
    case = inputs.case

    def attend(sequence: slice) -> Tensor:
        q, k, v = (batched(tensor, sequence) for tensor in (inputs.q, inputs.k, inputs.v))
        scale, grouped = inputs.softmax_scale, case.h_kv < case.h_q
        out = scaled_dot_product_attention(q, k, v, is_causal=case.causal, scale=scale, enable_gqa=grouped)
        return out[0].transpose(0, 1)

    return by_sequence(inputs, attend)


def causal_mask(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def bind_flex(inputs: PrefillInputs) -> Bound:
    torch.compiler.reset()
    case, whole = inputs.case, slice(None)
    mask: Any = None
    if case.causal:
        mask = create_block_mask(causal_mask, None, None, case.s[0], case.s[0], device="cpu")
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def prefill() -> Tensor:
        q, k, v = (batched(tensor, whole) for tensor in (inputs.q, inputs.k, inputs.v))
        grouped = case.h_kv < case.h_q
        out: Tensor = compiled(q, k, v, block_mask=mask, scale=inputs.softmax_scale, enable_gqa=grouped)
        return out[0].transpose(0, 1)

    return prefill


def one_sequence(inputs: PrefillInputs) -> str | None:
    return None if len(inputs.case.s) == 1 else "bound here for one sequence"


PEERS = (
    Peer("torch SDPA", "scaled_dot_product_attention, sequence by sequence", bind_sdpa),
    Peer("FlexAttention", "compiled by Inductor, with a causal block mask", bind_flex, no_compiler, one_sequence),
)
