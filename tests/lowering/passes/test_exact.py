"""Positions that their dtype wraps or rounds prove nothing; up to its last exact integer they prove all."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.lowering.passes.attentions import inputs, scores
from tests.lowering.passes.graphs import Rewritten, assert_equal_to, operators, rewrite, traced

LAST = {
    torch.uint8: 255,
    torch.int8: 127,
    torch.int16: 2**15 - 1,
    torch.int32: 2**31 - 1,
    torch.bfloat16: 256,
    torch.float16: 2048,
    torch.float32: 2**24,
    torch.float64: 2**53,
}

#: From nine positions, a type and the first position: positions in the type.
ROWS: dict[str, Callable[[Tensor, torch.dtype, int], Tensor]] = {
    "converted": lambda row, dtype, first: (row + first).to(dtype),
    "added": lambda row, dtype, first: row.to(dtype) + first,
    "added-twice": lambda row, dtype, first: (row.to(dtype) + (first - 5)) + 5,
    "subtracted": lambda row, dtype, first: (first + 8) - (8 - row).to(dtype),
    "tensors": lambda row, dtype, first: row.to(dtype) + torch.full((9,), first, dtype=dtype),
}


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def check(function: Callable[..., Tensor], *tensors: Tensor) -> bool:
    """Whether the mask was proven; right the result must be in any case."""
    graph = traced(function, *tensors)
    expected = function(*tensors)
    rewrite(graph)
    assert_equal_to(graph(*tensors), expected)
    return operators(graph) in (["decode"], ["prefill"])


@pytest.mark.parametrize("beyond", [0, 1])
@pytest.mark.parametrize("dtype", LAST, ids=str)
@pytest.mark.parametrize("row", ROWS)
def test_positions_up_to_the_last_exact_integer(row: str, dtype: torch.dtype, beyond: int) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = ROWS[row](torch.arange(9), dtype, LAST[dtype] - 8 + beyond)
        return attend(q, k, v, positions[None, :] <= positions[:, None])

    assert check(function, *inputs(9, 9)) == (beyond == 0)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.uint8, 256), (torch.int8, 128), (torch.bfloat16, 257), (torch.float16, 2049)], ids=str
)
def test_rows_of_a_narrow_type(dtype: torch.dtype, size: int) -> None:
    """One size whose positions the type just holds, and one that is longer."""
    for n in (size, size + 1):

        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            positions = torch.arange(q.shape[-2]).to(dtype)
            return attend(q, k, v, positions[None, :] <= positions[:, None])

        q, k, v = (x[:1, :1] for x in inputs(n, n))
        assert check(function, q, k, v) == (n == size)


@pytest.mark.parametrize("dtype", LAST, ids=str)
def test_symbolic_sizes(dtype: torch.dtype) -> None:
    """Any number of keys fits int32, in which the operators count them too, and no narrower type."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(k.shape[-2]).to(dtype)
        return attend(q, k, v, positions[None, :] <= positions[:, None])

    compiled = Rewritten(function)
    for n in (9, 300):
        tensors = inputs(n, n, b=1)
        for x in tensors:
            torch._dynamo.mark_dynamic(x, 2)
        assert_equal_to(compiled(*tensors), function(*tensors))
    proven = all("decode" in operators(graph) for graph in compiled.graphs)
    assert proven == (dtype in (torch.int32, torch.float64))


@pytest.mark.parametrize(
    "seen",
    [
        lambda i, j: j.to(torch.uint8) - i.to(torch.uint8) <= 4,
        lambda i, j: -i.to(torch.uint8) <= 4 - j.to(torch.uint8),
        lambda i, j: j.to(torch.int8) * 30 <= i.to(torch.int8) * 30 + 127,
        lambda i, j: j.to(torch.bfloat16) < 257,
        lambda i, j: (j + 2**24).float() <= (i + 4 + 2**24).float(),
        lambda i, j: j + 2**24 <= torch.tensor(2.0**24 + 1) + i * 0,
        lambda i, j: j.to(torch.bfloat16).add(100, alpha=3) <= i.to(torch.bfloat16).add(101, alpha=3),
        lambda i, j: j // 2 <= i // 2 + 1,
        lambda i, j: j + 0.5 <= i + 4,
        lambda i, j: (j / 1).int() <= i + 4,
    ],
)
def test_arithmetic_that_is_not_exact(seen: Callable[[Tensor, Tensor], Tensor]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, seen(torch.arange(5)[:, None], torch.arange(9)).expand(5, 9))

    check(function, *inputs(5, 9))


def test_two_elements_of_one_tensor_are_two() -> None:
    """Neighbours are compared, not an element with itself; nor are equal names of axes equal axes."""

    def function(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        return attend(q, k, v, (s[1:] == s[:-1])[None].expand(5, 9))

    segments = torch.tensor([1, 1, 1, 1, 2, 2, 2, 3, 4, 4])
    assert not check(function, *inputs(5, 9), segments)


def hidden_by(number: float, how: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.arange(9) > torch.arange(5)[:, None] + 4
        weights = scores(q, k, 1.0)
        if how == "written":
            return torch.softmax(weights.masked_fill(hidden, number), -1) @ v
        mask = torch.where(hidden, torch.tensor(number, dtype=dtype), torch.zeros((), dtype=dtype))
        return torch.softmax(weights + mask.to(q.dtype), -1) @ v

    return function


@pytest.mark.parametrize("how", ["written", "added"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_least_numbers_that_hide(how: str, dtype: torch.dtype) -> None:
    """Those of float32 and bfloat16 do, that of float16 is reached by scores: here they are around 1e5."""
    q, k, v = inputs(5, 9)
    function = hidden_by(torch.finfo(dtype).min, how, dtype)
    assert check(function, 500 * q, 100 * k, v) == (dtype != torch.float16)


def test_least_number_that_becomes_infinite() -> None:
    """In float16 the least number of float32 is -inf."""
    q, k, v = inputs(5, 9, dtype=torch.float16)
    function = hidden_by(torch.finfo(torch.float32).min, "added", torch.float32)
    graph = traced(function, q, k, v)
    rewrite(graph)
    assert operators(graph) == ["decode"]
    assert_equal_to(graph(q, k, v), function(q, k, v), tolerance=3e-2)


@pytest.mark.parametrize(
    "mask",
    [
        lambda: torch.ones(5, 9, dtype=torch.bool).tril(4),
        lambda: torch.arange(9) <= torch.arange(5)[:, None] + 4,
        lambda: torch.full((5, 9), True),
        lambda: torch.arange(9) < 7,
    ],
)
def test_a_bool_that_is_added_is_a_bias(mask: Callable[[], Tensor]) -> None:
    assert not check(lambda q, k, v: torch.softmax(scores(q, k) + mask(), -1) @ v, *inputs(5, 9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_that_are_rounded_to_less_than_their_type(dtype: torch.dtype) -> None:
    def rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(scores(q, k).to(dtype).float(), -1) @ v

    def narrowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(scores(q, k), -1).to(dtype).float() @ v

    for function in (rounded, narrowed):
        assert not check(function, *inputs(5, 9))


def test_what_is_broadcast_on_the_way() -> None:
    q, k, v = inputs(5, 9)
    added = lambda *tensors: torch.softmax(scores(*tensors[:2]) + torch.zeros(5, 9), -1) @ tensors[2]  # noqa: E731
    assert not check(added, q[:, :, :1], k, v)
    assert not check(F.scaled_dot_product_attention, q, k, v[:, :, :1])
    assert check(lambda *tensors: attend(*tensors, torch.full((5, 1), 0.0)), q, k, v)
    assert check(lambda *tensors: attend(*tensors, torch.full((1, 1), 0.0)), q, k, v)


def test_infinite_times_false_is_nan() -> None:
    """A mask by multiplication hides nothing where it is false, but makes it NaN."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.arange(9) > torch.arange(5)[:, None] + 4
        return torch.softmax(scores(q, k) + hidden * -math.inf, -1) @ v

    graph = traced(function, *inputs(5, 9))
    rewrite(graph)
    assert operators(graph) == []
