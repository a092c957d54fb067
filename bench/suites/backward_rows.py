"""Cases of the suite ``backward`` over rows of a cache: ragged decode, decode with a weight a head, and slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from bench.runner import Problem, Work
from bench.suite import DTYPES, TOLERANCE, Bound, Peer, describe, make_problem

PAGE_SIZE, D, D_V, D_UP = 64, 576, 512, 128  # MLA: rows of 576 elements, of which the first 512 are the value
SCALE = D**-0.5


@dataclass(frozen=True)
class RowsCase:
    op: str  # decode, with queries side by side; decode_up; or sparse_decode, of which each query names all its rows
    s_q: tuple[int, ...]  # query tokens of each sequence; the same of all but with decode
    rows: int  # of each sequence, or of each query's indices
    h_q: int
    dtype: str
    group: str = "over rows of a cache"

    @property
    def pairs(self) -> int:
        """Of a query token and a row that it sees, of one head."""
        if self.op == "sparse_decode":
            return sum(self.s_q) * self.rows
        return sum(n * self.rows - n * (n - 1) // 2 for n in self.s_q)

    @property
    def flops(self) -> float:
        """Of five products; `decode_up` attends again, and multiplies by its weights twice."""
        again = D + D_V if self.op == "decode_up" else 0
        up = 4 * sum(self.s_q) * D_V * D_UP if self.op == "decode_up" else 0
        return 2.0 * self.h_q * (self.pairs * (3 * D + 2 * D_V + again) + up)

    @property
    def bytes(self) -> int:
        """Bytes of queries and rows, and of their gradients."""
        return 2 * (sum(self.s_q) * self.h_q + len(self.s_q) * self.rows) * D * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class RowsInputs:
    case: RowsCase
    tensors: dict[str, Tensor]  # q [t, h_q, D], kv_cache [n_pages, PAGE_SIZE, 1, D], and weight [h_q, D_V, D_UP]
    slots: Tensor  # [b, rows] int32: each sequence's, or [t, rows] each query's
    dout: Tensor  # [t, h_q, D_V or D_UP]


def make_inputs(case: RowsCase) -> RowsInputs:
    generator, tokens, b = torch.Generator().manual_seed(0), sum(case.s_q), len(case.s_q)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DTYPES[case.dtype])

    pages = -(-case.rows // PAGE_SIZE)
    up = {"weight": normal(case.h_q, D_V, D_UP)} if case.op == "decode_up" else {}
    if case.op == "sparse_decode":
        slots = torch.rand((tokens, b * pages * PAGE_SIZE), generator=generator).topk(case.rows).indices
    else:
        slots = torch.arange(b)[:, None] * pages * PAGE_SIZE + torch.arange(case.rows)
    tensors = {"q": normal(tokens, case.h_q, D), "kv_cache": normal(b * pages, PAGE_SIZE, 1, D), **up}
    return RowsInputs(case, tensors, slots.int(), normal(tokens, case.h_q, D_UP if up else D_V))


def bind_ours(inputs: RowsInputs) -> Bound:
    case, tensors, dout, b = inputs.case, inputs.tensors, inputs.dout, len(inputs.case.s_q)
    q, cache = tensors["q"], tensors["kv_cache"]
    ops, options = torch.ops.flashmla, {"d_v": D_V, "softmax_scale": SCALE}
    if case.op == "sparse_decode":
        batched = {"q": q.view(b, -1, *q.shape[1:]), "indices": inputs.slots.view(b, -1, case.rows)}
        named = {**batched, "kv_cache": cache, "k_cache": None, **options}
        out, lse = ops.sparse_decode(**named)
        return lambda: ops.sparse_decode_backward(**named, dout=dout.view_as(out), dlse=None, out=out, lse=lse)
    table = (inputs.slots[:, ::PAGE_SIZE] // PAGE_SIZE).contiguous()
    lengths = torch.full((b,), case.rows, dtype=torch.int32)
    bounds = torch.tensor([*accumulate(case.s_q, initial=0)], dtype=torch.int32)
    named = {"k_cache": None, "block_table": table, "cache_seqlens": lengths, "causal": True, "cu_seqlens_q": bounds}
    named |= tensors | options
    if case.op == "decode_up":
        return lambda: ops.decode_up_backward(**named, dout=dout, dlse=None)
    out, lse = ops.decode(**named)
    return lambda: ops.decode_backward(**named, dout=dout, dlse=None, out=out, lse=lse)


def attended(inputs: RowsInputs, tensors: dict[str, Tensor]) -> Tensor:
    """The forward in torch: rows are gathered, and heads are queries of SDPA, which share them."""
    case, flat = inputs.case, tensors["kv_cache"].view(-1, D)
    sizes = [1] * sum(case.s_q) if case.op == "sparse_decode" else case.s_q
    outs = []
    for queries, slots in zip(tensors["q"].split(list(sizes)), inputs.slots.long(), strict=True):
        rows, n = flat[slots], len(queries)
        shown = torch.ones(n, case.rows, dtype=torch.bool).tril(case.rows - n).repeat_interleave(case.h_q, 0)
        one = (queries.reshape(1, -1, D), rows[None], rows[None, :, :D_V])
        outs.append(torch.nn.functional.scaled_dot_product_attention(*one, attn_mask=shown, scale=SCALE))
    out = torch.cat(outs, dim=1).view(sum(case.s_q), case.h_q, D_V)
    return out if "weight" not in tensors else torch.einsum("thv,hvu->thu", out, tensors["weight"])


def gradients_of(inputs: RowsInputs, dtype: torch.dtype) -> Bound:
    """Torch's gradients of the forward in torch."""
    tensors = {name: x.detach().clone().to(dtype).requires_grad_() for name, x in inputs.tensors.items()}
    with torch.enable_grad():
        out = attended(inputs, tensors)
    return lambda: torch.autograd.grad(out, list(tensors.values()), inputs.dout.to(dtype), retain_graph=True)


def bind_torch(inputs: RowsInputs) -> Bound:
    return gradients_of(inputs, DTYPES[inputs.case.dtype])


def as_rows(gradients: Any) -> Tensor:
    """A row for each gradient, with zeros after it: ours has empty ones between."""
    found = [gradient.double().flatten() for gradient in gradients if gradient.numel()]
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True)


def problem(case: RowsCase, with_peers: bool) -> Problem:
    inputs = make_inputs(case)
    work = Work(
        title=describe(case, "backward"),
        case=asdict(case) | {"s_q": " + ".join(map(str, case.s_q))},
        flops=case.flops,
        bytes=case.bytes,
        dtype=DTYPES[case.dtype],
        tolerance=TOLERANCE[case.dtype],
    )
    expected = as_rows(gradients_of(inputs, torch.float64)())
    return make_problem(work, inputs, [()], bind_ours, PEERS if with_peers else (), expected, as_rows)


def cases(quick: bool) -> Sequence[RowsCase]:
    rows, h_q = (128, 16) if quick else (2048, 128)
    return [
        RowsCase("decode", (1, 1, 64, 7) if quick else (1, 1, 512, 64), rows, h_q, "bf16"),
        RowsCase("decode_up", (4,) * 4, rows, h_q, "bf16"),
        RowsCase("sparse_decode", (4,) * 4, rows, h_q, "bf16"),
    ]


PEERS = (Peer("torch SDPA", "the backward of SDPA over gathered rows, sequence by sequence", bind_torch),)
