"""Which keys a query sees, proven from what the graph computes as its mask.

A mask hides what it sets to -inf (or to the most negative number of its type, which no score survives either) and adds
0 to the rest. The conditions of all masks of one attention together must say "no key", "the keys before n" or "the keys
up to ``i + start``", for all sequences and heads alike: that is what the operators can express.

Two more things must be proven. Every query sees a key: otherwise the model's result is the mean of all values, or NaN,
where the operators' is 0. And the last query's keys exist: a mask may go on beyond the cache, lengths may not. Where
``start`` is a tensor, what proves both is the write of the new keys: they lie at ``start, start + 1, ...`` in the very
tensor that is read, and a write beyond it raises.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from lowering.passes.elements import (
    Access,
    Axis,
    Size,
    aten,
    constant,
    inputs,
    known,
    pieces,
    replaced,
    resolve,
    shape,
    whole,
)
from lowering.passes.values import Affine, Choice, Condition, Opaque, Value, evaluate


class Refusal(Exception):
    """Why a candidate is left alone."""


@dataclass(frozen=True)
class Visible:
    """Of ``s_kv`` keys, the last query sees the first ``length``; with ``causal`` each earlier query sees one less.

    ``length`` is None for all of them, and otherwise ``constant`` plus at most one element of a tensor.
    """

    length: Affine | None = None
    causal: bool = False


def hidden_unless(mask: Value) -> Condition:
    """The condition under which a mask does not hide a key. Raises `Refusal` if it does anything else than hide."""
    if isinstance(mask, Condition):
        return mask
    if isinstance(mask, Affine) and not mask.terms and mask.constant == 0:
        return Condition()
    if isinstance(mask, Opaque):
        raise Refusal(f"the mask is not proven: {mask.reason}")
    if isinstance(mask, Choice):
        if _is_zero(mask.then) and hides(mask.other):
            return mask.condition
        negated = mask.condition.negated()
        if _is_zero(mask.other) and hides(mask.then):
            if isinstance(negated, Opaque):
                raise Refusal(f"the mask is not proven: {negated.reason}")
            return negated
        raise Refusal(f"the mask adds {mask.then} or {mask.other}, not 0 or -inf")
    raise Refusal(f"the mask adds {mask}, which is a bias and no mask")


def hides(form: Affine) -> bool:
    """Whether a number added to a score leaves nothing of its weight: -inf, or the least number of a float type."""
    if form.terms or not isinstance(form.constant, (int, float)):
        return False
    least = [torch.finfo(dtype).min for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    return form.constant == -math.inf or form.constant in least


def _is_zero(form: Affine) -> bool:
    return not form.terms and isinstance(form.constant, (int, float)) and form.constant == 0


def visible_keys(seen: Condition, i: Axis, j: Axis, keys: list[Access]) -> Visible:
    """What a condition on query i and key j says. ``keys`` are the tensors read at j; see `_written`.

    Raises `Refusal` where it is none of the forms above or a bound is not proven.
    """
    literals = seen.simplified().literals
    if seen.never():
        raise Refusal("the mask hides every key")
    if not literals:
        return Visible()
    for literal in literals:
        if isinstance(literal, Opaque):
            raise Refusal(f"the mask depends on data: {literal.reason}")
        if literal.factor(j) < 0:
            raise Refusal(f"the mask hides early keys (a window, or not causal): {literal} <= 0")
    if len(literals) > 1:
        raise Refusal(f"the mask has several conditions: {', '.join(f'{x} <= 0' for x in literals)}")
    (bound,) = literals
    assert isinstance(bound, Affine)
    rate = bound.factor(i)
    if bound.factor(j) != 1 or rate not in (0, -1):
        raise Refusal(f"the mask is not causal: {bound} <= 0")
    start = Affine(bound.constant, tuple(term for term in bound.terms if term[0] not in (i, j))).scaled(-1)
    if start.axes() or any(load.element.leaves() for load, _ in start.loads()):
        raise Refusal(f"the mask differs between queries, sequences or heads: {bound} <= 0")
    if len(start.loads()) > 1 or any(n != 1 for _, n in start.loads()):
        raise Refusal(f"the mask depends on several tensors: {bound} <= 0")
    causal = rate == -1
    length = start + Affine(i.size if causal else 1)
    if start.loads():
        _prove_written(start, length, keys, j)
    else:
        _prove_constant(start.constant, length.constant, j.size)
        if known(length.constant == j.size):
            return Visible(None, causal)
    return Visible(length, causal)


def _prove_constant(start: Size | float, length: Size | float, s_kv: Size) -> None:
    if not known(start >= 0):
        raise Refusal(f"the first query is not proven to see a key: it sees those up to {start}")
    if not known(length <= s_kv):
        raise Refusal(f"the last query sees {length} keys, which is not proven to be at most the {s_kv} there are")


def _prove_written(start: Affine, length: Affine, keys: list[Access], j: Axis) -> None:
    ((load, _),) = start.loads()
    for row in (row for key in keys for row in _rows(key, j)):
        written = _written(row, j)
        if written is None or [other.key for other, _ in written[0].loads()] != [load.key]:
            continue
        first, count = written
        # first >= 0 and first + count <= s_kv, because the write did not raise.
        if known(start.constant >= first.constant) and known(length.constant <= first.constant + count):
            return
    raise Refusal(f"no write of the keys proves that the {length} visible keys exist")


def _rows(element: Access, j: Axis) -> Iterator[Access]:
    """The tensors whose row j an element of row j is computed from: parts put together, and what a product expands."""
    yield element
    if (joined := pieces(element.node)) is not None:
        dim, parts = joined
        if all(digit.axis is not j for digit in element.entry(dim)):
            for part in parts:
                inner = replaced(element.index, dim, constant(0, shape(part.source)[dim]))
                yield from _rows(resolve(Access(part.source, inner)), j)
    elif element.node.target == aten.mm.default and any(digit.axis is j for digit in element.entry(0)):
        rows = inputs(element.node)[0]
        yield from _rows(resolve(Access(rows, (element.index[0], constant(0, shape(rows)[1])))), j)


def _written(key: Access, j: Axis) -> tuple[Affine, Size] | None:
    """If the keys are what a write at consecutive positions made: the first position and their number.

    Positions of a write count from the end where they are negative, which no cache means: `flashmla::decode` refuses a
    negative length.
    """
    node = key.node
    if node.target != aten.index_put.default or len(inputs(node)) > 3:
        return None
    indices: list[Node | None] = list(inputs(node)[1])
    dims = [dim for dim, index in enumerate(indices) if index is not None]
    if len(dims) != 1 or (positions := indices[dims[0]]) is None or len(shape(positions)) != 1:
        return None
    entry = key.entry(dims[0])
    if len(entry) != 1 or entry[0].axis is not j or not entry[0].whole:
        return None
    t = Axis("t", shape(positions)[0])
    first = evaluate(Access(positions, (whole(t),)))
    if not isinstance(first, Affine) or len(first.loads()) != 1 or any(n != 1 for _, n in first.loads()):
        return None
    rest = [atom for atom in first.axes() if atom is not t]
    if rest or (t.leaves() and first.factor(t) != 1):
        return None
    return Affine(first.constant, tuple(first.loads())), t.size
