"""Expanded latents become absorbed attention where every step of the expansion is proven, and not elsewhere."""

from __future__ import annotations

import pytest
import torch

from tests.lowering.passes.graphs import Rewritten, assert_equal_to, dynamic_lengths, operators, rewrite, traced
from tests.lowering.passes.latents import D_C, D_NOPE, D_R, B, H, Layer, eager, inputs, join_by_copy, sdpa

ABSORBED = ["bmm", "decode_up"]

LAYERS = {
    "sdpa": Layer(),
    "sdpa-copy": Layer(join=join_by_copy),
    "eager": Layer(attend=eager),
    "eager-copy": Layer(attend=eager, join=join_by_copy),
    "rope-first": Layer(
        join=lambda k_nope, k_rope: torch.cat([k_rope.expand(-1, k_nope.shape[1], -1, -1), k_nope], dim=-1)
    ),
}


@pytest.mark.parametrize("s_q", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_short_queries_are_absorbed(name: str, s_q: int) -> None:
    layer, tensors = LAYERS[name], inputs(s_q, 9)
    graph = traced(layer, *tensors)
    record = rewrite(graph)
    assert [d.rewritten for d in record] == [True, True], "\n".join(map(str, record))
    assert operators(graph) == ABSORBED
    expected = layer(*(x.double() for x in tensors))
    assert_equal_to(graph(*tensors), expected)


def test_nothing_of_the_size_of_the_expansion_is_left() -> None:
    """Not the expanded cache, its copies or the scores: the largest new tensor is the absorbed query."""
    tensors = inputs(1, 200)
    graph = traced(LAYERS["sdpa-copy"], *tensors)
    rewrite(graph)
    computed = [
        node.meta["val"]
        for node in graph.graph.nodes
        if node.op == "call_function" and isinstance(node.meta["val"], torch.Tensor) and not node.meta["val"]._is_view()
    ]
    assert max(x.numel() for x in computed if x.untyped_storage().nbytes() == x.numel() * x.element_size()) <= 200 * 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype) -> None:
    layer, tensors = Layer(), inputs(2, 9, dtype)
    graph = traced(layer, *tensors)
    rewrite(graph)
    assert operators(graph) == ABSORBED
    assert_equal_to(graph(*tensors), layer(*(x.double() for x in tensors)), tolerance=0.3)


def test_one_graph_for_all_lengths() -> None:
    """New tokens are one tensor, as in a model: queries and new latents cannot differ in number."""

    def grown(new: torch.Tensor, past: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        q, rows = new.split([D_NOPE + D_R, D_C + D_R], dim=-1)
        latent, k_rope = torch.cat([past, rows[:, :1]], dim=2).split([D_C, D_R], dim=-1)
        out: torch.Tensor = Layer()(q, latent, k_rope, weight)
        return out

    compiled = Rewritten(grown)
    weight = inputs(1, 1)[3]
    for past, s_q in ((6, 2), (17, 3), (64, 5)):
        tensors = torch.randn(B, H, s_q, D_NOPE + 2 * D_R + D_C), torch.randn(B, 1, past, D_C + D_R)
        dynamic_lengths(*tensors)
        assert_equal_to(compiled(*tensors, weight), grown(*(x.double() for x in (*tensors, weight))))
    assert compiled.refusals == []
    assert len(compiled.graphs) == 1
    assert operators(compiled.graphs[0]) == ABSORBED


NEAR_MISSES = {
    "bias": (Layer(bias=True), "0 parts of the keys are projections"),
    "keys-normalised": (Layer(change_keys=lambda k: torch.nn.functional.normalize(k, dim=-1)), "not one"),
    "keys-scaled-by-head": (Layer(change_keys=lambda k: k * torch.arange(4.0)[:, None, None]), "not one"),
    "values-gated": (Layer(change_values=lambda v: torch.sigmoid(v)), "not a projection of latents"),
    "values-of-other-latents": (Layer(change_latents_of_values=lambda c: c + 1), "not the same latents"),
    "values-of-shifted-latents": (Layer(change_latents_of_values=lambda c: c.flip(2)), "not the same latents"),
    "values-of-one-sequence": (
        Layer(change_latents_of_values=lambda c: c[:1].expand_as(c)),
        "not the same latents",
    ),
    "rope-by-head": (Layer(change_rope=lambda r: r * torch.arange(4.0)[:, None, None]), "not rows of one cache"),
    "rope-of-one-sequence": (Layer(change_rope=lambda r: r[:1].expand(B, -1, -1, -1)), "not rows of one cache"),
    "expansion-returned": (Layer(returns_keys=True), "another use"),
    "three-parts": (
        Layer(join=lambda k, r: torch.cat([k[..., :4], k[..., 4:] * 2, r.expand(-1, k.shape[1], -1, -1)], -1)),
        "3 parts",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name: str) -> None:
    """Refused with a reason; the attention itself may still be served on the expanded keys, and is still right."""
    layer, reason = NEAR_MISSES[name]
    tensors = inputs(2, 9)
    graph = traced(layer, *tensors)
    refusals = [decision.reason for decision in rewrite(graph) if not decision.rewritten]
    assert any(reason in text for text in refusals), refusals
    assert "bmm" not in operators(graph)
    result, expected = graph(*tensors), layer(*(x.double() for x in tensors))
    if layer.returns_keys:
        result, expected = result[0], expected[0]
    assert_equal_to(result, expected)


def test_without_a_cached_prefix_nothing_is_absorbed() -> None:
    graph = traced(Layer(), *inputs(9, 9))
    refusals = [decision.reason for decision in rewrite(graph) if not decision.rewritten]
    assert any("no keys but the queries' own" in text for text in refusals)
    assert operators(graph) == ["decode"]


def test_long_queries_are_not_absorbed() -> None:
    graph = traced(Layer(), *inputs(70, 90, b=1))
    assert all(decision.rewritten for decision in rewrite(graph))
    assert operators(graph) == ["prefill"]


def test_a_scale_of_its_own() -> None:
    """The model's scale reaches the operator, whatever the absorbed row's size would make it."""
    graph = traced(Layer(attend=sdpa), *inputs(1, 9))
    rewrite(graph)
    (call,) = (node for node in graph.graph.nodes if "decode" in str(node.target))
    assert call.args[8] == 0.2
    assert D_NOPE**-0.5 != 0.2


def test_values_of_a_part_of_the_latents() -> None:
    def layer(q: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        b, _, s_kv, _ = latent.shape
        up_k, up_v = weight.split([4 * D_NOPE, weight.shape[0] - 4 * D_NOPE])
        k_nope = torch.nn.functional.linear(latent, up_k).view(b, s_kv, 4, D_NOPE).transpose(1, 2)
        half = torch.nn.functional.linear(latent[..., : D_C // 2], up_v[:, : D_C // 2])
        keys = torch.cat([k_nope, k_rope.expand(-1, 4, -1, -1)], -1)
        return eager(q, keys, half.view(b, s_kv, 4, -1).transpose(1, 2))

    tensors = inputs(2, 9)
    graph = traced(layer, *tensors)
    refusals = [decision.reason for decision in rewrite(graph) if not decision.rewritten]
    assert any(f"keys expand {D_C} elements of a latent, values {D_C // 2}" in text for text in refusals), refusals
    assert_equal_to(graph(*tensors), layer(*(x.double() for x in tensors)))
