"""Every mask that transformers or a user can give, against transformers' SDPA over the expanded cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from flashmla_ops.errors import ArgumentError
from flashmla_ops.integrations.transformers import enable
from flashmla_ops.integrations.transformers.attention import absorbed_attention
from flashmla_ops.integrations.transformers.masks import (
    MAX_ABSORBED_QUERIES,
    absorbed_mask,
    boolean_mask,
    is_prefix,
    tokens_mask,
)
from flashmla_ops.integrations.transformers.rows import Pages
from tests.integrations.models import tiny_model, tokens

CLOSE = {"atol": 2e-5, "rtol": 2e-5}
LONG = st.sampled_from([MAX_ABSORBED_QUERIES, MAX_ABSORBED_QUERIES + 1])
MODEL = tiny_model()
enable(MODEL)
MODULE: nn.Module = MODEL.model.layers[0].self_attn


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents(b: int, s_q: int, s_kv: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A query, the cached latents and the cached rotary keys of one attention module."""
    d_qk = MODULE.qk_nope_head_dim + MODULE.qk_rope_head_dim
    query = random(b, MODULE.num_heads, s_q, d_qk, seed=seed)
    latent = random(b, 1, s_kv, MODULE.kv_lora_rank, seed=seed + 1)
    return query, latent, random(b, 1, s_kv, MODULE.qk_rope_head_dim, seed=seed + 2)


def expanded(query: Tensor, latent: Tensor, rope: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """The same attention by SDPA over expanded keys and values: ``[b, s_q, h_q, d_v]``."""
    key, value = MODULE.expanded(latent, rope)
    out = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=MODULE.scaling, **options)
    return out.transpose(1, 2)


def absorbed(query: Tensor, key: Tensor, value: Tensor | Pages, mask: Tensor | None) -> Tensor:
    return absorbed_attention(MODULE, query, key, value, mask, scaling=MODULE.scaling)[0]


def as_pages(latent: Tensor, rope: Tensor, page_size: int, seed: int) -> tuple[Tensor, Pages]:
    """The same rows spread over shuffled pages; unused rows are NaN."""
    b, _, s_kv, d_c = latent.shape
    per_sequence = -(-s_kv // page_size)
    rows = torch.full((b, per_sequence * page_size, d_c + rope.shape[-1]), torch.nan)
    rows[:, :s_kv] = torch.cat([latent, rope], dim=-1)[:, 0]
    place = torch.randperm(b * per_sequence, generator=torch.Generator().manual_seed(seed))
    pages = torch.empty(b * per_sequence, 1, page_size, rows.shape[-1])
    pages[place, 0] = rows.view(b * per_sequence, page_size, -1)
    table = place.to(torch.int32).view(b, per_sequence)
    return pages, Pages(table, torch.full((b,), s_kv, dtype=torch.int32), s_kv)


@st.composite
def boolean_masks(draw: st.DrawFn) -> Tensor:
    b, s_q, s_kv = draw(st.integers(1, 3)), draw(st.integers(1, 9) | LONG), draw(st.integers(1, 40))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    return torch.rand(b, 1, s_q, s_kv, generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))) < density


@given(boolean_masks())
@settings(max_examples=60)
def test_any_boolean_mask(mask: Tensor) -> None:
    b, _, s_q, s_kv = mask.shape
    query, latent, rope = latents(b, s_q, s_kv, seed=5)
    out = absorbed(query, latent, rope, mask)
    assert out.isfinite().all()
    seen = mask.any(dim=-1)[:, 0]
    torch.testing.assert_close(out[seen], expanded(query, latent, rope, mask)[seen], **CLOSE)


@given(boolean_masks(), st.sampled_from([1, 3, 16]))
@settings(max_examples=40)
def test_any_boolean_mask_over_pages(mask: Tensor, page_size: int) -> None:
    b, _, s_q, s_kv = mask.shape
    query, latent, rope = latents(b, s_q, s_kv, seed=7)
    out = absorbed(query, *as_pages(latent, rope, page_size, seed=1), mask)
    torch.testing.assert_close(out, absorbed(query, latent, rope, mask), **CLOSE)


@given(boolean_masks())
def test_tokens_mask_says_the_same(mask: Tensor) -> None:
    assert torch.equal(boolean_mask(tokens_mask(mask), mask.shape[-1]), mask)


@given(
    q_length=st.integers(1, 9) | LONG,
    q_offset=st.integers(0, 20),
    spare=st.integers(0, 5),
    static=st.booleans(),
    padding=st.sampled_from(["none", "ones", "left", "right", "holes"]),
    window=st.sampled_from([None, 4]),
)
@example(q_length=4, q_offset=6, spare=3, static=True, padding="ones", window=None)
def test_mask_function_is_sdpa_mask(
    q_length: int, q_offset: int, spare: int, static: bool, padding: str, window: int | None
) -> None:
    """Dynamic and static caches, 2-D padding masks shorter than a static cache, and other mask functions."""
    kv_length = q_offset + q_length + (spare if static else 0)
    holes = torch.ones(2, q_offset + q_length, dtype=torch.bool)
    holes[1] = {
        "left": torch.arange(q_offset + q_length) >= q_offset // 2,
        "right": torch.arange(q_offset + q_length) < q_offset + 1,
        "holes": torch.arange(q_offset + q_length) % 3 > 0,
    }.get(padding, holes[1])
    arguments: dict[str, Any] = {
        "batch_size": 2,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": torch.tensor(q_offset) if static else q_offset,
        "mask_function": sliding_window_causal_mask_function(window) if window else causal_mask_function,
        "attention_mask": None if padding == "none" else holes,
    }
    mask = absorbed_mask(**arguments)
    expected = sdpa_mask(**arguments, allow_is_causal_skip=False)
    plain = window is None and bool(holes.all())
    if q_length > MAX_ABSORBED_QUERIES and not plain:
        theirs = sdpa_mask(**arguments)
        assert (mask is None and theirs is None) or torch.equal(mask, theirs)
    else:
        assert mask.dtype == torch.int32
        assert torch.equal(boolean_mask(mask, kv_length).expand(expected.shape), expected)
        assert is_prefix(mask) == plain


@pytest.mark.parametrize("s_q", [1, 5])
def test_no_mask_means_what_it_means_to_sdpa(s_q: int) -> None:
    query, latent, rope = latents(2, s_q, s_q if s_q > 1 else 9, seed=3)
    expected = expanded(query, latent, rope, None, is_causal=s_q > 1)
    torch.testing.assert_close(absorbed(query, latent, rope, None), expected, **CLOSE)


def test_additive_and_per_head_masks() -> None:
    query, latent, rope = latents(2, 3, 11, seed=9)
    bias = random(2, 1, 3, 11, seed=10)
    per_head = random(2, MODULE.num_heads, 3, 11, seed=11) > -1
    for mask in (bias, per_head):
        out, expected = absorbed(query, latent, rope, mask), expanded(query, latent, rope, mask)
        torch.testing.assert_close(out, expected, **CLOSE)


def test_mask_broadcast_over_batch_and_queries() -> None:
    query, latent, rope = latents(2, 3, 11, seed=9)
    mask = torch.arange(11)[None, None, None] % 4 > 0
    torch.testing.assert_close(absorbed(query, latent, rope, mask), expanded(query, latent, rope, mask), **CLOSE)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 1, 3, 10, dtype=torch.bool),
        torch.ones(2, 1, 3, 11, dtype=torch.int32),
        torch.ones(2, 11, dtype=torch.bool),
    ],
)
def test_mask_of_another_length(mask: Tensor) -> None:
    query, latent, rope = latents(2, 3, 11, seed=9)
    with pytest.raises(ArgumentError, match="attention_mask"):
        absorbed(query, latent, rope, mask)


def test_user_mask_through_the_model() -> None:
    """A 4-D boolean mask given to the model replaces the causal one: here a tree of three drafts on one prefix."""
    eager, ids = tiny_model(), tokens(1, 15)
    mask = torch.ones(15, 15, dtype=torch.bool).tril()
    mask[13, 12] = mask[14, 12] = mask[14, 13] = False
    positions = torch.tensor([[*range(12), 12, 12, 12]])
    arguments = {"position_ids": positions, "use_cache": False}
    eager.set_attn_implementation("sdpa")
    expected = eager(ids, attention_mask=mask[None, None], **arguments).logits
    logits = MODEL(ids, attention_mask=mask[None, None], **arguments).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
