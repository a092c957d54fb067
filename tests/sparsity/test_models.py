"""Models whose decoding chooses its pages: tokens, what the caches keep, the report, and one graph for every step."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, PreTrainedModel

from flashmla_ops.errors import ArgumentError, FallbackWarning
from flashmla_ops.integrations.transformers import PagedLatentCache, StaticPagedLatentCache, disable, enable
from flashmla_ops.integrations.transformers.summarized import SummarizedLayer
from flashmla_ops.integrations.transformers.versions import CACHE_ARGUMENT
from flashmla_ops.nn import FlashMLALayer, convert
from flashmla_ops.sparsity import DynamicSparsity
from flashmla_ops.sparsity.config import MODES
from flashmla_ops.sparsity.summaries import SUMMARIES
from tests.integrations.grouped import tiny_grouped
from tests.integrations.models import tiny_model

PAGE = 8
CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "paged": lambda model: PagedLatentCache(model, n_pages=128, page_size=PAGE),
    "static": lambda model: StaticPagedLatentCache(model, 160, page_size=PAGE),
}
MODELS = {"llama": tiny_grouped, "deepseek_v3": tiny_model}


def sparse(mode: str = "certified", **options: Any) -> DynamicSparsity:
    """One that chooses from short sequences already."""
    options = {"min_context": 4 * PAGE, "page_size": PAGE, "tau": 0.02} | options
    if mode == "mask":
        options["mask"] = torch.rand(1, 1, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    return DynamicSparsity(mode, **options)


def prompts(b: int = 2, length: int = 61) -> Tensor:
    return torch.randint(2, 250, (b, length), generator=torch.Generator().manual_seed(1))


def tokens(model: PreTrainedModel, cache: Any = None, n: int = 20, **options: Any) -> Tensor:
    if cache is not None:
        options[CACHE_ARGUMENT] = cache
    ids: Tensor = model.generate(prompts(), max_new_tokens=n, do_sample=False, **options)
    return ids


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", MODELS)
def test_nothing_lost_is_the_same_tokens(name: str, cache: str) -> None:
    """With eps 0 every page is attended to, through the views and tables of chosen pages."""
    model = MODELS[name]()
    expected = tokens(model)
    sparsity = sparse(eps=0.0)
    enable(model, sparsity=sparsity)
    assert torch.equal(tokens(model, CACHES[cache](model)), expected)
    together = sparsity.report().together
    assert together.rows == together.rows_attended > 0
    assert together.lost <= 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_report_of_every_mode(name: str, mode: str) -> None:
    model = MODELS[name]()
    sparsity = sparse(mode, eps=0.6, tau=0.1)
    enable(model, sparsity=sparsity)
    tokens(model, n=24)
    report = sparsity.report()
    assert [layer.layer for layer in report.layers] == [0, 1]
    together = report.together
    assert 0 < together.rows_attended < together.rows
    assert together.bytes_to_choose > 0 or mode == "mask"
    assert together.lost <= 0.6001 if mode == "certified" else together.lost > 0
    assert len(str(report).splitlines()) == 5
    sparsity.reset()
    assert sparsity.report().together.calls == 0


def fresh_summaries(layer: SummarizedLayer) -> Tensor:
    first, second = layer._rooms()
    page_size = layer.sparsity.page_size
    keys = second if not layer.keys_first else torch.cat([first, second], dim=-1)
    pages = keys.unflatten(2, (-1, page_size))[:, :, : layer.get_seq_length() // page_size]
    return SUMMARIES["codes"].encode(pages.flatten(0, 2).float(), None).unflatten(0, pages.shape[:3])


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"num_return_sequences": 2}])
@pytest.mark.parametrize("name", MODELS)
def test_summaries_follow_the_cache(name: str, how: dict[str, Any]) -> None:
    """Through reordered beams and drafts that are taken back, summaries are those of the keys that are there."""
    model = MODELS[name]()
    options = how | ({"do_sample": True} if "num_return_sequences" in how else {})
    ids = prompts(1 if "prompt_lookup_num_tokens" in how else 2)
    enable(model, sparsity=sparse(eps=0.0))
    cache = DynamicCache(config=model.config)
    model.generate(ids, max_new_tokens=30, **{"do_sample": False} | options, **{CACHE_ARGUMENT: cache})
    for layer in cache.layers:
        assert isinstance(layer, SummarizedLayer)
        model_length = layer.get_seq_length()
        layer.update(*(x[:, :, -1:].clone() for x in (layer.keys, layer.values)))  # which brings the rooms up to date
        assert layer.get_seq_length() == model_length + 1
        expected = fresh_summaries(layer)
        assert layer.summaries is not None
        assert torch.equal(layer.summaries[:, :, : expected.shape[2]], expected)


def test_copies_of_a_cache_grow_apart() -> None:
    model = tiny_grouped()
    enable(model, sparsity=sparse(eps=0.0))
    cache = DynamicCache(config=model.config)
    tokens(model, cache)
    other = copy.deepcopy(cache)
    more = torch.randn(2, 2, 30, 16)
    for layer in (cache.layers[0], other.layers[0]):
        layer.update(more * (2 if layer is cache.layers[0] else 1), more)
        assert isinstance(layer, SummarizedLayer)
        assert torch.equal(layer.summaries[:, :, : layer.summarized], fresh_summaries(layer))


def test_padded_prompts_attend_to_all() -> None:
    model = tiny_grouped()
    ids, mask = prompts(), torch.ones(2, 61, dtype=torch.int64)
    mask[0, :7] = 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    sparsity = sparse(eps=0.9)
    enable(model, sparsity=sparsity)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False), expected)
    assert sparsity.report().together.calls == 0


def test_a_cache_without_pages_is_told_once() -> None:
    model = tiny_grouped()
    expected = tokens(model)
    enable(model, sparsity=sparse())
    with pytest.warns(FallbackWarning, match="StaticCache has no summaries") as told:
        assert torch.equal(tokens(model, cache_implementation="static"), expected)
    assert len(told) == 1


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_for_every_choice(name: str) -> None:
    """Steps in which different numbers of pages are chosen run one graph, and give the tokens of eager code."""
    torch._dynamo.reset()
    model = MODELS[name]()
    enable(model, sparsity=sparse(eps=0.5))
    expected = tokens(model, CACHES["static"](model), n=30)
    sparsity = sparse(eps=0.5)
    enable(model, sparsity=sparsity)
    cache = CACHES["static"](model)
    counted = CompileCounterWithBackend("aot_eager")
    with torch.no_grad():
        ids = prompts()
        following = model(ids, **{CACHE_ARGUMENT: cache}).logits[:, -1:].argmax(-1)
        found, attended = [ids, following], set()
        step = torch.compile(model, backend=counted, fullgraph=True)
        for _ in range(29):
            before = sparsity.report().together.rows_attended
            following = step(following, **{CACHE_ARGUMENT: cache}).logits[:, -1:].argmax(-1)
            found.append(following)
            attended.add(sparsity.report().together.rows_attended - before)
    assert torch.equal(torch.cat(found, dim=1), expected)
    assert counted.frame_count == 1
    assert len(attended) > 3


@pytest.mark.parametrize("name", MODELS)
def test_threshold_of_a_layer(name: str) -> None:
    model = MODELS[name]()
    expected = tokens(model)
    for layer in model.model.layers:
        layer.self_attn = FlashMLALayer.from_attention(layer.self_attn, layers=3, threshold=0.0, preallocate=True)
        layer.self_attn.sparsity.min_context, layer.self_attn.sparsity.page_size = 4 * PAGE, PAGE
    assert torch.equal(tokens(model), expected)
    assert model.model.layers[1].self_attn.sparsity.report().together.calls == 19
    convert(model, threshold=0.3)
    (sparsity,) = {id(layer.self_attn.sparsity): layer.self_attn.sparsity for layer in model.model.layers}.values()
    sparsity.min_context, sparsity.page_size = 4 * PAGE, PAGE
    tokens(model)
    together = sparsity.report().together
    assert together.rows_attended < together.rows
    convert(model)
    assert torch.equal(tokens(model), expected)


def test_enable_again_and_disable() -> None:
    model = tiny_grouped()
    sparsity = sparse(eps=0.9)
    enable(model, sparsity=sparsity)
    again = pickle.loads(pickle.dumps(model))
    assert again.model.layers[0].self_attn.sparsity == sparsity
    enable(model)
    tokens(model)
    assert sparsity.report().layers == []
    enable(model, sparsity=sparsity)
    disable(model)
    assert not hasattr(model.model.layers[0].self_attn, "sparsity")


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("mode", {"mode": "magic"}),
        ("eps", {"eps": 1.5}),
        ("tau", {"tau": -0.1}),
        ("keep", {"keep": float("nan")}),
        ("local_pages", {"local_pages": 0}),
        ("sink_pages", {"sink_pages": -1}),
        ("min_context", {"min_context": -1}),
        ("page_size", {"page_size": 0}),
        ("mask", {"mode": "mask"}),
        ("mask", {"mask": torch.ones(1, 1, 1, dtype=torch.bool)}),
    ],
)
def test_options_out_of_range(argument: str, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError) as caught:
        DynamicSparsity(**options)
    assert caught.value.argument == argument


def test_threshold_out_of_range() -> None:
    with pytest.raises(ArgumentError, match="threshold"):
        convert(tiny_grouped(), threshold=2.0)
    with pytest.raises(ArgumentError, match="threshold"):
        convert(tiny_grouped(), threshold=0.1, sparsity=sparse())
