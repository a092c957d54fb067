"""Find attention in a graph: SDPA operators, and softmax written out. Both become an `Attention`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from lowering.passes.attention import Attention, require_type
from lowering.passes.axes import Access
from lowering.passes.elements import resolve
from lowering.passes.graph import CONVERSIONS, aten, inputs, is_call, is_float, name_of, value
from lowering.passes.sdpa import SDPA, match_sdpa
from lowering.passes.softmax import match_softmax
from lowering.record import Refusal


@dataclass(frozen=True)
class Candidate:
    """A node that looks like the result of attention, and the name of its form."""

    pattern: str
    node: Node


def candidates(graph: torch.fx.Graph) -> Iterator[Candidate]:
    """All candidates in the graph's order. A product is one if there is a softmax a few operators before it."""
    for node in list(graph.nodes):
        if node.target in SDPA:
            yield Candidate("sdpa", node)
        elif node.target == aten.bmm.default and _softmax_before(inputs(node)[0]):
            yield Candidate("softmax", node)


def _softmax_before(node: Any, steps: int = 24) -> bool:
    """Whether the left operand of a product descends from a softmax by moves and elementwise operators alone."""
    frontier = [node]
    while frontier and steps > 0:
        node, steps = frontier.pop(), steps - 1
        if node.target in (aten._softmax.default, aten._safe_softmax.default):
            return True
        if node.target == aten.exp.default and any(is_call(user, aten.sum.dim_IntList) for user in node.users):
            return True
        if node.target not in (aten.bmm.default, aten.mm.default, aten.addmm.default):
            frontier.extend(each for each in node.all_input_nodes if is_float(each))
    return False


def match(candidate: Candidate) -> Attention:
    """The attention that a candidate computes. Raises `Refusal` with the reason why it is not proven to be one."""
    found = match_sdpa(candidate.node) if candidate.pattern == "sdpa" else match_softmax(candidate.node)
    found = _before_widening(found)
    require_type(found.dtype)
    for name, read in (("q", found.q), ("k", found.k), ("v", found.v)):
        if (dtype := read.node.meta["val"].dtype) != found.dtype:
            raise Refusal(f"mixed dtypes: {name} is {name_of(dtype)}, the output {name_of(found.dtype)}")
    return found


def _before_widening(found: Attention) -> Attention:
    """Attention on float32 copies of q, k and v whose result is rounded to their type again: attention in that type.

    SDPA in a half type becomes this where torch has no kernel for it, as with values narrower than keys. The operators
    add products of half types in float32, as such a graph does.
    """
    users = list(found.output.users)
    tensors = (found.q, found.k, found.v)
    if len(users) != 1 or users[0].target not in CONVERSIONS or any(x.node.target not in CONVERSIONS for x in tensors):
        return found
    dtype = users[0].meta["val"].dtype
    if found.dtype != torch.float32 or any(value(inputs(x.node)[0]).dtype != dtype for x in tensors):
        return found
    q, k, v = (resolve(Access(inputs(x.node)[0], x.index)) for x in tensors)
    return replace(found, output=users[0], q=q, k=k, v=v)
