"""Weights of integers: ``(a @ w.to(a.dtype)) * scale``, a scale for each row of w, which is how torchao writes int8.

`flashmla::gemm` takes such a weight as it lies, and its scale. It rounds once, where the graph rounds the scale, the
product and the scaled product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Node

from lowering.passes.axes import Access, Axis, whole
from lowering.passes.elements import resolve
from lowering.passes.epilogues import addition_behind, only_user
from lowering.passes.graph import CONVERSIONS, FLOATS, aten, inputs, known, name_of, prims, shape
from lowering.passes.writer import Writer
from lowering.record import Refusal

#: Nodes between an int8 weight and what it stands for: views, conversions, a zero point, a scale.
MOST_STEPS = 8


class Weight(NamedTuple):
    """An int8 tensor, as the right side ``[k, n]`` of a product sees it before it is converted."""

    element: Access
    k: Axis
    n: Axis


class Scaled(NamedTuple):
    """A product with an int8 weight, and what follows it."""

    weight: Weight
    scale: Access  # over the columns
    column: Axis
    last: Node  # [m, n], or with a bias in whichever shape the product has then
    bias: Node | None  # [n]


def int8_weight(right: Node) -> Weight | None:
    """The int8 tensor that the right side of a product is converted from; None if it is not."""
    k, n = (Axis(name, size) for name, size in zip("kn", shape(right), strict=True))
    found = resolve(Access(right, (whole(k), whole(n))))
    if found.node.target not in CONVERSIONS or inputs(found.node)[0].meta["val"].dtype != torch.int8:
        return None
    return Weight(Access(inputs(found.node)[0], found.index), k, n)


def refuse_groups(right: Node) -> None:
    """Raise `Refusal` for a weight ``[n, groups, group]`` that is scaled by group before the product."""
    node = right
    for _ in range(MOST_STEPS):
        if not node.all_input_nodes:
            break
        node = node.all_input_nodes[0]
        if isinstance(x := node.meta.get("val"), torch.Tensor) and x.dtype == torch.int8 and node.op != "call_function":
            raise Refusal(
                f"the weight {node} is scaled by group before the product: flashmla::gemm takes four bits in panels,"
                " which flashmla_ops.quant.quantize makes"
            )


def find_scaled(product: Node, weight: Weight) -> Scaled:
    """Raise `Refusal` unless the product is scaled by column, by an input of the graph, and not used otherwise."""
    scaled = only_user(product)
    if scaled is None or scaled.target != aten.mul.Tensor or len(inputs(scaled)) != 2:
        raise Refusal("an int8 weight whose product is not scaled next")
    left, other = inputs(scaled)
    scale = other if left is product else left
    column = Axis("n", shape(product)[1])
    if scaled.meta["val"].dtype != product.meta["val"].dtype:
        raise Refusal(f"an int8 weight whose product is scaled in {name_of(scaled.meta['val'].dtype)}")
    if not _is_vector(scale, column.size):
        raise Refusal(f"an int8 weight whose product is scaled by {scale}, which is no number for each column")
    found = resolve(Access(scale, (whole(column),)))
    if found.node.target in CONVERSIONS and inputs(found.node)[0].meta["val"].dtype in FLOATS:
        found = resolve(Access(inputs(found.node)[0], found.index))
    behind, bias = _with_bias(scaled, column.size)
    return Scaled(weight, found, column, behind, bias)


def write_scale(writer: Writer, scaled: Scaled) -> Node:
    """The scale as the operator takes it: ``[n]`` float32."""
    scale = writer.lay_out(scaled.scale, [[scaled.column]])
    if scale.meta["val"].dtype == torch.float32:
        return scale
    return writer.call(prims.convert_element_type.default, scale, torch.float32)


def _with_bias(scaled: Node, n: Any) -> tuple[Node, Node | None]:
    """The sum with one number for each column, where that is all that the scaled product is used for."""
    if (found := addition_behind(scaled)) is None:
        return scaled, None
    user, node, bias = found
    if not _is_vector(bias, n) or not known(shape(node)[-1] == n):
        return scaled, None
    value = bias.meta["val"]
    if value.dtype != node.meta["val"].dtype or not known(value.stride(0) == 1):
        return scaled, None
    return user, bias


def _is_vector(node: Any, n: Any) -> bool:
    tensor = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(tensor, torch.Tensor) and tensor.dim() == 1 and known(tensor.shape[0] == n)
