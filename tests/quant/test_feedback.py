"""Rounding with feedback gives layers outputs that are nearer to what they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from flashmla_ops.errors import ArgumentError
from flashmla_ops.quant import quantize
from flashmla_ops.quant.feedback import input_moments
from flashmla_ops.quant.weights import FORMATS, decode
from tests.integrations.models import tiny_model, tokens


@pytest.mark.parametrize("name", ["int4_g32", "int4_g64", "int4_g128"])
def test_outputs_are_nearer(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 256, generator=generator)
    x = torch.randn(600, 40, generator=generator) @ torch.randn(40, 256, generator=generator)
    x += 0.1 * torch.randn(x.shape, generator=generator)
    seen, unseen = x.chunk(2)
    errors = []
    for moments in (None, seen.mT @ seen / len(seen)):
        kept = decode(*FORMATS[name].encode(weight, moments), torch.float32)
        errors.append(float((unseen @ (kept - weight).mT).norm() / (unseen @ weight.mT).norm()))
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("moments", [torch.eye(128), torch.zeros(128, 128)])
def test_inputs_that_nothing_connects_change_nothing(moments: torch.Tensor) -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    for kept in FORMATS.values():
        with_moments, without = kept.encode(weight, moments), kept.encode(weight)
        assert all(torch.equal(one, other) for one, other in zip(with_moments, without, strict=True))


def test_moments_are_those_of_inputs() -> None:
    model, ids = tiny_model("llama"), tokens(2, 16)
    seen: list[torch.Tensor] = []
    layer = model.model.layers[1].mlp.down_proj
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    found = input_moments(model, {"layer": layer}, ids)["layer"]
    hook.remove()
    x = torch.cat(seen)
    torch.testing.assert_close(found, x.mT @ x / 32)
    assert not layer._forward_pre_hooks


def test_text_with_activations_that_are_not_finite() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.inf
    with pytest.raises(ArgumentError, match=r"'calibration': expected text with finite activations, got others, of"):
        quantize(model, calibration=torch.full((1, 8), 7))
    assert not any("Quantized" in type(layer).__name__ for layer in model.modules())
    assert isinstance(model.lm_head, nn.Linear)
