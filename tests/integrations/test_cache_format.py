"""Paged caches whose rows are bytes: `enable` with a format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flashmla_ops.errors import ArgumentError, FallbackWarning
from flashmla_ops.formats import QUANTIZED
from flashmla_ops.integrations.transformers import (
    PagedLatentCache,
    StaticPagedLatentCache,
    disable,
    enable,
    is_enabled,
    masks,
)
from flashmla_ops.quant import quantize
from flashmla_ops.sparsity import DynamicSparsity
from tests.integrations.grouped import tiny_grouped
from tests.integrations.models import cached, tiny_model, tokens

SIZES = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}


def rounding(row_format: str) -> object:
    """An ``expand_kv`` of latents that were rows of the format."""

    def expand(self: nn.Module, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.cat([latent, rope], dim=-1)
        kept = torch.ops.flashmla.dequantize_rows(torch.ops.flashmla.quantize_rows(rows, row_format), row_format)
        return type(self).expand_kv(self, *kept.to(rows.dtype).split([512, 64], dim=-1))

    return expand


@pytest.mark.parametrize("row_format", ["int8_g128", "fp8_v32", "int4_g32"])
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_logits_are_those_of_rounded_rows(row_format: str, static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, more tokens behind it, a padded prompt and single tokens, against transformers' own attention."""
    model, ids = tiny_model(**SIZES), tokens(2, 90)
    padding = torch.ones_like(ids)
    padding[1, :5] = 0
    for layer in model.model.layers:
        expand = rounding(row_format)
        layer.self_attn.expand_kv = expand.__get__(layer.self_attn)
    expected = model(ids, attention_mask=padding).logits
    for layer in model.model.layers:
        del layer.self_attn.expand_kv
    enable(model, cache_format=row_format)
    for start in (80, 20):  # expanded, and absorbed
        cache = StaticPagedLatentCache(model, 100) if static else PagedLatentCache(model)
        found = [model(ids[:, :start], attention_mask=padding[:, :start], **cached(cache)).logits]
        for i, j in ((start, 86), (86, 87), (87, 90)):
            found.append(model(ids[:, i:j], attention_mask=padding[:, :j], **cached(cache)).logits)
        difference = (torch.cat(found, dim=1) - expected)[padding.bool()]
        assert float(difference.norm() / expected.norm()) < 0.02
        assert cache.layers[0].slab.dtype == torch.uint8
    assert masks.MAX_ABSORBED_QUERIES < 80
    disable(model)
    assert not any("cache_format" in vars(layer.self_attn) for layer in model.model.layers)


@torch.no_grad()
def test_generates() -> None:
    model, ids = tiny_model(**SIZES), tokens(2, 8)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    report = quantize(model, "int8", cache="int8_g128")
    assert is_enabled(model)
    assert report.plan
    quantized = model.generate(ids, max_new_tokens=4, do_sample=False, **cached(cache := PagedLatentCache(model)))
    assert quantized.shape == expected.shape
    assert cache.n_bytes() == 2 * 2 * 64 * QUANTIZED["int8_g128"].bytes
    model.generate(ids, max_new_tokens=4, num_beams=3, do_sample=False, **cached(PagedLatentCache(model)))
    with pytest.warns(FallbackWarning, match=r"a DynamicCache keeps rows as they are, and not as int8_g128"):
        model.generate(ids, max_new_tokens=2)


def test_errors() -> None:
    model = tiny_model()
    with pytest.raises(ArgumentError, match=r"'cache_format': expected one of native, .*, got fp8_model1"):
        enable(model, cache_format="fp8_model1")
    with pytest.raises(ArgumentError, match=r"latents of 512 and 64 elements.*, got 32 and 8 in model\.layers\.0"):
        quantize(model, "int8", cache="int8_g128")
    with pytest.raises(ArgumentError, match=r"latents of 512 and 64 elements.*, got keys and values of each head"):
        enable(tiny_grouped(), cache_format="int8_g128")
    with pytest.raises(ArgumentError, match=r"'cache_format': expected 'native' with sparsity, got int8_g128"):
        enable(tiny_model(**SIZES), cache_format="int8_g128", sparsity=DynamicSparsity())
    assert not is_enabled(model)
    assert quantize(model, "int8").plan
