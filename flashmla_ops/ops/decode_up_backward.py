"""``flashmla::decode_up_backward``: the gradients of `decode_up` over native rows, from those of its results.

    q, kv_cache, k_cache, block_table, cache_seqlens, weight, d_v, qk_start, softmax_scale, causal, attn_sink, window,
    softcap, cu_seqlens_q
                   as `decode_up` took them; rows are of q's type
    dout           [b, s_q, h_q, d_up], of q's type, any strides: the gradient with respect to out; ragged
                   [t_q, h_q, d_up]. None: zeros
    dlse           [b, h_q, s_q] float32 or None: the gradient with respect to lse; ragged [h_q, t_q]
    wanted         the sum of 1 for dq, 2 for dkv_cache, 4 for dk_cache, 8 for dattn_sink and 16 for dweight; what is
                   not wanted, or not there, is returned empty

Returns those of `decode_backward`, and dweight, of weight's shape and type. What was attended to, before it was
multiplied by the weights, is no tensor of the forward: `decode` computes it again. Then

    dattended = dout weightᵀ      dweight = attendedᵀ dout      dq, dkv_cache, dk_cache, dattn_sink: `decode_backward`

On the CPU these are the kernels of `decode`, `bmm` and `decode_backward`. Raises `ArgumentError` as `decode_up`, and
for gradients of other shapes and types. A second derivative is refused when it is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.ops import decode_backward, decode_up
from flashmla_ops.ops._backward import check_result, wanted_only
from flashmla_ops.ops._library import LIBRARY
from flashmla_ops.ops._sharding import SUM, Way
from flashmla_ops.ops._vmap import loop
from flashmla_ops.ops.check import Check, Result, sizes_of, with_last
from flashmla_ops.ops.decode import check_sequences
from flashmla_ops.ops.decode_up import DECODE_UP, DecodeUp, Weighted
from flashmla_ops.ops.operator import Operator, Static

NAME = "decode_up_backward"


@dataclass
class Asked(Weighted):
    """The gradients with respect to what `decode_up` returned."""

    dout: Tensor | None  # [b, s_q, h_q, d_up], or [t_q, h_q, d_up] where sequences are ragged
    dlse: Tensor | None  # [b, h_q, s_q] float32, or [h_q, t_q]


@dataclass
class DecodeUpBackward(decode_backward.Weighing, Asked):
    """The fields of `Asked`, then those of `decode_backward.Weighing`."""

    wanted: Static = 31


def attention_of(a: DecodeUpBackward) -> dict[str, Any]:
    """The call of `decode` that it differentiates."""
    return {name: value for name, value in vars(a).items() if name not in ("weight", "dout", "dlse", "wanted")}


def contract(check: Check, a: DecodeUpBackward) -> tuple[Result, ...]:
    out, lse = decode_up.contract(check, DecodeUp(weight=a.weight, **attention_of(a)))
    if a.dout is not None:
        check_result(check, "dout", a.dout, a.q, [*out.shape], a.q.dtype)
    if a.dlse is not None:
        check_result(check, "dlse", a.dlse, a.q, [*lse.shape], torch.float32)
    check.require("wanted", 0 <= a.wanted < 32, "a sum of 1, 2, 4, 8 and 16", a.wanted)
    return tuple(
        Result(sizes_of(x) if x is not None and a.wanted >> i & 1 else [0], torch.float32 if i == 3 else a.q.dtype)
        for i, x in enumerate((a.q, a.kv_cache, a.k_cache, a.attn_sink, a.weight))
    )


def by_reference(a: DecodeUpBackward) -> tuple[Tensor, ...]:
    out = with_last(a.q, a.weight.size(2))
    dout = a.q.new_zeros(out) if a.dout is None else a.dout
    return wanted_only(reference.decode_up_backward(a.weight, dout, a.dlse, **attention_of(a)), a.wanted)


def on_cpu(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """What was attended to again, a product with the weights, the kernel of `decode_backward`, and one more product."""
    a = DECODE_UP_BACKWARD.bind(*args, **kwargs)
    results = DECODE_UP_BACKWARD.results(a)
    call, wanted = attention_of(a), a.wanted % 16
    attended, lse = torch.ops.flashmla.decode(**call)
    dout = None
    if a.dout is not None and a.dout.numel():
        dout = a.dout.flatten(0, -3).transpose(0, 1)  # [h_q, tokens, d_up]
        dout = dout if dout.stride(2) == 1 else dout.contiguous()
    if dout is None or not a.wanted & 16:
        dweight = torch.zeros(results[4].shape, dtype=a.q.dtype)
    else:
        dweight = torch.ops.flashmla.bmm(attended.flatten(0, -3).permute(1, 2, 0).contiguous(), dout)
    if not wanted:
        return *(a.q.new_empty(0, dtype=each.dtype) for each in results[:4]), dweight
    if dout is None:
        dattended = torch.zeros_like(attended)
    else:
        dattended = torch.ops.flashmla.bmm(dout, a.weight.transpose(1, 2)).transpose(0, 1).view_as(attended)
    given = {"dout": dattended, "dlse": a.dlse, "out": attended, "lse": lse}
    return *torch.ops.flashmla.decode_backward(**call, **given, wanted=wanted), dweight


def sharding(a: DecodeUpBackward) -> list[Way]:
    """As of `decode_backward`, with the weight by heads where they are cut, and else summed."""
    ways = decode_backward.sharding(a)
    return [{**way, **({"weight": 0, "dweight": 0} if "attn_sink" in way else {"dweight": SUM})} for way in ways]


DECODE_UP_BACKWARD = Operator(
    NAME,
    DecodeUpBackward,
    contract,
    by_reference,
    returns=("dq", "dkv_cache", "dk_cache", "dattn_sink", "dweight"),
    values=lambda check, a: check_sequences(check, a, a.cu_seqlens_q),
    vmap=loop(lambda: torch.ops.flashmla.decode_up_backward.default),
    sharding=sharding,
)
LIBRARY.impl(NAME, on_cpu, "CPU")
DECODE_UP.differentiated_by(DECODE_UP_BACKWARD, ignores=("schedule", "levels", "batch_invariant"))
