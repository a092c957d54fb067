"""Work behind a product that can be computed with it: a gate ``silu(gate) * up``, and a residual."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Node

from lowering.passes.axes import Access, Axis, access
from lowering.passes.elements import resolve
from lowering.passes.graph import CONVERSIONS, VIEWS, aten, inputs, known, shape

#: Operators that keep every element and their order.
RESHAPES = (*VIEWS, aten.reshape.default)


class Residual(NamedTuple):
    """``result`` is the product, in some shape, plus ``added``."""

    result: Node
    added: Node


def residual_of(node: Node) -> Residual | None:
    """The addition that is the only use of a product, to a tensor of the same shape and type."""
    if (found := addition_behind(node)) is None:
        return None
    user, node, added = found
    return Residual(user, added) if _alike(added, node) else None


def addition_behind(node: Node) -> tuple[Node, Node, Node] | None:
    """The addition that is the only use of a result, behind views: it, the last of these, and what it is added to."""
    while (user := only_user(node)) is not None and user.target in RESHAPES:
        node = user
    if user is None or user.target != aten.add.Tensor or user.kwargs or len(inputs(user)) != 2:
        return None
    left, right = inputs(user)
    added = right if left is node else left
    return None if added is node or not isinstance(added, Node) else (user, node, added)


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _alike(one: Node, other: Node) -> bool:
    a, b = one.meta.get("val"), other.meta["val"]
    if not isinstance(a, torch.Tensor) or a.dtype != b.dtype or a.dim() != b.dim():
        return False
    return all(known(n == m) for n, m in zip(a.shape, b.shape, strict=True))


def gate_of(product: Node) -> Node | None:
    """``silu(p[:, :n]) * p[:, n:]`` of a product ``p [m, 2 n]`` that has no other use; None if nothing is."""
    seen, frontier = {product}, [product]
    found: Node | None = None
    while frontier:
        node = frontier.pop(0)
        if node.op == "output" or len(seen) > 24:
            return None
        if node.target == aten.mul.Tensor and found in (None, node) and _is_gated(node, product):
            found = node
            continue
        frontier += [user for user in node.users if user not in seen]
        seen.update(node.users)
    return found


def _is_gated(node: Node, product: Node) -> bool:
    if len(inputs(node)) != 2 or not all(isinstance(x, Node) and _alike(x, node) for x in inputs(node)):
        return False
    if node.meta["val"].dtype != product.meta["val"].dtype:
        return False
    *rows, column = (Axis(f"d{dim}", size) for dim, size in enumerate(shape(node)))
    left, right = (access(x, [*rows, column]) for x in inputs(node))
    return any(_are_halves(product, rows, column, *pair) for pair in ((left, right), (right, left)))


def _are_halves(product: Node, rows: list[Axis], column: Axis, activated: Access, up: Access) -> bool:
    gate = _silu_input(activated)
    if gate is None:
        return False
    n = column.size
    leaves = [leaf for axis in rows for leaf in axis.leaves()]
    for element, start in ((resolve(gate), 0), (resolve(up), n)):
        if element.node is not product or not known(shape(product)[1] == 2 * n):
            return False
        row, digits = element.entry(0), element.entry(1)
        if [digit.axis for digit in row] != leaves or not all(digit.whole for digit in row):
            return False
        if len(digits) != 1 or digits[0].axis is not column or not known(digits[0].offset == start):
            return False
    return True


def _silu_input(element: Access) -> Access | None:
    """x where the element is ``x / (1 + exp(-x))``, in the type of x or a wider one."""
    node = _widened(resolve(element).node)
    if node.target != aten.div.Tensor:
        return None
    x, denominator = inputs(node)
    exponential = _operand(denominator, aten.add.Tensor, other=1)
    negative = _operand(exponential, aten.exp.default)
    if not isinstance(x, Node) or _operand(negative, aten.neg.default) is not x:
        return None
    return Access(_widened(x), resolve(element).index)


def _widened(node: Node) -> Node:
    """The node before a conversion between floating types, which rounds at most."""
    if node.target in CONVERSIONS and inputs(node)[0].meta["val"].dtype.is_floating_point:
        return inputs(node)[0]  # type: ignore[no-any-return]
    return node


def _operand(node: Any, target: Any, other: Any = None) -> Node | None:
    """The tensor that a call to ``target`` is made with; None if the node is none, or its other operand another."""
    if not isinstance(node, Node) or node.target != target or node.kwargs:
        return None
    first, *rest = inputs(node)
    return first if rest == ([] if other is None else [other]) else None
