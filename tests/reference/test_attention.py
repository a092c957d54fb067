"""The float64 reference against attention written out with torch's own softmax, query by query."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.errors import ArgumentError
from tests import strategies
from tests.support.cases import DecodeCase, DecodeInputs, build
from tests.support.threads import threads


def plain(case: DecodeCase, inputs: DecodeInputs) -> tuple[Tensor, Tensor]:
    """Attention of each query row apart: lists, a matrix-vector product, torch.softmax."""
    out = torch.zeros(len(case.lengths), case.s_q, case.h_q, case.d_v, dtype=torch.float64)
    lse = torch.full((len(case.lengths), case.h_q, case.s_q), torch.inf, dtype=torch.float64)
    for i, length in enumerate(case.lengths):
        slots = [(int(inputs.block_table[i, t // case.page_size]), t % case.page_size) for t in range(length)]
        for s in range(case.s_q):
            seen = slots[: max(0, length - case.s_q + s + 1)] if case.causal else slots
            if not seen:
                continue
            rows = torch.stack([inputs.kv_cache[slot] for slot in seen]).double()  # [t, h_kv, d]
            keys = rows[..., case.qk_start :]
            if inputs.k_cache is not None:
                second = torch.stack([inputs.k_cache[slot] for slot in seen]).double()
                keys = torch.cat([keys, second], dim=-1)
            for h in range(case.h_q):
                kv_head = h // (case.h_q // case.h_kv)
                scores = keys[:, kv_head] @ inputs.q[i, s, h].double() * case.scale
                lse[i, h, s] = scores.exp().sum().log()
                weights = scores.softmax(0)
                if inputs.attn_sink is not None:
                    sink = inputs.attn_sink[h].double()
                    weights = torch.cat([scores, sink[None]]).softmax(0)[:-1] if sink != torch.inf else weights * 0
                out[i, s, h] = weights @ rows[:, kv_head, : case.d_v]
    return out, lse


@settings(max_examples=150)
@given(strategies.decode_cases())
def test_decode(case: DecodeCase) -> None:
    case = replace(
        case, lengths=tuple(min(n, 40) for n in case.lengths[:3]), h_q=case.h_kv * min(case.h_q // case.h_kv, 3)
    )
    case = replace(case, num_parts=None, q_spread=1.0)
    inputs = build(case)
    with threads(1):
        out, lse = reference.decode(**inputs.reference_kwargs())
        expected, expected_lse = plain(case, inputs)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-10)


@settings(max_examples=100)
@given(st.integers(1, 4), st.integers(1, 5), strategies.SEEDS)
def test_merge_states_is_softmax_over_the_union(parts: int, h: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(h, 2, 3 + i, generator=generator, dtype=torch.float64) for i in range(parts)]
    values = [torch.randn(3 + i, 6, generator=generator, dtype=torch.float64) for i in range(parts)]
    outs = [(x.softmax(-1) @ v).transpose(0, 1) for x, v in zip(scores, values, strict=True)]
    out, lse = reference.merge_states(outs, [x.logsumexp(-1) for x in scores])
    union = torch.cat(scores, dim=-1)
    torch.testing.assert_close(out, (union.softmax(-1) @ torch.cat(values)).transpose(0, 1))
    torch.testing.assert_close(lse, union.logsumexp(-1))


def test_append_and_gather_are_inverse() -> None:
    cache = torch.full((4, 3, 2, 5), torch.nan)
    rows = torch.randn(7, 2, 5)
    pages = torch.tensor([2, 0, 3, 9999], dtype=torch.int32)
    slots = torch.tensor([int(pages[t // 3]) * 3 + t % 3 for t in range(7)])
    reference.append(cache, rows, slots)
    assert torch.equal(reference.gather_rows(cache, pages, 0, 7), rows)
    assert int(cache.isnan().sum()) == (12 - 7) * 10
    with pytest.raises(ArgumentError, match=r"got 9999 at \[5, 3\]"):
        reference.gather_rows(cache, pages, 0, 10, sequence=5)
