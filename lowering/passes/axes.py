"""Symbolic indices: axes, the digits of an entry, and one element of a node.

An index has one entry for each dimension, and an entry is a number in mixed radix: its digits, most significant first.
``view([2, 4, n])`` to ``view([8, n])`` then only regroups digits, and a digit that a view cuts in two cuts its axis
everywhere. A dimension of size 1 has no digits, and neither has an axis of size 1: its value is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch.fx import Node

from lowering.passes.graph import Size, known
from lowering.record import Refusal


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


def entry(axes: list[Axis]) -> Entry:
    return tuple(digit for axis in axes for digit in whole(axis))


def cut_digits(entry: Entry) -> Entry:
    """The entry with a digit for each leaf of an axis that was cut since."""
    digits: list[Digit] = []
    for digit in entry:
        if digit.axis is not None and digit.axis.parts is not None and digit.whole:
            digits.extend(Digit(leaf, 0, leaf.size) for leaf in digit.axis.leaves())
        else:
            digits.append(digit)
    return tuple(digits)


def replaced(index: Index, dim: int, entry: Entry) -> Index:
    """The index with another entry for dimension ``dim``."""
    dim %= len(index)
    return (*index[:dim], entry, *index[dim + 1 :])


def outer_leaves(element: Access, *inner: Axis) -> list[Axis]:
    """The axes that an element depends on beside its own. Raises `Refusal` if it lacks one of its own."""
    leaves = element.leaves()
    own = [leaf for axis in inner for leaf in axis.leaves()]
    if any(axis not in leaves for axis in own) or any(axis.parts is not None for axis in inner):
        raise Refusal(f"{element.node} is read along {leaves}, which are not rows of a cache")
    return [leaf for leaf in leaves if leaf not in own]
