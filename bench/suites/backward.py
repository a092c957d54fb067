"""Suite ``backward``: the gradients of attention of many query tokens, or over a cache, given what was returned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench import dense
from bench.dense import PrefillCase, PrefillInputs
from bench.peers import torch_prefill
from bench.runner import Problem, Work
from bench.suite import DTYPES, TOLERANCE, Bound, Peer, Suite, describe, make_problem
from bench.suites import backward_rows
from bench.suites.backward_rows import RowsCase
from flashmla_ops import reference

NAME = "backward"
WIDTHS = ((192, 128), (128, 128), (64, 64))  # d_qk, d_v


@dataclass(frozen=True)
class BackwardCase(PrefillCase):
    @property
    def flops(self) -> float:
        """Of five products: scores and the gradients of weights, of queries, of keys and of values."""
        return 2.0 * self.h_q * self.pairs * (3 * self.d_qk + 2 * self.d_v)


def dout_of(inputs: PrefillInputs) -> Tensor:  # [t, h_q, d_v]
    generator = torch.Generator().manual_seed(1)
    return torch.randn((*inputs.q.shape[:2], inputs.case.d_v), generator=generator).to(inputs.q.dtype)


def bind_ours(inputs: PrefillInputs) -> Bound:
    case, bounds = inputs.case, (inputs.cu_seqlens, inputs.cu_seqlens)
    tensors, options = (inputs.q, inputs.k, inputs.v), (case.causal, inputs.softmax_scale)
    results, dout = torch.ops.flashmla.prefill(*tensors, *bounds, *options), dout_of(inputs)
    return lambda: torch.ops.flashmla.prefill_backward(*tensors, *bounds, dout, None, *results, *options)


def bind_sdpa(inputs: PrefillInputs) -> Bound:
    tensors = {name: getattr(inputs, name).clone().requires_grad_() for name in ("q", "k", "v")}
    with torch.enable_grad():
        out: Tensor = torch_prefill.bind_sdpa(PrefillInputs(**(vars(inputs) | tensors)))()
    dout = dout_of(inputs)
    return lambda: torch.autograd.grad(out, list(tensors.values()), dout, retain_graph=True)


def as_rows(gradients: Any) -> Tensor:
    """Those of q, k and v: one row a token, since a query may have a gradient of 0, beside which no error is small."""
    return torch.cat([gradient.double().flatten(1) for gradient in gradients[:3]], dim=1)


def exact(inputs: PrefillInputs) -> Tensor:
    """The float64 gradients, a KV head at a time."""
    case, group = inputs.case, inputs.case.h_q // inputs.case.h_kv
    bounds, options = (inputs.cu_seqlens, inputs.cu_seqlens), (case.causal, inputs.softmax_scale)
    dout, heads = dout_of(inputs), []
    for head in range(case.h_kv):
        q, d = (x[:, head * group : (head + 1) * group].double() for x in (inputs.q, dout))
        k, v = (x[:, head : head + 1].double() for x in (inputs.k, inputs.v))
        results = reference.prefill(q, k, v, *bounds, *options)
        heads.append(reference.prefill_backward(q, k, v, *bounds, d, None, *results, *options)[:3])
    return as_rows([torch.cat(parts, dim=1) for parts in zip(*heads, strict=True)])


def problem(case: BackwardCase | RowsCase, peers: Sequence[Peer[PrefillInputs]], cold_bytes: int) -> Problem:
    """``cold_bytes`` does not matter: a backward computes far longer than it reads."""
    if isinstance(case, RowsCase):
        return backward_rows.problem(case, bool(peers))
    inputs = dense.make_inputs(case)
    work = Work(
        title=describe(case, NAME),
        case=asdict(case) | {"s": " + ".join(map(str, case.s))},
        flops=case.flops,
        bytes=2 * case.bytes,
        dtype=DTYPES[case.dtype],
        tolerance=TOLERANCE[case.dtype],
    )
    return make_problem(work, inputs, [()], bind_ours, peers, exact(inputs), as_rows)


def cases(quick: bool) -> list[BackwardCase | RowsCase]:
    lengths = (256,) if quick else (1024, 4096)
    widths = WIDTHS[:1] if quick else WIDTHS
    ragged = (64, 192) if quick else (1024, 256, 2048, 768)
    return [
        *(BackwardCase((s,), *width, True, dtype) for dtype in ("bf16", "fp32") for width in widths for s in lengths),
        BackwardCase((lengths[-1],), *widths[0], False, "bf16"),
        BackwardCase(ragged, *widths[0], True, "bf16", group="ragged"),
        *(BackwardCase((lengths[-1],), 128, 128, True, "bf16", h_kv=h_kv, group="h_kv < h_q") for h_kv in (4, 1)),
        *backward_rows.cases(quick),
    ]


PEERS = (Peer("torch SDPA", "the backward of scaled_dot_product_attention, sequence by sequence", bind_sdpa),)
SUITE = Suite(NAME, "gradients of attention", cases, problem, PEERS)
