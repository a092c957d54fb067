"""The IR nodes of `append_`: rows that go to the slots of a cache (see `lowering.ops.append`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import sympy
import torch
from torch._inductor import ir
from torch._inductor.ir import TensorBox

MODE = "flashmla_append"
#: Added to the offset of a load of slots: it is to be served from the checked copy, whoever else reads the tensor.
CHECKED = sympy.Integer(1 << 60)


@dataclass(frozen=True)
class Slots:
    """Where a slot mapping lies, and the number of slots that the cache has."""

    name: str
    n: sympy.Expr
    stride: sympy.Expr
    offset: sympy.Expr
    capacity: sympy.Expr


class RowScatter(ir.Scatter):
    """The rows of one append_. ``slots`` is set right after construction (the base is a frozen dataclass)."""

    slots: Slots


Scatter = TypeVar("Scatter", bound=RowScatter)


@dataclass(frozen=True)
class Strided:
    """A tensor in memory: the buffer, and where its first element and the others are, in elements."""

    name: str
    dtype: torch.dtype
    offset: sympy.Expr
    stride: tuple[sympy.Expr, ...]

    @classmethod
    def of(cls, node: TensorBox) -> Strided:
        layout = node.get_layout()
        return cls(node.get_name(), node.get_dtype(), layout.offset, tuple(node.get_stride()))


class QuantizedRowScatter(RowScatter):
    """The rows of one append_ into a cache of bytes: a loop nest for the scheduler, which a call of ours replaces.

    ``source`` [n, h_kv, elements] and ``target`` [n_pages, page_size, h_kv, bytes] say where the call reads and writes,
    ``codec`` names the format's struct in C++.
    """

    codec: str
    source: Strided
    target: Strided
    page_size: sympy.Expr
