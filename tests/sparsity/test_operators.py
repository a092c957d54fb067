"""The kernels of dynamic sparsity against their definitions, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flashmla_ops.errors import ArgumentError, from_message
from flashmla_ops.ops._library import operator
from flashmla_ops.ops.pages import CHOOSE_PAGES, PAGE_MASS, SUMMARIZE
from flashmla_ops.reference.pages import RULES
from flashmla_ops.sparsity import DynamicSparsity, attend
from flashmla_ops.sparsity.heads import by_head
from flashmla_ops.sparsity.summaries import SUMMARIES, summary_bytes
from tests.sparsity.cases import SparsityCase, sparsity_cases
from tests.support.calls import CALLS

PLAIN = ("normal", "offset", "needle", "outlier")
CPU = torch.device("cpu")


@given(case=sparsity_cases(PLAIN), kind=st.sampled_from(list(SUMMARIES)))
@settings(max_examples=60)
def test_summaries_are_those_of_the_definition(case: SparsityCase, kind: str) -> None:
    planes = DynamicSparsity("lsh").planes(case.d_qk, CPU) if kind == "signs" else None
    _, cache = case.build(kind, planes)
    assert cache.summaries is not None
    expected, page_size = torch.full_like(cache.summaries, 0xFF), case.page_size
    slots = torch.arange(page_size - 1, len(expected) * page_size, page_size)
    keys = cache.kv_cache[..., case.d_v :].float().nan_to_num(0.0)
    rest = None if cache.k_cache is None else cache.k_cache.float().nan_to_num(0.0)
    caches = (torch.cat([cache.kv_cache[..., : case.d_v].float(), keys], dim=-1), rest, slots, kind, case.d_v, planes)
    found = expected.clone()
    SUMMARIZE.reference(expected, *caches)
    torch.ops.flashmla.summarize_(found, *caches)
    if kind == "codes":
        assert torch.equal(found[..., 16:], expected[..., 16:])
        radius, wanted = (x[..., :4].contiguous().view(torch.float32) for x in (found, expected))
        torch.testing.assert_close(radius, wanted, rtol=0.01, atol=0)
    elif kind == "boxes":
        assert torch.equal(found, expected)
    else:  # sums in another order, which may round to the next bfloat16 or cross a plane
        assert float((found != expected).float().mean()) < 0.05


@given(case=sparsity_cases(PLAIN), kind=st.sampled_from(list(SUMMARIES)))
@settings(max_examples=60)
def test_masses_are_those_of_the_definition(case: SparsityCase, kind: str) -> None:
    planes = DynamicSparsity("lsh").planes(case.d_qk, CPU) if kind == "signs" else None
    q, cache = case.build(kind, planes)
    tensors = (q, *cache[:4], cache.summaries, kind, case.d_v, None, 0, 1, 40, planes)
    mass, slack = torch.ops.flashmla.page_mass(*tensors)
    expected, room = PAGE_MASS.reference(*tensors)
    near = 1e-3 * (1 + q.abs().max()) * (30 if kind == "spread" else 1)
    torch.testing.assert_close(mass, expected, rtol=1e-3, atol=float(near))
    assert bool((slack >= room * 0.999).all())
    torch.testing.assert_close(slack, room, rtol=0.05, atol=float(near))


@st.composite
def choices(draw: st.DrawFn) -> dict[str, Any]:
    b, h_kv, group, s_q, pages = (draw(st.integers(1, n)) for n in (2, 3, 4, 2, 40))
    page_size = draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    shape = (b, h_kv * group, s_q, pages)
    mass = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.1, 3.0, 30.0]))
    slack = torch.rand(shape, generator=generator) * draw(st.sampled_from([0.0, 0.5, 4.0]))
    spoiled = draw(st.sampled_from([None, None, float("nan"), float("inf")]))
    if spoiled is not None:
        (mass if draw(st.booleans()) else slack).view(-1)[draw(st.integers(0, mass.numel() - 1))] = spoiled
    rule = draw(st.sampled_from(RULES))
    if rule == "mask":
        mass = torch.where(torch.rand(b, 1, 1, pages, generator=generator) < 0.5, mass, float("-inf"))
    return {
        "mass": mass,
        "slack": slack,
        "block_table": torch.randint(0, 1000, (b, pages), generator=generator, dtype=torch.int32),
        "cache_seqlens": torch.tensor([draw(st.integers(0, pages * page_size)) for _ in range(b)], dtype=torch.int32),
        "rule": rule,
        "limit": draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0])),
        "page_size": page_size,
        "h_kv": h_kv,
        "page_step": draw(st.integers(1, 4)),
        "head_step": draw(st.integers(0, 3)),
        "sink_pages": draw(st.integers(0, 2)),
        "local_pages": draw(st.integers(1, 3)),
        "min_context": draw(st.sampled_from([0, 30])),
    }


@given(arguments=choices())
@settings(max_examples=200)
def test_choices_are_those_of_the_definition(arguments: dict[str, Any]) -> None:
    found, expected = torch.ops.flashmla.choose_pages(**arguments), CHOOSE_PAGES.reference(**arguments)
    if arguments["rule"] == "certified" and not torch.equal(found[1], expected[1]):
        # Where the two sides of the proof are equal up to rounding one page more or less may go.
        assert float((found[1] - expected[1]).abs().max()) <= arguments["page_size"]
        assume(False)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("layout", ["slab", "rows", "sequences"])
def test_heads_are_pages_of_a_view(layout: str) -> None:
    n_pages, page_size, h_kv, d = 6, 4, 3, 5
    if layout == "slab":
        cache = torch.randn(n_pages, h_kv, page_size, d).transpose(1, 2)
    elif layout == "rows":
        cache = torch.randn(n_pages, page_size, h_kv, d)
    else:  # one sequence after another, each head's tokens together: as transformers has them
        room = torch.randn(1, h_kv, n_pages * page_size, d)
        cache = room[0].unflatten(1, (n_pages, page_size)).permute(1, 2, 0, 3)
    heads = by_head(cache, cache * 2 if layout == "rows" else None)
    assert heads.kv_cache.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
    for page in range(n_pages):
        for head in range(h_kv):
            view = heads.kv_cache[page * heads.page_step + head * heads.head_step]
            assert torch.equal(view[:, 0], cache[page, :, head])


def test_heads_that_lie_apart_are_refused() -> None:
    cache = torch.randn(6, 4, 3, 5)
    with pytest.raises(ArgumentError, match="k_cache"):
        by_head(cache, cache.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3))


def refused(name: str, argument: str, **changes: Any) -> None:
    arguments = CALLS[name].arguments() | changes
    for call in (operator(name), {"page_mass": PAGE_MASS, "choose_pages": CHOOSE_PAGES}.get(name, SUMMARIZE).reference):
        with pytest.raises(RuntimeError) as caught:
            call(**arguments)
        error = from_message(str(caught.value))
        assert isinstance(error, ArgumentError)
        assert (error.op, error.argument) == (name, argument)


INT = {"dtype": torch.int32}


@pytest.mark.parametrize(
    ("name", "argument", "changes"),
    [
        ("summarize_", "kind", {"kind": "magic"}),
        ("summarize_", "summaries", {"summaries": torch.zeros(3, 2, 7, dtype=torch.uint8)}),
        ("summarize_", "summaries", {"summaries": torch.zeros(3, 2, 112, dtype=torch.int8)}),
        ("summarize_", "slot_mapping", {"slot_mapping": torch.tensor([12])}),
        ("summarize_", "slot_mapping", {"slot_mapping": torch.tensor([1], **INT)}),
        ("summarize_", "qk_start", {"qk_start": 41}),
        ("summarize_", "planes", {"planes": torch.zeros(16, 128)}),
        ("summarize_", "planes", {"kind": "signs", "summaries": torch.zeros(3, 2, 104, dtype=torch.uint8)}),
        ("page_mass", "q", {"q": torch.zeros(2, 3, 6, 47)}),
        ("page_mass", "q", {"q": torch.zeros(2, 3, 5, 48)}),
        ("page_mass", "kv_cache", {"q": torch.zeros(2, 3, 6, 48, dtype=torch.bfloat16)}),
        ("page_mass", "block_table", {"block_table": torch.tensor([[0, 5], [2, 1]], **INT)}),
        ("page_mass", "cache_seqlens", {"cache_seqlens": torch.tensor([9, 1], **INT)}),
        ("page_mass", "cache_seqlens", {"cache_seqlens": torch.tensor([-1, 1], **INT)}),
        ("page_mass", "local_pages", {"local_pages": 0}),
        ("page_mass", "sink_pages", {"sink_pages": -1}),
        ("choose_pages", "rule", {"rule": "magic"}),
        ("choose_pages", "limit", {"limit": 1.5}),
        ("choose_pages", "limit", {"limit": float("nan")}),
        ("choose_pages", "slack", {"slack": torch.zeros(2, 6, 1, 4)}),
        ("choose_pages", "mass", {"h_kv": 4}),
        ("choose_pages", "block_table", {"block_table": torch.zeros(2, 4, **INT)}),
        ("choose_pages", "cache_seqlens", {"cache_seqlens": torch.tensor([13, 1], **INT)}),
    ],
)
def test_what_does_not_fit_is_refused(name: str, argument: str, changes: dict[str, Any]) -> None:
    refused(name, argument, **changes)


def test_what_is_not_live_is_not_looked_at() -> None:
    """Garbage behind a sequence's pages, and NaN in rows and summaries of no page of its own."""
    case = SparsityCase(lengths=(100, 33), dtype="bfloat16")
    q, cache = case.build()
    sparsity = DynamicSparsity(eps=0.5, min_context=0)
    out, lse, lost = attend(q, cache, sparsity, case.d_v, case.d_v)
    assert not any(bool(result.isnan().any()) for result in (out, lse, lost))
    assert summary_bytes("codes", 16, 24) == cache.summaries.shape[2]


def test_result_does_not_depend_on_threads() -> None:
    case = SparsityCase(lengths=(500, 300), h_q=6, h_kv=3)
    q, cache = case.build()
    tensors = (q, *cache[:4], cache.summaries, "codes", case.d_v)
    threads, found = torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(torch.ops.flashmla.page_mass(*tensors))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
