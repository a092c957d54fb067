"""`resolve` and `evaluate` say of every single element what torch computes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lowering.passes.axes import Access, Axis, Digit, access
from lowering.passes.elements import resolve
from lowering.passes.forms import Affine, Choice, Condition, Opaque, Value
from lowering.passes.graph import shape
from lowering.passes.values import evaluate
from tests.lowering.passes.graphs import traced


def overwritten(t: Tensor, dim: int, part: slice) -> Tensor:
    """With its first rows written over a part of them."""
    rows = len(range(t.shape[dim])[part])
    return torch.slice_scatter(t, t.narrow(dim, 0, rows), dim, part.start, part.stop)


@st.composite
def moves(draw: st.DrawFn) -> list[Callable[[Tensor], Tensor]]:
    """A chain of operators that move data, each drawn for the shape that the ones before it leave."""
    x = torch.arange(2 * 6 * 4).view(2, 6, 4)
    chain: list[Callable[[Tensor], Tensor]] = []
    for _ in range(draw(st.integers(1, 6))):
        dim = draw(st.integers(0, x.dim() - 1))
        size = x.shape[dim]
        start = draw(st.integers(0, size - 1))
        stop = draw(st.integers(start + 1, size))
        cut = slice(*(draw(st.none() | st.integers(-size - 2, size + 2)) for _ in range(2)))
        order = draw(st.permutations(range(x.dim())))
        factors = [n for n in range(1, size + 1) if size % n == 0]
        high = draw(st.sampled_from(factors))
        step: Callable[[Tensor], Tensor] = draw(
            st.sampled_from(
                [
                    lambda t, o=order: t.permute(o),
                    lambda t, d=dim, a=start, b=stop: t.narrow(d, a, b - a),
                    lambda t, d=dim, c=cut: t[(slice(None),) * d + (c,)],
                    lambda t, d=dim, c=cut: overwritten(t, d, c),
                    lambda t, d=dim, a=start: t.select(d, a - t.shape[d]) if t.dim() > 1 else t,
                    lambda t, d=dim: t.unsqueeze(d).expand(*t.shape[:d], 2, *t.shape[d:]),
                    lambda t, d=dim, n=high: t.unflatten(d, (n, t.shape[d] // n)),
                    lambda t: t.flatten(0, 1) if t.dim() > 1 else t,
                    lambda t: t.flatten(-2) if t.dim() > 1 else t,
                    lambda t, d=dim, a=start: t.select(d, a) if t.dim() > 1 else t,
                    lambda t, d=dim, a=start: torch.cat([t.narrow(d, a, t.shape[d] - a), t.narrow(d, 0, a)], d),
                    lambda t, d=dim: torch.cat([t, t], d).split(t.shape[d], d)[1],
                    lambda t: t.contiguous().clone(),
                ]
            )
        )
        if 0 < (moved := step(x)).numel() <= 400:
            x, chain = moved, [*chain, step]
    return chain


def numbers(axes: list[Axis]) -> list[dict[Axis, int]]:
    """All values of axes and of what they were cut into."""
    found = []
    for values in itertools.product(*(range(axis.size) for axis in axes)):
        point: dict[Axis, int] = {}
        pending = list(zip(axes, values, strict=True))
        while pending:
            axis, n = pending.pop()
            point[axis] = n
            if axis.parts is not None:
                high, low = axis.parts
                pending += [(high, n // low.size), (low, n % low.size)]
        found.append(point)
    return found


def at(element: Access, point: dict[Axis, int]) -> tuple[int, ...]:
    """The index that an element is read at."""

    def digit(d: Digit) -> int:
        return d.offset + (0 if d.axis is None else point[d.axis])

    index = []
    for entry in element.index:
        position = 0
        for each in entry:
            assert 0 <= digit(each) < each.size
            position = position * each.size + digit(each)
        index.append(position)
    return tuple(index)


@settings(max_examples=60)
@given(moves())
def test_resolve_follows_every_element(chain: list[Callable[[Tensor], Tensor]]) -> None:
    def moved(x: Tensor) -> Tensor:
        x = x * 1  # a node that computes, for resolve to stop at
        for step in chain:
            x = step(x)
        return x + 0

    x = torch.arange(2 * 6 * 4).view(2, 6, 4)
    expected = moved(x)
    graph = traced(moved, x)
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    node = output.args[0].args[0]  # before the addition, which keeps the output from being an input
    axes = [Axis(f"a{dim}", n) for dim, n in enumerate(shape(node))]
    found = resolve(access(node, axes))
    if "aten.mul" in str(found.node.target):
        assert all(x[at(found, p)] == expected[tuple(p[a] for a in axes)] for p in numbers(axes))
    else:  # one element of several tensors put together, or of a cut that a slice went through
        names = ("cat", "slice", "view", "getitem", "clone", "expand", "select", "permute")
        assert any(name in str(found.node.target) for name in names)


def test_resolve_reaches_the_source_of_common_chains() -> None:
    """Models do this to a cache on its way to attention."""

    def repeat(x: Tensor) -> Tensor:
        x = x * 1
        return x[:, :, None].expand(2, 3, 4, 5, 6).reshape(2, 12, 5, 6).transpose(1, 2)[:, 1:4].flatten(2) + 0

    x = torch.randn(2, 3, 5, 6)
    graph = traced(repeat, x)
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    axes = [Axis(name, n) for name, n in zip("bsd", (2, 3, 72), strict=True)]
    found = resolve(access(output.args[0].args[0], axes))
    assert found.node.target == torch.ops.aten.mul.Tensor
    expected = repeat(x)
    assert all(x[at(found, p)] == expected[tuple(p[a] for a in axes)] for p in numbers(axes))


def number(value: Value, point: dict[Axis, int]) -> float:
    """A formula's value."""
    if isinstance(value, Affine):
        assert not value.loads()
        return value.constant + sum(n * point[axis] for axis, n in value.terms if isinstance(axis, Axis))
    if isinstance(value, Condition):
        return float(all(isinstance(x, Affine) and number(x, point) <= 0 for x in value.simplified().literals))
    assert isinstance(value, Choice)
    return number(value.then if number(value.condition, point) else value.other, point)


ROW, COLUMN = torch.arange(5)[:, None], torch.arange(7)

MASKS: dict[str, Callable[[], Tensor]] = {
    "le": lambda: COLUMN <= ROW + 2,
    "gt-negated": lambda: ~(COLUMN > ROW + 2),
    "ge": lambda: ROW + 2 >= COLUMN,
    "lt": lambda: COLUMN < ROW + 3,
    "differences": lambda: (COLUMN - ROW).le(2),
    "scaled": lambda: 2 * COLUMN <= 2 * ROW + 4,
    "and": lambda: (COLUMN <= ROW + 2) & (COLUMN >= 0),
    "nand": lambda: ~((COLUMN <= ROW) & (COLUMN < 4)),
    "twice-negated": lambda: ~(~((COLUMN <= ROW) & (COLUMN < 4))),
    "or-true": lambda: (COLUMN <= ROW) | (COLUMN < 100),
    "equal": lambda: COLUMN == ROW,
    "tril": lambda: torch.ones(5, 7, dtype=torch.bool).tril(2),
    "triu": lambda: torch.full((5, 7), -math.inf).triu(3),
    "where": lambda: torch.where(COLUMN <= ROW, 0.0, -1.0),
    "one-minus": lambda: (1.0 - (COLUMN <= ROW).float()) * -5.0,
    "fill": lambda: torch.zeros(5, 7).masked_fill(COLUMN > ROW, -3.0),
    "product": lambda: (COLUMN <= ROW) * (COLUMN < 3),
    "step": lambda: torch.arange(3, 13, 2)[:, None] >= COLUMN,
    "views": lambda: (torch.arange(35).view(7, 5).t() * 0 + COLUMN <= ROW).expand(2, 5, 7)[1],
    "stretched": lambda: (COLUMN <= ROW)[None].expand(3, 5, 7).reshape(15, 7)[5:10],
}


@pytest.mark.parametrize("name", MASKS)
def test_evaluate_says_what_a_mask_holds(name: str) -> None:
    expected = MASKS[name]()

    def on_graph(x: Tensor) -> Tensor:
        scope = {"ROW": torch.arange(5)[:, None], "COLUMN": torch.arange(7), "torch": torch, "math": math}
        mask: Tensor = eval(MASKS[name].__code__, scope)
        return torch.where(mask, x, 0.0) if mask.dtype == torch.bool else x + mask

    graph = traced(on_graph, torch.randn(5, 7))
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    last = output.args[0]
    mask = last.args[0] if last.target == torch.ops.aten.where.self else last.args[1]
    axes = [Axis("i", 5), Axis("j", 7)]
    element = access(mask, axes[-mask.meta["val"].dim() :])
    value = evaluate(element)
    if isinstance(value, Condition) and any(not isinstance(x, Affine) for x in value.simplified().literals):
        assert name in ("nand", "views", "stretched"), value  # no formula of this kind; it proves nothing
        return
    assert not isinstance(value, Opaque), value
    for point in numbers(axes):
        assert number(value, point) == expected[point[axes[0]], point[axes[1]]], point
