"""Formulas over indices: what `values` says of an element of a mask or of positions.

A formula is an affine form of the indices ("``j + start``"), a condition on them ("``j - i - start <= 0``"), or a
choice between two numbers under a condition ("0 where it holds, else -inf"). They are numbers of mathematics; `exact`
says which of them a dtype holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from lowering.passes.axes import Access, Axis, Digit
from lowering.passes.graph import known

#: An int, a float or a symbolic size.
Number: TypeAlias = Any


@dataclass(frozen=True, eq=False)
class Load:
    """One element of an integer tensor that the graph does not say more about."""

    element: Access

    @property
    def key(self) -> object:
        """Equal for two loads only if they are the same element."""
        return self.element.node, tuple(tuple(map(_digit_key, entry)) for entry in self.element.index)

    def __str__(self) -> str:
        places = ("*".join(str(digit.axis or digit.offset) for digit in entry) for entry in self.element.index)
        return f"{self.element.node.name}[{', '.join(places)}]"


Atom: TypeAlias = Axis | Load


def _digit_key(digit: Digit) -> object:
    axis = None if digit.axis is None else id(digit.axis)
    return axis, _number_key(digit.offset), _number_key(digit.size)


def _number_key(number: Number) -> object:
    return number.node.expr if isinstance(number, torch.SymInt) else number


def _key(atom: Atom) -> object:
    return atom.key if isinstance(atom, Load) else id(atom)


@dataclass(frozen=True)
class Affine:
    """``constant`` plus multiples of axes and loads."""

    constant: Number
    terms: tuple[tuple[Atom, float], ...] = ()

    def __add__(self, other: Affine) -> Affine:
        terms = {_key(atom): (atom, factor) for atom, factor in self.terms}
        for atom, factor in other.terms:
            terms[_key(atom)] = atom, factor + terms.get(_key(atom), (atom, 0))[1]
        kept = tuple((atom, factor) for atom, factor in terms.values() if factor != 0)
        return Affine(self.constant + other.constant, kept)

    def scaled(self, factor: float) -> Affine:
        return Affine(self.constant * factor, tuple((atom, n * factor) for atom, n in self.terms if factor != 0))

    def factor(self, axis: Axis) -> float:
        return next((n for atom, n in self.terms if atom is axis), 0)

    def loads(self) -> list[tuple[Load, float]]:
        return [(atom, n) for atom, n in self.terms if isinstance(atom, Load)]

    def axes(self) -> list[Axis]:
        return [atom for atom, _ in self.terms if isinstance(atom, Axis)]

    def bounds(self) -> tuple[Number, Number] | None:
        """Its smallest and its largest value over all indices and loads; None if it depends on a load of int64."""
        low = high = self.constant
        for atom, n in self.terms:
            if isinstance(atom, Load):
                dtype = atom.element.node.meta["val"].dtype
                if dtype == torch.int64:
                    return None
                ends = (torch.iinfo(dtype).min * n, torch.iinfo(dtype).max * n)
            else:
                ends = (0, (atom.size - 1) * n)
            low, high = low + ends[n < 0], high + ends[n > 0]
        return low, high

    @property
    def key(self) -> object:
        """Equal for two forms only if they are the same."""
        return _number_key(self.constant), frozenset((_key(atom), n) for atom, n in self.terms)

    def __str__(self) -> str:
        names = [f"{n} {atom}" for atom, n in self.terms]
        return " + ".join([*names, str(self.constant)])


@dataclass(frozen=True)
class Opaque:
    """A value that proves nothing, and why."""

    reason: str


@dataclass(frozen=True)
class Negated:
    """A condition's opposite: one of its literals does not hold."""

    condition: Condition


Literal: TypeAlias = Affine | Opaque | Negated


@dataclass(frozen=True)
class Condition:
    """True where every literal holds: an affine form is at most 0, an opaque boolean is true. No literals: always."""

    literals: tuple[Literal, ...] = ()

    def both(self, other: Condition) -> Condition:
        return Condition(self.literals + other.literals)

    def negated(self) -> Condition:
        if self.never():
            return Condition()
        if len(self.literals) != 1:
            return Condition((Negated(self),)) if self.literals else NEVER
        (literal,) = self.literals
        if isinstance(literal, Negated):
            return literal.condition
        if isinstance(literal, Opaque):
            return Condition((Opaque(f"not {literal.reason}"),))
        return Condition((literal.scaled(-1) + Affine(1),))

    def never(self) -> bool:
        return any(isinstance(x, Affine) and not x.terms and known(x.constant > 0) for x in self.literals)

    def simplified(self) -> Condition:
        """Without the literals that hold for all indices."""

        def always(literal: Literal) -> bool:
            bounds = literal.bounds() if isinstance(literal, Affine) else None
            return bounds is not None and known(bounds[1] <= 0)

        literals = [part for x in self.literals for part in _simplified(x)]
        kept = {x.key if isinstance(x, Affine) else id(x): x for x in literals if not always(x)}
        return Condition(tuple(kept.values()))


def _simplified(literal: Literal) -> tuple[Literal, ...]:
    """A negation of what is but one literal, as that literal's negation."""
    if isinstance(literal, Negated):
        inner = literal.condition.simplified()
        return inner.negated().literals if len(inner.literals) <= 1 else (Negated(inner),)
    return (literal,)


NEVER = Condition((Affine(1),))


@dataclass(frozen=True)
class Choice:
    """``then`` where the condition holds, else ``other``; both are numbers."""

    condition: Condition
    then: Affine
    other: Affine


Value: TypeAlias = Affine | Condition | Choice | Opaque


# In words.

_WORDS = {"i": "query", "j": "key", "b": "sequence", "h": "head"}


def said(literal: Literal) -> str:
    """A literal in words: "key <= query + 4"."""
    if isinstance(literal, Opaque):
        return literal.reason
    if isinstance(literal, Negated):
        return f"not ({' and '.join(map(said, literal.condition.literals))})"
    left = [_term(atom, n) for atom, n in literal.terms if n > 0]
    right = [_term(atom, -n) for atom, n in literal.terms if n < 0]
    if known(literal.constant < 0):
        right.append(str(-literal.constant))
    elif not known(literal.constant == 0):
        left.append(str(literal.constant))
    return f"{' + '.join(left) or 0} <= {' + '.join(right) or 0}"


def _term(atom: Atom, factor: float) -> str:
    name = str(atom) if isinstance(atom, Load) else _WORDS.get(atom.name, atom.name)
    return name if factor == 1 else f"{factor} * {name}"
