"""``flashmla::sparse_decode_backward``: the gradients of `sparse_decode`, from those of its results.

    q, kv_cache, k_cache, indices, d_v, qk_start, softmax_scale, row_format, attn_sink, topk_length, extra_kv_cache,
    extra_indices, extra_topk_length, extra_row_format
                   as `sparse_decode` took them
    dout           [b, s_q, h_q, d_v], of q's type, any strides: the gradient with respect to out
    dlse           [b, h_q, s_q] float32 or None: the gradient with respect to lse
    out, lse       what `sparse_decode` returned
    wanted         the sum of 1 for dq, 2 for dkv_cache, 4 for dk_cache, 8 for dattn_sink and 16 for dextra_kv_cache;
                   what is not wanted, or not there, is returned empty

Returns dq, dkv_cache, dk_cache, dattn_sink and dextra_kv_cache, of the shapes and types of what they are gradients of.
Rows of bytes have none, but the queries that read them do. A row that is named twice counts twice, and one that no
index names has the gradient 0. For a fixed number of threads the results are the same bits every time. Raises
`ArgumentError` as `sparse_decode`, and for gradients and results of other shapes and types. A second derivative is
refused when it is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.formats import NATIVE
from flashmla_ops.ops import sparse
from flashmla_ops.ops._backward import check_results, wanted_only
from flashmla_ops.ops._sharding import SUM, Way
from flashmla_ops.ops._vmap import loop
from flashmla_ops.ops.check import Check, Result, lse_shape, sizes_of, with_last
from flashmla_ops.ops.operator import Operator, Static


@dataclass
class Answered(sparse.Slots):
    """What `sparse_decode` returned, and the gradients with respect to that."""

    dout: Tensor  # [b, s_q, h_q, d_v]
    dlse: Tensor | None  # [b, h_q, s_q] float32
    out: Tensor  # [b, s_q, h_q, d_v]
    lse: Tensor  # [b, h_q, s_q] float32


@dataclass
class SparseDecodeBackward(sparse.Chosen, Answered):
    """The fields of `Answered`, then those of `sparse.SlotOptions`."""

    wanted: Static = 31


def contract(check: Check, a: SparseDecodeBackward) -> tuple[Result, Result, Result, Result, Result]:
    sparse.contract(check, a)
    check_results(check, a.q, a.dout, a.dlse, a.out, a.lse, with_last(a.q, a.d_v), lse_shape(a.q))
    check.require("wanted", a.wanted >= 0 and a.wanted < 32, "a sum of 1, 2, 4, 8 and 16", a.wanted)
    native, extra_native = a.row_format == NATIVE, a.extra_row_format == NATIVE
    dq = sizes_of(a.q) if a.wanted % 2 == 1 else [0]
    dkv_cache = sizes_of(a.kv_cache) if native and a.wanted // 2 % 2 == 1 else [0]
    dk_cache = sizes_of(a.k_cache) if a.k_cache is not None and a.wanted // 4 % 2 == 1 else [0]
    dattn_sink = [a.q.size(2)] if a.attn_sink is not None and a.wanted // 8 % 2 == 1 else [0]
    extra = sizes_of(a.extra_kv_cache) if a.extra_kv_cache is not None and extra_native and a.wanted // 16 == 1 else [0]
    return (
        Result(dq, a.q.dtype),
        Result(dkv_cache, a.q.dtype),
        Result(dk_cache, a.q.dtype),
        Result(dattn_sink, torch.float32),
        Result(extra, a.q.dtype),
    )


def gradients(a: SparseDecodeBackward) -> tuple[Tensor, ...]:
    results = (a.dout, a.dlse, a.out, a.lse)
    options = (a.d_v, a.qk_start, a.softmax_scale, a.attn_sink)
    dq, rows, dattn_sink = reference.sparse_backward(a.q, sparse.sources_of(a), *results, *options)
    extra = rows[1].dkv if len(rows) > 1 else None
    return wanted_only((dq, rows[0].dkv, rows[0].dk, dattn_sink, extra), a.wanted)


def sharding(a: SparseDecodeBackward) -> list[Way]:
    """By sequences, query tokens or heads, of which each rank's add to the gradients of the rows that they share."""
    summed: Way = dict.fromkeys(("dkv_cache", "dk_cache", "dextra_kv_cache"), SUM)
    queries, lses = ("q", "dout", "out", "dq"), ("dlse", "lse")
    chosen = ("indices", "extra_indices")
    lengths = ("topk_length", "extra_topk_length")
    sequences: Way = dict.fromkeys((*queries, *lses, *chosen, *lengths), 0)
    tokens: Way = dict.fromkeys((*queries, *chosen), 1) | dict.fromkeys(lses, 2)
    heads: Way = dict.fromkeys(queries, 2) | dict.fromkeys(lses, 1) | dict.fromkeys(("attn_sink", "dattn_sink"), 0)
    rows: Way = {name: 2 for gradient in summed for name in (gradient, gradient[1:])}
    return [
        {**sequences, **summed, "dattn_sink": SUM},
        {**tokens, **summed, "dattn_sink": SUM},
        {**heads, **(summed if a.kv_cache.size(2) == 1 else rows)},
    ]


SPARSE_DECODE_BACKWARD = Operator(
    "sparse_decode_backward",
    SparseDecodeBackward,
    contract,
    gradients,
    returns=("dq", "dkv_cache", "dk_cache", "dattn_sink", "dextra_kv_cache"),
    values=sparse.check_values,
    vmap=loop(lambda: torch.ops.flashmla.sparse_decode_backward.default),
    sharding=sharding,
)
sparse.SPARSE_DECODE.differentiated_by(SPARSE_DECODE_BACKWARD, ignores=("batch_invariant",))
