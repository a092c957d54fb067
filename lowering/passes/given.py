"""Masks that only the data decides: they stay tensors, and `flashmla::attend_masked` reads them at run time.

A model's padding mask is data, however often it is all true. So is a mask that a caller computed, or one that compares
positions. What the graph does not prove, the operator looks at: it decodes where the mask turns out to be a span of
keys, and is exact where it does not. A mask of which the graph proves that it never is one is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from lowering.passes.axes import Access, Axis
from lowering.passes.elements import broadcast, resolve
from lowering.passes.forms import Affine, Condition, Literal, Negated, Opaque, Value, said
from lowering.passes.graph import aten, inputs, known, prims, sources
from lowering.passes.masks import Visible, hidden_unless, hides, seen_if, visible_keys
from lowering.passes.values import described, operand
from lowering.passes.writer import Writer
from lowering.record import Refusal


@dataclass(frozen=True)
class Tensor:
    """The tensor of a mask at query i and key j.

    ``shows``: the value of a bool tensor that shows a key, where the other makes the score ``hidden``. None: a number
    that is added to the score.
    """

    element: Access
    shows: bool | None = None
    hidden: float = -math.inf


@dataclass(frozen=True)
class Mask:
    """One mask of an attention: when it shows a key, and the tensor that says so, if it is one."""

    seen: Condition
    tensor: Tensor | None


@dataclass(frozen=True)
class Given:
    """Masks to be read at run time, and why. A query that sees no key becomes NaN, or 0 with ``safe``."""

    tensors: tuple[Tensor, ...]
    why: str
    safe: bool


def mask_of_operator(element: Access, mask: Node) -> Mask:
    """``attn_mask`` of SDPA, whose result is ``element``. Raises `Refusal` if it is a bias."""
    if mask.meta["val"].dtype != torch.bool:
        return mask_that_is_added(element, mask)
    found = operand(element, mask)
    seen = Condition((found,)) if isinstance(found, Opaque) else seen_if(found)
    return Mask(seen, Tensor(resolve(broadcast(element, mask)), shows=True))


def mask_that_is_added(element: Access, bias: Any) -> Mask:
    """The mask in a tensor that is added to scores, one of which is ``element``. Raises `Refusal` if it is a bias."""
    found = operand(element, bias)
    if not isinstance(bias, Node):
        return Mask(hidden_unless(found), None)
    source = resolve(broadcast(element, bias))
    try:
        seen = hidden_unless(found)
    except Refusal as refusal:
        # Where -65504, say, is added to all scores of a query, what a half type leaves of them is how their sums round.
        rounds = element.node.target == aten.add.Tensor and element.node.meta["val"].dtype != torch.float32
        if rounds or not _is_input(source.node):
            raise
        seen = Condition((Opaque(str(refusal)),))
    return Mask(seen, _without_choice(source))


def mask_of_choice(element: Access, scores: Node) -> Mask:
    """``where(condition, scores, -inf)``, or the other way round."""
    condition, then, other = inputs(element.node)
    fill = operand(element, other if scores is then else then)
    if not isinstance(fill, Affine) or not hides(fill):
        raise Refusal(f"masked scores become {fill}, not -inf")
    found = operand(element, condition)
    seen = found if isinstance(found, Condition) else Condition((Opaque(described(condition)),))
    shows = scores is then
    tensor = Tensor(resolve(broadcast(element, condition)), shows, float(fill.constant))
    return Mask(seen if shows else seen.negated(), tensor)


def _is_input(node: Node) -> bool:
    """Whether a tensor of numbers is what a caller gives as a mask: an input, or computed from integers and bools."""
    if node.op == "placeholder":
        return True
    tensors = [source.meta["val"] for source in sources(node)]
    return bool(tensors) and not any(tensor.dtype.is_floating_point and tensor.dim() for tensor in tensors)


def _without_choice(source: Access) -> Tensor:
    """The condition of ``where(condition, 0, -inf)``, a tensor of bools, rather than a tensor of numbers."""
    if source.node.target == aten.where.self:
        condition, then, other = inputs(source.node)
        values = operand(source, then), operand(source, other)
        for shows, (zero, infinite) in ((True, values), (False, values[::-1])):
            if _is(zero, 0) and _is(infinite, -math.inf):
                return Tensor(resolve(broadcast(source, condition)), shows)
    return Tensor(source)


def _is(found: Value, number: float) -> bool:
    return isinstance(found, Affine) and not found.terms and found.constant == number


def decide(masks: Sequence[Mask], i: Axis, j: Axis, graph: Graph, *, safe: bool) -> Visible | Given:
    """The keys that all masks together let a query see, as the graph proves it, or the masks to read at run time.

    Raises `Refusal` where the graph proves that it is neither.
    """
    seen = Condition(tuple(literal for mask in masks for literal in mask.seen.literals))
    try:
        return visible_keys(seen, i, j, graph)
    except Refusal as refusal:
        hiding = [mask for mask in masks if mask.seen.simplified().literals]
        tensors = tuple(mask.tensor for mask in hiding if mask.tensor is not None)
        literals = seen.simplified().literals
        if seen.never() or not any(map(_is_open, literals)) or len(tensors) < len(hiding):
            raise
        opaque = any(isinstance(literal, Opaque) for literal in literals)
        if opaque and not any(_is_data(tensor.element.node) for tensor in tensors):
            raise
        never = [literal for literal in literals if _never_a_span(literal, i, j)]
        if never and isinstance(never[0], Affine):
            raise Refusal(f"the mask hides early keys, and depends on data too: {said(never[0])}") from refusal
        if never or not _can_be_one(tensors):
            raise
        return Given(tensors, str(refusal), safe)


def _is_data(node: Node) -> bool:
    """Whether an input of the graph, or its size, has a part in what a node computes."""
    return any(source.op == "placeholder" for source in [node, *sources(node)])


def _is_open(literal: Literal) -> bool:
    """Whether data or sizes decide if it holds."""
    if isinstance(literal, Affine):
        sizes = [literal.constant, *(axis.size for axis in literal.axes())]
        loaded = any(_is_data(load.element.node) for load, _ in literal.loads())
        return loaded or any(isinstance(size, torch.SymInt) for size in sizes)
    return isinstance(literal, Opaque) or any(map(_is_open, literal.condition.literals))


def _never_a_span(literal: Literal, i: Axis, j: Axis) -> bool:
    """Whether it hides other keys of each query, or all of a query's, whatever the data is."""
    if isinstance(literal, Negated):
        return not _is_open(literal) and not known(i.size == 1)
    if not isinstance(literal, Affine) or _is_open(literal):
        return False
    return literal.factor(j) < 0 and literal.factor(i) != 0 and not known(i.size == 1)


def _can_be_one(tensors: Sequence[Tensor]) -> bool:
    """Whether masks can be put together: only bools that hide by -inf, in whatever order they are applied."""
    return len(tensors) == 1 or all(x.shows is not None and x.hidden == -math.inf for x in tensors)


# Writing.


def mask_tensor(writer: Writer, given: Given, dtype: torch.dtype, groups: Sequence[Sequence[Axis]]) -> Node:
    """The mask that the operator takes: a dimension for each group, of its size or 1."""
    masks = [_laid_out(writer, _shown(writer, tensor, dtype), groups) for tensor in given.tensors]
    mask = masks[0]
    for other in masks[1:]:
        mask = writer.call(aten.logical_and.default, mask, other)
    return mask


def _shown(writer: Writer, tensor: Tensor, dtype: torch.dtype) -> Access:
    """The mask as a tensor of the model's own dimensions that is true for keys that are seen, or is added to scores."""
    source = tensor.element.node
    held = source.meta["val"].dtype
    as_it_is = held in (torch.float32, dtype) if tensor.shows is None else tensor.shows and tensor.hidden == -math.inf
    if as_it_is:
        return tensor.element
    key, found = writer.shared("mask", source.name, tensor.shows, tensor.hidden)
    if found is None:
        found = writer.share(key, _converted(writer, tensor))
    return Access(found, tensor.element.index)


def _converted(writer: Writer, tensor: Tensor) -> Node:
    source = tensor.element.node
    held = source.meta["val"].dtype
    if tensor.shows is None:
        if held not in (torch.bfloat16, torch.float16):
            raise Refusal(f"the mask is {str(held).removeprefix('torch.')}")
        return writer.call(prims.convert_element_type.default, source, torch.float32)
    if tensor.hidden == -math.inf:
        return writer.call(aten.logical_not.default, source)
    numbers = [_number(writer, source, x) for x in (0.0, tensor.hidden)]
    return writer.call(aten.where.self, source, *(numbers if tensor.shows else reversed(numbers)))


def _number(writer: Writer, source: Node, number: float) -> Node:
    device = source.meta["val"].device
    return writer.call(aten.full.default, [], number, dtype=torch.float32, device=device, pin_memory=False)


def _laid_out(writer: Writer, element: Access, groups: Sequence[Sequence[Axis]]) -> Node:
    """Do as `Writer.lay_out`; a group may have axes along which the element is the same: its size is 1, or all."""
    depends = element.leaves()
    leaves = [[leaf for axis in group for leaf in axis.leaves()] for group in groups]
    apart = [[[leaf] if leaf in depends else [] for leaf in group] for group in leaves]
    mixed = [any(group) and not all(group) for group in apart]
    if not any(mixed):
        return writer.lay_out(element, [[leaf for each in group for leaf in each] for group in apart])
    node = writer.lay_out(element, [each for group in apart for each in group])
    sizes = [
        leaf.size if each or partly else 1
        for group, of_group, partly in zip(leaves, apart, mixed, strict=True)
        for leaf, each in zip(group, of_group, strict=True)
    ]
    node = writer.call(aten.expand.default, node, [writer.size(size) for size in sizes])
    merged = [math.prod(leaf.size for leaf in group) if any(a) else 1 for group, a in zip(leaves, apart, strict=True)]
    return writer.view(node, merged)
