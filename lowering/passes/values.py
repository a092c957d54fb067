"""The elements of masks and positions, as formulas over indices.

A mask is proven causal by what it says, not by how it was written: `evaluate` turns one symbolic element of a node into
a formula ("arange(n)[j] + start" is ``j + start``). Whatever it does not understand, or a dtype does not hold exactly,
stays an opaque value that names its node, and proves nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from lowering.passes.axes import Access, Axis, Entry, access, constant, replaced
from lowering.passes.elements import broadcast, pieces, resolve
from lowering.passes.exact import INTEGERS, common_dtype, holds, represented
from lowering.passes.forms import NEVER, Affine, Choice, Condition, Load, Opaque, Value
from lowering.passes.graph import arguments, aten, inputs, known, prims, shape, sources, value


def evaluate(element: Access) -> Value:
    """One symbolic element of an integer, boolean or mask tensor."""
    found = resolve(element)
    rule = _attribute if found.node.op == "get_attr" else RULES.get(found.node.target, _unknown)
    formula, dtype = rule(found), found.node.meta["val"].dtype
    if (exact := represented(formula, dtype)) is not None:
        return exact
    if dtype.is_floating_point:
        return Opaque(f"{found.node.name} is not exactly {formula} in {dtype}")
    return _unknown(found)


def _unknown(element: Access) -> Value:
    dtype = element.node.meta["val"].dtype
    if dtype == torch.bool:
        return Condition((Opaque(described(element.node)),))
    if dtype in INTEGERS:
        return Affine(0, ((Load(element), 1),))
    return Opaque(f"the values of {described(element.node)} are not known")


def described(node: Node) -> str:
    """An input of the graph by its name, anything else by the inputs that it is computed from."""
    names = sorted(source.name for source in sources(node) if source.op == "placeholder")
    if node.op != "call_function" or not names:
        return node.name
    return f"what is computed from {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"


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
    return _first_opaque(x, y, Opaque("a sum of two masks"))


def _first_opaque(*values: Value) -> Opaque:
    return next(each for each in values if isinstance(each, Opaque))


def _times(x: Value, y: Value) -> Value:
    for number, other in ((x, y), (y, x)):
        if isinstance(number, Affine) and not number.terms and isinstance(number.constant, (int, float)):
            # 0 * inf is NaN, and so it is here: a mask that multiplies -inf by a condition hides nothing.
            return _map(operator.methodcaller("scaled", number.constant), other)
    return _first_opaque(x, y, Opaque("a product of two values that are not constant"))


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
    """Both operands, as the type holds them that the operator computes in."""
    bound = arguments(element.node)
    dtype = common_dtype(value(bound["self"]), value(bound["other"]))
    values = [operand(element, bound["self"]), operand(element, bound["other"])]
    if bound.get("alpha", 1) != 1:
        values.append(_times(Affine(bound["alpha"]), _as_number(values[1])))
    for number in values:
        for form in _forms(number):
            if form.terms and not holds(form, dtype):
                return [Opaque(f"{element.node.name} computes with {form} in {dtype}, which may not hold it")] * 2
    return [values[0], values[-1]]


def _forms(x: Value) -> tuple[Affine, ...]:
    if isinstance(x, Choice):
        return x.then, x.other
    return (x,) if isinstance(x, Affine) else ()


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
        bound = arguments(element.node)
        dtype = common_dtype(value(bound["self"]), value(bound["other"]))
        left, right = _operands(element)
        if isinstance(left, Affine) and isinstance(right, Affine) and holds(left, dtype) and holds(right, dtype):
            return Condition(build(left, right))
        inexact = tuple(side for side in (left, right) if isinstance(side, Opaque))
        return Condition(inexact[:1]) if inexact else _unknown(element)

    return rule


def _differs(element: Access) -> Value:
    """Only where it is decided: whether it holds for every element, or for none."""
    same = _equal(element)
    if isinstance(same, Condition):
        if not (simple := same.simplified()).literals:
            return NEVER
        if simple.never():
            return Condition()
    return _unknown(element)


def _everywhere(tensor: Node) -> Value:
    """An element of a tensor, whichever it is."""
    return evaluate(access(tensor, [Axis("any", size) for size in shape(tensor)]))


def _cumsum(element: Access) -> Value:
    """A sum of nothing but 0."""
    summed = _as_number(_everywhere(inputs(element.node)[0]))
    if isinstance(summed, Choice) and summed.condition.never():
        summed = summed.other
    nothing = isinstance(summed, Affine) and not summed.terms and known(summed.constant == 0)
    return Affine(0) if nothing else _unknown(element)


def _index(element: Access) -> Value:
    """An element of a tensor that holds one integer everywhere."""
    found = _everywhere(inputs(element.node)[0])
    return found if isinstance(found, Affine) and not found.terms else _unknown(element)


def _cat(element: Access) -> Value:
    """A row of integers and single elements beside it that go on with it, as positions with the one before them do."""
    joined = pieces(element.node)
    entry = element.entry(joined[0]) if joined is not None else ()
    if joined is None or len(entry) != 1 or entry[0].axis is None:
        return _unknown(element)
    (dim, parts), (digit,), axis = joined, entry, entry[0].axis
    singles = [part for part in parts if known(part.size == 1)]
    rows = [part for part in parts if not known(part.size == 1)]
    if len(rows) != 1:
        return _unknown(element)
    moved = digit.within(rows[0].start - rows[0].source_start, shape(rows[0].source)[dim])
    form = evaluate(Access(rows[0].source, replaced(element.index, dim, (moved,))))
    if not isinstance(form, Affine) or form.loads():  # an element that is loaded may be none of the row's
        return _unknown(element)
    for part in singles:
        place = constant(part.source_start, shape(part.source)[dim])
        one = evaluate(Access(part.source, replaced(element.index, dim, place)))
        step = form.factor(axis)
        there = form + Affine((part.start - digit.offset) * step, ((axis, -step),))
        if not isinstance(one, Affine) or one.key != there.key:
            return _unknown(element)
    return form


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
    return _first_opaque(condition, then, other, Opaque("a choice between masks"))


def _convert(element: Access) -> Value:
    inner = operand(element, inputs(element.node)[0])
    return inner if element.node.meta["val"].dtype == torch.bool else _as_number(inner)


def _attribute(element: Access) -> Value:
    """A constant of the graph: known if it is one number."""
    module: Any = element.node.graph.owning_module
    tensor = operator.attrgetter(str(element.node.target))(module) if module is not None else None
    if isinstance(tensor, torch.Tensor) and tensor.numel() == 1 and type(tensor) is torch.Tensor:
        with unset_fake_temporarily():
            number = tensor.item()
        return operand(element, number)
    return _unknown(element)


_equal = _compare(lambda x, y: (_minus(x, y), _minus(y, x)))

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
    aten.cumsum.default: _cumsum,
    aten.index.Tensor: _index,
    aten.cat.default: _cat,
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
):
    RULES[_packet.Tensor] = RULES[_packet.Scalar] = _compare(_build)
for _packet, _rule in ((aten.eq, _equal), (aten.ne, _differs)):
    RULES[_packet.Tensor] = RULES[_packet.Scalar] = _rule
