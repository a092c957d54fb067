"""``flashmla::sparse_prefill_backward``: the gradients of `sparse_prefill` over native rows, from those of its results.

    q, kv, indices, d_v, softmax_scale, attn_sink, topk_length   as `sparse_prefill` took them; rows are of q's type
    dout           [s_q, h_q, d_v], of q's type, any strides: the gradient with respect to out
    dlse           [s_q, h_q] float32 or None: the gradient with respect to lse; max_logits has none
    out, lse       what `sparse_prefill` returned
    wanted         the sum of 1 for dq, 2 for dkv and 4 for dattn_sink; what is not wanted, or not there, is empty

Returns dq, dkv and dattn_sink, of the shapes and types of q, kv and the sink. A row that is named twice counts twice,
and one that no index names has the gradient 0. For a fixed number of threads the results are the same bits every time.
Raises `ArgumentError` as `sparse_prefill`, and for gradients and results of other shapes and types. A second derivative
is refused when it is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.formats import NATIVE
from flashmla_ops.ops._backward import check_results, wanted_only
from flashmla_ops.ops._sharding import SUM, Way
from flashmla_ops.ops._vmap import loop
from flashmla_ops.ops.check import Check, Result, sizes_of
from flashmla_ops.ops.decode import check_sink
from flashmla_ops.ops.operator import Operator, Static
from flashmla_ops.ops.sparse import SPARSE_PREFILL, Beside, check_beside, check_prefill_lengths


@dataclass
class SparsePrefillBackward(Beside):
    """A call of `sparse_prefill`, what it returned, and the gradients with respect to that."""

    dout: Tensor  # [s_q, h_q, d_v]
    dlse: Tensor | None  # [s_q, h_q] float32
    out: Tensor  # [s_q, h_q, d_v]
    lse: Tensor  # [s_q, h_q] float32
    softmax_scale: float | None = None
    attn_sink: Tensor | None = None  # [h_q] float32
    topk_length: Tensor | None = None  # [s_q] int32
    wanted: Static = 7


def contract(check: Check, a: SparsePrefillBackward) -> tuple[Result, Result, Result]:
    check_beside(check, a, NATIVE, a.topk_length)
    check_sink(check, a.q, a.attn_sink)
    s_q, h_q, _ = a.q.shape
    check_results(check, a.q, a.dout, a.dlse, a.out, a.lse, [s_q, h_q, a.d_v], [s_q, h_q])
    check.require("wanted", a.wanted >= 0 and a.wanted < 8, "a sum of 1, 2 and 4", a.wanted)
    dq = Result(sizes_of(a.q) if a.wanted % 2 == 1 else [0], a.q.dtype)
    dkv = Result(sizes_of(a.kv) if a.wanted // 2 % 2 == 1 else [0], a.q.dtype)
    dattn_sink = Result([h_q] if a.attn_sink is not None and a.wanted // 4 == 1 else [0], torch.float32)
    return dq, dkv, dattn_sink


def gradients(a: SparsePrefillBackward) -> tuple[Tensor, ...]:
    given = {name: value for name, value in vars(a).items() if name != "wanted"}
    return wanted_only(reference.sparse_prefill_backward(**given), a.wanted)


def sharding(a: SparsePrefillBackward) -> list[Way]:
    """By query tokens or heads, of which each rank's add to the gradients of the rows that they share."""
    tokens: Way = dict.fromkeys(("q", "indices", "topk_length", "dout", "dlse", "out", "lse", "dq"), 0)
    heads: Way = dict.fromkeys(("q", "dout", "dlse", "out", "lse", "dq"), 1)
    rows: Way = {"dkv": SUM} if a.kv.size(1) == 1 else {"kv": 1, "indices": 1, "dkv": 1}
    return [{**tokens, "dkv": SUM, "dattn_sink": SUM}, {**heads, "attn_sink": 0, "dattn_sink": 0, **rows}]


SPARSE_PREFILL_BACKWARD = Operator(
    "sparse_prefill_backward",
    SparsePrefillBackward,
    contract,
    gradients,
    returns=("dq", "dkv", "dattn_sink"),
    values=check_prefill_lengths,
    vmap=loop(lambda: torch.ops.flashmla.sparse_prefill_backward.default),
    sharding=sharding,
)
SPARSE_PREFILL.differentiated_by(SPARSE_PREFILL_BACKWARD)
