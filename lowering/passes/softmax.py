"""Attention that is written out: softmax(scale * q k^T + mask) v, its scores capped or not, with a sink or without.

It is followed backwards from the product with v, one symbolic element at a time, through whatever moves data; every
operator met on the way must be one whose meaning is known here, or the candidate is refused.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from lowering.passes.attention import Attention, check_scale, outer_axes, require_shape, require_type
from lowering.passes.axes import Access, Axis, access, constant, replaced, whole
from lowering.passes.elements import resolve
from lowering.passes.forms import Affine
from lowering.passes.given import Given, Mask, decide, mask_of_choice, mask_that_is_added
from lowering.passes.graph import (
    CONVERSIONS,
    FLOATS,
    VIEWS,
    arguments,
    aten,
    inputs,
    is_call,
    is_float,
    known,
    name_of,
    shape,
    value,
)
from lowering.passes.values import evaluate
from lowering.record import Refusal

PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
QUOTIENTS = (aten.div.Tensor, aten.div.Scalar)


@dataclass
class _Chain:
    """The nodes, masks and scale met between the product with v and the product of q and k."""

    dtype: torch.dtype  # of the product with v
    nodes: list[Node] = field(default_factory=list)  # whose only users must be one another
    masks: list[Mask] = field(default_factory=list)
    scale: float = 1.0
    softcap: float = 0.0
    sink: Access | None = None
    safe: bool = False  # a query that sees no key becomes 0, and not NaN

    def follow(self, element: Access) -> Access:
        """`resolve`, keeping the nodes passed."""
        found = resolve(element)
        node = element.node
        while node is not found.node:
            self.nodes.append(node)
            node = next(n for n in node.all_input_nodes if _leads_to(n, found.node))
        return found


def _leads_to(node: Node, target: Node, steps: int = 16) -> bool:
    while node is not target and steps > 0 and node.all_input_nodes:
        node, steps = node.all_input_nodes[0], steps - 1
    return node is target


def match_softmax(product: Node) -> Attention:
    output, outer, i, x = _output_axes(product)
    found = resolve(access(output, [*outer, i, x]))
    assert found.node is product
    batch, row, column = found.index
    left, right = inputs(product)
    j = Axis("j", shape(left)[2])
    seen = (Access(left, (batch, row, whole(j))), Access(right, (batch, whole(j), column)))
    chain = _Chain(product.meta["val"].dtype, [product])
    require_type(chain.dtype)
    probabilities = _skip_conversions(chain, chain.follow(seen[0]))
    scores = _softmax_input(chain, probabilities, j)
    scores = _unmask(chain, scores)
    q_side, k_side, e = _product_of_scores(chain, scores, j)
    q, q_scale = _unscale(q_side)
    k, k_scale = _unscale(k_side)
    v = resolve(seen[1])
    scale = chain.scale * q_scale * k_scale
    check_scale(scale)
    _check_users(chain, product)
    visible = decide(chain.masks, i, j, product.graph, safe=chain.safe)
    if isinstance(visible, Given) and (chain.softcap or chain.sink):
        raise Refusal(f"scores are capped or have a sink, and the mask would be read at run time ({visible.why})")
    return Attention(output, outer, i, j, e, x, q, k, v, scale, visible, chain.softcap, chain.sink)


def _output_axes(product: Node) -> tuple[Node, tuple[Axis, ...], Axis, Axis]:
    """The node to replace and its axes: the product, or the view right behind it that separates sequences and heads."""
    for node in (*(user for user in product.users if len(product.users) == 1), product):
        if node is not product and node.target not in VIEWS:
            continue
        *outer_sizes, s_q, d_v = shape(node)
        outer = outer_axes(outer_sizes)
        i, x = Axis("i", s_q), Axis("x", d_v)
        found = resolve(access(node, [*outer, i, x]))
        if found.node is product and _is(found.entry(1), i) and _is(found.entry(2), x):
            return node, outer, i, x
    raise Refusal("the result is not laid out by sequences, heads, queries and values")


def _is(entry: Any, axis: Axis) -> bool:
    """Whether an entry is exactly an axis."""
    if not entry:
        return known(axis.size == 1)
    return len(entry) == 1 and entry[0].axis is axis and entry[0].whole


def _skip_conversions(chain: _Chain, element: Access) -> Access:
    """Past conversions between floating types, which only round. To a type that holds less than q, k and v is more."""
    while element.node.target in CONVERSIONS and value(inputs(element.node)[0]).dtype.is_floating_point:
        dtype = element.node.meta["val"].dtype
        if dtype not in (*FLOATS, torch.float64) or torch.promote_types(dtype, chain.dtype) != dtype:
            raise Refusal(f"{element.node} rounds to {name_of(dtype)}, which is less than {name_of(chain.dtype)}")
        chain.nodes.append(element.node)
        element = chain.follow(Access(inputs(element.node)[0], element.index))
    return element


def _softmax_input(chain: _Chain, element: Access, j: Axis) -> Access:
    """The scores of a softmax over j: ``exp(s - amax(s)) / sum(exp(s - amax(s)))``, safe or not, or the operator."""
    node = element.node
    if node.target == aten.where.self:  # the safe form gives 0 to a query that sees no key
        element = _safe_softmax(chain, element, j)
        node = element.node
    chain.nodes.append(node)
    if node.target in (aten._softmax.default, aten._safe_softmax.default, aten.softmax.int):
        bound = arguments(node)
        over_sink = _over_sink(element, bound["dim"], j)
        chain.safe = chain.safe or node.target == aten._safe_softmax.default
        return _scores(chain, Access(bound["self"], element.index), j, over_sink)
    if node.target != aten.div.Tensor:
        raise Refusal(f"{node.target} between the softmax and the values")
    exponential, total = inputs(node)
    if not (
        is_call(exponential, aten.exp.default)
        and is_call(total, aten.sum.dim_IntList)
        and inputs(total)[0] is exponential
    ):
        raise Refusal(f"{node} is not a softmax: its denominator is not the sum of its numerators")
    shifted = inputs(exponential)[0]
    if not is_call(shifted, aten.sub.Tensor) or len(inputs(shifted)) != 2:
        raise Refusal(f"{node} is not a softmax: its exponent is not a difference")
    scores, largest = inputs(shifted)
    if not is_call(largest, aten.amax.default) or inputs(largest)[0] is not scores:
        raise Refusal(f"{node} is not a softmax: its exponent is not the distance from the largest score")
    over_sink = False
    for reduction in (total, largest):
        bound = arguments(reduction)
        dims = list(bound["dim"])
        if len(dims) != 1 or not bound["keepdim"]:
            raise Refusal(f"{reduction} reduces dimensions {dims}, not the keys alone")
        over_sink = _over_sink(element, dims[0], j)
    chain.nodes.extend((exponential, total, shifted, largest))
    return _scores(chain, Access(scores, element.index), j, over_sink)


def _over_sink(element: Access, dim: int, j: Axis) -> bool:
    """Whether a softmax is over one more score than there are keys. Raises `Refusal` if it is over anything else."""
    dim %= len(element.index)
    entry, total = element.entry(dim), shape(element.node)[dim]
    if _is(entry, j):
        return False
    if len(entry) == 1 and entry[0].axis is j and known(entry[0].offset == 0) and known(total == j.size + 1):
        return True
    if any(digit.axis is j for digit in entry):
        raise Refusal(f"a softmax over {total} scores, of which {j.size} belong to the keys: keys are cut off")
    raise Refusal(f"{element.node} is a softmax over another dimension than the keys")


def _scores(chain: _Chain, element: Access, j: Axis, over_sink: bool) -> Access:
    """The scores of the keys, of which a softmax was found; a sink beside them is kept."""
    if not over_sink:
        return _skip_conversions(chain, chain.follow(element))
    while True:
        element = _skip_conversions(chain, element)
        dim = next(dim for dim, entry in enumerate(element.index) if any(digit.axis is j for digit in entry))
        sink = resolve(Access(element.node, replaced(element.index, dim, constant(j.size, j.size + 1))))
        scores = chain.follow(element)
        if scores.node is not sink.node:
            if any(axis is j for axis in scores.leaves()):
                chain.sink = sink
                return _skip_conversions(chain, scores)
            raise Refusal(f"{scores.node} is not a score of each key")
        element = _unshifted(chain, scores, dim)


def _unshifted(chain: _Chain, element: Access, dim: int) -> Access:
    """``x`` for an element of ``x - largest(x)``: a difference that is the same for all scores changes no softmax."""
    node = element.node
    scores, largest = inputs(node)[:2] if is_call(node, aten.sub.Tensor) and not node.kwargs else (None, None)
    values = _peel(largest, aten.amax.default)
    if is_call(largest, operator.getitem) and inputs(largest)[1] == 0:
        reduction = inputs(largest)[0]
        values = _peel(reduction, aten.max.dim)
        chain.nodes.append(reduction)
    if values is None or values is not scores or not known(shape(largest)[dim] == 1):
        raise Refusal(f"{node} is among the scores of a softmax that has one more of them than there are keys")
    chain.nodes.extend((node, largest))
    return Access(scores, element.index)


def _safe_softmax(chain: _Chain, element: Access, j: Axis) -> Access:
    """``where(not any(s != -inf), 0, softmax(s))``, which gives 0 to a query that sees no key."""
    condition, zeros, inner = inputs(element.node)
    any_finite = _peel(condition, aten.logical_not.default)
    is_finite = _peel(any_finite, aten.any.dim)
    is_infinite = _peel(is_finite, aten.logical_not.default)
    compared = _peel(is_infinite, aten.eq.Scalar)
    scores = _peel(_peel(_peel(inner, aten.div.Tensor), aten.exp.default), aten.sub.Tensor)
    filled = evaluate(Access(zeros, element.index)) if isinstance(zeros, Node) else None
    is_zero = isinstance(filled, Affine) and not filled.terms and filled.constant == 0
    if any_finite is None or is_finite is None or is_infinite is None or compared is None:
        raise Refusal(f"{element.node.target} between the softmax and the values")
    if not is_zero or compared is not scores or inputs(is_infinite)[1] != -math.inf:
        raise Refusal(f"{element.node} replaces more than the rows without a key")
    _over_sink(element, arguments(any_finite)["dim"], j)
    chain.nodes.extend((element.node, condition, any_finite, is_finite, is_infinite))
    chain.safe = True
    return Access(inner, element.index)


def _peel(node: Any, target: Any) -> Node | None:
    """The first input of a call to ``target``; None if the node is none."""
    inner = inputs(node)[0] if is_call(node, target) else None
    return inner if isinstance(inner, Node) else None


def _unmask(chain: _Chain, element: Access) -> Access:
    """From the input of the softmax to the product of q and k: masks are collected, scales multiplied."""
    while element.node.target != aten.bmm.default:
        node, args = element.node, inputs(element.node)
        if node.target in CONVERSIONS:
            if not value(args[0]).dtype.is_floating_point:
                raise Refusal(f"{node} converts scores from {name_of(value(args[0]).dtype)}")
            element = _skip_conversions(chain, element)
            continue
        if node.target in PRODUCTS or node.target in QUOTIENTS:
            factor = _number(args[1])
            chain.scale = chain.scale / factor if node.target in QUOTIENTS else chain.scale * factor
            side = args[0]
        elif node.target == aten.tanh.default:
            _cap(chain, node)
            side = args[0]
        elif node.target == aten.add.Tensor and not node.kwargs:
            _mask_comes_last(chain, node)
            side = _scores_side(node)
            chain.masks.append(mask_that_is_added(element, args[1] if side is args[0] else args[0]))
        elif node.target == aten.where.self:
            _mask_comes_last(chain, node)
            side = _scores_side(node)
            chain.masks.append(mask_of_choice(element, side))
        else:
            raise Refusal(f"{node.target} between the scores and the softmax")
        require_shape(side, shape(node))
        chain.nodes.append(node)
        element = chain.follow(Access(side, element.index))
    return element


def _cap(chain: _Chain, node: Node) -> None:
    """``outer * tanh(inner * score)`` is ``softcap * tanh(scale * score / softcap)``, tanh being odd."""
    if chain.softcap:
        raise Refusal(f"scores are capped twice, at {node}")
    check_scale(chain.scale)
    chain.softcap = abs(chain.scale)


def _mask_comes_last(chain: _Chain, node: Node) -> None:
    if chain.softcap:
        raise Refusal(f"the mask at {node} is capped with the scores")
    if chain.scale != 1.0:
        raise Refusal(f"the scale {chain.scale} is applied to the mask too, at {node}")


def _scores_side(node: Node) -> Node:
    """The operand that leads to a product of matrices; the others are masks."""
    sides = [arg for arg in inputs(node) if isinstance(arg, Node) and _comes_from_product(arg)]
    if len(sides) != 1:
        raise Refusal(f"{node} does not combine scores with one mask")
    return sides[0]


def _comes_from_product(node: Node, steps: int = 24) -> bool:
    frontier = [node]
    for _ in range(steps):
        if not frontier:
            return False
        node = frontier.pop()
        if node.target == aten.bmm.default:
            return True
        if node.op == "call_function":
            frontier.extend(arg for arg in node.all_input_nodes if is_float(arg))
    return False


def _number(argument: Any) -> float:
    if not isinstance(argument, (int, float)) or isinstance(argument, bool) or argument == 0:
        raise Refusal(f"the scale {argument} is not a constant")
    return float(argument)


def _product_of_scores(chain: _Chain, element: Access, j: Axis) -> tuple[Access, Access, Axis]:
    """q and k of a product whose columns (or rows) are the keys."""
    chain.nodes.append(element.node)
    left, right = inputs(element.node)
    e = Axis("e", shape(left)[2])
    batch, row, column = (element.entry(dim) for dim in range(3))
    if _is(column, j):
        return Access(left, (batch, row, whole(e))), Access(right, (batch, whole(e), column)), e
    if _is(row, j):
        return Access(right, (batch, whole(e), column)), Access(left, (batch, row, whole(e))), e
    raise Refusal(f"{element.node} is not a product of queries and keys")


def _unscale(element: Access) -> tuple[Access, float]:
    """The element without the constants it is multiplied by, and their product."""
    scale, element = 1.0, resolve(element)
    while element.node.target in PRODUCTS and isinstance(inputs(element.node)[1], (int, float)):
        source, factor = inputs(element.node)
        scale, element = scale * _number(factor), resolve(Access(source, element.index))
    return element, scale


def _check_users(chain: _Chain, product: Node) -> None:
    """Nothing between q k^T and the product with v is used elsewhere, so that all of it goes away."""
    inside = set(chain.nodes)
    for node in chain.nodes:
        outside = [user for user in node.users if user not in inside and (user.users or user.op == "output")]
        if node is not product and outside:
            raise Refusal(f"{node}, a part of it, has another use: {outside[0]}")
