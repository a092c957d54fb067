"""Suite ``small_gemm``: the products of a decode step, few rows by weights that come from memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bench.peers import vllm_cpu
from bench.runner import Problem, Work
from bench.suite import DTYPES, TOLERANCE, Bound, Peer, Suite, copies_of, describe, make_problem
from flashmla_ops import reference
from flashmla_ops.panels import to_panels

NAME = "small_gemm"
PANELS = "panels"  # the group of cases whose weights were converted beforehand
HIDDEN, INTERMEDIATE = 2048, 10944
D_NOPE, D_C, D_V = 128, 512, 128  # of a head: its part of kv_b_proj is [D_NOPE + D_V, D_C]


@dataclass(frozen=True)
class GemmCase:
    m: int
    k: int
    n: int
    dtype: str
    weights: str  # their dtype, or which per-head product
    batch: int = 1  # heads, of bmm
    group: str = "gemm"

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.m * self.k * self.n

    @property
    def bytes(self) -> int:
        """Bytes of the weights: all else is small."""
        size = 1 if self.weights == "int8" else DTYPES[self.dtype].itemsize
        return self.batch * self.k * self.n * size


@dataclass(frozen=True)
class GemmInputs:
    case: GemmCase
    a: Tensor  # [m, k]; of bmm [batch, m, k]
    scale: Tensor | None  # [n] float32, of int8 weights
    copies: list[tuple[Tensor]]  # of the weights: [n, k]; of bmm [batch, k, n]


def make_gemm(case: GemmCase, cold_bytes: int) -> GemmInputs:
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[case.dtype]
    a = torch.randn((case.m, case.k), generator=generator).to(dtype)
    if case.weights != "int8":
        weight = torch.randn((case.n, case.k), generator=generator).to(dtype)
        return GemmInputs(case, a, None, copies_of((weight,), cold_bytes))
    weight = torch.randint(-127, 128, (case.n, case.k), generator=generator, dtype=torch.int8)
    # Scales that bf16 holds exactly: a peer takes them so.
    scale = torch.rand(case.n, generator=generator).mul_(0.01).add_(0.01).bfloat16().float()
    return GemmInputs(case, a, scale, copies_of((weight,), cold_bytes))


def make_bmm(case: GemmCase, cold_bytes: int) -> GemmInputs:
    """Weights as absorbed attention has them: views into kv_b_proj."""
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[case.dtype]
    a = torch.randn((case.batch, case.m, case.k), generator=generator).to(dtype)
    kv_b_proj = torch.randn((case.batch, D_NOPE + D_V, D_C), generator=generator).to(dtype)
    w_uk, w_uv = kv_b_proj.split([D_NOPE, D_V], dim=1)
    weight = w_uk if case.weights == "W_UK" else w_uv.transpose(1, 2)
    return GemmInputs(case, a, None, copies_of((weight,), cold_bytes))


def bind_ours(inputs: GemmInputs) -> Bound:
    if inputs.case.batch > 1:
        return lambda weight: torch.ops.flashmla.bmm(inputs.a, weight)
    if inputs.case.group == PANELS:
        panels = {weight.data_ptr(): to_panels(weight) for (weight,) in inputs.copies}
        return lambda weight: torch.ops.flashmla.gemm(inputs.a, panels[weight.data_ptr()])
    return lambda weight: torch.ops.flashmla.gemm(inputs.a, weight, None, None, inputs.scale)


def bind_torch(inputs: GemmInputs) -> Bound:
    if inputs.case.batch > 1:
        return lambda weight: torch.bmm(inputs.a, weight)
    return lambda weight: torch.nn.functional.linear(inputs.a, weight)


def bind_int8pack(inputs: GemmInputs) -> Bound:
    assert inputs.scale is not None
    scale = inputs.scale.to(inputs.a.dtype)
    return lambda weight: torch.ops.aten._weight_int8pack_mm(inputs.a, weight, scale)


def bind_vllm_cpu(inputs: GemmInputs) -> Bound:
    return vllm_cpu.bind_gemm(inputs.a, [weight for (weight,) in inputs.copies])


def floating(inputs: GemmInputs) -> str | None:
    return None if inputs.scale is None else "takes no int8 weights"


def int8(inputs: GemmInputs) -> str | None:
    return "takes int8 weights only" if inputs.scale is None else None


def not_packable(inputs: GemmInputs) -> str | None:
    return vllm_cpu.not_bf16(inputs) or floating(inputs)


def problem(case: GemmCase, peers: Sequence[Peer[GemmInputs]], cold_bytes: int) -> Problem:
    inputs = make_bmm(case, cold_bytes) if case.batch > 1 else make_gemm(case, cold_bytes)
    (weight,) = inputs.copies[0]
    if case.batch > 1:
        expected = reference.bmm(inputs.a, weight)
    else:
        expected = reference.gemm(inputs.a, weight, weight_scale=inputs.scale)
    work = Work(
        title=describe(case, NAME),
        case=asdict(case),
        flops=case.flops,
        bytes=case.bytes,
        dtype=DTYPES[case.dtype],
        tolerance=TOLERANCE[case.dtype],
    )
    return make_problem(work, inputs, inputs.copies, bind_ours, peers, expected)


def cases(quick: bool) -> list[GemmCase]:
    rows = (1, 4) if quick else (1, 2, 4, 8, 16, 32)
    shapes = ((HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN))[: 1 if quick else 2]
    kinds = (("bf16", "bf16"), ("fp32", "fp32"), ("bf16", "int8"))
    per_head = (("W_UK", D_NOPE, D_C), ("W_UV", D_C, D_V))
    tokens = (1,) if quick else (1, 4, 16)
    # In panels any number of rows is ours.
    rows_of_panels = rows if quick else (*rows, 128, 512)
    panels = itertools.product(("bf16", "fp32"), shapes, rows_of_panels)
    return [
        *(GemmCase(m, k, n, dtype, weights) for (dtype, weights), (k, n), m in itertools.product(kinds, shapes, rows)),
        *(GemmCase(m, k, n, dtype, dtype, group=PANELS) for dtype, (k, n), m in panels),
        *(
            GemmCase(m, k, n, "bf16", name, heads, "bmm")
            for (name, k, n), heads, m in itertools.product(per_head, (16, 128), tokens)
        ),
    ]


PEERS = (
    Peer("torch", "torch.nn.functional.linear, torch.bmm", bind_torch, unfair=floating),
    Peer("torch int8pack", "torch.ops.aten._weight_int8pack_mm", bind_int8pack, unfair=int8),
    Peer(vllm_cpu.NAME, "its linear and bmm, weights packed", bind_vllm_cpu, vllm_cpu.missing, not_packable),
)
SUITE = Suite(NAME, "products of few rows and cold weights", cases, problem, PEERS)
