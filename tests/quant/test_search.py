"""The mix of formats is as small as perplexity allows, and the search leaves a model as it was."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from flashmla_ops.errors import ArgumentError
from flashmla_ops.integrations.transformers import enable
from flashmla_ops.nn import perplexity
from flashmla_ops.quant import quantize
from flashmla_ops.quant.model import perplexities
from flashmla_ops.quant.search import estimated_costs, search
from flashmla_ops.quant.weights import FORMATS, decode
from tests.integrations.models import tiny_model, tokens


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_from_all_to_nothing(model_type: str) -> None:
    ids, others = tokens(3, 40, seed=1), tokens(2, 40, seed=2)
    sizes = []
    for tolerance in (1e9, 5e-3, 1e-12):
        model = tiny_model(model_type)
        enable(model)
        before = perplexity(model, ids)
        found = quantize(model, mixed="auto", calibration=ids, held_out=others, tolerance=tolerance)
        was, now = found.perplexity["calibration"]
        assert was == pytest.approx(before)
        assert now == pytest.approx(perplexity(model, ids))
        assert now <= was * (1 + tolerance) * (1 + 1e-5)
        assert found.perplexity["held_out"][1] == pytest.approx(perplexity(model, others))
        sizes.append(found.bytes)
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[0] == quantize(tiny_model(model_type)).bytes


def test_the_search_changes_nothing() -> None:
    model, ids = tiny_model("llama"), tokens(2, 32)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones(256, 64)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    options = {name: ["int8", "int4_g32"] for name in quantize(tiny_model("llama")).plan}
    search(model, options, ids, 0.01, {})
    assert [*model.state_dict()] == [*state]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.lm_head.weight.grad is not None
    assert all(p.grad is None for p in model.parameters() if p is not model.lm_head.weight)


def test_costs_are_those_of_first_order_changes() -> None:
    """Of the last layer, whose output is the logits, the gradient is softmax - 1 at the token that follows."""
    model, ids = tiny_model("llama"), tokens(1, 24)
    weight = model.lm_head.weight
    encoded = {"lm_head": {name: FORMATS[name].encode(weight) for name in ("int8", "int4_g64")}}
    found = estimated_costs(model, {"lm_head": model.lm_head}, encoded, ids)["lm_head"]
    hidden = model.model(ids).last_hidden_state[0, :-1].detach().double()
    gradient = (hidden @ weight.double().T).softmax(-1)
    gradient[torch.arange(23), ids[0, 1:]] -= 1
    for name, kept in encoded["lm_head"].items():
        change = hidden @ (decode(*kept, torch.float64) - weight.double()).T
        assert found[name] == pytest.approx(
            float((change.detach() * gradient.detach()).sum(-1).square().sum()) / 46, rel=1e-3
        )
    assert found["int8"] < found["int4_g64"] / 10


def test_errors() -> None:
    model, ids = tiny_model("llama"), tokens(2, 16)
    with pytest.raises(ArgumentError, match=r"'mixed': expected 'auto' or None, got 'best'"):
        quantize(model, mixed="best")
    with pytest.raises(ArgumentError, match=r"'calibration': expected token ids \[n, s\] with mixed='auto', got none"):
        quantize(model, mixed="auto")
    for wrong in (ids[0], ids.float(), ids[:, :1], "text"):
        with pytest.raises(ArgumentError, match=r"'calibration': expected token ids \[n, s\], s at least 2"):
            quantize(model, mixed="auto", calibration=wrong)
    for tolerance in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ArgumentError, match=r"'tolerance': expected a positive number"):
            quantize(model, mixed="auto", calibration=ids, tolerance=tolerance)
    assert perplexities(model, {}) == {}
