"""Masks that are data: one graph reads them at run time, and is exact whatever they hold at the next call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.lowering.passes.attentions import H_KV, B, H, bottom_right, eager, inputs, positions, repeat_kv, scores
from tests.lowering.passes.graphs import Rewritten, assert_equal_to, dynamic_lengths, operators, rewrite, traced

S_Q, S_KV = 5, 9
LEAST = torch.finfo(torch.float32).min

#: ``[b, s_kv]``: whether each key of two sequences is a token.
PADDING: dict[str, Tensor] = {
    "all": torch.ones(B, S_KV, dtype=torch.bool),
    "right": torch.arange(S_KV) < torch.tensor([[9], [6]]),
    "left": torch.arange(S_KV) >= torch.tensor([[0], [3]]),
    "left-all": torch.arange(S_KV) >= torch.tensor([[2], [2]]),
    "holes": torch.tensor([[1, 1, 0, 1, 0, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1, 0, 0, 1]]).bool(),
    "one-empty": torch.tensor([[True], [False]]).expand(B, S_KV),
    "none": torch.zeros(B, S_KV, dtype=torch.bool),
}


def additive(seen: Tensor, hidden: float) -> Tensor:
    return torch.where(seen, 0.0, hidden)


def by_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] < q.shape[1])


def by_fill(number: float, *, inverted: bool = False) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        weights = scores(q, k)
        filled = weights.masked_fill(seen, number) if inverted else torch.where(seen, weights, number)
        return torch.softmax(filled, -1) @ v

    return attend


def repeated(x: Tensor) -> Tensor:
    return repeat_kv(x[:, :H_KV], H // H_KV)


Spelling = tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]

#: Attention, and the mask that it takes of the padding [b, s_kv].
SPELLINGS: dict[str, Spelling] = {
    "sdpa-bool": (by_sdpa, lambda seen: seen[:, None, None].expand(B, 1, S_Q, S_KV)),
    "sdpa-bool-of-keys": (lambda q, k, v, seen: by_sdpa(q, k, v, seen[:, None, None]), lambda seen: seen),
    "sdpa-int64": (lambda q, k, v, seen: by_sdpa(q, k, v, seen[:, None, None].bool()), lambda seen: seen.long()),
    "sdpa-compared": (lambda q, k, v, seen: by_sdpa(q, k, v, (seen != 0)[:, None, None]), lambda seen: seen.int()),
    "sdpa-infinite": (by_sdpa, lambda seen: additive(seen, -math.inf)[:, None, None].repeat(1, 1, S_Q, 1)),
    "sdpa-least": (by_sdpa, lambda seen: additive(seen, LEAST)[:, None, None].repeat(1, 1, S_Q, 1)),
    "sdpa-bias": (by_sdpa, lambda seen: (additive(seen, LEAST) + torch.arange(9.0))[:, None, None]),
    "sdpa-by-head": (by_sdpa, lambda seen: torch.stack([seen, seen.flip(1)] * (H // 2), 1)[:, :, None]),
    "sdpa-indexed": (
        lambda q, k, v, seen: by_sdpa(
            q, k, v, seen[torch.arange(B)[:, None, None, None], torch.arange(k.shape[2])[None, None, None]]
        ),
        lambda seen: seen,
    ),
    "eager-least": (eager, lambda seen: additive(seen, LEAST)[:, None, None]),
    "eager-infinite": (eager, lambda seen: additive(seen, -math.inf)[:, None, None]),
    "eager-causal": (
        lambda q, k, v, seen: eager(
            q, k, v, torch.where(bottom_right(q, k) & seen[:, None, None], 0.0, torch.finfo(q.dtype).min)
        ),
        lambda seen: seen,
    ),
    "eager-of-bert": (lambda q, k, v, m: eager(q, k, v, (1.0 - m[:, None, None].to(q.dtype)) * LEAST), Tensor.long),
    "fill-infinite": (by_fill(-math.inf), lambda seen: seen[:, None, None]),
    "fill-least": (by_fill(LEAST), lambda seen: seen[:, None, None]),
    "fill-inverted": (by_fill(-math.inf, inverted=True), lambda seen: ~seen[:, None, None]),
    "fill-least-inverted": (by_fill(LEAST, inverted=True), lambda seen: ~seen[:, None, None]),
    "fill-twice": (
        lambda q, k, v, seen: (
            torch.softmax(
                scores(q, k).masked_fill(~bottom_right(q, k), -math.inf).masked_fill(~seen[:, None, None], -math.inf),
                -1,
            )
            @ v
        ),
        lambda seen: seen,
    ),
    "gqa": (lambda q, k, v, m: by_sdpa(q, k[:, :H_KV], v[:, :H_KV], m), lambda seen: seen[:, None, None]),
    "gqa-repeat": (
        lambda q, k, v, m: eager(q, repeated(k), repeated(v), m),
        lambda seen: additive(seen, LEAST)[:, None, None],
    ),
    "gqa-by-kv-head": (
        lambda q, k, v, m: eager(q, repeated(k), repeated(v), repeat_kv(m, H // H_KV)),
        lambda seen: additive(torch.stack([seen, seen.flip(1)], 1), LEAST)[:, :, None],
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_graph_for_every_padding(spelling: str) -> None:
    function, mask_of = SPELLINGS[spelling]
    q, k, v = inputs(S_Q, S_KV)
    graph = traced(function, q, k, v, mask_of(PADDING["all"]))
    record = rewrite(graph)
    assert operators(graph) == ["attend_masked"], "\n".join(map(str, record))
    assert not any(node.target == torch.ops.aten.bmm.default for node in graph.graph.nodes)
    for padding in PADDING.values():
        mask = mask_of(padding)
        torch.testing.assert_close(graph(q, k, v, mask), function(q, k, v, mask), atol=2e-5, rtol=2e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spelling", ["sdpa-bool", "sdpa-bool-of-keys", "fill-infinite", "gqa"])
def test_half_types(spelling: str, dtype: torch.dtype) -> None:
    function, mask_of = SPELLINGS[spelling]
    q, k, v = inputs(S_Q, S_KV, dtype=dtype)
    graph = traced(function, q, k, v, mask_of(PADDING["all"]))
    rewrite(graph)
    assert operators(graph) == ["attend_masked"]
    for padding in PADDING.values():
        expected = function(*(x.double() for x in (q, k, v)), mask_of(padding))
        torch.testing.assert_close(
            graph(q, k, v, mask_of(padding)).double(), expected, atol=3e-2, rtol=3e-2, equal_nan=True
        )


def with_data(condition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """SDPA under a condition that other tensors take part in."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *data: Tensor) -> Tensor:
        return by_sdpa(q, k, v, condition(*positions(q, k), *data))

    return attend


def number(*values: int) -> list[tuple[Tensor, ...]]:
    return [(torch.tensor(value),) for value in values]


#: A condition on query i, key j and data, and the data of several calls.
CONDITIONS: dict[str, tuple[Callable[..., Tensor], list[tuple[Tensor, ...]]]] = {
    "lengths": (lambda i, j, n: j < n[:, None, None, None], [(torch.tensor(n),) for n in ([4, 7], [9, 9], [0, 20])]),
    "last-position": (lambda i, j, n: j <= i + n, number(4, 0, -2, 9, -7)),
    "two-tensors": (lambda i, j, m, n: j < m + n, [(torch.tensor(2), torch.tensor(n)) for n in (3, 7, 9, -2)]),
    "blocks": (
        lambda i, j, block: block[:, None, -S_Q:, None] == block[:, None, None, :],
        [(torch.tensor(2 * [block]),) for block in ([0] * 9, [0, 0, 0, 1, 1, 1, 1, 1, 2], [1, 0] * 4 + [1])],
    ),
    "packed": (
        lambda i, j, block: (j <= i + 4) & (block[:, None, -S_Q:, None] == block[:, None, None, :]),
        [(torch.tensor(2 * [block]),) for block in ([0] * 9, [0, 0, 0, 1, 1, 1, 1, 1, 2])],
    ),
    "window": (lambda i, j, n: (j <= i + 4) & (j > i + 4 - n), number(9, 20, 3, 1, 0)),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_conditions_on_data(name: str) -> None:
    condition, calls = CONDITIONS[name]
    q, k, v = inputs(S_Q, S_KV)
    graph = traced(with_data(condition), q, k, v, *calls[0])
    record = rewrite(graph)
    assert operators(graph) == ["attend_masked"], "\n".join(map(str, record))
    for data in calls:
        assert_equal_to(graph(q, k, v, *data), with_data(condition)(q, k, v, *data))


def test_a_window_of_one_query() -> None:
    """For one query any span of keys will do; for several, a constant window never is one."""

    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        _, j = positions(q, k)
        return by_sdpa(q, k, v, (j > 3) & seen[:, None, None])

    q, k, v = inputs(1, S_KV)
    graph = traced(attend, q, k, v, PADDING["all"])
    rewrite(graph)
    assert operators(graph) == ["attend_masked"]
    for padding in PADDING.values():
        assert_equal_to(graph(q, k, v, padding), attend(q, k, v, padding))


def test_one_graph_for_all_lengths() -> None:
    compiled = Rewritten(lambda q, k, v, seen: by_sdpa(q, k, v, bottom_right(q, k) & seen[:, None, None]))
    for s_q, s_kv in ((5, 9), (6, 14), (70, 90), (9, 7)):
        tensors = inputs(s_q, s_kv)
        dynamic_lengths(*tensors)
        for start in (0, 2):
            seen = (torch.arange(s_kv) >= start).expand(B, s_kv).contiguous()
            torch._dynamo.mark_dynamic(seen, 1)
            expected = by_sdpa(*tensors, bottom_right(*tensors[:2]) & seen[:, None, None])
            assert_equal_to(compiled(*tensors, seen), expected)
    assert len(compiled.graphs) == 1
    assert compiled.refusals == []


def test_hidden_rows_are_not_read() -> None:
    """A cache holds anything behind its last token."""
    q, k, v = inputs(1, S_KV)
    graph = traced(SPELLINGS["sdpa-bool-of-keys"][0], q, k, v, PADDING["all"])
    rewrite(graph)
    expected = graph(q, k, v, PADDING["right"])
    unseen = ~PADDING["right"][:, None, :, None]
    assert torch.equal(
        graph(q, k.masked_fill(unseen, math.nan), v.masked_fill(unseen, math.nan), PADDING["right"]), expected
    )


def test_the_mask_is_prepared_once_for_all_layers() -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        for _ in range(3):
            q = by_fill(-math.inf, inverted=True)(q, k, v, hidden)
        return q

    graph = traced(layers, *inputs(S_Q, S_KV), ~PADDING["all"][:, None, None])
    rewrite(graph)
    assert operators(graph) == 3 * ["attend_masked"]
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.logical_not.default)) == 1


REFUSED: dict[str, tuple[Callable[..., Any], str, tuple[Tensor, ...]]] = {
    "bias-of-weights": (
        lambda q, k, v, table, bucket: eager(q, k, v, table[bucket][None, None]),
        "not known",
        (torch.randn(7), torch.zeros(S_Q, S_KV, dtype=torch.int64)),
    ),
    "window-of-many-queries": (
        with_data(lambda i, j, seen: (j > i) & seen[:, None, None]),
        "hides early keys",
        (PADDING["all"],),
    ),
    "two-masks-of-least-numbers": (
        lambda q, k, v, seen: torch.softmax(torch.where(seen, scores(q, k), LEAST) + additive(seen, LEAST), -1) @ v,
        "data",
        (PADDING["all"][:, None, None],),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_left_alone(name: str) -> None:
    function, reason, data = REFUSED[name]
    graph = traced(function, *inputs(S_Q, S_KV), *data)
    (decision,) = rewrite(graph)
    assert not decision.rewritten
    assert reason in decision.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_what_a_large_number_leaves_of_scores(dtype: torch.dtype) -> None:
    mask = additive(PADDING["all"], -math.inf)[:, None, None].to(dtype)
    graph = traced(eager, *inputs(S_Q, S_KV, dtype=dtype), mask)
    (decision,) = rewrite(graph)
    assert not decision.rewritten
    assert "not known" in decision.reason
