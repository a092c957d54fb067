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

Returns out [t_q, h_q, d_v], of q's type, and lse [h_q, t_q] float32, natural. A query that sees no key has out 0 and
lse +inf. Raises `ArgumentError` for shapes, types and devices that do not fit, and for boundaries that do not rise
from 0 to the number of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.errors import ArgumentError
from flashmla_ops.ops._autocast import all_cast
from flashmla_ops.ops._library import (
    define,
    dtype_name,
    require,
    require_contiguous_rows,
    require_device,
    require_dims,
    require_dtype,
    require_float,
)
from flashmla_ops.ops._vmap import Dims, folded, front

OP = "prefill"


def check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, levels: int) -> None:
    """The preconditions that shapes, strides and dtypes decide; the C++ binding checks the same, in the same words."""
    require(OP, "levels", levels in (1, 2, 3), "1, 2 or 3", levels)
    require_dims(OP, "q", q, "[t_q, h_q, d_qk]")
    require_float(OP, "q", q)
    require(OP, "q", q.size(2) >= 1, "d_qk of at least 1", q.size(2))
    for name, tensor, d in (("k", k, "d_qk"), ("v", v, "d_v")):
        require_dims(OP, name, tensor, f"[t_k, h_kv, {d}]")
        require_dtype(OP, name, tensor, q.dtype)
        require_device(OP, name, tensor, q.device)
        require_contiguous_rows(OP, name, tensor)
    require(OP, "k", k.size(2) == q.size(2), f"d_qk {q.size(2)}, as q", k.size(2))
    require(OP, "k", k.size(1) >= 1, "at least 1 KV head (h_kv)", k.size(1))
    require(OP, "q", q.size(1) % k.size(1) == 0, f"query heads in multiples of the {k.size(1)} KV heads", q.size(1))
    require(OP, "v", v.size(0) == k.size(0), f"{k.size(0)} tokens, as k", v.size(0))
    require(OP, "v", v.size(1) == k.size(1), f"{k.size(1)} KV heads, as k", v.size(1))
    require(OP, "v", v.size(2) >= 1, "d_v of at least 1", v.size(2))
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        require_dims(OP, name, tensor, "[b + 1]")
        known = tensor.dtype in (torch.int32, torch.int64)
        require(OP, name, known, "int32 or int64", dtype_name(tensor.dtype))
        require_device(OP, name, tensor, q.device)
        require(OP, name, tensor.size(0) >= 1, "at least 1 element", tensor.size(0))
    same = cu_seqlens_k.size(0) == cu_seqlens_q.size(0)
    require(OP, "cu_seqlens_k", same, f"{cu_seqlens_q.size(0)} elements, as cu_seqlens_q", cu_seqlens_k.size(0))


def check_bounds(name: str, cu_seqlens: Tensor, tokens: int) -> None:
    """Raise unless ``cu_seqlens`` begins at 0, never falls and ends at ``tokens``."""
    bounds: list[int] = cu_seqlens.tolist()
    for i, bound in enumerate(bounds):
        if not -(2**31) <= bound < 2**31:
            raise ArgumentError(OP, name, "values that int32 holds", f"{bound} at [{i}]")
    if bounds[0] != 0:
        raise ArgumentError(OP, name, "0 at [0]", bounds[0])
    for i in range(1, len(bounds)):
        if bounds[i] < bounds[i - 1]:
            raise ArgumentError(OP, name, f"at least {bounds[i - 1]} at [{i}]", bounds[i])
    if bounds[-1] != tokens:
        raise ArgumentError(OP, name, f"{tokens} at [{len(bounds) - 1}], the number of tokens", bounds[-1])


def fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    levels: int = 3,
) -> tuple[Tensor, Tensor]:
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, levels)
    return q.new_empty((q.size(0), q.size(1), v.size(2))), q.new_empty((q.size(1), q.size(0)), dtype=torch.float32)


def by_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    levels: int = 3,
) -> tuple[Tensor, Tensor]:
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, levels)
    check_bounds("cu_seqlens_q", cu_seqlens_q, q.size(0))
    check_bounds("cu_seqlens_k", cu_seqlens_k, k.size(0))
    out, lse = reference.prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale)
    return out.to(q.dtype), lse.to(torch.float32)


def vmap(
    info: Any,
    in_dims: Dims,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    levels: int = 3,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """The mapped dimension joins the query heads, if only q is mapped, or else the sequences."""
    size, prefill = info.batch_size, torch.ops.flashmla.prefill.default
    q_dim, k_dim, v_dim, cu_q_dim, cu_k_dim = in_dims[:5]
    if k_dim is None and v_dim is None and cu_q_dim is None and cu_k_dim is None:
        groups = front(q, q_dim, size).unflatten(2, (k.size(1), -1)).permute(1, 2, 0, 3, 4)  # [t_q, h_kv, size, g, d]
        out, lse = prefill(groups.flatten(1, 3), k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale, levels)
        out = out.unflatten(1, groups.shape[1:4]).movedim(2, 0).flatten(2, 3)
        return (out, lse.unflatten(0, groups.shape[1:4]).movedim(1, 0).flatten(1, 2)), (0, 0)
    q, k, v = folded(q, q_dim, size), folded(k, k_dim, size), folded(v, v_dim, size)
    bounds_q = _joined(front(cu_seqlens_q, cu_q_dim, size), q.size(0) // size)
    bounds_k = _joined(front(cu_seqlens_k, cu_k_dim, size), k.size(0) // size)
    out, lse = prefill(q, k, v, bounds_q, bounds_k, causal, softmax_scale, levels)
    return (out.unflatten(0, (size, -1)), lse.unflatten(1, (size, -1))), (0, 1)


def _joined(bounds: Tensor, tokens: int) -> Tensor:
    """The boundaries of all entries, [size, b + 1], as one row: entry i has the tokens from i * ``tokens`` on.

    Between two entries lies an empty sequence. Where an entry's boundaries do not span its tokens a negative one makes
    the operator raise, as that entry alone would.
    """
    first = torch.arange(bounds.size(0), dtype=bounds.dtype, device=bounds.device)[:, None] * tokens
    spans = (bounds[:, :1] == 0) & (bounds[:, -1:] == tokens)
    return torch.where(spans, bounds + first, -1).flatten()


define(
    f"{OP}(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, bool causal=False,"
    " float? softmax_scale=None, int levels=3) -> (Tensor out, Tensor lse)",
    fake=fake,
    reference=by_reference,
    vmap=vmap,
    autocast=all_cast,
)
