"""generate() on our pages picks the tokens that eager attention picks; pages are shared, cut and freed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from flashmla_ops.errors import ArgumentError, NotDifferentiableError, OutOfPagesError, UnsupportedModelError
from flashmla_ops.integrations.transformers import PagedLatentCache, StaticPagedLatentCache, enable
from tests.integrations.conftest import Pair
from tests.integrations.models import cached, left_padded, tiny_model, tokens
from tests.integrations.test_generate import LENGTHS, generate

AnyCache = PagedLatentCache | StaticPagedLatentCache
CACHES: dict[str, Callable[[PreTrainedModel], AnyCache]] = {
    "paged": lambda model: PagedLatentCache(model, page_size=4),
    "page-of-1": lambda model: PagedLatentCache(model, n_pages=2048, page_size=1),
    "static": lambda model: StaticPagedLatentCache(model, 120, page_size=4),
}


@pytest.fixture(params=CACHES)
def new_cache(request: pytest.FixtureRequest) -> Callable[[PreTrainedModel], AnyCache]:
    return CACHES[request.param]


def pages_in_use(cache: PagedLatentCache) -> int:
    return cache.sequences.pool.stats().used


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 4}, {"prefill_chunk_size": 30}], ids=["greedy", "beam", "chunked"]
)
def test_left_padded_batch(pair: Pair, new_cache: Callable[..., AnyCache], options: dict[str, Any]) -> None:
    inputs = left_padded(LENGTHS)
    expected = generate(pair.eager, inputs, **{k: v for k, v in options.items() if k == "num_beams"})
    out = generate(pair.absorbed, inputs, **cached(new_cache(pair.absorbed)), **options)
    assert torch.equal(out, expected)


def test_drafts_are_rolled_back(pair: Pair, new_cache: Callable[..., AnyCache]) -> None:
    inputs = {"input_ids": tokens(1, 12).repeat(1, 3)}
    expected = generate(pair.eager, inputs)
    for drafting in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": pair.eager}):
        out = generate(pair.absorbed, inputs, **cached(new_cache(pair.absorbed)), **drafting)
        assert torch.equal(out, expected)


def test_several_turns(pair: Pair, new_cache: Callable[..., AnyCache]) -> None:
    cache = new_cache(pair.absorbed)
    first = generate(pair.absorbed, {"input_ids": tokens(1, 20)}, **cached(cache))
    second = {"input_ids": torch.cat([first, tokens(1, 5, seed=1)], dim=1)}
    assert torch.equal(generate(pair.absorbed, second, **cached(cache)), generate(pair.eager, second))


def test_reset_and_use_again(pair: Pair, new_cache: Callable[..., AnyCache]) -> None:
    cache = new_cache(pair.absorbed)
    for seed in range(2):
        inputs = left_padded([9, 14], seed=seed)
        out = generate(pair.absorbed, inputs, **cached(cache), num_beams=2)
        assert torch.equal(out, generate(pair.eager, inputs, num_beams=2))
        cache.reset()
        assert cache.get_seq_length() == 0


def test_a_copy_goes_its_own_way(pair: Pair, new_cache: Callable[..., AnyCache]) -> None:
    """One prompt's cache copied for two continuations, as in prompt caching."""
    prompt, cache = tokens(1, 20), new_cache(pair.absorbed)
    pair.absorbed(prompt, **cached(cache))
    for seed in range(2):
        inputs = {"input_ids": torch.cat([prompt, tokens(1, 6, seed=seed)], dim=1)}
        out = generate(pair.absorbed, inputs, **cached(copy.deepcopy(cache)))
        assert torch.equal(out, generate(pair.eager, inputs))


def test_batch_repeat_and_select(pair: Pair) -> None:
    cache, ids = PagedLatentCache(pair.absorbed, page_size=4), tokens(3, 10)
    pair.absorbed(ids, **cached(cache))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6
    assert pages_in_use(cache) == 9
    cache.batch_select_indices(torch.tensor([True, False, False, False, False, True]))
    more = tokens(2, 3, seed=1)
    out = pair.absorbed(more, **cached(cache)).logits
    expected = pair.eager(torch.cat([ids[[0, 2]], more], dim=1)).logits[:, 10:]
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert pages_in_use(cache) == 8


def test_beams_share_pages(pair: Pair) -> None:
    """Four beams of a 24-token prompt hold its six full pages once."""
    cache = PagedLatentCache(pair.absorbed, page_size=4)
    generate(pair.absorbed, {"input_ids": tokens(1, 24)}, **cached(cache), num_beams=4, max_new_tokens=9)
    assert pages_in_use(cache) <= 6 + 4 * 2
    layers, row_bytes = len(cache.layers), 4 * (32 + 8)
    assert cache.n_bytes() == pages_in_use(cache) * layers * 4 * row_bytes
    cache.reset()
    assert pages_in_use(cache) == 0


def test_crop_releases_pages(pair: Pair) -> None:
    cache = PagedLatentCache(pair.absorbed, page_size=4)
    pair.absorbed(tokens(1, 14), **cached(cache))
    for removed, length, pages in ((0, 14, 4), (-3, 11, 3), (8, 8, 2), (20, 8, 2), (-9, 0, 0)):
        cache.crop(removed)
        assert cache.get_seq_length() == length
        assert pages_in_use(cache) == pages


def test_out_of_pages_changes_nothing(pair: Pair) -> None:
    cache = PagedLatentCache(pair.absorbed, n_pages=3, page_size=4)
    with pytest.raises(OutOfPagesError):
        pair.absorbed(tokens(1, 13), **cached(cache))
    cache.reset()
    pair.absorbed(tokens(1, 10), **cached(cache))
    with pytest.raises(OutOfPagesError):
        pair.absorbed(tokens(1, 3), **cached(cache))
    assert cache.get_seq_length() == 10
    more = tokens(1, 2, seed=1)
    out = pair.absorbed(more, **cached(cache)).logits
    expected = pair.eager(torch.cat([tokens(1, 10), more], dim=1)).logits[:, 10:]
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_past_the_end_of_a_static_cache(pair: Pair) -> None:
    cache = StaticPagedLatentCache(pair.absorbed, 6, page_size=4)
    pair.absorbed(tokens(1, 5), **cached(cache))
    with pytest.raises(ArgumentError, match="6 tokens at most, the cache's max_cache_len, got 2 behind 5 cached"):
        pair.absorbed(tokens(1, 2), **cached(cache))
    compiled = torch.compile(pair.absorbed.forward, backend="eager")
    for fits in (True, False):
        with nullcontext() if fits else pytest.raises(RuntimeError, match=r"slots below 8, got 8"):
            compiled(tokens(1, 1), **cached(cache))


def test_a_static_batch_keeps_its_size(pair: Pair) -> None:
    cache, ids = StaticPagedLatentCache(pair.absorbed, 16, page_size=4), tokens(2, 10)
    pair.absorbed(ids, **cached(cache))
    cache.batch_repeat_interleave(1)
    cache.batch_select_indices(torch.tensor([1, 1]))
    more = tokens(2, 3, seed=1)
    out = pair.absorbed(more, **cached(cache)).logits
    expected = pair.eager(torch.cat([ids[[1, 1]], more], dim=1)).logits[:, 10:]
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    for change in (lambda: cache.batch_repeat_interleave(2), lambda: cache.batch_select_indices(torch.tensor([0]))):
        with pytest.raises(UnsupportedModelError, match="pages are for a batch of 2"):
            change()


def test_another_batch_size(pair: Pair, new_cache: Callable[..., AnyCache]) -> None:
    cache = new_cache(pair.absorbed)
    assert cache.batch_size <= 0
    pair.absorbed(tokens(2, 5), **cached(cache))
    assert cache.batch_size == 2
    with pytest.raises(ArgumentError, match=r"expected a batch of 2, as (cached|reserved), got 3"):
        pair.absorbed(tokens(3, 1), **cached(cache))


def test_gradient(pair: Pair) -> None:
    with torch.enable_grad(), pytest.raises((NotDifferentiableError, RuntimeError), match="requires a gradient"):
        pair.absorbed(tokens(1, 5), **cached(PagedLatentCache(pair.absorbed)))


@pytest.mark.parametrize("cache_type", [PagedLatentCache, lambda model: StaticPagedLatentCache(model, 8)])
def test_models_that_cannot_use_it(cache_type: Callable[[PreTrainedModel], AnyCache]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"call enable\(model\)"):
        cache_type(tiny_model())
    hybrid = tiny_model("kimi_linear")
    enable(hybrid)
    with pytest.raises(UnsupportedModelError, match=r"only layers \[3\] cache rows"):
        cache_type(hybrid)


def test_capacity_below_one(pair: Pair) -> None:
    with pytest.raises(ArgumentError, match="max_cache_len"):
        StaticPagedLatentCache(pair.absorbed, 0)
