"""Which formulas a dtype holds exactly.

Formulas are numbers of mathematics; tensors wrap (integers) or round (floats). The element of a tensor is what a
formula says only while every value of the formula is a value of the tensor's dtype: from -128 to 127 in int8, up to 256
in bfloat16, 2048 in float16, 2**24 in float32. Constants are rounded, as torch rounds them.

Two bounds are taken for granted. Sums of int64 do not overflow: what is counted lies in memory. And a symbolic size is
less than 2**31: the operators count keys and queries in int32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND, elementwise_dtypes
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from lowering.passes.forms import Affine, Choice, Condition, Number, Value
from lowering.passes.graph import known

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

#: A symbolic size is less.
SIZES = 2**31


def common_dtype(*operands: Any) -> torch.dtype:
    """The type that an elementwise operator converts its operands to, which are tensors or numbers."""
    _, dtype = elementwise_dtypes(*operands, type_promotion_kind=ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT)
    return dtype


def largest_integer(dtype: torch.dtype) -> int:
    """All integers from 0 up to it are values of the type."""
    return torch.iinfo(dtype).max if dtype in INTEGERS else int(2 / torch.finfo(dtype).eps)


def smallest_integer(dtype: torch.dtype) -> int:
    return torch.iinfo(dtype).min if dtype in INTEGERS else -largest_integer(dtype)


def holds(form: Affine, dtype: torch.dtype) -> bool:
    """Whether every value of a form of integers is a value of the type."""
    if dtype not in FLOATS + INTEGERS or not is_integer(form):
        return False
    bounds = form.bounds()
    if bounds is None:
        return dtype == torch.int64
    low, high = bounds
    return _at_most(high, largest_integer(dtype)) and _at_most(-low, -smallest_integer(dtype))


def is_integer(form: Affine) -> bool:
    return isinstance(form.constant, (int, torch.SymInt)) and all(isinstance(n, int) for _, n in form.terms)


def _at_most(number: Number, limit: int) -> bool:
    if not isinstance(number, torch.SymInt):
        return bool(number <= limit)
    if known(number <= limit):
        return True
    expr, known_ranges = number.node.expr, number.node.shape_env.var_to_range
    lower = {symbol: known_ranges[symbol].lower for symbol in expr.free_symbols if symbol in known_ranges}
    ranges = {symbol: ValueRanges(low, SIZES - 1) for symbol, low in lower.items() if low < SIZES}
    return bool(bound_sympy(expr, ranges).upper <= limit)


def rounded(form: Affine, dtype: torch.dtype) -> Affine | None:
    """The form that a tensor of the type holds once ``form`` is written to it; None where that is not known."""
    if form.terms or isinstance(form.constant, torch.SymInt) or dtype not in FLOATS:
        return form if holds(form, dtype) else None
    if not isinstance(form.constant, (int, float)):
        return None
    with unset_fake_temporarily():
        number = torch.tensor(float(form.constant), dtype=torch.float64).to(dtype).item()
    whole = math.isfinite(number) and number == int(number) and abs(number) <= largest_integer(dtype)
    return Affine(int(number) if whole else number)


def represented(value: Value, dtype: torch.dtype) -> Value | None:
    """The value that an element of the type has once ``value`` is written to it; None where that is not known."""
    if dtype == torch.bool or isinstance(value, Condition):
        return value if dtype == torch.bool and isinstance(value, Condition) else None
    if isinstance(value, Choice):
        then, other = rounded(value.then, dtype), rounded(value.other, dtype)
        return None if then is None or other is None else Choice(value.condition, then, other)
    return rounded(value, dtype) if isinstance(value, Affine) else value
