"""The choice between a call of the library and the generated decode, by timing both when compiling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.select_algorithm import ExternKernelChoice
from torch._inductor.virtualized import V

from lowering import versions
from lowering.templates.decode import Arguments, DecodeTemplate

NAME = "flashmla_decode"
#: Calls that Inductor may choose, by the name that generated code uses.
CALLS: dict[str, ExternKernelChoice] = {}
NO_PYTHON = "a package has no Python to call the library through"


def install() -> None:
    enter(NAME, decode_into)


def enter(name: str, function: Callable[..., Tensor]) -> None:
    """Enter a call under the name that generated code uses, cached code of earlier processes included."""
    if name not in CALLS:
        CALLS[name] = ExternKernelChoice(function, name=name)


def decode_into(*tensors: Tensor, out: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """`decode` into memory that Inductor planned. ``arguments``: the fields of `Arguments`, as code can name them."""
    a = Arguments(*arguments)
    inputs = dict(zip(a.tensors, tensors, strict=True))
    q = inputs["q"]
    lse = q.new_empty((q.size(0), q.size(2), q.size(1)), dtype=torch.float32)
    options = {name: getattr(a, name) for name in ("d_v", "qk_start", "softmax_scale", "causal", "softcap")}
    torch.ops.flashmla.decode.out(**{"k_cache": None} | inputs | options, out=out, lse=lse)
    return out


def why_not(arguments: Arguments) -> str:
    """Why nothing can be timed; empty if it can."""
    if V.graph.cpp_wrapper:
        return NO_PYTHON
    return "a schedule belongs to lengths that are not known when compiling" if "schedule" in arguments.tensors else ""


def fastest(inputs: list[ir.IRNode], layout: ir.FixedLayout, arguments: Arguments) -> tuple[ir.TensorBox, bool]:
    """The result of the faster one, and whether that is the template. Timed at full lengths of the sizes traced."""
    template = DecodeTemplate(inputs, layout, arguments).generate()  # type: ignore[no-untyped-call]
    fields = tuple(getattr(arguments, name) for name in Arguments.__dataclass_fields__)
    choices = [CALLS[NAME].bind(inputs, layout, arguments=fields), template]
    at = arguments.tensors.index
    full = _hint(inputs[at("block_table")].get_size()[1]) * _hint(inputs[at("kv_cache")].get_size()[1])
    values = {
        at("block_table"): lambda node: _filled(node, 0),
        at("cache_seqlens"): lambda node: _filled(node, full),
    }
    return versions.select(NAME, choices, inputs, layout, values)


def _hint(size: Any) -> int:
    return int(V.graph.sizevars.optimization_hint(size, fallback=1))


def _filled(node: Any, value: int) -> Tensor:
    """A tensor as the node's, in memory that also reaches as far as a kernel reads that adds the node's offset."""
    layout = node.get_layout()
    size, stride = [_hint(n) for n in layout.size], [_hint(n) for n in layout.stride]
    reach = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 + _hint(layout.offset)
    return torch.full((reach,), value, dtype=node.get_dtype()).as_strided(size, stride)
