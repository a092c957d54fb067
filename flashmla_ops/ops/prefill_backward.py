"""``flashmla::prefill_backward``: the gradients of `prefill`, from those of its results.

    q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale, attn_sink, window, softcap   as `prefill` took them
    dout           [t_q, h_q, d_v], of q's type, any strides: the gradient with respect to out
    dlse           [h_q, t_q] float32 or None: the gradient with respect to lse
    out, lse       what `prefill` returned
    wanted         the sum of 1 for dq, 2 for dk, 4 for dv and 8 for dattn_sink; what is not wanted, or not there, is
                   returned empty

Returns dq, dk, dv and dattn_sink, of the shapes and types of q, k, v and the sink. A query that sees no key has the
gradient 0. For a fixed number of threads the results are the same bits every time. Raises `ArgumentError` as `prefill`,
and for gradients and results of other shapes and types. A second derivative is refused when it is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.ops._backward import check_results, wanted_only
from flashmla_ops.ops._sharding import SUM, Way
from flashmla_ops.ops._vmap import loop
from flashmla_ops.ops.check import Check, Result
from flashmla_ops.ops.decode import check_scores, check_sink
from flashmla_ops.ops.operator import Operator, Static
from flashmla_ops.ops.prefill import PREFILL, Sequences, check_sequences, check_values


@dataclass
class PrefillBackward(Sequences):
    """A call of `prefill`, what it returned, and the gradients with respect to that."""

    dout: Tensor  # [t_q, h_q, d_v]
    dlse: Tensor | None  # [h_q, t_q] float32
    out: Tensor  # [t_q, h_q, d_v]
    lse: Tensor  # [h_q, t_q] float32
    causal: bool = False
    softmax_scale: float | None = None
    attn_sink: Tensor | None = None  # [h_q] float32
    window: int = 0
    softcap: float = 0.0
    wanted: Static = 15


def contract(check: Check, a: PrefillBackward) -> tuple[Result, Result, Result, Result]:
    check_sequences(check, a)
    check_sink(check, a.q, a.attn_sink)
    check_scores(check, a.window, a.softcap)
    t_q, h_q, d_qk = a.q.shape
    t_k, h_kv, d_v = a.v.shape
    check_results(check, a.q, a.dout, a.dlse, a.out, a.lse, [t_q, h_q, d_v], [h_q, t_q])
    check.require("wanted", a.wanted >= 0 and a.wanted < 16, "a sum of 1, 2, 4 and 8", a.wanted)
    dq = Result([t_q, h_q, d_qk] if a.wanted % 2 == 1 else [0], a.q.dtype)
    dk = Result([t_k, h_kv, d_qk] if a.wanted // 2 % 2 == 1 else [0], a.q.dtype)
    dv = Result([t_k, h_kv, d_v] if a.wanted // 4 % 2 == 1 else [0], a.q.dtype)
    dattn_sink = Result([h_q] if a.attn_sink is not None and a.wanted // 8 == 1 else [0], torch.float32)
    return dq, dk, dv, dattn_sink


def gradients(a: PrefillBackward) -> tuple[Tensor, ...]:
    given = {name: value for name, value in vars(a).items() if name != "wanted"}
    return wanted_only(reference.prefill_backward(**given), a.wanted)


def sharding(a: PrefillBackward) -> list[Way]:
    """By heads, of which each rank's add to the gradient of a KV head that they share."""
    rows: Way = {"dk": SUM, "dv": SUM} if a.k.size(1) == 1 else {"k": 1, "v": 1, "dk": 1, "dv": 1}
    states: Way = {"dout": 1, "out": 1, "dlse": 0, "lse": 0}
    return [{"q": 1, "attn_sink": 0, "dq": 1, "dattn_sink": 0, **states, **rows}]


PREFILL_BACKWARD = Operator(
    "prefill_backward",
    PrefillBackward,
    contract,
    gradients,
    returns=("dq", "dk", "dv", "dattn_sink"),
    values=check_values,
    vmap=loop(lambda: torch.ops.flashmla.prefill_backward.default),
    sharding=sharding,
)
PREFILL.differentiated_by(PREFILL_BACKWARD, ignores=("levels",))
