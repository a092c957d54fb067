"""Which element of which tensor an element of a node is: the data movement of a graph, undone.

A rewrite must know that ``K[b, h, j, e]`` is ``cache[b, h // 4, j, e]``, whatever views, expansions, copies,
concatenations and slices a model wrote to say so. Patterns of nodes cannot know it: every model and every version of
torch moves data in another way. `resolve` follows one symbolic element backwards through whatever only moves data, and
stops at the node that computed it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.fx import Node

from lowering.passes.axes import Access, Digit, Entry, Index, constant, cut_digits, replaced
from lowering.passes.graph import Size, arguments, aten, inputs, known, prims, shape, value


def resolve(start: Access) -> Access:
    """The element that ``start`` is a copy of, in the node that computed it."""
    current = start
    while (step := STEPS.get(current.node.target)) is not None:
        moved = step(current)
        if moved is None:
            break
        current = moved
    return current


# Steps: an element of a node that moves data to the same element of one of its inputs, or None where it cannot be said.


def _same(element: Access) -> Access | None:
    (source, *_) = inputs(element.node)
    same_dtype = value(source).dtype == element.node.meta["val"].dtype
    return Access(source, element.index) if same_dtype else None


def _copy(element: Access) -> Access | None:
    source = inputs(element.node)[1]
    return broadcast(element, source) if value(source).dtype == element.node.meta["val"].dtype else None


def _expand(element: Access) -> Access:
    return broadcast(element, inputs(element.node)[0])


def broadcast(element: Access, source: Any) -> Access:
    """The element of a tensor that is broadcast. ``source`` may have fewer dimensions than the element, or size 1."""
    sizes = shape(source)
    index = element.index[len(element.index) - len(sizes) :]
    return Access(source, tuple(() if known(n == 1) else entry for n, entry in zip(sizes, index, strict=True)))


def _permute(element: Access) -> Access:
    source, order = inputs(element.node)
    return _permuted(element, source, [dim % len(order) for dim in order])


def _transpose(element: Access) -> Access:
    source, first, second = inputs(element.node)
    order = list(range(len(element.index)))
    order[first], order[second] = order[second], order[first]
    return _permuted(element, source, order)


def _t(element: Access) -> Access:
    return Access(inputs(element.node)[0], element.index[::-1])


def _permuted(element: Access, source: Any, order: list[int]) -> Access:
    return Access(source, tuple(element.index[order.index(dim)] for dim in range(len(order))))


def _unsqueeze(element: Access) -> Access:
    source, dim = inputs(element.node)
    dim %= len(element.index)
    return Access(source, element.index[:dim] + element.index[dim + 1 :])


def _view(element: Access) -> Access | None:
    source = inputs(element.node)[0]
    digits = [digit for entry in element.index for digit in cut_digits(entry)]
    index = regroup(digits, shape(source))
    return None if index is None else Access(source, index)


def regroup(digits: list[Digit], sizes: list[Size]) -> Index | None:
    """Distribute digits over dimensions of other sizes; cuts axes where a dimension ends within a digit."""
    digits = [digit for digit in digits if not known(digit.size == 1)]
    index: list[Entry] = []
    for size in sizes:
        entry: list[Digit] = []
        product: Size = 1
        while not known(product == size):
            if not digits:
                return None
            digit = digits.pop(0)
            if _divides(product * digit.size, size):
                entry.append(digit)
                product = product * digit.size
                continue
            if not (_divides(product, size) and digit.axis and digit.whole and _divides(size // product, digit.size)):
                return None
            # With symbolic sizes, that a dimension is full may show in the quotient alone.
            full = known(size // product == 1)
            if full or known(size // product == digit.size):
                digits = [digit, *digits] if full else digits
                entry += [] if full else [digit]
                product = size
                continue
            digits = [Digit(part, 0, part.size) for part in digit.axis.cut(size // product)] + digits
        index.append(tuple(entry))
    return None if digits else tuple(index)


def _divides(divisor: Size, number: Size) -> bool:
    return known(divisor == number) or (known(divisor > 0) and known(number % divisor == 0))


def _squeeze(element: Access) -> Access:
    source = inputs(element.node)[0]
    rank = len(shape(source))
    if len(inputs(element.node)) > 1:
        dims: Any = inputs(element.node)[1]
        removed = {dim % rank for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
        removed = {dim for dim in removed if known(shape(source)[dim] == 1)}
    else:
        removed = {dim for dim, n in enumerate(shape(source)) if known(n == 1)}
    entries = iter(element.index)
    return Access(source, tuple(() if dim in removed else next(entries) for dim in range(rank)))


def _slice(element: Access) -> Access | None:
    bound = arguments(element.node)
    start = slice_start(bound["start"], shape(bound["self"])[bound["dim"]])
    if bound["step"] != 1 or start is None:
        return None
    return _shift(element, bound["self"], bound["dim"], start)


def slice_start(start: Any, size: Size) -> Size | None:
    """The first element of a slice, as Python counts it: from the end where negative, and within the dimension.

    None where symbolic sizes leave it open.
    """
    first = _from_the_front(0 if start is None else value(start), size)
    if first is None:
        return None
    for bound, beyond in ((0, first <= 0), (size, first >= size)):
        if known(beyond):
            return bound
    return first if known(first >= 0) and known(first <= size) else None


def _from_the_front(place: Size, size: Size) -> Size | None:
    if known(place < 0):
        return place + size
    return place if known(place >= 0) else None


def _shift(element: Access, source: Any, dim: int, start: Size) -> Access | None:
    """The element of ``source``, whose dimension ``dim`` the element's node has from ``start`` on."""
    dim %= len(element.index)
    size = shape(source)[dim]
    entry = cut_digits(element.index[dim])
    if not entry:
        moved: Entry = constant(start, size)
    elif len(entry) == 1:
        moved = (entry[0].within(-start, size),)
    elif known(start == 0) and known(size == shape(element.node)[dim]):
        moved = entry
    else:
        return None
    return Access(source, replaced(element.index, dim, moved))


def _select(element: Access) -> Access | None:
    source, dim, place = inputs(element.node)
    dim %= len(shape(source))
    first = _from_the_front(value(place), shape(source)[dim])
    if first is None:
        return None
    entry = constant(first, shape(source)[dim])
    return Access(source, (*element.index[:dim], entry, *element.index[dim:]))


def _getitem(element: Access) -> Access | None:
    split, position = inputs(element.node)
    if not isinstance(split, Node) or split.target not in (aten.split_with_sizes.default, aten.split.Tensor):
        return None
    bound = arguments(split)
    parts = [part.shape[bound["dim"]] for part in split.meta["val"]]
    return _shift(element, bound["self"], bound["dim"], sum(parts[:position]))


class Piece(NamedTuple):
    """A part of a dimension that comes from a tensor of its own."""

    start: Size
    size: Size
    source: Node
    source_start: Size  # where the part begins in the source


def pieces(node: Node) -> tuple[int, list[Piece]] | None:
    """The dimension in which a node puts tensors of its own type together, and its parts in order."""
    if node.target == aten.cat.default:
        bound = arguments(node)
        if any(value(source).dtype != value(node).dtype for source in bound["tensors"]):
            return None
        dim = bound["dim"] % len(shape(node))
        parts: list[Piece] = []
        stop: Size = 0
        for source in bound["tensors"]:
            if len(shape(source)) != len(shape(node)):  # an empty tensor, which cat skips
                return None
            parts.append(Piece(stop, shape(source)[dim], source, 0))
            stop += shape(source)[dim]
        return dim, parts
    if node.target == aten.slice_scatter.default:
        bound = arguments(node)
        dim, (base, source) = bound["dim"] % len(shape(node)), (bound["self"], bound["src"])
        size, width = shape(base)[dim], shape(source)[dim]
        start = slice_start(bound["start"], size)
        if bound["step"] != 1 or start is None or value(base).dtype != value(source).dtype:
            return None
        stop = start + width
        parts = [Piece(0, start, base, 0), Piece(start, width, source, 0), Piece(stop, size - stop, base, stop)]
        return dim, [part for part in parts if not known(part.size == 0)]
    return None


def _joined(element: Access) -> Access | None:
    joined = pieces(element.node)
    if joined is None:
        return None
    dim, parts = joined
    entry = element.entry(dim)
    if len(entry) > 1:
        return None
    for part in parts:
        first, stop = (entry[0].offset, entry[0].stop) if entry else (0, 1)
        if known(part.start <= first) and known(stop <= part.start + part.size):
            inner = shape(part.source)[dim]
            digit = entry[0] if entry else Digit(None, 0, 1)
            moved = () if known(inner == 1) else (digit.within(part.start - part.source_start, inner),)
            return Access(part.source, replaced(element.index, dim, moved))
    return None


STEPS: dict[Any, Callable[[Access], Access | None]] = {
    aten.alias.default: _same,
    aten.clone.default: _same,
    aten.detach.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.contiguous.default: _same,
    aten._to_copy.default: _same,
    prims.convert_element_type.default: _same,
    aten.copy.default: _copy,
    aten.expand.default: _expand,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _t,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    operator.getitem: _getitem,
    aten.cat.default: _joined,
    aten.slice_scatter.default: _joined,
}
