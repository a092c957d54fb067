"""``flashmla::prefill``: dense attention of many query tokens over keys and values that lie beside them.

The heads are expanded ones: MLA's after ``kv_b_proj``, or those of GQA and MHA.

Sequences of different lengths lie one after another; ``cu_seqlens_q`` and ``cu_seqlens_k`` say where each begins and
ends. No score matrix is ever in memory: only a block of it, in cache. (But at ``levels=1``, where whole rows of scores
are kept, for comparison; 2 and 3 are the same here, where blocks of queries occupy the threads. See ``decode``.)

    q              [t_q, h_q, d_qk] float32, bfloat16 or float16
    k, v           [t_k, h_kv, d_qk] and [t_k, h_kv, d_v], of q's type
    cu_seqlens_q   [b + 1] int32 or int64: sequence i has the query tokens from cu_seqlens_q[i] to cu_seqlens_q[i + 1]
    cu_seqlens_k   [b + 1], likewise of keys and values
    causal         aligned bottom-right: the last query sees all keys
    softmax_scale  None: d_qk ** -0.5
    attn_sink      [h_q] float32 or None: a logit beside the scaled scores that has no value
    window         a query sees the last so many of the keys that it would see without; 0: all of them
    softcap        scaled scores s become softcap * tanh(s / softcap); 0: they stay

Returns out [t_q, h_q, d_v], of q's type, and lse [h_q, t_q] float32, natural, in which the sink does not count. A query
that sees no key has out 0 and lse +inf. Raises `ArgumentError` for shapes, types and devices that do not fit, and for
boundaries that do not rise from 0 to the number of tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.ops._autocast import cast
from flashmla_ops.ops._sharding import Way
from flashmla_ops.ops._vmap import each, folded, front
from flashmla_ops.ops.check import Check, Result
from flashmla_ops.ops.decode import check_scores, check_sink
from flashmla_ops.ops.operator import Arguments, Operator, Static
from flashmla_ops.ops.ragged import check_boundaries, check_bounds


@dataclass
class Sequences(Arguments):
    """Queries, keys and values of all sequences, and where each sequence lies."""

    q: Tensor  # [t_q, h_q, d_qk]
    k: Tensor  # [t_k, h_kv, d_qk], d_qk contiguous
    v: Tensor  # [t_k, h_kv, d_v], d_v contiguous
    cu_seqlens_q: Tensor  # [b + 1] int32 or int64
    cu_seqlens_k: Tensor  # [b + 1] int32 or int64


@dataclass
class Prefill(Sequences):
    """How their queries attend."""

    causal: bool = False
    softmax_scale: float | None = None
    levels: Static = 3
    attn_sink: Tensor | None = None  # [h_q] float32
    window: int = 0
    softcap: float = 0.0


def contract(check: Check, a: Prefill) -> tuple[Result, Result]:
    check.require("levels", a.levels in (1, 2, 3), "1, 2 or 3", a.levels)
    check_sequences(check, a)
    check_sink(check, a.q, a.attn_sink)
    check_scores(check, a.window, a.softcap)
    t_q, h_q, _ = a.q.shape
    return Result([t_q, h_q, a.v.size(2)], a.q.dtype), Result([h_q, t_q], torch.float32)


def check_sequences(check: Check, a: Sequences) -> None:
    check.dims("q", a.q, "[t_q, h_q, d_qk]")
    check.floating("q", a.q)
    _, h_q, d_qk = a.q.shape
    check.require("q", d_qk >= 1, "d_qk of at least 1", d_qk)
    check_keys(check, "k", a.k, a.q, "[t_k, h_kv, d_qk]")
    check_keys(check, "v", a.v, a.q, "[t_k, h_kv, d_v]")
    t_k, h_kv, _ = a.k.shape
    check.require("k", a.k.size(2) == d_qk, f"d_qk {d_qk}, as q", a.k.size(2))
    check.require("k", h_kv >= 1, "at least 1 KV head (h_kv)", h_kv)
    check.require("q", h_q % h_kv == 0, f"query heads in multiples of the {h_kv} KV heads", h_q)
    check.size("v", a.v, 0, t_k, " tokens, as k")
    check.size("v", a.v, 1, h_kv, " KV heads, as k")
    check.require("v", a.v.size(2) >= 1, "d_v of at least 1", a.v.size(2))
    check_boundaries(check, "cu_seqlens_q", a.cu_seqlens_q, a.q)
    check_boundaries(check, "cu_seqlens_k", a.cu_seqlens_k, a.q)
    check.size("cu_seqlens_k", a.cu_seqlens_k, 0, a.cu_seqlens_q.size(0), " elements, as cu_seqlens_q")


def check_keys(check: Check, name: str, tensor: Tensor, q: Tensor, shape: str) -> None:
    check.dims(name, tensor, shape)
    check.dtype(name, tensor, q.dtype)
    check.device(name, tensor, q)
    check.contiguous_rows(name, tensor)


def check_values(check: Check, a: Sequences) -> None:
    check_bounds(check.op, "cu_seqlens_q", a.cu_seqlens_q, a.q.size(0))
    check_bounds(check.op, "cu_seqlens_k", a.cu_seqlens_k, a.k.size(0))


def vmap(size: int, dims: dict[str, Any], a: Prefill) -> tuple[Any, Any]:
    """The mapped dimension joins the query heads, if only q is mapped, or else the sequences."""
    prefill, options = torch.ops.flashmla.prefill.default, (a.causal, a.softmax_scale, a.levels)
    sink, scores = a.attn_sink, (a.window, a.softcap)
    if all(dims[name] is None for name in ("k", "v", "cu_seqlens_q", "cu_seqlens_k")):
        groups = front(a.q, dims["q"], size).unflatten(2, (a.k.size(1), -1)).permute(1, 2, 0, 3, 4)
        # groups: [t_q, h_kv, size, query heads of a KV head, d_qk]
        if sink is not None:
            sink = front(sink, dims["attn_sink"], size).unflatten(1, (a.k.size(1), -1)).transpose(0, 1).flatten()
        heads = groups.flatten(1, 3)
        out, lse = prefill(heads, a.k, a.v, a.cu_seqlens_q, a.cu_seqlens_k, *options, sink, *scores)
        out = out.unflatten(1, groups.shape[1:4]).movedim(2, 0).flatten(2, 3)
        return (out, lse.unflatten(0, groups.shape[1:4]).movedim(1, 0).flatten(1, 2)), (0, 0)
    if dims["attn_sink"] is not None:
        return each(prefill, size, dims, a)
    q, k, v = (folded(tensor, dims[name], size) for name, tensor in (("q", a.q), ("k", a.k), ("v", a.v)))
    bounds_q = _joined(front(a.cu_seqlens_q, dims["cu_seqlens_q"], size), q.size(0) // size)
    bounds_k = _joined(front(a.cu_seqlens_k, dims["cu_seqlens_k"], size), k.size(0) // size)
    out, lse = prefill(q, k, v, bounds_q, bounds_k, *options, sink, *scores)
    return (out.unflatten(0, (size, -1)), lse.unflatten(1, (size, -1))), (0, 1)


def _joined(bounds: Tensor, tokens: int) -> Tensor:
    """The boundaries of all entries, [size, b + 1], as one row: entry i has the tokens from i * ``tokens`` on.

    Between two entries lies an empty sequence. Where an entry's boundaries do not span its tokens a negative one makes
    the operator raise, as that entry alone would.
    """
    first = torch.arange(bounds.size(0), dtype=bounds.dtype, device=bounds.device)[:, None] * tokens
    spans = (bounds[:, :1] == 0) & (bounds[:, -1:] == tokens)
    return torch.where(spans, bounds + first, -1).flatten()


def autocast(dtype: torch.dtype, a: Prefill) -> Prefill:
    return dataclasses.replace(a, q=cast(a.q, dtype), k=cast(a.k, dtype), v=cast(a.v, dtype))


def sharding(a: Prefill) -> list[Way]:
    """By heads: with those of keys and values, if they have more than one."""
    heads: Way = {"k": 1, "v": 1} if a.k.size(1) > 1 else {}
    return [{"q": 1, "attn_sink": 0, "out": 1, "lse": 0, **heads}]


PREFILL = Operator(
    "prefill",
    Prefill,
    contract,
    lambda a: reference.prefill(**{name: value for name, value in vars(a).items() if name != "levels"}),
    returns=("out", "lse"),
    values=check_values,
    vmap=vmap,
    autocast=autocast,
    sharding=sharding,
)
