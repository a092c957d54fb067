"""What the elements of masks and positions are, as formulas over indices.

A mask is proven causal by what it says, not by how it was written: `evaluate` turns one symbolic element of a node into
an affine form of the indices ("arange(n)[j] + start" is ``j + start``), a condition ("``j - i - start <= 0``") or a
choice between two numbers under a condition ("0 where it holds, else -inf"). Whatever it does not understand stays an
opaque value that names its node, and proves nothing.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from lowering.passes.elements import (
    Access,
    Axis,
    Entry,
    arguments,
    aten,
    broadcast,
    inputs,
    known,
    prims,
    resolve,
    value,
)

#: An int, a float or a symbolic size.
Number: TypeAlias = Any


@dataclass(frozen=True, eq=False)
class Load:
    """One element of an integer tensor that the graph does not say more about."""

    element: Access

    @property
    def key(self) -> str:
        return f"{self.element.node.name}{[[str(d.axis or d.offset) for d in e] for e in self.element.index]}"


Atom: TypeAlias = Axis | Load


def _key(atom: Atom) -> object:
    return atom.key if isinstance(atom, Load) else id(atom)


@dataclass(frozen=True)
class Affine:
    """``constant`` plus integer multiples of axes and loads."""

    constant: Number
    terms: tuple[tuple[Atom, int], ...] = ()

    def __add__(self, other: Affine) -> Affine:
        terms = {_key(atom): (atom, factor) for atom, factor in self.terms}
        for atom, factor in other.terms:
            terms[_key(atom)] = atom, factor + terms.get(_key(atom), (atom, 0))[1]
        kept = tuple((atom, factor) for atom, factor in terms.values() if factor != 0)
        return Affine(self.constant + other.constant, kept)

    def scaled(self, factor: int) -> Affine:
        return Affine(self.constant * factor, tuple((atom, n * factor) for atom, n in self.terms if factor != 0))

    def factor(self, axis: Axis) -> int:
        return next((n for atom, n in self.terms if atom is axis), 0)

    def loads(self) -> list[tuple[Load, int]]:
        return [(atom, n) for atom, n in self.terms if isinstance(atom, Load)]

    def axes(self) -> list[Axis]:
        return [atom for atom, _ in self.terms if isinstance(atom, Axis)]

    def largest(self) -> Number | None:
        """Its largest value over all indices; None if it depends on a load."""
        top = self.constant
        for atom, n in self.terms:
            if isinstance(atom, Load):
                return None
            top = top + (n * (atom.size - 1) if n > 0 else 0)
        return top

    def __str__(self) -> str:
        names = [f"{n} {atom.key if isinstance(atom, Load) else atom}" for atom, n in self.terms]
        return " + ".join([*names, str(self.constant)])


@dataclass(frozen=True)
class Opaque:
    """A value that proves nothing, and why."""

    reason: str


@dataclass(frozen=True)
class Negated:
    """That one of several conditions does not hold."""

    condition: Condition

    def __str__(self) -> str:
        return f"not all of {', '.join(map(str, self.condition.literals))}"


Literal: TypeAlias = Affine | Opaque | Negated


@dataclass(frozen=True)
class Condition:
    """That every literal holds: an affine form is at most 0, an opaque boolean is true. No literals: always true."""

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
            return Condition((Opaque(f"not ({literal.reason})"),))
        return Condition((literal.scaled(-1) + Affine(1),))

    def never(self) -> bool:
        return any(isinstance(x, Affine) and not x.terms and known(x.constant > 0) for x in self.literals)

    def simplified(self) -> Condition:
        """Without the literals that hold for all indices."""

        def always(literal: Literal) -> bool:
            top = literal.largest() if isinstance(literal, Affine) else None
            return top is not None and known(top <= 0)

        literals = [part for x in self.literals for part in _simplified(x)]
        kept = {str(x): x for x in literals if not always(x)}
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


def evaluate(element: Access) -> Value:
    """One symbolic element of an integer, boolean or mask tensor."""
    found = resolve(element)
    if found.node.op == "get_attr":
        return _attribute(found)
    return RULES.get(found.node.target, _unknown)(found)


def _unknown(element: Access) -> Value:
    dtype = element.node.meta["val"].dtype
    if dtype == torch.bool:
        return Condition((Opaque(f"{element.node.name} is true, a condition on data"),))
    if dtype in (torch.int64, torch.int32):
        return Affine(0, ((Load(element), 1),))
    return Opaque(f"the values of {element.node.name} are not known")


def operand(element: Access, argument: Any) -> Value:
    """An argument of the element's node, at the element that an elementwise operator reads."""
    if isinstance(argument, Node) and isinstance(argument.meta["val"], torch.Tensor):
        return evaluate(broadcast(element, argument))
    number = value(argument)
    if isinstance(number, bool):
        return Condition() if number else NEVER
    if isinstance(number, (int, float, torch.SymInt)):
        return Affine(number)
    return Opaque(f"{argument} is no number")


def position(entry: Entry) -> Affine | Opaque:
    """The value of an entry of an index."""
    total, radix = Affine(0), 1
    for digit in reversed(entry):
        if not isinstance(radix, int):
            return Opaque("a position in a dimension of several symbolic sizes")
        term = Affine(digit.offset) if digit.axis is None else Affine(digit.offset, ((digit.axis, 1),))
        total += term.scaled(radix)
        radix = radix * digit.size
    return total


def _map(function: Callable[[Affine], Affine], x: Value) -> Value:
    if isinstance(x, Affine):
        return function(x)
    if isinstance(x, Choice):
        return Choice(x.condition, function(x.then), function(x.other))
    return x if isinstance(x, Opaque) else _map(function, _as_number(x))


def _as_number(x: Value) -> Affine | Choice | Opaque:
    return Choice(x, Affine(1), Affine(0)) if isinstance(x, Condition) else x


def _plus(x: Value, y: Value) -> Value:
    x, y = _as_number(x), _as_number(y)
    if isinstance(x, Affine):
        added = x
        return _map(lambda other: other + added, y)
    if isinstance(y, Affine):
        return _plus(y, x)
    return next(side for side in (x, y, Opaque("a sum of two masks")) if isinstance(side, Opaque))


def _times(x: Value, y: Value) -> Value:
    for number, other in ((x, y), (y, x)):
        if isinstance(number, Affine) and not number.terms and isinstance(number.constant, (int, float)):
            return _map(functools.partial(_scale, factor=number.constant), other)
    return Opaque("a product of two values that are not constant")


def _scale(form: Affine, factor: float) -> Affine:
    if not form.terms:
        # 0 * inf is NaN, and so it is here: a mask that multiplies -inf by a condition hides nothing.
        return Affine(form.constant * factor)
    return form.scaled(factor) if isinstance(factor, int) else Affine(float("nan"))


def _iota(element: Access) -> Value:
    bound = arguments(element.node)
    return _arithmetic_row(element, bound["start"], bound["step"])


def _arange(element: Access) -> Value:
    bound = arguments(element.node)
    return _arithmetic_row(element, bound.get("start", 0), bound.get("step", 1))


def _arithmetic_row(element: Access, start: Any, step: Any) -> Value:
    first, width = value(start), value(step)
    where = position(element.entry(0))
    if isinstance(where, Opaque) or not isinstance(width, int) or isinstance(first, float):
        return Opaque(f"{element.node.name} is no row of integers")
    return where.scaled(width) + Affine(first)


def _filled(name: str) -> Callable[[Access], Value]:
    def rule(element: Access) -> Value:
        number = value(arguments(element.node)[name])
        is_bool = element.node.meta["val"].dtype == torch.bool
        return operand(element, bool(number) if is_bool and isinstance(number, (int, float)) else number)

    return rule


def _zeros(element: Access) -> Value:
    return NEVER if element.node.meta["val"].dtype == torch.bool else Affine(0)


def _ones(element: Access) -> Value:
    return Condition() if element.node.meta["val"].dtype == torch.bool else Affine(1)


def _operands(element: Access) -> list[Value]:
    bound = arguments(element.node)
    values = [operand(element, bound["self"]), operand(element, bound["other"])]
    if bound.get("alpha", 1) != 1:
        return [values[0], _times(Affine(bound["alpha"]), values[1])]
    return values


def _add(element: Access) -> Value:
    return _plus(*_operands(element))


def _sub(element: Access) -> Value:
    left, right = _operands(element)
    return _plus(left, _times(Affine(-1), _as_number(right)))


def _mul(element: Access) -> Value:
    left, right = _operands(element)
    if isinstance(left, Condition) and isinstance(right, Condition):
        return left.both(right)
    return _times(_as_number(left), _as_number(right))


def _neg(element: Access) -> Value:
    return _times(Affine(-1), _as_number(operand(element, inputs(element.node)[0])))


def _compare(build: Callable[[Affine, Affine], tuple[Affine, ...]]) -> Callable[[Access], Value]:
    """A comparison of integers as affine forms that are at most 0."""

    def rule(element: Access) -> Value:
        left, right = _operands(element)
        if isinstance(left, Affine) and isinstance(right, Affine) and _integers(left, right):
            return Condition(build(left, right))
        return _unknown(element)

    return rule


def _integers(*forms: Affine) -> bool:
    return all(isinstance(form.constant, (int, torch.SymInt)) for form in forms)


def _minus(left: Affine, right: Affine) -> Affine:
    return left + right.scaled(-1)


def _and(element: Access) -> Value:
    left, right = _operands(element)
    if isinstance(left, Condition) and isinstance(right, Condition):
        return left.both(right)
    return _unknown(element)


def _or(element: Access) -> Value:
    left, right = (x.simplified() if isinstance(x, Condition) else x for x in _operands(element))
    if not (isinstance(left, Condition) and isinstance(right, Condition)):
        return _unknown(element)
    if left.never():
        return right
    if right.never() or not left.literals:
        return left
    return right if not right.literals else Condition((Opaque("one of two conditions holds, which is not causal"),))


def _not(element: Access) -> Value:
    inner = operand(element, inputs(element.node)[0])
    if not isinstance(inner, Condition):
        return _unknown(element)
    return inner.negated()


def _where(element: Access) -> Value:
    condition, then, other = (operand(element, argument) for argument in inputs(element.node))
    return _choose(condition, then, other)


def _masked_fill(element: Access) -> Value:
    source, mask, fill = (operand(element, argument) for argument in inputs(element.node))
    return _choose(mask, fill, source)


def _choose(condition: Value, then: Value, other: Value) -> Value:
    if isinstance(condition, Condition) and isinstance(then, Affine) and isinstance(other, Affine):
        return Choice(condition, then, other)
    for side in (condition, then, other):
        if isinstance(side, Opaque):
            return side
    return Opaque("a choice between masks")


def _convert(element: Access) -> Value:
    inner = operand(element, inputs(element.node)[0])
    dtype = element.node.meta["val"].dtype
    if dtype == torch.bool:
        return inner if isinstance(inner, Condition) else _unknown(element)
    number = _as_number(inner)
    if dtype.is_floating_point or isinstance(number, Opaque):
        return number
    forms = (number.then, number.other) if isinstance(number, Choice) else (number,)
    return number if _integers(*forms) else _unknown(element)


def _attribute(element: Access) -> Value:
    """A constant of the graph: known if it is one number."""
    module: Any = element.node.graph.owning_module
    tensor = operator.attrgetter(str(element.node.target))(module) if module is not None else None
    if isinstance(tensor, torch.Tensor) and tensor.numel() == 1 and type(tensor) is torch.Tensor:
        with unset_fake_temporarily():
            number = tensor.item()
        return operand(element, number)
    return _unknown(element)


RULES: dict[Any, Callable[[Access], Value]] = {
    prims.iota.default: _iota,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.full.default: _filled("fill_value"),
    aten.full_like.default: _filled("fill_value"),
    aten.new_full.default: _filled("fill_value"),
    aten.scalar_tensor.default: _filled("s"),
    aten.add.Tensor: _add,
    aten.add.Scalar: _add,
    aten.sub.Tensor: _sub,
    aten.sub.Scalar: _sub,
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.neg.default: _neg,
    aten.where.self: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.logical_not.default: _not,
    aten.bitwise_not.default: _not,
    prims.convert_element_type.default: _convert,
    aten._to_copy.default: _convert,
}
for _op in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
    RULES[_op] = _zeros
for _op in (aten.ones.default, aten.ones_like.default, aten.new_ones.default):
    RULES[_op] = _ones
for _op in (aten.bitwise_and.Tensor, aten.logical_and.default):
    RULES[_op] = _and
for _op in (aten.bitwise_or.Tensor, aten.logical_or.default):
    RULES[_op] = _or
for _packet, _build in (
    (aten.le, lambda x, y: (_minus(x, y),)),
    (aten.lt, lambda x, y: (_minus(x, y) + Affine(1),)),
    (aten.ge, lambda x, y: (_minus(y, x),)),
    (aten.gt, lambda x, y: (_minus(y, x) + Affine(1),)),
    (aten.eq, lambda x, y: (_minus(x, y), _minus(y, x))),
):
    RULES[_packet.Tensor] = RULES[_packet.Scalar] = _compare(_build)
