"""Linear layers and products by head become `flashmla::gemm` and `flashmla::bmm`, which read each weight once.

With the few rows of a decode step a product is as fast as its weights come from memory, and torch's products of few
rows stay far below that. What stands around a product goes into it where it is proven to be its epilogue: bias,
residual, and the gate of ``silu(gate) * up`` where one weight holds both.

Products that share their input become one where their weights are constants of the graph, so that they are put together
when compiling. Weights that are arguments would have to be copied in every call, and stay apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from lowering import versions
from lowering.passes.attempt import attempt
from lowering.passes.axes import Access, Axis, access, whole
from lowering.passes.elements import resolve
from lowering.passes.epilogues import RESHAPES, gate_of, residual_of
from lowering.passes.graph import FLOATS, arguments, aten, flashmla, inputs, known, refuse_gradient, shape
from lowering.passes.integers import Scaled, find_scaled, int8_weight, refuse_groups, write_scale
from lowering.passes.writer import Writer, is_copied, viewable
from lowering.record import Record, Refusal

#: Rows that the small products serve in one pass over the weights; from there on torch's are as fast or faster.
MAX_ROWS = 32

#: Marks the calls of `flashmla::gemm` that a graph had as operators of ATen, in their ``meta``.
FROM_ATEN = "flashmla_from_aten"

LINEAR, BY_HEAD, SHARED = "linear", "product by head", "products of one input"


@dataclass(frozen=True)
class Product:
    """``node`` is ``a [m, k]`` times ``right [k, n]``, the transpose of a weight, plus ``bias [n]``.

    ``weight``: the node that puts it together from the weights of several products, if any does. ``scaled``: what a
    product with a weight of integers is multiplied by.
    """

    node: Node
    right: Node
    bias: Node | None = None
    weight: Node | None = None
    scaled: Scaled | None = None

    @property
    def last(self) -> Node:
        """The node that the product's call takes the place of, before its gate and residual."""
        return self.node if self.scaled is None else self.scaled.last

    @property
    def a(self) -> Node:
        """The left operand as it is now: the product that computes it may have been replaced."""
        left: Node = arguments(self.node)["mat1" if self.node.target == aten.addmm.default else "self"]
        return left

    def write_weight(self, writer: Writer) -> Node:
        """A view ``[n, k]`` of the weight. Raises `Refusal` if the product does not read it by rows."""
        if self.weight is not None:
            return self.weight
        if self.scaled is not None:
            element, k, n = self.scaled.weight
        else:
            k, n = (Axis(name, size) for name, size in zip("kn", shape(self.right), strict=True))
            element = Access(self.right, (whole(k), whole(n)))
        weight = _view_of_weight(writer, element, [[n], [k]])
        if not known(weight.meta["val"].stride(1) == 1) and not known(k.size == 1):
            raise Refusal("the weight lies along its columns: [k, n], not [n, k]")
        return weight


def serve_products(graph: torch.fx.Graph, record: Record) -> None:
    """Let `flashmla::gemm` and `flashmla::bmm` compute the products with few rows whose right side is a weight."""
    if record.settings.gemm is False:
        return
    writer = Writer(graph)
    linear: list[Product] = []
    for node in list(graph.nodes):
        if node.target in (aten.mm.default, aten.addmm.default):
            attempt(writer, record, LINEAR, node, partial(_find_linear, writer, record, node, linear))
    for product in _joined(linear, record, writer):
        attempt(writer, record, LINEAR, product.node, partial(_write_linear, writer, product))
    for node in list(graph.nodes):
        if node.target == aten.bmm.default:
            attempt(writer, record, BY_HEAD, node, partial(_write_by_head, writer, record, node))


def _require_served(record: Record, node: Node) -> None:
    refuse_gradient(node.graph)
    timed = record.settings.gemm == "autotune" and versions.generates_python()
    _require_few_rows(node, always=timed or record.settings.gemm is True)


def _require_few_rows(node: Node, *, always: bool) -> None:
    out = node.meta["val"]
    if out.device.type != "cpu":
        raise Refusal(f"measured on the CPU only, the product is on {out.device}")
    if out.dtype not in FLOATS:
        raise Refusal(f"{str(out.dtype).removeprefix('torch.')} is not a type of the operators")
    if any(known(size == 0) for size in (*shape(node), shape(node.all_input_nodes[-1])[-2])):
        raise Refusal(f"a product with a size of 0: {shape(node)}")
    rows = out.shape[-2]
    traced = rows if isinstance(rows, int) else rows.node.hint if rows.node.has_hint() else None
    if traced is None or (traced > MAX_ROWS and not always):
        raise Refusal(f"{rows} rows: with more than {MAX_ROWS}, torch's product is as fast")


def _find_linear(writer: Writer, record: Record, node: Node, found: list[Product]) -> None:
    """Add the product to those found. Raises `Refusal` unless it is served; what is written to see it is undone."""
    _require_served(record, node)
    bound = arguments(node)
    if node.target == aten.mm.default and (integers := int8_weight(bound["mat2"])) is not None:
        scaled = find_scaled(node, integers)
        product = Product(node, bound["mat2"], scaled.bias, scaled=scaled)
    elif node.target == aten.mm.default:
        product = Product(node, bound["mat2"])
    else:
        product = Product(node, bound["mat2"], bound["self"])
        _require_bias(product, bound["alpha"], bound["beta"])
    if product.scaled is None:
        refuse_groups(product.right)
    writer.before = node
    product.write_weight(writer)
    if product.scaled is not None:
        write_scale(writer, product.scaled)
    found.append(product)


def _require_bias(product: Product, alpha: Any, beta: Any) -> None:
    bias = product.bias
    assert bias is not None
    if alpha != 1 or beta != 1:
        raise Refusal(f"a product scaled by {alpha} and a bias by {beta}")
    if len(shape(bias)) != 1 or not known(shape(bias)[0] == shape(product.node)[1]):
        raise Refusal(f"a bias of shape {shape(bias)}, not one number for each column")
    if not known(bias.meta["val"].stride(0) == 1):
        raise Refusal("the bias is not contiguous")


def _write_by_head(writer: Writer, record: Record, node: Node) -> str:
    _require_served(record, node)
    a, right = inputs(node)
    writer.before = node
    h, k, n = (Axis(name, size) for name, size in zip("hkn", shape(right), strict=True))
    weight = _view_of_weight(writer, Access(right, (whole(h), whole(k), whole(n))), [[h], [k], [n]])
    strides = weight.meta["val"].stride()
    if not known(strides[1] == 1) and not known(strides[2] == 1):
        raise Refusal("the weight of a head has no contiguous dimension")
    writer.replace(node, writer.call(flashmla.bmm.default, a, weight))
    return f"{BY_HEAD} -> flashmla::bmm"


def _view_of_weight(writer: Writer, element: Access, groups: list[list[Axis]]) -> Node:
    """A tensor of a graph's inputs or constants seen as ``groups``. Raises `Refusal` if it would take a copy."""
    found = resolve(element)
    if found.node.op not in ("placeholder", "get_attr"):
        raise Refusal(f"the right side is {found.node}, which is computed, and no weight")
    wanted = [axis for group in groups for axis in group]
    if any(axis.parts is not None for axis in wanted):
        raise Refusal(f"{found.node} has a matrix for each sequence and head, or so: it is data, and no weight")
    if len(found.leaves()) != len([axis for axis in wanted if axis.leaves()]):
        raise Refusal(f"the weight {found.node} is expanded: it is the same for several heads, rows or columns")
    view = writer.lay_out(found, groups)
    if is_copied(view, found.node):
        raise Refusal(f"the weight {found.node} would be copied")
    return view


def _joined(products: list[Product], record: Record, writer: Writer) -> list[Product]:
    """The products, with those of one input put together where their weights are constants."""
    by_input: dict[Node, list[Product]] = {}
    for product in products:
        by_input.setdefault(_source(product.a), []).append(product)
    frozen = versions.frozen_inputs(writer.graph)
    served: list[Product] = []
    for group in by_input.values():
        reason = _why_apart(group, frozen)
        nodes = ", ".join(str(product.node) for product in group)
        if len(group) > 1 and reason:
            record.refused(SHARED, nodes, reason)
        together: list[Product] = []
        if not reason:
            attempt(writer, record, SHARED, nodes, partial(_put_together, writer, group, together))
        served += together or group
    return served


def _source(a: Node) -> Node:
    """The tensor that a matrix ``[m, k]`` is a view of: views keep the order of the elements."""
    while a.target in RESHAPES:
        a = inputs(a)[0]
    return a


def _why_apart(group: list[Product], frozen: set[Node]) -> str:
    """Why products of one input are not put together; empty if they are."""
    if len(group) == 1:
        return "alone"
    if any(known(shape(product.a)[1] != shape(group[0].a)[1]) for product in group):
        return "they read their input in rows of different lengths"
    if any(product.bias is not None for product in group):
        return "one of them has a bias"
    if any(product.scaled is not None for product in group):
        return "one of them has a weight of integers"
    if not all(_root(product.right) in frozen for product in group):
        return "the weights are arguments, which it would copy in every call: set torch._inductor.config.freezing"
    return ""


def _root(right: Node) -> Node:
    """The input of the graph that is read."""
    return resolve(access(right, [Axis(name, size) for name, size in zip("kn", shape(right), strict=True)])).node


def _put_together(writer: Writer, group: list[Product], together: list[Product]) -> str:
    """One product with the weights of all, which become one constant, and slices of its result."""
    first = min(product.node for product in group)
    a = next(product.a for product in group if product.node is first)
    writer.before = first
    weight = writer.call(aten.cat.default, [product.write_weight(writer) for product in group], 0)
    right = writer.call(aten.permute.default, weight, [1, 0])
    product = writer.call(aten.mm.default, a, right)
    slices, start = [], 0
    for each in group:
        stop = start + shape(each.node)[1]
        writer.before = each.node
        slices.append(writer.call(aten.slice.Tensor, product, 1, start, stop))
        start = stop
    for each, part in zip(group, slices, strict=True):
        writer.replace(each.node, part)
    together.append(Product(product, right, weight=weight))
    return f"{SHARED} -> one product"


def _write_linear(writer: Writer, product: Product) -> str:
    """One call for the product and its epilogue."""
    parts, last, activation = ["linear" if product.scaled is None else "int8 linear"], product.last, "none"
    if len(shape(last)) == 2 and (gated := gate_of(last)) is not None:
        parts.append("silu * up")
        last, activation = gated, "silu_mul"
    m, n = shape(product.node)[0], shape(last)[-1]
    residual = residual_of(last)
    if residual is not None and viewable(residual.added, [m, n]):
        parts.append("residual")
        last = residual.result
    else:
        residual = None
    writer.before = last
    added = None if residual is None else writer.view(residual.added, [m, n])
    weight = product.write_weight(writer)
    scale = None if product.scaled is None else write_scale(writer, product.scaled)
    out = writer.call(flashmla.gemm.default, product.a, weight, product.bias, added, scale, activation)
    # What is timed against operators of ATen: they have no product with integers.
    if scale is None:
        out.meta[FROM_ATEN] = True
    writer.replace(last, writer.view(out, shape(last)))
    return f"{' + '.join(parts)} -> flashmla::gemm"
