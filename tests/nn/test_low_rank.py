"""`compress`: exact where nothing has to be left out, and what it says of what it leaves out."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flashmla_ops.errors import ArgumentError, UnsupportedModelError
from flashmla_ops.nn import FlashMLALayer, compress, perplexity, restore
from tests.integrations.grouped import tiny_grouped
from tests.integrations.models import left_padded, tokens


def llama(model_type: str = "llama", **changes: Any) -> PreTrainedModel:
    """g = 2 KV heads of d = 16, with biases: 64 elements a token and layer."""
    return tiny_grouped(model_type, implementation="sdpa", **changes)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(tokens(2, 90)).logits
    return out


def low_rank_llama() -> PreTrainedModel:
    """All keys of a layer, and all values, are combinations of 6 vectors, as those of trained models nearly are."""
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            basis = torch.randn(6, 64) / 8
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight.copy_(torch.randn(32, 6) @ basis)
                projection.bias.zero_()
    return model


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("h_kv", [1, 2, 4])
def test_nothing_is_lost_where_all_has_room(model_type: str, h_kv: int) -> None:
    model = llama(model_type, num_key_value_heads=h_kv)
    expected, before = logits(model), list(model.modules())
    done = compress(model, 16 * h_kv, tokens(2, 32), rotary=h_kv)
    assert all(isinstance(layer.self_attn, FlashMLALayer) for layer in model.model.layers)
    torch.testing.assert_close(logits(model), expected, atol=2e-4, rtol=2e-4)
    assert max(done.errors) < 1e-5
    assert done.bytes_before == done.bytes_after
    restore(model)
    assert list(model.modules()) == before
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("inputs", [{"input_ids": tokens(1, 12)}, left_padded([12, 7])], ids=["alone", "padded"])
@pytest.mark.parametrize("rotary", [1, 2])
def test_generation_caches_latents(inputs: dict[str, Tensor], rotary: int) -> None:
    model = llama()
    rank = 32 if rotary == 2 else 48
    compress(model, rank, tokens(2, 32), rotary=rotary)
    common: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    found = model.generate(**inputs, **common)
    layer = found.past_key_values.layers[0]
    assert (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) == (1, rank, rotary * 16)
    plain = model.generate(**inputs, **common, use_cache=False)
    assert torch.equal(found.sequences, plain.sequences)


def test_redundant_values_cost_nothing() -> None:
    model = low_rank_llama()
    expected = logits(model)
    done = compress(model, 6, tokens(4, 64), rotary=2)
    torch.testing.assert_close(logits(model), expected, atol=2e-4, rtol=2e-4)
    assert (done.bytes_before, done.bytes_after) == (2 * 64 * 4, 2 * 38 * 4)


def test_more_rank_less_error() -> None:
    errors = []
    for rank in (2, 8, 16, 32):
        model = llama()
        done = compress(model, rank, tokens(4, 64), rotary=2, evaluation=tokens(2, 64, seed=1))
        assert done.perplexity_after == perplexity(model, tokens(2, 64, seed=1))
        assert done.perplexity_before == perplexity(llama(), tokens(2, 64, seed=1))
        errors.append(max(done.errors))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1


def test_the_latent_is_the_best_for_what_it_has_seen() -> None:
    """Values whose error the calibration data show are kept; chosen by other data they cost more."""
    model = low_rank_llama()
    seen, other = torch.full((2, 32), 7), torch.full((2, 32), 9)
    fitting = max(compress(copy.deepcopy(model), 1, seen, rotary=2).errors)
    twin = copy.deepcopy(model)
    compress(twin, 1, other, rotary=2)
    with torch.no_grad():
        expected, out = model(seen).logits, twin(seen).logits
        compress(model, 1, seen, rotary=2)
        assert (model(seen).logits - expected).norm() < 0.5 * (out - expected).norm()
    assert fitting < 0.1


def test_copies_and_compilation() -> None:
    model = llama()
    compress(model, 24, tokens(2, 32), rotary=2)
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected, atol=1e-4, rtol=1e-4)


def test_bfloat16() -> None:
    model = llama().to(torch.bfloat16)
    expected = logits(model)
    compress(model, 32, tokens(2, 32), rotary=2)
    assert model.model.layers[0].self_attn.kv_b_proj.weight.dtype == torch.bfloat16
    torch.testing.assert_close(logits(model), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, "'rank': expected 1 to 48"),
        ({"rank": 33, "rotary": 2}, "'rank': expected 1 to 32"),
        ({"rank": 8, "rotary": 3}, "'rotary': expected 1 to 2"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, int], says: str) -> None:
    model = llama()
    before = list(model.modules())
    with pytest.raises(ArgumentError, match=says):
        compress(model, calibration=tokens(1, 8), **options)
    assert list(model.modules()) == before


def test_models_that_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'qwen3' has queries or keys that are not linear"):
        compress(llama("qwen3"), 8, tokens(1, 8))
    with pytest.raises(UnsupportedModelError, match="has no attention"):
        compress(torch.nn.Linear(2, 2), 8, tokens(1, 8))
