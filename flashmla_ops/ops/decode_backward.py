"""``flashmla::decode_backward``: the gradients of `decode` over native rows, from those of its results.

    q, kv_cache, k_cache, block_table, cache_seqlens, d_v, qk_start, softmax_scale, causal, attn_sink, window, softcap
                   as `decode` took them; rows are of q's type
    dout           [b, s_q, h_q, d_v], of q's type, any strides: the gradient with respect to out
    dlse           [b, h_q, s_q] float32 or None: the gradient with respect to lse
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

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.formats import NATIVE
from flashmla_ops.ops._backward import check_result, wanted_only
from flashmla_ops.ops._sharding import SUM, Way
from flashmla_ops.ops._vmap import loop
from flashmla_ops.ops.check import Check, Result, sizes_of
from flashmla_ops.ops.decode import (
    DECODE,
    Cached,
    check_cache,
    check_lengths,
    check_rows,
    check_scores,
    check_sink,
    check_table,
    of_heads,
)
from flashmla_ops.ops.operator import Operator, Static


@dataclass
class DecodeBackward(Cached):
    """A call of `decode`, what it returned, and the gradients with respect to that."""

    dout: Tensor  # [b, s_q, h_q, d_v]
    dlse: Tensor | None  # [b, h_q, s_q] float32
    out: Tensor  # [b, s_q, h_q, d_v]
    lse: Tensor  # [b, h_q, s_q] float32
    d_v: int
    qk_start: int = 0
    softmax_scale: float | None = None
    causal: bool = False
    attn_sink: Tensor | None = None  # [h_q] float32
    window: int = 0
    softcap: float = 0.0
    wanted: Static = 15


def contract(check: Check, a: DecodeBackward) -> tuple[Result, Result, Result, Result]:
    check.dims("q", a.q, "[b, s_q, h_q, d_qk]")
    check.floating("q", a.q)
    b, s_q, h_q, _ = a.q.shape
    check_cache(check, "kv_cache", a.kv_cache, a.q, NATIVE)
    d = a.kv_cache.size(3)
    check_rows(check, "kv_cache", a.q, a.kv_cache, a.k_cache, d, a.d_v, a.qk_start, "[n_pages, page_size, h_kv, d_k]")
    check_table(check, a.block_table, a.cache_seqlens, a.q, b, " sequences, as q")
    check_sink(check, a.q, a.attn_sink)
    check_scores(check, a.window, a.softcap)
    check_result(check, "dout", a.dout, a.q, [b, s_q, h_q, a.d_v], a.q.dtype)
    check_result(check, "out", a.out, a.q, [b, s_q, h_q, a.d_v], a.q.dtype)
    check_result(check, "lse", a.lse, a.q, [b, h_q, s_q], torch.float32)
    if a.dlse is not None:
        check_result(check, "dlse", a.dlse, a.q, [b, h_q, s_q], torch.float32)
    check.require("wanted", a.wanted >= 0 and a.wanted < 16, "a sum of 1, 2, 4 and 8", a.wanted)
    dq = Result(sizes_of(a.q) if a.wanted % 2 == 1 else [0], a.q.dtype)
    dkv_cache = Result(sizes_of(a.kv_cache) if a.wanted // 2 % 2 == 1 else [0], a.q.dtype)
    dattn_sink = Result([h_q] if a.attn_sink is not None and a.wanted // 8 == 1 else [0], torch.float32)
    if a.k_cache is not None and a.wanted // 4 % 2 == 1:
        return dq, dkv_cache, Result(sizes_of(a.k_cache), a.q.dtype), dattn_sink
    return dq, dkv_cache, Result([0], a.q.dtype), dattn_sink


def gradients(a: DecodeBackward) -> tuple[Tensor, ...]:
    given = {name: value for name, value in vars(a).items() if name != "wanted"}
    return wanted_only(reference.decode_backward(**given), a.wanted)


def sharding(a: DecodeBackward) -> list[Way]:
    """By sequences, of which each rank's add to the gradients of the rows that they share; or by heads."""
    by_sequence: Way = dict.fromkeys(("q", "block_table", "cache_seqlens", "dout", "out", "dlse", "lse", "dq"), 0)
    by_head: Way = {"q": 2, "attn_sink": 0, "dout": 2, "out": 2, "dlse": 1, "lse": 1, "dq": 2, "dattn_sink": 0}
    of_rows: Way = {"dkv_cache": SUM, "dk_cache": SUM}
    rows: Way = of_rows if a.kv_cache.size(2) == 1 else {**of_heads(a), "dkv_cache": 2, "dk_cache": 2}
    return [{**by_sequence, **of_rows, "dattn_sink": SUM}, {**by_head, **rows}]


DECODE_BACKWARD = Operator(
    "decode_backward",
    DecodeBackward,
    contract,
    gradients,
    returns=("dq", "dkv_cache", "dk_cache", "dattn_sink"),
    values=lambda check, a: check_lengths(check, a.block_table, a.cache_seqlens, a.kv_cache.size(1)),
    vmap=loop(lambda: torch.ops.flashmla.decode_backward.default),
    sharding=sharding,
)
DECODE.differentiated_by(DECODE_BACKWARD, ignores=("schedule", "levels", "batch_invariant"))
