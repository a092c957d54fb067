"""Windows, capped scores and sinks are found in every spelling, and become options of the operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.lowering.passes.attentions import H_KV, SCALE, B, H, eager, inputs, positions, repeat_kv, scores
from tests.lowering.passes.graphs import Rewritten, assert_equal_to, dynamic_lengths, operators, rewrite, traced

Attend = Callable[..., Tensor]


def check(function: Attend, *tensors: Tensor, tolerance: float = 2e-5) -> dict[str, Any]:
    """Rewrite a graph, compare it with float64, and return the options of the one call that it is now."""
    graph = traced(function, *tensors)
    record = rewrite(graph)
    assert [d.rewritten for d in record] == [True], "\n".join(map(str, record))
    expected = function(*(x.double() if x.is_floating_point() else x for x in tensors))
    assert_equal_to(graph(*tensors), expected, tolerance=tolerance)
    (call,) = (node for node in graph.graph.nodes if str(node.target).startswith("flashmla."))
    return dict(call.kwargs)


def seen(q: Tensor, k: Tensor, window: int, start: int | Tensor | None = None) -> Tensor:
    """The causal window, as transformers writes it, of queries that begin at ``start`` (the last ones)."""
    i, j = positions(q, k)
    i = i + (k.shape[-2] - q.shape[-2] if start is None else start)
    return (j > i - window) & (j <= i)


def by_sdpa(window: int) -> Attend:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=seen(q, k, window), scale=SCALE)


def by_eager(window: int, hidden: float = -math.inf) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        zeros = torch.zeros((), dtype=q.dtype)
        return eager(q, k, v, torch.where(seen(q, k, window), zeros, torch.full((), hidden, dtype=q.dtype)))

    return attend


def by_triu(window: int) -> Attend:
    """Two masks, one of which is filled: mistral's older code."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = positions(q, k)
        distance = i + k.shape[-2] - q.shape[-2] - j
        hidden = scores(q, k).masked_fill(distance < 0, -math.inf)
        return torch.softmax(hidden.masked_fill(distance >= window, -math.inf), -1) @ v

    return attend


WINDOWS = {
    "sdpa": by_sdpa,
    "eager": by_eager,
    "least": lambda n: by_eager(n, torch.finfo(torch.float32).min),
    "two": by_triu,
}


@pytest.mark.parametrize("spelling", WINDOWS)
@pytest.mark.parametrize(("s_q", "s_kv"), [(1, 9), (5, 9), (9, 9), (70, 90)])
@pytest.mark.parametrize("window", [1, 4])
def test_windows(spelling: str, s_q: int, s_kv: int, window: int) -> None:
    assert check(WINDOWS[spelling](window), *inputs(s_q, s_kv)) == {"window": window}


def test_windows_of_long_prompts_are_prefill() -> None:
    graph = traced(by_sdpa(7), *inputs(70, 90, b=1))
    rewrite(graph)
    assert operators(graph) == ["prefill"]
    assert_equal_to(graph(*inputs(70, 90, b=1)), by_sdpa(7)(*inputs(70, 90, b=1)))


def test_a_window_as_wide_as_the_cache_is_none() -> None:
    assert check(by_sdpa(9), *inputs(5, 9)) == {}


def test_a_window_that_is_not_causal() -> None:
    """All queries see the last keys alike."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _, j = positions(q, k)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(j >= 5).expand(q.shape[-2], -1))

    assert check(attend, *inputs(5, 9)) == {"window": 4}


@pytest.mark.parametrize("s_q", [1, 3])
def test_a_window_at_a_position_that_is_data(s_q: int) -> None:
    """A static cache: new keys are written where the position says, and the mask follows it."""

    def step(q: Tensor, k: Tensor, v: Tensor, new: Tensor, start: Tensor) -> Tensor:
        place = start + torch.arange(s_q)
        k, v = k.index_copy(2, place, new), v.index_copy(2, place, new)
        _, j = positions(q, k)
        mask = (j > place[:, None] - 4) & (j <= place[:, None])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None])

    q, k, v = inputs(s_q, 12)
    new = torch.randn(B, H, s_q, 16)
    graph = traced(step, q, k, v, new, torch.tensor(5))
    record = rewrite(graph)
    assert operators(graph) == ["decode"], "\n".join(map(str, record))
    for start in (0, 2, 5, 12 - s_q):
        assert_equal_to(graph(q, k, v, new, torch.tensor(start)), step(q, k, v, new, torch.tensor(start)))


def test_one_graph_for_all_lengths() -> None:
    compiled = Rewritten(by_sdpa(6))
    for s_q, s_kv in ((5, 9), (7, 14), (6, 90)):
        tensors = inputs(s_q, s_kv)
        dynamic_lengths(*tensors)
        assert_equal_to(compiled(*tensors), by_sdpa(6)(*tensors))
    assert len(compiled.graphs) == 1
    assert compiled.refusals == []


def capped(softcap: float, window: int = 0, dtype: torch.dtype = torch.float32) -> Attend:
    """gemma2's."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.tanh(scores(q, k) / softcap) * softcap
        if window:
            weights = weights.masked_fill(~seen(q, k, window), -math.inf)
        return F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    return attend


@pytest.mark.parametrize("softcap", [0.7, 50.0, -3.0])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize(("s_q", "s_kv"), [(1, 9), (5, 9), (70, 70)])
def test_softcaps(softcap: float, window: int, s_q: int, s_kv: int) -> None:
    options = check(capped(softcap, window), *inputs(s_q, s_kv))
    assert options == {"softcap": abs(softcap)} | ({"window": window} if window else {})


@pytest.mark.parametrize("change", [torch.tanh, lambda s: torch.tanh(s) * 2, lambda s: 3 * torch.tanh(s * -0.5)])
def test_any_factors_around_the_cap(change: Callable[[Tensor], Tensor]) -> None:
    check(lambda q, k, v: torch.softmax(change(scores(q, k)), -1) @ v, *inputs(5, 9))


def with_sink(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None = None) -> Tensor:
    """gpt-oss's: the sink is the last score, and its weight is dropped."""
    weights = scores(q, k)
    weights = weights if mask is None else weights + mask
    together = torch.cat([weights, sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)], dim=-1)
    together = together - together.max(dim=-1, keepdim=True).values
    probabilities = F.softmax(together, dim=-1, dtype=together.dtype)[..., :-1]
    return torch.matmul(F.dropout(probabilities, p=0.1, training=False), v)


def _as_amax(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    together = torch.cat([scores(q, k), sinks[None, :, None, None].expand(q.shape[0], H, q.shape[-2], 1)], dim=-1)
    weights = (together - together.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True))[..., : k.shape[-2]] @ v


def _windowed(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    zeros = torch.zeros((), dtype=q.dtype)
    return with_sink(q, k, v, sinks, torch.where(seen(q, k, 4), zeros, torch.finfo(q.dtype).min))


def _grouped(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return with_sink(q, repeat_kv(k[:, :H_KV], H // H_KV), repeat_kv(v[:, :H_KV], H // H_KV), sinks)


@pytest.mark.parametrize("attend", [with_sink, _as_amax, _windowed, _grouped])
@pytest.mark.parametrize(("s_q", "s_kv"), [(1, 9), (5, 9), (70, 70)])
@pytest.mark.parametrize("b", [1, B])
def test_sinks(attend: Attend, s_q: int, s_kv: int, b: int) -> None:
    options = check(attend, *inputs(s_q, s_kv, b=b), torch.linspace(-2, 3, H))
    assert "attn_sink" in options
    assert options.get("window", 0) == (4 if attend is _windowed else 0)


def test_sinks_of_half_types_are_converted() -> None:
    q, k, v = inputs(5, 9, dtype=torch.bfloat16)
    sinks = torch.linspace(-2, 3, H).bfloat16()
    check(with_sink, q, k, v, sinks, tolerance=2e-2)


def test_masks_read_at_run_time_have_no_options() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        hidden = torch.tanh(scores(q, k)).masked_fill(~padding[:, None, None], -math.inf)
        return torch.softmax(hidden, -1) @ v

    (decision,) = rewrite(traced(attend, *inputs(5, 9), torch.ones(B, 9, dtype=torch.bool)))
    assert not decision.rewritten
    assert "capped" in decision.reason
