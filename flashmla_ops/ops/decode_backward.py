"""``flashmla::decode_backward``: the gradients of `decode` over native rows, from those of its results.

    q, kv_cache, k_cache, block_table, cache_seqlens, d_v, qk_start, softmax_scale, causal, attn_sink, window, softcap,
    cu_seqlens_q   as `decode` took them; rows are of q's type
    dout           [b, s_q, h_q, d_v], of q's type, any strides: with respect to out; [t_q, h_q, d_v] if ragged
    dlse           [b, h_q, s_q] float32 or None: the gradient with respect to lse; ragged [h_q, t_q]
    out, lse       what `decode` returned
    wanted         the sum of 1 for dq, 2 for dkv_cache, 4 for dk_cache and 8 for dattn_sink; what is not wanted, or not
                   there, is returned empty

Returns dq, dkv_cache, dk_cache and dattn_sink, of the shapes and types of q, the caches and the sink. The gradient of a
row is the sum over the sequences that hold its page, in their order, and 0 where none reads it; an element that is part
of a value and of a key has the gradients of both. The results are the same bits every time. Raises `ArgumentError` as
`decode`, and for gradients and results of other shapes and types. A second derivative is refused when it is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.formats import NATIVE
from flashmla_ops.ops._backward import check_results, wanted_only
from flashmla_ops.ops._sharding import SUM, Way
from flashmla_ops.ops._vmap import loop
from flashmla_ops.ops.check import Check, Result, lse_shape, sizes_of, with_last
from flashmla_ops.ops.decode import (
    DECODE,
    Cached,
    check_cache,
    check_queries,
    check_rows,
    check_scores,
    check_sequences,
    check_sink,
    check_table,
    of_heads,
)
from flashmla_ops.ops.operator import Arguments, Operator, Static


@dataclass
class Answered(Cached):
    """What `decode` returned, and the gradients with respect to that."""

    dout: Tensor  # [b, s_q, h_q, d_v], or [t_q, h_q, d_v] where sequences are ragged; so is out
    dlse: Tensor | None  # [b, h_q, s_q] float32, or [h_q, t_q]; so is lse
    out: Tensor
    lse: Tensor


@dataclass
class Weighing(Arguments):
    """The options that gradients depend on."""

    d_v: int
    qk_start: int = 0
    softmax_scale: float | None = None
    causal: bool = False
    attn_sink: Tensor | None = None  # [h_q] float32
    window: int = 0
    softcap: float = 0.0
    cu_seqlens_q: Tensor | None = None  # [b + 1] int32 or int64


@dataclass
class DecodeBackward(Weighing, Answered):
    """The fields of `Answered`, then those of `Weighing`."""

    wanted: Static = 15


def contract(check: Check, a: DecodeBackward) -> tuple[Result, Result, Result, Result]:
    check_queries(check, a.q, a.cu_seqlens_q)
    b = a.q.size(0) if a.cu_seqlens_q is None else a.cu_seqlens_q.size(0) - 1
    check_cache(check, "kv_cache", a.kv_cache, a.q, NATIVE)
    d = a.kv_cache.size(3)
    check_rows(check, "kv_cache", a.q, a.kv_cache, a.k_cache, d, a.d_v, a.qk_start, "[n_pages, page_size, h_kv, d_k]")
    check_table(check, a.block_table, a.cache_seqlens, a.q, b, " sequences, as q")
    check_sink(check, a.q, a.attn_sink)
    check_scores(check, a.window, a.softcap)
    check_results(check, a.q, a.dout, a.dlse, a.out, a.lse, with_last(a.q, a.d_v), lse_shape(a.q))
    check.require("wanted", a.wanted >= 0 and a.wanted < 16, "a sum of 1, 2, 4 and 8", a.wanted)
    dq = Result(sizes_of(a.q) if a.wanted % 2 == 1 else [0], a.q.dtype)
    dkv_cache = Result(sizes_of(a.kv_cache) if a.wanted // 2 % 2 == 1 else [0], a.q.dtype)
    dattn_sink = Result([a.q.size(-2)] if a.attn_sink is not None and a.wanted // 8 == 1 else [0], torch.float32)
    if a.k_cache is not None and a.wanted // 4 % 2 == 1:
        return dq, dkv_cache, Result(sizes_of(a.k_cache), a.q.dtype), dattn_sink
    return dq, dkv_cache, Result([0], a.q.dtype), dattn_sink


def gradients(a: DecodeBackward) -> tuple[Tensor, ...]:
    given = {name: value for name, value in vars(a).items() if name != "wanted"}
    return wanted_only(reference.decode_backward(**given), a.wanted)


def sharding(a: Any) -> list[Way]:
    """By sequences, if they are not ragged: each rank's add to the gradients of rows that they share. Or by heads."""
    by_sequence: Way = dict.fromkeys(("q", "block_table", "cache_seqlens", "dout", "out", "dlse", "lse", "dq"), 0)
    heads = a.q.dim() - 2
    by_head: Way = dict.fromkeys(("q", "dout", "out", "dq"), heads) | dict.fromkeys(("dlse", "lse"), heads - 1)
    of_rows: Way = {"dkv_cache": SUM, "dk_cache": SUM}
    rows: Way = of_rows if a.kv_cache.size(2) == 1 else {**of_heads(a), "dkv_cache": 2, "dk_cache": 2}
    ways: list[Way] = [{**by_head, "attn_sink": 0, "dattn_sink": 0, **rows}]
    return ways if a.cu_seqlens_q is not None else [{**by_sequence, **of_rows, "dattn_sink": SUM}, *ways]


DECODE_BACKWARD = Operator(
    "decode_backward",
    DecodeBackward,
    contract,
    gradients,
    returns=("dq", "dkv_cache", "dk_cache", "dattn_sink"),
    values=lambda check, a: check_sequences(check, a, a.cu_seqlens_q),
    vmap=loop(lambda: torch.ops.flashmla.decode_backward.default),
    sharding=sharding,
)
DECODE.differentiated_by(DECODE_BACKWARD, ignores=("schedule", "levels", "batch_invariant"))
