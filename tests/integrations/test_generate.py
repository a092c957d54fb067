"""generate() with absorbed attention picks the tokens that eager attention picks, on transformers' own caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from flashmla_ops.integrations.transformers import enable
from flashmla_ops.integrations.transformers.families import MLA_MODEL_TYPES
from flashmla_ops.integrations.transformers.masks import MAX_ABSORBED_QUERIES
from flashmla_ops.integrations.transformers.versions import CACHE_ARGUMENT
from tests.integrations.conftest import Pair
from tests.integrations.models import cached, left_padded, tiny_model, tokens

LENGTHS = [MAX_ABSORBED_QUERIES + 6, 33, 3]  # the prompt is expanded; the last is mostly padding


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    options = {"max_new_tokens": 12, "do_sample": False} | options
    out: Tensor = model.generate(**inputs, **options)
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 2},
        {"prefill_chunk_size": 30},
    ],
    ids=["greedy", "beam", "static", "static-beam", "chunked-prefill"],
)
def test_left_padded_batch(pair: Pair, options: dict[str, Any]) -> None:
    inputs = left_padded(LENGTHS)
    expected = generate(pair.eager, inputs, **{k: v for k, v in options.items() if k == "num_beams"})
    assert torch.equal(generate(pair.absorbed, inputs, **options), expected)


@pytest.mark.parametrize("length", [1, 9, MAX_ABSORBED_QUERIES, MAX_ABSORBED_QUERIES + 1])
def test_single_prompt_of_any_length(pair: Pair, length: int) -> None:
    inputs = {"input_ids": tokens(1, length)}
    assert torch.equal(generate(pair.absorbed, inputs), generate(pair.eager, inputs))


def test_prompt_lookup(pair: Pair) -> None:
    inputs = {"input_ids": tokens(1, 12).repeat(1, 3)}
    drafted = generate(pair.absorbed, inputs, prompt_lookup_num_tokens=4)
    assert torch.equal(drafted, generate(pair.eager, inputs))


def test_assisted(pair: Pair) -> None:
    inputs = {"input_ids": tokens(1, 20)}
    expected = generate(pair.eager, inputs)
    for model, assistant in ((pair.absorbed, pair.eager), (pair.eager, pair.absorbed)):
        assert torch.equal(generate(model, inputs, assistant_model=assistant), expected)


def test_several_turns_on_one_cache(pair: Pair) -> None:
    cache = DynamicCache(config=pair.absorbed.config)
    first = generate(pair.absorbed, {"input_ids": tokens(1, 20)}, **cached(cache))
    second = {"input_ids": torch.cat([first, tokens(1, 5, seed=1)], dim=1)}
    assert torch.equal(generate(pair.absorbed, second, **cached(cache)), generate(pair.eager, second))


@pytest.mark.parametrize("model_type", MLA_MODEL_TYPES)
def test_scores_of_every_supported_type(model_type: str) -> None:
    eager, absorbed = tiny_model(model_type), tiny_model(model_type)
    enable(absorbed)
    inputs = left_padded(LENGTHS)
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 6}
    expected: Any = generate(eager, inputs, **options)
    actual: Any = generate(absorbed, inputs, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_as_near_as_eager_attention(dtype: torch.dtype) -> None:
    """Against float64 weights of the same values, absorbed attention is about as exact as transformers' own."""
    exact, eager, absorbed = (tiny_model() for _ in range(3))
    for model in (exact, eager, absorbed):
        model.to(dtype)
    exact.double()
    enable(absorbed)
    ids, past = tokens(2, 9), tokens(2, 30, seed=1)

    def logits(model: PreTrainedModel) -> Tensor:
        cache = model(past, use_cache=True)[CACHE_ARGUMENT]
        out: Tensor = model(ids, **cached(cache)).logits
        return out.double()

    truth = logits(exact)
    ours, theirs = (float((logits(model) - truth).square().mean()) for model in (absorbed, eager))
    assert ours <= max(2.0 * theirs, 1e-12)  # eager attention takes the softmax in float32
