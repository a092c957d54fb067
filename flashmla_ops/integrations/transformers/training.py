"""Attention that gradients flow through: whole sequences, causal and without padding, as a model is trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashmla_ops.integrations.transformers.served import Served, is_causal
from flashmla_ops.ops.check import FLOATS


def attend_causally(
    module: Served,
    query: Tensor,  # [b, h_q, s, d_qk]
    keys: Tensor,  # [b, h_kv, s_kv, d_qk]
    values: Tensor,  # [b, h_kv, s_kv, d_v]
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor | None:  # [b, s, h_q, d_v]
    """`flashmla::prefill`, which has a backward; None where attention is another, or of types that it does not take.

    ``mask`` is one for SDPA: None where each query sees the tokens up to its own.
    """
    b, _, s, _ = query.shape
    plain = mask is None and keys.shape[2] == s and (s == 1 or is_causal(module, kwargs)) and dropout == 0.0
    if not plain or query.dtype not in FLOATS or not query.dtype == keys.dtype == values.dtype:
        return None
    bounds = torch.arange(0, (b + 1) * s, s, dtype=torch.int32, device=query.device)
    flat = [x.transpose(1, 2).reshape(b * s, x.shape[1], x.shape[3]) for x in (query, keys, values)]
    out: Tensor = torch.ops.flashmla.prefill(*flat, bounds, bounds, True, scaling, module.levels)[0]
    return out.view(b, s, *out.shape[1:])
