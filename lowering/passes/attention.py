"""An attention found in a graph: where q, k and v are read, over which axes, which scale, which keys are seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lowering.passes.axes import Access, Axis
from lowering.passes.given import Given
from lowering.passes.graph import FLOATS, Size, known, name_of, shape
from lowering.passes.masks import Visible
from lowering.record import Refusal


@dataclass(frozen=True)
class Attention:
    """``output[*outer, i, x]``: softmax over j of ``scale * sum_e q[.., i, e] k[.., j, e]``, times ``v[.., j, x]``.

    With a ``softcap`` that is not 0 the scores go through ``softcap * tanh(score / softcap)``. A ``sink`` is one more
    score of each query, without a value.
    """

    output: Node
    outer: tuple[Axis, ...]  # sequences and heads, as the output's dimensions have them
    i: Axis
    j: Axis
    e: Axis
    x: Axis
    q: Access
    k: Access
    v: Access
    scale: float | None  # None: e.size ** -0.5, which the operators take themselves, whatever the size is
    visible: Visible | Given
    softcap: float = 0.0
    sink: Access | None = None

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.output.meta["val"].dtype
        return dtype


def outer_axes(sizes: list[Size]) -> tuple[Axis, ...]:
    """Axes for sequences and heads, where there are two dimensions, and for whatever else there is."""
    names = ["b", "h"] if len(sizes) == 2 else ["z"] if len(sizes) == 1 else [f"z{dim}" for dim in range(len(sizes))]
    return tuple(Axis(name, size) for name, size in zip(names, sizes, strict=True))


def require_type(dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise Refusal(f"{name_of(dtype)} is not a type of the operators")


def require_shape(node: Node, sizes: list[Size]) -> None:
    """Raise `Refusal` if a node has another shape, because torch broadcast something on the way."""
    if len(shape(node)) != len(sizes) or not all(known(n == m) for n, m in zip(shape(node), sizes, strict=True)):
        raise Refusal(f"{node} has shape {shape(node)}, not {sizes}: something is broadcast")


def check_scale(scale: Any) -> None:
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise Refusal(f"the scale {scale} is not a finite constant")


def given_why(attention: Attention) -> str:
    """Why the mask of an attention is read at run time, to be added to what the record says; empty if it is proven."""
    visible = attention.visible
    return f", which reads the mask at run time ({visible.why})" if isinstance(visible, Given) else ""
