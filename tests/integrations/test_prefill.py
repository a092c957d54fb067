"""Long queries, with and without tokens in the cache: `flashmla::prefill` over heads expanded chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from flashmla_ops.integrations.transformers import PagedLatentCache, StaticPagedLatentCache, rows
from flashmla_ops.integrations.transformers.masks import MAX_ABSORBED_QUERIES
from tests.integrations.conftest import Pair
from tests.integrations.models import cached, left_padded, tokens

CAPACITY, LONG = 200, MAX_ABSORBED_QUERIES + 6
CACHES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=CAPACITY),
    "paged": lambda model: PagedLatentCache(model, page_size=16),
    "static paged": lambda model: StaticPagedLatentCache(model, CAPACITY, page_size=16),
}


def count_prefills() -> Any:
    return mock.patch.object(torch.ops.flashmla, "prefill", wraps=torch.ops.flashmla.prefill)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("past", [(), (1,), (20, LONG)], ids=["no prefix", "one token", "a long prefix"])
def test_logits_are_those_of_eager_attention(pair: Pair, cache: str, past: tuple[int, ...]) -> None:
    """Each forward continues on the cache; the prefix is expanded 13 tokens at a time."""
    ours, theirs = CACHES[cache](pair.absorbed), CACHES["dynamic"](pair.eager)
    in_chunks = partial(rows.prefill_with_prefix, chunk_tokens=13)
    for i, length in enumerate((*past, LONG)):
        ids = tokens(2, length, seed=i)
        with count_prefills() as prefill, mock.patch.object(rows, "prefill_with_prefix", in_chunks):
            logits = pair.absorbed(ids, **cached(ours)).logits
        expected = pair.eager(ids, **cached(theirs)).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    chunks = -(-2 * sum(past) // 13)
    assert prefill.call_count == len(ours.layers) * (1 + chunks)


def test_padding_takes_the_expanded_path(pair: Pair) -> None:
    inputs = left_padded([LONG, 30])
    with count_prefills() as prefill:
        logits = pair.absorbed(**inputs).logits
    assert prefill.call_count == 0
    torch.testing.assert_close(logits[0], pair.eager(**inputs).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("past", [0, 20])
def test_a_compiled_prefill_is_one_graph(pair: Pair, past: int) -> None:
    torch._dynamo.reset()
    cache, theirs = CACHES["static paged"](pair.absorbed), CACHES["dynamic"](pair.eager)
    if past:
        pair.absorbed(tokens(2, past), **cached(cache))
        pair.eager(tokens(2, past), **cached(theirs))
    else:
        cache.reserve(2, torch.device("cpu"))
    compiled = torch.compile(pair.absorbed.forward, fullgraph=True, backend="eager")
    ids, positions = tokens(2, LONG, seed=1), torch.arange(past, past + LONG)[None]
    logits = compiled(ids, **cached(cache), position_ids=positions).logits
    expected = pair.eager(ids, **cached(theirs)).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
