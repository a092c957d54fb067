"""`gemm` and `bmm` in Inductor: calls that write into memory that Inductor planned, and where `cat` wants them.

Absorbed queries are put together from a product by head and a rotary part. Inductor lets pointwise pieces of a `cat`
write into their slices of its result; here the same is done for a product, whatever views lie between the two, so that
no row of a query is copied.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import sympy
import torch
from torch._inductor import ir
from torch._inductor.ir import TensorBox
from torch._inductor.virtualized import V
from torch.fx import Node

from flashmla_ops.panels import PANEL
from lowering import versions
from lowering.ops import choose, choose_product
from lowering.passes.axes import Access, Axis, Entry, access
from lowering.passes.elements import resolve
from lowering.passes.graph import inputs, shape
from lowering.passes.products import FROM_ATEN
from lowering.session import session

flashmla, aten = torch.ops.flashmla, torch.ops.aten
PRODUCTS = (flashmla.gemm.default, flashmla.bmm.default)
PATTERN, CHOICE, TIMED = "product written in place", "product of the library", "product timed"


class ProductOut(ir.ExternKernelOut):
    """A call of an ``.out`` overload. ``names``: of the inputs from the third on."""

    names: tuple[str, ...] = ()

    def codegen_args(self) -> list[str]:
        given: list[str] = super().codegen_args()
        named = [f"{name}={value}" for name, value in zip(self.names, given[2:], strict=True)]
        return [*given[:2], *named]


def install() -> None:
    choose_product.install()
    versions.enter_lowering(flashmla.gemm.default, lower_gemm)
    versions.enter_lowering(flashmla.bmm.default, lower_bmm)
    versions.enter_lowering(aten.cat.default, lower_cat)
    versions.enter_lowering(aten.clone.default, lower_clone)


def lower_bmm(a: TensorBox, weight: TensorBox) -> TensorBox | None:
    if not _is_served(a):
        return None
    sizes = [*a.get_size()[:2], weight.get_size()[2]]
    return _call("bmm", a, weight, {}, sizes, a.get_dtype())


def lower_gemm(
    a: TensorBox,
    weight: TensorBox,
    bias: TensorBox | None = None,
    residual: TensorBox | None = None,
    weight_scale: TensorBox | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> TensorBox | None:
    if not _is_served(a):
        return None
    panels = len(weight.get_size()) == 3
    n = weight.get_size()[0] * (PANEL if panels else 1)
    sizes = [*a.get_size()[:-1], n // 2 if activation == "silu_mul" else n]
    optional = {"bias": bias, "residual": residual, "weight_scale": weight_scale}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    options: dict[str, Any] = {"activation": activation} if activation != "none" else {}
    options |= {"out_dtype": out_dtype} if out_dtype is not None else {}
    dtype = out_dtype or a.get_dtype()
    return _call("gemm", a, weight, given, sizes, dtype, **options)


def _is_served(a: TensorBox) -> bool:
    """Packages are called without Python, which calls these overloads."""
    current, device = session(), a.get_device_or_error()
    if current is None or device.type != "cpu":
        return False
    if V.graph.cpp_wrapper and _is_timed():
        current.lowered.refused(TIMED, V.graph.current_node, f"{choose.NO_PYTHON}; few rows decide, as with 'auto'")
    return not V.graph.cpp_wrapper


def _is_timed() -> bool:
    """A model's own call of `gemm` is not: it rounds once, and operators of ATen in its place would more often."""
    current, node = session(), V.graph.current_node
    asked = current is not None and current.settings.gemm == "autotune"
    return asked and (node.target == flashmla.bmm.default or FROM_ATEN in node.meta)


def _call(
    op: str,
    a: TensorBox,
    weight: TensorBox,
    given: dict[str, TensorBox],
    sizes: list[Any],
    dtype: torch.dtype,
    **options: Any,
) -> TensorBox:
    """The call; where it is timed, the faster of it and the operators in whose place it is."""
    inputs = [laid_out(tensor) for tensor in (a, weight, *given.values())]
    device, names = a.get_device_or_error(), tuple(given)

    def library() -> TensorBox:
        layout = ir.FlexibleLayout(device, dtype, sizes)
        product = ProductOut(layout, inputs, kwargs=options, python_kernel_name=f"torch.ops.flashmla.{op}.out")
        product.names = names
        box: TensorBox = TensorBox.create(product)
        return box

    current, node = session(), V.graph.current_node
    if current is None or not _is_timed():
        return library()
    replaced = partial(choose_product.lower_aten, op, a, weight, **options | given)
    fixed = ir.FixedLayout(device, dtype, sizes)
    box: Any = choose_product.fastest(op, inputs, fixed, library, replaced, names=names, **options)
    if isinstance(box.data.data, ProductOut):
        current.lowered.rewrote(CHOICE, node)
    else:
        current.lowered.refused(CHOICE, node, "the aten product was faster")
    return box  # type: ignore[no-any-return]


def laid_out(tensor: Any) -> Any:
    """The tensor in memory. Inductor has seen to its strides where they matter; else it lies in order, and stays so.

    A layout that is not fixed would follow later what its tensor is computed from.
    """
    realized = ir.ExternKernel.realize_input(tensor)
    if ir.is_storage_and_layout(realized):
        ir.as_storage_and_layout(realized, freeze=True)
    return realized


class Place(NamedTuple):
    """A product whose elements are all that a node is made of, by views alone: its buffer, and where they go."""

    product: ir.ExternKernelOut
    element: Access  # of the product, over the axes of the node
    axes: list[Axis]

    def layout(self, wanted: ir.Layout) -> ir.FixedLayout | None:
        """The product's layout where the node has the ``wanted`` one; None if axes merged in it lie apart there."""
        strides = dict(zip(self.axes, wanted.stride, strict=True))
        for entry in self.element.index:
            for outer, inner in pairwise(axes_of(entry)):
                size = wanted.size[self.axes.index(inner)]
                if not V.graph.sizevars.statically_known_equals(strides[outer], strides[inner] * size):
                    return None
        stride = [strides[axes_of(entry)[-1]] if entry else sympy.Integer(1) for entry in self.element.index]
        return ir.FixedLayout(wanted.device, wanted.dtype, self.product.get_size(), stride, wanted.offset)


def axes_of(entry: Entry) -> list[Axis]:
    return [digit.axis for digit in entry if digit.axis is not None]


def lower_cat(tensors: list[TensorBox], dim: int = 0) -> TensorBox | None:
    """A `cat` whose products are written where they belong; None: there are none, and Inductor's own follows."""
    current, node = session(), V.graph.current_node
    (pieces, *_) = inputs(node)
    if current is None or len({tensor.get_dtype() for tensor in tensors}) != 1 or len(pieces) != len(tensors):
        return None
    found = [_place(tensor, piece) for tensor, piece in zip(tensors, pieces, strict=True)]
    places = {id(tensor): place for tensor, place in zip(tensors, found, strict=True) if place is not None}
    if not places:
        return None

    placed = False

    class Concat(ir.ConcatKernel):
        @classmethod
        def realize_into(cls, src: Any, dst: Any, *aliasing: Any, **named: Any) -> Any:
            """A piece in its slice of the result. Where a piece is written to elsewhere, Inductor wants a copy."""
            place = places.get(id(src)) if versions.may_alias(*aliasing, **named) else None
            storage, wanted = ir.as_storage_and_layout(dst)
            layout = None if place is None else place.layout(wanted)
            if place is None or layout is None:
                return super().realize_into(src, dst, *aliasing, **named)
            nonlocal placed
            placed = True
            place.product.layout = ir.NonOwningLayout(ir.ReinterpretView(data=storage, layout=layout))
            return place.product

    out = TensorBox(Concat.create(tensors, dim % len(tensors[0].get_size())))
    if placed:
        current.lowered.rewrote(PATTERN, node)
    return out


def lower_clone(tensor: TensorBox, *, memory_format: torch.memory_format | None = None) -> TensorBox | None:
    """A copy that puts a product's dimensions in another order is where the product is written to begin with."""
    current, node = session(), V.graph.current_node
    if current is None or memory_format is not torch.contiguous_format:
        return None
    place = _place(tensor, inputs(node)[0])
    if place is None:
        return None
    wanted = ir.FixedLayout(tensor.get_device_or_error(), tensor.get_dtype(), tensor.get_size())
    layout = place.layout(wanted)
    if layout is None:
        return None
    place.product.layout = layout
    current.lowered.rewrote(PATTERN, node)
    return TensorBox(ir.ReinterpretView(data=ir.StorageBox(place.product), layout=wanted))


def _place(tensor: TensorBox, node: Node) -> Place | None:
    """How a product is laid out for ``node``; None if that is not made of one, or the product has other uses."""
    box = tensor.data.unwrap_view() if isinstance(tensor.data, ir.BaseView) else tensor.data
    product = box.data if isinstance(box, ir.StorageBox) else box
    if not isinstance(product, ir.ExternKernelOut) or isinstance(product.layout, ir.NonOwningLayout):
        return None
    axes = [Axis(f"d{i}", size) for i, size in enumerate(shape(node))]
    found = resolve(access(node, axes))
    if found.node.target not in PRODUCTS or not _is_only_use(found.node, node):
        return None
    if any(axis.parts is not None for axis in axes) or len(found.leaves()) != len([x for x in axes if x.leaves()]):
        return None
    if not all(digit.whole for entry in found.index for digit in entry):
        return None
    return Place(product, found, axes)


def _is_only_use(product: Node, piece: Node) -> bool:
    """Whether only the views between a product and ``piece`` read the product."""
    node = product
    while node is not piece:
        if len(node.users) != 1:
            return False
        node = next(iter(node.users))
    return len(piece.users) == 1
