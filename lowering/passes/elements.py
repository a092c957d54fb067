"""Which element of which tensor an element of a node is: the data movement of a graph, undone.

A rewrite must know that ``K[b, h, j, e]`` is ``cache[b, h // 4, j, e]``, whatever views, expansions, copies,
concatenations and slices a model wrote to say so. Patterns of nodes cannot know it: every model and every version of
torch moves data in another way. `resolve` follows one symbolic element backwards through whatever only moves data, and
stops at the node that computed it.

An index has one entry for each dimension, and an entry is a number in mixed radix: its digits, most significant first.
``view([2, 4, n])`` to ``view([8, n])`` then only regroups digits, and a digit that a view cuts in two cuts its axis
everywhere. A dimension of size 1 has no digits, and neither has an axis of size 1: its value is 0.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten, prims = torch.ops.aten, torch.ops.prims

#: An int or a torch.SymInt, whose operators have no types.
Size: TypeAlias = Any


def known(condition: Any) -> bool:
    """Whether a condition on sizes holds for every size the graph accepts. Adds no guard."""
    return condition if isinstance(condition, bool) else statically_known_true(condition)


@dataclass(eq=False)
class Axis:
    """A free index with values in [0, size). ``parts``: the axes it was cut into, as ``high * low.size + low``."""

    name: str
    size: Size
    parts: tuple[Axis, Axis] | None = None

    def leaves(self) -> list[Axis]:
        """The axes it was cut into, or itself; none if its size is 1."""
        if self.parts is not None:
            return [leaf for part in self.parts for leaf in part.leaves()]
        return [] if known(self.size == 1) else [self]

    def cut(self, high: Size) -> tuple[Axis, Axis]:
        if self.parts is None:
            self.parts = Axis(f"{self.name}0", high), Axis(f"{self.name}1", self.size // high)
        return self.parts

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Digit:
    """``axis + offset``, or ``offset`` where axis is None; less than ``size``."""

    axis: Axis | None
    offset: Size
    size: Size

    @property
    def whole(self) -> bool:
        """Whether the digit is its axis, and runs over all of its values."""
        return self.axis is not None and known(self.offset == 0) and known(self.size == self.axis.size)

    @property
    def stop(self) -> Size:
        """One more than the digit's largest value."""
        return self.offset + (1 if self.axis is None else self.axis.size)

    def within(self, start: Size, size: Size) -> Digit:
        """The same element in a dimension of ``size`` that begins at ``start`` of this digit's dimension."""
        return Digit(self.axis, self.offset - start, size)


Entry: TypeAlias = tuple[Digit, ...]
Index: TypeAlias = tuple[Entry, ...]


@dataclass(frozen=True, eq=False)
class Access:
    """One symbolic element of a node."""

    node: Node
    index: Index

    def leaves(self) -> list[Axis]:
        """The axes that the element depends on."""
        return [leaf for entry in self.index for digit in entry if digit.axis for leaf in digit.axis.leaves()]

    def entry(self, dim: int) -> Entry:
        return cut_digits(self.index[dim])


def whole(axis: Axis) -> Entry:
    """The entry of a dimension that an axis runs over."""
    return () if known(axis.size == 1) else (Digit(axis, 0, axis.size),)


def access(node: Node, axes: Sequence[Axis]) -> Access:
    return Access(node, tuple(whole(axis) for axis in axes))


def constant(value: Size, size: Size) -> Entry:
    return () if known(size == 1) else (Digit(None, value, size),)


def cut_digits(entry: Entry) -> Entry:
    """The entry with a digit for each leaf of an axis that was cut since."""
    digits: list[Digit] = []
    for digit in entry:
        if digit.axis is not None and digit.axis.parts is not None and digit.whole:
            digits.extend(Digit(leaf, 0, leaf.size) for leaf in digit.axis.leaves())
        else:
            digits.append(digit)
    return tuple(digits)


def value(argument: Any) -> Any:
    """What an argument stands for while tracing: a node's fake tensor or symbolic size, or the argument itself."""
    return argument.meta.get("val") if isinstance(argument, Node) else argument


def inputs(node: Node) -> tuple[Any, ...]:
    """The positional arguments of a call."""
    return node.args


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call to an operator by name, with the defaults of its schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound = {}
    for position, argument in enumerate(node.target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        given = node.args[position] if position < len(node.args) else default
        bound[argument.name] = node.kwargs.get(argument.name, given)
    return bound


def shape(node: Node) -> list[Size]:
    return list(node.meta["val"].shape)


def sources(node: Node) -> list[Node]:
    """The tensors, inputs and constants of the graph, that a node is computed from."""
    seen, frontier = {node}, [node]
    while frontier:
        new = [source for source in frontier.pop().all_input_nodes if source not in seen]
        seen.update(new)
        frontier.extend(new)
    return [x for x in seen if x.op != "call_function" and isinstance(x.meta.get("val"), torch.Tensor)]


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
    return _broadcast(element, source) if value(source).dtype == element.node.meta["val"].dtype else None


def _expand(element: Access) -> Access:
    return _broadcast(element, inputs(element.node)[0])


def _broadcast(element: Access, source: Any) -> Access:
    """Of a tensor that is broadcast to the element's shape. ``source`` may have fewer dimensions, or size 1."""
    sizes = shape(source)
    index = element.index[len(element.index) - len(sizes) :]
    return Access(source, tuple(() if known(n == 1) else entry for n, entry in zip(sizes, index, strict=True)))


broadcast = _broadcast


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
    """Of a tensor whose dimension ``dim`` the element's node has from ``start`` on."""
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


def replaced(index: Index, dim: int, entry: Entry) -> Index:
    """The index with another entry for dimension ``dim``."""
    dim %= len(index)
    return (*index[:dim], entry, *index[dim + 1 :])


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
