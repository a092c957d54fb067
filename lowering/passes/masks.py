"""Which keys a query sees, proven from what the graph computes as its mask.

A mask hides what it sets to -inf (or to the most negative number of its type, which no score survives either) and adds
0 to the rest. The conditions of all masks of one attention together must say "no key", "the keys before n" or "the keys
up to ``i + start``", and may say "the last ``window`` of these", for all sequences and heads alike: that is what the
operators can express.

Two more things must be proven. Every query sees a key: otherwise the model's result is the mean of all values, or NaN,
where the operators' is 0. And the last query's keys exist: a mask may go on beyond the cache, lengths may not. Where
``start`` is a tensor, what proves the latter is a write of new keys in the same graph, by this layer or another whose
cache is no longer: they go to ``start, start + 1, ...``, and a write beyond the end of a cache raises. Whether
``start`` is negative is asked where the graph runs: `index_copy` raises for such a position, and so do our operators.
`index_put` proves nothing: to it a negative position is one from the cache's end.
A mask for which something else decides is read at run time: see `given`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from lowering.passes.axes import Access, Axis, whole
from lowering.passes.forms import Affine, Choice, Condition, Negated, Opaque, Value, said
from lowering.passes.graph import Size, aten, inputs, known, shape, value
from lowering.passes.values import evaluate
from lowering.record import Refusal


@dataclass(frozen=True)
class Visible:
    """The last query sees the first ``length`` of ``s_kv`` keys; with ``causal`` each earlier query sees one less.

    With a ``window`` that is not 0 each query sees the last so many of those. ``length`` is None for all of them, and
    otherwise ``constant`` plus at most one element of a tensor. With such an element it must be asked where the graph
    runs whether the first query sees a key: it does if ``length > earlier``.
    """

    length: Affine | None = None
    causal: bool = False
    earlier: Size = 0
    window: Size = 0


def seen_if(mask: Value) -> Condition:
    """The condition under which the mask of an operator does not hide a key. Raises `Refusal` as `hidden_unless`."""
    return mask if isinstance(mask, Condition) else hidden_unless(mask)


def hidden_unless(bias: Value) -> Condition:
    """The condition under which what is added to scores does not hide a key.

    Raises `Refusal` if it does anything else than hide. A bool that is added is 1 where it is true, which is a bias.
    """
    if isinstance(bias, Affine) and _is_zero(bias):
        return Condition()
    if isinstance(bias, Opaque):
        raise Refusal(f"the mask is not proven: {bias.reason}")
    if isinstance(bias, Choice):
        if _is_zero(bias.then) and hides(bias.other):
            return bias.condition
        if _is_zero(bias.other) and hides(bias.then):
            return bias.condition.negated()
        raise Refusal(f"the mask adds {bias.then} or {bias.other}, not 0 or -inf")
    added = "a bool, which is 1 where it is true" if isinstance(bias, Condition) else bias
    raise Refusal(f"the mask adds {added}: a bias and no mask")


def hides(form: Affine) -> bool:
    """Whether a number added to a score, or written in its place, leaves nothing of its weight.

    -inf does. So does the least number of float32 and of bfloat16, about -3.4e38: it is below every score by more than
    the 104 at which float32's exp is 0, unless scores are of that size themselves, where sums of products overflow. The
    least number of float16, -65504, does not: scores of 1e5 are nothing unusual in float32, and those of float16 may be
    as far apart as that.
    """
    if form.terms or not isinstance(form.constant, (int, float)):
        return False
    return form.constant in (-math.inf, torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min)


def _is_zero(form: Affine) -> bool:
    return not form.terms and isinstance(form.constant, (int, float)) and form.constant == 0


def visible_keys(seen: Condition, i: Axis, j: Axis, graph: Graph) -> Visible:
    """The keys that a condition on query i and key j lets be seen.

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
        if isinstance(literal, Negated):
            raise Refusal(f"the mask is not causal: {said(literal)}")
    bounds = [literal for literal in literals if isinstance(literal, Affine)]
    ends, begins = ([bound for bound in bounds if (bound.factor(j) < 0) is early] for early in (False, True))
    if len(ends) > 1 or len(begins) > 1:
        raise Refusal(f"the mask has several conditions: {' and '.join(map(said, literals))}")
    last, causal = _last_key(ends[0], i, j) if ends else (Affine(j.size - 1), False)
    window = _window(begins[0], last, causal, i, j) if begins else 0
    if not ends:
        return Visible(window=window)
    length = last + Affine(i.size if causal else 1)
    if last.loads():
        _prove_written(last, length, graph, j.size)
    else:
        _prove_constant(last.constant, length.constant, j.size)
        if known(length.constant == j.size):
            return Visible(None, causal, window=window)
    return Visible(length, causal, i.size - 1 if causal else 0, window)


def _last_key(bound: Affine, i: Axis, j: Axis) -> tuple[Affine, bool]:
    """The last key that the first query sees, and whether each query sees one more than the one before."""
    rate = bound.factor(i)
    if bound.factor(j) != 1 or rate not in (0, -1):
        raise Refusal(f"the mask is not causal: {said(bound)}")
    last = _without(bound, i, j).scaled(-1)
    if last.axes() or any(load.element.leaves() for load, _ in last.loads()):
        raise Refusal(f"the mask differs between queries, sequences or heads: {said(bound)}")
    if len(last.loads()) > 1 or any(n != 1 for _, n in last.loads()):
        raise Refusal(f"the mask depends on several tensors: {said(bound)}")
    return last, rate == -1


def _window(bound: Affine, last: Affine, causal: bool, i: Axis, j: Axis) -> Size:
    """How many keys a query sees, the last one included, if ``bound`` hides those before."""
    rate = 0 if known(i.size == 1) else bound.factor(i)
    if bound.factor(j) != -1 or rate != int(causal):
        raise Refusal(f"the mask hides early keys, but is no window: {said(bound)}")
    window = last + _without(bound, i, j).scaled(-1) + Affine(1)
    if window.terms:
        raise Refusal(f"the mask hides early keys, and how many are left is not proven: {said(bound)}")
    if not known(window.constant >= 1):
        raise Refusal(f"a window of {window.constant} keys is not proven to show any")
    return window.constant


def _without(bound: Affine, *axes: Axis) -> Affine:
    return Affine(bound.constant, tuple(term for term in bound.terms if term[0] not in axes))


def _prove_constant(start: Size | float, length: Size | float, s_kv: Size) -> None:
    if not known(start >= 0):
        raise Refusal(f"the first query is not proven to see a key: it sees those up to {start}")
    if not known(length <= s_kv):
        raise Refusal(f"the last query sees {length} keys, which is not proven to be at most the {s_kv} there are")


def _prove_written(start: Affine, length: Affine, graph: Graph, s_kv: Size) -> None:
    ((load, _),) = start.loads()
    for first, count, size in _writes(graph):
        if [other.key for other, _ in first.loads()] != [load.key] or not known(size <= s_kv):
            continue
        # first + count <= size <= s_kv, because the write does not raise; and if first >= 0, then start >= 0.
        if known(start.constant >= first.constant) and known(length.constant <= first.constant + count):
            return
    raise Refusal(f"no index_copy in the graph proves that the {length} visible keys exist")


def _writes(graph: Graph) -> Iterator[tuple[Affine, Size, Size]]:
    """All `index_copy` at consecutive positions: the first one, their number, and the size they must be less than.

    The graph has them as `index_put`, which by itself takes a negative position for one from the end.
    """
    for node in graph.nodes:
        if node.target != aten.index_put.default or not node.users or not _is_index_copy(node):
            continue
        indices = inputs(node)[1]
        dims = [dim for dim, index in enumerate(indices) if index is not None]
        if len(dims) != 1 or len(shape(indices[dims[0]])) != 1:
            continue
        positions = indices[dims[0]]
        if value(positions).dtype not in (torch.int64, torch.int32):  # uint8 is a mask of rows
            continue
        t = Axis("t", shape(positions)[0])
        first = evaluate(Access(positions, (whole(t),)))
        if not isinstance(first, Affine) or [n for _, n in first.loads()] != [1]:
            continue
        if all(axis is t for axis in first.axes()) and (not t.leaves() or first.factor(t) == 1):
            yield Affine(first.constant, tuple(first.loads())), t.size, shape(node)[dims[0]]


def _is_index_copy(node: Node) -> bool:
    """Whether a node was decomposed from one: nodes hold a copy of the operator that they are made from."""
    return getattr(node.meta.get("original_aten"), "_overloadpacket", None) is aten.index_copy
