"""Code that is almost attention as the operators have it is left alone, with the reason; no node is changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from tests.lowering.passes.attentions import H_KV, SCALE, B, H, eager, inputs, positions, scores, sdpa
from tests.lowering.passes.graphs import Rewritten, dynamic_lengths, operators, rewrite, traced


class NearMiss(NamedTuple):
    function: Callable[..., Any]
    reason: str  # a part of it
    inputs: tuple[Tensor, ...] = inputs(5, 9)


def masked(condition: Callable[[Tensor, Tensor], Tensor], hidden: float = -math.inf) -> Callable[..., Tensor]:
    """Attention under a condition of query and key positions, in the middle of which the new queries lie."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = positions(q, k)
        return torch.softmax(scores(q, k).masked_fill(~condition(i, j), hidden), -1) @ v

    return attend


def between(change: Callable[[Tensor], Tensor], *, behind: bool = False) -> Callable[..., Tensor]:
    """Attention with something done to the scores, or to the probabilities."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if behind:
            return change(torch.softmax(scores(q, k), -1)) @ v
        return torch.softmax(change(scores(q, k)), -1) @ v

    return attend


def with_data(condition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """SDPA under a condition that other tensors take part in."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *data: Tensor) -> Tensor:
        i, j = positions(q, k)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=condition(i, j, *data))

    return attend


def _own_softmax(exponential: Callable[[Tensor], Tensor], extra: float = 0.0) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = exponential(scores(q, k))
        return weights / (weights.sum(-1, keepdim=True) + extra) @ v

    return attend


def _sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    """The sink of gpt-oss: one more score, whose value is nothing."""
    together = torch.cat([scores(q, k), sink.expand(B, H, q.shape[2], 1)], dim=-1)
    return torch.softmax(together, -1)[..., :-1] @ v


def _sink_first(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    together = torch.cat([sink.expand(B, H, q.shape[2], 1), scores(q, k)], dim=-1)
    return torch.softmax(together, -1)[..., 1:] @ v


def _two_sinks(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    together = torch.cat([scores(q, k), sink.expand(B, H, q.shape[2], 2)], dim=-1)
    return torch.softmax(together, -1)[..., :-2] @ v


def _scaled_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = positions(q, k)
    mask = torch.where(j <= i + 4, 0.0, torch.finfo(q.dtype).min)
    return torch.softmax((q @ k.transpose(-1, -2) + mask) * SCALE, -1) @ v


def _mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q.float(), k.float()), -1).to(v.dtype) @ v


def _also(use: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        raw = scores(q, k)
        weights = torch.softmax(raw, -1)
        return weights @ v, use(raw, weights)

    return attend


def _columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys that lie as columns: the elements of one key are far apart."""
    return eager(q, k.transpose(-1, -2), v)


def _log_sum_exp(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


Q, K, V = inputs(5, 9)
AT = torch.tensor(4)

NEAR_MISSES: dict[str, NearMiss] = {
    # scales
    "scale-is-a-tensor": NearMiss(between(lambda s: s * s.new_tensor([2.0, 3.0, 4.0, 5.0])[:, None, None]), "scale"),
    "scale-from-data": NearMiss(lambda q, k, v, t: torch.softmax(q @ k.mT * t, -1) @ v, "scale", (Q, K, V, AT * 1.0)),
    "scale-of-the-mask": NearMiss(_scaled_mask, "applied to the mask too"),
    # what a query sees
    "strict-mask": NearMiss(masked(lambda i, j: j < i), "first query is not proven to see a key"),
    "one-too-far": NearMiss(masked(lambda i, j: j <= i + 5), "not proven to be at most the 9"),
    "anti-causal": NearMiss(masked(lambda i, j: j >= i), "hides early keys"),
    "window-of-the-past": NearMiss(
        masked(lambda i, j: (j <= i + 4) & (j > 2 * i)), "hides early keys, but is no window"
    ),
    "two-sided-window": NearMiss(masked(lambda i, j: j >= i + 1), "hides early keys, but is no window"),
    "prefix-and-window": NearMiss(masked(lambda i, j: (j < 7) & (j > i)), "hides early keys, but is no window"),
    "empty-window": NearMiss(masked(lambda i, j: (j <= i + 2) & (j > i + 2)), "window of 0 keys"),
    "window-from-data": NearMiss(
        with_data(lambda i, j, n: (j <= i + 4) & (j > i + 4 - n) & (j > i)), "depends on data too", (Q, K, V, AT)
    ),
    "dilated": NearMiss(masked(lambda i, j: j <= 2 * i), "not causal"),
    "reversed-queries": NearMiss(masked(lambda i, j: j <= 4 - i), "not causal"),
    "hidden-queries": NearMiss(masked(lambda i, j: (i < 3) & (j <= i)), "several conditions"),
    "prefix-and-causal": NearMiss(
        masked(lambda i, j: (j <= i + 4) & (j < 7)), "several conditions: key <= query + 4 and key <= 6"
    ),
    "prefix-or-causal": NearMiss(masked(lambda i, j: (j <= i) | (j < 3)), "not causal"),
    "blocks": NearMiss(masked(lambda i, j: i // 2 == j // 2), "several conditions"),
    "nothing-seen": NearMiss(masked(lambda i, j: j < 0 * i), "not proven to see a key"),
    "all-hidden": NearMiss(with_data(lambda i, j: torch.zeros(5, 9, dtype=torch.bool)), "hides every key"),
    "top-left-of-more-queries": NearMiss(sdpa(is_causal=True), "not proven to be at most", inputs(9, 5)),
    "by-head": NearMiss(
        with_data(lambda i, j: j <= i + torch.arange(H)[:, None, None]), "differs between queries, sequences or heads"
    ),
    # what a mask adds
    "least-that-is-not-least": NearMiss(masked(lambda i, j: j <= i + 4, hidden=-1e9), "not -inf"),
    "alibi": NearMiss(
        between(lambda s: s + -0.5 * (torch.arange(9) - torch.arange(5)[:, None]).abs()), "not proven: mul"
    ),
    "distance-bias": NearMiss(between(lambda s: s + torch.arange(9)), "a bias and no mask"),
    "bonus": NearMiss(between(lambda s: s + torch.where(torch.arange(9) < 4, 0.5, -math.inf)), "not 0 or -inf"),
    # between the scores and the values
    "capped-twice": NearMiss(between(lambda s: torch.tanh(3 * torch.tanh(s))), "capped twice"),
    "mask-inside-the-cap": NearMiss(
        between(lambda s: torch.tanh(s.masked_fill(torch.ones(5, 9).tril(4) == 0, -math.inf))), "capped with the scores"
    ),
    "capped-by-another-function": NearMiss(between(lambda s: torch.atan(s)), "atan"),
    "dropout": NearMiss(between(lambda p: F.dropout(p, 0.1), behind=True), "between the softmax and the values"),
    "sdpa-dropout": NearMiss(sdpa(dropout_p=0.1), "between the softmax and the values"),
    "probabilities-squared": NearMiss(between(lambda p: p * p, behind=True), "between the softmax and the values"),
    "top-k": NearMiss(
        between(lambda s: s.masked_fill(s < s.topk(4).values[..., -1:], -math.inf)), "where|depends on data|not combine"
    ),
    "sink-of-each-query": NearMiss(_sink, "is read along", (Q, K, V, torch.ones(1, H, 5, 1))),
    "sink-of-each-sequence": NearMiss(_sink, "is read along", (Q, K, V, torch.ones(B, H, 1, 1))),
    "sink-first": NearMiss(_sink_first, "keys are cut off", (Q, K, V, torch.ones(1, H, 1, 1))),
    "two-sinks": NearMiss(_two_sinks, "keys are cut off", (Q, K, V, torch.ones(1, H, 1, 1))),
    "one-key-cut-off": NearMiss(
        lambda q, k, v: torch.softmax(scores(q, k), -1)[..., :-1] @ v[..., :-1, :], "among the scores of a softmax"
    ),
    "softmax-over-queries": NearMiss(
        lambda q, k, v: torch.softmax(scores(q, k), -2) @ v, "another dimension than the keys"
    ),
    "softmax-over-heads": NearMiss(
        lambda q, k, v: torch.softmax(scores(q, k), 1) @ v, "another dimension than the keys"
    ),
    "softmax-off-by-one": NearMiss(_own_softmax(torch.exp, 1.0), "not a softmax"),
    "no-largest-score": NearMiss(_own_softmax(torch.exp), "not a softmax"),
    # who else looks
    "probabilities-returned": NearMiss(_also(lambda raw, weights: weights), "another use"),
    "scores-returned": NearMiss(_also(lambda raw, weights: raw), "another use"),
    "log-sum-exp-returned": NearMiss(_log_sum_exp, "another use"),
    # rows
    "keys-by-head-values-shared": NearMiss(
        lambda q, k, v: eager(q, k, v[:, :1].expand(-1, H, -1, -1)), "not rows of one cache"
    ),
    "keys-in-columns": NearMiss(_columns, "the keys are no rows", (Q, K.mT.contiguous(), V)),
    "values-in-columns": NearMiss(
        lambda q, k, v: eager(q, k, v.mT), "the values are no rows", (Q, K, V.mT.contiguous())
    ),
    "mixed-dtypes": NearMiss(_mixed, "mixed dtypes", inputs(5, 9, dtype=torch.bfloat16)),
    "float64": NearMiss(eager, "float64 is not a type of the operators", tuple(x.double() for x in (Q, K, V))),
}


def check_untouched(graph: torch.fx.GraphModule, reason: str) -> None:
    before = graph.code
    record = rewrite(graph)
    reasons = [decision.reason for decision in record]
    assert reasons, "not even a candidate"
    assert not any(decision.rewritten for decision in record)
    assert any(part in text for part in reason.split("|") for text in reasons), reasons
    assert graph.code == before


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name: str) -> None:
    near_miss = NEAR_MISSES[name]
    graph = traced(near_miss.function, *near_miss.inputs)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    check_untouched(graph, near_miss.reason)


@pytest.mark.parametrize("h_kv", [H, H_KV])
def test_lengths_that_are_not_proven_to_fit(h_kv: int) -> None:
    """`is_causal` counts from the first key, which is right only where there are no more queries than keys."""
    compiled = Rewritten(sdpa(is_causal=True, enable_gqa=h_kv < H))
    tensors = inputs(5, 9, h_kv)
    dynamic_lengths(*tensors)
    compiled(*tensors)
    (refusal,) = compiled.refusals
    assert "not proven to be at most" in refusal


def test_a_gradient_is_required() -> None:
    """The joint graph of a forward and its backward; and a graph of the forward alone whose inputs want gradients."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    def partition(joint: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        check_untouched(joint, "a gradient is required")
        from torch._functorch.partitioners import default_partition

        return default_partition(joint, *args, **kwargs)

    tensors = [x.requires_grad_() for x in (t.clone() for t in inputs(5, 9))]
    with torch.enable_grad():
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=partition)
        torch.compile(eager, backend=backend)(*tensors).sum().backward()
    assert len(graphs) == 2
    assert tensors[0].grad is not None


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: torch.relu(scores(q, k)) @ v,
        lambda q, k, v: torch.sigmoid(scores(q, k)) @ v,
        lambda q, k, v: scores(q, k) @ v,
        lambda q, k, v: q @ (k.mT @ v),
    ],
    ids=["relu", "sigmoid", "linear", "linear-keys-first"],
)
def test_other_attention_is_no_candidate(function: Callable[..., Tensor]) -> None:
    graph = traced(function, Q, K, V)
    assert len(rewrite(graph)) == 0
    assert operators(graph) == []
