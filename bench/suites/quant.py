"""Suite ``quant``: products with weights in int8 and int4, against bf16 and torch's own; and all of a decode step.

A step is what one token reads of four layers of DeepSeek-V2-Lite, one dense and three with experts, and of its head:
every linear layer but the one that absorbed attention reads, and six routed experts of a layer, one product each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bench.runner import Problem, Work
from bench.suite import TOLERANCE, Bound, Peer, Suite, copies_of, describe, make_problem
from flashmla_ops import reference
from flashmla_ops.panels import pack_int4, to_panels
from flashmla_ops.quant.weights import FORMATS, WeightFormat

NAME = "quant"
STEP = "step"
HIDDEN, DENSE, EXPERT, VOCABULARY = 2048, 10944, 1408, 102400
#: [n, k] of each weight.
ATTENTION = ((3072, HIDDEN), (576, HIDDEN), (HIDDEN, HIDDEN))
SHARED, ROUTED = 2 * EXPERT, 6


def mlp(intermediate: int) -> tuple[tuple[int, int], ...]:
    return (intermediate, HIDDEN), (intermediate, HIDDEN), (HIDDEN, intermediate)


EXPERTS = (*ATTENTION, *mlp(SHARED), *mlp(EXPERT) * ROUTED)
STEPS = {
    "4 layers and the head": (*ATTENTION, *mlp(DENSE), *EXPERTS * 3, (VOCABULARY, HIDDEN)),
    "a small layer": (*ATTENTION, *mlp(EXPERT)),
}


def fitting(name: str, n: int, k: int) -> WeightFormat:
    """The format, or the one of the next smaller group that divides k: 10944 takes 64."""
    names = [*FORMATS]
    return next(FORMATS[each] for each in names[names.index(name) :] if not FORMATS[each].obstacle(n, k))


@dataclass(frozen=True)
class QuantCase:
    m: int
    weights: str
    k: int = 0
    n: int = 0
    step: str = ""  # in place of k and n
    group: str = "linear"

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return STEPS[self.step] if self.step else ((self.n, self.k),)

    @property
    def bytes(self) -> int:
        """Bytes of the weights and their scales: all else is small."""
        tensors = (tensor for shape in self.shapes for tensor in fitting(self.weights, *shape).empty(*shape))
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True)
class Linear:
    """A product, before anybody lays the weight out."""

    a: Tensor  # [m, k]
    codes: Tensor  # [n, k] int8
    scale: Tensor  # [n, groups] float32, of values that bfloat16 holds: a peer takes them so
    group: int

    def weight(self) -> Tensor:
        """[n, k] bfloat16"""
        return (self.codes * self.scale.repeat_interleave(self.group, 1)).bfloat16()


@dataclass(frozen=True)
class QuantInputs:
    case: QuantCase
    linears: list[Linear]
    cold_bytes: int


def make_inputs(case: QuantCase, cold_bytes: int) -> QuantInputs:
    generator = torch.Generator().manual_seed(0)
    least, most = (-8, 8) if FORMATS[case.weights].bits == 4 else (-127, 128)
    linears = []
    for n, k in case.shapes:
        a = torch.randn((case.m, k), generator=generator).bfloat16()
        codes = torch.randint(least, most, (n, k), generator=generator, dtype=torch.int8)
        group = fitting(case.weights, n, k).group or k
        scale = torch.rand((n, k // group), generator=generator).mul_(0.01).add_(0.01).bfloat16().float()
        linears.append(Linear(a, codes, scale, group))
    return QuantInputs(case, linears, cold_bytes)


def binder(lay_out: Callable[[Linear], tuple[Tensor, ...]], product: Callable[..., Tensor]) -> Callable[..., Bound]:
    """Products with weights that ``lay_out`` made, of ever other copies; their results side by side."""

    def bind(inputs: QuantInputs) -> Bound:
        made = [lay_out(linear) for linear in inputs.linears]
        copies = copies_of(tuple(itertools.chain(*made)), inputs.cold_bytes)
        width = len(made[0])
        sets = [[copy[i : i + width] for i in range(0, len(copy), width)] for copy in copies]
        turns = itertools.cycle(sets)
        return lambda: _side_by_side([product(x, *w) for x, w in zip(inputs.linears, next(turns), strict=True)])

    return bind


def ours(linear: Linear) -> tuple[Tensor, Tensor]:
    if linear.group == linear.codes.size(1):
        return to_panels(linear.codes), linear.scale.flatten()
    return pack_int4(linear.codes), to_panels(linear.scale.bfloat16())


def multiply_ours(linear: Linear, packed: Tensor, scale: Tensor) -> Tensor:
    out: Tensor = torch.ops.flashmla.gemm(linear.a, packed, None, None, scale)
    return out


def multiply_panels(linear: Linear, panels: Tensor) -> Tensor:
    out: Tensor = torch.ops.flashmla.gemm(linear.a, panels)
    return out


def int4pack(linear: Linear) -> tuple[Tensor, Tensor]:
    """torch's codes are not negative, and a group has a zero point beside its scale: [k / group, n, 2]."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(linear.codes.int() + 8, 1)
    scale = linear.scale.bfloat16()
    return packed, torch.stack([scale, torch.zeros_like(scale)], dim=-1).transpose(0, 1).contiguous()


def multiply_int4pack(linear: Linear, packed: Tensor, scales: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(linear.a, packed, linear.group, scales)
    return out


def multiply_int8pack(linear: Linear, codes: Tensor, scale: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._weight_int8pack_mm(linear.a, codes, scale)
    return out


def only(bits: int) -> Callable[[QuantInputs], str | None]:
    return lambda inputs: None if FORMATS[inputs.case.weights].bits == bits else f"takes int{bits} weights only"


def problem(case: QuantCase, peers: Sequence[Peer[QuantInputs]], cold_bytes: int) -> Problem:
    inputs = make_inputs(case, cold_bytes)
    expected = _side_by_side(
        [reference.gemm(x.a, x.codes.double() * x.scale.double().repeat_interleave(x.group, 1)) for x in inputs.linears]
    )
    work = Work(
        title=describe(case, NAME),
        case=asdict(case),
        flops=sum(2.0 * case.m * n * k for n, k in case.shapes),
        bytes=case.bytes,
        dtype=torch.bfloat16,
        tolerance=TOLERANCE["bf16"],
    )
    return make_problem(work, inputs, [()], binder(ours, multiply_ours), peers, expected)


def cases(quick: bool) -> list[QuantCase]:
    formats = ("int4_g128", "int8") if quick else ("int4_g128", "int4_g32", "int8")
    rows = (1, 4) if quick else (1, 2, 4, 8, 16, 128, 512)
    others = () if quick else ((HIDDEN, DENSE), (EXPERT, HIDDEN), (HIDDEN, EXPERT), (3072, HIDDEN), (4096, 512))
    step = [*STEPS][-1 if quick else 0]
    n, k = (EXPERT, HIDDEN) if quick else (DENSE, HIDDEN)
    return [
        *(QuantCase(m, weights, k, n) for weights, m in itertools.product(formats, rows)),
        *(QuantCase(m, "int4_g128", k, n) for (n, k), m in itertools.product(others, (1, 4))),
        *(QuantCase(m, weights, step=step, group=STEP) for weights, m in itertools.product(formats, (1, 4))),
    ]


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


PEERS = (
    Peer(
        "bf16 panels",
        "flashmla::gemm, weights of bf16 in panels",
        binder(lambda x: (to_panels(x.weight()),), multiply_panels),
    ),
    Peer(
        "torch",
        "torch.nn.functional.linear, weights of bf16",
        binder(lambda x: (x.weight(),), lambda x, w: torch.nn.functional.linear(x.a, w)),
    ),
    Peer(
        "torch int4pack",
        "torch.ops.aten._weight_int4pack_mm_for_cpu",
        binder(int4pack, multiply_int4pack),
        unfair=only(4),
    ),
    Peer(
        "torch int8pack",
        "torch.ops.aten._weight_int8pack_mm",
        binder(lambda x: (x.codes, x.scale.flatten().bfloat16()), multiply_int8pack),
        unfair=only(8),
    ),
)
SUITE = Suite(NAME, "products with weights in int8 and int4", cases, problem, PEERS)
