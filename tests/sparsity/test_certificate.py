"""What is proven of dynamic sparsity, against float64: no query loses more than it was told, nor more than eps."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashmla_ops.sparsity import DynamicSparsity, attend, select
from flashmla_ops.sparsity.report import LayerReport, Tally
from flashmla_ops.sparsity.summaries import SUMMARIES
from tests.sparsity.cases import KEYS, SparsityCase, sparsity_cases


def true_masses(case: SparsityCase, scores: Tensor) -> Tensor:
    """The masses of pages ``[h_q, s_q, pages]`` of scores ``[h_q, s_q, length]``."""
    blank = -scores.size(-1) % case.page_size
    padded = torch.nn.functional.pad(scores, (0, blank), value=float("-inf"))
    return padded.unflatten(-1, (-1, case.page_size)).logsumexp(dim=-1)


def check_masses(case: SparsityCase, kind: str) -> None:
    """Every page's mass lies within its bounds."""
    planes = DynamicSparsity("lsh").planes(case.d_qk, torch.device("cpu")) if kind == "signs" else None
    q, cache = case.build(kind, planes)
    assert cache.summaries is not None
    tensors = (*cache[:4], cache.summaries, kind, case.d_v, None, 0, 1, 0, planes)
    mass, slack = torch.ops.flashmla.page_mass(q, *tensors)
    for i, length in enumerate(case.lengths):
        pages = -(-length // case.page_size)
        truth = true_masses(case, case.scores(q, cache, i))
        near, room = mass[i, :, :, :pages].double(), slack[i, :, :, :pages].double()
        seen = truth > float("-inf")
        assert bool((truth <= near + room)[seen].all())
        assert bool((truth >= near - room)[seen].all())


def check_certificate(case: SparsityCase, sparsity: DynamicSparsity) -> None:
    """The truth is below the bound, the bound below eps, and what is attended to is what was chosen."""
    q, cache = case.build()
    chosen = select(q, cache, sparsity, case.d_v, None)
    out, lse, lost = attend(q, cache, sparsity, case.d_v, case.d_v)
    assert not out.isnan().any()
    if sparsity.mode == "certified":
        assert float(lost.amax()) <= sparsity.eps * 1.001 + 1e-9
    for i, length in enumerate(case.lengths):
        if length == 0:
            continue
        scores = case.scores(q, cache, i)
        group = case.h_q // case.h_kv
        for head in range(case.h_kv):
            heads = slice(head * group, (head + 1) * group)
            kept = case.kept(cache, chosen, i, head)
            assert int(kept.sum()) == int(chosen.lengths[i * case.h_kv + head])
            own = scores[heads]
            seen = (own > float("-inf")).any(dim=-1)
            assert bool((own[..., kept] > float("-inf")).any(dim=-1)[seen].all())  # no query is left with nothing
            truth = 1 - (own[..., kept].logsumexp(-1) - own.logsumexp(-1)).exp()
            assert bool((truth <= lost[i, heads].double() + 1e-12)[seen].all())
            close = (own[..., kept].logsumexp(-1) - lse[i, heads].double()).abs() <= 1e-3 * (1 + own.abs().amax(-1))
            assert bool(close[seen].all())


SPARSITIES = st.builds(
    DynamicSparsity,
    mode=st.sampled_from(["certified", "estimate"]),
    eps=st.sampled_from([0.0, 0.001, 0.1, 0.5, 1.0]),
    tau=st.sampled_from([0.01, 0.2]),
    sink_pages=st.integers(0, 2),
    local_pages=st.integers(1, 3),
    min_context=st.sampled_from([0, 0, 0, 100]),
)


@given(case=sparsity_cases(), kind=st.sampled_from(list(SUMMARIES)))
@settings(max_examples=60)
def test_masses_lie_within_their_bounds(case: SparsityCase, kind: str) -> None:
    check_masses(case, kind)


#: The first of several queries must keep something too, and a loss of nearly all is not rounded to less.
FIRST_QUERY = SparsityCase((8,), s_q=3, h_q=1, h_kv=1, page_size=1, d=9, d_v=1, dtype="bfloat16", q_spread=0.0)
NEARLY_ALL = SparsityCase((2,), h_q=3, h_kv=3, page_size=1, d=9, d_v=1, dtype="bfloat16", keys="scaled", q_spread=0.3)


@given(case=sparsity_cases(), sparsity=SPARSITIES)
@example(FIRST_QUERY, DynamicSparsity("estimate", tau=0.2, sink_pages=0, local_pages=1, min_context=0))
@example(NEARLY_ALL, DynamicSparsity("certified", eps=1.0, sink_pages=0, local_pages=1, min_context=0))
@settings(max_examples=150)
def test_truth_never_exceeds_the_certificate(case: SparsityCase, sparsity: DynamicSparsity) -> None:
    check_certificate(case, sparsity)


@pytest.mark.slow
@pytest.mark.parametrize(("examples", "keys"), [(10_000, ("normal",)), (1_000, KEYS[1:])])
def test_certificate_in_many_cases(examples: int, keys: tuple[str, ...]) -> None:
    @given(case=sparsity_cases(keys), sparsity=SPARSITIES)
    @settings(max_examples=examples, deadline=None)
    def check(case: SparsityCase, sparsity: DynamicSparsity) -> None:
        check_certificate(case, sparsity)

    check()


@pytest.mark.parametrize("where", ["q", "key"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_attended_to(where: str, value: float) -> None:
    """A live NaN or infinity proves nothing: its page is kept, or all are where it is in the query."""
    case = SparsityCase(lengths=(400,), h_q=2, h_kv=2, q_spread=0.1)
    q, cache = case.build()
    sparsity = DynamicSparsity(eps=0.5, min_context=0)
    before = select(q, cache, sparsity, case.d_v, None).lengths
    assert int(before.min()) < 400
    page = int(cache.block_table[0, 5])
    if where == "q":
        q[0, 0, 0, 3] = value
    else:
        cache.kv_cache[page, 2, 0, case.d_v + 1] = value
        slots = torch.tensor([page * case.page_size + case.page_size - 1])
        torch.ops.flashmla.summarize_(cache.summaries, cache.kv_cache, None, slots, "codes", case.d_v)
    chosen = select(q, cache, sparsity, case.d_v, None)
    if where == "q":
        assert chosen.lengths.tolist()[0] == 400
    else:
        assert bool(case.kept(cache, chosen, 0, 0)[5 * 16 : 6 * 16].all())


def test_needle_is_kept() -> None:
    """One key in a thousand that a query points at is attended to by the heads that point at it."""
    case = SparsityCase(lengths=(1000,), h_q=2, h_kv=2, d=48, keys="normal", q_spread=0.3)
    q, cache = case.build()
    page = int(cache.block_table[0, 31])
    cache.kv_cache[page, 7, 0, case.d_v :] = q[0, 0, 0] * 40
    slots = torch.tensor([page * case.page_size + case.page_size - 1])
    torch.ops.flashmla.summarize_(cache.summaries, cache.kv_cache, None, slots, "codes", case.d_v)
    for mode in ("certified", "estimate"):
        sparsity = DynamicSparsity(mode, eps=0.3, tau=0.03, min_context=0)
        chosen = select(q, cache, sparsity, case.d_v, None)
        assert int(chosen.lengths.min()) < 1000
        assert bool(case.kept(cache, chosen, 0, 0)[31 * 16 : 32 * 16].all())


def test_short_sequences_attend_to_all() -> None:
    case = SparsityCase(lengths=(300, 500), q_spread=0.1)
    q, cache = case.build()
    chosen = select(q, cache, DynamicSparsity(eps=0.5, min_context=400), case.d_v, None)
    assert chosen.lengths[:2].tolist() == [300, 300]
    assert max(chosen.lengths[2:].tolist()) < 500


def test_nothing_is_chosen_from_short_sequences() -> None:
    """The bits of `decode`, in its time; where one sequence is long enough, operators choose."""
    case = SparsityCase(lengths=(30, 0, 399), q_spread=0.1)
    q, cache = case.build()
    tally = Tally()
    sparsity = DynamicSparsity(eps=0.5, min_context=400)
    out, lse, lost = attend(q, cache, sparsity, case.d_v, case.d_v, tally=tally)
    dense = torch.ops.flashmla.decode(q, *cache[:4], case.d_v, case.d_v, causal=True)
    assert torch.equal(out, dense[0])
    assert torch.equal(lse, dense[1])
    assert not lost.any()
    report = LayerReport.of(0, tally)
    assert report.rows == report.rows_attended == 429 * case.h_kv
    assert report.lost == report.bytes_to_choose == 0
    compiled = torch.compile(lambda: attend(q, cache, sparsity, case.d_v, case.d_v), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled()[0], out)
    longer = replace(sparsity, min_context=399)
    with mock.patch("flashmla_ops.sparsity.select.select", side_effect=RuntimeError("chosen")):
        attend(q, cache, sparsity, case.d_v, case.d_v)
        with pytest.raises(RuntimeError, match="chosen"):
            attend(q, cache, longer, case.d_v, case.d_v)
