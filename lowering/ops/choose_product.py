"""The choice between a product of the library and what the graph had in its place, by timing both when compiling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import ir
from torch._inductor import lowering as inductor
from torch._inductor.ir import TensorBox
from torch._inductor.select_algorithm import ExternKernelCaller

from lowering import versions
from lowering.ops import choose

LIBRARY, ATEN = "flashmla_product", "aten_product"
aten = torch.ops.aten


class Timed(ExternKernelCaller):
    """A function that is timed, and ``generate``, which enters into the graph what it stands for."""

    def __init__(
        self, name: str, inputs: list[Any], layout: ir.Layout, generate: Callable[[], TensorBox], **kwargs: Any
    ) -> None:
        super().__init__(choose.CALLS[name], inputs, layout, kwargs)
        self.generate = generate

    def output_node(self) -> TensorBox:
        return self.generate()


def install() -> None:
    choose.enter(LIBRARY, run_library)
    choose.enter(ATEN, run_aten)


def run_library(
    a: Tensor, weight: Tensor, *rest: Tensor, out: Tensor, op: str, names: tuple[str, ...], **options: Any
) -> Tensor:
    getattr(torch.ops.flashmla, op).out(a, weight, **dict(zip(names, rest, strict=True)), **options, out=out)
    return out


def run_aten(
    a: Tensor,  # [m, k]; by head [h, m, k]
    weight: Tensor,  # [n, k]; by head [h, k, n]
    *rest: Tensor,  # of these names
    out: Tensor,
    op: str,
    names: tuple[str, ...],
    activation: str = "none",
) -> Tensor:
    """Run the operators that `lower_aten` generates, with a call for each pointwise one."""
    if op == "bmm":
        return torch.bmm(a, weight, out=out)
    given = dict(zip(names, rest, strict=True))
    gated = activation == "silu_mul"
    product = a.new_empty(a.size(0), weight.size(0)) if gated else out
    if "bias" in given:
        torch.addmm(given["bias"], a, weight.t(), out=product)
    else:
        torch.mm(a, weight.t(), out=product)
    if gated:
        gate, up = product.chunk(2, dim=1)
        torch.mul(F.silu(gate), up, out=out)
    return out.add_(given["residual"]) if "residual" in given else out


def lower_aten(
    op: str,
    a: TensorBox,
    weight: TensorBox,
    bias: TensorBox | None = None,
    residual: TensorBox | None = None,
    activation: str = "none",
) -> Any:
    """The operators of the graph, of which Inductor fuses the pointwise ones with what follows."""
    if op == "bmm":
        return _lower(aten.bmm, a, weight)
    right = _lower(aten.permute, weight, [1, 0])
    out = _lower(aten.mm, a, right) if bias is None else _lower(aten.addmm, bias, a, right)
    if activation == "silu_mul":
        gate, up = _lower(aten.split, out, weight.get_size()[0] // 2, 1)
        out = _lower(aten.mul, _lower(aten.mul, gate, _lower(aten.sigmoid, gate)), up)
    return out if residual is None else _lower(aten.add, out, residual)


def _lower(op: Any, *args: Any) -> Any:
    return inductor.lowerings[op](*args)


def fastest(
    op: str,
    inputs: list[Any],
    layout: ir.FixedLayout,
    library: Callable[[], TensorBox],
    replaced: Callable[[], TensorBox],
    **kwargs: Any,
) -> Any:
    """The result of ``library()`` or of ``replaced()``, whichever is faster at the sizes traced."""
    choices = [
        Timed(LIBRARY, inputs, layout, library, op=op, **kwargs),
        Timed(ATEN, inputs, layout, replaced, op=op, **kwargs),
    ]
    return versions.select(f"flashmla_{op}", choices, inputs, layout, {})[0]
